"""Where simulated hospitals come from: one file a source, each with its terms and a function that makes hospitals."""

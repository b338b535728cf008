"""Where simulated hospitals get their records from: one file a source, one line each in ``hospitals``."""

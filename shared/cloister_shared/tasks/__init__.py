"""One file a task; ``zoo`` lists them all."""

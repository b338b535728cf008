"""What a study trains: one file a task. ``zoo`` is the whole list; ``layout`` is what of a model travels."""

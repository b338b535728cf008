"""What a model's answers mean and how good they are: one file a kind of outcome. ``outcome`` is the list."""

"""A record's cells to the numbers that a model takes: one file a kind of feature, and one for outcomes."""

"""Sources of records for scenarios: real ones where this machine has them, and invented ones. One file a kind."""

"""Where scenarios' hospitals come from, one file a source: real records or generated ones, to tables on disk."""

"""One file a revision; alembic finds them here."""

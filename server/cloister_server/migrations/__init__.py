"""Revisions of the records' schema, oldest first. A revision that was released is never changed; a new one follows it.

What ``registry`` calls a table is what all revisions together make; a test holds the two against each other.
"""

REVISIONS = ("0001", "0002")
"""Written out here so that a database of this release is known without alembic, which takes 0.2 s to import."""

VERSION_TABLE = "cloister_version"
"""Flower's own database has a table of alembic's usual name; ours is never taken for it."""

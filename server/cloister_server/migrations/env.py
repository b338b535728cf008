"""What alembic runs: the revisions, on the connection that ``registry`` opened and within its one transaction."""

from alembic import context

from cloister_server.migrations import VERSION_TABLE

context.configure(
    connection=context.config.attributes["connection"], version_table=VERSION_TABLE, transactional_ddl=True
)
context.run_migrations()

"""Hospitals and invites, accounts, studies with their decisions and rounds."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """From nothing."""
    op.create_table(
        "invites",
        sa.Column("serial", sa.String(50), primary_key=True),
        sa.Column("hospital", sa.String(60), nullable=False),
        sa.Column("expires", sa.DateTime, nullable=False),
        sa.Column("taken", sa.DateTime),
    )
    op.create_table(
        "hospitals",
        sa.Column("name", sa.String(60), primary_key=True),
        sa.Column("identity", sa.String(64), nullable=False, unique=True),
        sa.Column("public_key", sa.Text, nullable=False, unique=True),
        sa.Column("node", sa.String(50), nullable=False, unique=True),
        sa.Column("serial", sa.String(50), nullable=False),
        sa.Column("not_after", sa.DateTime, nullable=False),
        sa.Column("standing", sa.String(10), nullable=False),
        sa.Column("version", sa.String(80), nullable=False),
        sa.Column("seen", sa.DateTime),
    )
    op.create_table(
        "accounts",
        sa.Column("name", sa.String(60), primary_key=True),
        sa.Column("role", sa.String(20), nullable=False),
        sa.Column("token", sa.String(64), nullable=False),
    )
    op.create_table(
        "studies",
        sa.Column("digest", sa.String(64), primary_key=True),
        sa.Column("name", sa.String(60), nullable=False),
        sa.Column("plan", sa.Text, nullable=False),
        sa.Column("file", sa.Text, nullable=False),
        sa.Column("submitted_by", sa.String(60), nullable=False),
        sa.Column("roster", sa.Text, nullable=False),
        sa.Column("offer", sa.Text, nullable=False),
        sa.Column("at", sa.DateTime, nullable=False),
        sa.Column("state", sa.String(10), nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
    )
    op.create_table(
        "decisions",
        sa.Column("digest", sa.String(64), sa.ForeignKey("studies.digest"), primary_key=True),
        sa.Column("site", sa.String(60), primary_key=True),
        sa.Column("decision", sa.String(10), nullable=False),
        sa.Column("envelope", sa.Text, nullable=False),
    )
    op.create_table(
        "rounds",
        sa.Column("digest", sa.String(64), sa.ForeignKey("studies.digest"), primary_key=True),
        sa.Column("number", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("said", sa.Text, nullable=False),
    )

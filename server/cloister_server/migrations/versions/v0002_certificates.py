"""Every certificate a hospital ever had, so that expulsion revokes those before a renewal too."""

from datetime import UTC, datetime

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Each hospital's one certificate moves to a table of its own."""
    op.create_table(
        "certificates",
        sa.Column("serial", sa.String(50), primary_key=True),
        sa.Column("hospital", sa.String(60), sa.ForeignKey("hospitals.name"), nullable=False),
        sa.Column("not_after", sa.DateTime, nullable=False),
        sa.Column("revoked", sa.DateTime),
    )
    now = datetime.now(UTC).replace(tzinfo=None)
    op.get_bind().execute(
        sa.text(
            "INSERT INTO certificates (serial, hospital, not_after, revoked)"
            " SELECT serial, name, not_after, CASE standing WHEN 'expelled' THEN :now END FROM hospitals"
        ).bindparams(sa.bindparam("now", now, sa.DateTime))
    )
    op.drop_column("hospitals", "not_after")

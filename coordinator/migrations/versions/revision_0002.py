"""Columns for what garbage collection has to know without reading documents: which blobs are needed, and how long.

`tasks.tensors_sha256` is what the store still keeps. It may be forgotten while the document goes on naming the digest.
"""

from alembic import op

revision = "0002"
down_revision: str | None = "0001"

_STATEMENTS = (
    "ALTER TABLE tasks ADD COLUMN tensors_sha256 VARCHAR(64)",
    "ALTER TABLE checkpoints ADD COLUMN shared_sha256 VARCHAR(64)",
    "ALTER TABLE checkpoints ADD COLUMN memory_sha256 VARCHAR(64)",
    "ALTER TABLE experiments ADD COLUMN end_time FLOAT",
    "UPDATE tasks SET tensors_sha256 = json_extract(document, '$.tensors.sha256')",
    "UPDATE checkpoints SET shared_sha256 = json_extract(document, '$.shared.sha256'),"
    " memory_sha256 = json_extract(document, '$.memory.sha256')",
    "UPDATE experiments SET end_time = json_extract(document, '$.end_time')",
    "CREATE INDEX ix_tasks_tensors_sha256 ON tasks (tensors_sha256)",
    "CREATE INDEX ix_checkpoints_shared_sha256 ON checkpoints (shared_sha256)",
    "CREATE INDEX ix_checkpoints_memory_sha256 ON checkpoints (memory_sha256)",
    "PRAGMA user_version = 3",  # the first release looks at this only, and refuses a newer one
)


def upgrade() -> None:
    """Add the columns and fill them. A document that is no JSON fails it all: its blobs would look unneeded."""
    for statement in _STATEMENTS:
        op.execute(statement)

"""The schema of the first release, which calls itself 2 in `PRAGMA user_version`.

The text is to the letter what that release makes, so that a store of it and one made today are the same.
"""

from alembic import op

revision = "0001"
down_revision: str | None = None

_TABLES = {
    "blobs": ("sha256 VARCHAR(64) NOT NULL", "byte_count BIGINT NOT NULL", "data BLOB", "PRIMARY KEY (sha256)"),
    "experiments": (
        "experiment_id VARCHAR(63) NOT NULL",
        "state VARCHAR(16) NOT NULL",
        "create_time FLOAT NOT NULL",
        "document TEXT NOT NULL",
        "PRIMARY KEY (experiment_id)",
    ),
    "tasks": (
        "task_id VARCHAR(200) NOT NULL",
        "experiment_id VARCHAR(63) NOT NULL",
        "round_number INTEGER NOT NULL",
        "document TEXT NOT NULL",
        "PRIMARY KEY (task_id)",
    ),
    "checkpoints": (
        "experiment_id VARCHAR(63) NOT NULL",
        "round_number INTEGER NOT NULL",
        "document TEXT NOT NULL",
        "PRIMARY KEY (experiment_id, round_number)",
    ),
    "silos": ("silo_id VARCHAR(63) NOT NULL", "document TEXT NOT NULL", "PRIMARY KEY (silo_id)"),
    "events": (
        "number INTEGER NOT NULL PRIMARY KEY AUTOINCREMENT",
        "time FLOAT NOT NULL",
        "experiment_id VARCHAR(63) NOT NULL",
        "document TEXT NOT NULL",
    ),
}
_INDEXES = {
    "ix_experiments_create_time": "experiments (create_time)",
    "ix_experiments_state": "experiments (state)",
    "tasks_by_round": "tasks (experiment_id, round_number)",
    "ix_events_experiment_id": "events (experiment_id)",
}


def upgrade() -> None:
    """Make the tables. Some may be there: that release, killed at its very first start, left them empty."""
    for name, columns in _TABLES.items():
        lines = ", \n\t".join(columns)
        op.execute(f"CREATE TABLE IF NOT EXISTS {name} (\n\t{lines}\n)")
    for name, columns_of_table in _INDEXES.items():
        op.execute(f"CREATE INDEX IF NOT EXISTS {name} ON {columns_of_table}")
    op.execute("PRAGMA user_version = 2")

"""One module for each revision; Alembic finds them by their files."""

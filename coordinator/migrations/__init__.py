"""The schemas that the coordinator's database has had, and the way from each to the next. See ADR 0016.

A revision that was released is never changed. Its statements are plain SQL: the code that wrote the old schema may be
gone, and the code of today may be another tomorrow.
"""

REVISIONS = ("0001", "0002")
"""All of them, oldest first, so that a store can be judged without importing Alembic."""

FIRST, HEAD = REVISIONS[0], REVISIONS[-1]

"""A clock that jumps, by a day in either direction, changes nothing that a silo decides."""

import ast
from collections.abc import Iterator
from pathlib import Path

import silo

# Who may ask what time it is on the wall, and why that decides nothing; everybody else asks the monotonic clock.
ALLOWED = {
    "app.py": "whether the certificate is valid now",
    "cli.py": "whether the certificate is valid now",
    "host/app.py": "whether the certificates are valid now",
    "link.py": "what is said about a handshake that failed",
    "departures.py": "the time that a line names, for people",
    "presence.py": "the time that a status names, for people",
    "checkpoint_directory.py": "when a file nobody claims is removed; a task may start again, with the same bits",
}
WALL = {("time", "time"), ("time", "time_ns"), ("datetime", "now"), ("datetime", "utcnow"), ("datetime", "today")}
PROGRAMS = ("demo", "lab", "embedded", "feature_store", "partition")  # not part of the daemon, or of no consequence


def asks(path: Path) -> Iterator[int]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in WALL:
            yield node.lineno


def test_only_named_modules_of_the_daemon_look_at_the_wall_clock() -> None:
    root = Path(silo.__file__).parent
    places = {path.relative_to(root) for path in root.rglob("*.py") if any(asks(path))}
    assert {str(place) for place in places if place.parts[0] not in PROGRAMS} == set(ALLOWED)

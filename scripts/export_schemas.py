"""Writes the JSON Schemas of the files that operators write to docs/schemas; --check only compares.

Run `.venv/bin/python scripts/export_schemas.py` after changing a configuration model or a method's hyper-parameters.
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from coordinator.config import CoordinatorConfig  # noqa: E402
from fedrt.config import json_schema  # noqa: E402
from fedrt.experiment_file import experiment_schema  # noqa: E402
from silo.config import SiloConfig  # noqa: E402
from silo.host.config import HostConfig  # noqa: E402
from silo.lab.sections import lab_schema  # noqa: E402

DIRECTORY = ROOT / "docs" / "schemas"


def schemas() -> dict[Path, str]:
    """The text of every schema by the file that it belongs into."""
    found = {
        "silo": json_schema(SiloConfig),
        "host": json_schema(HostConfig),
        "coordinator": json_schema(CoordinatorConfig),
        "experiment": experiment_schema(),
        "lab": lab_schema(),
    }
    return {
        DIRECTORY / f"{name}.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
        for name, schema in found.items()
    }


def main() -> int:
    """Write or check; 1 if a file is not current."""
    stale = [path for path, text in schemas().items() if not path.is_file() or path.read_text("utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.relative_to(ROOT)} is not current; run: python scripts/export_schemas.py", file=sys.stderr)
        return 1 if stale else 0
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for path, text in schemas().items():
        path.write_text(text, "utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Records the state directory of this version's coordinator amid an experiment, for the tests of later ones.

Run it at a release, with the code that is released: `.venv/bin/python scripts/record_store.py --label NAME`. Of four
rounds the second is under way: the result of silo 'north' is stored, that of 'south' is awaited. The file is SQL text.
"""

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fedrt  # noqa: E402
from fedrt.v1 import admin_service_pb2 as pb  # noqa: E402
from tests.fakes import recording, stores  # noqa: E402
from tests.fakes.federation import Federation  # noqa: E402
from tests.fakes.recording import HeldWorker  # noqa: E402


async def record(directory: Path) -> str:
    """The dump, taken while the coordinator runs: what is there after a power cut."""
    federation = Federation(directory, stores.SILOS)
    workers = {name: HeldWorker(held=(stores.HELD,)) for name in stores.SILOS}
    async with federation.started(workers):
        await federation.create("upgraded", stores.small_spec(stores.ROUNDS, stores.SILOS, every=2))
        await workers["south"].working_on(stores.HELD)
        async with federation.admin() as stub:
            async with asyncio.timeout(recording.LIMIT):  # until the result of north is stored
                while (await stub.ListSilos(pb.ListSilosRequest())).silos[0].open_task_ids:  # noqa: ASYNC110
                    await asyncio.sleep(0.05)
        header = f"The store of a coordinator, fedrt {fedrt.__version__}; see scripts/record_store.py."
        text = stores.dump(directory / "coordinator" / "coordinator.db", header, time.time())
        workers["south"].release(stores.HELD)
        await federation.finish("upgraded")
    return text


def main() -> None:
    """Record and write the file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--label", default=fedrt.__version__, help="end of the name of the file")
    parser.add_argument("--into", type=Path, default=ROOT / "tests" / "golden" / "stores")
    settings = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        text = asyncio.run(record(Path(directory) / "federation"))
    target = settings.into / f"under-way-{settings.label}.sql"
    target.write_text(text)
    print(f"{target}: {len(text)} characters")


if __name__ == "__main__":
    main()

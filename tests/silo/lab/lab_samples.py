"""A small lab.yaml and finished cells made by hand, for the tests of the lab."""

from pathlib import Path

from silo.lab.grid import Cell, FederationPlan, cells_of, expand
from silo.lab.records import FORMAT, CellRecord, RoundPart, SiloPart
from silo.lab.sections import LabFile, load_lab

LAB = """\
lab: trial
directory: results
model: {architecture: fedrt-tiny, weights: embedded, device: cpu, threads: 1}
data:
  world:
    scanners: [tinted, coarse]
    classes: 4
    train_images: 6
    test_images: 4
training: {batch_size: 8, optimizer: {name: adamw, learning_rate: 0.01}}
rounds: {count: 4}
settings:
  iid:
    partition: {kind: iid, silos: 2}
methods:
  zeroshot:
    method: {name: zeroshot}
  promptfl:
    method: {name: promptfl, context_length: 4}
seeds: [1, 2]
"""


def write_lab(directory: Path, text: str = LAB) -> Path:
    path = directory / "lab.yaml"
    path.write_text(text)
    return path


def read(directory: Path, text: str = LAB) -> tuple[LabFile, tuple[FederationPlan, ...]]:
    lab = load_lab(write_lab(directory, text))
    return lab, expand(lab, directory)


def cells(directory: Path, text: str = LAB) -> list[Cell]:
    return list(cells_of(read(directory, text)[1]))


def evaluation(number: int, silos: dict[str, dict[str, float]]) -> RoundPart:
    """An evaluation after round `number`: silo -> metrics."""
    return closed(number, "evaluate", silos)


def closed(number: int, task: str, silos: dict[str, dict[str, float]], succeeded: bool = True) -> RoundPart:
    parts = {
        silo: SiloPart(examples=10, metrics=metrics, work_seconds=0.1, payload_bytes=0)
        for silo, metrics in silos.items()
    }
    return RoundPart(round=number, task=task, succeeded=succeeded, duration_seconds=0.5, silos=parts, absent={})


def record(cell: Cell, *rounds: RoundPart, **other: object) -> CellRecord:
    held = {"train": 20, "test": 10, "base": 30, "novel": 40, "domain": 50}
    fields: dict[str, object] = {
        "format": FORMAT,
        "setting": cell.setting,
        "method": cell.label,
        "seed": cell.seed,
        "digest": cell.digest,
        "weights_sha256": "ab" * 32,
        "partition_digest": f"{cell.setting} {cell.seed}",
        "holdings": {"silo-01": held, "silo-02": held},
        "experiment": {"experiment": cell.cell_id},
        "method_digest": "cd" * 32,
        "wall_seconds": 3.0,
        "software": "0.1.0",
        "rounds": rounds,
    }
    return CellRecord.model_validate(fields | other)

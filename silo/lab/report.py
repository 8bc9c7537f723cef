"""Writes what a lab has found: `results.csv`, `summary.md` and the figures, from the cells that are finished."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedrt.errors import FedrtError
from fedrt.statefile import storage_error, write_atomic
from silo.lab.figures import check_drawing, draw_figures, figures_directory
from silo.lab.grid import FederationPlan, cells_of
from silo.lab.images import foreseen_collection
from silo.lab.measurements import measurements, write_csv
from silo.lab.records import CellRecord
from silo.lab.sections import LabFile
from silo.lab.tables import summary_markdown
from silo.partition.dealing import deal
from silo.partition.figures import plot


def write_tables(lab: LabFile, plans: Sequence[FederationPlan], records: Mapping[str, CellRecord]) -> list[Path]:
    """Write results.csv and summary.md. Raises `StorageError`."""
    directory = lab.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise storage_error("create directory", directory, error) from error
    finished = [records[cell.cell_id] for cell in cells_of(plans) if cell.cell_id in records]
    results, summary = directory / "results.csv", directory / "summary.md"
    write_csv(results, (row for record in finished for row in measurements(record)))
    write_atomic(summary, summary_markdown(lab, plans, records).encode(), 0o644)
    return [results, summary]


def write_report(
    lab: LabFile, plans: Sequence[FederationPlan], records: Mapping[str, CellRecord]
) -> tuple[list[Path], list[str]]:
    """Write tables and figures; the files, and what could not be drawn. Raises `StorageError`."""
    check_drawing()
    written = write_tables(lab, plans, records)
    written += draw_figures(lab.directory, plans, records, list(lab.methods))
    complaints = []
    for setting in lab.settings:
        first = next((plan for plan in plans if plan.setting == setting), None)
        if first is None:
            continue
        path = figures_directory(lab.directory) / f"{setting}-holdings.png"
        try:
            if draw_holdings(lab, first, path):
                written.append(path)
        except FedrtError as error:
            complaints.append(f"who holds what in {setting!r} is not drawn: {error}")
    return written, complaints


def draw_holdings(lab: LabFile, plan: FederationPlan, path: Path) -> bool:
    """Draw who holds which images; False for images of torchvision that are not exported. Raises `FedrtError`."""
    collection = foreseen_collection(plan.data, lab.directory)
    if collection is None:
        return False
    plot(deal(collection, plan.partition, plan.seed), path)
    return True

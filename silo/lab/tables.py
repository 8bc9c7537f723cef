"""Writes `summary.md`: per setting a table of accuracies, and one of what is measured beside them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fedrt.notation import format_duration
from fedrt.task import TaskKind
from silo.lab.described import method_sentences, setting_sentences
from silo.lab.grid import FederationPlan, cells_of, counted, splits_of
from silo.lab.measurements import PERSONAL
from silo.lab.records import CellRecord, disagreements
from silo.lab.sections import LabFile
from silo.lab.summary import (
    BASE,
    DOMAIN,
    HARMONIC,
    LOWER_IS_BETTER,
    NOVEL,
    CellValue,
    Quantity,
    Spread,
    last_values,
    leader,
    over_seeds,
)

NOTHING = "–"
NAMED = 12  # cells that are not finished
SPLIT_NAMES = {PERSONAL: "personal", BASE: "base", NOVEL: "novel", DOMAIN: "domain", HARMONIC: "harmonic mean"}
BESIDE = {"macro_f1": "macro-F1", "auroc": "AUROC", "calibration_error": "calibration error"}
_Values = Mapping[str, Sequence[Mapping[Quantity, CellValue]]]  # label -> one for each finished seed


@dataclass(frozen=True)
class Column:
    """One column: its heading and what it shows."""

    heading: str
    quantity: Quantity


def summary_markdown(lab: LabFile, plans: Sequence[FederationPlan], records: Mapping[str, CellRecord]) -> str:
    """The whole document, from the finished cells by cell id."""
    cells = list(cells_of(plans))
    missing = [cell.name for cell in cells if cell.cell_id not in records]
    lines = [
        f"# {lab.lab}",
        "",
        f"{len(cells) - len(missing)} of {len(cells)} cells are finished: {counted(lab.settings, 'setting')}, "
        f"{counted(lab.methods, 'method')}, {counted(lab.seeds, 'seed')}. "
        f"Model: {lab.model.architecture}, weights {_weights(records)}.",
        "",
        "All numbers are percentages, of the last round. A cell's value is the unweighted mean over its silos, each "
        "measured on its own test images with its own private tensors; the tables give mean ± standard deviation over "
        "seeds. Bold: ahead of the second best by more than the larger deviation of the two, in columns where every "
        "row has all seeds.",
        "",
    ]
    if len(lab.seeds) == 2:
        lines.append(
            "* A deviation of two seeds rests on two values only, and so does what is bold; run three or more."
        )
    if missing:
        more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
        lines.append(f"* Not finished: {'; '.join(missing[:NAMED])}{more}.")
    lines += [f"* {sentence}" for sentence in disagreements(list(records.values()))]
    lines += ["", "Methods:", "", *(f"* {sentence}" for sentence in method_sentences(lab, plans))]
    for name in lab.settings:
        of_setting = [plan for plan in plans if plan.setting == name]
        if of_setting:
            lines += ["", f"## {name}", "", *_setting(lab, of_setting, records)]
    return "\n".join(lines).replace("\n\n\n", "\n\n").rstrip() + "\n"


def _setting(lab: LabFile, plans: Sequence[FederationPlan], records: Mapping[str, CellRecord]) -> Iterator[str]:
    of_setting = [records[cell.cell_id] for cell in cells_of(plans) if cell.cell_id in records]
    yield " ".join(setting_sentences(lab, plans, of_setting))
    yield ""
    values: dict[str, list[Mapping[Quantity, CellValue]]] = {}
    for label in lab.methods:
        found = [records[cell.cell_id] for cell in cells_of(plans) if cell.label == label and cell.cell_id in records]
        if found:
            values[label] = [last_values(record) for record in found]
    if not values:
        yield "No cell of this setting is finished yet."
        return
    splits = [split.value for split in splits_of(plans[0].partition)]
    headings = {label: _row_name(lab, label, values[label]) for label in values}
    for columns in _tables(splits):
        yield from markdown_table(headings, columns, values, len(lab.seeds))
        yield ""
    yield from _notes(values, of_setting)


def _tables(splits: Sequence[str]) -> Iterator[list[Column]]:
    """The columns of each table: with the personal split alone, all in one."""
    beside = [(split, measure) for split in splits for measure in BESIDE]
    if list(splits) == [PERSONAL]:
        yield [Column("accuracy", Quantity(PERSONAL, "accuracy"))] + [
            Column(BESIDE[measure], Quantity(split, measure)) for split, measure in beside
        ]
        return
    accuracies = [Column(SPLIT_NAMES[split], Quantity(split, "accuracy")) for split in splits]
    if NOVEL in splits:
        accuracies.append(Column(SPLIT_NAMES[HARMONIC], Quantity(HARMONIC, "accuracy")))
    yield accuracies
    yield [Column(f"{BESIDE[measure]}, {SPLIT_NAMES[split]}", Quantity(split, measure)) for split, measure in beside]


def markdown_table(
    headings: Mapping[str, str], columns: Sequence[Column], values: _Values, seeds: int
) -> Iterator[str]:
    """The lines of a table: a row for each label, the leader of each column in bold if all rows have all `seeds`."""
    spreads = {
        column: {label: over_seeds(cells, column.quantity) for label, cells in values.items()} for column in columns
    }
    bold = {column: leader(spreads[column], seeds, column.quantity.measure in LOWER_IS_BETTER) for column in columns}
    yield f"| method | {' | '.join(column.heading for column in columns)} |"
    yield f"|---|{'---:|' * len(columns)}"
    for label in values:
        texts = [_text(spreads[column][label], bold[column] == label) for column in columns]
        yield f"| {headings[label]} | {' | '.join(texts)} |"


def _text(value: Spread | None, bold: bool) -> str:
    if value is None:
        return NOTHING
    text = percent(value)
    return f"**{text}**" if bold else text


def percent(value: Spread) -> str:
    """A spread in per cent: `73.40 ± 0.52`, or `73.40` with one seed."""
    deviation = "" if value.deviation is None else f" ± {100 * value.deviation:.2f}"
    return f"{100 * value.mean:.2f}{deviation}"


def _row_name(lab: LabFile, label: str, cells: Sequence[object]) -> str:
    return label if len(cells) == len(lab.seeds) else f"{label} ({len(cells)} of {counted(lab.seeds, 'seed')})"


def _notes(values: _Values, records: Sequence[CellRecord]) -> Iterator[str]:
    """What was left out of a mean, and what the cells cost."""
    cells = [cell for of_label in values.values() for cell in of_label]
    for split, name in SPLIT_NAMES.items():
        quantity, measured = Quantity(split, "auroc"), Quantity(split, "accuracy")
        total = sum(cell[measured].present for cell in cells if measured in cell)
        present = sum(cell[quantity].present for cell in cells if quantity in cell)
        if split != HARMONIC and present < total:
            yield (
                f"* AUROC ({name}) is not defined for {total - present} of {total} silos measured, which hold test "
                "images of one class only; they are left out of its mean."
            )
    for record in records:
        last = record.of_task(TaskKind.EVALUATE.value)[-1:]
        measured_silos = len(last[0].silos) if last else 0
        if measured_silos < len(record.holdings):
            yield (
                f"* {record.method}, seed {record.seed}: {measured_silos} of {len(record.holdings)} silos were "
                "measured after the last round; the mean is over these."
            )
    seconds = sum(record.wall_seconds for record in records)
    yield f"* Time: {format_duration(round(seconds))} for {counted(records, 'cell')}."


def _weights(records: Mapping[str, CellRecord]) -> str:
    digests = sorted({record.weights_sha256[:12] for record in records.values()})
    return " and ".join(digests) if digests else "not read yet"

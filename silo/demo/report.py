"""What the demo prints at its end (rich): accuracies, what left the building, and where everything lies."""

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from fedrt.ctl_view import span_text
from silo.demo.directory import Layout
from silo.demo.hospitals import SILOS
from silo.demo.outcome import Outcome


def print_report(console: Console, layout: Layout, outcome: Outcome) -> None:
    """Print everything."""
    console.print("\n[bold] Accuracy on each hospital's own test images[/]")
    console.print(_accuracy_table(outcome))
    console.print("[bold] What left the building: messages and tensors, from each silo's own record[/]")
    console.print(_departures_table(outcome))
    console.print(Padding(_verdict(outcome), (0, 1)))
    console.print()
    for line in _places(layout, outcome):
        console.print(line, soft_wrap=True)  # a path stays in one piece, to be copied


def _accuracy_table(outcome: Outcome) -> Table:
    table = _table()
    for column in ("silo", "scanner"):
        table.add_column(column)
    for column in ("trained on", "tested on", "zero-shot", "federated", "gain"):
        table.add_column(column, justify="right")
    for silo in SILOS:
        data = outcome.data[silo]
        table.add_row(silo, data.scanner, str(data.train_count), str(data.test_count), *_accuracies(outcome, silo))
    table.add_section()
    table.add_row("mean", "", "", "", *_accuracies(outcome, None), style="bold")
    return table


def _accuracies(outcome: Outcome, silo: str | None) -> tuple[str, str, Text]:
    before, after = outcome.zero_shot(silo), outcome.federated(silo)
    return f"{before:.3f}", f"{after:.3f}", Text(f"{after - before:+.3f}", "green" if after > before else "red")


def _departures_table(outcome: Outcome) -> Table:
    """Kinds of messages, then tensors; a column per silo."""
    table = _table()
    table.add_column("message or tensor", no_wrap=True)
    table.add_column("what it holds")
    for silo in SILOS:
        table.add_column(silo, justify="right", no_wrap=True)
    departed = [outcome.departed[silo] for silo in SILOS]
    for kind in sorted({kind for one in departed for kind in one.messages}):
        table.add_row(kind, _MEANINGS.get(kind, "unknown"), *(f"{one.messages.get(kind, 0):,}" for one in departed))
    table.add_section()
    kinds = sorted({(tensor.name, tensor.shape, tensor.element_type) for one in departed for tensor in one.tensors})
    for name, shape, element_type in kinds:
        found = [one.tensor(name, shape, element_type) for one in departed]
        text = f"{' x '.join(map(str, shape))} {element_type.lower()}: times sent"
        table.add_row(Text(name, "bold"), text, *(f"{tensor.times:,}" if tensor else "0" for tensor in found))
        table.add_row("", "bytes in all", *(f"{tensor.byte_count:,}" if tensor else "0" for tensor in found))
    return table


_MEANINGS = {
    "Hello": "software version, methods, device",
    "Heartbeat": "that the silo is alive",
    "TaskReply": "that it takes a task, or why not",
    "TaskProgress": "steps done",
    "TaskResult": "number of images, loss, accuracy, macro-F1, AUROC, calibration error",
    "PayloadChunk": "the bytes of the tensors below",
    "Drain": "that it is stopping",
}


def _verdict(outcome: Outcome) -> Text:
    if not outcome.nothing_private_left:
        found = [f"{silo}: {what}" for silo, whats in outcome.objections.items() for what in whats]
        return Text("\n".join(["Something left that must not:", *(f"  {line}" for line in found)]), "bold red")
    names = sorted({tensor.name for departed in outcome.departed.values() for tensor in departed.tensors})
    tensors = " and ".join(repr(name) for name in names)
    return Text.assemble(
        ("No image, no label, no private tensor.", "bold green"),
        f" Checked: the only tensor that left is the shared {tensors}, as the method declares it,"
        " and the coordinator received as many bytes as the silos recorded.",
    )


def _places(layout: Layout, outcome: Outcome) -> list[Text]:
    seconds = outcome.seconds
    rows = (
        ("prompt", str(outcome.prompt_path)),
        ("curves", str(layout.curves)),
        ("summary", str(layout.summary)),
        ("by hand", f"the YAML files, keys and logs of all daemons are in {layout.root}"),
        ("time", f"{span_text(seconds['total'])}, of which federated training {span_text(seconds['promptfl'])}"),
    )
    return [Text.assemble((f" {name:<8} ", "bold"), text) for name, text in rows]


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="dim")

"""The documents agree with the code: commands, tables, drawings and examples."""

import dataclasses
import importlib
import re
import sys
import textwrap
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, cast, get_args

import pytest
import typer
import yaml
from prometheus_client import CollectorRegistry

import certs.cli
import coordinator.cli
import fedrt.ctl
import silo.cli
import silo.lab.cli
from coordinator.config import load_coordinator_config
from fedrt import payload, transport, wire
from fedrt.aggregation import ServerRule, WeightedMean
from fedrt.context import ClassPosition, LearnedContext
from fedrt.errors import ExitCode, FailureReason
from fedrt.experiment_file import load_experiment
from fedrt.method import ModelDims, parse_hyperparameters
from fedrt.methods import BUILT_IN
from fedrt.metrics import CoordinatorMetrics, SiloMetrics
from fedrt.session import allowance, connection, frames
from fedrt.task import RefusalReason, Verdict
from fedrt.tensors import Scope, of_scope
from silo.config import load_silo_config

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
COMMANDS = {
    "fedrt-coordinator": coordinator.cli.app,
    "fedrt-silo": silo.cli.app,
    "fedrt-certs": certs.cli.app,
    "fedrtctl": fedrt.ctl.app,
    "fedrt-lab": silo.lab.cli.app,
}


def chapter(path: Path, heading: str) -> str:
    found = re.search(rf"^## {re.escape(heading)}$(.*?)(?=^## |\Z)", path.read_text(), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{path.name} has no chapter {heading!r}"
    return found[1]


def rows(text: str) -> Iterator[list[str]]:
    """The cells of the tables of a text, without headings."""
    for line in re.findall(r"^\|(.+)\|$", text, re.MULTILINE):
        cells = [cell.strip() for cell in line.split("|")]
        if set(line) - set("|- "):
            yield cells


def documents() -> list[Path]:
    return sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.glob("*.md")])


# ---- commands


@pytest.mark.parametrize("path", documents(), ids=lambda path: path.name)
def test_every_command_that_a_document_names_exists(path: Path) -> None:
    text = path.read_text()
    code = "\n".join(re.findall(r"^```.*?^```|`[^`\n]+`", text, re.MULTILINE | re.DOTALL))
    for program, app in COMMANDS.items():
        known = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
        used = set(re.findall(rf"(?<![\w/-]){program} ([a-z][a-z-]*)", code))
        assert used <= known, program


# ---- README


@pytest.fixture
def quick_start(tmp_path: Path) -> Path:
    """The files that the README's commands write."""
    written = re.findall(r"^cat > (\S+) <<'?END'?\n(.*?)^END$", (ROOT / "README.md").read_text(), re.M | re.S)
    for name, text in written:
        (tmp_path / name).write_text(re.sub(r"\$\(.*?\)", "0" * 64, text))
    assert {name for name, _ in written} == {"coordinator.yaml", "north.yaml", "experiment.yaml"}
    return tmp_path


def test_the_files_of_the_readme_are_valid(quick_start: Path) -> None:
    daemon = load_coordinator_config(quick_start / "coordinator.yaml")
    site = load_silo_config(quick_start / "north.yaml")
    _, spec = load_experiment(quick_start / "experiment.yaml")
    assert site.coordinator.session_address.rpartition(":")[2] == daemon.listen.session.rpartition(":")[2]
    assert daemon.admin_socket.relative_to(quick_start) == Path("state/coordinator/admin.sock")
    assert spec.local.model.architecture == site.model.architecture
    assert spec.rounds.silos == ("north", "south")


def test_the_classes_of_the_readme_are_those_of_its_images(quick_start: Path) -> None:
    from silo.embedded.datasets import digit_class_names

    _, spec = load_experiment(quick_start / "experiment.yaml")
    assert spec.local.classes == digit_class_names()


# ---- protocol


def test_the_table_of_legal_frames_is_that_of_the_code() -> None:
    table = chapter(DOCS / "protocol.md", "Which frame is legal when")
    documented = {(row[0], row[1]): row[2] for row in rows(table) if row[0] != "speaker"}
    spoken = {
        (role.value, phase.value): ", ".join(f"`{kind.__name__}`" for kind in sorted(kinds, key=lambda k: k.__name__))
        for (role, phase), kinds in connection._SPOKEN.items()
    }
    assert documented == spoken


def test_every_frame_is_explained() -> None:
    documented = {row[0].strip("`") for row in rows(chapter(DOCS / "protocol.md", "Frames"))} - {"frame"}
    assert documented == {kind.__name__ for kinds in connection._SPOKEN.values() for kind in kinds}


def test_the_limits_are_those_of_the_code() -> None:
    documented = {row[0]: row[1] for row in rows(chapter(DOCS / "protocol.md", "Payloads"))}
    assert documented == {
        "limit": "value",
        "bytes of a chunk": str(payload.CHUNK_BYTES),
        "bytes of a gRPC message": str(transport.MAX_MESSAGE_BYTES),
        "bytes of a message from a silo": str(transport.MAX_REQUEST_BYTES),
        "open payloads of one speaker": str(connection.MAX_OPEN_PAYLOADS),
        "offers without a reply": str(connection.MAX_OPEN_OFFERS),
        "tensors of a payload": str(payload.MAX_TENSORS),
        "metrics of a result": str(wire.MAX_METRICS),
        "characters of an id": str(frames.MAX_ID_LENGTH),
        "characters of a text": str(frames.MAX_TEXT_LENGTH),
        "items of a list": str(frames.MAX_LIST_LENGTH),
        "names in a list of `Hello`": str(frames.MAX_NAMES),
        "characters of a name": str(payload.MAX_NAME_LENGTH),
        "frames a peer may leave unread": str(transport.MAX_POSTED_FRAMES),
        "frames that nobody asked for, in a burst": f"{allowance.FRAME_BURST:.0f}",
        "of these, each second": f"{allowance.FRAME_RATE:.0f}",
    }


def test_verdicts_refusals_and_failures_are_complete() -> None:
    verdicts = [row[0].strip("`") for row in rows(chapter(DOCS / "protocol.md", "Verdicts"))][1:]
    assert set(verdicts) == {verdict.value for verdict in Verdict}
    named = set(re.findall(r"`(\w+)`", chapter(DOCS / "protocol.md", "Refusals and failures")))
    assert named == {reason.value for kind in (RefusalReason, FailureReason) for reason in kind}


# ---- operations


def test_the_metrics_are_those_of_the_code() -> None:
    registry = CollectorRegistry()
    CoordinatorMetrics(registry)
    SiloMetrics(registry)
    declared = [
        [f"`{metric.name}`", metric.type, ", ".join(collector._labelnames), metric.documentation]
        for collector in registry._collector_to_names
        for metric in collector.describe()
    ]
    documented = [row[:4] for row in rows(chapter(DOCS / "operations.md", "Metrics"))][1:]
    assert documented == declared


def test_the_exit_codes_are_those_of_the_code() -> None:
    table = rows(chapter(DOCS / "operations.md", "Starting and stopping"))
    documented = {int(row[0]): row[1] for row in table if row[0].isdigit()}
    assert documented == {code.value: code.name.lower() for code in ExitCode}


# ---- architecture


def drawings() -> list[tuple[str, str, str]]:
    pattern = re.compile(r"^<!-- drawing: (\S+) -->\n```\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return [(path.name, *found) for path in documents() for found in pattern.findall(path.read_text())]


@pytest.mark.parametrize(("document", "module", "drawing"), drawings())
def test_a_drawing_is_that_of_the_module(document: str, module: str, drawing: str) -> None:
    said = importlib.import_module(module).__doc__ or ""
    assert textwrap.indent(drawing.rstrip(), "    ") in said, document


# ---- threat model


def test_every_test_that_the_threat_model_names_exists() -> None:
    named = re.findall(r"`(tests/\S+\.py)::(test_\w+)`", (DOCS / "threat-model.md").read_text())
    assert len(named) > 10
    missing = [(file, test) for file, test in named if f"def {test}(" not in (ROOT / file).read_text()]
    assert missing == []


# ---- methods

METHODS = DOCS / "methods.md"
COMMON = {one.name: one.default for one in dataclasses.fields(LearnedContext)}


def literals(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def written_value(cell: str) -> object:
    """A value as a table writes it: YAML in backticks, or nothing."""
    return yaml.safe_load(literals(cell)[0]) if literals(cell) else None


def plain(value: object) -> object:
    """A default as YAML would have it; of a server rule, its name alone."""
    if isinstance(value, Enum):
        return value.value
    return {"rule": value.rule} if isinstance(value, WeightedMean) else value


def test_the_table_of_methods_names_every_method_with_what_it_shares_and_what_it_keeps() -> None:
    dims = ModelDims(context_dim=6, feature_dim=4, class_count=3)
    declared = {
        name: tuple([one.name for one in of_scope(method().tensors(dims), scope)] for scope in Scope)
        for name, method in BUILT_IN.items()
    }
    table = [row for row in rows(chapter(METHODS, "Built-in methods")) if row[0] != "name"]
    assert {literals(row[0])[0]: (literals(row[1]), literals(row[2])) for row in table} == declared


def test_the_source_of_a_method_is_that_of_its_module() -> None:
    for row in rows(chapter(METHODS, "Built-in methods")):
        for name in literals(row[0]):
            said = sys.modules[BUILT_IN[name].__module__].__doc__ or ""
            (number,) = set(re.findall(r"arXiv:(\d+\.\d+)", row[4]))
            assert f"arXiv:{number}" in said, name
            assert f"https://arxiv.org/abs/{number}" in row[4]


def test_the_tables_of_hyper_parameters_are_complete_with_their_defaults() -> None:
    own = {
        (name, one.name): plain(one.default)
        for name, method in BUILT_IN.items()
        for one in dataclasses.fields(cast("type[Any]", method))
        if one.name not in COMMON or one.default != COMMON[one.name]
    }
    table = [row for row in rows(chapter(METHODS, "Hyper-parameters")) if row[0] != "method"]
    assert {(literals(row[0])[0], literals(row[1])[0]): written_value(row[3]) for row in table} == own
    common = [row for row in rows(chapter(METHODS, "Options of every context")) if row[0] != "key"]
    assert {literals(row[0])[0]: written_value(row[1]) for row in common} == {
        name: plain(value) for name, value in COMMON.items()
    }
    (positions,) = (row[2] for row in common if row[0] == "`class_position`")
    assert literals(positions) == list(ClassPosition)


def test_the_table_of_server_rules_is_complete_with_their_defaults() -> None:
    table = [row for row in rows(chapter(METHODS, "Server rules")) if row[0] != "rule"]
    documented = {
        literals(row[0])[0]: {key: float(value) for key, value in re.findall(r"`(\w+)`[^`]*= `([\d.]+)`", row[2])}
        for row in table
    }
    rules = get_args(get_args(ServerRule)[0])
    assert documented == {
        rule.rule: {one.name: one.default for one in dataclasses.fields(rule) if one.name != "rule"} for rule in rules
    }


def test_the_example_of_a_server_rule_is_one() -> None:
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", chapter(METHODS, "Server rules"), re.MULTILINE | re.DOTALL)
    section = yaml.safe_load(block)["method"]
    assert parse_hyperparameters(BUILT_IN[section.pop("name")], section)


def quoted_files() -> list[tuple[str, str]]:
    pattern = re.compile(r"^<!-- file: (\S+) -->\n```\w+\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return pattern.findall(METHODS.read_text())


def test_the_example_quotes_every_file_of_its_package_in_full() -> None:
    quoted = dict(quoted_files())
    package = ROOT / "tests" / "thirdparty" / "classbias"
    places = ("*.toml", "*.yaml", "*.py", "classbias/*.py")
    present = [path for place in places for path in package.glob(place) if path.name != "__init__.py"]
    assert quoted == {str(path.relative_to(ROOT)): path.read_text() for path in present}


def test_the_files_of_the_example_are_the_only_python_of_the_document() -> None:
    shown = re.findall(r"^```(?:python|toml)\n(.*?)^```$", METHODS.read_text(), re.MULTILINE | re.DOTALL)
    assert set(shown) <= {text for _, text in quoted_files()}

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, TypeAdapter, ValidationError

from fedrt.config import (
    FederationName,
    LocalPath,
    LogSection,
    MetricsSection,
    PartyName,
    Section,
    duration,
    effective_yaml,
    json_schema,
    load_yaml,
    size,
)
from fedrt.errors import ConfigurationError, ExitCode
from fedrt.notation import (
    Address,
    Duration,
    RemoteAddress,
    Size,
    bounded,
    format_duration,
    format_size,
    parse_duration,
    parse_size,
    split_address,
)
from fedrt.yaml_text import MAX_DEPTH, dump_mapping, parse_mapping


class Policy(Section):
    methods: tuple[str, ...] = ("*",)
    min_examples: Annotated[int, Field(ge=1)] = 1
    share: Annotated[float, Field(ge=0, lt=1)] = 0.5


class Place(Section):
    federation: FederationName = "demo"
    name: PartyName = "north"
    directory: LocalPath | None = None
    remote: RemoteAddress | None = None


class Circle(Section):
    kind: Literal["circle"]
    radius: float


class Square(Section):
    kind: Literal["square"]
    side: Annotated[float, Field(ge=0)] = Field(description="Length of an edge")


Shape = Annotated[Circle | Square, Field(discriminator="kind")]


class Config(Section):
    shapes: dict[str, Shape] = Field(default_factory=dict)
    name: str = Field(description="Name of the thing")
    policy: Policy = Field(default_factory=Policy)
    place: Place = Field(default_factory=Place)
    log: LogSection = Field(default_factory=LogSection)
    metrics: MetricsSection | None = None
    class_names: dict[str, str] = Field(default_factory=dict)
    fast: bool = False
    grace: Annotated[Duration, bounded("100ms", "1h")] = duration("2500ms", "Grace")
    limit: Size = size("64MiB", "Limit")


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def write_and_load(text: str | bytes, model: type[Section] = Config) -> Any:
        path = tmp_path / "silo.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_yaml(path, model)

    return write_and_load


@pytest.fixture
def problem(load: Any, tmp_path: Path) -> Any:
    """The error message of a text, as if the file were named silo.yaml."""

    def message(text: str | bytes) -> str:
        with pytest.raises(ConfigurationError) as caught:
            load(text)
        assert caught.value.exit_code == ExitCode.CONFIGURATION
        return str(caught.value).replace(f"{tmp_path}/", "")

    return message


def test_values_and_defaults(load: Any, tmp_path: Path) -> None:
    config = load("name: a\npolicy: {methods: [promptfl], share: 0}\ngrace: 1m30s\nplace: {directory: x/y}\n")
    assert config.policy == Policy(methods=("promptfl",), share=0.0)
    assert (config.grace, config.limit, config.metrics) == (90.0, 64 * 1024**2, None)
    assert config.place.directory == tmp_path / "x" / "y"
    with pytest.raises(ValidationError):
        config.name = "b"


def test_paths_are_absolute_or_start_at_the_file_or_at_home(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    assert load("name: a\nplace: {directory: /x}").place.directory == Path("/x")
    assert load("name: a\nplace: {directory: ~/x}").place.directory == Path("/home/ada/x")


def test_relative_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("silo.yaml").write_text("name: a\nplace: {directory: x}")
    assert load_yaml(Path("silo.yaml"), Config).place.directory == tmp_path / "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: a\npolicy: {metods: []}", "silo.yaml: policy.metods is not a known key; did you mean 'methods'?"),
        (
            "name: a\npolicy: {colour: red}",
            "silo.yaml: policy.colour is not a known key; known are methods, min_examples, share",
        ),
        ("name: a\nmin_examples: 3", "silo.yaml: min_examples is not a known key; did you mean 'policy.min_examples'?"),
        (
            "name: a\nshapes: {a: {kind: square, sid: 1}}",
            "shapes.a.side is missing; add it (Length of an edge)\n  shapes.a.sid is not a known key; did you mean",
        ),
        ("name: a\nshapes: {a: {kind: square, side: -1}}", "silo.yaml: shapes.a.side must be at least 0; got -1"),
        ("metrics: {}\nname: a", "is missing; add it (Address of the Prometheus metrics; they are not encrypted"),
        ("fast: true", "silo.yaml: name is missing; add it (Name of the thing)"),
        ("name: 5", "silo.yaml: name must be text; got 5; put it in quotes"),
        ("name: true", "silo.yaml: name must be text; got true; put it in quotes"),
        ("name:", "silo.yaml: name must be text; got nothing; give it a value or remove the key"),
        ("name: [a]", "silo.yaml: name must be text; got a list"),
        ("name: a\npolicy:", "policy must be a section with the keys methods, min_examples, share; got nothing; give"),
        ("name: a\npolicy: {methods: promptfl}", "must be a list such as [one, two]; got 'promptfl'; write [promptfl]"),
        ("name: a\npolicy: {methods: [a, 3]}", "silo.yaml: policy.methods[1] must be text; got 3; put it in quotes"),
        ("name: a\npolicy: {min_examples: '3'}", "silo.yaml: policy.min_examples must be a whole number; got '3'"),
        ("name: a\npolicy: {min_examples: 0}", "silo.yaml: policy.min_examples must be at least 1; got 0"),
        ("name: a\npolicy: {min_examples: 1.5}", "must be a whole number; got 1.5"),
        ("name: a\npolicy: {share: half}", "silo.yaml: policy.share must be a number; got 'half'"),
        ("name: a\npolicy: {share: 1}", "silo.yaml: policy.share must be less than 1; got 1"),
        ("name: a\nfast: yes", "silo.yaml: fast must be true or false; got 'yes'"),
        ("name: a\nclass_names: [b]", "silo.yaml: class_names must be a mapping such as {key: value}; got a list"),
        ("name: a\nclass_names: {b: 1}", "silo.yaml: class_names.b must be text; got 1; put it in quotes"),
        (
            "name: a\nlog: {level: warn}",
            "must be 'debug', 'info', 'warning' or 'error'; got 'warn'; did you mean 'warning'?",
        ),
        ("name: a\ngrace: 30", "grace must be a duration with a unit, such as 30s, 5m or 1h30m; did you mean '30s'?"),
        ("name: a\ngrace: 5 minutes", "grace must be a duration such as 500ms, 30s, 5m, 1h30m or 2d: whole numbers"),
        ("name: a\ngrace: 2h", "silo.yaml: grace must be between 100ms and 1h; got '2h'"),
        (
            "name: a\nlimit: 64MB",
            "limit must be a size with a unit, such as 512KiB, 64MiB or 1GiB (whole numbers); got",
        ),
        (
            "name: a\nlimit: 64",
            "limit must be a size with a unit, such as 512KiB, 64MiB or 1GiB (whole numbers); got 64",
        ),
        ("name: a\nmetrics: {listen: 9464}", "metrics.listen must be host:port in quotes, such as '127.0.0.1:7443'"),
        ("name: a\nmetrics:\n  listen: ::1:94", "must have an IPv6 address in brackets and the whole in quotes"),
        (
            "name: a\nmetrics: {listen: ':94'}",
            "must name a host; write '127.0.0.1:94' for this machine or '0.0.0.0:94'",
        ),
        ("name: a\nplace: {remote: 'a:0'}", "silo.yaml: place.remote must name the port to connect to; 0 is none"),
        (
            "name: a\nplace: {federation: A B}",
            "silo.yaml: place.federation: federation 'A B' is not usable; use a name",
        ),
        ("name: a\nplace: {name: A}", "silo.yaml: place.name: name 'A' is not usable; use 1 to 63 of a-z"),
        ('name: "\\ud800"', "holds text that is not valid Unicode; remove escapes such as \\ud800"),
        ("name: a\nname: b", "silo.yaml: line 2, column 1: key 'name' is given twice, first in line 1; remove one"),
        ("policy: {share: 0, share: 1}", "line 1, column 20: key 'share' is given twice"),
        ("name: a\n  b: c", "line 2, column 4: mapping values are not allowed here; check the indentation, or put"),
        (
            "log:\n\tlevel: info",
            "line 2, column 1: found character '\\t' that cannot start any token; indent with spaces",
        ),
        ("name: [::1]:7443", "line 1, column 8: expected the node content, but found ':'; put text that begins with"),
        ("name: [a", "silo.yaml: line 1, column 9: expected ',' or ']', but got '<stream end>'"),
        ("name: a\n---\nname: b", "line 2, column 1: but found another document"),
        ("? [a]\n: b", "silo.yaml: line 1, column 3: a key must be text, not a list or a mapping"),
        (
            "name: !!python/name:os.system x",
            "tag 'tag:yaml.org,2002:python/name:os.system' is not supported; remove it",
        ),
        ("name: !!int x", "tag 'tag:yaml.org,2002:int' is not supported; remove it"),
        ("name: *b", "silo.yaml: line 1, column 7: found undefined alias 'b'; put text that begins with '*'"),
        ("- name", "silo.yaml: must hold keys and values such as 'log: {level: info}'"),
        ("", "silo.yaml: must hold keys and values such as"),
        ("name: &a [*a]", "silo.yaml: line 1, column 7: nested more than 40 levels deep; flatten it"),
        ("name: " + "[" * 5000, "silo.yaml: nested more than 40 levels deep; flatten it"),
        (b"name: \xff", "silo.yaml: not YAML text in UTF-8 ("),
        (b"name: \x00", "silo.yaml: not YAML text in UTF-8 ("),
    ],
)
def test_messages(problem: Any, text: str, message: str) -> None:
    assert message in problem(text)


def test_all_problems_are_listed(problem: Any) -> None:
    assert problem("policy: {metods: [], min_examples: 0}\nfast: 1\n") == (
        "silo.yaml: 4 problems\n"
        "  name is missing; add it (Name of the thing)\n"
        "  policy.min_examples must be at least 1; got 0\n"
        "  policy.metods is not a known key; did you mean 'methods'?\n"
        "  fast must be true or false; got 1"
    )


def test_long_values_are_cut(problem: Any) -> None:
    assert problem(f"name: a\nfast: {'x' * 500}") == f"silo.yaml: fast must be true or false; got '{'x' * 75}...'"


def test_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"^file '/no/silo.yaml' does not exist; check the path$"):
        load_yaml(Path("/no/silo.yaml"), Config)
    with pytest.raises(ConfigurationError, match=r"cannot be read \(Is a directory\); check its path and mode$"):
        load_yaml(tmp_path, Config)

    def refuse(path: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ConfigurationError, match=r"cannot be read \(Permission denied\); check its path and mode$"):
        load_yaml(tmp_path / "silo.yaml", Config)


def test_yaml_is_of_version_1_2() -> None:
    text = b"a: 1e-3\nb: no\nc: 010\nd: 1:30\ne: 2026-11-20\nf: 0x10\ng: ~\nh: .5\ni: TRUE\n1: x"
    text += b"\nyes: y\nj: -7\nk: 1_000\nl:"
    assert parse_mapping(text, "") == {
        "a": 0.001, "b": "no", "c": 10, "d": "1:30", "e": "2026-11-20", "f": 16, "g": None, "h": 0.5, "i": True,
        "1": "x", "yes": "y", "j": -7, "k": "1_000", "l": None,
    }  # fmt: skip


def test_alias_bomb_is_refused() -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 9)]
    with pytest.raises(ConfigurationError, match="more than 1000000 values; use fewer, or fewer aliases"):
        parse_mapping("\n".join(levels).encode(), "bomb")


SCALARS = st.none() | st.booleans() | st.integers(-(10**40) + 1, 10**40 - 1) | st.floats(-1e50, 1e50) | st.text()
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8)


@given(st.dictionaries(st.text(), VALUES))
def test_what_is_dumped_is_read_back(values: dict[str, Any]) -> None:
    assert parse_mapping(dump_mapping(values).encode(), "") == values


@given(st.binary(max_size=60) | st.text(alphabet="{}[]:,-&*!?|>'\"%@`# \n\tab0", max_size=40).map(str.encode))
def test_any_bytes_are_values_or_a_configuration_error(text: bytes) -> None:
    with suppress(ConfigurationError):
        assert isinstance(parse_mapping(text, "x"), dict)


def test_depth_limit_is_exact() -> None:
    parse_mapping(b"a: " + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH, "")
    with pytest.raises(ConfigurationError):
        parse_mapping(b"a: [" + b"[" * MAX_DEPTH + b"]" * MAX_DEPTH + b"]", "")


def test_effective_yaml_shows_defaults_in_the_operators_notation(load: Any) -> None:
    text = effective_yaml(load("name: 'no'"))
    assert "grace: 2500ms\n" in text
    assert "limit: 64MiB\n" in text
    assert "policy:\n  methods:\n  - '*'\n  min_examples: 1\n" in text
    assert load(text) == load("name: 'no'")


def test_json_schema(load: Any) -> None:
    schema = json_schema(Config)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["additionalProperties"] is False
    assert schema["properties"]["grace"]["default"] == "2500ms"
    assert schema["properties"]["limit"]["default"] == "64MiB"
    assert schema["properties"]["grace"]["pattern"].startswith("^(?=.)([0-9]+d)?")


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30s", 30.0), ("5m", 300.0), ("1h30m", 5400.0), ("500ms", 0.5), ("2d", 172800.0), ("1m1ms", 60.001), ("0s", 0.0)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    "text", ["", "5", "m", "1.5s", "-1s", "30m1h", "1s 1ms", "5M", "٣s", "1s\n", None, True, [], {}]
)
def test_no_durations(text: object) -> None:
    with pytest.raises(ValueError, match="must be a duration"):
        parse_duration(text)


@given(st.integers(0, 10**12))
def test_durations_round_trip(milliseconds: int) -> None:
    assert parse_duration(format_duration(milliseconds / 1000)) == milliseconds / 1000


@given(st.integers(0, 10**9 - 1), st.sampled_from(["B", "KiB", "MiB", "GiB"]))
def test_sizes_round_trip(count: int, unit: str) -> None:
    assert parse_size(format_size(parse_size(f"{count}{unit}"))) == parse_size(f"{count}{unit}")


def test_sizes() -> None:
    assert [parse_size(text) for text in ("7B", "64MiB", "1GiB")] == [7, 67108864, 1073741824]
    assert [format_size(size) for size in (0, 1, 1024, 1536, 3 * 1024**3)] == ["0B", "1B", "1KiB", "1536B", "3GiB"]


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("fed.example.org:7443", ("fed.example.org", 7443)),
        ("[::1]:7443", ("::1", 7443)),
        ("0.0.0.0:0", ("0.0.0.0", 0)),
        ("localhost:65535", ("localhost", 65535)),
    ],
)
def test_addresses(address: str, parts: tuple[str, int]) -> None:
    assert split_address(address) == parts
    assert TypeAdapter(Address).validate_python(address) == address


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("localhost", "must be host:port, such as fed.example.org:7443 or '[::1]:7443'"),
        ("localhost:http", "must be host:port, such as"),
        ("localhost:65536", "must have a port up to 65535; 65536 is too large"),
        ("https://localhost:1", "must be host:port without a scheme"),
        ("::1:7443", "must have an IPv6 address in brackets and the whole in quotes"),
        ("[local]:1", "must hold an IPv6 address in the brackets; 'local' is none"),
        ("a b:1", "must name a host by its name or address; 'a b' is neither"),
        (":1", "must name a host; write '127.0.0.1:1' for this machine or '0.0.0.0:1' for all"),
    ],
)
def test_no_addresses(address: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        split_address(address)
    assert message in str(caught.value)

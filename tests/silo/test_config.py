import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedrt.config import effective_yaml
from fedrt.errors import ConfigurationError
from silo.config import SiloConfig, check_files, data_source, feature_source, load_silo_config, model_source
from silo.sources import DataSource, FeatureSource, ModelSource

TEXT = """
coordinator: {session_address: "fed.example.org:7443"}
identity: {directory: identity}
state_directory: /var/lib/fedrt-silo/state
model: {architecture: ViT-B-16, weights: openai}
data: {root: images, layout: image_folder}
"""


@pytest.fixture
def load(tmp_path: Path) -> Any:
    def write_and_load(text: str) -> SiloConfig:
        path = tmp_path / "silo.yaml"
        path.write_text(text)
        return load_silo_config(path)

    return write_and_load


@pytest.fixture
def problem(load: Any, tmp_path: Path) -> Any:
    def message(text: str) -> str:
        with pytest.raises(ConfigurationError) as caught:
            load(text)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return message


def test_defaults(load: Any, tmp_path: Path) -> None:
    config = load(TEXT)
    assert config.identity.directory == tmp_path / "identity"
    assert (config.federation, config.metrics, config.coordinator.server_name) == (None, None, None)
    assert (config.policy.methods, config.policy.experiments, config.policy.min_examples) == (("*",), ("*",), 1)
    assert (config.shutdown_grace, config.reconnect.initial, config.reconnect.max) == (300.0, 1.0, 10.0)
    assert (config.log.level, config.log.format) == ("info", "console")


def test_where_features_are_kept(load: Any, tmp_path: Path) -> None:
    config = load(TEXT)
    default = feature_source(config.features, config.state_directory)
    assert default == FeatureSource(config.state_directory / "features", 50 * 2**30, "float32")
    text = "features: {directory: kept, max_size: 1GiB, element_type: float16}\nidentity:"
    config = load(TEXT.replace("identity:", text, 1))
    assert feature_source(config.features, config.state_directory) == FeatureSource(tmp_path / "kept", 2**30, "float16")


def test_sources(load: Any, tmp_path: Path) -> None:
    config = load(TEXT)
    assert model_source(config) == ModelSource("ViT-B-16", "openai", "auto")
    assert data_source(config) == DataSource("image_folder", tmp_path / "images")
    config = load(
        TEXT.replace("openai", "b16.safetensors, device: 'cuda:1', threads: 2").replace(
            "images, layout: image_folder",
            "/d, layout: manifest, manifest: m.csv, max_unreadable_share: 0.1, class_names: {0: no}, test_share: 0.5",
        )
    )
    assert model_source(config) == ModelSource("ViT-B-16", str(tmp_path / "b16.safetensors"), "cuda:1")
    assert config.model.threads == 2
    assert data_source(config) == DataSource("manifest", Path("/d"), tmp_path / "m.csv", 0.1, {"0": "no"}, 0.5)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("openai", "openai"),
        ("laion2b_s34b_b88k", "laion2b_s34b_b88k"),
        ("embedded", "embedded"),
        ("w.pt", "{}/w.pt"),
        ("./w", "{}/w"),
        ("models/w", "{}/models/w"),
        ("/opt/w.bin", "/opt/w.bin"),
    ],
)
def test_weights_are_a_tag_or_a_path_from_the_directory_of_the_file(
    load: Any, tmp_path: Path, weights: str, expected: str
) -> None:
    assert load(TEXT.replace("openai", weights)).model.weights == expected.format(tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("architecture", "architecure", "model.architecure is not a known key; did you mean 'architecture'?"),
        ("identity:", "policy: {metods: []}\nidentity:", "policy.metods is not a known key; did you mean 'methods'?"),
        ("identity:", "policy: {methods: []}\nidentity:", "policy.methods must be a list of at least 1; got a list"),
        ("identity:", "policy: {min_examples: 0}\nidentity:", "policy.min_examples must be at least 1; got 0"),
        ("identity:", "policy: {methods: ['']}\nidentity:", "policy.methods[0] must be text that is not empty; got ''"),
        ("fed.example.org:7443", "fed.example.org", "coordinator.session_address must be host:port, such as"),
        ("fed.example.org:7443", "fed:0", "coordinator.session_address must name the port to connect to; 0 is none"),
        (
            ", weights: openai",
            "",
            "model.weights is missing; add it (Path of the weights file, an open_clip tag such as",
        ),
        (
            "openai",
            "openai, device: gpu",
            "model.device must be auto, cpu, cuda or the number of a GPU such as cuda:0; got",
        ),
        ("openai", "openai, threads: 0", "model.threads must be at least 1; got 0"),
        ("image_folder", "folders", "data.layout must be 'image_folder' or 'manifest'; got 'folders'"),
        (
            "image_folder",
            "manifest",
            "data: layout is 'manifest', but manifest is missing; add the path of the CSV file",
        ),
        (
            "folder}",
            "folder, manifest: m.csv}",
            "data: manifest is set, but layout is 'image_folder'; remove manifest or",
        ),
        ("folder}", "folder, max_unreadable_share: 5}", "data.max_unreadable_share must be less than 1; got 5"),
        ("folder}", "folder, test_share: -1}", "data.test_share must be at least 0; got -1"),
        ("identity:", "reconnect: {initial: 1m}\nidentity:", "reconnect: max is 10s, less than initial, which is 1m;"),
        ("identity:", "reconnect: {initial: 0s}\nidentity:", "reconnect.initial must be between 10ms and 1h; got '0s'"),
        ("identity:", "features: {max_size: 512MiB}\nidentity:", "features.max_size must be at least 1GiB"),
        ("identity:", "features: {max_size: 50}\nidentity:", "features.max_size must be a size with a unit, such as"),
        (
            "identity:",
            "features: {element_type: int8}\nidentity:",
            "features.element_type must be 'float32' or 'float16'",
        ),
        ("identity:", "features: {size: 1GiB}\nidentity:", "features.size is not a known key"),
        ("identity:", "shutdown_grace: 300\nidentity:", "1h30m; did you mean '300s'?"),
        ("identity:", "federation: A\nidentity:", "federation: federation 'A' is not usable"),
    ],
)
def test_messages(problem: Any, old: str, new: str, message: str) -> None:
    assert old in TEXT
    assert message in problem(TEXT.replace(old, new, 1))


def test_files_that_do_not_exist(load: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_files(load(TEXT.replace("image_folder", "manifest, manifest: m.csv").replace("openai", "w.pt")))
    assert str(caught.value) == (
        "files are missing\n"
        f"  model.weights: file '{tmp_path}/w.pt' does not exist; copy the weights there or correct the path\n"
        f"  data.root: directory '{tmp_path}/images' does not exist; create it or correct the path\n"
        f"  data.manifest: file '{tmp_path}/m.csv' does not exist; create it or correct the path"
    )
    (tmp_path / "images").mkdir()
    check_files(load(TEXT))


def test_effective_configuration_reads_back(load: Any) -> None:
    config = load(TEXT)
    assert load(effective_yaml(config)) == config


def test_configuration_needs_no_torch() -> None:
    code = "import sys, silo.config; print('torch' in sys.modules, 'coordinator' in sys.modules, 'PIL' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False False\n"

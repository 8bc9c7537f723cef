"""Loading: every form of checkpoint gives the original's features, and every wrong one gives a message that helps."""

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import open_clip
import pytest
import torch
from open_clip.model import CLIP
from safetensors.torch import save_file
from torch import Tensor

from fedrt.errors import ConfigurationError
from silo.clip import FrozenClip, load_clip, weights, weights_sha256
from silo.sources import ModelSource

Originals = Callable[[str, bool], CLIP]
NAMES = ("melanoma", "basal_cell carcinoma")


@pytest.fixture
def file(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Makes paths that are deleted afterwards: these files can be large."""
    made: list[Path] = []

    def make(name: str) -> Path:
        made.append(tmp_path / name)
        return made[-1]

    yield make
    for path in made:
        path.unlink(missing_ok=True)


def openai_form(model: CLIP) -> dict[str, Tensor]:
    """The state dict as OpenAI published it: half precision and three integers more."""
    size = model.visual.image_size
    extras = (size if isinstance(size, int) else size[0], 77, 49408)
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    return state | dict(
        zip(("input_resolution", "context_length", "vocab_size"), map(torch.tensor, extras), strict=True)
    )


def check_features(clip: FrozenClip, model: CLIP, tolerance: float) -> tuple[int, ...]:
    """Compare with open_clip's own features; the shape of the patches."""
    size = model.visual.image_size
    side = size if isinstance(size, int) else size[0]
    images = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected_images = model.encode_image(images, normalize=True)
        texts = [f"a photo of a {name.replace('_', ' ')}." for name in NAMES]
        expected_texts = model.encode_text(open_clip.tokenize(texts), normalize=True)
    features = clip.encode_images(images, patches=True)
    assert float((features.pooled - expected_images).abs().max()) <= tolerance
    assert float((clip.text_tower(NAMES).handcrafted() - expected_texts).abs().max()) <= tolerance
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in clip.model.parameters())
    assert not any(module.training for module in clip.model.modules())
    assert features.patches is not None
    return tuple(features.patches.shape[1:])


@pytest.mark.parametrize(("name", "dims"), [("ViT-B-16", (512, 512, 196)), ("RN50", (512, 1024, 49))])
def test_production_architectures(
    original: Originals, file: Callable[[str], Path], name: str, dims: tuple[int, int, int]
) -> None:
    model = original(name, False)
    path = file("weights.safetensors")
    save_file(model.state_dict(), path)
    clip = load_clip(ModelSource(name, str(path), "cpu"))
    assert check_features(clip, model, 1e-6) == (dims[2], dims[1])
    assert (clip.context_dim, clip.feature_dim) == dims[:2]
    assert (clip.architecture, clip.device_name) == (name, "cpu")


@pytest.mark.parametrize("name", ["ViT-B-16", "RN50"])
def test_production_architectures_in_openai_form(original: Originals, file: Callable[[str], Path], name: str) -> None:
    model = original(name, False)
    path = file("weights.pt")
    torch.save(openai_form(model), path)
    clip = load_clip(ModelSource(name, str(path)))
    assert type(clip.model.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"
    rebuilt = open_clip.model.build_model_from_openai_state_dict(openai_form(model), cast_dtype=None).float()
    check_features(clip, rebuilt, 1e-5)


def save_state_dict(model: CLIP, path: Path) -> None:
    torch.save(model.state_dict(), path)


def save_training_checkpoint(model: CLIP, path: Path) -> None:
    state = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"epoch": 3, "state_dict": state, "optimizer": {"lr": 0.1}}, path)


def save_half(model: CLIP, path: Path) -> None:
    torch.save({k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}, path)


def save_with_scale_as_vector(model: CLIP, path: Path) -> None:
    torch.save(model.state_dict() | {"logit_scale": model.logit_scale.reshape(1)}, path)


@pytest.mark.parametrize(
    ("save", "tolerance"),
    [(save_state_dict, 1e-6), (save_training_checkpoint, 1e-6), (save_half, 3e-3), (save_with_scale_as_vector, 1e-6)],
)
def test_forms_of_torch_checkpoints(
    original: Originals, file: Callable[[str], Path], architecture: str,
    save: Callable[[CLIP, Path], None], tolerance: float,
) -> None:  # fmt: skip
    model, path = original(architecture, False), file("weights.bin")
    save(model, path)
    check_features(load_clip(ModelSource(architecture, str(path))), model, tolerance)


def test_quick_gelu_follows_the_form_and_the_name(original: Originals, file: Callable[[str], Path]) -> None:
    quick, plain = original("test-mini-vit", True), original("test-mini-vit", False)
    path = file("openai.pt")
    torch.save(openai_form(quick), path)
    clip = load_clip(ModelSource("test-mini-vit", str(path)))
    check_features(clip, quick, 3e-3)
    with pytest.raises(AssertionError):
        check_features(clip, plain, 3e-3)


def test_digest_is_of_the_file(original: Originals, mini_vit_file: Path) -> None:
    expected = hashlib.sha256(mini_vit_file.read_bytes()).hexdigest()
    source = ModelSource("test-mini-vit", str(mini_vit_file))
    assert weights_sha256(source) == expected
    assert load_clip(source).weights_sha256 == expected


def test_loading_leaves_the_global_random_state(mini_vit_file: Path) -> None:
    before = torch.get_rng_state()
    load_clip(ModelSource("test-mini-vit", str(mini_vit_file)))
    assert torch.equal(before, torch.get_rng_state())


class _Scripted(torch.nn.Module):
    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            module: torch.nn.Module = self
            *parents, leaf = name.split(".")
            for parent in parents:
                if not hasattr(module, parent):
                    module.add_module(parent, torch.nn.Module())
                module = getattr(module, parent)
            module.register_buffer(leaf, value)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_torchscript_only_if_openai_published_it(
    original: Originals, file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = original("test-mini-vit", True)
    path = file("ViT.pt")
    torch.jit.script(_Scripted(openai_form(quick))).save(str(path))
    source = ModelSource("test-mini-vit", str(path))
    with pytest.raises(ConfigurationError, match=r"TorchScript archive.*convert it once with .*torch.save"):
        load_clip(source)
    digest = weights_sha256(source)
    monkeypatch.setattr(weights, "published_digests", lambda: frozenset({digest}))
    check_features(load_clip(source), quick, 3e-3)


def test_openais_own_archives_are_known() -> None:
    digests = weights.published_digests()
    assert "5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f" in digests  # ViT-B-16
    assert all(len(digest) == 64 for digest in digests)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B16", r"'ViT-B16' is not one that open_clip knows; did you mean .*'ViT-B-16'"),
        ("fedrt-tny", r"did you mean 'fedrt-tiny'"),
        ("qqqq", r"'fedrt-tiny' and 'ViT-B-16' are two of them"),
        ("roberta-ViT-B-32", r"not supported: its text tower is not CLIP's \(CustomTextCLIP\)"),
        ("ViT-B-16-SigLIP", r"not supported: its text tower is not CLIP's"),
        ("coca_ViT-B-32", r"not supported: its text tower is not CLIP's"),
        ("ViT-L-14-CLIPA", r"not supported: its tokeniser is not CLIP's"),
        ("test-mini-other-text", r"not supported: its text tower has parts that CLIP's lacks \(qk_norm\)"),
    ],
)
def test_architectures_that_do_not_work(mini_vit_file: Path, name: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_clip(ModelSource(name, str(mini_vit_file)))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("nowhere/weights.safetensors", r"'nowhere/weights.safetensors' does not exist; correct the path"),
        ("weights.pt", r"'weights.pt' does not exist"),
        (".", r"is a directory; name the file in it"),
        ("opnai", r"'opnai' is neither a file nor a pretrained tag of 'ViT-B-16'; tags are openai, "),
        ("embedded", r"'embedded' belongs to 'fedrt-tiny', not to 'ViT-B-16'"),
    ],
)
def test_weights_that_are_not_there(given: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        weights_sha256(ModelSource("ViT-B-16", given))


def test_architecture_without_tags() -> None:
    with pytest.raises(ConfigurationError, match="it has no tags"):
        load_clip(ModelSource("test-mini-vit", "openai"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.safetensors", b"", "not a checkpoint that can be read safely"),
        ("empty.pt", b"", "not a checkpoint that can be read safely"),
        ("text.pt", b"these are not weights\n", "not a checkpoint that can be read safely"),
        ("text.safetensors", b"these are not weights\n", "not a checkpoint that can be read safely"),
        ("broken.pt", b"PK\x03\x04 broken archive", "not a checkpoint that can be read safely"),
        ("stops.pt", b"\x80\x02c", "not a checkpoint that can be read safely"),
    ],
)
def test_files_that_are_no_checkpoint(file: Callable[[str], Path], name: str, content: bytes, message: str) -> None:
    path = file(name)
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        load_clip(ModelSource("test-mini-vit", str(path)))


def test_noise_is_no_checkpoint(file: Callable[[str], Path]) -> None:
    path, generator = file("noise.pt"), random.Random(3)
    for length in range(1, 60):
        path.write_bytes(generator.randbytes(length))
        with pytest.raises(ConfigurationError, match="not a checkpoint that can be read safely"):
            weights.read_checkpoint(path, "")


class _Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("this code came out of a weights file",))


def test_code_in_a_checkpoint_is_not_run(file: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    path = file("evil.pt")
    torch.save({"state_dict": {"visual.proj": torch.zeros(1)}, "extra": _Evil()}, path)
    with pytest.raises(ConfigurationError, match="not a checkpoint that can be read safely"):
        load_clip(ModelSource("test-mini-vit", str(path)))
    assert "weights file" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [([1, 2], "holds no state dict"), ({}, "holds no state dict"), ({"epoch": 3}, "'epoch' is not a tensor")],
)
def test_checkpoints_without_a_state_dict(file: Callable[[str], Path], content: object, message: str) -> None:
    path = file("other.pt")
    torch.save(content, path)
    with pytest.raises(ConfigurationError, match=message):
        load_clip(ModelSource("test-mini-vit", str(path)))


def without(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in state.items() if key != "visual.proj"}


def with_more(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"visual.extra": torch.zeros(1)}


def with_other_shape(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state | {"visual.proj": torch.zeros(64, 16)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without, r"does not fit model.architecture 'test-mini-vit': it lacks 'visual.proj'; set model.architecture"),
        (with_more, r"it also holds 'visual.extra'"),
        (with_other_shape, r"'visual.proj' has shape \(64, 16\) instead of \(64, 32\)"),
    ],
)
def test_weights_that_do_not_fit(
    original: Originals, file: Callable[[str], Path],
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]], message: str,
) -> None:  # fmt: skip
    path = file("weights.safetensors")
    save_file(change(dict(original("test-mini-vit", False).state_dict())), path)
    with pytest.raises(ConfigurationError, match=message):
        load_clip(ModelSource("test-mini-vit", str(path)))


def test_weights_of_another_architecture(mini_vit_file: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"it lacks 'visual.attnpool\S+ and \d+ more; it also holds "):
        load_clip(ModelSource("test-mini-resnet", str(mini_vit_file)))


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", r"model.device 'gpu' is not known; use 'cpu', 'cuda' or 'cuda:0'"),
        ("cpu:1", r"is not known"),
        ("cuda:x", r"is not known"),
        ("cuda:99", r"no CUDA device; check `nvidia-smi`|has \d+ CUDA device"),
    ],
)
def test_devices_that_are_not_there(mini_vit_file: Path, device: str, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        load_clip(ModelSource("test-mini-vit", str(mini_vit_file), device))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_cuda_where_there_is_none(mini_vit_file: Path) -> None:
    with pytest.raises(ConfigurationError, match="PyTorch finds no CUDA device"):
        load_clip(ModelSource("test-mini-vit", str(mini_vit_file), "cuda"))


@pytest.mark.parametrize("architecture", ["ViT-B-32", "ViT-B-32-quickgelu"])
def test_a_failed_download_names_the_architecture_that_the_file_needs(
    monkeypatch: pytest.MonkeyPatch, architecture: str
) -> None:
    def refuse(entry: object) -> str:
        raise OSError("no route")

    monkeypatch.setattr(weights, "download_pretrained", refuse)
    words = "set model.weights to its path and model.architecture to 'ViT-B-32-quickgelu'$"
    with pytest.raises(ConfigurationError, match=words):
        weights_sha256(ModelSource(architecture, "openai"))
    with pytest.raises(ConfigurationError, match=r"set model\.weights to its path$"):
        weights_sha256(ModelSource("ViT-B-32", "laion2b_s34b_b79k"))


def test_every_architecture_that_a_failed_download_names_is_known() -> None:
    for model, tag in open_clip.list_pretrained():
        if open_clip.get_pretrained_cfg(model, tag).get("quick_gelu"):
            assert weights._quick(model) in open_clip.list_models()


def test_a_published_file_brings_its_activation(
    original: Originals, file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    quick = original("test-mini-vit", True)
    path = file("plain.pt")
    torch.save(quick.state_dict(), path)
    source = ModelSource("test-mini-vit", str(path))
    with pytest.raises(AssertionError):
        check_features(load_clip(source), quick, 1e-6)
    address = f"https://example.invalid/mlfoundations/vit-mine-{weights_sha256(source)[:8]}.pt"
    monkeypatch.setattr(weights, "list_pretrained", lambda: [("test-mini-vit", "mine")])
    monkeypatch.setattr(weights, "get_pretrained_url", lambda model, tag: address)
    monkeypatch.setattr(weights, "get_pretrained_cfg", lambda model, tag: {"quick_gelu": True})
    check_features(load_clip(source), quick, 1e-6)


@pytest.mark.parametrize(
    ("digest", "quick"),
    [
        ("5806e77cd80f8b59890b7e101eabd078d9fb84e6937f9e85e4ecb61988df416f", True),  # OpenAI's ViT-B-16
        ("d867053b" + "0" * 56, True),  # ViT-B-32, laion400m_e31
        ("00efa78f" + "0" * 56, False),  # ViT-B-16, laion400m_e31, of the same place
        ("0" * 64, False),
    ],
)
def test_what_open_clip_says_of_published_files(digest: str, quick: bool) -> None:
    assert weights.published_with_quick_gelu(digest) is quick


def test_tag_is_downloaded_and_brings_its_activation(
    original: Originals, file: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file("cached.safetensors")
    save_file(original("test-mini-vit", True).state_dict(), path)
    entry = {"quick_gelu": True, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25), "url": "https://example.invalid"}
    monkeypatch.setattr(weights, "get_pretrained_cfg", lambda architecture, tag: entry if tag == "mine" else {})
    monkeypatch.setattr(weights, "download_pretrained", lambda entry: str(path))
    clip = load_clip(ModelSource("test-mini-vit", "mine"))
    check_features(clip, original("test-mini-vit", True), 1e-6)
    assert clip.weights_sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("error", [FileNotFoundError("offline"), RuntimeError("checksum"), OSError("no route")])
def test_tag_that_cannot_be_downloaded(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(entry: object) -> str:
        raise error

    monkeypatch.setattr(weights, "download_pretrained", fail)
    with pytest.raises(ConfigurationError, match=r"'openai' of 'ViT-B-16' could not be downloaded.*copy the file here"):
        load_clip(ModelSource("ViT-B-16", "openai"))

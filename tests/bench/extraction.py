"""Images per second of the feature path: `python -m tests.bench.extraction`.

On ready tensors: `FrozenClip.encode_images` in its batches of 32, pooled and with patches, in turns with open_clip's
own `encode_image` in batches of 256. From files: JPEG and PNG of 500 x 400 pixels through the workbench, decoded,
prepared and encoded, as the first order of a silo does it; less the seconds of the same order once the features exist.
Prints JSON, and what it is doing to stderr.
"""

import argparse
import csv
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from fedrt.task import TaskKind
from silo.clip import FrozenClip, weights_sha256
from silo.sources import DataSource
from silo.work import WorkOrder
from silo.workbench import Workbench, open_workbench
from silo.worker_frames import Load
from tests.bench.arithmetic import counted_flops, image_flops
from tests.bench.local_round import local_spec, model_source
from tests.bench.measuring import big_product, interleaved, significant, timing
from tests.bench.setting import SEED, Case, class_names, random_clip, random_pixels

BATCH = 32  # of the feature path
LARGE_BATCH = 256  # of open_clip, ready tensors
FORMATS = {"jpeg": ".jpg", "png": ".png"}
SIZE = (500, 400)


def on_tensors(clip: FrozenClip, count: int, rounds: int) -> dict[str, Any]:
    """Images per second, and those of the feature path as a share of open_clip's."""
    pixels = random_pixels(clip, count)

    def in_batches(size: int, encode: Callable[[Tensor], object]) -> Callable[[], None]:
        def run() -> None:
            for batch in pixels.split(size):
                encode(batch)

        return run

    def original(batch: Tensor) -> Tensor:
        with torch.no_grad():
            features: Tensor = clip.model.encode_image(batch)
        return features

    work = {
        "open_clip": in_batches(LARGE_BATCH, original),
        "pooled": in_batches(BATCH, lambda batch: clip.encode_images(batch, False)),
        "patches": in_batches(BATCH, lambda batch: clip.encode_images(batch, True)),
    }
    flops = {name: counted_flops(run).flops for name, run in work.items()}  # and their first run
    product = big_product(clip.device, torch.float32)
    taken = interleaved(work | {"product": product.run}, clip.device, rounds, {"product": 5})
    rates = {name: count / timing(taken[name])["median"] for name in work}
    peak = product.gflops(taken["product"])
    reached = flops["pooled"] / count / 1e9 * rates["pooled"]
    return {
        "images_per_second": {name: significant(rate) for name, rate in rates.items()},
        "share_of_open_clip": {name: significant(rates[name] / rates["open_clip"]) for name in ("pooled", "patches")},
        "gflop_per_image": significant(image_flops(clip.model, 1, patches=False) / 1e9),
        "product_gflops": significant(peak),
        "pooled_gflops": significant(reached),
        "pooled_share_of_peak": significant(reached / peak),
    }


def write_images(root: Path, count: int, label: str) -> dict[str, DataSource]:
    """A silo for each format, whose test split is `count` images like photographs: smooth, with some noise."""
    generator = np.random.default_rng(SEED)
    sources = {}
    for name, suffix in FORMATS.items():
        directory = root / name
        directory.mkdir()
        rows = []
        for at in range(count):
            coarse = Image.fromarray(generator.integers(0, 256, (10, 8, 3), dtype=np.uint8))
            smooth = np.asarray(coarse.resize(SIZE, Image.Resampling.BICUBIC), dtype=np.float32)
            noisy = (smooth + generator.normal(0, 4, smooth.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(directory / f"{at:05d}{suffix}")
            rows.append([f"{at:05d}{suffix}", label, "test"])
        with (directory / "images.csv").open("w", newline="") as file:
            csv.writer(file).writerows([["path", "label", "split"], *rows])
        sources[name] = DataSource("manifest", directory, directory / "images.csv")
    return sources


def evaluate(bench: Workbench, case: Case, digest: str, silo: str) -> float:
    """Seconds of an evaluation, for which the features of all images are needed."""
    local = local_spec(case, digest)
    order = WorkOrder("task", "experiment", TaskKind.INITIALIZE, local, 1, SEED, {}, {}, silo)
    shared = bench.perform(order, lambda *_: None).shared
    order = WorkOrder("task", "experiment", TaskKind.EVALUATE, local, 1, SEED, shared, {}, silo)
    began = time.perf_counter()
    bench.perform(order, lambda *_: None)
    return time.perf_counter() - began


def on_files(clip: FrozenClip, count: int, threads: int | None) -> dict[str, Any]:
    """Images per second with decoding; each format has a workbench of its own, without features."""
    rates: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        sources = write_images(root, count, class_names(clip.architecture, 1)[0])
        source = model_source(clip, root)
        digest = weights_sha256(source)
        for name in FORMATS:
            rates[name] = {}
            for method in ("promptfl", "fedotp"):
                print(f"{name}, {method}", file=sys.stderr)
                bench = open_workbench(Load(source, {name: sources[name]}, threads))
                case = Case(clip, method, 1, 1, 1)
                first, second = (evaluate(bench, case, digest, name) for _ in range(2))
                kind = "patches" if case.declared.needs_patches else "pooled"
                rates[name][kind] = significant(count / (first - second))
    return rates


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", default="ViT-B-16", help="a vision transformer of open_clip, or fedrt-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2, help="turns on ready tensors")
    parser.add_argument("--no-files", action="store_true", help="ready tensors only")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clip = random_clip(arguments.architecture, torch.device(arguments.device))
    report: dict[str, Any] = {
        "benchmark": "extraction",
        "architecture": arguments.architecture,
        "device": clip.device_name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "images": arguments.images,
    }
    print("ready tensors", file=sys.stderr)
    report["tensors"] = on_tensors(clip, arguments.images, arguments.rounds)
    if not arguments.no_files:
        report["files_images_per_second"] = on_files(clip, arguments.images, arguments.threads)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

"""A whole local round, the engine against the textbook: `python -m tests.bench.local_round`.

1,000 training and 1,000 test images, two local epochs in batches of 32, then evaluation. The engine does it through the
workbench, on real orders and image files, and does it twice: what the first time takes longer is the extraction of the
features and whatever else happens once; the second time is the round. The textbook gets the same round on pixels that
are ready, and evaluates with class features computed once. Unless `--full`, its seconds are extrapolated from a few
steps and evaluation batches. Prints JSON, and what it is doing to stderr.
"""

import argparse
import csv
import dataclasses
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from fedrt.method import hyperparameters_json
from fedrt.spec import LocalSpec, ModelSpec, TrainingSpec
from fedrt.task import TaskKind
from silo.clip import FrozenClip, weights_sha256
from silo.clip.architecture import TINY
from silo.sources import DataSource, FeatureSource, ModelSource
from silo.work import WorkOrder
from silo.workbench import Workbench, open_workbench
from silo.worker_frames import Load
from tests.bench.arithmetic import (
    head_flops,
    image_flops,
    needed_flops,
    needed_text_flops,
    textbook_flops,
    textbook_text_flops,
)
from tests.bench.measuring import seconds, significant
from tests.bench.setting import SEED, Case, class_names, random_clip, random_pixels, textbook, textbook_of
from tests.bench.textbook import METHODS

EPOCHS = 2
EVALUATION_BATCH = 100  # images that the textbook evaluates at a time, as CoOp's code does
FEATURES_BYTES = 8 << 30


@dataclass(frozen=True)
class Round:
    """So many images of each split in batches of B; the last one of an epoch is smaller."""

    images: int
    batch_size: int

    @property
    def steps(self) -> dict[int, int]:
        """Batch size -> steps of that size in all epochs."""
        full, rest = divmod(self.images, self.batch_size)
        return {size: EPOCHS * count for size, count in ((self.batch_size, full), (rest, 1)) if size and count}


def write_images(root: Path, count: int, counts_of_classes: list[int], architecture: str) -> dict[str, DataSource]:
    """Small images of noise, and for each count of classes a silo that labels the same files with so many names."""
    generator = np.random.default_rng(SEED)
    paths = {split: [f"{split}-{at:05d}.png" for at in range(count)] for split in ("train", "test")}
    for name in (*paths["train"], *paths["test"]):
        pixels = generator.normal(generator.uniform(40, 220, 3), 30, (32, 32, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name)
    sources = {}
    for classes in counts_of_classes:
        names = class_names(architecture, classes)
        manifest = root / f"{classes}.csv"
        with manifest.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["path", "label", "split"])
            writer.writerows([[p, names[at % classes], split] for split in paths for at, p in enumerate(paths[split])])
        sources[f"classes-{classes}"] = DataSource("manifest", root, manifest)
    return sources


def model_source(clip: FrozenClip, root: Path) -> ModelSource:
    """The CLIP's weights as a file, which the workbench loads."""
    if clip.architecture == TINY:
        return ModelSource(TINY, "embedded", str(clip.device))
    path = root / "weights.safetensors"
    save_file(clip.model.state_dict(), path)
    return ModelSource(clip.architecture, str(path), str(clip.device))


def local_spec(case: Case, digest: str) -> LocalSpec:
    model = ModelSpec(case.clip.architecture, digest, case.clip.context_dim, case.clip.feature_dim)
    training = TrainingSpec(local_epochs=EPOCHS, batch_size=case.batch_size)
    return LocalSpec(case.method_name, hyperparameters_json(case.declared), model, case.names, training, round_count=1)


def perform(bench: Workbench, local: LocalSpec, silo: str) -> dict[str, float]:
    """One round of one silo by its orders: seconds of training and of evaluation."""
    order = WorkOrder("task", "experiment", TaskKind.INITIALIZE, local, 1, SEED, {}, {}, silo)
    shared = bench.perform(order, lambda *_: None).shared
    began = time.perf_counter()
    order = dataclasses.replace(order, kind=TaskKind.TRAIN, shared=shared)
    trained = bench.perform(order, lambda *_: None)
    middle = time.perf_counter()
    shared = {name: shared[name] + delta for name, delta in trained.shared.items()}
    order = dataclasses.replace(order, kind=TaskKind.EVALUATE, shared=shared, private=trained.private)
    bench.perform(order, lambda *_: None)
    return {"train": middle - began, "evaluate": time.perf_counter() - middle}


def perform_textbook(case: Case, plan: Round, repeats: int | None) -> dict[str, float]:
    """Seconds of training and of evaluation, from the median of so many steps or batches; None does them all."""
    train = evaluate = 0.0
    device = case.clip.device
    for size, count in plan.steps.items():
        sized = dataclasses.replace(case, batch_size=size)
        side = textbook(sized, random_pixels(case.clip, size))
        if repeats:
            side.step()  # the first is slower, which would be multiplied
        taken = [seconds(side.step, device) for _ in range(repeats or count)]
        train += count * statistics.median(taken) if repeats else sum(taken)
    batch = random_pixels(case.clip, min(EVALUATION_BATCH, plan.images))
    book, start = textbook_of(case), case.start()
    with torch.no_grad():
        evaluate += seconds(lambda: book.encode_prompts(start, to_train=False), device)
        prompts = book.encode_prompts(start, to_train=False)
        batches = plan.images / len(batch)
        count = repeats or round(batches)
        taken = [seconds(lambda: book.logits(prompts, book.encode_images(batch)), device) for _ in range(count)]
    evaluate += batches * statistics.median(taken) if repeats else sum(taken)
    return {"train": train, "evaluate": evaluate}


def flops(case: Case, plan: Round) -> tuple[int, int]:
    """What the textbook and the least engine need for the round, whose features exist."""
    model, book, least = case.clip.model, 0, 0
    for size, count in plan.steps.items():
        step = dataclasses.replace(case.step, batch_size=size)
        book += count * textbook_flops(model, step)
        least += count * needed_flops(model, step)
    evaluation = dataclasses.replace(case.step, batch_size=plan.images, trains=False)
    images = image_flops(model, plan.images, case.declared.needs_patches)
    book += textbook_text_flops(model, evaluation) + images + head_flops(model, evaluation)
    return book, least + needed_text_flops(model, evaluation) + head_flops(model, evaluation)


def compare(arguments: argparse.Namespace, case: Case, bench: Workbench, digest: str) -> dict[str, Any]:
    """One method with one count of classes."""
    plan, local, silo = (
        Round(arguments.images, case.batch_size),
        local_spec(case, digest),
        f"classes-{case.class_count}",
    )
    first = perform(bench, local, silo)
    second = perform(bench, local, silo)
    book_flops, least_flops = flops(case, plan)
    total = sum(second.values())
    report: dict[str, Any] = {
        "method": case.method_name,
        "classes": case.class_count,
        "mean_name_tokens": significant(case.mean_name_tokens()),
        "engine_seconds": rounded(second),
        "engine_first_time_longer_seconds": significant(sum(first.values()) - total),
        "engine_needed_gflop": significant(least_flops / 1e9),
        "textbook_gflop": significant(book_flops / 1e9),
        "R": significant(book_flops / least_flops),
    }
    if not arguments.no_textbook:
        repeats = None if arguments.full else arguments.steps
        book = perform_textbook(case, plan, repeats)
        ratio = sum(book.values()) / total
        report["textbook_seconds"] = rounded(book)
        report["textbook_is_extrapolated_from_steps"] = repeats
        report["measured"] = significant(ratio)
        report["measured_of_R"] = significant(ratio * least_flops / book_flops)
    return report


def rounded(taken: dict[str, float]) -> dict[str, float]:
    return {name: significant(value) for name, value in (taken | {"total": sum(taken.values())}).items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--classes", nargs="+", type=int, default=[10, 100])
    parser.add_argument("--architecture", default="ViT-B-16", help="a vision transformer of open_clip, or fedrt-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--images", type=int, default=1000, help="of each split")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2, help="and evaluation batches of the textbook, timed")
    parser.add_argument("--full", action="store_true", help="do every step of the textbook: hours on a CPU")
    parser.add_argument("--no-textbook", action="store_true", help="the engine alone")
    parser.add_argument("--features", type=Path, help="keep features in this directory, for the next run")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    clip = random_clip(arguments.architecture, torch.device(arguments.device))
    report: dict[str, Any] = {
        "benchmark": "local_round",
        "architecture": arguments.architecture,
        "device": clip.device_name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "images_of_each_split": arguments.images,
        "epochs": EPOCHS,
        "batch": arguments.batch,
        "context_length": arguments.context,
        "cases": [],
    }
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        sources = write_images(root, arguments.images, arguments.classes, arguments.architecture)
        source = model_source(clip, root)
        features = FeatureSource(arguments.features, FEATURES_BYTES) if arguments.features else None
        bench = open_workbench(Load(source, sources, arguments.threads, features))
        digest = weights_sha256(source)
        for classes in arguments.classes:
            for method in arguments.methods:
                print(f"{method}, {classes} classes", file=sys.stderr)
                case = Case(clip, method, classes, arguments.context, arguments.batch)
                report["cases"].append(compare(arguments, case, bench, digest))
                print(json.dumps(report["cases"][-1]), file=sys.stderr)
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

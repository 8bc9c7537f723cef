"""The engine's training step against the textbook's, in one run and one process: `python -m tests.bench.training_step`.

Both start from the same tensors and see the same images, on a CLIP with random weights. The engine works on features
computed before, whose extraction is reported; the textbook encodes the images in every step. Timed in turns. R is the
ratio of the FLOPs that the textbook and the engine need, so `measured_of_R` says how far the engine is from its limit.
Prints JSON, and what it is doing to stderr. Memory is that of a process which never runs the textbook.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fedrt.spec import Precision
from silo.clip import FrozenClip
from silo.examples import Examples
from tests.bench.arithmetic import Counted, counted_flops, needed_flops, textbook_flops
from tests.bench.measuring import (
    big_product,
    difference,
    interleaved,
    peak_memory_bytes,
    seconds,
    significant,
    timing,
    worst_difference,
)
from tests.bench.setting import Case, Side, engine, gradients, random_clip, random_pixels, textbook
from tests.bench.textbook import METHODS

ENGINE_REPEATS = 5  # for each step of the textbook, which takes much longer
DTYPES = {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16}


def examples_of(case: Case, pixels: Tensor) -> Examples:
    features = case.clip.encode_images(pixels, case.declared.needs_patches)
    return Examples(features, torch.arange(case.batch_size, device=case.clip.device), case.labels())


def speed(taken: list[float], counted: Counted, peak: float) -> dict[str, Any]:
    """Seconds, and GFLOP/s with the FLOPs that this side really did."""
    reached = counted.flops / timing(taken)["median"] / 1e9
    return {
        "seconds": timing(taken),
        "gflop": significant(counted.flops / 1e9),
        "gflops": significant(reached),
        "share_of_peak": significant(reached / peak),
        "operator_calls": counted.calls,
        "uncounted": counted.uncounted,
    }


@dataclass(frozen=True)
class Look:
    """What a side computes from the starting tensors, and what that needed; serves as its warm-up too."""

    logits: Tensor
    gradients: Mapping[str, Tensor]
    counted: Counted


def look(side: Side) -> Look:
    with torch.no_grad():
        logits = side.logits()
    found: dict[str, Tensor] = {}
    return Look(logits, found, counted_flops(lambda: found.update(gradients(side))))


def differences(actual: Look, expected: Look) -> dict[str, Any]:
    worst = worst_difference(actual.gradients, expected.gradients)
    return {"logits": difference(actual.logits, expected.logits), "gradients": worst}


def features_error(case: Case) -> dict[str, float]:
    """Of class features in bf16."""
    context = next(tensor for name, tensor in case.start().items() if "context" in name).detach()
    tower = case.clip.text_tower(case.names)
    with torch.no_grad():
        exact = tower.encode(context)
        with torch.autocast(case.clip.device.type, torch.bfloat16):
            return difference(tower.encode(context), exact)


def compare(arguments: argparse.Namespace, case: Case, pixels: Tensor) -> dict[str, Any]:
    """One method with one count of classes."""
    examples = examples_of(case, pixels)
    sides = {"engine": engine(case, examples)}
    if not arguments.no_bf16:
        sides["engine_bf16"] = engine(case, examples, Precision.BF16)
    if not arguments.no_textbook and case.class_count <= arguments.textbook_up_to:
        sides = {"textbook": textbook(case, pixels)} | sides
    looks = {name: look(side) for name, side in sides.items()}
    report: dict[str, Any] = {
        "method": case.method_name,
        "classes": case.class_count,
        "mean_name_tokens": significant(case.mean_name_tokens()),
    }
    if "textbook" in sides:
        report["difference"] = differences(looks["engine"], looks["textbook"])
        if case.method_name == "fedotp":  # the textbook stops its sweeps as a stack, the engine each problem by itself
            stack = engine(dataclasses.replace(case, settings={"stopping": "stack"}), examples)
            report["difference_if_engine_stops_as_a_stack"] = differences(look(stack), looks["textbook"])
    device = case.clip.device
    products = {precision.value: big_product(device, dtype) for precision, dtype in DTYPES.items()}
    work = {name: side.step for name, side in sides.items()} | {name: one.run for name, one in products.items()}
    taken = interleaved(work, device, arguments.steps, dict.fromkeys(work, ENGINE_REPEATS) | {"textbook": 1})
    peaks = {name: one.gflops(taken[name]) for name, one in products.items()}
    report["product_gflops"] = {name: significant(peak) for name, peak in peaks.items()}
    for name, seen in looks.items():
        peak = peaks["bf16" if name == "engine_bf16" else "fp32"]
        report[name] = speed(taken[name], seen.counted, peak)
    needed, book = needed_flops(case.clip.model, case.step), textbook_flops(case.clip.model, case.step)
    report["engine"]["needed_gflop"] = significant(needed / 1e9)
    if "textbook" in sides:
        report["textbook"]["gflop_by_formula"] = significant(book / 1e9)
        report["ratio"] = ratios(report, book / needed)
    if "engine_bf16" in sides:
        times = report["engine"]["seconds"], report["engine_bf16"]["seconds"]
        report["bf16_speedup"] = significant(times[0]["median"] / times[1]["median"])
        report["bf16_error"] = {"features": features_error(case)} | differences(looks["engine_bf16"], looks["engine"])
    return report


def ratios(report: dict[str, Any], needed: float) -> dict[str, float]:
    """R of what is needed and R of what was counted, the measured ratio, and its share of both."""
    book, ours = report["textbook"], report["engine"]
    counted = book["gflop"] / ours["gflop"]
    measured = book["seconds"]["median"] / ours["seconds"]["median"]
    return {
        "R": significant(needed),
        "R_counted": significant(counted),
        "measured": significant(measured),
        "measured_best": significant(book["seconds"]["best"] / ours["seconds"]["best"]),
        "measured_of_R": significant(measured / needed),
        "measured_of_R_counted": significant(measured / counted),
    }


def memory_of(arguments: argparse.Namespace, case: Case) -> dict[str, int]:
    """The peak in bytes of a process that only extracts features of one batch and trains on them."""
    command = [sys.executable, "-m", "tests.bench.training_step", "--memory", "--methods", case.method_name]
    command += ["--classes", str(case.class_count), "--architecture", arguments.architecture]
    command += ["--device", arguments.device, "--threads", str(torch.get_num_threads())]
    command += ["--batch", str(case.batch_size), "--context", str(case.context_length)]
    found: dict[str, int] = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    return found


def measure_memory(case: Case) -> dict[str, int]:
    """What the process above does."""
    device = case.clip.device
    peaks = {"model": peak_memory_bytes(device)}
    examples = examples_of(case, random_pixels(case.clip, case.batch_size))
    peaks["extraction"] = peak_memory_bytes(device)
    for precision in (Precision.FP32, Precision.BF16):
        side = engine(case, examples, precision)
        for _ in range(3):
            side.step()
        peaks[f"training_{precision.value}"] = peak_memory_bytes(device)
    return peaks


def extraction(clip: FrozenClip, pixels: Tensor) -> dict[str, float]:
    """Seconds for the features of the batch, which a step of the engine does not include."""
    taken: dict[str, float] = {}
    for name, patches in (("pooled", False), ("patches", True)):
        clip.encode_images(pixels, patches)
        runs = [seconds(lambda: clip.encode_images(pixels, patches), clip.device) for _ in range(2)]  # noqa: B023
        taken[name] = significant(min(runs))
    return taken


def launch_overhead(arguments: argparse.Namespace, clip: FrozenClip) -> dict[str, float]:
    """Seconds of a step with one image and one class, where hardly anything is computed."""
    taken = {}
    for method in arguments.methods:
        case = Case(clip, method, 1, arguments.context, 1)
        side = engine(case, examples_of(case, random_pixels(clip, 1)))
        side.step()
        taken[method] = min(seconds(side.step, clip.device) for _ in range(10))
    return {method: significant(value) for method, value in taken.items()}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--classes", nargs="+", type=int, default=[10, 100, 1000])
    parser.add_argument("--architecture", default="ViT-B-16", help="a vision transformer of open_clip, or fedrt-tiny")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--steps", type=int, default=3, help="steps of the textbook that are timed")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=16)
    parser.add_argument("--no-textbook", action="store_true", help="the engine alone")
    parser.add_argument("--textbook-up-to", type=int, default=100, help="classes; above them the engine alone")
    parser.add_argument("--no-bf16", action="store_true")
    parser.add_argument("--no-memory", action="store_true", help="start no processes for peak memory")
    parser.add_argument("--memory", action="store_true", help="measure only the peak memory of one method, here")
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)
    clip = random_clip(arguments.architecture, device)
    cases = [
        Case(clip, method, count, arguments.context, arguments.batch)
        for count in arguments.classes
        for method in arguments.methods
    ]
    if arguments.memory:
        print(json.dumps(measure_memory(cases[0])))
        return
    pixels = random_pixels(clip, arguments.batch)
    report: dict[str, Any] = {
        "benchmark": "training_step",
        "architecture": arguments.architecture,
        "device": clip.device_name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "batch": arguments.batch,
        "context_length": arguments.context,
        "extraction_seconds": extraction(clip, pixels),
        "smallest_step_seconds": launch_overhead(arguments, clip),
        "cases": [],
    }
    for case in cases:
        print(f"{case.method_name}, {case.class_count} classes", file=sys.stderr)
        found = compare(arguments, case, pixels)
        if not arguments.no_memory:
            found["peak_memory_bytes"] = memory_of(arguments, case)
        report["cases"].append(found)
        print(json.dumps(found), file=sys.stderr)  # should a long run be cut short
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()

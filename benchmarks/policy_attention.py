"""Time and memory of policy attention, as ratios to the original's matrix, in one run.

    python -m benchmarks.policy_attention --output benchmarks/results/policy-attention-cpu.json

runs forward and backward of one causal attention, policy gradient included, at several lengths: `eager` builds the
matrix as the original does, `blockwise` (and on a GPU `triton`) never does, and `dense` is torch's own attention
without a policy, the least that can be hoped for. Times are taken in turns; memory is measured in processes of their
own, one for each number.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from benchmarks.memory import STATUS, process_status
from benchmarks.record import check_run
from dynamic.attention import policy_attention
from llava.errors import FlagError
from llava.runtime.output import replace_text
from llava.runtime.program import package_versions, run_program

PROGRAM = "benchmarks.policy_attention"
METHODS = {"cpu": ("eager", "blockwise", "dense"), "cuda": ("eager", "blockwise", "triton", "flex", "dense")}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}
KEPT = 0.3  # share of kept tokens; no implementation gains from it
WARM_UP = 64  # tokens of the pass that loads what is loaded once


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--lengths", type=int, nargs="+", default=[512, 1024, 2048, 4096], help="tokens (default %(default)s)")
    add("--batch", type=int, default=1, help="samples (default %(default)s)")
    add("--heads", type=int, default=4, help="attention heads (default %(default)s; LLaVA-7B has 32)")
    add("--width", type=int, default=64, help="width of a head (default %(default)s; LLaVA-7B has 128)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="default float32, on a GPU bfloat16")
    add("--eps", type=float, default=0.0, help="of policy attention; 1e-6 in the original (default %(default)s)")
    add("--rounds", type=int, default=5, help="timed rounds of each length (default %(default)s)")
    add("--output", type=Path, default=None, help="JSON file; the table goes beside it as .md. Default: screen only")
    return parser


def methods_of(args: argparse.Namespace) -> tuple[str, ...]:
    """What is compared; FlexAttention knows no eps."""
    return tuple(method for method in METHODS[args.device] if method != "flex" or not args.eps)


def one_pass(method: str, length: int, args: argparse.Namespace) -> Callable[[], None]:
    """A function that runs forward and backward once."""
    generator = torch.Generator().manual_seed(0)
    shape, dtype = (args.batch, args.heads, length, args.width), getattr(torch, args.dtype)

    def normal() -> Tensor:
        return torch.randn(shape, generator=generator).to(args.device, dtype)

    inputs = [normal().requires_grad_() for _ in range(3)]
    policy = (torch.rand(args.batch, length, generator=generator) < KEPT).float().to(args.device).requires_grad_()
    cotangent = normal()

    def run() -> None:
        for tensor in (*inputs, policy):
            tensor.grad = None
        if method == "dense":
            y = F.scaled_dot_product_attention(*inputs, is_causal=True)
        else:
            y = policy_attention(*inputs, policy, causal=True, implementation=method, eps=args.eps)
        y.backward(cotangent)

    return run


def seconds(run: Callable[[], None], device: str) -> float:
    """Time of one call: computing time of this process on the CPU, wall-clock time on a GPU."""
    if device == "cpu":
        start = time.process_time()
        run()
        return time.process_time() - start
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_bytes(method: str, length: int, args: argparse.Namespace) -> int:
    """Most memory that a pass takes beyond its inputs; to be called in a fresh process.

    On the CPU by how much the resident size of the process grows, on a GPU what torch's allocator counts.
    """
    torch.set_num_threads(1)
    one_pass(method, WARM_UP, args)()
    run = one_pass(method, length, args)
    if args.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    before = resident_bytes("VmRSS")
    run()
    return resident_bytes("VmHWM") - before


def in_fresh_process(function: Callable[..., int], *arguments: Any) -> int:
    """Result of a function that is called in a new process, whose memory holds nothing from before."""
    with multiprocessing.get_context("spawn").Pool(1) as fresh:
        return fresh.apply(function, arguments)


def resident_bytes(field: str) -> int:
    """Memory of this process: `VmRSS` now, `VmHWM` at most so far.

    Raises:
        FlagError: this system does not say.
    """
    found = process_status()
    if field not in found:
        raise FlagError(f"memory on the CPU is read from {STATUS}, which is not here; measure on Linux")
    return found[field]


def measure(length: int, args: argparse.Namespace, after: Callable[[], object]) -> dict[str, Any]:
    """Times and peaks of all methods at one length."""
    methods = methods_of(args)
    runs = {method: one_pass(method, length, args) for method in methods}
    times: dict[str, list[float]] = {method: [] for method in methods}
    for number in range(args.rounds + 1):
        first = number % len(methods)
        for method in methods[first:] + methods[:first]:
            taken = seconds(runs[method], args.device)
            if number:  # the first round warms up
                times[method].append(taken)
        after()
    peaks = {}
    for method in methods:
        peaks[method] = in_fresh_process(peak_bytes, method, length, args)
        after()
    return {
        "length": length,
        "seconds": {method: {"min": min(all_), "median": statistics.median(all_)} for method, all_ in times.items()},
        "peak_bytes": peaks,
        "speedup_over_eager": {
            method: statistics.median(a / b for a, b in zip(times["eager"], times[method], strict=True))
            for method in methods
        },
    }


def table(cases: Sequence[Mapping[str, Any]]) -> str:
    """One line per length; ratios are to eager, taken within each round."""
    methods = list(cases[0]["seconds"])
    others = [method for method in methods if method != "eager"]
    columns = ["tokens", *(f"{method} (ms)" for method in methods), *(f"eager / {method}" for method in others)]
    columns += [*(f"{method} (MiB)" for method in methods), *(f"memory, eager / {method}" for method in others)]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --: |" * len(columns)]
    for case in cases:
        peaks = case["peak_bytes"]
        cells = [str(case["length"]), *(f"{1e3 * case['seconds'][method]['median']:.0f}" for method in methods)]
        cells += [f"{case['speedup_over_eager'][method]:.2f}" for method in others]
        cells += [f"{peaks[method] / 2**20:.0f}" for method in methods]
        cells += [f"{peaks['eager'] / max(peaks[method], 1):.1f}" for method in others]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def document(record: Mapping[str, Any]) -> str:
    """The Markdown file of a record."""
    settings, versions = record["settings"], ", ".join(f"{name} {text}" for name, text in record["versions"].items())
    setup = ", ".join(f"{name} {settings[name]}" for name in ("batch", "heads", "width", "dtype", "eps", "rounds"))
    return (
        f"# Forward and backward of policy attention: {record['machine']}\n\n"
        f"{record['date'][:10]}; {versions}; {setup}. Ratios are medians over the rounds.\n\n"
        f"```console\n$ {record['command']}\n```\n\n{table(record['cases'])}\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, show the table and write it.

    Raises:
        FlagError: there is no GPU, or the output is no .json file.
    """
    args = build_parser().parse_args(argv)
    args.dtype = args.dtype or DTYPES[args.device]
    check_run(args.device, args.output)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    versions = package_versions()
    record: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", PROGRAM, *(sys.argv[1:] if argv is None else argv)]),
        "versions": {name: versions[name] for name in ("python", "torch", "triton") if name in versions},
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else f"{platform.machine()} CPU, 1 thread",
        "load_average": list(os.getloadavg()),
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
    }
    steps = args.rounds + 1 + len(methods_of(args))
    try:
        with tqdm(total=steps * len(args.lengths), unit="step") as bar:
            record["cases"] = [measure(length, args, bar.update) for length in args.lengths]
    finally:
        torch.set_num_threads(threads)
    sys.stdout.write(table(record["cases"]) + "\n")
    if args.output is None:
        sys.stdout.write(
            "Nothing was written; --output benchmarks/results/NAME.json keeps the numbers and this table.\n"
        )
        return
    replace_text(args.output, json.dumps(record, indent=1) + "\n")
    replace_text(args.output.with_suffix(".md"), document(record))
    sys.stdout.write(f"Written: {args.output} and {args.output.with_suffix('.md')}\n")


if __name__ == "__main__":
    run_program(main)

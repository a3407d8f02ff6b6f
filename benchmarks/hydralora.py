"""Speed and memory of the HydraLoRA layer, as ratios to PEFT's LoRA and to a loop over experts, in one run.

    python -m benchmarks.hydralora --output benchmarks/results/hydralora-cpu.json

times forward and backward of one adapted linear layer, and of one adapted MLP block, and decoding one token with such a
layer: without adapter, with PEFT LoRA of the same rank, with PEFT LoRA of the same number of trained parameters, with
HydraLoRA, and with HydraLoRA as a loop over experts. `benchmarks/README.md` explains the columns of the table.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: this folder would hide the package hydralora behind this very program
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from benchmarks.measuring import Clock, clock_for, interleaved_times, peak_bytes, saved_bytes, spread
from benchmarks.methods import Case, build_methods, trained_parameters
from benchmarks.record import RATIOS, check_run, provenance, results, show, write_result
from llava.errors import FlagError
from llava.runtime.program import run_program

PROGRAM = "benchmarks.hydralora"
SEED = 0
LAYERS = {"cpu": ("512", "1024", "2048"), "cuda": ("4096x11008", "11008x4096")}
BLOCKS = {"cpu": ("512x1376",), "cuda": ("4096x11008",)}
DECODED = {"cpu": ("512", "2048", "4096"), "cuda": ("2048", "4096")}
"""Sizes by device; a block of 4096x11008 is that of LLaMA-7B, the smaller one has its proportions."""
TOKENS = {"cpu": 512, "cuda": 4096}
DTYPES = {"cpu": "float32", "cuda": "bfloat16"}


def sizes(text: str) -> tuple[int, int]:
    """Input and output width of `512x1376`; `512` is square."""
    parts = text.split("x")
    if len(parts) > 2 or not all(part.isdigit() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"'{text}' is no size; write 512, or 512x1376 for input x output")
    return int(parts[0]), int(parts[-1])


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is no whole number from 1 on")
    return int(text)


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default=None, help="default: cuda if there is a GPU")
    add("--threads", type=positive, default=1, help="threads of torch on the CPU (default %(default)s)")
    add("--widths", type=sizes, nargs="*", default=None, metavar="N|INxOUT", help="linear layers; none given: no layer")
    add("--blocks", type=sizes, nargs="*", default=None, metavar="DxM", help="MLP blocks, width x inner width")
    add("--decode", type=sizes, nargs="*", default=None, metavar="N|INxOUT", help="linear layers that decode a token")
    add("--experts", type=positive, nargs="+", default=[1, 3, 8], help="numbers of experts (default 1 3 8)")
    add("--rank", type=positive, default=8, help="rank of HydraLoRA and of LoRA (default %(default)s)")
    add("--dropout", type=float, nargs="+", default=[0.0, 0.05], help="before A (default 0 and the authors' 0.05)")
    add("--tokens", type=positive, default=None, help="tokens of the batch (default 512, on a GPU 4096)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="default float32, on a GPU bfloat16")
    add("--repeats", type=positive, default=15, help="timed rounds of each case (default %(default)s)")
    add("--warmup", type=positive, default=2, help="rounds before them that do not count (default %(default)s)")
    add(
        "--passes", type=positive, default=2, help="times that everything is measured, to see whether the numbers agree"
    )
    add("--compile", action="store_true", help="time everything through torch.compile as well")
    add("--output", type=Path, default=None, help="JSON file; the table goes beside it as .md. Default: screen only")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options with the defaults of the device filled in.

    Raises:
        FlagError: there is no GPU, the dropout is no probability, or the output is no .json file.
    """
    args = build_parser().parse_args(argv)
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_run(args.device, args.output)
    if not all(0 <= value < 1 for value in args.dropout):
        raise FlagError(f"--dropout {args.dropout}: expected probabilities below 1")
    if args.decode is None and (args.widths is not None or args.blocks is not None):
        args.decode = []  # somebody wants something else measured
    for name, defaults in (("widths", LAYERS), ("blocks", BLOCKS), ("decode", DECODED)):
        if getattr(args, name) is None:
            setattr(args, name, [sizes(text) for text in defaults[args.device]])
    args.tokens = args.tokens or TOKENS[args.device]
    args.dtype = args.dtype or DTYPES[args.device]
    return args


def all_cases(args: argparse.Namespace) -> list[Case]:
    """Every comparison of one pass."""
    shapes = [("layer", *size) for size in args.widths] + [("block", *size) for size in args.blocks]
    shapes += [("token", *size) for size in args.decode]
    return [
        Case(kind, width, inner, experts, args.rank, dropout)
        for kind, width, inner in shapes
        for dropout in (args.dropout if kind != "token" else [0.0])
        for experts in args.experts
    ]


def measure(
    case: Case, args: argparse.Namespace, clock: Clock, compiled: bool, after_round: Callable[[], object]
) -> dict[str, Any]:
    """Everything about one case, as it stands in the record."""
    torch.manual_seed(SEED)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    methods = build_methods(case, device, dtype)
    named = {name: getattr(case, name) for name in ("kind", "width", "inner", "experts", "rank", "dropout")}
    if case.kind == "token":
        x = torch.randn(1, 1, case.width, device=device, dtype=dtype)
        timed = {name: torch.compile(module) for name, module in methods.items()} if compiled else methods
        times = interleaved_times(timed, x, None, clock, args.repeats, args.warmup, after_round)
        spent = {name: {"milliseconds": spread(values)} for name, values in times.items()}
        return {**named, "compiled": compiled, "methods": spent, "ratios": ratios(times)}
    x = torch.randn(1, args.tokens, case.width, device=device, dtype=dtype, requires_grad=True)
    cotangent = torch.randn(1, args.tokens, case.outputs, device=device, dtype=dtype)
    facts: dict[str, dict[str, Any]] = {
        name: {
            "trained_parameters": trained_parameters(module),
            "saved_bytes": saved_bytes(module, x),
            "peak_bytes": peak_bytes(module, x, cotangent),
        }
        for name, module in methods.items()
    }
    timed = {name: torch.compile(module) for name, module in methods.items()} if compiled else methods
    times = interleaved_times(timed, x, cotangent, clock, args.repeats, args.warmup, after_round)
    for name, values in times.items():
        facts[name]["milliseconds"] = spread(values)
    allowed = facts["lora"]["saved_bytes"] + case.routed_bytes(args.tokens, dtype)
    return {
        **named,
        "compiled": compiled,
        "methods": facts,
        "ratios": ratios(times),
        "memory": {"allowed_bytes": allowed, "gap_bytes": facts["hydralora"]["saved_bytes"] - allowed},
    }


def ratios(times: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Quotients of times, taken within each round.

    `update_loop_to_hydralora` compares what loop and HydraLoRA take beyond the frozen layer: it is the quotient of the
    median excesses, because within one round the small excess may be lost in noise.
    """
    found: dict[str, dict[str, float]] = {}
    for name, (above, below) in RATIOS.items():
        if above in times and below in times:
            quotients = [one / other for one, other in zip(times[above], times[below], strict=True)]
            found[name] = spread(quotients) | {"of_minima": min(times[above]) / min(times[below])}
    excess = {
        name: spread([one - base for one, base in zip(times[name], times["frozen"], strict=True)])["median"]
        for name in ("loop", "hydralora")
    }
    if excess["hydralora"] > 0:
        found["update_loop_to_hydralora"] = {"median": excess["loop"] / excess["hydralora"]}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, show the table and write it.

    Raises:
        FlagError: an option cannot be carried out; the message says what to do.
    """
    args = parse_args(argv)
    threads = torch.get_num_threads()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    clock = clock_for(device, args.threads)
    record = provenance(PROGRAM, sys.argv[1:] if argv is None else argv, device)
    names = ("device", "threads", "rank", "tokens", "dtype", "repeats", "warmup")
    record["settings"] = {name: getattr(args, name) for name in names} | {"clock": clock.name, "seed": SEED}
    record["cases"] = []
    cases = [(case, compiled) for case in all_cases(args) for compiled in ((False, True) if args.compile else (False,))]
    rounds = len(cases) * args.passes * (args.warmup + args.repeats)
    try:
        with tqdm(total=rounds, unit="round", desc=f"{len(cases)} cases, {args.passes} passes") as bar:
            for number in range(1, args.passes + 1):
                for case, compiled in cases:
                    measured = measure(case, args, clock, compiled, bar.update)
                    record["cases"].append({"pass": number} | measured)
                record["settings"]["passes"] = number
                if args.output is not None:  # a run that is interrupted later keeps its whole passes
                    write_result(record, args.output)
    finally:
        torch.set_num_threads(threads)
    show("\n".join(results(record["cases"])))
    if args.output is None:
        show("Nothing was written; --output benchmarks/results/NAME.json keeps the numbers and this table.")
    else:
        show(f"Written: {args.output} and {args.output.with_suffix('.md')}")


if __name__ == "__main__":
    run_program(main)

"""LaVIN's adapters: a training step against LoRA and against the original's placement; inference against no adapters.

    python -m benchmarks.mma --output benchmarks/results/mma-cpu.json

One decoder of random weights, the measured passes taken in turns, ratios within a round. Training steps are forward and
backward of a batch, half of it with images. Inference is a prompt and then given tokens one by one: a prompt with an
image, and a batch whose rows are of both modalities in turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: this folder would hide the package mma behind this very program
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks import mma_models as models
from benchmarks import sparse_models
from benchmarks.measuring import Clock, clock_for, run_once, saved_bytes, take_turns
from benchmarks.record import check_run, provenance, show, write_files
from llava.runtime.program import run_program

PROGRAM = "benchmarks.mma"
SIZES = {
    "cpu": sparse_models.Size(layers=4),
    "cuda": sparse_models.Size(layers=32, width=4096, inner=11008, heads=32),
}
"""By device; on a GPU those of LaVIN-7B on LLaVA's patches."""
KINDS = ("attn", "block")
PARTS = ("training", "inference")
MERGED_AIM = 1.02
"""A merged model should take no more than this, as a multiple of the unadapted one."""
ADAPTED_AIM = 1.03
"""And one with adapters no more than this."""


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=1, help="threads of torch on the CPU (default %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="default float32, on a GPU bfloat16")
    add("--layers", type=int, default=None, help="decoder layers; default 4, on a GPU 32")
    add("--width", type=int, default=None, help="width of the decoder; default 512, on a GPU 4096")
    add("--patches", type=int, default=None, help="image tokens; default 576")
    add("--batch", type=int, default=2, help="sequences of a training step (default %(default)s)")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="what is measured (default: both)")
    add("--rows", type=int, default=8, help="rows of a batch at inference, next to one row (default %(default)s)")
    add("--tokens", type=int, default=16, help="tokens fed after the prompt (default %(default)s)")
    add("--repeats", type=int, default=7, help="timed rounds (default %(default)s)")
    add("--output", type=Path, default=None, help="JSON file; the table (.md) goes beside it")
    return parser


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Options with the defaults of the device filled in.

    Raises:
        FlagError: there is no GPU, or the output is no .json file.
    """
    args = build_parser().parse_args(argv)
    check_run(args.device, args.output)
    default = SIZES[args.device]
    args.dtype = args.dtype or ("float32" if args.device == "cpu" else "bfloat16")
    width = args.width or default.width
    heads, inner = max(1, width * default.heads // default.width), width * default.inner // default.width
    args.size = sparse_models.Size(args.layers or default.layers, width, inner, heads, args.patches or default.patches)
    return args


Passes = Mapping[str, Callable[[], object]]


def times(passes: Passes, clock: Clock, rounds: int, after_round: Callable[[], object]) -> dict[str, list[float]]:
    """Milliseconds of each pass in each round; the passes take turns, after two rounds that do not count."""
    found = take_turns(passes, clock, rounds, 2, after_round)
    return {name: [1e3 * seconds for seconds in values] for name, values in found.items()}


def ratios(found: Mapping[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Each time over that of `base`, within each round: median, lowest and highest."""
    quotients = {name: [a / b for a, b in zip(values, found[base], strict=True)] for name, values in found.items()}
    return {
        name: {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}
        for name, values in quotients.items()
        if name != base
    }


def entry(found: Mapping[str, list[float]], base: str) -> dict[str, Any]:
    """Times and ratios as they stand in the record."""
    return {
        "milliseconds": {name: statistics.median(values) for name, values in found.items()},
        f"over_{base}": ratios(found, base),
    }


def measure_training(kind: str, args: argparse.Namespace, clock: Clock, progress: Any) -> dict[str, Any]:
    """Steps of one kind of adapters, of both placements of the token, of LoRA, and of the unadapted model."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    adapted, plain = (models.build(args.size, each, device, dtype).train() for each in (kind, None))
    prompt = models.mixed_prompt(plain, args.size, args.batch)
    parameters = models.trained_parameters(adapted)
    base = models.build(args.size, None, device, dtype).train()
    lora = models.with_lora(base, args.size, parameters)
    steps = {
        "unadapted": models.Step(plain, prompt),
        "adapters": models.Step(adapted, prompt),
        "token in the sequence": models.InSequence(adapted, prompt),
        "LoRA of its size": models.Step(lora, prompt),
    }
    x = prompt.embeddings.clone().requires_grad_()
    one = torch.ones((), device=device)

    def run(step: models.Step) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            loss_over(step, x, one)

    passes = {name: lambda step=step: run(step) for name, step in steps.items()}
    found = times(passes, clock, args.repeats, progress.update)
    return {
        "trained_parameters": {name: models.trained_parameters(step.model) for name, step in steps.items()},
        **entry(found, "unadapted"),
        "over_LoRA": ratios({name: found[name] for name in ("adapters", "LoRA of its size")}, "LoRA of its size"),
        "over_in_sequence": ratios(
            {name: found[name] for name in ("adapters", "token in the sequence")}, "token in the sequence"
        ),
        "saved_bytes": {name: saved_bytes(step, x) for name, step in steps.items()},
    }


def loss_over(step: models.Step, x: Tensor, one: Tensor) -> None:
    """Forward and backward."""
    run_once(step, x, one)


def measure_inference(kind: str, rows: int, args: argparse.Namespace, clock: Clock, progress: Any) -> dict[str, Any]:
    """Prompts, and given tokens on top of them, of the unadapted and the adapted model; of one row the merged one too.

    Several rows are of both modalities, for which no merged model exists.
    """
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    compared = {
        "unadapted": models.build(args.size, None, device, dtype),
        "adapters": models.build(args.size, kind, device, dtype),
    }
    if rows == 1:
        compared["merged"] = models.build_merged(args.size, kind, device, dtype)
    prompt = models.mixed_prompt(compared["unadapted"], args.size, rows)
    ids = sparse_models.random_ids(compared["unadapted"], rows, args.tokens)
    caches = {name: sparse_models.prefill(model, prompt) for name, model in compared.items()}

    def decode(name: str) -> None:
        sparse_models.feed(compared[name], caches[name], ids)
        caches[name].crop(-args.tokens)

    prefill = {name: lambda model=model: sparse_models.prefill(model, prompt) for name, model in compared.items()}
    decoding = {name: lambda name=name: decode(name) for name in compared}
    return {
        "prefill": entry(times(prefill, clock, args.repeats, progress.update), "unadapted"),
        "decoding": entry(times(decoding, clock, args.repeats, progress.update), "unadapted"),
    }


def document(record: Mapping[str, Any]) -> str:
    """The Markdown file of a record."""
    where, size, settings = record["machine"], record["size"], record["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    device = where["gpu"] or f"{where['cpu']}, {settings['threads']} thread(s)"
    batch = f"{size['layers']} layers of width {size['width']}, {size['patches']} image tokens, {settings['dtype']}"
    how = f"{settings['clock']} clock, median of {settings['repeats']} rounds (lowest to highest)"
    where_and_how = f"{record['date'][:10]}; {versions}; {batch}; {how}"
    lines = [
        f"# LaVIN's adapters: {device}",
        "",
        f"{where_and_how}.",
        "",
        "```console",
        f"$ {record['command']}",
        "```",
    ]
    if record["training"]:
        lines += [
            "",
            "| training step | time / unadapted | time / LoRA | time / token in the sequence | kept (MiB) |",
            "| --- | --: | --: | --: | --: |",
        ]
    for kind, training in record["training"].items():
        for name, kept in training["saved_bytes"].items():
            cells = [training[each].get(name) for each in ("over_unadapted", "over_LoRA", "over_in_sequence")]
            words = " | ".join("-" if cell is None else _range(cell) for cell in cells)
            number = f"{training['trained_parameters'][name]:,}"
            lines.append(f"| {kind}: {name} ({number} trained) | {words} | {kept / 2**20:,.1f} |")
    if record["inference"]:
        lines += ["", "| inference | prefill / unadapted | decoding / unadapted |", "| --- | --: | --: |"]
    for case, inference in record["inference"].items():
        for name in inference["prefill"]["over_unadapted"]:
            cells = [_range(inference[each]["over_unadapted"][name]) for each in ("prefill", "decoding")]
            lines.append(f"| {case}: {name} | {cells[0]} | {cells[1]} |")
    aims = [_aim(record, name, aim) for name, aim in (("adapters", ADAPTED_AIM), ("merged", MERGED_AIM))]
    return "\n".join([*lines, "", *(aims if record["inference"] else [])]) + "\n"


def _range(cell: Mapping[str, float]) -> str:
    return f"{cell['median']:.3f} ({cell['lowest']:.3f} to {cell['highest']:.3f})"


def _aim(record: Mapping[str, Any], name: str, aim: float) -> str:
    """Where the inference of a model reached its aim."""
    reached = {
        f"{case}, {part}": inference[part]["over_unadapted"][name]["median"] <= aim
        for case, inference in record["inference"].items()
        for part in ("prefill", "decoding")
        if name in inference[part]["over_unadapted"]
    }
    missed = [case for case, good in reached.items() if not good]
    text = f"- {name.capitalize()}, at most {aim} times the unadapted model: "
    text += f"reached in {len(reached) - len(missed)} of {len(reached)} cases"
    return text + (f"; missed by {', '.join(missed)}." if missed else ".")


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure everything; returns the record.

    Raises:
        FlagError: an option is refused.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    args = parse_args(given)
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    clock = clock_for(device, args.threads)
    record = {**provenance(PROGRAM, given, device), "size": vars(args.size), "training": {}, "inference": {}}
    record["settings"] = {"threads": args.threads, "dtype": args.dtype, "clock": clock.name, "repeats": args.repeats}
    passes = ("training" in args.parts) + 4 * ("inference" in args.parts)
    with tqdm(total=passes * len(KINDS) * (args.repeats + 2), unit="round") as progress:
        for kind in KINDS:
            if "training" in args.parts:
                record["training"][kind] = measure_training(kind, args, clock, progress)
            for rows, what in ((1, "an image"), (args.rows, f"{args.rows} mixed rows")):
                if "inference" in args.parts:
                    record["inference"][f"{kind}, {what}"] = measure_inference(kind, rows, args, clock, progress)
    show(document(record))
    if args.output is not None:
        write_files(record, args.output, document(record))
        show(f"{args.output}, {args.output.with_suffix('.md').name}")
    return record


if __name__ == "__main__":
    run_program(main)

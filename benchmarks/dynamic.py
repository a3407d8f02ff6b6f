"""Dense against sparse: time of prefill, of decoding with and without cache, cache bytes, and a training step.

    python -m benchmarks.dynamic --output benchmarks/results/dynamic-cpu.json

One model of random weights, with and without predictors, the measured passes taken in turns. Beside each ratio stands
the ideal one, from `dynamic.flops`: operations for times, kept tokens for bytes. The passes are those of the original's
bench scripts; `benchmarks/README.md` says what is left out.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: this folder would hide the package dynamic behind this very program
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch
from tqdm import tqdm

from benchmarks import sparse_models as models
from benchmarks.dynamic_report import document, plot
from benchmarks.measuring import Clock, clock_for, run_once, saved_bytes, take_turns
from benchmarks.record import check_run, provenance, show, write_files
from dynamic import flops
from dynamic.config import SparseConfig
from llava.errors import FlagError
from llava.runtime.program import run_program

PROGRAM = "benchmarks.dynamic"
SIZES = {"cpu": models.Size(), "cuda": models.Size(layers=32, width=4096, inner=11008, heads=32)}
"""By device; on a GPU those of LLaVA-1.5-7B."""
PREDICTOR_SHARE = 8
"""The predictors are as much narrower than the decoder as in the 7B model: 512 against 4096."""


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=1, help="threads of torch on the CPU (default %(default)s)")
    add("--dtype", choices=("float32", "bfloat16", "float16"), default=None, help="default float32, on a GPU bfloat16")
    add("--layers", type=int, default=None, help="decoder layers; default 16, on a GPU 32")
    add("--width", type=int, default=None, help="width of the decoder; default 512, on a GPU 4096")
    add("--patches", type=int, default=576, help="image tokens (default %(default)s)")
    add("--keep-rate", type=float, default=0.2, help="share of image tokens that is kept (default %(default)s)")
    add("--sparse-layer", type=int, default=2, help="first sparse layer (default %(default)s)")
    add("--batches", type=int, nargs="+", default=None, help="batch sizes of prefill; default 1 2 4, on a GPU 1 8 32")
    add("--decode-batches", type=int, nargs="*", default=[8], help="further batch sizes of decoding (default 8)")
    add("--tokens", type=int, default=256, help="tokens fed with cache (default %(default)s)")
    add("--tokens-in-batch", type=int, default=32, help="tokens for each of --decode-batches (default %(default)s)")
    add("--tokens-without-cache", type=int, default=4, help="steps without cache, after --tokens (default %(default)s)")
    add("--train-text", type=int, default=128, help="answer tokens of the training step (default %(default)s)")
    add("--repeats", type=int, default=7, help="timed rounds (default %(default)s)")
    add("--output", type=Path, default=None, help="JSON file; table (.md) and plot (.png) go beside it")
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
    args.batches = args.batches or ([1, 2, 4] if args.device == "cpu" else [1, 8, 32])
    width = args.width or default.width
    heads = max(1, width * default.heads // default.width)
    inner = width * default.inner // default.width
    args.size = models.Size(args.layers or default.layers, width, inner, heads, args.patches)
    return args


def settings_of(args: argparse.Namespace) -> SparseConfig:
    """Predictors of images and of generated text, as in the published recipe.

    Raises:
        FlagError: a value is refused.
    """
    d = max(8, args.size.width // PREDICTOR_SHARE)
    try:
        return SparseConfig(
            vision_keep_rate=args.keep_rate,
            use_instruct_predictor=False,
            sparse_layer=args.sparse_layer,
            d_model=d,
            nhead=8 if d % 8 == 0 else 1,
            dim_feedforward=4 * d,
        )
    except ValueError as error:
        raise FlagError(str(error)) from error


Passes = Mapping[str, Callable[[], object]]


def times(passes: Passes, clock: Clock, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each pass in each round; the passes take turns, after one round that does not count."""
    found = take_turns(passes, clock, rounds)
    return {name: [1e3 * seconds for seconds in values] for name, values in found.items()}


def compare(passes: Passes, base: str, other: str, clock: Clock, rounds: int, ideal: float) -> dict[str, Any]:
    """Median times, and the median over the rounds of `base`'s time over `other`'s, beside the ideal one."""
    found = times(passes, clock, rounds)
    quotients = [a / b for a, b in zip(found[base], found[other], strict=True)]
    return {
        "milliseconds": {name: statistics.median(values) for name, values in found.items()},
        "speedup": statistics.median(quotients),
        "lowest": min(quotients),
        "highest": max(quotients),
        "ideal": ideal,
    }


def measure_prefill(dense: Any, sparse: Any, args: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """One entry for each batch size."""
    decoder, settings = _decoder(args.size), settings_of(args)
    work = flops.Workload(image=args.size.patches, text=2)
    cost = flops.prefill(decoder, settings, work)
    ideal = cost.dense / (cost.sparse + flops.vision_predictor_flops(decoder, settings, args.size.patches))
    entries = []
    for batch in args.batches:
        prompts = {name: models.make_prompt(model, args.size, batch) for name, model in _named(dense, sparse)}
        passes = {
            "dense": lambda prompts=prompts: models.prefill(dense, prompts["dense"]),
            "sparse": lambda prompts=prompts: models.prefill(sparse, prompts["sparse"]),
        }
        entry = compare(passes, "dense", "sparse", clock, args.repeats, ideal)
        peaks = {name: _peak(run, args.device) for name, run in passes.items()}
        entries.append({"batch": batch, **entry, "peak_bytes": peaks})
    return entries


def measure_answer(dense: Any, sparse: Any, args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Given tokens behind one prompt: time with cache and without, and the bytes of the caches on the way."""
    decoder, settings, size = _decoder(args.size), settings_of(args), args.size
    # Given tokens instead of generated ones: both models do the same work, whatever they would have said.
    ids = models.random_ids(dense, 1, args.tokens)
    found: dict[str, list[float]] = {"dense": [], "sparse": []}
    curve: dict[str, list[int]] = {"tokens": [0], "dense": [], "sparse": [], "kept": []}
    rounds = max(1, args.repeats // 2)
    chunk = max(1, args.tokens // 8)
    caches: dict[str, Any] = {}
    # Turn by turn, the order reversed every other round, so that a slow minute meets both.
    for number in range(rounds):
        for name, model in _named(dense, sparse)[:: 1 if number % 2 else -1]:
            cache = models.prefill(model, models.make_prompt(model, size, 1))
            points, spent = [models.cache_bytes(cache)], 0.0
            # The clock stops while bytes are counted.
            for part in ids.split(chunk, dim=1):
                start = clock.read()
                models.feed(model, cache, part)
                spent += clock.read() - start
                points.append(models.cache_bytes(cache))
            found[name].append(1e3 * spent / args.tokens)
            curve[name], caches[name] = points, cache
    curve["tokens"] = [min(index * chunk, args.tokens) for index in range(len(curve["dense"]))]
    # Random tokens have a keep rate of their own, and the bound has to be that of what was really kept.
    kept = caches["sparse"].report().lengths[-1][0]
    share = (kept - flops.Workload(image=size.patches, text=2).kept_prompt(args.keep_rate)) / args.tokens
    work = flops.Workload(image=size.patches, text=2, generated=args.tokens, kept_output=share)
    with_cache, bytes_ideal = flops.decode(decoder, settings, work), flops.kv_bytes(decoder, settings, work)
    quotients = [a / b for a, b in zip(found["dense"], found["sparse"], strict=True)]
    needed = models.kept_bytes(caches["sparse"], size, getattr(torch, args.dtype))
    # Median of the quotients within a round, not quotient of the medians: rounds differ more than models.
    return {
        "tokens": args.tokens,
        "kept_share": share,
        "with_cache": {
            "milliseconds_per_token": {name: statistics.median(values) for name, values in found.items()},
            "speedup": statistics.median(quotients),
            "lowest": min(quotients),
            "highest": max(quotients),
            "ideal": with_cache.dense
            / (with_cache.sparse + args.tokens * flops.text_predictor_flops(decoder, settings)),
        },
        "without_cache": _without_cache(dense, sparse, args, clock),
        "cache": {
            "curve": curve,
            "ratio": curve["sparse"][-1] / curve["dense"][-1],
            "ideal": bytes_ideal.sparse / bytes_ideal.dense,
            "over_kept_tokens": curve["sparse"][-1] / needed - 1,
            "bytes_of_free_slots": caches["sparse"].report().bytes_of_free_slots,
        },
    }


def measure_batches(dense: Any, sparse: Any, args: argparse.Namespace, clock: Clock) -> list[dict[str, Any]]:
    """Given tokens behind several prompts, one entry for each batch size; the models take turns token by token."""
    entries = []
    for batch in args.decode_batches:
        ids = models.random_ids(dense, batch, args.tokens_in_batch)
        passes = {}
        for name, model in _named(dense, sparse):
            cache, columns = models.prefill(model, models.make_prompt(model, args.size, batch)), iter(ids.split(1, 1))
            passes[name] = lambda model=model, cache=cache, columns=columns: models.feed(model, cache, next(columns))
        entry = compare(passes, "dense", "sparse", clock, args.tokens_in_batch - 1, float("nan"))
        del entry["ideal"]
        entries.append({"batch": batch, "tokens": args.tokens_in_batch, **entry})
    return entries


def _without_cache(dense: Any, sparse: Any, args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """The last steps of an answer of `--tokens`, each over the whole sequence."""
    decoder, settings, size = _decoder(args.size), settings_of(args), args.size
    ids = models.random_ids(dense, 1, args.tokens)
    prompts = {name: models.make_prompt(model, size, 1) for name, model in _named(dense, sparse)}
    passes = {
        name: lambda model=model, name=name: [
            models.recompute(model, prompts[name], ids[:, : args.tokens - step])
            for step in range(args.tokens_without_cache)
        ]
        for name, model in _named(dense, sparse)
    }
    work = flops.Workload(image=size.patches, text=2, generated=args.tokens, kept_output=0.5)
    cost = flops.decode(decoder, settings, work, cached=False)
    return compare(passes, "dense", "sparse", clock, max(1, args.repeats // 2), cost.dense / cost.sparse)


def measure_training(sparse: Any, args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """A training step with the original's matrix of attention and in linear memory."""
    sparse.train()
    try:
        prompt = models.make_prompt(sparse, args.size, 1)
        steps = {
            name: models.training_step(sparse, args.size, prompt, args.train_text, name)
            for name in ("eager", "blockwise" if args.device == "cpu" else "auto")
        }
        eager, linear = steps
        passes = {
            name: lambda step=step, x=x: run_once(step, x, torch.ones((), device=x.device))
            for name, (step, x) in steps.items()
        }
        entry = compare(passes, eager, linear, clock, max(1, args.repeats // 2), float("nan"))
        del entry["ideal"]
        kept = {name: saved_bytes(step, x) for name, (step, x) in steps.items()}
        peaks = {name: _peak(run, args.device) for name, run in passes.items()}
        sparse.zero_grad(set_to_none=True)
        return {"length": steps[eager][1].shape[1], **entry, "saved_bytes": kept, "peak_bytes": peaks}
    finally:
        sparse.eval()


def _decoder(size: models.Size) -> flops.Decoder:
    return flops.Decoder(size.width, size.layers, size.inner, size.width, size.width)


def _named(dense: Any, sparse: Any) -> list[tuple[str, Any]]:
    return [("dense", dense), ("sparse", sparse)]


def _peak(run: Callable[[], object], device: str) -> int | None:
    """Most bytes allocated beyond what was there before; None without CUDA."""
    if device != "cuda":
        return None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure everything; returns the record.

    Raises:
        FlagError: an option is refused.
    """
    given = list(sys.argv[1:] if argv is None else argv)
    args = parse_args(given)
    device, dtype, settings = torch.device(args.device), getattr(torch, args.dtype), settings_of(args)
    torch.set_num_threads(args.threads)
    clock = clock_for(device, args.threads)
    record = {**provenance(PROGRAM, given, device), "size": vars(args.size), "predictors": settings.to_dict()}
    record["settings"] = {"threads": args.threads, "dtype": args.dtype, "clock": clock.name, "repeats": args.repeats}
    with tqdm(total=6, unit="part") as progress:
        dense = models.build(args.size, None, device, dtype)
        sparse = models.build(args.size, settings, device, dtype)
        progress.update()
        for name, part in (
            ("prefill", lambda: measure_prefill(dense, sparse, args, clock)),
            ("answer", lambda: measure_answer(dense, sparse, args, clock)),
            ("decoding", lambda: measure_batches(dense, sparse, args, clock)),
            ("training", lambda: measure_training(sparse, args, clock)),
        ):
            progress.set_postfix_str(name)
            record[name] = part()
            progress.update()
        progress.update()
    show(document(record))
    if args.output is not None:
        write_files(record, args.output, document(record))
        plot(record, args.output.with_suffix(".png"))
        show(f"{args.output}, {args.output.with_suffix('.md').name}, {args.output.with_suffix('.png').name}")
    return record


if __name__ == "__main__":
    run_program(main)

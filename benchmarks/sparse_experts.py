"""Top-k with the experts that act alone, computed one by one, against one product with all experts.

    python -m benchmarks.sparse_experts --output benchmarks/results/sparse-experts-cpu.json

At the sizes of a 7B model, for a prompt and for one token, on one thread: in inference, and forward and backward as in
training. The frozen layer is timed too, since what a layer can gain is at most the share that its experts take. The
ways take turns in each round; the clock counts the time that this thread computed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measuring import spread
from benchmarks.record import check_run, provenance, show_and_write
from hydralora.layer import weighted_experts
from hydralora.tuner.routing.rule import Rule
from hydralora.tuner.sparse import FEW_TOKENS, FEWEST, FEWEST_OF_FEW, SHARE, SHARE_WITH_GRADIENTS, grouped_experts
from llava.runtime.program import run_program

PROGRAM = "benchmarks.sparse_experts"
WIDTH, OUTPUTS, RANK = 4096, (4096, 11008), 8
EXPERTS, TOP_K, TOKENS = (8, 16, 32, 64), (1, 2), (256, 1)
ROUNDS = {256: 3, 1: 15}
WAYS: dict[str, Callable[..., Tensor]] = {"dense": weighted_experts, "grouped": grouped_experts}


def timed(run: Callable[[], object]) -> float:
    """Milliseconds that this thread computes."""
    start = time.thread_time()
    run()
    return 1e3 * (time.thread_time() - start)


def frozen_milliseconds(outputs: int, tokens: int) -> float:
    """The frozen layer, forward."""
    weight, x = torch.randn(outputs, WIDTH), torch.randn(tokens, WIDTH)
    return min(timed(lambda: torch.nn.functional.linear(x, weight)) for _ in range(4))


def measure(outputs: int, tokens: int, experts: int, top_k: int, training: bool) -> dict[str, Any]:
    """Both ways at one size."""
    torch.manual_seed(0)
    code = torch.randn(tokens, RANK, requires_grad=training)
    matrix = torch.randn(outputs, experts * RANK, requires_grad=training)
    probabilities = torch.softmax(torch.randn(tokens, experts, requires_grad=training), dim=-1)
    onto, cotangent = torch.randn(tokens, outputs), torch.randn(tokens, outputs)
    rule = Rule("token", top_k=top_k)

    def run(way: str) -> None:
        output = WAYS[way](code, matrix, rule.weights(probabilities), 2.0, onto)
        if training:
            torch.autograd.grad(output, (code, matrix, probabilities), cotangent)

    times: dict[str, list[float]] = {way: [] for way in WAYS}
    with torch.set_grad_enabled(training):
        for number in range(1 + ROUNDS[tokens]):
            for way in WAYS if number % 2 else reversed(WAYS):
                taken = timed(lambda way=way: run(way))
                if number:
                    times[way].append(taken)
    ratio = spread([own / dense for own, dense in zip(times["grouped"], times["dense"], strict=True)])["median"]
    size = {"outputs": outputs, "tokens": tokens, "experts": experts, "top_k": top_k, "training": training}
    medians = {way: spread(values)["median"] for way, values in times.items()}
    return size | {"milliseconds": medians, "grouped_to_dense": ratio}


def document(record: dict[str, Any]) -> str:
    """The Markdown file of a record."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    lines = [
        f"# Top-k with grouped experts: {record['machine']['cpu']}, 1 thread",
        "",
        f"{record['date'][:10]}; {versions}; float32, width {WIDTH}, rank {RANK}; time of the thread, median.",
        "",
        "```console",
        f"$ {record['command']}",
        "```",
        "",
        "| tokens | outputs | experts | top-k | | dense / frozen layer | grouped / dense |",
        "| --: | --: | --: | --: | --- | --: | --: |",
    ]
    frozen = {(each["outputs"], each["tokens"]): each["milliseconds"] for each in record["frozen"]}
    for case in record["cases"]:
        share = case["milliseconds"]["dense"] / frozen[case["outputs"], case["tokens"]]
        kind, of_layer = ("forward and backward", "") if case["training"] else ("inference", f"{share:.3f}")
        size = f"{case['tokens']} | {case['outputs']} | {case['experts']} | {case['top_k']}"
        lines.append(f"| {size} | {kind} | {of_layer} | {case['grouped_to_dense']:.2f} |")
    used = f"from {FEWEST} experts on, or {FEWEST_OF_FEW} for less than {FEW_TOKENS} tokens, where at most one in"
    lines += ["", f"The layer groups {used} {1 / SHARE:g} acts, or one in {1 / SHARE_WITH_GRADIENTS:g} with gradients."]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Measure, show and write.

    Raises:
        FlagError: `--output` is not a .json file.
    """
    parser = argparse.ArgumentParser(
        prog=PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, help="write the record here (.json), and a table with it (.md)")
    args = parser.parse_args(argv)
    check_run("cpu", args.output)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    record = provenance(PROGRAM, sys.argv[1:] if argv is None else argv, torch.device("cpu"))
    try:
        sizes = [(outputs, tokens) for tokens in TOKENS for outputs in OUTPUTS]
        record["frozen"] = [
            {"outputs": outputs, "tokens": tokens, "milliseconds": frozen_milliseconds(outputs, tokens)}
            for outputs, tokens in sizes
        ]
        record["cases"] = [
            measure(outputs, tokens, experts, top_k, training)
            for training in (False, True)
            for outputs, tokens in sizes
            for experts in EXPERTS
            for top_k in TOP_K
            if tokens > 1 or not training
        ]
    finally:
        torch.set_num_threads(threads)
    show_and_write(record, document(record), args.output)
    return record


if __name__ == "__main__":
    run_program(main)

"""The loss from trained tokens alone compared with that of all logits: computing time and peak bytes, in one run.

    python -m benchmarks.target_loss --output benchmarks/results/target-loss-cpu.json

Each case is forward and backward of head and loss on hidden states that require a gradient, with a frozen head as in
LoRA. Both ways take turns. The peak is the largest sum of tensor storages that were alive at any operation, those from
before left out; nothing inside an operation is seen.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.record import check_run, provenance, show_and_write
from llava.constants import IGNORE_INDEX
from llava.data.targets import Targets, find_targets
from llava.model.head import LanguageHead
from llava.model.loss import LossReduction, language_model_loss, target_loss
from llava.runtime.program import run_program

PROGRAM = "benchmarks.target_loss"


@dataclass(frozen=True)
class Case:
    """One batch.

    Attributes:
        batch: B.
        length: L.
        width: D.
        vocabulary: V.
        share: of the positions that are trained on.
    """

    batch: int
    length: int
    width: int
    vocabulary: int
    share: float


CASES = (
    Case(1, 640, 64, 32000, 0.1),
    Case(1, 640, 64, 32000, 0.25),
    Case(1, 640, 64, 152064, 0.25),
    Case(1, 640, 64, 152064, 1.0),
)
"""Vocabularies of Llama and Qwen; about a quarter of a LLaVA's positions is trained on in long answers."""


class PeakStorage(TorchDispatchMode):
    """The most bytes that tensors made inside it held at once; each storage counts once."""

    def __init__(self) -> None:
        super().__init__()
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        self._alive = {key: held for key, held in self._alive.items() if not held[0].expired()}
        for made in tree_leaves(result):
            storage = made.untyped_storage() if isinstance(made, Tensor) else None
            if storage is not None and storage._cdata not in known:
                self._alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return result


def ways(case: Case) -> dict[str, Callable[[], Tensor]]:
    """Forward and backward of both, each gives the loss and leaves a gradient in the same hidden states."""
    generator = torch.Generator().manual_seed(0)
    head = LanguageHead(case.width, case.vocabulary, bias=False).requires_grad_(False)
    hidden = torch.randn(case.batch, case.length, case.width, generator=generator, requires_grad=True)
    labels = torch.randint(0, case.vocabulary, (case.batch, case.length), generator=generator)
    ignored = torch.rand(case.batch, case.length, generator=generator) >= case.share
    labels = labels.masked_fill(ignored, IGNORE_INDEX)
    targets: Targets = find_targets(labels)  # by the collator

    def of_all_logits() -> Tensor:
        hidden.grad = None
        loss = language_model_loss(head(hidden), labels, LossReduction.TARGET)
        loss.backward()
        return loss

    def of_targets() -> Tensor:
        hidden.grad = None
        loss = target_loss(head, hidden, labels, targets, LossReduction.TARGET)
        loss.backward()
        return loss

    return {"all logits": of_all_logits, "targets": of_targets}


def measure(case: Case, rounds: int) -> dict[str, Any]:
    """Losses, peaks and seconds of both ways."""
    found = ways(case)
    peaks, losses = {}, {}
    for name, run in found.items():
        with PeakStorage() as storage:
            losses[name] = run().item()
        peaks[name] = storage.peak
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for number in range(rounds):
        for name in list(found)[:: 1 if number % 2 else -1]:
            start = time.thread_time()
            found[name]()
            seconds[name].append(time.thread_time() - start)
    return {
        **vars(case),
        "loss": losses,
        "peak_bytes": peaks,
        "seconds": {name: statistics.median(all_) for name, all_ in seconds.items()},
        "times_faster": statistics.median(
            a / b for a, b in zip(seconds["all logits"], seconds["targets"], strict=True)
        ),
    }


def table(cases: Sequence[Mapping[str, Any]]) -> str:
    """One line per case."""
    columns = ("B x L", "D", "V", "trained", "all logits (MB)", "targets (MB)", "ratio")
    columns += ("all logits (s)", "targets (s)", "times faster", "difference of the losses")
    lines = ["| " + " | ".join(columns) + " |", "|" + " --: |" * len(columns)]
    for case in cases:
        old, new = case["peak_bytes"]["all logits"], case["peak_bytes"]["targets"]
        cells = [f"{case['batch']} x {case['length']}", str(case["width"]), str(case["vocabulary"])]
        cells += [f"{case['share']:.0%}", f"{old / 1e6:,.0f}", f"{new / 1e6:,.0f}", f"{old / new:.1f}"]
        cells += [f"{case['seconds'][name]:.2f}" for name in ("all logits", "targets")]
        cells += [f"{case['times_faster']:.2f}", f"{abs(case['loss']['all logits'] - case['loss']['targets']):.0e}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def document(record: Mapping[str, Any]) -> str:
    """The Markdown file of a record."""
    versions = ", ".join(f"{name} {number}" for name, number in record["versions"].items())
    return (
        f"# Head and loss, forward and backward: {record['machine']['cpu']}, 1 thread\n\n"
        f"{record['date'][:10]}; {versions}; float32, frozen head; computing time of the thread, median of "
        f"{record['rounds']} rounds.\n\n```console\n$ {record['command']}\n```\n\n{table(record['cases'])}\n"
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, show the table and write it.

    Raises:
        FlagError: the output is no .json file.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2, help="timed rounds of each case (default %(default)s)")
    parser.add_argument("--output", type=Path, default=None, help="JSON file; the table is written next to it as .md")
    args = parser.parse_args(argv)
    check_run("cpu", args.output)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    words = [*(["--rounds", str(args.rounds)] if args.rounds != 2 else [])]
    words += [] if args.output is None else ["--output", str(args.output)]
    record = provenance(PROGRAM, words, torch.device("cpu")) | {"rounds": args.rounds}
    try:
        record["cases"] = [measure(case, args.rounds) for case in CASES]
    finally:
        torch.set_num_threads(threads)
    show_and_write(record, document(record), args.output)


if __name__ == "__main__":
    run_program(main)

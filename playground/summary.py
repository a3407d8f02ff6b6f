"""What the demo prints at its end: tables of both halves, and what to run next."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from playground.report import DemoRun, Measurement
from playground.sparse import SparseRun


def score_table(
    title: str, measurement: Measurement, headings: Sequence[str] = ("before %", "after %", "rise")
) -> Table:
    """Accuracy before and after, or of two models, by task family."""
    table = Table(title=title, title_justify="left")
    table.add_column("task family")
    for heading in ("questions", *headings):
        table.add_column(heading, justify="right")
    for family, (first, second) in measurement.by_family().items():
        if family == "all":
            table.add_section()
        rise = 100 * (second.accuracy - first.accuracy)
        values = (f"{100 * first.accuracy:.1f}", f"{100 * second.accuracy:.1f}", f"{rise:+.1f}")
        table.add_row(family, str(first.n), *values)
    return table


def cost_table(sparse: SparseRun) -> Table:
    """What a batch of prompts costs both models, and what the sparse one keeps."""
    table = Table(title="What dropping saves, and which patches stay", title_justify="left")
    table.add_column("")
    for heading in ("dense", "sparse", "ratio"):
        table.add_column(heading, justify="right")
    dense, other = sparse.dense_cost, sparse.sparse_cost
    table.add_row("prefill (ms)", f"{dense.milliseconds:.1f}", f"{other.milliseconds:.1f}", f"{sparse.speedup:.2f}")
    kib = (f"{dense.cache_bytes / 1024:.0f}", f"{other.cache_bytes / 1024:.0f}", f"{sparse.cache_ratio:.2f}")
    table.add_row("key-value cache, no free slots (KiB)", *kib)
    table.add_row("patches kept", "100 %", f"{100 * sparse.patches_kept:.0f} %", "")
    table.add_row("patches with a thing kept", "100 %", f"{100 * sparse.things_kept:.0f} %", "")
    return table


def print_results(console: Console, run: DemoRun, report: Path, script: str) -> None:
    """The tables, and what to run next; `script` is what the base was fine-tuned with."""
    console.print()
    console.print(score_table("New task families (fine-tuned on)", run.new))
    console.print(score_table("Base task families (what is forgotten)", run.base))
    dense_and_sparse = Measurement(run.sparse.dense_result, run.sparse.sparse_result)
    title = "Base task families: the dense base against the sparse model"
    console.print(score_table(title, dense_and_sparse, ("dense %", "sparse %", "difference")))
    console.print(cost_table(run.sparse))
    trained = sum(run.trained.values())
    console.print(f"trained parameters: {trained:,} on top of {run.base_parameters:,}")
    console.print("seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in run.seconds.items()))
    console.print(f"report: {report}", soft_wrap=True)
    console.print("\nNext: ask the tuned model yourself, see what the sparse one keeps, or train your own LLaVA:")
    ask = (
        f"python -m llava.eval.run_llava --model-path {run.tuned} --model-base {run.place.base} --conv-mode v1 "
        f'--image-file {run.place.images}/eval-new/00000.png --query "How many are red?" --temperature 0'
    )
    own = f"MODEL=checkpoints/llava-v1.5-7b DATA=my_data.json IMAGES=my_images OUTPUT=out bash {script}"
    keeps = (
        f"python -m llava.dynamic_eval.visualize --model-path {run.sparse.tuned} --conv-mode v1 "
        f'--image-file {run.place.images}/eval-base/00000.png --query "How many things are there?" --temperature 0'
    )
    for command in (ask, keeps, own):
        print(f"  {command}")

r"""Results of several runs side by side, as Markdown and as an HTML page.

python -m llava.eval.report answers/llava-v1.5-7b.result.json answers/llava-v1.5-7b-lora.result.json --output ./report

The files are those that `python -m llava.eval` writes. Runs of a benchmark are compared with the first one that is
given: every score, the mean of the single scores with a 95 % interval, and the paired difference with its own. The page
also shows questions on which two runs disagree, with their images.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llava.errors import FlagError
from llava.runtime.output import replace_text
from llava.runtime.places import Input, refuse_file
from llava.runtime.program import run_program

if TYPE_CHECKING:
    from llava.eval.reporting.comparison import Group


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.report", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "results",
        nargs="+",
        type=Path,
        metavar="RESULT",
        help="NAME.result.json; the first of a benchmark is compared with",
    )
    add("--output", type=Path, default=Path("report"), help="report.md and report.html (default %(default)s)")
    add("--samples", type=int, default=40, help="questions shown for each pair of runs (default %(default)s)")
    add("--no-images", action="store_true", help="leave the images out of the page")
    add("--seed", type=int, default=0, help="of the bootstrap")
    return parser


def markdown(groups: Sequence[Group], seed: int = 0) -> str:
    """The tables, one for each benchmark."""
    return "\n".join(["# Comparison", *(line for group in groups for line in _group_lines(group, seed))]) + "\n"


def _group_lines(group: Group, seed: int) -> list[str]:
    lines = ["", f"## {group.title} ({group.split})", ""]
    rows = table(group, seed)
    lines += ["| " + " | ".join(rows[0]) + " |", "| --- |" + " --: |" * (len(rows[0]) - 1)]
    lines += ["| " + " | ".join(row) + " |" for row in rows[1:]]
    if any(run.samples for run in group.runs):
        lines += ["", "Brackets: 95 % bootstrap intervals over the questions; differences are paired."]
    return lines + ([""] if group.notes else []) + [f"- {note}" for note in group.notes]


def table(group: Group, seed: int = 0) -> list[list[str]]:
    """Head and rows: every metric with its distance to the first run, then the mean of the single scores."""
    from llava.eval.reporting.comparison import difference, mean_scores

    first, others = group.runs[0], group.runs[1:]
    rows = [["", *(run.name for run in group.runs)]]
    for metric, value in first.result["metrics"].items():
        row = [metric, f"{value:.2f}"]
        for run in others:
            other = run.result["metrics"].get(metric)
            row.append("-" if other is None else f"{other:.2f} ({other - value:+.2f})")
        rows.append(row)
    if first.samples:
        rows.append(["mean of single scores", *(str(mean_scores(run, seed) or "-") for run in group.runs)])
        rows.append(["difference", "-", *(str(difference(first, run, seed) or "-") for run in others)])
    return rows


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program; returns the page.

    Raises:
        FlagError: a file is no result, is given twice, or its questions are not where they were.
    """
    args = build_parser().parse_args(argv)
    from llava.eval.reporting.comparison import group_runs, read_run
    from llava.eval.reporting.report_page import page

    inputs = [Input("RESULT", path) for path in args.results]
    for name in ("report.md", "report.html"):
        refuse_file("--output", args.output / name, inputs)
    if len({path.resolve() for path in args.results}) < len(args.results):
        raise FlagError("a result is given twice; give each one once")
    if args.samples < 0:
        raise FlagError(f"--samples {args.samples}: must not be negative")
    groups = group_runs([read_run(path) for path in args.results])
    text = markdown(groups, args.seed)
    html = page(groups, [table(group, args.seed) for group in groups], args.samples, not args.no_images)
    print(text)
    written = replace_text(args.output / "report.md", text)
    print(f"written: {written}")
    shown = replace_text(args.output / "report.html", html)
    print(f"written: {shown}")
    return shown


if __name__ == "__main__":
    run_program(main)

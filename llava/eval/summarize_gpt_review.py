"""Scores of reviewed answers relative to GPT-4's own (upstream `llava/eval/summarize_gpt_review.py`).

python -m llava.eval.summarize_gpt_review -f llava-bench-in-the-wild/reviews/llava-v1.5-7b.jsonl

Prints upstream's lines, with the two means behind the ratio: 100 * (mean of the second score) / (mean of the first).
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

from llava.errors import BadSampleError, FlagError
from llava.eval.answering.questions import field, read_jsonl
from llava.runtime.program import run_program

PREFIXES = ("gpt4_text", "reviews_", "review_")
ALL = "all"


def relative_scores(path: str | Path, ignore: Collection[int] = ()) -> dict[str, tuple[float, float, float]]:
    """By category, in alphabetical order, and for `all`: the ratio in percent, and the means of both scores.

    Raises:
        BadSampleError: the file is broken or empty, or a review has no score (upstream counts it as -1 to -1).
    """
    scores: dict[str, list[tuple[float, float]]] = {}
    for where, row in read_jsonl(path):
        if row.get("question_id") in ignore:
            continue
        pair = row["tuple"] if "tuple" in row else field(row, "score", (list,), where)
        if len(pair) != 2 or min(pair) < 0:
            raise BadSampleError(f"{where}: the review has no pair of scores: {pair}; remove the line and review again")
        for name in {ALL, row.get("category", ALL)}:
            scores.setdefault(name, []).append((float(pair[0]), float(pair[1])))
    if not scores:
        raise BadSampleError(f"{path}: no reviews here")
    result = {}
    for name, pairs in sorted(scores.items()):
        # Rounded to three digits before the division, as upstream.
        first, second = (round(sum(values) / len(pairs), 3) for values in zip(*pairs, strict=True))
        result[name] = (round(second / first * 100, 1), first, second)
    return result


def build_parser() -> argparse.ArgumentParser:
    """The original options that have an effect there."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.summarize_gpt_review",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-d", "--dir", default=None, help=f"folder of review files, {', '.join(PREFIXES)}*.jsonl")
    parser.add_argument("-f", "--files", nargs="*", default=[], help="review files; in --dir, if that is given")
    parser.add_argument("-i", "--ignore", nargs="*", type=int, default=[], help="question ids to leave out")
    return parser


def main(argv: Sequence[str] | None = None) -> dict[str, dict[str, tuple[float, float, float]]]:
    """Run the program; returns the scores by file.

    Raises:
        FlagError: neither a folder nor files are given.
        BadSampleError: see `relative_scores`.
    """
    args = build_parser().parse_args(argv)
    if args.dir is None and not args.files:
        raise FlagError("give --dir or --files: there is nothing to summarise")
    folder = Path(args.dir or "")
    names = args.files or [path.name for path in folder.glob("*.jsonl") if path.name.startswith(PREFIXES)]
    results = {}
    for name in sorted(names):
        results[name] = relative_scores(folder / name, args.ignore)
        print(Path(name).name.replace("gpt4_text_", "").replace(".jsonl", ""))
        for category, (ratio, first, second) in results[name].items():
            print(category, ratio, round(first * 10, 1), round(second * 10, 1))
        print("=================================")
    return results


if __name__ == "__main__":
    run_program(main)

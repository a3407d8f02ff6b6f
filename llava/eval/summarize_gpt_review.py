"""Scores of reviewed answers relative to GPT-4's own (upstream `llava/eval/summarize_gpt_review.py`).

python -m llava.eval.summarize_gpt_review -f llava-bench-in-the-wild/reviews/llava-v1.5-7b.jsonl

Prints upstream's lines, with the two means behind the ratio: 100 * (mean of the second score) / (mean of the first).
`--question` sees whether every question has its review.
"""

from __future__ import annotations

import argparse
from collections.abc import Collection, Sequence
from pathlib import Path

from llava.errors import BadSampleError, FlagError
from llava.eval.answering.questions import field, read_jsonl
from llava.eval.scoring.matching import Sides, by_id, check_fit, id_of, listed
from llava.eval.scoring.submission import ids_of
from llava.runtime.program import run_program

PREFIXES = ("gpt4_text", "reviews_", "review_")
ALL = "all"


def relative_scores(
    path: str | Path, ignore: Collection[int | str] = (), questions: str | Path | None = None
) -> dict[str, tuple[float, float, float]]:
    """By category, in alphabetical order, and for `all`: the ratio in percent, and the means of both scores.

    Args:
        path: file of reviews.
        ignore: ids of reviews to leave out.
        questions: what was to be reviewed; None: only that nothing is reviewed twice is seen.

    Raises:
        BadSampleError: the file is broken or empty, a review has no score (upstream counts it as -1 to -1), reviews do
            not fit the questions, or one to leave out is not there.
    """
    rows = read_jsonl(path)
    reviewed = [row["question_id"] for _, row in rows if "question_id" in row]
    asked = list(by_id((key, key) for key in reviewed).values()) if questions is None else ids_of(questions)
    check_fit(asked, reviewed, Sides(path, path if questions is None else questions))
    ignored = set(map(id_of, ignore))
    absent = sorted(ignored - set(map(id_of, reviewed)))
    if absent:
        raise BadSampleError(
            f"{path}: --ignore names {len(absent)} questions that have no review here: {listed(absent)}"
        )
    scores: dict[str, list[tuple[float, float]]] = {}
    for where, row in rows:
        if "question_id" in row and id_of(row["question_id"]) in ignored:
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
    """The original options that have an effect there, and `--question`."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval.summarize_gpt_review",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("-d", "--dir", default=None, help=f"folder of review files, {', '.join(PREFIXES)}*.jsonl")
    parser.add_argument("-f", "--files", nargs="*", default=[], help="review files; in --dir, if that is given")
    parser.add_argument("-i", "--ignore", nargs="*", default=[], help="question ids to leave out")
    parser.add_argument("-q", "--question", default=None, help="questions.jsonl: each must have a review")
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
        results[name] = relative_scores(folder / name, args.ignore, args.question)
        print(Path(name).name.replace("gpt4_text_", "").replace(".jsonl", ""))
        for category, (ratio, first, second) in results[name].items():
            print(category, ratio, round(first * 10, 1), round(second * 10, 1))
        print("=================================")
    return results


if __name__ == "__main__":
    run_program(main)

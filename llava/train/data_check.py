"""The program `python -m llava.data.check`: every problem of every row, lengths, and a page of sample prompts.

It is part of training because an image counts as long as the tower of the run makes it.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from llava.constants import MERGE_TYPES
from llava.data.kinds import EXPLANATIONS, TRAINABLE, Kind
from llava.errors import FlagError
from llava.runtime.output import replace_text
from llava.runtime.places import Input, refuse_file, same_place, split_weight
from llava.runtime.program import run_program
from llava.runtime.recognize import refuse_foreign
from llava.runtime.starting.boolean import boolean

if TYPE_CHECKING:
    from llava.data.inspection import RowReport, RowReports
    from llava.data.statistics import DataSummary

DESCRIPTION = r"""Check data files before training: every problem of every row, lengths, and a page of sample prompts.

python -m llava.data.check a.json b.jsonl --image_folder images --model_name_or_path checkpoints/llava-v1.5-7b \
    --version v1 --model_max_length 2048 --html check.html

Prints what it finds and ends with status 1 if there are problems.
"""

ROWS_PER_STEP = 16

REPORT = dict.fromkeys(
    (
        *("options", "files", "rows", "rows_with_image", "rows_with_problems", "problems", "statistics"),
        *("trained_share", "trained_tokens_cut_off", "answer_end", "list"),
    )
)
"""The keys of `--json`, by which an earlier report is known."""


def build_parser() -> argparse.ArgumentParser:
    """The options; those of a training run have the names that they have there."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.data.check", description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    # What is read: names and defaults of training, so that its command line can be copied here.
    add("data", nargs="+", metavar="DATA", help="data files, as for --data_path of a training run")
    add("--image_folder", help="folder that the image names in the data are relative to")
    add(
        "--model_name_or_path",
        "--tokenizer",
        dest="model_name_or_path",
        required=True,
        help="folder with the tokenizer: that of the base model",
    )
    # How a row becomes a prompt and how long it gets.
    add("--version", help="conversation template; default: that of the model's training, or v1 where nothing says it")
    add("--model_max_length", type=int, default=2048, help="longest sample in tokens and image patches")
    add("--vision_tower", help="as in training: folder or hub id; default: that of the base; no weights are read")
    add("--mm_vision_select_layer", type=int, help="as in training; default: that of the base, or -1")
    add("--mm_vision_select_feature", help="as in training; default: that of the base, or patch")
    add("--image_length", type=int, help="patches of one image or tile; default: those of the tower")
    add("--image_aspect_ratio", help="as in training: default that of the base, or pad where it is not a LLaVA")
    add("--image_grid_pinpoints", help="anyres: possible resolutions, '[(336, 672), ...]'; default: those of the base")
    add("--mm_patch_merge_type", choices=MERGE_TYPES, help="anyres: how tiles are merged; default: the base's, or flat")
    add("--tile_size", type=int, help="pixels that images are scaled to; anyres: side of a tile; default: the tower's")
    add(
        "--mm_use_im_start_end",
        nargs="?",
        const=True,
        type=boolean,
        help="<im_start> and <im_end> stand around images; default: as in the base, or False",
    )
    # What counts as a problem.
    add("--skip_images", action="store_true", help="do not read the image files, only look whether they are there")
    add(
        "--allow",
        nargs="+",
        default=[],
        choices=list(Kind),
        metavar="KIND",
        help="kinds of problems that are no reason to fail, by their names in the report: 'duplicate id' truncated ...",
    )
    # What is reported, and where to.
    add("--show", type=int, default=5, help="rows to print for each kind of problem; --json has all")
    add("--html", type=Path, help="write a page with problems, lengths and sample prompts")
    add("--samples", type=int, default=12, help="sample prompts on the page")
    add("--json", type=Path, help="write everything as JSON")
    add("--num_workers", type=int, default=4, help="processes that read rows and images; 0: this one alone")
    return parser


def refuse_inputs(args: argparse.Namespace) -> None:
    """Refuse reports that would fall on what is checked, or on somebody else's file, before anything is read.

    Raises:
        FlagError: one would; the message names both options.
    """
    from llava.data.check_page import PAGE_HEAD

    inputs = [
        *(Input("DATA", split_weight(path)[0]) for path in args.data),
        Input("--image_folder", args.image_folder),
        Input("--model_name_or_path", args.model_name_or_path),
        Input("--vision_tower", args.vision_tower),
    ]
    for flag, path, like in (("--json", args.json, json.dumps(REPORT)), ("--html", args.html, PAGE_HEAD)):
        if path is not None:
            refuse_file(flag, path, inputs)
            refuse_foreign(path, like)
    if args.json is not None and args.html is not None and same_place(args.json, args.html):
        raise FlagError(f"--html {args.html}: is also --json {args.json}; name another file")


def check_rows(rows: RowReports, num_workers: int) -> list[RowReport]:
    """Reports of all rows in their order, with a progress bar."""
    from torch.utils.data import DataLoader

    from llava.data.inspection import mark_duplicates

    loader: DataLoader[Any] = DataLoader(
        rows, batch_size=ROWS_PER_STEP, num_workers=min(num_workers, len(rows) // ROWS_PER_STEP), collate_fn=list
    )
    reports: list[RowReport] = []
    with tqdm(total=len(rows), unit="row", desc="checking") as progress:
        for batch in loader:
            reports += batch
            progress.update(len(batch))
    mark_duplicates(reports)
    return reports


def to_json(reports: Sequence[RowReport], summary: DataSummary, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that was found."""
    options = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    return {
        "options": options,
        "files": summary.rows,
        "rows": summary.total,
        "rows_with_image": summary.with_image,
        "rows_with_problems": summary.rows_with_problems,
        "problems": {str(kind): count for kind, count in summary.problems.items()},
        "statistics": {name: numbers.to_dict() for name, numbers in summary.numbers.items()},
        "trained_share": summary.trained_share,
        "trained_tokens_cut_off": summary.cut,
        "answer_end": summary.answer_end,
        "list": [
            {"file": report.file, "row": report.row, "id": report.sample_id, "kind": kind, "message": message}
            for report in reports
            for kind, message in ((str(problem.kind), problem.message) for problem in report.problems)
        ],
    }


def print_problems(console: Console, reports: Sequence[RowReport], summary: DataSummary, show: int) -> None:
    """A table of the kinds, and the first rows of each."""
    if not summary.problems:
        return
    table = Table(title="Problems", title_justify="left")
    table.add_column("kind")
    table.add_column("number", justify="right")
    table.add_column("what it means")
    for kind, count in summary.problems.items():
        table.add_row(str(kind), f"{count:,}", escape(EXPLANATIONS[kind]))
    console.print(table)
    if summary.answer_end is not None:
        console.print(escape(f"{Kind.ANSWER_END}: {summary.answer_end}"))
    for kind, count in summary.problems.items():
        if kind is Kind.ANSWER_END:
            continue
        found = [(r, p.message) for r in reports for p in r.problems if p.kind is kind]
        for report, message in found[:show]:
            console.print(escape(f"{kind}: {report.file}, row {report.row} (id {report.sample_id!r}): {message}"))
        if count > show:
            console.print(f"{kind}: and {count - show:,} more")


def print_statistics(console: Console, summary: DataSummary) -> None:
    """A table of the distributions."""
    from llava.data.statistics import PERCENTILES

    table = Table(title="Lengths (percentiles)", title_justify="left")
    table.add_column("")
    for percentile in PERCENTILES:
        table.add_column(f"{percentile} %", justify="right")
    table.add_column("mean", justify="right")
    for name, numbers in summary.numbers.items():
        table.add_row(name, *(f"{value:,}" for value in numbers.percentiles), f"{numbers.mean:,.1f}")
    console.print(table)


def print_summary(console: Console, summary: DataSummary, args: argparse.Namespace) -> None:
    """The result in a few lines, and what to run next."""
    numbers = summary.numbers
    rows = ", ".join(f"{path}: {count:,}" for path, count in summary.rows.items())
    console.print(escape(f"{summary.total:,} rows ({rows}), {summary.with_image:,} with images"), highlight=False)
    if summary.with_image:
        of = "" if args.tower_is_named else " (those of LLaVA-1.5's tower: no tower is named; --vision_tower names one)"
        console.print(f"an image, or a tile of one, counts as {args.image_length:,} positions{of}", highlight=False)
    trained, positions = numbers["trained tokens per sample"].total, numbers["tokens per sample"].total
    console.print(
        f"{trained:,} of {positions:,} positions are trained on ({100 * summary.trained_share:.1f} %); "
        f"{summary.cut:,} of them lie behind {args.model_max_length:,}",
        highlight=False,
    )
    for path in filter(None, (args.html, args.json)):
        console.print(f"written: {path}", highlight=False, markup=False)
    options = ["--model_name_or_path", args.model_name_or_path, "--version", args.version]
    options += ["--model_max_length", str(args.model_max_length), "--data_path", *args.data]
    options += ["--image_folder", args.image_folder] if args.image_folder else []
    options += ["--vision_tower", args.vision_tower] if args.vision_tower else []
    command = shlex.join(["python", "-m", "llava.train.train_mem", *options])
    stopping = [kind for kind in summary.problems if kind not in TRAINABLE]
    if stopping:
        console.print(
            f"{summary.rows_with_problems:,} rows have problems. Fix them and check again; or leave out those that "
            f"cannot be trained on ({', '.join(stopping)}):"
        )
        command += " --on_bad_sample skip"
    elif summary.problems and not summary.rows_with_problems:
        console.print("No row has problems, but answers do not end with one token (see above). Next:")
    elif summary.problems:
        console.print(f"{summary.rows_with_problems:,} rows have problems that training takes as they are. Next:")
    else:
        console.print("No problems. Next:")
    print(f"{command} --output_dir OUTPUT ...")


def main(argv: Sequence[str] | None = None) -> int:
    """Check the data.

    Returns:
        1 if there are problems of kinds that are not allowed, else 0.

    Raises:
        LlavaError: an option or a whole file is wrong; the message says what to do.
    """
    args = build_parser().parse_args(argv)
    refuse_inputs(args)
    from llava.data.answer_end import end_problem, turn_end
    from llava.data.check_page import write_page
    from llava.data.inspection import RowReports
    from llava.data.rows import open_rows
    from llava.data.statistics import summarise
    from llava.train.data_check_settings import settings_of

    settings = settings_of(args)
    turn = turn_end(settings.template, settings.tokenizer)
    rows = RowReports(open_rows(args.data), settings)
    reports = check_rows(rows, args.num_workers)
    summary = summarise(reports, end_problem(settings.template, turn, settings.tokenizer, args.version))
    console = Console(soft_wrap=True)
    print_problems(console, reports, summary, args.show)
    print_statistics(console, summary)
    if args.json is not None:
        text = json.dumps(to_json(reports, summary, args), indent=2, ensure_ascii=False, default=str)
        replace_text(args.json, text + "\n", errors="backslashreplace")
    if args.html is not None:
        write_page(args.html, rows, reports, summary, args.samples)
    print_summary(console, summary, args)
    return int(any(kind not in args.allow for kind in summary.problems))


if __name__ == "__main__":
    run_program(lambda: sys.exit(main()))

r"""Run one benchmark from questions to score.

python -m llava.eval textvqa --model-path checkpoints/llava-v1.5-7b
python -m llava.eval pope --model-path checkpoints/llava-v1.5-7b-lora --model-base checkpoints/vicuna-7b-v1.5

Files lie where upstream has them, below `playground/data/eval`; docs/evaluation.md says what each benchmark needs. The
same command again continues an interrupted run. Beside the answers lie `<name>.result.json` (scores, prompt, settings,
versions) and, where single answers are scored here, `<name>.samples.jsonl`. Started by `torchrun --nproc_per_node 8 -m
llava.eval ...`, on one machine or several, the processes share the questions.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llava.eval.answering.options import (
    TEMPLATE_HELP,
    Fallback,
    add_chunk_options,
    add_model_options,
    add_run_options,
    add_sampling_options,
    chosen,
    refuse_input_as_answers,
    sampling_options,
)
from llava.eval.benchmarks import BENCHMARKS, Benchmark, find
from llava.eval.outcomes import BenchmarkRun
from llava.runtime.hub import get_model_name_from_path
from llava.runtime.program import run_program


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("benchmark", choices=BENCHMARKS, help="which one", metavar="BENCHMARK")
    parser.epilog = "benchmarks: " + ", ".join(f"{one.name} ({one.title})" for one in BENCHMARKS.values())
    add_model_options(parser, required=True)
    parser.add_argument("--data-dir", type=Path, default=Path("playground/data/eval"), help="folder of all benchmarks")
    parser.add_argument("--split", type=str, default=None, help="split, where a benchmark has several")
    parser.add_argument("--experiment", type=str, default=None, help="name in file names; default: the model's")
    parser.add_argument("--question-file", type=Path, default=None, help="questions that lie elsewhere")
    parser.add_argument("--image-folder", type=Path, default=None, help="images that lie elsewhere")
    parser.add_argument("--answers-file", type=Path, default=None, help="answers that are to lie elsewhere")
    parser.add_argument("--conv-mode", type=str, default=None, help=f"{TEMPLATE_HELP}, the benchmark's")
    add_chunk_options(parser)
    add_run_options(parser, default_batch_size="auto")
    add_sampling_options(parser)
    parser.set_defaults(temperature=0.0)
    return parser


def fill_in(args: argparse.Namespace, benchmark: Benchmark) -> argparse.Namespace:
    """Give every option that was not given the value of the benchmark's entry."""
    folder = args.data_dir / benchmark.folder
    args.experiment = args.experiment or get_model_name_from_path(args.model_path)
    args.split = args.split or benchmark.splits[0]
    names = {"split": args.split, "model": args.experiment}
    args.question_file = args.question_file or folder / benchmark.questions.format(**names)
    args.image_folder = args.image_folder or folder / benchmark.images.format(**names)
    if args.answers_file is not None:
        refuse_input_as_answers(args, args.answers_file)
    args.answers_file = args.answers_file or folder / benchmark.answers.format(**names)
    if args.limit is not None:  # a part of the answers must not pass for all of them
        args.answers_file = args.answers_file.with_stem(f"{args.answers_file.stem}-first-{args.limit}")
    args.conv_mode = args.conv_mode or Fallback(benchmark.conv_mode)
    if args.max_new_tokens is None:
        args.max_new_tokens = benchmark.max_new_tokens
    return args


def main(argv: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Run the program.

    Returns:
        what the result file holds; None for a chunk, which is not scored, and in all processes but the first.

    Raises:
        LlavaError: a flag, a row, an image or the checkpoint is wrong; the message says what to do.
    """
    args = build_parser().parse_args(argv)
    from llava.eval.answering.processes import answer_share, joined
    from llava.eval.answering.question_run import answer_and_measure
    from llava.eval.reporting.results import report, summary_line, write_samples

    benchmark = find(args.benchmark)
    args = fill_in(args, benchmark)
    sampling_options(args)  # refuses what is out of range before the questions are read
    tasks = chosen(benchmark.read(args.question_file), args)
    open_image = benchmark.open_images(args.image_folder)
    with joined() as processes:
        if processes.count > 1:
            answer_share(processes, args, tasks, open_image, benchmark.to_row)
        if not processes.is_first:
            return None
    answers, speed = answer_and_measure(args, tasks, open_image, to_row=benchmark.to_row)
    if args.num_chunks > 1:
        print(f"chunk {args.chunk_idx} of {args.num_chunks}: {len(tasks)} answers in {answers.path}")
        return None
    rows = [answers.rows[key] for key in answers.keys]
    outcome = benchmark.finish(
        BenchmarkRun(
            data=args.data_dir / benchmark.folder,
            questions=args.question_file,
            answers=answers.path,
            split=args.split,
            model=args.experiment,
            tasks=tasks,
            rows=rows,
            complete=args.limit is None,
        )
    )
    write_samples(answers, outcome)
    result = report(args, benchmark, tasks, answers, outcome, speed)
    print(summary_line(result))
    return result


if __name__ == "__main__":
    run_program(main)

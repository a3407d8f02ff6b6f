r"""Answer a file of questions while a rule says which image tokens are kept, the learned predictor or another one.

python -m benchmarks.experiments.sparse.answer --model-path checkpoints/sparse/nlvr/dense-0 --rule attention \
    --keep-rate 0.2 --sparse-layer 1 --question-file questions.jsonl --image-folder data/nlvr \
    --answers-file answers.jsonl --temperature 0 --conv-mode v1 --batch-size 64 --device cpu

A dense model is made sparse for it. One that was trained sparse keeps its own layer and keep rate; give neither.
`--rule none` leaves the model as it is, for models with `--read-from`. The other options are those of
`llava.eval.model_vqa_loader`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.experiments.sparse.rules import NAME, Chance, LastTokenAttention, LateReading, attach_sparsity, follow
from llava.data.images import load_image
from llava.errors import FlagError
from llava.eval import model_vqa_loader
from llava.eval.answering.answers import AnswersFile, answer_row
from llava.eval.answering.loading import load_model
from llava.eval.answering.options import json_values, sampling_options
from llava.eval.answering.question_run import answer_settings
from llava.eval.answering.questions import read_questions
from llava.eval.answering.runner import answer_tasks
from llava.runtime.hub import get_model_name_from_path
from llava.runtime.program import run_program

RULES = ("none", "random", "attention")


def build_parser() -> argparse.ArgumentParser:
    """The options of `llava.eval.model_vqa_loader`, and those of the rule."""
    parser = model_vqa_loader.build_parser()
    parser.prog, parser.description = "benchmarks.experiments.sparse.answer", __doc__
    parser.add_argument("--rule", choices=RULES, required=True, help="what judges image tokens; none: the model itself")
    parser.add_argument("--keep-rate", type=float, default=None, help="share of each image's tokens that is kept")
    parser.add_argument("--sparse-layer", type=int, default=None, help="first layer that works on kept tokens only")
    parser.add_argument("--read-from", type=int, default=0, help="text does not see images below this layer")
    return parser


def obey_rule(model: Any, rule: str, keep_rate: float | None, sparse_layer: int | None, seed: int, first: int) -> None:
    """Let `rule` decide about the image tokens of `model`, which is made sparse for it if it is dense.

    Args:
        model: dense or sparse.
        rule: one of `RULES`.
        keep_rate: for a dense model.
        sparse_layer: for a dense model.
        seed: of chance.
        first: layer from which on text sees images. If that is the sparse one, its attention counts, since in the layer
            below nobody has looked at them.

    Raises:
        FlagError: a dense model without keep rate or layer, or a sparse one with them.
    """
    if first:
        LateReading(model, first)
    given = (keep_rate is not None, sparse_layer is not None)
    is_sparse = NAME in model.extensions.configs
    if any(given) and (is_sparse or rule == "none"):
        raise FlagError("--keep-rate and --sparse-layer are for a dense model with a rule; give none of them here")
    if rule == "none":
        return
    if not is_sparse:
        if keep_rate is None or sparse_layer is None:
            raise FlagError("a dense model needs --keep-rate and --sparse-layer for a rule")
        attach_sparsity(model, keep_rate, sparse_layer)
    config = model.extensions.configs[NAME]
    if rule == "random":
        follow(model, Chance(model, config["vision_keep_rate"], seed))
    else:
        layer = config["sparse_layer"]
        follow(model, LastTokenAttention(model, layer, layer if first == layer else layer - 1))


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program; returns the finished answers file.

    Raises:
        LlavaError: a flag, a row, an image or the checkpoint is wrong; the message says what to do.
    """
    args = build_parser().parse_args(argv)
    options = sampling_options(args)
    rule = {name: getattr(args, name) for name in ("rule", "keep_rate", "sparse_layer", "read_from")}
    answers = AnswersFile(
        args.answers_file,
        [model_vqa_loader.make_task(question) for question in read_questions(args.question_file)],
        model_id=get_model_name_from_path(args.model_path),
        settings={**answer_settings(args, options, args.conv_mode), **rule},
        arguments=json_values(args),
        to_row=answer_row,
        restart=args.restart,
    )
    if answers.pending:
        loaded = load_model(args.model_path, args.model_base, device=args.device, torch_dtype=args.torch_dtype)
        obey_rule(loaded.model, args.rule, args.keep_rate, args.sparse_layer, args.seed, args.read_from)
        speed = answer_tasks(
            answers,
            loaded,
            lambda name, where: load_image(args.image_folder, name, row=where),
            options,
            conv_mode=args.conv_mode,
            batch_size=args.batch_size,
            workers=args.num_workers,
        )
        print(f"{answers.path}: {len(answers.rows)} answers; {speed}")
    answers.finish()
    return Path(answers.path)


if __name__ == "__main__":
    run_program(main)

"""Training LaVIN with the command lines of the original (`train.py`), on llava's training run.

python -m mma.train --llama_model_path ../data/weights --llm_model 7B --data_root ../data --prompt_format QCM-ALE

The order is: options, base weights (converted where they are not yet), then everything as in `llava/train/train.py`,
with the data, the learning rate and the epochs of LaVIN. `--help` lists the options.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from llava.data.rows import RowFiles
from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.runtime.program import run_program
from llava.runtime.used_settings import without
from llava.runtime.zero import join_processes
from llava.train.build import skipped_file
from llava.train.evaluation.rows import EvaluationRows, NoRows, evaluation_rows
from llava.train.options import RunArguments
from llava.train.train import Parts, train
from mma.lavin.data.dataset import LavinDataset
from mma.lavin.data.instructions import read_mixture
from mma.lavin.data.prompts import OPTIONS
from mma.lavin.data.scienceqa import read_split, training_rows
from mma.lavin.train_arguments import IDLE, LavinArguments, parse_args
from mma.lavin.train_options import build_parser
from mma.lavin.trainer import LavinTrainer, epoch_of
from mma.lavin.weights.base import base_folder

__all__ = ["build_parser", "main", "parse_args"]

TRAIN_SPLIT = "train"
FULL_BITS = "16bit"


def prepare_base(args: LavinArguments) -> None:
    """Have the base weights in a form that can be loaded, written by one process while the others wait.

    Raises:
        CheckpointError: the weights are missing or damaged, or cannot be written.
    """
    training = args.run.training
    join_processes(training)  # under DeepSpeed, before anybody waits for anybody
    with training.main_process_first(local=False):
        if training.process_index == 0:
            base_folder(args.base)
    with training.main_process_first(local=True):  # does something where the machines share no file system
        args.run.model.model_name_or_path = str(base_folder(args.base))


class Source(NamedTuple):
    """The training data of a run: its rows, and the folder of their images."""

    rows: RowFiles
    images: Path


def read_source(args: LavinArguments, split: str = TRAIN_SPLIT) -> Source:
    """The data that the options name.

    Args:
        args: the options.
        split: of ScienceQA; the chatbot's data have none.

    Raises:
        BadSampleError: a row is malformed, or there is no such split.
    """
    own = args.own
    if own.do_pretrain:
        return Source(*read_mixture(own.data_root))
    data = read_split(own.data_root, split, own.caption_file if own.use_caption else None)
    return Source(training_rows(data, own.prompt_format, own.options), data.image_folder)


def dataset_maker(
    args: LavinArguments, source: Source | None = None
) -> Callable[[RunArguments, Any, LlavaForCausalLM], LavinDataset]:
    """What makes the training data of a run; `source` is read if it is not given."""
    rows, images = source or read_source(args)

    def make(run: RunArguments, tokenizer: Any, model: LlavaForCausalLM) -> LavinDataset:
        dataset = LavinDataset(
            rows,
            tokenizer,
            model.get_vision_tower().image_processor,
            image_folder=images,
            max_length=tokenizer.model_max_length,
            image_aspect_ratio=run.data.image_aspect_ratio,
            image_grid_pinpoints=model.config.image_grid_pinpoints,
            image_length=model.image_length(),
            on_bad_sample=run.data.on_bad_sample,
            skipped_file=skipped_file(run),
            requires_image=run.data.requires_image,
        )
        if run.data.requires_image and run.training.should_log:
            print(f"--requires_image True: {dataset.left_out} rows without image are left out, {len(dataset)} remain")
        return dataset

    return make


def evaluation_maker(args: LavinArguments) -> Callable[[RunArguments, Any, LlavaForCausalLM], EvaluationRows | NoRows]:
    """What makes the rows of `--eval_split`, read now; none where it is not given."""
    split = args.own.eval_split
    return partial(evaluation_rows, make=dataset_maker(args, read_source(args, split))) if split else evaluation_rows


def next_command(args: LavinArguments) -> str:
    """The command that scores the trained model."""
    own, base = args.own, str(args.run.model.model_name_or_path)
    bits = [] if own.bits == FULL_BITS else ["--bits", own.bits]
    model = ["--ckpt_dir", base, "--adapter_path", own.output_dir, "--max_seq_len", str(own.max_seq_len), *bits]
    if own.do_pretrain:
        return shlex.join(["python", "-m", "mma.demo", *model])
    captions = ["--use_caption", "--caption_file", own.caption_file] if own.use_caption else []
    letters = [] if own.options == list(OPTIONS) else ["--options", "".join(own.options)]
    data = ["--data_root", own.data_root, "--prompt_format", own.prompt_format, "--split", "test", *captions, *letters]
    return shlex.join(["python", "-m", "mma.eval", *model, *data, "--max_batch_size", "64"])


def own_settings(own: argparse.Namespace) -> dict[str, Any]:
    """LaVIN's options for the record of a run, without those that nothing reads."""
    return without(vars(own), IDLE)


def main(argv: Sequence[str] | None = None) -> Path:
    """Train as the command line says; an output folder that holds checkpoints is resumed.

    Returns:
        The output folder, a complete checkpoint.

    Raises:
        LlavaError: a problem with options, data or checkpoints that the user can mend.
    """
    args = parse_args(argv)
    # Before the base, which may have to be converted: data that are wrong, or too few for one update.
    source = read_source(args)
    epoch_of(len(source.rows), args.own.batch_size, args.own.accum_iter, args.run.training.world_size)
    prepare_base(args)
    args.run.program = own_settings(args.own)
    parts = Parts(
        dataset=dataset_maker(args, source),
        trainer=partial(LavinTrainer, schedule=args.schedule),
        next_command=lambda run: next_command(args),
        evaluation_rows=evaluation_maker(args),
    )
    return train(args.run, parts=parts)


if __name__ == "__main__":
    run_program(main)

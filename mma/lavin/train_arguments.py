"""From LaVIN's command line to the options of llava's training run.

LaVIN's own options become values of llava's, which are set and not left to be given twice; everything else on the
command line goes to llava's parser as it is.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.hf_argparser import string_to_bool

from llava.errors import FlagError
from llava.extension import installed_extensions
from llava.runtime import checkpointing
from llava.runtime.config_files.words import with_config
from llava.runtime.places import Input, folder_problems
from llava.runtime.ranges import COUNT, NOT_NEGATIVE, POSITIVE, Range, range_problems
from llava.train.arguments import NOTHING_GIVEN
from llava.train.arguments import build_parser as build_llava_parser
from llava.train.arguments import parse_args as parse_llava
from llava.train.options import RunArguments
from mma.config import FLAG_RANGES, TOWER
from mma.lavin.data.instructions import MIXTURE_FILE
from mma.lavin.data.scienceqa import IMAGES_FOLDER, PROBLEMS_FILE, SPLITS_FILE
from mma.lavin.schedule import Schedule, absolute_learning_rate
from mma.lavin.train_options import build_parser, given
from mma.lavin.weights.base import BaseWeights
from mma.lavin.weights.choices import AUTO, BITS

INSTEAD = {
    "model_name_or_path": "--llama_model_path and --llm_model",
    "image_folder": "--data_root",
    "version": "no option: LaVIN has one prompt of its own",
    "mma": "no option: it is always on",
    "num_train_epochs": "--epochs",
    "per_device_train_batch_size": "--batch_size",
    "gradient_accumulation_steps": "--accum_iter",
    "learning_rate": "--lr or --blr",
    "lr_scheduler_type": "--warmup_epochs and --min_lr",
    "lr_scheduler_kwargs": "--warmup_epochs and --min_lr",
    "warmup_steps": "--warmup_epochs",
    "warmup_ratio": "--warmup_epochs",
    "max_grad_norm": "--clip_grad",
    "model_max_length": "--max_seq_len",
    "dataloader_num_workers": "--num_workers",
    "dataloader_pin_memory": "--no_pin_mem",
    "resume_from_checkpoint": "--resume",
    "streaming": "no option: LaVIN's data are one file, read as a list",
    "shuffle_buffer": "no option: LaVIN's data are one file, read as a list",
    "eval_data_path": "--eval_split",
    "eval_questions": "--eval_split for the loss, and mma.eval for scores: LaVIN has one prompt of its own",
}
"""Options of llava that mean what one of LaVIN's means, and which."""

MODALITY_TOKENS = 1
"""Positions of `--max_seq_len` that the modality token takes in the original; here it has no place in the sequence."""


RANGES = {
    "batch_size": COUNT,
    "epochs": COUNT,
    "accum_iter": COUNT,
    "seed": Range(0, 2**32 - 1),
    "num_workers": NOT_NEGATIVE,
    **FLAG_RANGES,
    "weight_decay": NOT_NEGATIVE,
    "lr": Range(0, above=True, hint="leave it out to have it follow from --blr"),
    "blr": POSITIVE,
    "min_lr": NOT_NEGATIVE,
    "clip_grad": Range(0, infinite=True, hint="0, or leaving it out, switches clipping off"),
}
"""What LaVIN's numbers may be, apart from those that depend on each other."""


@dataclass(frozen=True)
class LavinArguments:
    """A training run.

    Attributes:
        own: LaVIN's options.
        run: llava's, without the base, which may have to be converted first.
        base: where the base weights are.
        schedule: of the learning rate.
    """

    own: argparse.Namespace
    run: RunArguments
    base: BaseWeights
    schedule: Schedule


def _data_problems(own: argparse.Namespace) -> list[str]:
    """What is missing below `--data_root`, and a split that the data do not have."""
    problems = []
    if own.eval_split and own.do_pretrain:
        problems.append(f"--eval_split {own.eval_split}: the data of --do_pretrain has no splits; leave it out")
    files = [MIXTURE_FILE] if own.do_pretrain else [PROBLEMS_FILE, SPLITS_FILE]
    lacking = [name for name in (*files, IMAGES_FOLDER) if not (Path(own.data_root) / name).exists()]
    if lacking:
        problems.append(f"--data_root {own.data_root}: has no {', '.join(lacking)}")
    return problems


def _problems(own: argparse.Namespace, rest: Sequence[str]) -> list[str]:
    """What cannot be carried out, one line each."""
    problems = []
    written = {word.removeprefix("--").partition("=")[0] for word in rest if word.startswith("--")}
    refused = {name: INSTEAD.get(name, INSTEAD.get(name.removeprefix("no_"))) for name in written}
    problems += [f"--{name}: use {other}" for name, other in sorted(refused.items()) if other is not None]
    if own.dist_on_itp:
        problems.append("--dist_on_itp: belongs to a cluster of the authors; start with torchrun")
    if own.dist_url != "env://":
        problems.append(f"--dist_url {own.dist_url}: processes find each other as their launcher says; use torchrun")
    if own.start_epoch:
        problems.append(
            f"--start_epoch {own.start_epoch}: a resumed run continues at the update of its checkpoint; leave it out"
        )
    if own.vicuna_weights != AUTO and not own.use_vicuna:
        problems.append(f"--vicuna_weights {own.vicuna_weights}: needs --use_vicuna")
    if own.resume and not Path(own.resume).is_dir():
        problems.append(
            f"--resume {own.resume}: is no folder of a checkpoint; the original's .pth files hold no state that could "
            "be resumed (see docs/differences.md)"
        )
    if not 0 <= own.warmup_epochs < own.epochs:
        problems.append(f"--warmup_epochs {own.warmup_epochs}: must be at least 0 and less than --epochs {own.epochs}")
    if own.max_seq_len <= MODALITY_TOKENS:
        problems.append(f"--max_seq_len {own.max_seq_len}: must be more than {MODALITY_TOKENS}")
    if own.device not in ("cpu", "cuda"):
        problems.append(f"--device {own.device}: must be cuda or cpu; CUDA_VISIBLE_DEVICES chooses the GPU")
    problems += range_problems(own, RANGES)
    problems += _data_problems(own)
    inputs = [
        Input("--data_root", own.data_root, has_images=True),
        Input("--llama_model_path", own.llama_model_path),
        Input("--caption_file", own.caption_file),
    ]
    problems += folder_problems("--output_dir", own.output_dir, inputs)
    if own.use_caption and not Path(own.caption_file).is_file():
        problems.append(f"--caption_file {own.caption_file}: no such file, but --use_caption asks for it")
    return problems


IDLE = {
    "data_path": "the original never reads it; --data_root has the data",
    "n_prompt": "the original never reads it in training",
    "cpu_load": "weights are read from mapped files in any case",
    "world_size": "the launcher decides",
}
"""Options that nothing reads, and why."""


def _say_what_is_idle(names: set[str]) -> None:
    for name in sorted(names & IDLE.keys()):
        print(f"--{name} is ignored: {IDLE[name]}")


def _wants_cpu(own: argparse.Namespace, rest: Sequence[str]) -> bool:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("--use_cpu", "--no_cuda"):  # the second is the first's older name
        parser.add_argument(name, type=string_to_bool, nargs="?", const=True, default=False, dest="use_cpu")
    return own.device == "cpu" or parser.parse_known_args(list(rest))[0].use_cpu


def _precision(own: argparse.Namespace, rest: Sequence[str]) -> dict[str, bool]:
    """float16 under autocast on a GPU, as in the original, unless another precision is asked for."""
    if _wants_cpu(own, rest):
        return {"use_cpu": True}
    if not torch.cuda.is_available():
        raise FlagError("--device cuda: torch finds no CUDA device here; pass --device cpu")
    asked = any(word.partition("=")[0] in ("--bf16", "--fp16") for word in rest)
    return {} if asked else {"fp16": True}


def _values(own: argparse.Namespace, rate: float) -> dict[str, Any]:
    """Values of llava's options that follow from LaVIN's."""
    root = Path(own.data_root)
    return {
        "mma": True,
        "adapter_type": own.adapter_type,
        "visual_adapter_type": own.visual_adapter_type,
        "adapter_dim": own.adapter_dim,
        "adapter_scale": own.adapter_scale,
        "temperature": own.temperature,
        "hidden_proj": own.hidden_proj,
        "drop_path": own.drop_path,
        "model_name_or_path": own.llama_model_path,
        "version": "plain",
        "vision_tower": TOWER,
        "mm_use_im_patch_token": False,
        "data_path": [str(root / (MIXTURE_FILE if own.do_pretrain else PROBLEMS_FILE))],
        "image_folder": str(root / IMAGES_FOLDER),
        "on_bad_sample": "skip",
        "output_dir": own.output_dir,
        "bits": BITS[own.bits],
        checkpointing.SWITCH: own.gradient_checkpointing,
        "num_train_epochs": own.epochs,
        "per_device_train_batch_size": own.batch_size,
        "gradient_accumulation_steps": own.accum_iter,
        "learning_rate": rate,
        "weight_decay": own.weight_decay,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "max_grad_norm": own.clip_grad or 0.0,
        "loss_reduction": "micro_batch",
        "model_max_length": own.max_seq_len - MODALITY_TOKENS,
        "dataloader_num_workers": own.num_workers,
        "dataloader_pin_memory": own.pin_mem,
        "ddp_find_unused_parameters": False,  # every batch uses all of them, one of text alone with weight zero
        "seed": own.seed,
        "save_strategy": "epoch",
        "logging_steps": 10,
        "resume_from_checkpoint": own.resume or None,
        "eval_data_path": [str(root / PROBLEMS_FILE)] if own.eval_split else None,
    }


def with_underscores(words: Sequence[str]) -> list[str]:
    """A command line with the names of its options as they are defined: llava's parser takes `--max-steps 3` too."""
    split = [word.partition("=") if word.startswith("--") else ("", "", word) for word in words]
    return [(name and "--" + name[2:].replace("-", "_")) + sign + value for name, sign, value in split]


HELP_ALL = "--help_all"


def print_full_help() -> None:
    """Print LaVIN's options and then llava's, and end the program.

    Raises:
        SystemExit: always.
    """
    build_parser().print_help()
    parse_llava([HELP_ALL])


def launched_processes() -> int:
    """Number of processes that the launcher has started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def parse_args(argv: Sequence[str] | None = None) -> LavinArguments:
    """Options of a run, checked.

    Raises:
        FlagError: options are unknown, contradictory or not carried out.
        SystemExit: a value is of the wrong type (argparse's message).
    """
    parser = build_parser()
    parsers = [parser, build_llava_parser(installed_extensions())]
    words = with_config(sys.argv[1:] if argv is None else argv, parsers, NOTHING_GIVEN, list)
    words = with_underscores(words)
    if HELP_ALL in words:
        print_full_help()
    own, rest = parser.parse_known_args(words)
    names = given(words)
    problems = _problems(own, rest)
    if problems:
        raise FlagError("this run cannot start:\n  " + "\n  ".join(problems))
    _say_what_is_idle(names)
    by_samples = absolute_learning_rate(own.blr, own.batch_size, own.accum_iter, launched_processes())
    rate = by_samples if own.lr is None else own.lr
    values = _values(own, rate) | _precision(own, rest)
    if "log_dir" in names:
        values["report_to"] = ["tensorboard"]
        os.environ["TENSORBOARD_LOGGING_DIR"] = own.log_dir  # where transformers 5 reads it from
    run = parse_llava(rest, defaults=values, given=names)
    if run.model.mm_use_im_start_end:
        raise FlagError("--mm_use_im_start_end True: LaVIN's prompt has no such tokens; leave it out")
    base = BaseWeights(own.llama_model_path, own.llm_model, own.use_vicuna, own.vicuna_weights)
    return LavinArguments(own, run, base, Schedule(rate, own.epochs, own.warmup_epochs, own.min_lr))

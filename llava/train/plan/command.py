"""The command line of the plan: its own options, and the training command that it is about, parsed as training does."""

from __future__ import annotations

import argparse
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.hf_argparser import string_to_bool

from llava.errors import FlagError
from llava.train.arguments import parse_args
from llava.train.options import RunArguments
from llava.train.plan.parser import build_parser

PROGRAMS = ("train", "train_mem", "train_sparse", "train_xformers")
"""Programs of `llava.train` whose commands can be planned."""

INSTEAD = ("--use_cpu", "True", "--tf32", "False", "--report_to", "none", "--push_to_hub", "False")
"""What the parser is told, so that the command of a GPU is accepted where there is none."""

_PROCESSES = ("--nproc_per_node", "--nproc-per-node", "--num_gpus", "--num_processes")
_NODES = {
    "--nproc_per_node": ("--nnodes",),
    "--nproc-per-node": ("--nnodes",),
    "--num_gpus": ("--num_nodes",),
}
"""How launchers give the processes of one machine, or of all, and the machines that the former are multiplied by."""

_ALONE = ("--module", "--standalone", "--multi_gpu", "--use_fsdp", "--no_local_rank")
"""Options of launchers without a value, which a program may follow."""

_SETTINGS = ("--use_deepspeed", "--deepspeed_config_file", "--config_file", "--zero_stage")
"""Options of `accelerate launch` that decide how the run is split."""


@dataclass(frozen=True)
class Command:
    """What is to be planned.

    Attributes:
        args: options of the training run; `model_max_length` is the length that is planned.
        device: that the run computes on.
        gpus: number of processes, one for each GPU.
        gpu_memory: of each, in GiB.
        zero: settings of DeepSpeed; None without.
        record: where the numbers are written; None: nowhere.
    """

    args: RunArguments
    device: torch.device
    gpus: int
    gpu_memory: float
    zero: dict[str, Any] | None
    record: Path | None

    @property
    def batch(self) -> int:
        """Rows of a micro batch on each GPU."""
        return self.args.training.per_device_train_batch_size


def read_command(argv: Sequence[str]) -> Command:
    """The plan's options and those of the training command.

    Raises:
        FlagError: an option of either is wrong, or the plan does not cover it.
    """
    own, words = build_parser().parse_known_args(list(argv))
    module, words, launched = _split(words)
    words, zero = _without_deepspeed(words)
    on_cpu = _is_on(words, "--use_cpu") or _is_on(words, "--no_cuda")
    args = parse_args([*_in_bfloat16(words), *INSTEAD], defaults=_defaults(module))
    gpus = own.gpus if own.gpus is not None else launched
    _check(own, args, gpus, zero, on_cpu)
    if own.length is not None:
        args.training.model_max_length = own.length
    device = torch.device("cpu") if on_cpu else torch.device("cuda", 0)
    return Command(args, device, gpus, own.gpu_memory, zero, own.record)


def _check(own: argparse.Namespace, args: RunArguments, gpus: int, zero: Any, on_cpu: bool) -> None:
    problems = []
    if gpus < 1:
        problems.append(f"--gpus {gpus}: at least one process trains")
    if not 0 < own.gpu_memory < float("inf"):
        problems.append(f"--gpu_memory {own.gpu_memory}: expected a number of GiB above 0")
    if own.length is not None and own.length < 1:
        problems.append(f"--length {own.length}: expected at least one position")
    if own.record is not None and own.record.suffix != ".json":
        problems.append(f"--record {own.record}: expected a name that ends in .json")
    if args.training.deepspeed:
        problems.append("--deepspeed in a --config file: pass it on the command line, so that the plan can read it")
    if args.training.fsdp:
        problems.append(
            "--fsdp: the plan covers one GPU, data parallelism and DeepSpeed; it does not know FSDP's shares"
        )
    if args.training.bits == 8:
        problems.append("--bits 8: the plan supports 16 and 4")
    if zero is not None and on_cpu:
        problems.append("--deepspeed with --use_cpu True: the plan knows DeepSpeed on GPUs; leave one of them out")
    if args.program:
        problems.append("the plan supports the programs of llava.train")
    if problems:
        raise FlagError("\n".join(problems))


def _split(words: list[str]) -> tuple[str, list[str], int]:
    """Program, its options, and the number of processes that a launcher in front of it starts."""
    for position, word in enumerate(words):
        name = word.removesuffix(".py").replace("/", ".").lstrip(".")
        found = re.search(r"(?:^|\.)llava\.train\.(\w+)$", name)
        before = words[position - 1] if position else ""
        if found is None or (before.startswith("--") and "=" not in before and before not in _ALONE):
            continue
        elsewhere = [each for each in words[:position] if each.partition("=")[0] in _SETTINGS]
        if elsewhere:
            raise FlagError(
                f"{elsewhere[0]}: settings of a launcher are not read by the plan; pass --deepspeed FILE behind {word}"
            )
        if found[1] not in PROGRAMS:
            raise FlagError(f"{word}: the plan supports the programs {', '.join(PROGRAMS)} of llava.train")
        return f"llava.train.{found[1]}", words[position + 1 :], _processes(words[:position])
    return "llava.train.train_mem", words, 1


def _processes(launcher: Sequence[str]) -> int:
    """Processes that the words in front of a program ask for; 1 if they do not say."""
    for option in _PROCESSES:
        count = _number(launcher, option)
        if count is not None:
            nodes = next((_number(launcher, name) for name in _NODES.get(option, ()) if _value(launcher, name)), None)
            return count * (nodes or 1)
    return 1


def _number(launcher: Sequence[str], option: str) -> int | None:
    """The value of an option of the launcher; None without it."""
    value = _value(launcher, option)
    if value is not None and not value.isdigit():
        raise FlagError(f"{option} {value}: the plan needs a number; pass --gpus N")
    return None if value is None else int(value)


def _value(words: Sequence[str], option: str) -> str | None:
    """The last value of an option among words."""
    found = None
    for position, word in enumerate(words):
        if word == option and position + 1 < len(words):
            found = words[position + 1]
        elif word.startswith(f"{option}="):
            found = word.partition("=")[2]
    return found


def _without_deepspeed(words: Sequence[str]) -> tuple[list[str], dict[str, Any] | None]:
    """The words without `--deepspeed FILE`, and what is in the file.

    Raises:
        FlagError: it cannot be read, or has no stage that is known.
    """
    given, kept = _value(words, "--deepspeed"), []
    skip = False
    for word in words:
        if not skip and not word.startswith("--deepspeed="):
            skip = word == "--deepspeed"
            if not skip:
                kept.append(word)
        else:
            skip = False
    if not given:
        return kept, None
    try:
        settings = json.loads(given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8"))
    except OSError as error:
        raise FlagError(f"--deepspeed {given}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        raise FlagError(f"--deepspeed {given}: not valid JSON ({error})") from error
    stage = _stage(settings)
    if stage not in (0, 1, 2, 3):
        raise FlagError(f"--deepspeed {given}: the stage of zero_optimization is {stage}; expected 0, 1, 2 or 3")
    return kept, settings


def _stage(settings: Any) -> Any:
    """Stage of ZeRO in the settings of DeepSpeed, whatever they are; 0 without one."""
    zero = settings.get("zero_optimization", {}) if isinstance(settings, dict) else None
    return zero.get("stage", 0) if isinstance(zero, dict) else None


def _in_bfloat16(words: Sequence[str]) -> list[str]:
    """The words with `--bf16` in place of `--fp16`, which takes the same bytes and is refused where there is no GPU.

    Raises:
        FlagError: both are switched on.
    """
    half = _is_on(words, "--fp16")
    if half and _is_on(words, "--bf16"):
        raise FlagError("--fp16 True with --bf16 True: train in one of them")
    kept, skip = list[str](), False
    for word in words:
        if skip and not word.startswith("--"):
            skip = False
            continue
        skip = word == "--fp16"
        if not skip and not word.startswith("--fp16="):
            kept.append(word)
    return [*kept, "--bf16", "True"] if half else kept


def _is_on(words: Sequence[str], option: str) -> bool:
    """Whether an option with a truth value is given and not switched off; alone it switches on."""
    value = _value(words, option)
    if value is None:
        return words[-1:] == [option]
    return value.startswith("--") or string_to_bool(value)


def _defaults(module: str) -> Mapping[str, Any] | None:
    return getattr(importlib.import_module(module), "DEFAULTS", None)

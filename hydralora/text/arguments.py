"""Every option of `python -m hydralora.finetune`: those of the original's `fine-tuning.py`, and a few of ours.

The classes and their order are the original's; options of transformers 4 that no longer exist are translated by
`llava.runtime.retired_flags`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers

from hydralora.text.counts import row_problems
from hydralora.tuner.config import HydraLoraConfig, RoutingUnit
from hydralora.tuner.loading import read_config
from llava.errors import FlagError
from llava.runtime.files import refuse_pointer
from llava.runtime.places import Input, folder_problems
from llava.runtime.ranges import COUNT, NOT_NEGATIVE, POSITIVE, PROBABILITY, range_problems
from llava.runtime.retired_flags import translate_retired_flags
from llava.runtime.values import check_values, parse, refuse
from llava.runtime.zero import zero_settings, zero_stage

AUTO = "auto:"
"""`--lora_nums auto:FILE` takes the number from a file that `python -m hydralora.components` wrote."""


def _option(help_text: str, default: Any = None, **metadata: Any) -> Any:
    """A command-line option with its help text."""
    return field(default=default, metadata={"help": help_text, **metadata})


@dataclass
class ModelArguments:
    """The base model and its tokenizer."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = _option("folder or hub id of the base: any causal language model of transformers")
    tokenizer_name_or_path: str | None = _option("folder or hub id of the tokenizer; none given: that of the base")
    config_overrides: str | None = _option("accepted for compatibility: refused unless empty, the base stays as it is")
    config_name: str | None = _option("accepted for compatibility: refused unless empty, the base stays as it is")
    tokenizer_name: str | None = _option("the same as --tokenizer_name_or_path")
    cache_dir: str | None = _option("where files from a model hub are kept")
    use_fast_tokenizer: bool = _option("accepted for compatibility: there is one kind of tokenizer today", True)
    model_revision: str = _option("branch, tag or commit on the hub", "main")
    use_auth_token: bool = _option("use the token that `hf auth login` stored", False)
    torch_dtype: str | None = _option(
        "dtype of the frozen base; none given: that of its files", choices=["auto", "bfloat16", "float16", "float32"]
    )


@dataclass
class DataArguments:
    """What is trained and evaluated on: JSON lists of instruction, input, output and, optionally, task_type."""

    _argument_group_name: ClassVar[str] = "data"

    dataset_dir: str | None = _option("folder whose .json files are trained on, the validation file left out")
    train_file: str | None = _option("one file to train on, instead of --dataset_dir")
    validation_file: str | None = _option("file to evaluate on")
    overwrite_cache: bool = _option("tokenize again although a cache of the very same content exists", False)
    validation_split_percentage: float = _option(
        "share of the training records to evaluate on, with --do_eval and no --validation_file", 0.05
    )
    preprocessing_num_workers: int | None = _option("accepted for compatibility: tokenizers work in parallel already")
    keep_linebreaks: bool = _option("accepted for compatibility: line breaks are kept", True)
    data_cache_dir: str | None = _option("where tokenized data is kept; none given: a folder beside the data")
    max_seq_length: int = _option("longest sequence in tokens; the rest is cut off", 1024)


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """How it is trained; everything else is transformers' `TrainingArguments`."""

    _argument_group_name: ClassVar[str] = "training (including every option of transformers' TrainingArguments)"

    remove_unused_columns: bool = _option("drop columns that the model does not take; does not apply here", False)
    trainable: str = _option("linear layers to adapt, by comma, or all-linear", "q_proj,v_proj")
    lora_rank: int = _option("rank of A and of every B", 8)
    lora_dropout: float = _option("dropout before A", 0.1)
    lora_alpha: float = _option("the update is scaled by alpha / rank", 32.0)
    lora_nums: str = _option("number of experts, or auto:FILE (see python -m hydralora.components)", "2")
    routing: str = _option("what the router decides for: token (the paper) or sequence", RoutingUnit.TOKEN.value)
    balance_weight: float | None = _option(
        "weight of an expert-balance loss; 0: none, as the original; none given: that of --peft_path's adapter, or 0"
    )
    modules_to_save: str | None = _option("other modules to train in full, by comma")
    peft_path: str | None = _option(
        "adapter to start from: ours, or one of the original; it stays as it is, so flags that contradict its rank, "
        "alpha, dropout, experts, routing or modules are refused"
    )
    flash_attn: bool = _option("use FlashAttention 2", False)
    double_quant: bool = _option("4 bit: quantise the quantisation constants too", True)
    quant_type: str = _option("4 bit: nf4 or fp4", "nf4")
    load_in_kbits: int = _option("precision of the frozen base: 16, or 8 or 4 (QLoRA)", 16)

    def __post_init__(self) -> None:
        """Refuse numbers that train nothing, and resolve `--deepspeed` before transformers reads it."""
        check_values(self, OWN_RANGES)
        self.deepspeed = zero_settings(self)
        super().__post_init__()

    @property
    def device(self) -> torch.device:
        """Device of this process. Accelerate numbers CPUs among several processes, which `torch.load` does not know."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device


OWN_RANGES = {
    "lora_rank": COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": PROBABILITY,
    "balance_weight": NOT_NEGATIVE,
}
"""What the numbers of `TrainingArguments` may be, where they are ours."""

DATA_RANGES = {"max_seq_length": COUNT, "preprocessing_num_workers": COUNT, "validation_split_percentage": PROBABILITY}


@dataclass
class RunArguments:
    """All options of one run."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments

    @property
    def experts(self) -> int:
        """The number of experts: of `--peft_path`'s adapter, or else of `--lora_nums` or the file that it names."""
        if self.training.peft_path:
            return stored_config(self.training.peft_path).lora_nums
        return number_of_experts(self.training.lora_nums)

    @property
    def tokenizer_name(self) -> str:
        """Folder or hub id of the tokenizer."""
        return str(self.model.tokenizer_name_or_path or self.model.tokenizer_name or self.model.model_name_or_path)


def number_of_experts(value: str) -> int:
    """The number that `--lora_nums` means.

    Raises:
        FlagError: it is no positive number, or the file does not hold one.
    """
    source, number = "--lora_nums", value
    if value.startswith(AUTO):
        path = Path(value.removeprefix(AUTO))
        refuse_pointer(path, FlagError)
        source = f"--lora_nums {value}: 'suggested' in {path}"
        try:
            number = json.loads(path.read_text(encoding="utf-8"))["suggested"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FlagError(
                f"--lora_nums {value}: {path} cannot be read or has no 'suggested' ({error}); "
                "python -m hydralora.components writes such a file"
            ) from error
    if not str(number).isdecimal() or int(number) < 1:
        raise FlagError(f"{source} is {number!r}, expected a number of experts of at least 1")
    return int(number)


def stored_config(folder: str) -> HydraLoraConfig:
    """The configuration of the adapter that `--peft_path` names.

    Raises:
        FlagError: the folder holds no adapter, or one of another method.
    """
    try:
        config = read_config(Path(folder))
    except ValueError as error:
        raise FlagError(f"--peft_path: {error}") from error
    if not isinstance(config, HydraLoraConfig):
        raise FlagError(f"--peft_path {folder}: is an adapter of another method than HydraLoRA")
    return config


def module_names(value: str | None) -> list[str]:
    """The names in the value of `--trainable` or `--modules_to_save`, without blanks."""
    return [name.strip() for name in (value or "").split(",") if name.strip()]


def build_parser() -> transformers.HfArgumentParser:
    """The options of this program."""
    return transformers.HfArgumentParser(
        [ModelArguments, DataArguments, TrainingArguments],
        allow_abbrev=False,
        prog="python -m hydralora.finetune",
        usage="%(prog)s --model_name_or_path BASE --dataset_dir DATA --output_dir OUTPUT --do_train [options]",
        description="Fine-tune a causal language model on instructions with HydraLoRA. An interrupted run continues.",
        epilog="Example: scripts/hydralora/fine-tuning.sh.",
    )


def parse_args(argv: Sequence[str] | None = None) -> RunArguments:
    """Options of a run, checked.

    Raises:
        FlagError: options are unknown, contradictory or not carried out; all problems are listed at once.
    """
    words = translate_retired_flags(sys.argv[1:] if argv is None else list(argv))
    *parsed, unknown = parse(build_parser(), words)
    if unknown:
        raise FlagError(f"unknown options {unknown}; --help lists all")
    args = RunArguments(*parsed)
    refuse(_problems(args))
    return args


def inputs_of(args: RunArguments) -> list[Input]:
    """What the run reads, which its output folder must not fall on."""
    model, data, training = args.model, args.data, args.training
    return [
        Input("--model_name_or_path", model.model_name_or_path),
        Input("--tokenizer_name_or_path", args.tokenizer_name),
        Input("--peft_path", training.peft_path),
        Input("--dataset_dir", data.dataset_dir),
        Input("--train_file", data.train_file),
        Input("--validation_file", data.validation_file),
    ]


def _problems(args: RunArguments) -> list[str]:
    model, data, training = args.model, args.data, args.training
    problems = []
    if not model.model_name_or_path:
        problems.append("--model_name_or_path is missing")
    problems += [
        f"--{name}: the base is taken as it is; change its config.json instead"
        for name in ("config_name", "config_overrides")
        if getattr(model, name)
    ]
    if not (training.do_train or training.do_eval):
        problems.append("nothing to do: pass --do_train, --do_eval, or both")
    if training.do_train and not (data.dataset_dir or data.train_file):
        problems.append("--do_train needs --dataset_dir or --train_file")
    for name in ("dataset_dir", "train_file", "validation_file"):
        path = getattr(data, name)
        if path and not Path(path).exists():
            problems.append(f"--{name} {path}: does not exist")
    problems += dict.fromkeys(folder_problems("--output_dir", training.output_dir, inputs_of(args)))
    if training.load_in_kbits not in (4, 8, 16):
        problems.append(f"--load_in_kbits {training.load_in_kbits}: known values are 4, 8 and 16")
    elif training.load_in_kbits != 16 and zero_stage(training) == 3:
        problems.append(f"--load_in_kbits {training.load_in_kbits}: ZeRO-3 cannot split quantised weights; use ZeRO-2")
    problems += range_problems(data, DATA_RANGES)
    if training.do_train and training.learning_rate == 0:
        problems.append("--learning_rate 0: nothing would be trained")
    splits = training.do_train and training.do_eval and not data.validation_file
    if splits and data.validation_split_percentage == 0:
        problems.append("--validation_split_percentage 0: must be more than 0 to evaluate without --validation_file")
    try:
        number_of_experts(training.lora_nums)
        if training.peft_path:
            problems += _contradictions(training, stored_config(training.peft_path))
    except FlagError as error:
        problems.append(str(error))
    return problems or row_problems(args)


def _contradictions(training: TrainingArguments, stored: HydraLoraConfig) -> list[str]:
    """The flags that were given with other values than the adapter to start from has."""
    targets = stored.target_modules
    pairs = {
        "lora_rank": (training.lora_rank, stored.r),
        "lora_alpha": (training.lora_alpha, stored.lora_alpha),
        "lora_nums": (number_of_experts(training.lora_nums), stored.lora_nums),
        "lora_dropout": (training.lora_dropout, stored.lora_dropout),
        "routing": (training.routing, stored.routing),
        "trainable": (
            sorted(module_names(training.trainable)),
            [targets] if isinstance(targets, str) else sorted(targets or ()),
        ),
        "modules_to_save": (sorted(module_names(training.modules_to_save)), sorted(stored.modules_to_save or ())),
    }
    return [
        f"--{name} {getattr(training, name)} contradicts the adapter of --peft_path, which has {theirs} and stays as "
        "it is; leave the flag out"
        for name, (ours, theirs) in pairs.items()
        if ours != theirs and getattr(training, name) != type(training).__dataclass_fields__[name].default
    ]

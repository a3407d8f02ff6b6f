"""Every option of `python -m hydralora.finetune`: those of the original's `fine-tuning.py`, and a few of ours.

The classes and their order are the original's; `arguments.py` makes the parser and refuses what is contradictory.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import ClassVar

from hydralora.text.option_table import TEXT_OPTIONS
from hydralora.tuner.balance.losses import BalanceForm
from hydralora.tuner.config import HydraLoraConfig, RoutingUnit
from hydralora.tuner.initialization import Initialization
from hydralora.tuner.loading import read_config
from llava.errors import FlagError
from llava.runtime.files import refuse_pointer
from llava.runtime.monitoring.stopping import PATIENCE_HELP, THRESHOLD_HELP, choose_metric
from llava.runtime.options import option
from llava.runtime.ranges import COUNT, NOT_NEGATIVE, POSITIVE, PROBABILITY, Range
from llava.runtime.trainer_options.base import CheckedTrainingArguments
from llava.runtime.trainer_options.row import Table


class LossReduction(StrEnum):
    """What the loss of an update is the mean of (`--loss_reduction`)."""

    TARGET = "target"
    MICRO_BATCH = "micro_batch"


AUTO = "auto:"
"""`--lora_nums auto:FILE` takes the number from a file that `python -m hydralora.components` wrote."""


@dataclass
class ModelArguments:
    """The base model and its tokenizer."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option("folder or hub id of the base: any causal language model of transformers")
    tokenizer_name_or_path: str | None = option("folder or hub id of the tokenizer; none given: that of the base")
    config_overrides: str | None = option("accepted for compatibility: refused unless empty, the base stays as it is")
    config_name: str | None = option("accepted for compatibility: refused unless empty, the base stays as it is")
    tokenizer_name: str | None = option("the same as --tokenizer_name_or_path")
    cache_dir: str | None = option("where files from a model hub are kept")
    use_fast_tokenizer: bool = option("accepted for compatibility: there is one kind of tokenizer today", True)
    model_revision: str = option("branch, tag or commit on the hub", "main")
    use_auth_token: bool = option("use the token that `hf auth login` stored", False)
    torch_dtype: str | None = option(
        "dtype of the frozen base; none given: that of its files", choices=["auto", "bfloat16", "float16", "float32"]
    )


@dataclass
class DataArguments:
    """What is trained and evaluated on: records of instruction, input, output or of messages, and task_type or none."""

    _argument_group_name: ClassVar[str] = "data"

    dataset_dir: str | None = option(
        "folder whose .json and .jsonl files are trained on; the validation file and those named test, val, dev, ... "
        "are left out"
    )
    include_held_out: bool = option("train on the files named test, val, dev, ... of --dataset_dir too", False)
    train_file: str | None = option("one file to train on, instead of --dataset_dir")
    validation_file: str | None = option("file to evaluate on")
    overwrite_cache: bool = option("tokenize again although a cache of the very same content exists", False)
    validation_split_percentage: float = option(
        "share of the training records to evaluate on, with --do_eval and no --validation_file", 0.05
    )
    preprocessing_num_workers: int | None = option("accepted for compatibility: tokenizers work in parallel already")
    keep_linebreaks: bool = option("accepted for compatibility: line breaks are kept", True)
    data_cache_dir: str | None = option("where tokenized data is kept; none given: a folder beside the data")
    max_seq_length: int = option("longest sequence in tokens; the rest is cut off", 1024)
    chat_template: str | None = option(
        "what writes the records; none given: instructions as the original, messages by the tokenizer's chat template; "
        "tokenizer: all by that template; a file: all by this Jinja template, which is kept with the adapter"
    )


FIXED = (
    *("balance", "balance_ema", "balance_warmup", "information_weight"),
    *("init", "head_dropout", "expert_dropout", "head_dropout_start"),
)
"""Flags that are fields of an adapter's configuration under the same name, and stay as they are with `--peft_path`."""

OWN_RANGES = {
    "lora_rank": COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": PROBABILITY,
    "balance_weight": NOT_NEGATIVE,
    "balance_ema": PROBABILITY,
    "balance_warmup": NOT_NEGATIVE,
    "information_weight": NOT_NEGATIVE,
    "head_dropout": PROBABILITY,
    "expert_dropout": PROBABILITY,
    "head_dropout_start": NOT_NEGATIVE,
    "router_learning_rate": NOT_NEGATIVE,
    "early_stopping_patience": COUNT,
    "early_stopping_threshold": NOT_NEGATIVE,
}
"""What the numbers of `TrainingArguments` may be, where they are ours."""


@dataclass
class TrainingArguments(CheckedTrainingArguments):
    """How it is trained; everything else is transformers' `TrainingArguments`."""

    _argument_group_name: ClassVar[str] = "training"
    table: ClassVar[Table] = TEXT_OPTIONS
    ranges: ClassVar[Mapping[str, Range]] = OWN_RANGES

    trainable: str = option("linear layers to adapt, by comma, or all-linear", "q_proj,v_proj")
    lora_rank: int = option("rank of A and of every B", 8)
    lora_dropout: float = option("dropout before A", 0.1)
    lora_alpha: float = option("the update is scaled by alpha / rank", 32.0)
    lora_nums: str = option("number of experts, or auto:FILE (see python -m hydralora.components)", "2")
    routing: str = option("what the router decides for: token (the paper) or sequence", RoutingUnit.TOKEN.value)
    balance_weight: float | None = option(
        "weight of an expert-balance loss; 0: none, as the original; none given: that of --peft_path's adapter, or 0"
    )
    balance: str | None = option(
        "what that loss balances: sample, the experts over all layers in each sample, as the original; batch, those of "
        "each layer over the batch; none given: sample, or that of --peft_path's adapter",
        choices=list(BalanceForm),
    )
    balance_ema: float | None = option("--balance batch: weight of the past in a running mean of the shares")
    balance_warmup: int | None = option("updates during which the weight of the balance loss grows from 0")
    information_weight: float | None = option("weight of a loss that makes routers decide, and tokens differ")
    init: str = option(
        "how the experts start: zero, B = 0 (the paper); centered, random B that cancel, and a router of 0",
        Initialization.ZERO.value,
        choices=list(Initialization),
    )
    head_dropout: float = option("dropout between A and each B, by expert", 0.0)
    expert_dropout: float = option("probability of leaving out a whole expert for a token in training", 0.0)
    head_dropout_start: int = option("updates before --head_dropout and --expert_dropout begin", 0)
    router_learning_rate: float | None = option("learning rate of the routers; none given: --learning_rate")
    modules_to_save: str | None = option("other modules to train in full, by comma")
    peft_path: str | None = option(
        "adapter to start from: ours, or one of the original; it stays as it is, so flags that contradict its rank, "
        "alpha, dropout, experts, routing or modules are refused"
    )
    loss_reduction: str = option(
        "target: mean over the trained tokens of an update; micro_batch: mean of the means of its micro batches, as "
        "the original",
        LossReduction.TARGET.value,
        choices=list(LossReduction),
    )
    early_stopping_patience: int | None = option(PATIENCE_HELP)
    early_stopping_threshold: float = option(THRESHOLD_HELP, 0.0)
    hub_strategy: str = option("when to publish: end, once when the run is finished", "end")
    hub_base_model: str | None = option("--push_to_hub: id of the base on the hub, where it was read from a folder")
    hub_license: str | None = option("--push_to_hub: license of the result; not given: that of the base's model card")
    flash_attn: bool = option("use FlashAttention 2", False)
    double_quant: bool = option("4 bit: quantise the quantisation constants too", True)
    quant_type: str = option("4 bit: nf4 or fp4", "nf4")
    load_in_kbits: int = option("precision of the frozen base: 16, or 8 or 4 (QLoRA)", 16)

    def __post_init__(self) -> None:
        """Choose what evaluations are compared by, too."""
        super().__post_init__()
        choose_metric(self, self.early_stopping_patience)


@dataclass
class RunArguments:
    """All options of one run; `given` has the names of those that were written down."""

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    given: frozenset[str] = frozenset()

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

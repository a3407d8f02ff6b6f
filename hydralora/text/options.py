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

from hydralora.text.adapter_flags import ADAPTER_RANGES, AdapterArguments
from hydralora.text.option_table import TEXT_OPTIONS
from hydralora.tuner.config import HydraLoraConfig
from hydralora.tuner.loading import read_config
from llava.errors import FlagError
from llava.runtime.files import refuse_pointer
from llava.runtime.monitoring.stopping import PATIENCE_HELP, THRESHOLD_HELP, choose_metric
from llava.runtime.options import option
from llava.runtime.ranges import COUNT, NOT_NEGATIVE, Range
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


OWN_RANGES = {
    **ADAPTER_RANGES,
    "router_learning_rate": NOT_NEGATIVE,
    "early_stopping_patience": COUNT,
    "early_stopping_threshold": NOT_NEGATIVE,
}
"""What the numbers of `TrainingArguments` may be, where they are ours."""


@dataclass
class TrainingArguments(AdapterArguments, CheckedTrainingArguments):
    """The adapter and how it is trained; everything else is transformers' `TrainingArguments`."""

    _argument_group_name: ClassVar[str] = "training"
    table: ClassVar[Table] = TEXT_OPTIONS
    ranges: ClassVar[Mapping[str, Range]] = OWN_RANGES

    router_learning_rate: float | None = option("learning rate of the routers; none given: --learning_rate")
    peft_path: str | None = option(
        "adapter to start from: ours, or one of the original; it stays as it is, so that flags which contradict it "
        "are refused"
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

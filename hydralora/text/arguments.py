"""Every option of `python -m hydralora.finetune`: those of the original's `fine-tuning.py`, and a few of ours.

The classes and their order are the original's; options of transformers 4 that no longer exist are translated by
`llava.runtime.retired_flags`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import transformers

from hydralora.text.adapter_flags import adapter_config, contradictions, routing_problems
from hydralora.text.counts import row_problems
from hydralora.text.messages import OWN
from hydralora.text.option_table import TEXT_OPTIONS
from hydralora.text.options import (
    DataArguments,
    ModelArguments,
    RunArguments,
    TrainingArguments,
    number_of_experts,
    stored_config,
)
from llava.errors import FlagError
from llava.runtime.config_files.words import add_config, with_config
from llava.runtime.fsdp.checks import fsdp_problems
from llava.runtime.monitoring.stopping import best_problems
from llava.runtime.places import Input, folder_problems
from llava.runtime.publishing.access import hub_problems
from llava.runtime.ranges import COUNT, PROBABILITY, range_problems
from llava.runtime.trainer_options.listing import OptionParser
from llava.runtime.values import parse, refuse, written_names
from llava.runtime.zero import zero_stage

DATA_RANGES = {"max_seq_length": COUNT, "preprocessing_num_workers": COUNT, "validation_split_percentage": PROBABILITY}


def build_parser() -> transformers.HfArgumentParser:
    """The options of this program."""
    parser = OptionParser(
        [ModelArguments, DataArguments, TrainingArguments],
        TEXT_OPTIONS,
        prog="python -m hydralora.finetune",
        usage="%(prog)s --model_name_or_path BASE --dataset_dir DATA --output_dir OUTPUT --do_train [options]",
        description="Fine-tune a causal language model on instructions with HydraLoRA. An interrupted run continues.",
        epilog="Example: scripts/hydralora/fine-tuning.sh.",
    )
    add_config(parser)
    return parser


def parse_args(argv: Sequence[str] | None = None) -> RunArguments:
    """Options of a run, checked.

    Raises:
        FlagError: options are unknown, contradictory or not carried out; all problems are listed at once.
    """
    parser = build_parser()
    words = with_config(sys.argv[1:] if argv is None else argv, [parser], {"report_to": "none"})
    *parsed, unknown = parse(parser, words)
    if unknown:
        raise FlagError(f"unknown options {unknown}; --help lists all")
    args = RunArguments(*parsed)
    args.given = written_names(parser, words)
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
        Input("--chat_template", None if data.chat_template == OWN else data.chat_template),
        Input("--validation_file", data.validation_file),
    ]


def _problems(args: RunArguments) -> list[str]:
    model, data, training = args.model, args.data, args.training
    problems = []
    # What has to be there.
    if not model.model_name_or_path:
        problems.append("--model_name_or_path is missing")
    problems += [
        f"--{name}: the base is taken as it is; change its config.json instead"
        for name in ("config_name", "config_overrides")
        if getattr(model, name)
    ]
    if not (training.do_train or training.do_eval):
        problems.append("nothing to do: pass --do_train, --do_eval, or both")
    if training.push_to_hub and not training.do_train:
        problems.append("--push_to_hub True: publishes what a run has trained; pass --do_train")
    if training.do_train and not (data.dataset_dir or data.train_file):
        problems.append("--do_train needs --dataset_dir or --train_file")
    for name in ("dataset_dir", "train_file", "validation_file"):
        path = getattr(data, name)
        if path and not Path(path).exists():
            problems.append(f"--{name} {path}: does not exist")
    template = data.chat_template
    # The word for the tokenizer's own template wins over a file of that name.
    if template not in (None, OWN) and not Path(template).is_file():
        problems.append(f"--chat_template {template}: is neither a file nor '{OWN}'")
    # Nothing that the run reads may lie where it writes.
    problems += dict.fromkeys(folder_problems("--output_dir", training.output_dir, inputs_of(args)))
    if training.load_in_kbits not in (4, 8, 16):
        problems.append(f"--load_in_kbits {training.load_in_kbits}: known values are 4, 8 and 16")
    elif training.load_in_kbits != 16 and zero_stage(training) == 3:
        problems.append(f"--load_in_kbits {training.load_in_kbits}: ZeRO-3 cannot split quantised weights; use ZeRO-2")
    problems += range_problems(data, DATA_RANGES) + hub_problems(training)
    problems += fsdp_problems(training, training.load_in_kbits, "--load_in_kbits")
    # The Trainer would split each batch over them within one process.
    if training.n_gpu > 1:
        problems.append(
            f"{training.n_gpu} GPUs are visible to one process; start with torchrun --nproc_per_node {training.n_gpu} "
            "(scripts/hydralora/fine-tuning_dp.sh), or choose one by CUDA_VISIBLE_DEVICES"
        )
    if training.do_train and training.learning_rate == 0:
        problems.append("--learning_rate 0: nothing would be trained")
    problems += best_problems(training, training.early_stopping_patience)
    # Without a file to evaluate on, part of the training records is taken.
    splits = training.do_train and training.do_eval and not data.validation_file
    if splits and data.validation_split_percentage == 0:
        problems.append("--validation_split_percentage 0: must be more than 0 to evaluate without --validation_file")
    try:
        experts = number_of_experts(training.lora_nums)
        if training.peft_path:
            config = stored_config(training.peft_path)
            problems += contradictions(training, experts, config)
        else:
            config = adapter_config(training, experts, tasks=["those of the data"])
        problems += routing_problems(training, config)
    except FlagError as error:
        problems.append(str(error))
    return problems or row_problems(args)

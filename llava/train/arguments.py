"""From a command line to the options of a run: one parser over llava's options and those of the installed extensions.

`parse_args` translates options that transformers 5 dropped, lets each extension say what its options switch on, and
refuses what is contradictory or not carried out.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import transformers

from llava.errors import FlagError
from llava.extension import Extension, installed_extensions
from llava.runtime.config_files.words import add_config, with_config
from llava.runtime.monitoring.stopping import choose_metric
from llava.runtime.trainer_options.listing import OptionParser
from llava.runtime.values import parse, written_names
from llava.train.base_settings import take_settings
from llava.train.base_template import take_template
from llava.train.base_tower import TEXT_ONLY
from llava.train.checks import check_arguments
from llava.train.evaluation.options import EvaluationArguments
from llava.train.option_table import LLAVA_OPTIONS
from llava.train.options import DataArguments, ModelArguments, RunArguments, TrainingArguments

NOTHING_GIVEN = {"vision_tower": TEXT_ONLY[0], "report_to": "none"}
"""What a `run.json` records as null or empty, as it is written on a command line."""


def build_parser(
    extensions: Mapping[str, Extension], defaults: Mapping[str, Any] | None = None
) -> transformers.HfArgumentParser:
    """Parser over the core's options and those of `extensions`.

    Args:
        extensions: by name.
        defaults: values of options that are not given, by the options' names, for a program with defaults of its own.

    Raises:
        FlagError: an extension defines an option that exists already, or `defaults` names one that does not exist.
    """
    classes: list[type] = [ModelArguments, DataArguments, TrainingArguments, EvaluationArguments]
    owner = {option.name: cls.__name__ for cls in classes for option in dataclasses.fields(cls)}
    for name, extension in extensions.items():
        if extension.options is None:
            continue
        for option in dataclasses.fields(extension.options):
            if option.name in owner:
                raise FlagError(
                    f"the extension '{name}' defines --{option.name}, which {owner[option.name]} has already"
                )
            owner[option.name] = name
        classes.append(extension.options)
    unknown = sorted(set(defaults or {}) - set(owner))
    if unknown:
        raise FlagError(
            f"this program sets the options {unknown}, which no installed extension defines (installed: "
            f"{sorted(extensions)}); install the package that they come from"
        )
    parser = OptionParser(
        classes,
        LLAVA_OPTIONS,
        usage="%(prog)s --model_name_or_path BASE --data_path DATA --output_dir OUTPUT [options]",
        description="Fine-tune a LLaVA. An output folder that holds checkpoints is resumed.",
        epilog="Example: scripts/MLLM_HydraLoRA.sh. Checkpoints and what they hold: docs/architecture.md.",
    )
    parser.set_defaults(**(defaults or {}))
    add_config(parser)
    return parser


def parse_args(
    argv: Sequence[str] | None = None,
    extensions: Mapping[str, Extension] | None = None,
    defaults: Mapping[str, Any] | None = None,
    given: Collection[str] = (),
) -> RunArguments:
    """Options of a run, checked.

    Args:
        argv: command line without the program's name; None takes `sys.argv`.
        extensions: the extensions to compose with; None takes all installed ones.
        defaults: see `build_parser`.
        given: names of options in `defaults` that a command line gave all the same, for `RunArguments.given`.

    Raises:
        FlagError: options are unknown, contradictory or not carried out; all problems are listed at once.
        CheckpointError: the `config.json` of the base is damaged.
        SystemExit: a value is of the wrong type (argparse's message).
    """
    extensions = installed_extensions() if extensions is None else extensions
    parser = build_parser(extensions, defaults)
    argv = with_config(sys.argv[1:] if argv is None else argv, [parser], NOTHING_GIVEN)
    model, data, training, evaluation, *options, unknown = parse(parser, argv)
    if unknown:
        raise FlagError(f"unknown options {unknown}; --help lists all (installed extensions: {sorted(extensions)})")
    with_options = [name for name, extension in extensions.items() if extension.options is not None]
    args = RunArguments(model, data, training, dict(zip(with_options, options, strict=True)), evaluation=evaluation)
    choose_metric(training, evaluation.early_stopping_patience)
    args.given = written_names(parser, argv) | frozenset(given)
    take_settings(args)
    take_template(args)
    for name, extension in extensions.items():
        config = extension.configure(args)
        if config is not None:
            args.extensions[name] = config
    check_arguments(args)
    return args

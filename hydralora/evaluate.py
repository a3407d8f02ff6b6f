"""Adapters of text models in lm-evaluation-harness, as its model type `hydralora`.

    python -m hydralora.evaluate --model_args pretrained=BASE,peft=ADAPTER --tasks mmlu --num_fewshot 0

takes every option of `lm_eval run`. It is HFLM, the harness's own class for models of transformers, with another way
to load the adapter, and with routing by sequence kept to the prompt. Needs the extra `harness`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydralora.harness_options import MODEL_TYPE, require_harness
from llava.runtime.places import Input, refuse_additions, refuse_file
from llava.runtime.program import run_program
from llava.runtime.starting.late_names import late_names

if TYPE_CHECKING:
    from hydralora.harness import register

__all__ = ["build_parser", "main", "register"]

__getattr__ = late_names(__name__, {"register": "hydralora.harness"})


def build_parser() -> argparse.ArgumentParser:
    """The options of `lm_eval run`, with this model type for a default."""
    require_harness()
    from lm_eval._cli.run import Run

    commands = argparse.ArgumentParser().add_subparsers()
    Run.create(commands)
    parser = commands.choices["run"]
    parser.prog = "python -m hydralora.evaluate"
    parser.usage = "%(prog)s --model_args pretrained=BASE,peft=ADAPTER --tasks TASK [options]"
    parser.description = (
        "Evaluate an adapter of a text model with lm-evaluation-harness. BASE is a folder or an id on a model hub; "
        "ADAPTER is what hydralora.finetune wrote (OUTPUT/sft_lora_model), an adapter of the original HydraLoRA, or "
        "one of any other method of PEFT; leave it out to evaluate the base."
    )
    parser.epilog = "lm_eval ls tasks lists the tasks. A table at the end has the results; --output_path stores them."
    parser.set_defaults(model=MODEL_TYPE)
    for action in parser._actions:
        if action.dest == "model":
            action.help = f"model type of the harness (default: {MODEL_TYPE})"
    return parser


INPUTS = ("pretrained", "peft", "tokenizer", "delta", "gguf_file")
"""What `--model_args` may name that is read."""


def check_output(args: argparse.Namespace) -> None:
    """Refuse results that would fall on what is read; the harness adds files of new names to `--output_path`.

    Args:
        args: of `build_parser`; what they do not give may be in the file that `--config` names.

    Raises:
        FlagError: `--output_path` is empty, is the base, the adapter or another input, or is inside one.
    """
    from lm_eval.config.evaluate_config import EvaluatorConfig

    written = EvaluatorConfig.load_yaml_config(args.config) if getattr(args, "config", None) else {}
    output = written.get("output_path") if getattr(args, "output_path", None) is None else args.output_path
    if output is None:
        return
    given = getattr(args, "model_args", None) or written.get("model_args") or {}
    if isinstance(given, str):
        given = dict(part.partition("=")[::2] for part in given.split(","))
    inputs = [Input(f"{name}= of --model_args", str(given[name])) for name in INPUTS if given.get(name)]
    for name in ("include_path", "samples", "config"):
        value = getattr(args, name, None) or written.get(name)
        if isinstance(value, str):
            inputs.append(Input(f"--{name}", value))
    if str(output).endswith(".json"):
        refuse_file("--output_path", output, inputs)
        output = Path(output).parent
    refuse_additions("--output_path", output, inputs)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the evaluation and print the harness's table.

    Raises:
        LlavaError: the harness is not installed, the adapter cannot be loaded, or the results would fall on an input.
    """
    args = build_parser().parse_args(argv)
    check_output(args)
    from lm_eval.utils import setup_logging

    from hydralora.harness import register

    register()
    setup_logging()
    args.func(args)


if __name__ == "__main__":
    run_program(main)

r"""Convert a trained model: to transformers' own LLaVA format (llava-hf) and back, or to upstream's layout.

python -m llava.convert to-hf ./checkpoints/llava-v1.5-7b-lora ./checkpoints/llava-v1.5-7b-lora-hf
python -m llava.convert from-hf ./checkpoints/llava-1.5-7b-hf ./checkpoints/llava-v1.5-7b-again
python -m llava.convert to-original ./checkpoints/llava-v1.5-7b-lora-mohle ./checkpoints/original-lora-mohle

vLLM and SGLang load what to-hf writes, with LoRA merged into the weights. Routed experts and predictors act on each
token and have no place in that format: they are refused with the reason, and `python -m llava.serve.api` serves them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llava.constants import DTYPES
from llava.runtime.files import read_json
from llava.runtime.program import run_program

SERVING = """written: {folder}
in Python: transformers.{name}.from_pretrained("{folder}"), with its AutoProcessor
vLLM:      vllm serve {folder}
SGLang:    python -m sglang.launch_server --model-path {folder}"""


def add_base(parser: argparse.ArgumentParser) -> None:
    """Add the option that names the base of a checkpoint."""
    parser.add_argument("--model-base", help="base of the checkpoint, where it is not the recorded one")


def add_hf_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of `to-hf` that have a default."""
    add_base(parser)
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: that of the weights")
    parser.add_argument(
        "--conv-mode", help="template that becomes the chat template; default: that of the checkpoint's training"
    )


def write_hf(args: argparse.Namespace) -> Path:
    """Run `to-hf` and print how to serve the folder."""
    from llava.convert.hf import to_hf

    written = to_hf(args.checkpoint, args.output, args.model_base, args.dtype, args.conv_mode)
    print(SERVING.format(folder=written, name=read_json(written / "config.json")["architectures"][0]))
    return written


def _read_hf(args: argparse.Namespace) -> Path:
    from llava.convert.hf import from_hf

    written = from_hf(args.checkpoint, args.output, args.image_aspect_ratio, args.conv_mode)
    print(f"written: {written}")
    return written


def _write_original(args: argparse.Namespace) -> Path:
    from llava.convert.original import export_original

    written = export_original(args.checkpoint, args.output, args.model_base)
    print(f"written: {written}")
    return written


ANY_CHECKPOINT = "full weights, or LoRA or a projector on top of a base"
COMMANDS: dict[str, tuple[str, str, Callable[[argparse.Namespace], Path]]] = {
    "to-hf": ("a checkpoint to transformers' format", ANY_CHECKPOINT, write_hf),
    "from-hf": (
        "transformers' format to ours",
        "folder with a LlavaForConditionalGeneration or LlavaNextForConditionalGeneration and its processor",
        _read_hf,
    ),
    "to-original": (
        "a LoRA checkpoint, or full weights with extensions, to upstream's layout",
        "folder that a training run has written",
        _write_original,
    ),
}
"""By command: what it converts, what CHECKPOINT is, and the function that does it."""


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """Command line of this program.

    Args:
        command: the parser of this command alone; None is the whole program's.
    """
    whole = argparse.ArgumentParser(
        prog="python -m llava.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = whole.add_subparsers(dest="command", required=True)
    for name, (what, source, run) in COMMANDS.items():
        parser = commands.add_parser(name, help=what, description=f"Convert {what}.")
        parser.add_argument("checkpoint", help=source)
        parser.add_argument("output", help="folder to write; must not exist")
        parser.set_defaults(run=run)

    add_hf_options(commands.choices["to-hf"])
    commands.choices["from-hf"].add_argument(
        "--image_aspect_ratio", help="how images are treated, where it is not as the processor says (llava-hf: pad)"
    )
    commands.choices["from-hf"].add_argument(
        "--conv-mode", help="template that the model was trained with, where its chat template is none of those here"
    )
    add_base(commands.choices["to-original"])
    return whole if command is None else commands.choices[command]


def main(argv: Sequence[str] | None = None, command: str | None = None) -> Path:
    """Run the program; returns the folder written.

    Args:
        argv: command line; None is that of the process.
        command: stands before the command line, for a name of the program that means one command.

    Raises:
        CheckpointError: the checkpoint cannot be read, or the output already exists.
        FlagError: the format cannot express the model.
    """
    words = [*([] if command is None else [command]), *(sys.argv[1:] if argv is None else argv)]
    args = build_parser().parse_args(words)
    return args.run(args)


if __name__ == "__main__":
    run_program(main)

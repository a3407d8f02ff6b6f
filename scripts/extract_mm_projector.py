"""Take the projector out of a LLaVA, to start another one with it (upstream `scripts/extract_mm_projector.py`).

Usage: `python scripts/extract_mm_projector.py --model-path CHECKPOINT --output mm_projector.bin`. The file is for
`--pretrain_mm_mlp_adapter`; its format follows its ending, `.bin` or `.safetensors`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from llava.errors import CheckpointError, FlagError
from llava.model.formats import NEWLINE, inspect_checkpoint, read_projector, read_tensors, strip_peft_prefix
from llava.runtime.output import check_new, new_path
from llava.runtime.program import run_program
from llava.runtime.weights.tensors import check_numbers
from llava.runtime.weights.weight_files import weight_files

PREFIX = "model.mm_projector."
FORMATS = (".bin", ".safetensors")


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(prog="python scripts/extract_mm_projector.py", description=__doc__.splitlines()[0])
    parser.add_argument("--model-path", required=True, help="checkpoint of any kind that holds a projector")
    parser.add_argument("--output", required=True, help="file to write; must not exist")
    return parser


def projector_of(checkpoint: str | Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint's projector, by their names in the model.

    Raises:
        CheckpointError: it has none.
    """
    contents = inspect_checkpoint(checkpoint)
    if contents.projector is not None:
        return read_projector(contents.projector)
    files = weight_files(contents.weights) if contents.weights is not None else [contents.non_lora]
    tensors: dict[str, Tensor] = {}
    for path in filter(None, files):
        stored = strip_peft_prefix(read_tensors(path))
        tensors |= {k: v for k, v in stored.items() if k.startswith(PREFIX) or k == f"model.{NEWLINE}"}
    if not tensors:
        raise CheckpointError(f"{checkpoint}: holds no projector")
    check_numbers(tensors, checkpoint)
    return tensors


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program.

    Raises:
        FlagError: `--output` has another ending than those known.
    """
    args = build_parser().parse_args(argv)
    if Path(args.output).suffix not in FORMATS:
        raise FlagError(f"--output {args.output}: the name must end in one of {FORMATS}")
    check_new(args.output, [args.model_path], file=True)
    tensors = projector_of(args.model_path)
    with new_path(args.output, [args.model_path], file=True) as path:
        if Path(args.output).suffix == ".bin":
            torch.save(tensors, path)
        else:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, {"format": "pt"})
    print(f"written: {args.output} ({', '.join(sorted(tensors))})")


if __name__ == "__main__":
    run_program(main)

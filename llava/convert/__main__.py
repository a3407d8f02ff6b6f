"""A trained model for other servers: transformers' own LLaVA format (llava-hf), which vLLM and SGLang load.

python -m llava.export --model-path ./checkpoints/llava-v1.5-7b-lora --out ./checkpoints/llava-v1.5-7b-lora-hf

LoRA is merged into the weights. Routed experts and predictors act on each token and have no place in that format; they
are refused with the reason, and `python -m llava.serve.api` serves them. The work is that of `llava.model.convert_hf`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.convert.hf import DTYPES, to_hf
from llava.runtime.program import run_program

SERVING = """written: {folder}
in Python: transformers.LlavaForConditionalGeneration.from_pretrained("{folder}"), with its AutoProcessor
vLLM:      vllm serve {folder}
SGLang:    python -m sglang.launch_server --model-path {folder}"""


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-path", required=True, help="full weights, or LoRA or a projector on top of a base")
    parser.add_argument("--model-base", default=None, help="base of the checkpoint, where it is not the recorded one")
    parser.add_argument("--out", required=True, type=Path, help="folder to write; must not exist")
    parser.add_argument("--dtype", default="auto", choices=["auto", *DTYPES], help="auto: that of the weights")
    parser.add_argument("--conv-mode", default="vicuna_v1", help="template that becomes the chat template")
    return parser


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program; returns the folder written.

    Raises:
        CheckpointError: the checkpoint cannot be read, or the folder exists already.
        FlagError: transformers' LLaVA cannot express the model.
    """
    args = build_parser().parse_args(argv)
    written = to_hf(args.model_path, args.out, args.model_base, args.dtype, args.conv_mode)
    print(SERVING.format(folder=written))
    return written


if __name__ == "__main__":
    run_program(main)

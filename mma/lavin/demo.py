"""Talking with LaVIN in a browser, about an image or without one (LaVIN's `demo.py`).

python -m mma.demo --ckpt_dir ../data/weights --llm_model 13B --adapter_path ./LaVIN-13B-VLIT --server_name 127.0.0.1

Needs the extra `serve` (gradio). `torchrun --nproc_per_node 1 demo.py` in the root of the repository is the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from contextlib import closing

from llava.errors import FlagError
from llava.runtime.program import run_program
from llava.runtime.ranges import COUNT, Range, check_ranges
from mma.lavin.eval_options import MODEL_RANGES, add_model_options

DEFAULTS = {
    "ckpt_dir": "../data/weights/",
    "llm_model": "13B",
    "max_seq_len": 512,
    "adapter_type": "attn",
    "adapter_path": "./15-eph-pretrain.pth",
    "temperature": 5.0,
}
"""Of the original's options; they differ from those of its evaluation. Of the kind of adapters a checkpoint tells."""


PAGE_RANGES = {"max_new_tokens": COUNT, "server_port": Range(0, 65535)}
"""What the numbers of the page may be."""


def build_parser() -> argparse.ArgumentParser:
    """The original's options and ours."""
    parser = argparse.ArgumentParser(
        prog="python -m mma.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_model_options(parser)
    for action in parser._actions:
        action.required, action.default = False, DEFAULTS.get(action.dest, action.default)
    add = parser.add_argument_group("page").add_argument
    add("--server_name", type=str, default="127.0.0.1", help="address to listen at; 0.0.0.0: all of this machine's")
    add("--server_port", type=int, default=None, help="port; default: the first free one from 7860")
    add("--options", nargs="+", default=None, help="refused: settings of the original's LaVIN come from the checkpoint")
    add("--max_new_tokens", type=int, default=256, help="longest answer that the page offers")
    add("--max_batch_size", type=int, default=4, help="questions of several visitors answered together")
    add("--original_prompt", action="store_true", help="the words of the original's demo, its slips included")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the page until the user ends the program.

    Raises:
        LlavaError: a flag or the checkpoint is wrong; the message says what to do.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(words)
    check_ranges(args, MODEL_RANGES | PAGE_RANGES)
    if args.options:
        raise FlagError(f"--options {' '.join(args.options)}: has no effect in the original; leave it out")
    if importlib.util.find_spec("gradio") is None:
        raise FlagError("the demo needs gradio: pip install 'llava-extensions[serve]'")
    from llava.eval.answering.loading import choose_device
    from llava.eval.answering.processes import joined
    from llava.serve.engine import Engine
    from llava.serve.uploads import launch_limits
    from mma.lavin.answering import find_folders, given_options, load_lavin
    from mma.lavin.chat import LavinChat
    from mma.lavin.page import build_page

    given = given_options(build_parser(), words)
    with joined() as processes:
        if processes.count > 1:
            raise FlagError(f"{processes.count} processes: one page is served by one; start with --nproc_per_node 1")
        folders = find_folders(args, given, processes)
        engine = Engine(load_lavin(args, given, folders, choose_device(args.device)), args.max_batch_size)
    engine.start()
    with closing(engine):
        page = build_page(LavinChat(engine, args.original_prompt), args.max_new_tokens)
        page.launch(server_name=args.server_name, server_port=args.server_port, **launch_limits())


if __name__ == "__main__":
    run_program(main)

"""Published adapters of LaVIN to a checkpoint folder of ours, and back to the original's file.

python -m mma.convert import ./15-eph-pretrain.pth ./checkpoints/lavin-13b --base ./checkpoints/llama-13b
python -m mma.convert export ./checkpoints/lavin-7b ./lavin-7b.pth

The folder holds adapters, modality embedding and projector, and loads on its base by `load_pretrained_model`, as what
a run of ours wrote. The weights of the language model are not read for either.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from llava.runtime.program import run_program
from mma.config import TOWER


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m mma.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    reading = commands.add_parser("import", help="write a checkpoint folder from a .pth file of the original")
    reading.add_argument("file", type=Path, help="what the original's training wrote, or a published file")
    reading.add_argument("output", type=Path, help="folder to write; must not exist")
    reading.add_argument(
        "--base", required=True, help="language model in transformers' layout; see python -m mma.weights"
    )
    reading.add_argument("--vision_tower", default=TOWER, help="folder or hub id of the tower")
    reading.add_argument(
        "--adapter_scale", type=float, help="where the file does not say it; the original's default is 1"
    )
    reading.add_argument(
        "--temperature", type=float, help="where the file does not say it; the original's default is 10"
    )
    writing = commands.add_parser("export", help="write a .pth file of the original from a checkpoint folder")
    writing.add_argument("checkpoint", type=Path, help="folder of a training run with --mma True")
    writing.add_argument("output", type=Path, help="file to write; must not exist")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    args = build_parser().parse_args(argv)
    from mma.lavin.adapter_files import export_file, import_file
    from mma.original import SETTINGS

    if args.command == "export":
        print(f"written: {export_file(args.checkpoint, args.output)}")
        return
    settings = {name: getattr(args, name) for name in SETTINGS}
    written = import_file(args.file, args.output, args.base, args.vision_tower, **settings)
    print(f"written: {written}")
    print(
        f"next: python -m mma.eval --adapter_path {written} --ckpt_dir {args.base} --data_root DATA --caption_file FILE"
    )


if __name__ == "__main__":
    run_program(main)

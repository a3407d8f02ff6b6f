"""Write the launch scripts of this project into a folder, to run and to change them there.

    python -m llava.scripts DIR

`DIR/scripts` and `DIR/run` appear, with the paths that the documentation names. Nothing is overwritten.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from llava.errors import FlagError, LlavaError
from llava.runtime.output import new_path
from llava.runtime.program import run_program
from llava.scripts.files import FOLDERS, launch_files, source


def build_parser() -> argparse.ArgumentParser:
    """Command line of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.scripts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="created if needed; '.' is the current folder")
    return parser


def write_scripts(folder: Path, root: Path | None = None) -> list[Path]:
    """Copy the launch scripts with their modes: all of them, or none.

    Args:
        folder: gets `scripts/` and `run/`; created if needed.
        root: where they come from; None is the installed package, or the clone.

    Returns:
        the paths written.

    Raises:
        FlagError: `folder` has a `scripts` or a `run` already, or cannot be written.
        LlavaError: the installation has no scripts.
    """
    root = root or source()
    if root is None:
        raise LlavaError(f"{Path(__file__).parent}: no launch scripts here; install llava-extensions again")
    taken = [folder / name for name in FOLDERS if os.path.lexists(folder / name)]
    if taken:
        raise FlagError(f"{', '.join(map(str, taken))}: already exists; choose another DIR")
    files = launch_files(root)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Both get their names when both are complete, so that a full disk leaves nothing half-written under them.
        with contextlib.ExitStack() as stack:
            partial = {name: stack.enter_context(new_path(folder / name)) for name in FOLDERS}
            for file in files:
                target = partial[file.parts[0]].joinpath(*file.parts[1:])
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(root / file, target)
    except OSError as error:
        raise FlagError(f"{error.filename or folder}: cannot be written ({error.strerror})") from error
    return [folder / file for file in files]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program."""
    folder = build_parser().parse_args(argv).folder
    written = write_scripts(folder)
    print(f"written: {len(written)} files in {' and '.join(str(folder / name) for name in FOLDERS)}")
    print(f"for example: bash {shlex.quote(str(folder / 'scripts' / 'MLLM_HydraLoRA.sh'))}")


if __name__ == "__main__":
    run_program(main)

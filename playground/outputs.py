"""What an earlier demo has trained: recognized by its own record before it is deleted, entry by entry.

A folder of a user, of another run, or one to which somebody has added a file is refused and stays as it is.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from llava.errors import FlagError, LlavaError
from llava.runtime.files import read_json
from llava.runtime.output import describe_entry, is_ours
from llava.runtime.weights.completeness import RUN_FILE
from playground.generate import BASE

WRITTEN = (
    *("*.json", "*.safetensors", "tokenizer.model", "*.jinja", "*.jsonl", "extensions", "vision_tower"),
    *("checkpoint-*", "training_args.bin", "README.md", "runs"),
)
"""Names on the first level of a run's output folder."""


def _is_of_a_demo(output: Path) -> bool:
    """Whether the record in a folder says that a run of this name on the playground's base wrote into it."""
    if output.is_symlink() or not (output / RUN_FILE).is_file():
        return False
    try:
        arguments = read_json(output / RUN_FILE)["arguments"]
        names = [Path(arguments["training"]["output_dir"]).name, Path(arguments["model"]["model_name_or_path"]).name]
    except (LlavaError, KeyError, TypeError):
        return False
    return names == [output.name, BASE]


def check_removable(output: Path) -> None:
    """Refuse a folder that an earlier demo has not trained; one that is missing or empty passes.

    Raises:
        FlagError: something else has the name, or the folder contains what no run wrote; it is left as it is.
    """
    if not os.path.lexists(output) or (output.is_dir() and not output.is_symlink() and not any(output.iterdir())):
        return
    if not _is_of_a_demo(output):
        raise FlagError(
            f"{output}: is in the way: {describe_entry(output)} that no run of this program has written. It is left as "
            "it is; move it away, or choose another --results"
        )
    foreign = [
        entry.name
        for entry in sorted(output.iterdir())
        if not (is_ours(entry) if entry.name.startswith("tmp-") else any(map(entry.match, WRITTEN)))
    ]
    if foreign:
        raise FlagError(
            f"{output}: contains {foreign[:3]}, which no run of this program has written. It is left as it is; move "
            "them away, or choose another --results"
        )


def remove_earlier_run(output: Path) -> None:
    """Delete what an earlier demo has trained, if there is something.

    Raises:
        FlagError: as of `check_removable`.
    """
    check_removable(output)
    if output.is_dir():
        shutil.rmtree(output)

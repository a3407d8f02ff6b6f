"""Writing folders so that a kill at any moment leaves what was there before whole.

Everything is written into a folder whose name begins with `tmp-` and gets its real name, in one step, when it is
complete and on the disk. Such a folder holds a marker (`llava.runtime.output`): a folder with it is a leftover of a
killed run, which nothing reads and the next run removes; one without it is somebody else's and is left alone.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint, sort_checkpoints

from llava.errors import FlagError
from llava.runtime.output import MARKER, claim, describe_entry, discard, flush, flush_name, is_ours, put_in_place
from llava.runtime.places import Input, refuse_folder
from llava.runtime.weights.completeness import FILE_LIST

STAGING_PREFIX = "tmp-"
FINAL = f"{STAGING_PREFIX}final"
STATE_FILE = "trainer_state.json"

CHECKPOINT_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
STAGING_NAME = re.compile(rf"{STAGING_PREFIX}(old-)?{PREFIX_CHECKPOINT_DIR}-\d+|{FINAL}|{STAGING_PREFIX}universal")
"""Names that a run needs for itself in its output folder."""


def staging_path(target: Path) -> Path:
    """The folder in which `target` is written until it is complete: next to it, so that renaming never copies."""
    return target.with_name(STAGING_PREFIX + target.name)


def publish_folder(staged: Path, target: Path) -> None:
    """Give a complete folder its real name. A checkpoint of that name is replaced; it stays whole until then.

    Raises:
        FlagError: something else than a checkpoint of a run has the name; it is left as it is.
    """
    flush(staged)
    if os.path.lexists(target):
        retire(target)
    put_in_place(staged, target)
    flush_name(target)


def publish_files(staged: Path, target: Path) -> None:
    """Move every file of a complete temporary folder into an existing one, each in one step, and remove the first."""
    flush(staged)
    # Their record first: without the files that it names, nobody takes a part of them for the whole.
    files = sorted((path for path in staged.rglob("*") if path.is_file()), key=lambda path: path.name != FILE_LIST)
    for source in (path for path in files if path.name != MARKER):
        destination = target / source.relative_to(staged)
        destination.parent.mkdir(parents=True, exist_ok=True)
        put_in_place(source, destination)
    discard(staged)
    flush_name(target)


def is_checkpoint(folder: Path) -> bool:
    """Whether a run wrote `checkpoint-N`: its state says that it was made after update N."""
    name = CHECKPOINT_NAME.fullmatch(folder.name)
    if name is None or folder.is_symlink() or not folder.is_dir():
        return False
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(state, dict) and state.get("global_step") == int(name.group(1))


def retire(folder: Path) -> None:
    """Delete a checkpoint of a run; a kill meanwhile leaves no half of it under its real name.

    Raises:
        FlagError: the folder is something else; it is left as it is.
    """
    if not is_checkpoint(folder):
        raise FlagError(f"{folder}: {_not_a_checkpoint(folder)}")
    doomed = folder.with_name(f"{STAGING_PREFIX}old-{folder.name}")
    discard(doomed)
    claim(doomed)
    put_in_place(folder, doomed / folder.name)
    discard(doomed)


def _not_a_checkpoint(folder: Path) -> str:
    return (
        f"has the name of a checkpoint, but is {describe_entry(folder)} that no run wrote (its {STATE_FILE} does not "
        "say that it was made after that update). It is left as it is; move it away, or choose another --output_dir"
    )


def remove_leftovers(output: Path) -> list[str]:
    """Delete what a killed run left half-written in its output folder; returns the names.

    Folders without the marker stay, whatever they are called.
    """
    if not output.is_dir():
        return []
    found = sorted([*output.glob(f"{STAGING_PREFIX}*"), *output.glob(f"*/{FINAL}")])
    return [path.relative_to(output).as_posix() for path in found if discard(path)]


def _in_the_way(output: Path) -> list[str]:
    """What is in an output folder under a name that the run needs, and was not written by a run."""
    if not output.is_dir():
        return []
    problems = []
    for path in sorted(output.iterdir()):
        if CHECKPOINT_NAME.fullmatch(path.name) and not is_checkpoint(path):
            problems.append(f"{path}: {_not_a_checkpoint(path)}")
        if STAGING_NAME.fullmatch(path.name) and not is_ours(path) and not _is_empty(path):
            problems.append(
                f"{path}: has a name under which a run writes, but is {describe_entry(path)} that no run wrote. It is "
                "left as it is; move it away, or choose another --output_dir"
            )
    return problems


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and not any(path.iterdir())


def prepare_folder(output: Path, inputs: Sequence[Input] = ()) -> None:
    """Make the output folder of a run, or clear it of what an interrupted one left half-written.

    Args:
        output: the folder.
        inputs: what the run reads; the folder must not fall on any of it.

    Raises:
        FlagError: the folder falls on an input, holds something in the way, or cannot be written; nothing is changed.
    """
    refuse_folder("--output_dir", output, inputs)
    problems = _in_the_way(output)
    if problems:
        raise FlagError("\n  ".join(problems))
    try:
        output.mkdir(parents=True, exist_ok=True)
        leftovers = remove_leftovers(output)
    except OSError as error:
        raise FlagError(f"--output_dir {output}: cannot be written ({error.strerror})") from error
    if leftovers:
        print(f"{output}: removed what an interrupted run left half-written: {', '.join(leftovers)}")


def last_checkpoint(output: Path) -> str:
    """What to say about the newest whole checkpoint of a run that broke off."""
    found = get_last_checkpoint(str(output)) if output.is_dir() else None
    if found is None:
        return "There is no checkpoint yet."
    return f"The last checkpoint is whole: {found}; the same command continues from it."


def rotate(output: Path, limit: int | None, best: str | None = None) -> None:
    """Delete the oldest checkpoints beyond `--save_total_limit`, never the newest nor the best one.

    Only what `is_checkpoint` knows for one counts and is deleted.
    """
    if limit is None or limit <= 0:
        return
    found = [Path(path) for path in sort_checkpoints(str(output), use_mtime=False)]
    checkpoints = [path for path in found if is_checkpoint(path)]
    if not checkpoints:
        return
    keep = {checkpoints[-1], *([Path(best)] if best else [])}
    surplus = max(0, len(checkpoints) - max(limit, len(keep)))
    for folder in [path for path in checkpoints if path not in keep][:surplus]:
        retire(folder)

"""Writing folders so that a kill at any moment leaves what was there before whole.

Everything is written under a name that begins with `tmp-` and gets its real name, in one step, when it is complete and
on the disk. Folders of that name are leftovers of a killed run: nothing reads them, and the next run removes them.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint, sort_checkpoints

from llava.errors import FlagError

STAGING_PREFIX = "tmp-"


def staging_path(target: Path) -> Path:
    """Where `target` is written until it is complete: beside it, so that renaming never copies."""
    return target.with_name(STAGING_PREFIX + target.name)


def flush(path: Path) -> None:
    """Wait until a file, or all files of a folder, are on the disk."""
    for entry in [path, *(path.rglob("*") if path.is_dir() else ())]:
        descriptor = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def publish_folder(staged: Path, target: Path) -> None:
    """Give a complete folder its real name. A folder of that name is replaced; it stays whole until then."""
    flush(staged)
    if target.exists():
        retire(target)
    os.replace(staged, target)
    flush_name(target)


def publish_files(staged: Path, target: Path) -> None:
    """Move every file of a complete folder into an existing one, each in one step, and remove what is left of it."""
    flush(staged)
    for source in sorted(path for path in staged.rglob("*") if path.is_file()):
        destination = target / source.relative_to(staged)
        destination.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, destination)
    shutil.rmtree(staged)
    flush_name(target)


def flush_name(path: Path) -> None:
    """Wait until the name of a file or folder is on the disk."""
    descriptor = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def retire(folder: Path) -> None:
    """Delete a folder; a kill meanwhile leaves no half of it under its real name."""
    doomed = folder.with_name(f"{STAGING_PREFIX}old-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def remove_leftovers(output: Path) -> list[str]:
    """Delete what a killed run left half-written in its output folder; returns the names."""
    leftovers = sorted(output.glob(f"{STAGING_PREFIX}*")) if output.is_dir() else []
    for path in leftovers:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    return [path.name for path in leftovers]


def prepare_folder(output: Path) -> None:
    """Make the output folder of a run, or clear it of what an interrupted one left half-written.

    Raises:
        FlagError: the folder cannot be written.
    """
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
    """Delete the oldest checkpoints beyond `--save_total_limit`, never the newest nor the best one."""
    if limit is None or limit <= 0:
        return
    checkpoints = [Path(path) for path in sort_checkpoints(str(output), use_mtime=False)]
    keep = {checkpoints[-1], *([Path(best)] if best else [])}
    surplus = max(0, len(checkpoints) - max(limit, len(keep)))
    for folder in [path for path in checkpoints if path not in keep][:surplus]:
        retire(folder)

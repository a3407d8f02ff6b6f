"""Which files are launch scripts, and where they are: next to this file in a wheel, at the top of a clone.

`setup.py` runs this file by itself before anything is installed, so it imports the standard library alone.
"""

from __future__ import annotations

from pathlib import Path

FOLDERS = ("scripts", "run")
"""Written out side by side: the scripts of one find those of the other by relative paths."""

INSTALLED = "tree"
"""Folder next to this file that a wheel has and a clone does not."""


def source(package: Path | None = None) -> Path | None:
    """The folder that has `FOLDERS`.

    Args:
        package: folder of `llava.scripts`; None is the one of this file.

    Returns:
        None if they are not there: the installation is damaged.
    """
    package = package or Path(__file__).resolve().parent
    for root in (package / INSTALLED, package.parents[1]):
        if all((root / name).is_dir() for name in FOLDERS):
            return root
    return None


def launch_files(root: Path) -> list[Path]:
    """Every launch script, settings file and small program below `FOLDERS`, relative to `root`, in order."""
    found = (path.relative_to(root) for name in FOLDERS for path in (root / name).rglob("*") if path.is_file())
    return sorted(
        path
        for path in found
        if "__pycache__" not in path.parts and not any(part.startswith(".") for part in path.parts)
    )

"""Whether an output falls on an input: the one place where that is decided, for every program.

A folder that a run writes into must not be an input folder, lie inside one or contain one; a file that a program writes
must not be a file that it reads. Inside a folder of images, a folder of the run's own is fine: nothing is read from it.
Links, relative paths and other spellings of a place are seen through. A path that is empty, or that is a folder of the
whole machine, is refused as well: it stands for an unset variable.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llava.errors import FlagError

RUN_FILE = "run.json"
"""Record of a run, in its output folder; makes a folder known as one that a run writes into."""

OPEN_CLIP = "open_clip:"
"""Prefix of a tower's name whose path comes after the architecture."""


WEIGHTED = re.compile(r"(.+)@(\d+(?:\.\d+)?)")


def split_weight(name: str) -> tuple[str, float]:
    """Path and weight of `PATH@WEIGHT`; 1 where none is given, and for a path that exists under the whole name."""
    found = None if os.path.lexists(name) else WEIGHTED.fullmatch(name)
    return (name, 1.0) if found is None else (found[1], float(found[2]))


@dataclass(frozen=True)
class Input:
    """Something that a program reads.

    Attributes:
        flag: option that names it, for messages.
        path: file, folder, or name on a model hub; None or empty: not given.
        has_images: whether it is a folder of images, of which only those are read that the data names, and whose first
            level may consist of links to other folders.
    """

    flag: str
    path: str | Path | None
    has_images: bool = False

    @property
    def place(self) -> Path | None:
        """The path; of `open_clip:ARCH/FOLDER/FILE`, the file."""
        text = "" if self.path is None else str(self.path)
        if text.startswith(OPEN_CLIP):
            text = text.removeprefix(OPEN_CLIP).partition("/")[2]
        return Path(text) if text.strip() else None


def _spellings(path: Path) -> list[Path]:
    """A path as it is written and with all links followed, both absolute."""
    return [Path(os.path.abspath(path)), Path(os.path.realpath(path))]


def same_place(one: Path, other: Path) -> bool:
    """Whether two paths lead to the same file or folder, existing or not."""
    if os.path.realpath(one) == os.path.realpath(other):
        return True
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


def is_inside(inner: Path, outer: Path) -> bool:
    """Whether a path lies below a folder, by any spelling of either; False if they are the same."""
    parents = dict.fromkeys(parent for path in _spellings(inner) for parent in path.parents)
    return not same_place(inner, outer) and any(same_place(parent, outer) for parent in parents)


def _linked_folders(folder: Path) -> Iterator[Path]:
    """Folders elsewhere that the first level of a folder links to."""
    try:
        with os.scandir(folder) as entries:
            links = [entry.path for entry in entries if entry.is_symlink()]
    except OSError:
        return
    yield from (Path(link) for link in links if os.path.isdir(link))


def _machine_folder(output: Path) -> str | None:
    """What a folder is that no run should write into, if it is one."""
    places = {"the folder that the command is run in": Path.cwd(), "your home folder": Path(os.path.expanduser("~"))}
    for words, place in places.items():
        if same_place(output, place):
            return f"is {words}"
        if is_inside(place, output):
            return f"contains {words}"
    return None


def folder_problem(output: str | Path | None) -> str | None:
    """Why a run cannot have this output folder, whatever it reads; None if it can."""
    text = "" if output is None else str(output)
    if not text.strip():
        return "is empty (an unset variable?); name a folder of its own"
    if text.startswith("~"):
        return "begins with ~, which the shell has not replaced; write the whole path, or $HOME without quotes"
    path = Path(text)
    if path.is_symlink() and not path.exists():
        return "is a link to nothing; name a folder"
    if path.exists() and not path.is_dir():
        return "is a file; name a folder"
    found = _machine_folder(path)
    return None if found is None else f"{found}, and a run replaces and deletes files in its folder; name a new one"


def _is_own(output: Path) -> bool:
    """Whether a folder belongs to a run alone: there is nothing yet, or what a run with a record has written."""
    if not output.exists():
        return True
    return output.is_dir() and ((output / RUN_FILE).is_file() or not any(output.iterdir()))


def _relation(output: Path, one: Input) -> str | None:
    place = one.place
    if place is None:
        return None
    if same_place(output, place):
        return "is also"
    if place.exists() and is_inside(place, output):
        return "contains"
    if one.has_images and any(same_place(output, link) or is_inside(output, link) for link in _linked_folders(place)):
        return "lies behind a link in"
    if is_inside(output, place) and not (one.has_images and _is_own(output)):
        return "lies inside"
    return None


def folder_problems(flag: str, output: str | Path | None, inputs: Iterable[Input]) -> list[str]:
    """All reasons why a run must not write into a folder, one line each.

    Args:
        flag: option that names the folder.
        output: the folder; need not exist.
        inputs: what the run reads.
    """
    shown = "''" if output is None or not str(output).strip() else output
    problem = folder_problem(output)
    if problem is not None:
        return [f"{flag} {shown}: {problem}"]
    found = [(one, _relation(Path(str(output)), one)) for one in inputs]
    return [
        f"{flag} {shown}: {relation} {one.flag} {one.path}, which the run reads; an output must not fall on an input: "
        "name another folder"
        for one, relation in found
        if relation is not None
    ]


def refuse_folder(flag: str, output: str | Path | None, inputs: Iterable[Input]) -> None:
    """Raise if a run must not write into a folder.

    Raises:
        FlagError: see `folder_problems`.
    """
    problems = folder_problems(flag, output, inputs)
    if problems:
        raise FlagError("\n  ".join(problems))


def refuse_additions(flag: str, output: str | Path | None, inputs: Iterable[Input]) -> None:
    """Raise if a program that only adds new files must not add them to a folder: it is an input, or inside one.

    Args:
        flag: option that names the folder.
        output: the folder; need not exist.
        inputs: what the program reads.

    Raises:
        FlagError: the folder is, or is inside, an input, or `output` is empty or a link to nothing.
    """
    if output is None or not str(output).strip():
        raise FlagError(f"{flag} '': is empty (an unset variable?); name a folder of its own")
    if str(output).startswith("~"):
        raise FlagError(f"{flag} {output}: begins with ~, which the shell has not replaced; write the whole path")
    if Path(output).is_symlink() and not Path(output).exists():
        raise FlagError(f"{flag} {output}: is a link to nothing; name a folder")
    for one in inputs:
        place = one.place
        if place is not None and (same_place(Path(output), place) or is_inside(Path(output), place)):
            relation = "is also" if same_place(Path(output), place) else "is inside"
            raise FlagError(
                f"{flag} {output}: {relation} {one.flag} {one.path}, which the program reads; an output must not fall "
                "on an input: name another folder"
            )


def refuse_file(flag: str, output: str | Path | None, inputs: Sequence[Input], *, also: Iterable[Path] = ()) -> None:
    """Raise if a program must not write a file: it is a file that it reads, or no name of a file.

    A new file inside an input folder is fine: answers are kept next to the questions and images of a benchmark.

    Args:
        flag: option that names the file.
        output: the file.
        inputs: what the program reads.
        also: files that are written along with it.

    Raises:
        FlagError: the file, or one of `also`, is an input, or `output` is empty or a folder.
    """
    if output is None or not str(output).strip() or str(output) == ".":
        raise FlagError(f"{flag} '': is empty (an unset variable?); name a file")
    if str(output).startswith("~"):
        raise FlagError(f"{flag} {output}: begins with ~, which the shell has not replaced; write the whole path")
    if Path(output).is_dir():
        raise FlagError(f"{flag} {output}: is a directory; name a file")
    for path in (Path(output), *also):
        for one in inputs:
            place = one.place
            if place is not None and (same_place(path, place) or (place.is_file() and is_inside(path, place))):
                written = "is" if path == Path(output) else f"would write {path}, which is"
                raise FlagError(
                    f"{flag} {output}: {written} also {one.flag} {one.path}, which the program reads; name another file"
                )

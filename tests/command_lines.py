"""Command lines that the README, the documents and the shell scripts contain, found by running them with stand-ins.

bash itself expands variables, loops and line continuations; `python`, `torchrun` and the like are replaced on PATH by
a program that only notes how it was called. So a test sees exactly the arguments that a user's machine would see.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

LAUNCHERS = ("python", "python3", "torchrun", "deepspeed", "accelerate")
OTHER_PROGRAMS = ("make", "git", "pip", "uv", "srun", "conda", "nvidia-smi", "opencompass")
INPUT_FILES = frozenset({".json", ".jsonl", ".bin", ".safetensors", ".txt", ".csv", ".tsv"})

# Each call goes to a file of its own, so that calls in the background do not mix.
# A program that answers questions leaves a file, which the scripts read on.
NOTE_THE_CALL = """#!/bin/sh
printf '%s\\0' "${0##*/}" "$@" > "$(mktemp "$COMMAND_LINES/XXXXXXXX")"
while [ $# -gt 1 ]; do
    if [ "$1" = --answers-file ]; then mkdir -p "$(dirname "$2")" && : > "$2"; fi
    shift
done
"""


@dataclass(frozen=True)
class Call:
    """One call of a program of ours.

    Attributes:
        module: dotted name of the program, for example `llava.train.train_mem`.
        arguments: what it was given.
    """

    module: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Snippet:
    """A piece of shell: a script, or a fenced block of a document.

    Attributes:
        name: file, and for a block the line it starts at.
        text: the shell code.
    """

    name: str
    text: str


def scripts() -> list[Snippet]:
    """Every shell script in `run/` and `scripts/`."""
    paths = sorted(path for folder in ("run", "scripts") for path in (ROOT / folder).rglob("*.sh"))
    return [Snippet(path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")) for path in paths]


def documents() -> list[Path]:
    """What people read: the README, that of every package and experiment, and `docs/`."""
    readmes = [*ROOT.glob("*/README.md"), *(ROOT / "benchmarks" / "experiments").glob("*/README.md")]
    return [ROOT / "README.md", *sorted(readmes), *sorted((ROOT / "docs").rglob("*.md"))]


def document_blocks() -> list[Snippet]:
    """Every block fenced as bash, sh or shell in the READMEs and in `docs/`."""
    found = []
    for path in documents():
        text = path.read_text(encoding="utf-8")
        for match in re.finditer(r"^```(?:bash|sh|shell)\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            line = text.count("\n", 0, match.start()) + 1
            found.append(Snippet(f"{path.relative_to(ROOT).as_posix()}:{line}", match.group(1)))
    return found


def run_with_stand_ins(snippet: Snippet, folder: Path) -> list[list[str]]:
    """Run `snippet` in a copy of the shell folders under `folder`; returns the noted calls, program first.

    Raises:
        AssertionError: the snippet ends with an error.
    """
    programs, notes, tree = folder / "programs", folder / "notes", folder / "tree"
    for path in (programs, notes, tree):
        path.mkdir()
    for name in (*LAUNCHERS, *OTHER_PROGRAMS):
        (programs / name).write_text(NOTE_THE_CALL, encoding="utf-8")
        (programs / name).chmod(0o755)
    for name in ("run", "scripts"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name)
    script = tree / (snippet.name if snippet.name.endswith(".sh") else "block.sh")
    script.write_text(snippet.text, encoding="utf-8")
    environment = {
        "PATH": f"{programs}:{os.defpath}",
        "COMMAND_LINES": str(notes),
        "HOME": str(folder),
        "CUDA_VISIBLE_DEVICES": "0,1",
    }
    done = subprocess.run(
        ["bash", str(script)], cwd=tree, env=environment, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, f"{snippet.name} ends with {done.returncode}: {done.stderr}"
    calls = [path.read_text(encoding="utf-8").split("\0")[:-1] for path in sorted(notes.iterdir())]
    # The scripts name their own files by absolute paths, so that they run in any folder.
    return [[word.replace(f"{tree.resolve()}/", "./") for word in call] for call in calls]


def our_call(command: list[str]) -> Call | None:
    """What a noted command starts of our own programs; None for other programs (make, git, `python -m venv`)."""
    if command[0] not in LAUNCHERS:
        return None
    for position, word in enumerate(command[1:], start=1):
        if word.endswith(".py"):
            name = word.removeprefix(f"{ROOT}/").removeprefix("./").removesuffix(".py")
            return Call(name.replace("/", "."), tuple(command[position + 1 :]))
        if word in ("-m", "--module") and (ROOT / command[position + 1].partition(".")[0]).is_dir():
            return Call(command[position + 1], tuple(command[position + 2 :]))
    return None


def with_relative_paths(call: Call) -> Call:
    """`call` with absolute paths (upstream's placeholders, as `/path/to/images`) below the current folder."""
    return Call(call.module, tuple(f"root{word}" if word.startswith("/") else word for word in call.arguments))


def create_inputs(call: Call, folder: Path) -> None:
    """Create the relative inputs that a call names, so that existence checks pass: empty or the repository's own."""
    for flag, root in zip(call.arguments, call.arguments[1:], strict=False):
        if flag == "--data_root":  # LaVIN's data, known by the names of its files
            (folder / root / "images").mkdir(parents=True, exist_ok=True)
            for name in ("problems.json", "pid_splits.json", "all_data.json"):
                (folder / root / name).touch()
    for word in call.arguments:
        if word.startswith("auto:"):  # what hydralora.components writes
            counted = folder / word.removeprefix("auto:")
            counted.parent.mkdir(parents=True, exist_ok=True)
            counted.write_text('{"suggested": 3}', encoding="utf-8")
        path = folder / word
        if word.startswith("-") or "/" not in word or Path(word).is_absolute() or path.exists():
            continue
        if (ROOT / word).is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / word, path)
        elif path.suffix in INPUT_FILES:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        else:
            path.mkdir(parents=True)

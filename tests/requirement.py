"""Print what pyproject.toml asks of a dependency: `python tests/requirement.py peft` prints `peft>=...,<...`.

`make test-peft` installs the lowest version of it. Nothing but the standard library is needed.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirement(name: str) -> str:
    """The requirement of that name among the core dependencies.

    Raises:
        LookupError: there is none.
    """
    dependencies = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    for line in dependencies:
        if re.split(r"[<>=!~\[ ]", line)[0] == name:
            return line
    raise LookupError(f"{PROJECT}: no dependency '{name}'")


if __name__ == "__main__":
    print(requirement(sys.argv[1]))

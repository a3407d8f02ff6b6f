"""Whether the installed libraries are ones that this project was tested with.

The ranges are those of `pyproject.toml`, as the installed package carries them. pip keeps to them; who installs another
version all the same is told once, when the first model is made, and the program continues.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement

PROJECT = "llava-extensions"

LIBRARIES = ("torch", "transformers", "peft", "accelerate")
"""Whose versions change how a model computes."""


class UntestedVersionWarning(UserWarning):
    """An installed library is outside the range that the tests have run on."""


def outside_tested_range(names: Iterable[str] = LIBRARIES) -> list[str]:
    """One sentence for each library whose installed version is outside its tested range.

    Args:
        names: of requirements without an extra.
    """
    try:
        requirements = [Requirement(line) for line in requires(PROJECT) or ()]
    except PackageNotFoundError:  # run from files that were never installed: no range is recorded anywhere
        return []
    found = []
    for requirement in requirements:
        if requirement.marker is not None or requirement.name not in set(names):
            continue
        installed = version(requirement.name)
        # A development version counts as the release that it leads to.
        if not requirement.specifier.contains(installed, prereleases=True):
            found.append(
                f"{requirement.name} {installed} is not among the versions that {PROJECT} was tested with "
                f"({requirement.name}{requirement.specifier})"
            )
    return found


@functools.cache
def warn_once() -> None:
    """Warn of every library outside its tested range, once per process."""
    for sentence in outside_tested_range():
        warnings.warn(
            f"{sentence}. It may work; if something fails, install a tested version first.",
            UntestedVersionWarning,
            stacklevel=3,
        )

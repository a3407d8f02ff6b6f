"""Import every module with the core dependencies only (`make test-core`).

Runs in an environment of its own without pytest, so it is a program: it fails if an extra is installed after all, if a
package is empty, or if a module imports something that only an extra brings. Start it with `python -P`: the folders
beside it have the names of the packages.
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("llava", "hydralora", "dynamic", "mma", "moe_patch", "playground")

# One package of each extra: their absence shows that this environment really is the core alone.
EXTRAS = (
    "deepspeed",
    "datasets",
    "wandb",
    "bitsandbytes",
    "flash_attn",
    "open_clip",
    "gradio",
    "sklearn",
    "lm_eval",
    "lmms_eval",
    "matplotlib",
    "pytest",
)


def modules_of(package: str) -> Iterator[str]:
    """Names of `package` and of every module below it.

    Raises:
        ImportError: a sub-package cannot be imported.
    """
    yield package
    found = importlib.import_module(package)
    yield from (module.name for module in pkgutil.walk_packages(found.__path__, f"{package}.", onerror=_raise))


def _raise(name: str) -> None:
    raise ImportError(f"cannot import the package {name}")


def main() -> None:
    """Import everything and print how many modules were imported."""
    sys.path.append(str(ROOT))  # last: for `playground` alone, which is not installed
    present = [name for name in EXTRAS if importlib.util.find_spec(name)]
    if present:
        sys.exit(f"this environment is not the core alone: {', '.join(present)} can be imported")
    for package in PACKAGES:
        names = list(modules_of(package))
        if len(names) < 2:
            sys.exit(f"{package} holds no modules; is it installed?")
        for name in names:
            importlib.import_module(name)
        print(f"{package}: {len(names)} modules import with the core dependencies only")


if __name__ == "__main__":
    main()

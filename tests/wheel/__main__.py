"""Build the wheel, install it in an empty environment, and use it outside the repository (`make test-wheel`)."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from tests.wheel.environment import ROOT, Environment, WheelError, build, check_content, check_origin, export, install
from tests.wheel.programs import STEPS, lay_out_inputs

T = TypeVar("T")


def timed(name: str, step: Callable[[], T]) -> T:
    """Run a step and print how long it took."""
    started = time.monotonic()
    result = step()
    print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    return result


def check_the_checks(environment: Environment) -> None:
    """The negative control: programs that see the clone are recognized.

    Raises:
        WheelError: they are not, so the check of the origin proves nothing.
    """
    try:
        check_origin(environment, {"PYTHONPATH": str(ROOT)})
    except WheelError:
        return
    raise WheelError("a package that comes from the clone was taken for an installed one")


def main() -> None:
    """Run everything; the first problem ends it with status 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.wheel", description=__doc__)
    parser.add_argument(
        "--environment", type=Path, default=ROOT / ".venv-wheel", help="replaced (default: %(default)s)"
    )
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="wheel-") as folder:
        clean, dist, work = (Path(folder) / name for name in ("clean", "dist", "work"))
        for path in (clean, dist, work):
            path.mkdir()
        environment = Environment(arguments.environment.resolve(), work)
        try:
            wheel = timed("build", lambda: build(export(clean), dist))
            print(f"{wheel.name}: {check_content(wheel, clean)} files, those of the tree")
            timed("install", lambda: install(wheel, environment.folder))
            timed("origin", lambda: check_origin(environment))
            check_the_checks(environment)
            lay_out_inputs(work)
            for step in STEPS:
                timed(step.__name__, lambda step=step: step(environment))
        except WheelError as error:
            sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

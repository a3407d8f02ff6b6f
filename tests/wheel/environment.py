"""A wheel built from a clean copy of the tree, and an environment with nothing but that wheel and its dependencies."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from llava.scripts.files import INSTALLED, launch_files

ROOT = Path(__file__).resolve().parents[2]
CONSTRAINTS = ROOT / "constraints.txt"
PACKAGES = ("llava", "hydralora", "dynamic", "mma", "moe_patch")
EXTRAS = "serve"
DOCUMENTS = frozenset({".md"})
"""What lies in a package for readers of the repository and is not installed."""

# Not passed on: they would let programs see more than the environment.
HIDDEN = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "PYTHONDONTWRITEBYTECODE")


SECONDS = 900
"""What one program may take on a busy machine; each takes a few seconds on an idle one."""


class WheelError(Exception):
    """The wheel or what runs from it is not as it should be."""


@dataclass(frozen=True)
class Environment:
    """An environment with the wheel.

    Attributes:
        folder: the virtual environment.
        work: folder outside the repository that every program starts in.
    """

    folder: Path
    work: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    def variables(self, more: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a shell with this environment activated has, no path into the repository among it."""
        kept = {name: value for name, value in os.environ.items() if name not in HIDDEN}
        return kept | {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", "HF_HUB_OFFLINE": "1"} | dict(more or {})

    def run(self, words: Sequence[str | Path], more: Mapping[str, str] | None = None) -> str:
        """Run a program in `work`; its output.

        Raises:
            WheelError: it ends with another status than 0, or not within `SECONDS`.
        """
        command, pipe = " ".join(map(str, words)), subprocess.PIPE
        with subprocess.Popen(
            [str(word) for word in words],
            cwd=self.work,
            env=self.variables(more),
            stdin=subprocess.DEVNULL,
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,
        ) as process:
            try:
                out, err = process.communicate(timeout=SECONDS)
            except subprocess.TimeoutExpired as error:
                os.killpg(process.pid, signal.SIGKILL)  # with what a script has started
                raise WheelError(f"{command} takes longer than {SECONDS} s") from error
        if process.returncode != 0:
            raise WheelError(f"{command} ended with status {process.returncode}:\n{out[-4000:]}{err[-4000:]}")
        return out

    def code(self, text: str, more: Mapping[str, str] | None = None) -> str:
        """Run a piece of Python; its output."""
        return self.run([self.python, "-c", text], more)


def export(target: Path) -> Path:
    """Copy what git tracks or would track into `target`: no build leftovers, no outputs of runs."""
    listing = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listing.stdout.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)
    return target


def build(clean: Path, dist: Path) -> Path:
    """Build source distribution and wheel, the wheel out of the source distribution; the path of the wheel."""
    _uv("build", "--quiet", "--build-constraint", CONSTRAINTS, "--out-dir", dist, clean)
    (wheel,) = dist.glob("*.whl")
    return wheel


def expected_files(clean: Path) -> dict[str, bool]:
    """Files that a wheel of this tree has, apart from its metadata, and whether each may be executed."""
    found = {
        path.relative_to(clean): path
        for package in PACKAGES
        for path in (clean / package).rglob("*")
        if path.is_file() and path.suffix not in DOCUMENTS and "__pycache__" not in path.parts
    }
    found |= {Path("llava", "scripts", INSTALLED, path): clean / path for path in launch_files(clean)}
    return {name.as_posix(): os.access(path, os.X_OK) for name, path in found.items()}


def check_content(wheel: Path, clean: Path) -> int:
    """Compare the wheel with the tree; the number of its files.

    Raises:
        WheelError: a file is missing, is there and should not be, or lost its executable bit.
    """
    with zipfile.ZipFile(wheel) as archive:
        found = {
            item.filename: bool(item.external_attr >> 16 & 0o111)
            for item in archive.infolist()
            if not PurePosixPath(item.filename).parts[0].endswith(".dist-info")
        }
    expected = expected_files(clean)
    problems = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"should not be there: {name}" for name in sorted(found.keys() - expected.keys())]
    problems += [f"executable bit lost: {name}" for name, bit in expected.items() if bit and not found.get(name, True)]
    if problems:
        raise WheelError(f"{wheel.name}: " + "; ".join(problems[:20]))
    return len(found)


def install(wheel: Path, folder: Path) -> None:
    """Make an empty environment and install the wheel into it, with dependencies and `EXTRAS` as `CONSTRAINTS` pins."""
    _uv("venv", "--quiet", "--clear", "--python", sys.executable, folder)
    _uv("pip", "install", "--quiet", "--python", folder, "--constraint", CONSTRAINTS, f"{wheel}[{EXTRAS}]")


def check_origin(environment: Environment, more: Mapping[str, str] | None = None) -> None:
    """Make sure that our packages come from the environment and that what stays in the clone is not there.

    Raises:
        WheelError: a package is missing or comes from elsewhere, or `playground` or `tests` can be imported.
    """
    text = (
        "import importlib.util as u\n"
        f"for name in {(*PACKAGES, 'playground', 'benchmarks')!r}:\n"
        "    found = u.find_spec(name)\n"
        "    print(name, found.origin if found else '')\n"
    )
    for line in environment.code(text, more).splitlines():
        name, _, origin = line.partition(" ")
        if name not in PACKAGES and origin:
            raise WheelError(f"{name} stays in the clone, but is found at {origin}")
        if name in PACKAGES and not Path(origin).resolve().is_relative_to(environment.folder.resolve()):
            raise WheelError(f"{name} is not from {environment.folder}: {origin or 'not found'}")


def _uv(*words: str | Path) -> None:
    uv = Path(sys.executable).with_name("uv")
    subprocess.run([str(uv), *map(str, words)], cwd=ROOT, check=True)

"""What `pyproject.toml` cannot say: a wheel has the top-level folders of launch scripts as data of `llava.scripts`."""

from __future__ import annotations

import runpy
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
FILES = runpy.run_path(str(ROOT / "llava" / "scripts" / "files.py"))


class BuildWithScripts(build_py):
    """`build_py` that copies the launch scripts, and names them among its sources for a source distribution."""

    def run(self) -> None:
        """Build as usual; an editable installation finds the scripts in the clone."""
        super().run()
        if self.editable_mode:
            return
        for source, target in self._launch_scripts():
            self.mkpath(str(Path(target).parent))
            self.copy_file(source, target)

    def get_source_files(self) -> list[str]:
        """Every file that the build reads."""
        return [*super().get_source_files(), *(source for source, _ in self._launch_scripts())]

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Every file that the build writes."""
        ours = [] if self.editable_mode else [target for _, target in self._launch_scripts()]
        return [*super().get_outputs(include_bytecode), *ours]

    def _launch_scripts(self) -> list[tuple[str, str]]:
        folder = Path(self.build_lib, "llava", "scripts", FILES["INSTALLED"])
        return [(str(path), str(folder / path)) for path in FILES["launch_files"](ROOT)]


setup(cmdclass={"build_py": BuildWithScripts})

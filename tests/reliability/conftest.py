"""LaVIN's files and the training programs, once for all modules that only read them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from playground.tiny import TinyFolders
from tests.mma.lavin.lavin_files import LavinFiles, save_lavin_files
from tests.reliability.programs import Program, Whole, programs


@pytest.fixture(scope="module")
def lavin(tmp_path_factory: pytest.TempPathFactory) -> LavinFiles:
    """A tiny LLaMA and ScienceQA in LaVIN's layout."""
    return save_lavin_files(tmp_path_factory.mktemp("lavin"))


@pytest.fixture(scope="module")
def training_programs(
    lavin: LavinFiles, tiny_folders: TinyFolders, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Program]:
    """The three training programs by name."""
    return programs(lavin, tiny_folders, tmp_path_factory.mktemp("instructions"))


@pytest.fixture(scope="module")
def runs(training_programs: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Whole]:
    """Finished runs by the name of the program, each made when it is first asked for."""
    finished: dict[str, Whole] = {}

    def run(name: str) -> Whole:
        if name not in finished:
            program, folder = training_programs[name], tmp_path_factory.mktemp("whole") / "out"
            finished[name] = Whole(program, folder, program.run(folder))
        return finished[name]

    return run

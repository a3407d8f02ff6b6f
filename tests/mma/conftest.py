"""What the tests of LaVIN's command lines share: tiny files and a checkpoint trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.mma.lavin_files import LavinFiles


@pytest.fixture(scope="session")
def lavin_files(tmp_path_factory: pytest.TempPathFactory) -> LavinFiles:
    """Base weights as Meta publishes them, a tower, ScienceQA; read-only by convention."""
    from tests.mma.lavin_files import save_lavin_files

    return save_lavin_files(tmp_path_factory.mktemp("lavin"))


@pytest.fixture(scope="session")
def lavin_checkpoint(lavin_files: LavinFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `mma.train`."""
    from tests.mma.lavin_files import train_tiny

    return train_tiny(lavin_files, tmp_path_factory.mktemp("trained") / "lavin")

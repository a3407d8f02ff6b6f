"""LaVIN's files, once for all modules that only read them."""

from __future__ import annotations

import pytest

from tests.mma.lavin_files import LavinFiles, save_lavin_files


@pytest.fixture(scope="module")
def lavin(tmp_path_factory: pytest.TempPathFactory) -> LavinFiles:
    """A tiny LLaMA and ScienceQA in LaVIN's layout."""
    return save_lavin_files(tmp_path_factory.mktemp("lavin"))

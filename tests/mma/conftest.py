"""Fixtures of the tests on LaVIN: the original's coupling of images, tiny files, a checkpoint trained on them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from torch import Tensor

import mma.tower_norm

if TYPE_CHECKING:
    from tests.mma.lavin.lavin_files import LavinFiles


@pytest.fixture
def coupled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first image of a batch routes all of them, as in the original."""

    def route(adapter: Any, x: Tensor) -> Tensor:
        return adapter.route(x[:1]).expand(len(x), -1, -1)

    monkeypatch.setattr(mma.tower_norm, "route_tokens", route)


@pytest.fixture(scope="session")
def lavin_files(tmp_path_factory: pytest.TempPathFactory) -> LavinFiles:
    """Base weights as Meta publishes them, a tower, ScienceQA; read-only by convention."""
    from tests.mma.lavin.lavin_files import save_lavin_files

    return save_lavin_files(tmp_path_factory.mktemp("lavin"))


@pytest.fixture(scope="session")
def lavin_checkpoint(lavin_files: LavinFiles, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `mma.train`."""
    from tests.mma.lavin.lavin_files import train_tiny

    return train_tiny(lavin_files, tmp_path_factory.mktemp("trained") / "lavin")

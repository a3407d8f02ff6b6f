"""What several tests of training share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


@pytest.fixture
def offline_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """wandb, which writes below `tmp_path` and sends nothing.

    Its first run in a process fixes the folder of all later ones, until it is torn down.
    """
    wandb = pytest.importorskip("wandb", reason="the extra `train` is not installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    wandb.teardown()
    yield wandb
    wandb.teardown()

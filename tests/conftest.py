"""Settings and fixtures of all tests: no network, fixed seeds, few threads, nothing left behind in global state."""

from __future__ import annotations

import os

# Before the first import of transformers: the hub client reads these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "disabled"

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import ImageFile

from tests import deprecations

if TYPE_CHECKING:
    from playground.tiny import TinyFolders

ROOT = Path(__file__).resolve().parent.parent
SEED = 0


def pytest_configure(config: pytest.Config) -> None:
    """One thread per process, since the tensors are tiny and two workers share two cores; deprecations are errors."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    for line in deprecations.warning_filters():
        config.addinivalue_line("filterwarnings", line)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip `gpu` tests, with the reason, where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(autouse=True)
def _fixed_seeds_and_clean_state() -> Iterator[None]:
    """Every test starts from the same seeds and leaves the default dtype as it found it.

    lmms-eval lets Pillow read files that are cut off, in the whole process.
    """
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    random.seed(SEED)
    np.random.seed(SEED)  # the images of some tests come from numpy's global generator
    torch.manual_seed(SEED)
    dtype = torch.get_default_dtype()
    yield
    torch.set_default_dtype(dtype)


@pytest.fixture(autouse=True)
def _no_announced_removals() -> Iterator[None]:
    """Nothing that a test does is announced as deprecated in the log of a library."""
    for messages in deprecations.announcements():
        yield
        assert not messages, f"deprecated, not listed in tests/deprecations.py: {messages}"


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return ROOT


@pytest.fixture(scope="session")
def compiled_extensions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where DeepSpeed puts what it compiles (TORCH_EXTENSIONS_DIR): once per test session, for all its processes."""
    base = tmp_path_factory.getbasetemp()
    return (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "torch-extensions"


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory: pytest.TempPathFactory) -> TinyFolders:
    """A tiny CLIP tower and a tiny Llama with random weights, in the published layouts; read-only by convention."""
    from playground.tiny import build_tiny

    return build_tiny(tmp_path_factory.mktemp("tiny"))

"""Started by a launcher: `tests/llava/train/several_runs.py` with Gumbel noise of zero, to compare processes.

Noise is drawn per process; without it, two processes decide as one does on the same rows.
"""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import torch

import dynamic.training


def no_noise(shape: Any, device: Any = None) -> torch.Tensor:
    """In place of `gumbel_noise`."""
    return torch.zeros(shape, device=device)


if __name__ == "__main__":
    dynamic.training.gumbel_noise = no_noise
    runpy.run_path(str(Path(__file__).parents[1] / "llava" / "train" / "several_runs.py"), run_name="__main__")

"""In which dtype a folder has its weights, so that what is made of them can be written in the same one."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import torch

from llava import constants
from llava.errors import CheckpointError
from llava.runtime.files import read_json
from llava.runtime.weights.weight_files import weights_of

DTYPES = {name: getattr(torch, name) for name in constants.DTYPES}


def stored_dtype(folder: str | Path, advice: str = "") -> torch.dtype:
    """Dtype that a `config.json` names; where it names none, that of most numbers in the full weights.

    Args:
        folder: with `config.json`.
        advice: what to do about a dtype that is not known, for the message.

    Raises:
        CheckpointError: it is not one of `DTYPES`.
    """
    content: dict[str, Any] = read_json(Path(folder) / "config.json")
    name = str(content.get("dtype") or content.get("torch_dtype") or _of_files(Path(folder)))
    if name not in DTYPES:
        raise CheckpointError(
            f"{folder}: its config.json says that its weights are {name}; known: {sorted(DTYPES)}{advice}"
        )
    return DTYPES[name]


def _of_files(folder: Path) -> str:
    counts: Counter[str] = Counter()
    for entry in weights_of(folder).values():
        counts[str(entry.dtype).removeprefix("torch.")] += torch.Size(entry.shape).numel()
    return counts.most_common(1)[0][0] if counts else "float32"

"""Reads the golden data under `tests/golden/<system>/`: inputs and outputs recorded from the original code.

Each case is `case_<name>.json` (settings, token ids, strings, scalars) with an optional `case_<name>.safetensors`
(tensors named `in/...`, `w/...`, `out/...`, `grad/...`, `init/...`); `README.md` of each folder explains them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

GOLDEN = Path(__file__).parent / "golden"


def golden_dir(system: str) -> Path:
    """Folder with the golden data of one system, for example `llava`.

    Raises:
        FileNotFoundError: there is no golden data of that name.
    """
    folder = GOLDEN / system
    if not folder.is_dir():
        raise FileNotFoundError(f"no golden data for '{system}': {folder} does not exist")
    return folder


def load_case(system: str, name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON object and the tensors (empty dict when the case has none) of `case_<name>`.

    Args:
        system: golden folder, for example `llava`.
        name: case name without `case_` and without suffix.
    """
    path = golden_dir(system) / f"case_{name}.json"
    tensors = path.with_suffix(".safetensors")
    return json.loads(path.read_text(encoding="utf-8")), load_file(tensors) if tensors.exists() else {}

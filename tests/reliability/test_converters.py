"""Originals' files with wrong counts or numbers are refused by `hydralora.convert from-original`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from hydralora.tuner.original import CONFIG_FILE, ORIGINAL_WEIGHTS, import_adapter
from llava.errors import CheckpointError

LAYERS, EXPERTS, RANK, WIDTH = 3, 2, 4, 6
Tensors = dict[str, Tensor]


def original(folder: Path) -> Path:
    """A complete adapter of the original's layout."""
    folder.mkdir()
    tensors: Tensors = {}
    for layer in range(LAYERS):
        for name in ("q_proj", "v_proj"):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, WIDTH)
            tensors[f"{prefix}.lora_route.weight"] = torch.randn(EXPERTS, WIDTH)
            tensors |= {f"{prefix}.lora_B{number}.weight": torch.randn(WIDTH, RANK) for number in range(EXPERTS)}
    torch.save(tensors, folder / ORIGINAL_WEIGHTS)
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": RANK, "lora_alpha": 8}
    values |= {"lora_nums": EXPERTS, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    (folder / CONFIG_FILE).write_text(json.dumps(values))
    return folder


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


def each(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: change(value) if part in name else value for name, value in tensors.items()}


TENSORS: dict[str, Callable[[Tensors], Tensors]] = {
    "an expert less everywhere": without("lora_B1"),
    "a layer less": without("layers.1."),
    "a layer of one kind less": without("layers.2.self_attn.q_proj"),
    "a target less": without("v_proj"),
    "another rank": each("lora_A", lambda value: value[:-1].clone()),
    "a router of another width": each("lora_route", lambda value: value[:, :-1].clone()),
    "a router of more experts": each("lora_route", lambda value: torch.cat([value, value])),
    "NaN": each("layers.1.self_attn.q_proj.lora_A", lambda value: value * float("nan")),
    "integers": each("layers.1.self_attn.q_proj.lora_A", lambda value: value.int()),
}
SETTINGS = [
    ("lora_nums", 3),
    ("lora_nums", None),
    ("r", 8),
    ("r", "4"),
    ("lora_alpha", -1),
    ("target_modules", ["q_proj"]),
]


@pytest.mark.parametrize("kind", TENSORS)
def test_wrong_tensors(kind: str, tmp_path: Path) -> None:
    path = original(tmp_path / "original") / ORIGINAL_WEIGHTS
    torch.save(TENSORS[kind](torch.load(path, weights_only=True)), path)
    with pytest.raises(CheckpointError, match=ORIGINAL_WEIGHTS):
        import_adapter(tmp_path / "original", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(("key", "value"), SETTINGS)
def test_wrong_settings(key: str, value: object, tmp_path: Path) -> None:
    path = original(tmp_path / "original") / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match="adapter_config"):
        import_adapter(tmp_path / "original", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_complete_adapter_is_converted(tmp_path: Path) -> None:
    assert import_adapter(original(tmp_path / "original"), tmp_path / "ours").lora_nums == EXPERTS

"""Predictors among the shards of a whole model: only what is wanted is read, in every format."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from moe_patch.payload import folders

WANTED = torch.arange(6.0).reshape(2, 3)
STATE = {"model.predictor.weight": WANTED, "model.layers.0.weight": torch.zeros(1000, 1000)}
NAMES = {"safetensors": "model-1.safetensors", "bin": "pytorch_model-1.bin", "old bin": "pytorch_model-1.bin"}


def write(folder: Path, kind: str) -> Path:
    """A shard with an index."""
    path = folder / NAMES[kind]
    if kind == "safetensors":
        save_file(STATE, path)
    else:
        torch.save(STATE, path, _use_new_zipfile_serialization=kind == "bin")
    index = "model.safetensors.index.json" if kind == "safetensors" else "pytorch_model.bin.index.json"
    (folder / index).write_text(json.dumps({"weight_map": dict.fromkeys(STATE, path.name)}))
    return path


@pytest.mark.parametrize("kind", NAMES)
def test_the_wanted_tensors_are_found(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, kind)
    found = folders.read_weights(tmp_path, ("model.predictor.",))
    path.unlink()  # what was found is independent of the file
    assert list(found) == ["model.predictor.weight"]
    assert torch.equal(found["model.predictor.weight"], WANTED)
    assert found["model.predictor.weight"].untyped_storage().nbytes() == WANTED.numel() * 4


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_rest_of_a_shard_is_not_read(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, kind)
    mapped = []
    load = torch.load
    monkeypatch.setattr(torch, "load", lambda *a, **k: mapped.append(k.get("mmap")) or load(*a, **k))
    monkeypatch.setattr("safetensors.torch.load_file", lambda *_: pytest.fail("the whole shard was read"))
    folders.read_weights(tmp_path, ("model.predictor.",))
    assert mapped == ([] if kind == "safetensors" else [True])

"""`hydralora.finetune` refuses a base whose weights are damaged, incomplete or not numbers, and writes nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hydralora.finetune import main as finetune
from llava.errors import LlavaError
from tests.reliability.test_training_numbers import finetune_words

if TYPE_CHECKING:
    from playground.tiny import TinyFolders

WEIGHT = "model.layers.0.mlp.up_proj.weight"
POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 9976634558\n"


@pytest.fixture
def base(tiny_folders: TinyFolders, tmp_path: Path) -> Path:
    """A copy of the tiny Llama with its weights in one file of safetensors."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_folders.language_model, folder)
    return folder


def with_tensors(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, metadata={"format": "pt"})

    return damage


def put(value: float) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[WEIGHT].view(-1)[3] = value

    return change


def cast(dtype: torch.dtype) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(dtype)})


def edit(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "NaN": (with_tensors(put(float("nan"))), rf"model\.safetensors.*{WEIGHT}"),
    "infinite": (with_tensors(put(float("inf"))), rf"model\.safetensors.*{WEIGHT}"),
    "integers": (with_tensors(cast(torch.int64)), rf"model\.safetensors.*{WEIGHT}"),
    "bools": (with_tensors(cast(torch.bool)), rf"model\.safetensors.*{WEIGHT}"),
    "another shape": (with_tensors(lambda t: t.update({WEIGHT: t[WEIGHT][:-1].clone()})), WEIGHT),
    "a weight is missing": (with_tensors(lambda tensors: tensors.pop(WEIGHT)), rf"lacks 1 weights.*{WEIGHT}"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "holds none of"),
    "a pointer": (lambda folder: (folder / "model.safetensors").write_text(POINTER), "git lfs pull"),
    "cut off": (lambda folder: (folder / "model.safetensors").write_bytes(b"\x10" * 40), r"model\.safetensors"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json"),
    "not a language model": (edit(model_type="clip_vision_model"), "not a causal language model"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_base_that_is_refused(kind: str, base: Path, tmp_path: Path) -> None:
    damage, message = DAMAGE[kind]
    damage(base)
    with pytest.raises(LlavaError, match=message):
        finetune(finetune_words(base, tmp_path / "data", tmp_path / "out"))
    assert not list((tmp_path / "out").glob("**/*.safetensors"))


def test_the_sound_base_is_trained_on(base: Path, tmp_path: Path) -> None:
    finetune(finetune_words(base, tmp_path / "data", tmp_path / "out"))
    assert list((tmp_path / "out").glob("**/*.safetensors"))

"""Export to upstream's layout: what is written loads again with the same logits, and lies whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from llava.convert.original import export_original
from llava.errors import CheckpointError
from llava.model.formats import read_tensors
from llava.runtime.files import read_json
from llava.train.train import main as train
from tests.golden import golden_dir
from tests.llava.train.test_training import BASE, HYDRA, RECIPES, command_line, logits

pytestmark = pytest.mark.versions

ORIGINAL = golden_dir("mllm_hydralora") / "tiny-llava-v1.5-lora-mohle"


@pytest.mark.parametrize("recipe", ["lora", "hydralora, dense", "hydralora, sparse"])
def test_export(recipe: str, tmp_path: Path) -> None:
    options: dict[str, Any] = RECIPES[recipe][0]
    train(command_line(tmp_path / "ours", save_strategy="no", **options))
    export_original(tmp_path / "ours", tmp_path / "theirs", str(BASE))
    assert (logits(tmp_path / "theirs") == logits(tmp_path / "ours")).all()
    files = {path.name for path in (tmp_path / "theirs").iterdir()}
    expected = {"config.json", "adapter_config.json", "adapter_model.safetensors", "non_lora_trainables.bin"}
    assert files == (expected | {"moe_args.pth"} if "hydralora" in recipe else expected)
    assert "extensions" not in read_json(tmp_path / "theirs" / "config.json")


def test_names_are_those_of_the_original(tmp_path: Path) -> None:
    train(command_line(tmp_path / "ours", save_strategy="no", **HYDRA))
    export_original(tmp_path / "ours", tmp_path / "theirs")
    for name in ("non_lora_trainables.bin", "adapter_model.safetensors"):
        ours, theirs = read_tensors(tmp_path / "theirs" / name), read_tensors(ORIGINAL / name)
        assert {key: value.shape for key, value in ours.items()} == {key: value.shape for key, value in theirs.items()}
    assert read_json(tmp_path / "theirs" / "adapter_config.json")["target_modules"] == sorted(
        read_json(ORIGINAL / "adapter_config.json")["target_modules"]
    )


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no LoRA adapter"):
        export_original(BASE, tmp_path / "out")
    (tmp_path / "there").mkdir()
    with pytest.raises(CheckpointError, match="already exists"):
        export_original(ORIGINAL, tmp_path / "there")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]

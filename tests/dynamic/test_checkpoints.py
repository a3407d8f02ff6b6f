"""Folders of the original: found by their content, read, written back; damaged ones are refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dynamic.config import SparseConfig
from dynamic.model import predictors
from dynamic.original import add_to_folder
from llava.convert.original import export_original
from llava.errors import CheckpointError
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import save_checkpoint
from tests.dynamic.golden_model import TOWER, arch, golden_weights
from tests.golden import golden_dir, load_case

TOKENIZER = golden_dir("llava") / "tiny-llava-v1.5"
SAVED = json.loads((golden_dir("dynamic") / "table_saved_config.json").read_text(encoding="utf-8"))


def original_weights() -> dict[str, Tensor]:
    """What the original writes: everything but the vision tower."""
    return {name: tensor for name, tensor in golden_weights().items() if not name.startswith(TOWER)}


def write_original(folder: Path, tower: Path, kind: str = "single", **flags: Any) -> Path:
    """A folder as the original's trainer leaves it, with the golden model's weights.

    Args:
        folder: to create.
        tower: the golden tower's folder.
        kind: `single` or `sharded` safetensors, or `bin`, torch's format.
        flags: of the `sparse_config`.
    """
    folder.mkdir(parents=True)
    config = SAVED["config_json_of_saved_model"] | {"mm_vision_tower": str(tower)}
    config["sparse_config"] = arch()["sparse_config"] | flags
    config["max_position_embeddings"] = 256
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(TOKENIZER / name, folder / name)
    weights = original_weights()
    if kind == "single":
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    elif kind == "bin":
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        names = sorted(weights)
        table: dict[str, str] = {}
        for number, half in enumerate((names[::2], names[1::2]), start=1):
            file = f"model-0000{number}-of-00002.safetensors"
            save_file({name: weights[name] for name in half}, folder / file, {"format": "pt"})
            table |= dict.fromkeys(half, file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    return folder


def load(folder: Path) -> Any:
    return load_pretrained_model(str(folder), device="cpu")[1]


def predictor_tensors(model: Any) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model.extensions.named_parameters(model).items()}


@pytest.mark.parametrize("kind", ["single", "sharded", "bin"])
def test_an_original_folder_is_read(kind: str, golden_tower: Path, tmp_path: Path) -> None:
    folder = write_original(tmp_path / "anything", golden_tower, kind)
    tokenizer, model, _, _ = load_pretrained_model(str(folder), device="cpu")
    weights = original_weights()
    stored = predictor_tensors(model)
    assert stored.keys() == {name for name in weights if "_score_predictor." in name}
    for name, tensor in stored.items():
        assert torch.equal(tensor, weights[name])
    assert tokenizer.decode(model.config.user_marker_ids) == "USER:"


def test_logits_equal_golden(golden_tower: Path, tmp_path: Path) -> None:
    """The prefill of an end-to-end case, by the one way into a trained model."""
    case, tensors = load_case("dynamic", "generate_b1")
    model = load(write_original(tmp_path / "o", golden_tower, **case["sparse_config"]))
    logits = model(input_ids=tensors["in/input_ids"], images=tensors["in/images"]).logits
    torch.testing.assert_close(logits[:, -1], tensors["out/scores"][0], rtol=1e-4, atol=1e-4)


def test_a_predictor_that_is_switched_off_does_not_exist(golden_tower: Path, tmp_path: Path) -> None:
    model = load(write_original(tmp_path / "o", golden_tower, use_instruct_predictor=False))
    found = predictors(model)
    assert found.image is not None
    assert found.output_text is not None
    assert found.instruct is None


@pytest.mark.parametrize("kind", ["single", "sharded"])
def test_there_and_back_is_exact(kind: str, golden_tower: Path, tmp_path: Path) -> None:
    original = write_original(tmp_path / "original", golden_tower)
    model = load(original)
    ids = torch.tensor([[1, 20, -200, 30, 40, 50]])
    images = torch.randn(1, 3, 16, 16)
    expected = model(input_ids=ids, images=images).logits
    model.requires_grad_(True)
    model.get_vision_tower().requires_grad_(False)
    tokenizer = load_pretrained_model(str(original), device="cpu")[0]
    save_checkpoint(model, tmp_path / "ours", tokenizer)
    assert (tmp_path / "ours" / "extensions" / "dynamic" / "model.safetensors").is_file()
    assert torch.equal(load(tmp_path / "ours")(input_ids=ids, images=images).logits, expected)
    if kind == "sharded":
        split_weights(tmp_path / "ours")
    exported = export_original(tmp_path / "ours", tmp_path / "back")
    written: dict[str, Tensor] = {}
    for path in exported.glob("*.safetensors"):
        written |= load_file(path)
    weights = original_weights()
    assert written.keys() == weights.keys()
    for name, tensor in weights.items():
        assert torch.equal(written[name], tensor), name
    config = json.loads((exported / "config.json").read_text())
    assert config["sparse_config"] == arch()["sparse_config"]
    assert config["architectures"] == ["DynamicLlavaLlamaForCausalLM"]
    assert config["model_type"] == "llava_llama"
    assert "extensions" not in config
    assert torch.equal(load(exported)(input_ids=ids, images=images).logits, expected)


def split_weights(folder: Path) -> None:
    """Turn one file of weights into two with an index, as those of a large model."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    table: dict[str, str] = {}
    for number, half in enumerate((sorted(weights)[::2], sorted(weights)[1::2]), start=1):
        file = f"model-0000{number}-of-00002.safetensors"
        save_file({name: weights[name] for name in half}, folder / file, {"format": "pt"})
        table |= dict.fromkeys(half, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))


def test_what_is_damaged_is_refused_by_name(golden_tower: Path, tmp_path: Path) -> None:
    folder = write_original(tmp_path / "a", golden_tower)
    weights = {name: t for name, t in load_file(folder / "model.safetensors").items() if "image_score" not in name}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no tensor begins with \['model\.image_score_predictor\.'\]"):
        load(folder)
    folder = write_original(tmp_path / "b", golden_tower, vision_keep_rate=7)
    with pytest.raises(CheckpointError, match=r"config\.json: 'sparse_config': .*vision_keep_rate is 7"):
        load(folder)
    folder = write_original(tmp_path / "c", golden_tower, d_model=64)
    with pytest.raises(CheckpointError, match="has shape"):
        load(folder)


def test_predictors_have_no_place_beside_an_adapter(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no full weights"):
        add_to_folder(tmp_path, SparseConfig(), {})

"""Folders of LLaVA-1.6's layout: every tensor is used, in loading, training, merging and rewriting, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava.convert.original import export_original
from llava.errors import CheckpointError
from llava.model import apply_delta, consolidate, make_delta
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import load_full_weights
from llava.model.formats import TOWER_FOLDER, inspect_checkpoint
from llava.model.multimodal_encoder.stored import STORED_PREFIX, stored_tower
from llava.runtime.weights.tensors import read_entries
from llava.runtime.weights.weight_files import weights_of
from llava.train.train import main as train
from scripts import merge_lora_weights
from tests.llava.train.test_training import LLAVA, command_line
from tests.model.next_layout import KINDS, PINPOINTS, TEMPLATES, TOWER_NAME, write_next

pytestmark = pytest.mark.versions


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(kind: str, tmp_path: Path) -> Path:
    return write_next(kind, tmp_path / f"llava-v1.6-{kind}")


def load(folder: Path, base: Path | None = None) -> Any:
    return load_pretrained_model(str(folder), base and str(base), device="cpu")[1]


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return read_entries(weights_of(folder))


def tower_of(model: Any) -> dict[str, Tensor]:
    """Weights of the tower by their names inside full weights of transformers 4.36."""
    network = model.get_vision_tower().loaded()
    return {f"{STORED_PREFIX}vision_model.{name}": weight.detach() for name, weight in network.named_parameters()}


def assert_all_used(model: Any, tensors: dict[str, Tensor]) -> None:
    """Each tensor of the files is a weight of the model, and the other way around."""
    own = {name: weight.detach() for name, weight in model.named_parameters() if "vision_tower" not in name}
    own |= tower_of(model)
    assert own.keys() == {name for name in tensors if not name.endswith("position_ids")}
    for name, weight in own.items():
        assert torch.equal(weight.float(), tensors[name].float()), name


@torch.no_grad()
def logits(model: Any) -> Tensor:
    """Logits for a prompt with an image of three tiles and itself in small."""
    generator = torch.Generator().manual_seed(3)
    ids, pixels = torch.tensor([[1, 350, -200, 400, 500, 13]]), torch.randn(4, 3, 28, 28, generator=generator)
    return model(input_ids=ids, images=[pixels], image_sizes=[(30, 90)]).logits


def run(output: Path, base: Path, kind: str, **options: Any) -> Path:
    """A checkpoint after two updates on such a base, with the recipe's flags of anyres."""
    settings = {
        "model_name_or_path": base,
        "vision_tower": TOWER_NAME,
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": str(PINPOINTS),
        "mm_patch_merge_type": "spatial_unpad",
        "model_max_length": 512,
        "max_steps": 2,
        "save_strategy": "no",
        "version": {"vicuna": "v1"}.get(kind, TEMPLATES[kind]),
    }
    train(command_line(output, **(settings | options)))
    return output


def test_loading_uses_every_tensor(folder: Path) -> None:
    model, tensors = load(folder), tensors_of(folder)
    assert_all_used(model, tensors)
    named = torch.load(folder.parent / TOWER_NAME / "pytorch_model.bin")
    assert not torch.equal(tower_of(model)[f"{STORED_PREFIX}vision_model.pre_layrnorm.weight"].float(),
                           named["vision_model.pre_layrnorm.weight"].float())  # fmt: skip


def test_the_tower_that_is_named_needs_no_weights(tmp_path: Path) -> None:
    folder = write_next("vicuna", tmp_path / "llava-v1.6")
    expected = logits(load(folder))
    (tmp_path / TOWER_NAME / "pytorch_model.bin").unlink()
    assert torch.equal(logits(load(folder)), expected)


def test_training_keeps_the_tower(folder: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of full weights a frozen one is carried along, LoRA leaves it in the base; both load as they were trained."""
    before = tower_of(load(folder))
    full = run(tmp_path / "full", folder, kind)
    assert f"the weights inside {folder}" in capsys.readouterr().out
    lora = run(tmp_path / "lora", folder, kind, lora_enable=True, lora_r=4)
    assert (full / TOWER_FOLDER).is_dir()
    assert not (lora / TOWER_FOLDER).exists()
    for model in (load(full), load(lora, folder)):
        after = tower_of(model)
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_merged_lora_has_the_tower(folder: Path, kind: str, tmp_path: Path) -> None:
    lora = run(tmp_path / "lora", folder, kind, lora_enable=True, lora_r=4)
    arguments = ["--model-path", str(lora), "--model-base", str(folder), "--save-model-path", str(tmp_path / "merged")]
    merge_lora_weights.main(arguments)
    expected = load(lora, folder)
    shutil.rmtree(folder)
    merged = load(tmp_path / "merged")
    assert merged.get_vision_tower().vision_tower_name == str(tmp_path / "merged" / TOWER_FOLDER)
    assert json.loads((tmp_path / "merged/config.json").read_text())["image_grid_pinpoints"] == PINPOINTS
    assert all(torch.equal(weight, tower_of(expected)[name]) for name, weight in tower_of(merged).items())
    found, wanted = logits(merged), logits(expected)
    assert (found - wanted).norm() < 0.02 * wanted.norm()  # merged weights are rounded to bfloat16: 0.004 measured


def test_consolidated_is_the_same_model(folder: Path, tmp_path: Path) -> None:
    expected = logits(load(folder))
    consolidate.main(["--src", str(folder), "--dst", str(tmp_path / "one")])
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "openai")
    assert torch.equal(logits(load(tmp_path / "one")), expected)


def test_delta_there_and_back(tmp_path: Path) -> None:
    folder, base = write_next("vicuna", tmp_path / "llava-v1.6"), LLAVA / "tiny-vicuna"
    tensors = tensors_of(folder)
    plain = tmp_path / "base"
    shutil.copytree(base, plain)
    (plain / "pytorch_model.bin").unlink()
    settings = json.loads((folder / "config.json").read_text())
    settings = {key: value for key, value in settings.items() if "mm" not in key and "image" not in key}
    (plain / "config.json").write_text(
        json.dumps(settings | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
    )
    own = ("model.mm_projector", "model.vision_tower", "model.image_newline")
    save_file(
        {name: tensor * 0.5 for name, tensor in tensors.items() if not name.startswith(own)},
        plain / "model.safetensors", {"format": "pt"},
    )  # fmt: skip
    flags = ["--base-model-path", str(plain), "--delta-path", str(tmp_path / "delta"), "--target-model-path"]
    make_delta.main([*flags, str(folder)])
    apply_delta.main([*flags, str(tmp_path / "again")])
    assert stored_tower(tmp_path / "delta") is not None
    torch.testing.assert_close(logits(load(tmp_path / "again")), logits(load(folder)), rtol=0, atol=1e-5)


def test_resuming_reads_it(tmp_path: Path) -> None:
    folder = write_next("vicuna", tmp_path / "llava-v1.6")
    expected, model = tower_of(load(folder)), load(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    load_full_weights(model, inspect_checkpoint(folder))
    assert all(torch.equal(weight, expected[name]) for name, weight in tower_of(model).items())


def edited(folder: Path, change: Any) -> None:
    """Change one file of a folder: the shard with the first block of the tower."""
    name = f"{STORED_PREFIX}vision_model.encoder.layers.0.mlp.fc1.weight"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    path = folder / index["weight_map"][name]
    tensors = load_file(path)
    before = set(tensors)
    change(tensors, name)
    save_file(tensors, path, {"format": "pt"})
    for key in before - tensors.keys():
        del index["weight_map"][key]
    index["weight_map"] |= dict.fromkeys(tensors, path.name)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _drop(tensors: dict[str, Tensor], name: str) -> None:
    del tensors[name]


def _rename(tensors: dict[str, Tensor], name: str) -> None:
    tensors[f"{name}.old"] = tensors.pop(name).clone()


def _add(tensors: dict[str, Tensor], name: str) -> None:
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(40)


def _elsewhere(tensors: dict[str, Tensor], name: str) -> None:
    tensors["model.vision_tower.other.weight"] = torch.zeros(3)


def _cut(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name][:-1].clone()


def _poison(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name][0, 0] = float("nan")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, r"missing: \['encoder\.layers\.0\.mlp\.fc1\.weight'\]"),
        (_rename, r"fc1\.weight\.old"),
        (_add, r"1 weights belong to no part of a LlavaLlamaForCausalLM.*q_proj\.bias"),
        (_elsewhere, r"1 weights belong to no part.*model\.vision_tower\.other\.weight"),
        (_cut, r"fc1\.weight' has shape \(63, 32\), but in the tower .* it has \(64, 32\)"),
        (_poison, r"fc1\.weight' contains NaN"),
    ],
)
@pytest.mark.parametrize("program", ["load", "train"])
def test_what_does_not_fit_is_named(program: str, change: Any, message: str, tmp_path: Path) -> None:
    folder = write_next("vicuna", tmp_path / "llava-v1.6")
    edited(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder) if program == "load" else run(tmp_path / "out", folder, "vicuna")


def test_positions_in_another_order_are_refused(tmp_path: Path) -> None:
    folder = write_next("vicuna", tmp_path / "llava-v1.6")
    edited(folder, lambda tensors, name: None)
    for path in folder.glob("model-*.safetensors"):
        tensors = load_file(path)
        key = f"{STORED_PREFIX}vision_model.embeddings.position_ids"
        if key in tensors:
            save_file(tensors | {key: tensors[key].flip(-1).contiguous()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match="position_ids' of the vision tower"):
        load(folder)


def test_a_tower_that_no_setting_names_is_refused(tmp_path: Path) -> None:
    names = ("mm_vision_tower", "mm_hidden_size", "use_mm_proj")
    folder = write_next("vicuna", tmp_path / "llava-v1.6", **dict.fromkeys(names))
    with pytest.raises(CheckpointError, match="belong to no part"):
        load(folder)


def test_a_frozen_tower_that_was_stored_along_is_the_named_one(tmp_path: Path) -> None:
    """LLaVA-1.5's folders have it: nothing is carried along, since it is what the name says."""
    golden = load(LLAVA / "tiny-llava-v1.5").get_vision_tower()
    assert golden.stored is not None
    assert not golden.is_from_elsewhere()
    folder = write_next("vicuna", tmp_path / "llava-v1.6")
    assert load(folder).get_vision_tower().is_from_elsewhere()


def test_a_tower_folder_with_unknown_weights_is_refused(tmp_path: Path) -> None:
    """Of a tower by itself too: a block that its `config.json` does not have is not dropped; a text model is."""
    folder = write_next("vicuna", tmp_path / "llava-v1.6")
    consolidate.main(["--src", str(folder), "--dst", str(tmp_path / "one")])
    path = tmp_path / "one" / TOWER_FOLDER / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"text_model.a.weight": torch.zeros(2)}, path, {"format": "pt"})
    load(tmp_path / "one")
    save_file(tensors | {"encoder.layers.3.mlp.fc1.bias": torch.zeros(64)}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 weights belong to no part of the vision tower.*layers\.3"):
        load(tmp_path / "one")


def test_a_tower_of_its_own_is_not_left_out_of_the_originals_layout(tmp_path: Path) -> None:
    folder = write_next("vicuna", tmp_path / "llava-v1.6")
    lora = run(tmp_path / "lora", folder, "vicuna", lora_enable=True, lora_r=4, unfreeze_mm_vision_tower=True)
    with pytest.raises(CheckpointError, match="has a vision tower of its own"):
        export_original(lora, tmp_path / "original", str(folder))
    assert not (tmp_path / "original").exists()

"""Loading: every checkpoint folder of the original code gives its logits and tokens; damage is named."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.errors import CheckpointError
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import load_full_weights
from llava.model.formats import inspect_checkpoint, read_tensors
from llava.train.train import build_run, parse_args
from tests.golden import golden_dir, load_case
from tests.llava.train.test_training import command_line

LLAVA = golden_dir("llava")
CASES = {"tiny-llava-v1.5": None, "tiny-llava-lora": "tiny-vicuna", "tiny-llava-pretrain": "tiny-vicuna"}


def expected(name: str) -> dict:
    return next(result for result in load_case("llava", "load")[0]["out"]["results"] if result["path"] == name)


@pytest.mark.parametrize(("name", "base"), CASES.items())
def test_original_checkpoints(name: str, base: str | None) -> None:
    case, tensors = load_case("llava", "load")
    tokenizer, model, processor, context = load_pretrained_model(
        str(LLAVA / name), str(LLAVA / base) if base else None, "any name", device="cpu", torch_dtype=torch.float32
    )
    result = expected(name)
    assert context == result["context_len"]
    assert type(model).__name__ == result["class_name"]
    assert model.config.vocab_size == len(tokenizer) == result["vocab"]
    assert dict(processor.crop_size) == result["image_processor_crop"]
    assert not model.training
    ids, images = tensors["in/input_ids"], tensors["in/images"]
    labels = ids.masked_fill(ids == IMAGE_TOKEN_INDEX, IGNORE_INDEX)
    output = model(input_ids=ids, images=images, labels=labels)
    assert output.loss.item() == pytest.approx(result["loss"], abs=1e-5)
    torch.testing.assert_close(
        output.logits[..., :: case["logit_stride"]], tensors[f"out/{name}/logits_strided"], rtol=0, atol=1e-4
    )
    new = len(result["tokens"][0]) - 1
    tokens = model.generate(ids, images=images, do_sample=False, max_new_tokens=new)
    assert tokens.tolist() == [row[1:] for row in result["tokens"]]


def test_words_in_the_path_do_not_matter(tmp_path: Path) -> None:
    """The original looks for `llava` and `lora` in the folder's name."""
    folder = tmp_path / "plain-name"
    shutil.copytree(LLAVA / "tiny-llava-lora", folder)
    shutil.copytree(LLAVA / "tiny-clip", tmp_path / "tiny-clip")
    _, model, _, _ = load_pretrained_model(str(folder), str(LLAVA / "tiny-vicuna"), device="cpu")
    _, base, _, _ = load_pretrained_model(str(LLAVA / "tiny-llava-pretrain"), str(LLAVA / "tiny-vicuna"), device="cpu")
    name = "layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.model.get_parameter(name), base.model.get_parameter(name)), "the adapter is merged"


def _broken(tmp_path: Path, name: str) -> Path:
    folder = tmp_path / name
    shutil.copytree(LLAVA / name, folder)
    shutil.copytree(LLAVA / "tiny-clip", tmp_path / "tiny-clip")
    return folder


def test_missing_shard(tmp_path: Path) -> None:
    folder = _broken(tmp_path, "tiny-llava-v1.5")
    (folder / "pytorch_model-00001-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00001-of-00002\.bin"):
        load_pretrained_model(str(folder), device="cpu")


LAYOUTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


def laid_out(folder: Path, layout: str) -> Path:
    """The golden LLaVA in one file or in several, of either kind."""
    source = LLAVA / "tiny-llava-v1.5"
    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(source.glob("pytorch_model-*.bin")):
        tensors |= read_tensors(path)
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.model", "tokenizer_config.json"):
        shutil.copyfile(source / name, folder / name)
    shutil.copytree(LLAVA / "tiny-clip", folder / "tiny-clip")

    def save(part: dict[str, torch.Tensor], path: Path) -> None:
        if path.suffix == ".bin":
            torch.save(part, path)
        else:
            save_file({name: value.contiguous() for name, value in part.items()}, path, {"format": "pt"})

    stem, _, rest = layout.partition(".")
    suffix = rest.partition(".")[0]
    if not layout.endswith(".json"):
        save(tensors, folder / layout)
        return folder
    names, table = sorted(tensors), {}
    for number in range(3):
        shard = f"{stem}-{number + 1:05}-of-00003.{suffix}"
        part = {name: tensors[name] for name in names[number::3]}
        save(part, folder / shard)
        table |= dict.fromkeys(part, shard)
    (folder / layout).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": table}))
    return folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_full_weights(layout: str, tmp_path: Path) -> None:
    """One file or shards, safetensors or `.bin`: the same model, by itself and as a base."""
    folder = laid_out(tmp_path / "model", layout)
    case, tensors = load_case("llava", "load")
    _, model, _, _ = load_pretrained_model(str(folder), device="cpu")
    logits = model(input_ids=tensors["in/input_ids"], images=tensors["in/images"]).logits
    expected = tensors["out/tiny-llava-v1.5/logits_strided"]
    torch.testing.assert_close(logits[..., :: case["logit_stride"]], expected, rtol=0, atol=1e-4)
    resumed = type(model)(model.config)
    resumed.get_model().load_vision_tower([folder])
    load_full_weights(resumed, inspect_checkpoint(folder))
    again = resumed.eval()(input_ids=tensors["in/input_ids"], images=tensors["in/images"]).logits
    assert torch.equal(again, logits)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("as_base", [False, True], ids=["checkpoint", "base"])
def test_missing_and_damaged_weights(layout: str, as_base: bool, tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "model", layout)
    adapter = _broken(tmp_path, "tiny-llava-lora")

    def load() -> None:
        if as_base:
            load_pretrained_model(str(adapter), str(folder), device="cpu")
        else:
            load_pretrained_model(str(folder), device="cpu")

    load()
    victim = sorted(path for path in folder.iterdir() if path.suffix in (".bin", ".safetensors"))[-1]
    content = victim.read_bytes()
    victim.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(CheckpointError, match=re.escape(victim.name)):
        load()
    victim.unlink()
    message = "missing" if layout.endswith(".json") else "weights|holds none of"
    with pytest.raises(CheckpointError, match=message):
        load()


@pytest.mark.parametrize(
    ("index", "message"),
    [({"weight_map": {"a": "../x.safetensors"}}, "outside its folder"), ({}, "no 'weight_map'"), ([], "JSON object")],
)
def test_malformed_indexes(index: object, message: str, tmp_path: Path) -> None:
    folder = laid_out(tmp_path / "model", "model.safetensors.index.json")
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained_model(str(folder), device="cpu")


def test_training_base_without_some_weights(tmp_path: Path) -> None:
    """Transformers would fill them at random with a warning."""
    folder = laid_out(tmp_path / "model", "pytorch_model.bin")
    tensors = read_tensors(folder / "pytorch_model.bin")
    tensors.pop("model.mm_projector.2.bias")
    torch.save(tensors, folder / "pytorch_model.bin")
    arguments = command_line(tmp_path / "out", model_name_or_path=folder, vision_tower=LLAVA / "tiny-clip")
    with pytest.raises(CheckpointError, match=r"lacks 1 weights .*mm_projector\.2\.bias"):
        build_run(parse_args(arguments))


def test_damaged_file(tmp_path: Path) -> None:
    folder = _broken(tmp_path, "tiny-llava-lora")
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        load_pretrained_model(str(folder), str(LLAVA / "tiny-vicuna"), device="cpu")


def test_wrong_base(tmp_path: Path) -> None:
    """Vicuna has no projector, and neither has this folder."""
    folder = _broken(tmp_path, "tiny-llava-lora")
    (folder / "non_lora_trainables.bin").unlink()
    with pytest.raises(CheckpointError, match=r"non_lora_trainables\.bin: is missing"):
        load_pretrained_model(str(folder), str(LLAVA / "tiny-vicuna"), device="cpu")


def test_base_has_to_be_given(tmp_path: Path) -> None:
    folder = _broken(tmp_path, "tiny-llava-lora")
    with pytest.raises(CheckpointError, match="--model-base"):
        load_pretrained_model(str(folder), device="cpu")


def test_missing_tower_names_the_places(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(LLAVA / "tiny-llava-v1.5", folder)
    with pytest.raises(CheckpointError) as caught:
        load_pretrained_model(str(folder), device="cpu")
    assert str(tmp_path / "tiny-clip") in str(caught.value)


def test_tensors_of_nobody(tmp_path: Path) -> None:
    folder = _broken(tmp_path, "tiny-llava-lora")
    path = folder / "non_lora_trainables.bin"
    torch.save(read_tensors(path) | {"base_model.model.model.layers.0.unknown.weight": torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=r"layers\.0\.unknown\.weight"):
        load_pretrained_model(str(folder), str(LLAVA / "tiny-vicuna"), device="cpu")


@pytest.mark.parametrize("content", ["nothing", "config only", "no config"])
def test_not_a_checkpoint(tmp_path: Path, content: str) -> None:
    folder = tmp_path / "folder"
    if content != "nothing":
        folder.mkdir()
    if content == "config only":
        (folder / "config.json").write_text(json.dumps({"model_type": "llava_llama"}))
    if content == "no config":
        torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="folder"):
        inspect_checkpoint(folder)


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    path = tmp_path / "weights.bin"
    torch.save({"a": pytest.raises}, path)
    with pytest.raises(CheckpointError, match=r"weights\.bin"):
        read_tensors(path)

"""Base weights: Meta's files and Vicuna's differences give the logits of the original, whatever the number of files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from llava.errors import CheckpointError
from llava.model.builder import load_pretrained_model
from llava.model.language_model.backbones import backbone_class
from llava.tokenizer import load_tokenizer
from mma.weights.__main__ import main
from mma.weights.base import BaseWeights, base_folder
from mma.weights.meta import places, shard_files
from mma.weights.tensors import open_folder
from mma.weights.vicuna import VicunaKind
from tests.golden import golden_dir, load_case

META, META_TENSORS = load_case("lavin", "meta_to_hf")
DELTA, DELTA_TENSORS = load_case("lavin", "vicuna_delta")
TOKENIZER = golden_dir("tokenizer") / "tokenizer.model"
VOCABULARY = META["config"]["vocab_size"]
PIECES = 896
TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}  # of the golden data; seen: 4e-6


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def with_rows(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rows for every piece of the tokenizer; the cases have fewer, and logits beyond those are not compared."""
    tables = ("tok_embeddings.weight", "output.weight", "model.embed_tokens.weight", "lm_head.weight")
    return {
        name: torch.cat([tensor, tensor.new_zeros(PIECES - len(tensor), tensor.shape[1])])
        if name in tables
        else tensor.clone()
        for name, tensor in tensors.items()
    }


def save_meta(folder: Path, case: dict, tensors: dict[str, Tensor], files: int = 1) -> None:
    """Meta's files, split as Meta splits them; the case says along which dimension."""
    folder.mkdir(parents=True)
    config = case["config"]
    names = ("dim", "multiple_of", "n_heads", "n_layers", "norm_eps")
    (folder / "params.json").write_text(json.dumps({name: config[name] for name in names} | {"vocab_size": -1}))
    rule = {name: META["shard_rule"].get(name) for name in tensors}
    for number in range(files):
        part = {
            name: tensor if rule[name] == "replicated" else tensor.chunk(files, int(rule[name][-1]))[number].clone()
            for name, tensor in tensors.items()
        }
        part["rope.freqs"] = torch.ones(4)
        torch.save(part, folder / f"consolidated.{number:02d}.pth")


def save_vicuna(root: Path, tensors: dict[str, Tensor], name: str = "vicuna_7B") -> None:
    """A Vicuna as it is published: `.bin` files with an index."""
    folder = root / name
    folder.mkdir(parents=True)
    names = sorted(tensors)
    files = {"pytorch_model-00001-of-00002.bin": names[::2], "pytorch_model-00002-of-00002.bin": names[1::2]}
    for file, part in files.items():
        torch.save({each: tensors[each] for each in part}, folder / file)
    table = {each: file for file, part in files.items() for each in part}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))


def weights_root(tmp_path: Path, case: dict, tensors: dict[str, Tensor], files: int = 1) -> Path:
    root = tmp_path / "weights"
    save_meta(root / "7B", case, with_rows(under("w/", tensors)), files)
    (root / "tokenizer.model").write_bytes(TOKENIZER.read_bytes())
    return root


@torch.no_grad()
def logits(folder: Path, ids: Tensor) -> Tensor:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits[..., :VOCABULARY]


@pytest.mark.parametrize("files", [1, META["n_shards"]])
def test_meta_files(tmp_path: Path, files: int) -> None:
    root = weights_root(tmp_path, META, META_TENSORS, files)
    assert len(shard_files(root / "7B")) == files
    folder = main(["--llama_model_path", str(root), "--out", str(tmp_path / "out"), "--max_shard_size", "40KB"])
    assert folder == tmp_path / "out"
    assert len(list(folder.glob("*.safetensors"))) > 1
    found = logits(folder, META_TENSORS["in/input_ids"])
    torch.testing.assert_close(found, META_TENSORS["out/logits_original"], **TOLERANCE)
    weights = open_folder(folder)
    for name, expected in under("hf/", META_TENSORS).items():
        torch.testing.assert_close(weights[name].read(), expected, rtol=0, atol=0)
        assert not torch.equal(expected, META_TENSORS[f"w/{inverse()[name]}"])  # the reordering does something


def inverse() -> dict[str, str]:
    return {ours: metas for metas, ours in META["key_map"].items()}


def test_every_weight_goes_where_the_original_says() -> None:
    assert {name: place.name for name, place in places(META["config"]["n_layers"]).items()} == META["key_map"]
    rules = {name: "replicated" if place.join is None else f"dim {place.join}" for name, place in places(2).items()}
    assert rules == META["shard_rule"]


def test_the_folder_is_a_base_of_llava(tmp_path: Path) -> None:
    folder = base_folder(BaseWeights(str(weights_root(tmp_path, META, META_TENSORS))))
    assert folder == tmp_path / "weights" / "7B-hf"
    assert backbone_class(folder).__name__ == "LlavaLlamaForCausalLM"
    _, model, processor, _ = load_pretrained_model(str(folder), device="cpu")
    assert processor is None
    ids = META_TENSORS["in/input_ids"]
    torch.testing.assert_close(
        model(input_ids=ids).logits[..., :VOCABULARY], META_TENSORS["out/logits_original"], **TOLERANCE
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer("Image: N/A").input_ids == [1, 367, 387, 840, 457, 872, 839]
    before = (folder / "config.json").stat().st_mtime_ns
    assert base_folder(BaseWeights(str(tmp_path / "weights"))) == folder  # once
    assert (folder / "config.json").stat().st_mtime_ns == before
    assert base_folder(BaseWeights(str(folder))) == folder  # and a folder of transformers' is taken as it is


@pytest.mark.parametrize("vicuna_weights", ["auto", "delta"])
def test_vicuna_as_a_difference_is_vicuna(tmp_path: Path, vicuna_weights: str) -> None:
    """The model base + difference, which the original misses by its reordered rows."""
    root = weights_root(tmp_path, DELTA, DELTA_TENSORS)
    save_vicuna(root, with_rows(under("delta/", DELTA_TENSORS)))
    folder = base_folder(BaseWeights(str(root), use_vicuna=True, vicuna_weights=vicuna_weights))
    assert folder == root / "vicuna_7B-hf"
    found = logits(folder, DELTA_TENSORS["in/input_ids"])
    torch.testing.assert_close(found, DELTA_TENSORS["out/logits_correct_hf_sum"], **TOLERANCE)
    assert (found - DELTA_TENSORS["out/logits_original"]).abs().max() > 1
    assert DELTA["max_abs_diff_between_the_two_logits"] > 1


def test_full_vicuna_weights_are_taken_as_they_are(tmp_path: Path) -> None:
    root = weights_root(tmp_path, DELTA, DELTA_TENSORS)
    save_vicuna(root, with_rows(under("delta/", DELTA_TENSORS)))
    whole = base_folder(BaseWeights(str(root), use_vicuna=True))
    full = {name: weight.read() for name, weight in open_folder(whole).items()}
    other = tmp_path / "other"
    (root / "7B").rename(tmp_path / "7B")
    save_vicuna(other, full)
    (tmp_path / "7B").rename(other / "7B")
    assert base_folder(BaseWeights(str(other), use_vicuna=True)) == other / "vicuna_7B"
    (other / "7B").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="--vicuna_weights full"):
        base_folder(BaseWeights(str(other), use_vicuna=True))
    asked = BaseWeights(str(other), use_vicuna=True, vicuna_weights=VicunaKind.FULL)
    assert base_folder(asked) == other / "vicuna_7B"


def broken(root: Path, what: str) -> None:
    first = root / "7B" / "consolidated.00.pth"
    if what == "a file is missing":
        first.unlink()
    elif what == "a file is cut off":
        first.write_bytes(first.read_bytes()[:2000])
    elif what == "a weight is missing":
        torch.save({k: v for k, v in torch.load(first).items() if k != "norm.weight"}, first)
    elif what == "half of the files":
        (root / "7B" / "consolidated.01.pth").unlink()
    elif what == "no tokenizer":
        (root / "tokenizer.model").unlink()
    elif what == "no weights at all":
        (root / "7B" / "params.json").unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a file is missing", "without gaps"),
        ("a file is cut off", "is damaged"),
        ("a weight is missing", "1 weights are missing"),
        ("half of the files", "embeddings of width 12, but params.json says 24"),
        ("no tokenizer", "no tokenizer.model"),
        ("no weights at all", "--llama_model_path"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_left(tmp_path: Path, what: str, message: str) -> None:
    root = weights_root(tmp_path, META, META_TENSORS, META["n_shards"])
    broken(root, what)
    with pytest.raises(CheckpointError, match=message):
        main(["--llama_model_path", str(root)])
    assert not list(root.glob("*-hf*"))


def test_a_difference_to_another_base_is_refused(tmp_path: Path) -> None:
    root = weights_root(tmp_path, DELTA, DELTA_TENSORS)
    delta = with_rows(under("delta/", DELTA_TENSORS))
    save_vicuna(root, delta | {"model.layers.1.mlp.up_proj.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="no difference to this base"):
        base_folder(BaseWeights(str(root), use_vicuna=True))
    far = {name: tensor * 20 for name, tensor in delta.items()}
    save_vicuna(root, far, "vicuna_13B")
    (root / "7B").rename(root / "13B")
    with pytest.raises(CheckpointError, match="neither near"):
        base_folder(BaseWeights(str(root), "13B", use_vicuna=True))

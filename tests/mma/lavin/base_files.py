"""Base weights as they are published, at the golden data's sizes: Meta's files and Vicuna's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tests.golden import golden_dir, load_case

if TYPE_CHECKING:
    pass


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

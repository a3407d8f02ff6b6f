"""Meta's LLaMA files (`consolidated.NN.pth`, `params.json`) under the names and in the layout of transformers.

Meta turns neighbouring dimensions (2k, 2k+1) of a head by one rotary angle, transformers dimensions k and k + d/2: the
rows of the query and key projections change places, so that both compute the same. Corresponds to the loading of
LaVIN's `lavin/mm_adaptation.py`, which keeps Meta's layout.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig

from llava.errors import CheckpointError
from llava.runtime.files import read_json
from mma.lavin.weights.tensors import LazyTensor, map_torch_file

PARAMS_FILE = "params.json"
SHARD = re.compile(r"consolidated\.(\d+)\.pth")
MAX_POSITIONS = 2048
"""Longest sequence that LLaMA was trained on; `params.json` does not say it."""


@dataclass(frozen=True)
class Place:
    """Where a weight of Meta's goes.

    Attributes:
        name: its name in transformers, within the layer if it belongs to one.
        join: dimension along which the files' parts are put together; None: every file has all of it.
        heads: setting with the number of heads whose rows are reordered; None: the rows stay.
    """

    name: str
    join: int | None
    heads: str | None = None


MODEL = {
    "tok_embeddings.weight": Place("model.embed_tokens.weight", 1),
    "norm.weight": Place("model.norm.weight", None),
    "output.weight": Place("lm_head.weight", 0),
}
LAYER = {
    "attention.wq.weight": Place("self_attn.q_proj.weight", 0, "n_heads"),
    "attention.wk.weight": Place("self_attn.k_proj.weight", 0, "n_kv_heads"),
    "attention.wv.weight": Place("self_attn.v_proj.weight", 0),
    "attention.wo.weight": Place("self_attn.o_proj.weight", 1),
    "feed_forward.w1.weight": Place("mlp.gate_proj.weight", 0),
    "feed_forward.w2.weight": Place("mlp.down_proj.weight", 1),
    "feed_forward.w3.weight": Place("mlp.up_proj.weight", 0),
    "attention_norm.weight": Place("input_layernorm.weight", None),
    "ffn_norm.weight": Place("post_attention_layernorm.weight", None),
}


def places(layers: int) -> dict[str, Place]:
    """Meta's name of every weight, and where it goes."""
    table = dict(MODEL)
    for layer in range(layers):
        for name, place in LAYER.items():
            target = f"model.layers.{layer}.{place.name}"
            table[f"layers.{layer}.{name}"] = Place(target, place.join, place.heads)
    return table


def to_half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in the order of transformers.

    Args:
        weight: (heads * d, D); the two rows of a rotary pair are neighbours.
        heads: number of heads.

    Returns:
        (heads * d, D): within each head, the first rows of all pairs and then the second ones.
    """
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def shard_files(folder: Path) -> list[Path]:
    """The files of weights in their order.

    Raises:
        CheckpointError: there are none, or one in between is missing.
    """
    found = {int(match[1]): path for path in folder.glob("*.pth") if (match := SHARD.fullmatch(path.name))}
    if not found or sorted(found) != list(range(len(found))):
        numbers = f"the numbers {sorted(found)}" if found else "no such file"
        raise CheckpointError(f"{folder}: expected consolidated.00.pth, .01.pth, ... without gaps, found {numbers}")
    return [found[number] for number in sorted(found)]


def _check_names(shards: Sequence[Mapping[str, Tensor]], table: Mapping[str, Place], folder: Path) -> None:
    for number, shard in enumerate(shards):
        names = {name for name in shard if not name.endswith("rope.freqs")}  # follow from params.json
        lacking, strange = sorted(table.keys() - names), sorted(names - table.keys())
        if lacking or strange:
            raise CheckpointError(
                f"{folder}, file {number}: does not hold what {PARAMS_FILE} describes; {len(lacking)} weights are "
                f"missing ({lacking[:3]}), {len(strange)} are unknown ({strange[:3]})"
            )


def _read(parts: Sequence[Tensor], place: Place, params: Mapping[str, Any]) -> Tensor:
    whole = parts[0] if place.join is None else torch.cat(list(parts), dim=place.join)
    return whole if place.heads is None else to_half_split(whole, params[place.heads])


def open_meta(folder: Path) -> tuple[dict[str, LazyTensor], LlamaConfig]:
    """Weights and configuration of a folder of Meta's.

    Raises:
        CheckpointError: files are missing or damaged, or weights and `params.json` do not belong together.
    """
    params = read_json(folder / PARAMS_FILE)
    lacking = sorted({"dim", "n_heads", "n_layers", "norm_eps"} - params.keys())
    if lacking:
        raise CheckpointError(f"{folder / PARAMS_FILE}: has no {lacking}; its keys are {sorted(params)}")
    params.setdefault("n_kv_heads", params["n_heads"])
    table = places(params["n_layers"])
    shards = [map_torch_file(path) for path in shard_files(folder)]
    _check_names(shards, table, folder)
    weights = {}
    for name, place in table.items():
        parts = [shard[name] for shard in shards]
        shape = list(parts[0].shape)
        if place.join is not None:
            shape[place.join] = sum(part.shape[place.join] for part in parts)
        weights[place.name] = LazyTensor(tuple(shape), parts[0].dtype, partial(_read, parts, place, params))
    rows, width = weights["model.embed_tokens.weight"].shape
    if width != params["dim"]:
        raise CheckpointError(
            f"{folder}: the {len(shards)} files together have embeddings of width {width}, but {PARAMS_FILE} says "
            f"{params['dim']}; are all consolidated.*.pth of the model here?"
        )
    return weights, _config(params, rows, weights["model.layers.0.mlp.gate_proj.weight"].shape[0], parts[0].dtype)


def _config(params: Mapping[str, Any], rows: int, mlp_width: int, dtype: torch.dtype) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=rows,
        hidden_size=params["dim"],
        intermediate_size=mlp_width,
        num_hidden_layers=params["n_layers"],
        num_attention_heads=params["n_heads"],
        num_key_value_heads=params["n_kv_heads"],
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=params["norm_eps"],
        rope_parameters={"rope_type": "default", "rope_theta": float(params.get("rope_theta", 10000.0))},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
        dtype=dtype,
    )

"""The extension lets the sparse layers attend by the policy, and hands them nothing quadratic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynamic.attention.interface import NAME
from dynamic.config import SparseOptions
from dynamic.extension import DynamicExtension
from llava.errors import FlagError
from llava.train.options import DataArguments, ModelArguments, RunArguments, TrainingArguments
from tests.dynamic.golden_model import golden_model, inputs_of
from tests.golden import load_case


def masked_pass(tower: Path, **kwargs: Any) -> tuple[Tensor, list[dict[str, Any]]]:
    """Logits at real tokens of a pass with a loss, and the keyword arguments of every layer."""
    case, tensors = load_case("dynamic", "train_tau01")
    model, _ = golden_model(tower, case["sparse_config"])
    assert model.config._attn_implementation == NAME
    seen: list[dict[str, Any]] = []

    def see(module: nn.Module, args: Any, given: dict[str, Any]) -> None:
        seen.append(given)

    for layer in model.get_decoder().layers:
        layer.register_forward_pre_hook(see, with_kwargs=True)
    inputs = model.extensions.on_inputs(model, inputs_of(case, tensors))
    output = model(
        inputs_embeds=inputs.inputs_embeds,
        attention_mask=inputs.attention_mask,
        labels=inputs.labels,
        segments=inputs.segments,
        **kwargs,
    )
    return output.logits[inputs.attention_mask], seen


def test_sparse_layers_get_the_policy_and_the_padding_mask(golden_tower: Path) -> None:
    case, _ = load_case("dynamic", "train_tau01")
    first = case["sparse_config"]["sparse_layer"]
    _, layers = masked_pass(golden_tower)
    assert 0 < first < len(layers)
    for index, given in enumerate(layers):
        sparse = index >= first
        assert ("policy" in given) == sparse
        mask = given["attention_mask"]  # dense layers need none: the rows are padded on the right
        assert mask.ndim == 2 if sparse else mask is None
    assert (layers[-1]["policy"] == 0).any()


@pytest.mark.parametrize("implementation", ["eager", "blockwise"])
def test_implementations_agree_and_the_policy_is_obeyed(golden_tower: Path, implementation: str) -> None:
    logits, _ = masked_pass(golden_tower)
    other, _ = masked_pass(golden_tower, policy_implementation=implementation)
    torch.testing.assert_close(other, logits)
    mixed, _ = masked_pass(golden_tower, policy_implementation=implementation, policy_eps=1e9)
    assert (mixed - logits).abs().max() > 1e-2  # with a huge eps every token sees the mean of all values


@pytest.mark.parametrize("asked", [None, "sdpa", "eager", "flash_attention_2"])
def test_another_attention_is_refused_rather_than_replaced(asked: str | None, tmp_path: Path) -> None:
    args = RunArguments(
        ModelArguments(attn_implementation=asked),
        DataArguments(),
        TrainingArguments(output_dir=str(tmp_path), use_cpu=True),
        {DynamicExtension.name: SparseOptions(dynamic=True)},
    )
    if asked in (None, "sdpa"):
        assert DynamicExtension().configure(args) is not None
    else:
        with pytest.raises(FlagError, match=f"--attn_implementation {asked}: --dynamic"):
            DynamicExtension().configure(args)

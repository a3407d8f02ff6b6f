"""Trained tokens of several adapters in a model whose head is tied to its embeddings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from hydralora import HydraLoraConfig
from tests.hydralora.tuner.models import adapted, logits, tiny_llama

EMBEDDED, HEAD = {"embed_tokens": [1]}, {"lm_head": [2]}
BOTH, DIFFERENT = {"embed_tokens": [3], "lm_head": [3]}, {"embed_tokens": [1], "lm_head": [2]}


def with_tokens(first: Any, tied: bool = True) -> PeftModel:
    return adapted(base=tiny_llama(tie_word_embeddings=tied), trainable_token_indices=first)


def add(model: PeftModel, indices: Any) -> None:
    config = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "trainable_token_indices": indices}
    model.add_adapter("second", HydraLoraConfig(**config))


@torch.no_grad()
def trained(model: PeftModel) -> Tensor:
    """Logits with the second adapter, whose tokens have moved."""
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta.second" in name:
            parameter.add_(0.5)
    model.set_adapter("second")
    return logits(model)


REFUSED = [([1], DIFFERENT), (EMBEDDED, DIFFERENT), (BOTH, DIFFERENT), (HEAD, EMBEDDED), (HEAD, BOTH), (DIFFERENT, [3])]
REFUSED += [(DIFFERENT, HEAD)]


@pytest.mark.parametrize(("first", "second"), REFUSED)
def test_tokens_that_are_tied_in_another_way_are_refused(first: Any, second: Any) -> None:
    """And nothing is left of the adapter; without tied weights there is nothing to contradict."""
    model = with_tokens(first)
    before = logits(model)
    with pytest.raises(ValueError, match=r"adapter 'second': trainable_token_indices=.*Give all adapters"):
        add(model, second)
    assert model.peft_config.keys() == {"default"}
    assert not [name for name, _ in model.named_modules() if "second" in name]
    assert torch.equal(logits(model), before)
    untied = with_tokens(first, tied=False)
    add(untied, second)
    trained(untied)


FITTING = [([1], [4, 5]), ([1], BOTH), (BOTH, HEAD), (EMBEDDED, HEAD), (HEAD, HEAD), (HEAD, DIFFERENT)]
FITTING += [(DIFFERENT, DIFFERENT), (HEAD, None), (DIFFERENT, None)]


@pytest.mark.parametrize(("first", "second"), FITTING)
def test_others_are_as_in_a_model_of_their_own(first: Any, second: Any) -> None:
    model, alone = with_tokens(first), with_tokens(None)
    for each in (model, alone):
        add(each, second)
    found, expected = trained(model), trained(alone)
    torch.testing.assert_close(found, expected)
    assert second is None or not torch.equal(expected, logits(with_tokens(None)))


def test_what_lora_does_with_them() -> None:
    """The reason: the second adapter gives other numbers than alone, without a word; or an error that names nothing."""
    found, options = [], {"target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for first, second in ((None, DIFFERENT), ([1], DIFFERENT), (HEAD, [1])):
        base = tiny_llama(tie_word_embeddings=True)
        model = get_peft_model(base, LoraConfig(**options, trainable_token_indices=first))
        model.add_adapter("second", LoraConfig(**options, trainable_token_indices=second))
        if first is not HEAD:
            found.append(trained(model))
    assert (found[0] - found[1]).abs().max() > 0.1
    with pytest.raises(KeyError, match="second"):
        trained(model)

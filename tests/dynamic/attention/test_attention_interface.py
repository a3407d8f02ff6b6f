"""Policy attention inside decoders of transformers: the policy arrives, and without one nothing changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, MistralConfig, MistralModel

from dynamic.attention import policy_attention
from dynamic.attention.interface import NAME, policy_attention_forward, register
from llava.runtime.cache_name import cache_argument, cache_of
from tests.checkpointed import checkpoint_layers

B, L = 2, 10
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 11,
    "initializer_range": 0.3,
}


def make(attention: str, kind: type = LlamaModel, **settings: Any) -> torch.nn.Module:
    """A tiny decoder with the same weights for every attention."""
    register()
    torch.manual_seed(3)
    config = {LlamaModel: LlamaConfig, MistralModel: MistralConfig}[kind](**{**SIZES, **settings})
    return kind._from_config(config, attn_implementation=attention)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings (B, L, 32), a left-padding mask (B, L) and a policy (B, L)."""
    generator = torch.Generator().manual_seed(4)
    embeddings = torch.randn(B, L, 32, generator=generator)
    mask = torch.arange(L) >= torch.tensor([[0], [3]])
    policy = (torch.rand(B, L, generator=generator) > 0.5).float()
    return embeddings.requires_grad_(), mask, policy.requires_grad_()


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", [LlamaModel, MistralModel])
def test_without_a_policy_it_is_sdpa_bit_by_bit(kind: type, padded: bool) -> None:
    embeddings, mask, _ = inputs()
    outputs = []
    for attention in ("sdpa", NAME):
        model = make(attention, kind, sliding_window=4) if kind is MistralModel else make(attention, kind)
        assert model.config._attn_implementation == attention
        outputs.append(model(inputs_embeds=embeddings, attention_mask=mask if padded else None).last_hidden_state)
        outputs.append(torch.autograd.grad(outputs[-1].square().sum(), embeddings)[0])
    assert torch.equal(outputs[0], outputs[2])
    assert torch.equal(outputs[1], outputs[3])


def test_generation_with_a_cache_is_that_of_sdpa() -> None:
    embeddings, _, _ = inputs()
    results = []
    for attention in ("sdpa", NAME):
        model = make(attention).eval()
        first = model(inputs_embeds=embeddings[:, :-1], use_cache=True)
        results.append(
            model(inputs_embeds=embeddings[:, -1:], **cache_argument(model.forward, cache_of(first))).last_hidden_state
        )
    assert torch.equal(*results)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_policy_reaches_every_layer_and_gets_its_gradient(checkpointing: bool) -> None:
    """Kept tokens come out as if the dropped ones were not there."""
    embeddings, _, policy = inputs()
    model = make(NAME).train()
    if checkpointing:
        checkpoint_layers(model)
    hidden = model(inputs_embeds=embeddings, policy=policy, use_cache=False).last_hidden_state
    with torch.no_grad():
        dense = model(inputs_embeds=embeddings, use_cache=False).last_hidden_state
        for b in range(B):
            kept = policy[b] == 1
            positions = torch.arange(L)[kept][None]
            alone = make("sdpa").eval()(
                inputs_embeds=embeddings[b : b + 1, kept],
                position_ids=positions,
                attention_mask=torch.ones(1, len(positions[0])),
            )
            torch.testing.assert_close(hidden[b, kept], alone.last_hidden_state[0])
    assert (hidden - dense).abs().max() > 1e-2
    weights = torch.randn(hidden.shape)
    gradient = torch.autograd.grad((hidden * weights).sum(), policy)[0]
    reference = make(NAME)(inputs_embeds=embeddings, policy=policy, policy_implementation="eager").last_hidden_state
    expected = torch.autograd.grad((reference * weights).sum(), policy)[0]
    assert expected.abs().max() > 1e-2
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-5)


def attend(**changes: Any) -> Tensor:
    """The function as an attention layer calls it."""
    generator = torch.Generator().manual_seed(5)
    _, _, policy = inputs()
    module = torch.nn.Module()
    module.num_key_value_groups = 2
    arguments = {
        "query": torch.randn(B, 4, L, 8, generator=generator),
        "key": torch.randn(B, 2, L, 8, generator=generator),
        "value": torch.randn(B, 2, L, 8, generator=generator),
        "attention_mask": None,
        "policy": policy,
    }
    return policy_attention_forward(module, **{**arguments, **changes})[0]


def test_a_padding_mask_and_the_whole_mask_say_the_same() -> None:
    _, mask, _ = inputs()
    whole = torch.ones(L, L, dtype=torch.bool).tril() & mask[:, None, None]
    y = attend(attention_mask=mask)
    assert y.shape == (B, L, 4, 8)
    torch.testing.assert_close(y, attend(attention_mask=whole))
    assert (y - attend()).abs().max() > 1e-2


def test_settings_reach_the_attention() -> None:
    assert (attend(policy_eps=0.5) - attend()).abs().max() > 1e-3
    with pytest.raises(ValueError, match="there are auto, eager"):
        attend(policy_implementation="fast")


def test_autocast_casts_as_for_the_attention_of_torch() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        y = attend()
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), attend(), rtol=2e-2, atol=2e-2)


def test_scaling_is_that_of_the_layer() -> None:
    torch.manual_seed(0)
    q, (_, mask, policy) = torch.randn(B, 2, L, 8), inputs()
    y = attend(query=q, key=q, value=q, scaling=0.2, attention_mask=mask)
    expected = policy_attention(q, q, q, policy, causal=True, key_mask=mask, scale=0.2, implementation="eager")
    torch.testing.assert_close(y, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.1}, "attention_dropout is 0.1"),
        ({"sliding_window": 9}, "10 tokens do not fit into the sliding window of 9"),
        ({"policy": None, "attention_mask": torch.ones(B, L)}, "no policy"),
        ({"query": torch.ones(B, 4, 1, 8)}, "as many keys as queries"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attend(**changes)

"""What a sparse pass of a patched checkout keeps in memory: no inputs of former layers, no copies of the cache."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dynamic.config import SparseConfig
from moe_patch.payload.sparse_cache import KeptCache
from moe_patch.payload.sparse_decoder import DecoderOfPass

LAYERS = 5


class Cache(KeptCache):
    """With the lists of transformers 4.37, which later versions do not have."""

    def __init__(self) -> None:
        super().__init__(sparse_layer=0)
        self.key_cache: list[Tensor] = []
        self.value_cache: list[Tensor] = []

    def __len__(self) -> int:
        return len(self.key_cache)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        return self.key_cache[layer], self.value_cache[layer]


def states(tokens: int) -> tuple[Tensor, Tensor]:
    return torch.randn(1, 2, tokens, 4), torch.randn(1, 2, tokens, 4)


def test_a_dropped_token_copies_the_cache_no_more_than_once() -> None:
    cache = Cache()
    cache.plan(torch.tensor([True, False, True]))
    keys, values = states(3)
    cache.update(keys, values, 0)
    held = cache[0]
    assert torch.equal(held[0], keys[:, :, [0, 2]])
    cache.plan(torch.tensor([False]))
    new = states(1)
    seen = cache.update(*new, 0)
    assert torch.equal(seen[0], torch.cat([held[0], new[0]], dim=2)), "it attends to itself"
    assert [one is other for one, other in zip(cache[0], held, strict=True)] == [True, True]
    cache.plan(torch.tensor([True]))
    seen = cache.update(*new, 0)
    assert cache[0][0] is seen[0]


def test_a_first_pass_that_keeps_nothing_stores_nothing() -> None:
    cache = Cache()
    cache.plan(torch.tensor([False, False]))
    cache.update(*states(2), 0)
    assert cache[0][0].shape == (1, 2, 0, 4)


class Layer(nn.Module):
    """Counts the inputs of layers that are alive when it runs."""

    def __init__(self, inputs: list[weakref.ref[Tensor]], alive: list[int]) -> None:
        super().__init__()
        self.inputs, self.alive = inputs, alive

    def forward(self, hidden: Tensor, *_: Any) -> tuple[Tensor]:
        self.inputs.append(weakref.ref(hidden))
        self.alive.append(sum(each() is not None for each in self.inputs))
        return (hidden + 1,)


@pytest.mark.parametrize("collects", [False, True])
def test_inputs_of_layers_live_only_where_they_are_wanted(collects: bool) -> None:
    inputs: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    decoder = SimpleNamespace(
        config=SimpleNamespace(use_cache=False, output_attentions=False, output_hidden_states=False),
        layers=[Layer(inputs, alive) for _ in range(LAYERS)],
        norm=nn.Identity(),
        embed_tokens=lambda ids: torch.zeros(*ids.shape, 4),
        gradient_checkpointing=False,
        training=False,
        _use_flash_attention_2=True,
    )
    wanted: Any = decoder
    run = DecoderOfPass(wanted, SparseConfig(sparse_layer=LAYERS), nn.Module(), [], None)  # type: ignore[arg-type]
    with torch.no_grad():
        output = run(torch.zeros(1, 3, dtype=torch.int64), output_hidden_states=collects, return_dict=True)
    assert torch.equal(output.last_hidden_state, torch.full((1, 3, 4), float(LAYERS)))
    if collects:
        assert [float(state.max()) for state in output.hidden_states] == [0, 1, 2, 3, 4, 5]
    else:
        assert output.hidden_states is None
        assert max(alive) == 2  # the embeddings, and what enters the layer

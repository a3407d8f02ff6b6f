"""The cache of kept tokens: what it holds, and what is done with its rows."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from dynamic.cache import SparseCache
from llava.runtime.cache_name import cache_of
from tests.dynamic.sparse_models import SHAPES, Dialogue, attach_predictors, embedded, new_cache, prefill, sparse_llava
from tests.llava.model.test_generation import prompts

HEADS, WIDTH, LAYERS, SPARSE = 2, 4, 4, 2


@pytest.fixture(scope="module")
def model() -> Any:
    return sparse_llava()


class Reference:
    """The same bookkeeping with lists: the keys of each row by layer."""

    def __init__(self, rows: int) -> None:
        self.cache = SparseCache(LAYERS, SPARSE)
        self.rows: list[list[Tensor]] = [[] for _ in range(rows)]

    def step(self, keep: Tensor, valid: Tensor | None = None) -> None:
        keys = torch.randn(len(keep), HEADS, keep.shape[1], WIDTH)
        self.cache.plan_pass(keep, torch.ones_like(keep) if valid is None else valid)
        for layer in range(LAYERS):
            before = self.cache.get_seq_length(layer)
            seen, values = self.cache.update(keys, keys + layer, layer)
            assert torch.equal(values, seen + layer)
            assert seen.shape[2] == before + keep.shape[1]
            assert torch.equal(seen[:, :, before:], keys), "every new token sees every new token"
        for row, kept in enumerate(keep):
            self.rows[row] += list(keys[row, :, kept].unbind(1))

    def check(self) -> None:
        stored = self.cache.stored(torch.device("cpu"))
        longest = max(map(len, self.rows))
        for layer in self.cache.layers[SPARSE:]:
            assert layer.keys.shape == (len(self.rows), HEADS, longest, WIDTH)
            for row, expected in enumerate(self.rows):
                held = layer.keys[row][:, stored[row]].unbind(1)
                assert len(held) == len(expected)
                assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))


def test_the_cache_against_lists() -> None:
    """Random decisions, and rows that are copied, reordered and left out on the way, as beam search does."""
    torch.manual_seed(3)
    reference, ragged = Reference(3), []
    reference.step(torch.rand(3, 9) < 0.6)
    reference.check()
    for round_number in range(12):
        chance = (0.0, 0.5, 1.0)[round_number % 3]
        reference.step(torch.rand(len(reference.rows), 1 if round_number % 4 else 3) < chance)
        if round_number == 4:
            reference.cache.batch_repeat_interleave(2)
            reference.rows = [list(row) for row in reference.rows for _ in range(2)]
        if round_number in (6, 9):
            order = torch.randint(0, len(reference.rows), (len(reference.rows),))
            reference.cache.reorder_cache(order)
            reference.rows = [list(reference.rows[index]) for index in order]
            reference.step(torch.rand(len(order), 1) < 0.5)  # space that no row needs any more goes with the next pass
        if round_number == 8:
            reference.cache.batch_select_indices(torch.tensor([4, 1]))
            reference.rows = [reference.rows[4], reference.rows[1]]
            reference.step(torch.ones(2, 1, dtype=torch.bool))
        reference.check()
        assert reference.cache.report().lengths[SPARSE] == list(map(len, reference.rows))
        ragged.append(len(set(map(len, reference.rows))) > 1)
    assert any(ragged)
    reference.cache.reset()
    assert reference.cache.report() == SparseCache(LAYERS, SPARSE).report()
    reference.rows = [[], []]
    reference.step(torch.ones(2, 2, dtype=torch.bool))
    reference.check()


def test_memory_is_that_of_the_kept_tokens(model: Any) -> None:
    """Alone to the byte; in a batch no more than the longest row asks for."""
    heads, width = model.config.num_key_value_heads, model.config.hidden_size // model.config.num_attention_heads
    alone = Dialogue(model, embedded(SHAPES[:1]))
    for token in torch.randint(3, 890, (20, 1, 1)):
        alone.follow(token)
    report = alone.cache.report()
    prompt = SHAPES[0].system + sum(SHAPES[0].images) + SHAPES[0].instruct
    assert report.lengths[0] == [prompt + 20]
    assert report.lengths[1] == report.lengths[2]
    assert report.lengths[1][0] < 0.8 * report.lengths[0][0]
    tokens = sum(sum(lengths) for lengths in report.lengths)
    assert report.bytes_of_tokens == tokens * 2 * heads * width * 4
    assert report.bytes_held == report.bytes_of_tokens
    dense = DynamicCache(config=model.config)
    for layer in range(3):
        states = torch.zeros(1, heads, prompt + 20, width)
        dense.update(states, states, layer)
    held = sum(2 * layer.keys.untyped_storage().nbytes() for layer in dense.layers)
    assert report.bytes_held < 0.8 * held

    batch = Dialogue(model, embedded())
    for token in torch.randint(3, 890, (20, len(SHAPES), 1)):
        batch.follow(token)
    report = batch.cache.report()
    longest = [embedded().inputs_embeds.shape[1] + 20, max(report.lengths[1]), max(report.lengths[2])]
    assert report.bytes_held == sum(longest) * len(SHAPES) * 2 * heads * width * 4


def test_a_cache_dies_with_its_last_reference(model: Any) -> None:
    """No cycle keeps the memory until the garbage collector comes by."""
    cache = new_cache(model)
    prefill(model, embedded(), cache)
    freed: list[bool] = []
    weakref.finalize(cache, freed.append, True)
    gc.disable()
    try:
        del cache
        assert freed
    finally:
        gc.enable()


def test_what_does_not_go_together_is_refused(model: Any) -> None:
    batch = embedded(SHAPES[:1])
    with pytest.raises(ValueError, match="needs its own cache, but got a DynamicCache"):
        prefill(model, batch, DynamicCache(config=model.config))
    cache = new_cache(model)
    prefill(model, batch, cache)
    with pytest.raises(ValueError, match="the cache holds 20 tokens already"):
        prefill(model, batch, cache)
    with pytest.raises(ValueError, match="cannot be rolled back"):
        cache.crop(-1)
    states = torch.zeros(1, 4, 2, 10)
    with pytest.raises(ValueError, match="told of 0 new positions and gets 2"):
        new_cache(model).layers[1].update(states, states)


def test_a_loss_with_a_cache_stores_everything(model: Any) -> None:
    """Nothing is dropped where a loss is computed, so the logits have the full length."""
    batch = prompts("right")
    labels = batch.ids.masked_fill(batch.mask == 0, -100)
    output = model(input_ids=batch.ids, attention_mask=batch.mask, images=batch.images, labels=labels, use_cache=True)
    lengths = cache_of(output).report().lengths
    assert output.logits.shape[1] == max(lengths[0])
    assert lengths[0] == lengths[1] == lengths[2]
    assert torch.isfinite(output.loss)


def test_embeddings_without_segments_are_not_judged(model: Any) -> None:
    batch, cache = embedded(), new_cache(model)
    with torch.no_grad():
        output = model(**batch._asdict() | {"segments": None}, cache=cache)
    assert output.logits.shape[1] == batch.inputs_embeds.shape[1]
    assert cache.report().lengths[2] == batch.attention_mask.sum(1).tolist()


def test_predictors_are_not_attached_twice() -> None:
    with pytest.raises(Exception, match="attached to this model already"):
        attach_predictors(sparse_llava())

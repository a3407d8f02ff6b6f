"""The cache of kept tokens: what it holds, and what is done with its rows."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from dynamic.cache import Reading, SparseCache
from dynamic.slots import STEP
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
        valid = torch.ones_like(keep) if valid is None else valid
        visible = self.cache.plan_pass(keep, valid)
        for layer in range(LAYERS):
            before = self.cache.get_seq_length(layer)
            seen, values = self.cache.update(keys, keys + layer, layer)
            if layer < SPARSE:
                assert torch.equal(seen[:, :, before:], keys)
                assert torch.equal(values, seen + layer)
                continue
            assert seen.shape[2] == visible.shape[1] == self.cache.get_mask_sizes(keep.shape[1], layer)[0]
            for row, stored in enumerate(self.rows):
                wanted = [*stored, *keys[row, :, valid[row]].unbind(1)]
                assert torch.equal(seen[row][:, visible[row]], torch.stack(wanted, dim=1)), "each sees all before it"
                assert torch.equal(values[row][:, visible[row]], torch.stack(wanted, dim=1) + layer)
        for row, kept in enumerate(keep):
            self.rows[row] += list(keys[row, :, kept].unbind(1))

    def check(self) -> None:
        stored = self.cache.stored(torch.device("cpu"))
        longest = max(map(len, self.rows))
        for layer in self.cache.layers[SPARSE:]:
            assert layer.keys.shape == (len(self.rows), HEADS, longest, WIDTH)
            assert 0 <= layer.slots - longest < STEP
            for row, expected in enumerate(self.rows):
                held = layer.keys[row][:, stored[row]].unbind(1)
                assert len(held) == len(expected)
                assert all(torch.equal(a, b) for a, b in zip(held, expected, strict=True))


def test_the_cache_against_lists() -> None:
    """Random decisions, and rows that are copied, reordered and left out on the way, as beam search does."""
    torch.manual_seed(3)
    reference, ragged, sizes = Reference(3), [], set()
    reference.step(torch.rand(3, 9) < 0.6)
    reference.check()
    for round_number in range(150):
        chance = (0.0, 0.5, 1.0, 1.0)[round_number % 4]
        valid = torch.ones(len(reference.rows), 1 if round_number % 5 else 3, dtype=torch.bool)
        valid[:, 0] = torch.rand(len(valid)) < 0.9
        reference.step(valid & (torch.rand(valid.shape) < chance), valid)
        if round_number == 4:
            reference.cache.batch_repeat_interleave(2)
            reference.rows = [list(row) for row in reference.rows for _ in range(2)]
        if round_number % 10 == 6:
            order = torch.randint(0, len(reference.rows), (len(reference.rows),))
            reference.cache.reorder_cache(order)
            reference.rows = [list(reference.rows[index]) for index in order]
        if round_number == 80:
            reference.cache.batch_select_indices(torch.tensor([4, 1]))
            reference.rows = [reference.rows[4], reference.rows[1]]
            reference.step(torch.ones(2, 1, dtype=torch.bool))
        reference.check()
        assert reference.cache.report().lengths[SPARSE] == list(map(len, reference.rows))
        ragged.append(len(set(map(len, reference.rows))) > 1)
        sizes.add(reference.cache.layers[SPARSE].slots)
    assert any(ragged)
    assert len(sizes) > 3
    reference.cache.reset()
    assert reference.cache.report() == SparseCache(LAYERS, SPARSE).report()
    reference.rows = [[], []]
    reference.step(torch.ones(2, 2, dtype=torch.bool))
    reference.check()


def test_memory_is_that_of_the_kept_tokens_and_less_than_a_step(model: Any) -> None:
    """Alone and in a batch, where every row has the slots of the longest."""
    heads, width = model.config.num_key_value_heads, model.config.hidden_size // model.config.num_attention_heads
    alone = Dialogue(model, embedded(SHAPES[:1]))
    batch = Dialogue(model, embedded())
    dense = DynamicCache(config=model.config)
    for token in torch.randint(3, 890, (STEP, len(SHAPES), 1)):
        alone.follow(token[:1])
        batch.follow(token)
    report = alone.cache.report()
    prompt = SHAPES[0].system + sum(SHAPES[0].images) + SHAPES[0].instruct
    assert report.lengths[0] == [prompt + STEP]
    assert report.lengths[1] == report.lengths[2]
    assert report.lengths[1][0] < 0.8 * report.lengths[0][0]
    tokens = sum(sum(lengths) for lengths in report.lengths)
    slot = 2 * heads * width * 4
    assert report.bytes_of_tokens == tokens * slot
    for layer in range(3):
        states = torch.zeros(1, heads, prompt + STEP, width)
        dense.update(states, states, layer)
    held = sum(2 * layer.keys.untyped_storage().nbytes() for layer in dense.layers)
    assert report.bytes_of_tokens < 0.8 * held
    for report in (alone.cache.report(), batch.cache.report()):
        longest = [max(lengths) for lengths in report.lengths]
        rows = len(report.lengths[0])
        assert 0 < report.bytes_of_free_slots < len(longest) * rows * STEP * slot
        assert report.bytes_held - report.bytes_of_free_slots >= report.bytes_of_tokens
    longest = [embedded().inputs_embeds.shape[1] + STEP, max(report.lengths[1]), max(report.lengths[2])]
    assert report.bytes_held - report.bytes_of_free_slots == sum(longest) * len(SHAPES) * slot


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


def test_a_copy_waits_for_a_number_that_is_on_its_way() -> None:
    class Event:
        waited = 0

        def synchronize(self) -> None:
            self.waited += 1

        def __deepcopy__(self, memo: dict[int, Any]) -> None:
            raise TypeError("an event of a device cannot be copied")

    reading = Reading(torch.tensor([3, 5]), bound=9)
    event = reading.arrived = Event()
    copied = copy.deepcopy(reading)
    assert event.waited == 1
    assert copied.bound_now(11) == 5 + 2
    assert event.waited == 1, "the copy waits for nothing"
    assert reading.bound_now(11) == 5 + 2
    assert event.waited == 2


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

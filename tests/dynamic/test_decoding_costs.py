"""What a decoded token costs besides the arithmetic: waits for the device, and copies of keys and values. Counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from dynamic.cache import SparseCache
from dynamic.slots import STEP
from llava.model.builder import load_pretrained_model
from tests.dynamic.sparse_models import BASE, Shape, embedded, new_cache, sparse_llava
from tests.llava.model.test_generation import prompts

LONG = (Shape(4, (300,), 6), Shape(2, (200,), 9))
"""So long that keys of a layer are larger than anything else that a step computes."""
WAITS = {"_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique_dim", "_unique2"}
"""Operations whose result has a size or a value that the host must know."""


class Costs(TorchDispatchMode):
    """Counts waits, and remembers the numbers in the largest tensor that was allocated.

    Attributes:
        waits: of the host for the device, by operation.
        largest: numbers in the largest tensor of an own memory.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.largest = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        by_mask = name == "index" and any(index is not None and index.dtype == torch.bool for index in args[1])
        self.waits[name] += name in WAITS or by_mask
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, Tensor) and each.untyped_storage().data_ptr() not in given:
                self.largest = max(self.largest, each.numel())
        return result


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    dense = load_pretrained_model(str(BASE), device="cpu")[1].requires_grad_(False)
    return {"dense": dense, "sparse": sparse_llava()}


@torch.no_grad()
def steps(model: Any, cache: Any, count: int) -> Iterator[Costs]:
    """The costs of `count` tokens behind `LONG`, one after the other."""
    batch = embedded(LONG)
    arguments = {name: value for name, value in batch._asdict().items() if name != "segments" or cache.layers}
    token = model(**arguments, cache=cache, use_cache=True).logits[:, -1:].argmax(-1)
    mask = batch.attention_mask
    for _ in range(count):
        mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.bool)], dim=1)
        positions = (mask.cumsum(1) - 1)[:, -1:]
        with Costs() as costs:
            output = model(input_ids=token, attention_mask=mask, position_ids=positions, cache=cache)
        token = output.logits[:, -1:].argmax(-1)
        yield costs


def test_a_token_waits_and_copies_no_more_than_the_arithmetic_needs(models: dict[str, Any]) -> None:
    """As many waits as a dense model; nothing of the size of the keys of one layer is allocated, as it does."""
    dense = list(steps(models["dense"], DynamicCache(), 2))[1]
    cache = new_cache(models["sparse"])
    before: list[int] = []
    copied, asked = 0, False
    for costs in steps(models["sparse"], cache, 2 * STEP):
        places = [buffer.data_ptr() for layer in cache.layers for buffer in layer.buffers]
        rows, heads, _, width = cache.layers[-1].buffers[0].shape
        # On a CPU the number that the host asked for earlier is read like any other; on a GPU it has arrived.
        arrived = asked and cache.ledger.reading is None
        asked = cache.ledger.reading is not None
        assert costs.waits.total() == dense.waits.total() + arrived
        if places == before:
            assert costs.largest < rows * heads * min(cache.ledger.kept) * width
        elif before:  # room for the next tokens
            copied += 1
        before = places
    assert 2 <= copied <= 2 * 2 * STEP // (STEP // 4), "two kinds of layers"
    assert dense.largest >= len(LONG) * heads * 300 * width, "a dense model copies its keys"


def test_generation_waits_as_often_as_a_dense_model(models: dict[str, Any]) -> None:
    """Of a longer answer the further waits are counted, so that those of the prompt do not matter."""
    batch, further = prompts(), {}
    for name, model in models.items():
        found = []
        for new in (3, 11):
            with Costs() as costs:
                model.generate(
                    batch.ids,
                    images=batch.images,
                    attention_mask=batch.mask,
                    do_sample=False,
                    max_new_tokens=new,
                    min_new_tokens=new,
                )
            found.append(costs.waits.total())
        further[name] = found[1] - found[0]
    assert further["sparse"] == further["dense"] > 0


def test_reserved_slots_do_not_move(models: dict[str, Any]) -> None:
    cache = new_cache(models["sparse"])
    with pytest.raises(ValueError, match=r"reserve\(5\) follows the prompt"):
        cache.reserve(5)
    places = set()
    for number, _ in enumerate(steps(models["sparse"], cache, 2 * STEP + 1)):
        if number == 0:
            cache.reserve(2 * STEP)
        places.add(tuple(buffer.data_ptr() for layer in cache.layers for buffer in layer.buffers))
    assert len(places) == 1


@torch.no_grad()
def test_a_compiled_step_gives_the_same_tokens(models: dict[str, Any]) -> None:
    """One graph without a break. The second token makes it one for any number of stored tokens; then it serves all."""
    model, batch, graphs = models["sparse"], embedded(LONG), CompileCounterWithBackend("eager")

    def step(token: Tensor, mask: Tensor, cache: SparseCache) -> Tensor:
        positions = (mask.cumsum(1) - 1)[:, -1:]
        output = model(input_ids=token, attention_mask=mask, position_ids=positions, cache=cache)
        return output.logits[:, -1:].argmax(-1)

    def answer(step: Any) -> tuple[Tensor, list[int]]:
        cache, mask = new_cache(model), batch.attention_mask
        tokens, seen = [model(**batch._asdict(), cache=cache).logits[:, -1:].argmax(-1)], []
        cache.reserve(12)
        for _ in range(12):
            mask = torch.cat([mask, torch.ones(len(mask), 1, dtype=torch.bool)], dim=1)
            tokens.append(step(tokens[-1], mask, cache))
            seen.append(graphs.frame_count)
        return torch.cat(tokens, dim=1), seen

    expected, none = answer(step)
    found, seen = answer(torch.compile(step, backend=graphs, fullgraph=True))
    assert torch.equal(found, expected)
    assert none[-1] == 0
    assert seen[1:] == [2] * 11

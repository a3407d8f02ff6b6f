"""What adapters cost at inference beyond the base, by count: operations of torch, hooks, calls of the extension."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from llava.extension import ExtensionSet
from llava.model.builder import load_pretrained_model
from llava.runtime.cache_name import cache_of
from llava.segments import Segments, Span
from mma.decoder_layer import ROUTING, PassRouting
from tests.llava.model.test_generation import prompts
from tests.mma.adapted_models import BASE, adapted_llava

ADAPTERS = 2  # of each layer: before attention and before the MLP
ROWS = {"mixed": [0, 1, 2], "alike": [0, 1]}
"""Rows of the batch of prompts: two with images and one without."""

TEXT = Span(0, 3)
SEGMENTS = {image: Segments(Span(0, 0), (Span(0, 1),) * image, TEXT, TEXT, Span(3, 3)) for image in (True, False)}


class Counted(TorchDispatchMode):
    """Counts operations, views aside."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not func.is_view and func is not torch.ops.aten._unsafe_view.default:
            self.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def model() -> Any:
    return adapted_llava()


@pytest.fixture(scope="module")
def plain() -> Any:
    return load_pretrained_model(str(BASE), device="cpu")[1]


def inputs_of(model: Any, kind: str) -> dict[str, Any]:
    """A batch of rows that begin with text or images, of one modality or of both."""
    batch = prompts()
    rows = ROWS[kind]
    images = [image for row in rows for image in batch.images_of_rows[row]]
    return {
        "input_ids": batch.ids[rows],
        "attention_mask": batch.mask[rows],
        "images": torch.stack(images).to(model.dtype),
    }


@torch.no_grad()
def operations_of_a_token(model: Any, kind: str) -> Counter[str]:
    """Operations of one decoded token of each row."""
    inputs = inputs_of(model, kind)
    seen = model.build_inputs(**inputs, padding_side="left").attention_mask
    cache = cache_of(model(**inputs, use_cache=True))
    token: Tensor = torch.full((len(seen), 1), 350)
    seen = torch.cat([seen, torch.ones(len(seen), 1, dtype=torch.bool)], dim=1)
    with Counted() as counted:
        model(input_ids=token, attention_mask=seen, position_ids=(seen.cumsum(1) - 1)[:, -1:], cache=cache)
    return counted.operations


@pytest.mark.parametrize("kind", ROWS)
def test_operations_of_a_token(kind: str, model: Any, plain: Any) -> None:
    """Two products for each adapter; where rows differ one multiplication more, and one look-up for the whole pass."""
    beyond = operations_of_a_token(model, kind) - operations_of_a_token(plain, kind)
    adapters = ADAPTERS * len(model.get_decoder().layers)
    choosing = {"aten.mul.Tensor": adapters, "aten.index.Tensor": 1} if kind == "mixed" else {}
    assert beyond == {"aten.addmm.default": 2 * adapters, **choosing}


def test_no_module_has_a_hook(model: Any) -> None:
    """The tower's norms included."""
    assert not [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]


@pytest.mark.parametrize("gradients", [False, True])
def test_nothing_is_called_between_layers(model: Any, gradients: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers of a pass are given the same object; only with gradients each gets weights of its own."""
    given: list[Any] = []
    visits: list[int] = []
    ask = ExtensionSet.layer_visits

    def asked(self: ExtensionSet, *args: Any) -> Any:
        found = ask(self, *args)
        visits.append(len(found))
        return found

    batch = {
        "inputs_embeds": torch.randn(2, 3, 40),
        "use_cache": False,
        "segments": [SEGMENTS[True], SEGMENTS[False]],
    }
    handles = [
        layer.register_forward_pre_hook(lambda _, args, kwargs: given.append(kwargs[ROUTING]), with_kwargs=True)
        for layer in model.get_decoder().layers
    ]
    try:
        with torch.no_grad():
            model.get_decoder()(**batch)  # makes the table
        given.clear()
        monkeypatch.setattr(ExtensionSet, "layer_visits", asked)
        with torch.set_grad_enabled(gradients):
            model.get_decoder()(**batch)
    finally:
        for handle in handles:
            handle.remove()
    layers = len(model.get_decoder().layers)
    if gradients:
        assert visits == [1]
        assert len([each for each in given if isinstance(each, Tensor)]) == layers, "and the tokens' own passes"
        return
    assert visits == [0]
    assert len(given) == layers
    assert isinstance(given[0], PassRouting)
    assert all(each is given[0] for each in given)

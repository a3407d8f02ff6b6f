"""Packed rows: several texts in one row are routed each by its own prompt, as if each were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DataCollatorWithFlattening

from hydralora.tuner.batch import prompt_tokens
from hydralora.tuner.caches import cache_of
from hydralora.tuner.calls.packing import sequence_starts
from hydralora.tuner.sequence import RoutingBySequenceError
from llava.runtime.cache_name import cache_argument
from tests.checkpointed import checkpoint_layers
from tests.hydralora.tuner.models import adapted

LENGTHS = (5, 6, 3)
TEXTS = torch.randint(3, 80, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0)).split(LENGTHS)
PROMPT = 2
TARGETS = [torch.cat([torch.full((PROMPT,), -100), text[PROMPT:]]) for text in TEXTS]
IDS = torch.cat(TEXTS)[None]
LABELS = torch.cat(TARGETS)[None]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
BOUNDS = torch.tensor([0, 5, 11, 14], dtype=torch.int32)
NUMBERS = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None]
TOLERANCE = 1e-6  # measured: 2e-7

WAYS: dict[str, dict[str, Any]] = {
    "positions": {"position_ids": POSITIONS},
    "positions without a batch": {"position_ids": POSITIONS[0]},
    "positions and lengths": {"position_ids": POSITIONS, "cu_seq_lens_q": BOUNDS, "cu_seq_lens_k": BOUNDS},
    "positions and numbers": {"position_ids": POSITIONS, "seq_idx": NUMBERS},
}


def alone(model: Any, labelled: bool) -> Tensor:
    """Logits (1, T, V) of the texts, each in a pass of its own."""
    targets = [{"labels": target[None]} if labelled else {} for target in TARGETS]
    rows = [model(input_ids=text[None], **target).logits for text, target in zip(TEXTS, targets, strict=True)]
    return torch.cat(rows, dim=1)


@torch.no_grad()
@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_a_packed_row_is_its_texts(routing: str, labelled: bool) -> None:
    model = adapted(routing=routing)
    labels = {"labels": LABELS} if labelled else {}
    found = model(input_ids=IDS, use_cache=False, position_ids=POSITIONS, **labels).logits
    torch.testing.assert_close(found, alone(model, labelled), rtol=0, atol=TOLERANCE)


@torch.no_grad()
def test_several_packed_rows() -> None:
    model = adapted(routing="sequence")
    ids, labels = IDS.expand(2, -1).clone(), LABELS.expand(2, -1).clone()
    ids[1], labels[1] = torch.cat([TEXTS[2], TEXTS[0], TEXTS[1]]), torch.cat([TARGETS[2], TARGETS[0], TARGETS[1]])
    positions = torch.stack([POSITIONS[0], torch.cat([torch.arange(n) for n in (3, 5, 6)])])
    found = model(input_ids=ids, labels=labels, position_ids=positions, use_cache=False).logits
    expected = alone(model, labelled=True)
    torch.testing.assert_close(found[:1], expected, rtol=0, atol=TOLERANCE)
    torch.testing.assert_close(found[1], expected[0][[*range(11, 14), *range(11)]], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
def test_where_the_texts_begin(way: str) -> None:
    starts = sequence_starts((1, 14), None, WAYS[way])
    assert starts is not None
    assert starts.tolist() == [[0] * 5 + [5] * 6 + [11] * 3]
    prompt = prompt_tokens(None, LABELS, starts)
    assert prompt is not None
    assert prompt.nonzero()[:, 1].tolist() == [0, 1, 5, 6, 11, 12]


PADDED = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
ONE_TEXT: dict[str, tuple[Tensor | None, dict[str, Any]]] = {
    "positions of padding on the left": (PADDED[:1], {"position_ids": torch.tensor([[0, 0, 0, 1, 2, 3]])}),
    "the same in transformers": (PADDED[:1], {"position_ids": torch.tensor([[1, 1, 0, 1, 2, 3]])}),
    "padding on the right": (PADDED[1:], {"position_ids": torch.tensor([[0, 1, 2, 3, 1, 1]])}),
    "a gap with a mask": (PADDED[1:], {"position_ids": torch.tensor([[0, 1, 5, 6, 0, 0]])}),
    "an image in three axes": (None, {"position_ids": torch.tensor([[[0, 1, 1, 1, 1, 3]]]).expand(3, 1, 6)}),
    "later positions": (None, {"position_ids": torch.arange(4, 10)[None]}),
    "one length": (None, {"cu_seq_lens_q": torch.tensor([0, 6])}),
}
TWO_TEXTS: dict[str, tuple[Tensor | None, dict[str, Any]]] = {
    "with a mask": (torch.ones(1, 6, dtype=torch.long), {"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}),
    "padding at the end": (PADDED[1:], {"position_ids": torch.tensor([[0, 1, 0, 1, 0, 0]])}),
    "numbers in the mask": (torch.tensor([[1, 1, 1, 2, 2, 0]]), {}),
    "a text of one token": (None, {"position_ids": torch.tensor([[0, 0, 1, 2, 3, 4]])}),
    "four axes": (None, {"position_ids": torch.tensor([[[0, 1, 2, 0, 1, 2]]]).expand(4, 1, 6)}),
    "three axes": (None, {"position_ids": torch.tensor([[[0, 1, 1, 0, 1, 1]]]).expand(3, 1, 6)}),
}


@pytest.mark.parametrize("case", ONE_TEXT)
def test_what_is_one_text(case: str) -> None:
    mask, given = ONE_TEXT[case]
    assert sequence_starts((1, 6), mask, given, continuous=mask is None) is None


@pytest.mark.parametrize("case", TWO_TEXTS)
def test_what_is_two(case: str) -> None:
    mask, given = TWO_TEXTS[case]
    starts = sequence_starts((1, 6), mask, given, continuous=mask is None)
    assert starts is not None
    valid = torch.ones(1, 6, dtype=torch.bool) if mask is None else mask.bool()
    assert len(starts[valid].unique()) == 2


def test_lengths_of_another_batch() -> None:
    with pytest.raises(ValueError, match=r"ends at 5, but the batch \(1, 6\) has 6 tokens"):
        sequence_starts((1, 6), None, {"cu_seq_lens_q": torch.tensor([0, 2, 5])})


@pytest.mark.parametrize("use_reentrant", [None, False, True])
def test_gradients_of_padding_free_training(use_reentrant: bool | None) -> None:
    """What the collator of transformers makes trains as the texts alone, with checkpoints of either kind."""
    features = [
        {"input_ids": text.tolist(), "labels": target.tolist()} for text, target in zip(TEXTS, TARGETS, strict=True)
    ]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=False)(features)
    model = adapted(routing="sequence").train()
    for text, target in zip(TEXTS, TARGETS, strict=True):
        share = int((target != -100).sum()) / int((LABELS != -100).sum())
        (model(input_ids=text[None], labels=target[None], use_cache=False).loss * share).backward()
    expected = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    packed = adapted(routing="sequence").train()
    if use_reentrant is not None:
        checkpoint_layers(packed, {"use_reentrant": use_reentrant})
        packed.enable_input_require_grads()
    packed(**batch, use_cache=False).loss.backward()
    found = {name: weight.grad for name, weight in packed.named_parameters() if weight.grad is not None}
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)


@torch.no_grad()
def test_packed_prompts_are_not_continued() -> None:
    model = adapted(routing="sequence")
    cache = cache_of(model(input_ids=IDS, position_ids=POSITIONS, use_cache=True))
    with pytest.raises(RoutingBySequenceError, match="whose rows were packed"):
        model(input_ids=IDS[:, :1], **cache_argument(model.get_base_model().forward, cache))

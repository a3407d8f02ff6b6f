"""Dropping tokens in batches: every row is what it is alone, in every precision, attention and backbone."""

from __future__ import annotations

import functools
import importlib.util
import typing
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import modeling_flash_attention_utils

from dynamic.config import SparseConfig
from dynamic.inspection import record_decisions
from llava.errors import CheckpointError
from llava.model.builder import load_pretrained_model
from llava.model.language_model.backbones import backbone_class, load_config
from llava.model.language_model.masks import layer_kinds
from tests.dynamic.sparse_models import (
    BASE,
    SHAPES,
    SMALL,
    Dialogue,
    Shape,
    attach_predictors,
    embedded,
    greedy,
    new_cache,
    prefill,
    sparse_llava,
)
from tests.llava.model.test_generation import prompts
from tests.model import backbones

pytestmark = pytest.mark.versions


class Precision(NamedTuple):
    """How the base is loaded, and how far logits may move in a batch (relative; twice what was measured)."""

    options: dict[str, Any]
    in_batch: float


PRECISIONS = {
    "fp32": Precision({"torch_dtype": torch.float32}, 1e-6),
    "bf16": Precision({"torch_dtype": torch.bfloat16}, 0.016),
    "fp16": Precision({"torch_dtype": torch.float16}, 0.0023),
    "8bit": Precision({"load_8bit": True}, 0.022),
    "4bit": Precision({"load_4bit": True}, 1e-6),
}


@functools.cache
def load(precision: str = "fp32", config: SparseConfig = SMALL) -> Any:
    if precision in ("4bit", "8bit") and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("the extra `quant` is not installed")
    return sparse_llava(config, **PRECISIONS[precision].options)


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_does_not_depend_on_its_batch(precision: str, side: str) -> None:
    """One image, two and none; greedy, with the decisions of all predictors."""
    model, batch, limit = load(precision), prompts(side), PRECISIONS[precision].in_batch
    together = greedy(model, batch.ids, batch.images, attention_mask=batch.mask)
    decisions = []
    for number, (row, images) in enumerate(zip(batch.rows, batch.images_of_rows, strict=True)):
        alone = greedy(model, row[None], images)
        # In half precision rounding may decide between two tokens, and what follows differs.
        same = (alone.tokens[0] == together.tokens[number]).long().cumprod(0)
        count = min(len(same), int(same.sum()) + 1)
        assert distance(together.logits[number, :count], alone.logits[0, :count]) <= limit
        assert count == len(same) or limit > 1e-3
        if count == len(same):
            assert torch.equal(together.stored[number], alone.stored[0])
            assert [lengths[number] for lengths in together.cache.report().lengths] == [
                lengths[0] for lengths in alone.cache.report().lengths
            ]
        decisions.append(alone.stored)
    assert torch.cat(decisions).any()
    assert not torch.cat(decisions).all(), "the decisions must be mixed"


@pytest.mark.parametrize("with_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_prompt_of_any_shape(side: str, with_cache: bool) -> None:
    """Several images of different size in a row, none, and padding on either side, which is dropped too."""
    model, batch = load(), embedded(side=side)
    logits = prefill(model, batch, new_cache(model) if with_cache else None)
    kept = []
    for row, shape in enumerate(SHAPES):
        with record_decisions(model) as log:
            alone = prefill(model, embedded((shape,)), new_cache(model) if with_cache else None)[0]
        kept.append(len(alone))
        ours = logits[row, -len(alone) :] if side == "left" else logits[row, : len(alone)]
        torch.testing.assert_close(ours, alone, rtol=0, atol=1e-5)
        images = log.prompts[0].images(0)
        assert [len(indices) for indices in images] == [int(size * 0.4) for size in shape.images]
        assert log.prompts[0].instruction(0)[-1] == shape.instruct - 1
        assert len(alone) == shape.system + sum(map(len, images)) + len(log.prompts[0].instruction(0))
    assert logits.shape[1] == max(kept)
    assert len(set(kept)) > 2


def test_a_prompt_that_ends_in_a_image() -> None:
    """Its last token stays even where the predictor would drop it: generation starts from it."""
    model, beyond = load(), 0
    for size in (9, 10, 11, 12):
        with record_decisions(model) as log:
            prefill(model, embedded((Shape(3, (size,), 0),)))
        assert log.prompts[0].keep[0, -1]
        beyond += len(log.prompts[0].images(0)[0]) - int(size * 0.4)
    assert 0 < beyond <= 4, "the predictor must drop the last token of one of them"


def test_keeping_everything_is_the_dense_model() -> None:
    """Rate 1.0 without text predictors: not a bit differs, and any cache will do."""
    config = SparseConfig(**{**SMALL.to_dict(), "vision_keep_rate": 1.0, "use_text_predictor": False})
    model, dense, batch = load("fp32", config), load_dense(), prompts()
    assert model.extensions.make_cache(model) is None
    assert torch.equal(prefill(model, embedded()), prefill(dense, embedded()))
    ours, theirs = (greedy(each, batch.ids, batch.images, attention_mask=batch.mask) for each in (model, dense))
    assert torch.equal(ours.logits, theirs.logits)
    other = greedy(load(), batch.ids, batch.images, attention_mask=batch.mask)
    assert distance(other.logits, theirs.logits) > 0.01, "dropping must matter"


@functools.cache
def load_dense() -> Any:
    model = load_pretrained_model(str(BASE), device="cpu")[1]
    return model.requires_grad_(False)


def test_without_cache_the_tokens_are_the_same() -> None:
    """Every step computes the whole sequence again and comes to the decisions of the steps before."""
    model, batch = load(), prompts()
    cached, whole = (
        greedy(model, batch.ids, batch.images, new=10, attention_mask=batch.mask, use_cache=use_cache)
        for use_cache in (True, False)
    )
    assert whole.cache is None
    torch.testing.assert_close(whole.logits, cached.logits, rtol=0, atol=1e-5)
    assert torch.equal(whole.tokens, cached.tokens)
    with record_decisions(model) as log:
        model.generate(
            batch.ids,
            images=batch.images,
            attention_mask=batch.mask,
            use_cache=False,
            do_sample=False,
            max_new_tokens=10,
            min_new_tokens=10,
        )
    for row in range(3):
        expected = cached.stored[row, :-1].nonzero().flatten().tolist()
        assert log.prompts[-1].generated(row).tolist() == [*expected, 8]  # and the newest token


def test_beams() -> None:
    """Rows in a batch get what they get alone, and what recomputation without cache finds."""
    model, batch = load(), prompts()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": 3}
    beams = model.generate(batch.ids, images=batch.images, attention_mask=batch.mask, **options)
    whole = model.generate(batch.ids, images=batch.images, attention_mask=batch.mask, use_cache=False, **options)
    assert torch.equal(beams, whole)
    for number, (row, images) in enumerate(zip(batch.rows, batch.images_of_rows, strict=True)):
        assert torch.equal(beams[number], model.generate(row[None], images=images, **options)[0])
    greedily = greedy(model, batch.ids, batch.images, attention_mask=batch.mask).tokens
    assert not torch.equal(beams, greedily)


def test_sampling() -> None:
    """The same seed gives the same tokens, another seed others, and top_k=1 the greedy ones."""
    model, batch = load(), prompts()

    def sample(seed: int, **options: Any) -> Tensor:
        torch.manual_seed(seed)
        options = {"do_sample": True, "temperature": 1.0, "max_new_tokens": 6, "min_new_tokens": 6} | options
        return model.generate(batch.ids, images=batch.images, attention_mask=batch.mask, **options)

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))
    assert torch.equal(sample(0, top_k=1), greedy(model, batch.ids, batch.images, attention_mask=batch.mask).tokens)


def test_several_answers_to_one_prompt() -> None:
    model, batch = load(), prompts()
    torch.manual_seed(0)
    options = {"do_sample": True, "num_return_sequences": 3, "max_new_tokens": 5, "min_new_tokens": 5}
    assert len(model.generate(batch.rows[0][None], images=batch.images_of_rows[0], **options).unique(dim=0)) == 3


@pytest.mark.parametrize("kind", backbones.MODELS)
def test_backbones(kind: str, tmp_path: Path) -> None:
    """The same on every backbone with full attention; one with a window is refused."""
    backbones.plain_model(kind).save_pretrained(tmp_path)
    model = backbone_class(tmp_path).from_pretrained(tmp_path, config=load_config(tmp_path)).eval()
    if "sliding_attention" in layer_kinds(model.config):
        with pytest.raises(CheckpointError, match=r"sliding_window 6.*another one than it was trained with"):
            attach_predictors(model)
        return
    attach_predictors(model)
    together = Dialogue(model, embedded())
    logits = [together.logits]
    for _ in range(4):
        logits.append(together.follow(logits[-1].argmax(-1, keepdim=True)))
    for row, shape in enumerate(SHAPES):
        alone = Dialogue(model, embedded((shape,)))
        for step in logits:
            assert distance(step[row], alone.logits[0]) < 2e-6
            alone.follow(step[row].argmax(-1)[None, None])


def test_later_turns_in_a_batch() -> None:
    """After some tokens every user says something else, of another length; then the answers go on."""
    model = load()
    turns = [torch.randint(3, 890, (1, length)) for length in (7, 3, 1, 5)]
    longest = max(turn.shape[1] for turn in turns)
    padded = torch.cat([torch.nn.functional.pad(turn, (longest - turn.shape[1], 0)) for turn in turns])
    mask = torch.stack([torch.arange(longest) >= longest - turn.shape[1] for turn in turns])

    def talk(dialogue: Dialogue, turn: Tensor, mask: Tensor | None, answer: Tensor) -> list[Tensor]:
        logits = [dialogue.follow(answer[:, :1]), dialogue.follow(turn, mask)]
        decisions.append(dialogue.stored)
        return [*logits, *(dialogue.follow(token[:, None]) for token in answer[:, 1:].T)]

    decisions: list[Tensor] = []
    answers = torch.randint(3, 890, (4, 4))
    together = Dialogue(model, embedded())
    logits = talk(together, padded, mask, answers)
    assert decisions[0][~mask].any() == 0
    lengths = together.cache.report().lengths
    for row, (shape, turn) in enumerate(zip(SHAPES, turns, strict=True)):
        if turn.shape[1] == 1:
            continue  # alone, a single token counts as generated
        alone = Dialogue(model, embedded((shape,)))
        expected = talk(alone, turn, None, answers[row : row + 1])
        for ours, theirs in zip(logits, expected, strict=True):
            assert distance(ours[row], theirs[0]) < 2e-6
        assert decisions[-1][0, -1]
        assert torch.equal(decisions[0][row][mask[row]], decisions[-1][0])
        assert [each[row] for each in lengths] == [each[0] for each in alone.cache.report().lengths]
    assert not decisions[0][mask].all()


@pytest.mark.parametrize("implementation", ["eager", "flash_attention_2"])
def test_attention_implementations(implementation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks in the form that each implementation wants; FlashAttention's kernels are replaced by plain torch."""
    model = load()
    turn = torch.randint(3, 890, (4, 5))
    mask = torch.ones_like(turn, dtype=torch.bool)
    mask[0, :2] = False

    def run() -> Tensor:
        dialogue = Dialogue(model, embedded())
        token = dialogue.logits.argmax(-1, keepdim=True)
        alone = Dialogue(model, embedded(SHAPES[:1]))
        steps = [dialogue.logits, dialogue.follow(token), dialogue.follow(turn, mask), dialogue.follow(token)]
        return torch.cat([*steps, alone.logits, alone.follow(token[:1]), alone.follow(turn[:1])])

    expected = run()
    plain = plain_flash_attention()
    monkeypatch.setattr(modeling_flash_attention_utils, "lazy_import_flash_attention", lambda *args, **kwargs: plain)
    monkeypatch.setattr(model.config, "_attn_implementation", implementation)
    torch.testing.assert_close(run(), expected, rtol=0, atol=1e-5)


def plain_flash_attention() -> Any:
    """What transformers imports from FlashAttention, computed by definition; tensors are (tokens, H, E)."""

    def one(q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float) -> Tensor:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        scores = torch.einsum("qhe,khe->hqk", q, k) * softmax_scale
        if causal:  # aligned at the last query and the last key
            visible = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
            scores = scores.masked_fill(~visible, -torch.inf)
        return torch.einsum("hqk,khe->qhe", scores.softmax(-1), v)

    def flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, softmax_scale: float) -> Tensor:
        return torch.stack([one(*row, causal, softmax_scale) for row in zip(q, k, v, strict=True)])

    def varlen(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, causal: bool, softmax_scale: float
    ) -> Tensor:
        lengths = [cu_seqlens.diff().tolist() for cu_seqlens in (cu_seqlens_q, cu_seqlens_k)]
        rows = zip(q.split(lengths[0]), k.split(lengths[1]), v.split(lengths[1]), strict=True)
        return torch.cat([one(*row, causal, softmax_scale) for row in rows])

    def options(is_causal: bool, softmax_scale: float, **_: Any) -> dict[str, Any]:
        return {"causal": is_causal, "softmax_scale": softmax_scale}

    pad, unpad = modeling_flash_attention_utils._pad_input, modeling_flash_attention_utils._unpad_input
    hints = typing.get_type_hints(modeling_flash_attention_utils.lazy_import_flash_attention)
    last = typing.get_args(hints.get("return"))[-1:]
    pair = any(typing.get_origin(kind) is tuple for kind in last)  # since transformers 5.24, one for paged caches too
    return (flash, varlen, None, pad, unpad), (options, options) if pair else options

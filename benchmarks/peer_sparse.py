"""Prefill and decoding of a Dynamic-LLaVA, of the dense model with a growing and with a static cache, and of FastV.

Everything begins at the decoder, as in `benchmarks/dynamic.py`: an image between two tokens, then given tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StaticCache

from benchmarks import sparse_models as models
from benchmarks.fastv import FastV
from benchmarks.floors import Rates
from benchmarks.llava_models import Shape
from benchmarks.measuring import Clock, quotient, spread, take_turns
from benchmarks.peer_models import check_equal
from dynamic.config import SparseConfig
from dynamic.flops import Decoder, Workload, decode, kv_bytes, prefill
from llava.runtime.cache_name import cache_of

OURS = "Dynamic-LLaVA"
DENSE, STATIC, COMPILED = "dense", "dense, static cache", "dense, static cache, compiled"
FASTV, FASTV_EQUAL = "FastV, half of the image", "FastV, as many tokens"
TOLERANCE = 1e-4
"""Of sums of absolute logits."""


def settings_of(shape: Shape, keep: float) -> SparseConfig:
    """The published recipe: predictors of images and of generated text, from the third layer on."""
    d = max(8, shape.width // 8)
    return SparseConfig(
        vision_keep_rate=keep, use_instruct_predictor=False, d_model=d, nhead=8 if d % 8 == 0 else 1,
        dim_feedforward=4 * d,
    )  # fmt: skip


class Static:
    """The dense model with a static cache, which is made once and emptied for each prompt."""

    def __init__(self, model: Any, room: int, compiled: bool = False) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=room)
        self.one = torch.compile(model) if compiled else model

    @torch.no_grad()
    def prefill(self, prompt: models.Prompt) -> Tensor:
        """Logits (B, 1, V) of the last position."""
        self.cache.reset()
        output = self.model(inputs_embeds=prompt.embeddings, cache=self.cache, use_cache=True, logits_to_keep=1)
        logits: Tensor = output.logits
        return logits

    @torch.no_grad()
    def feed(self, ids: Tensor) -> Tensor:
        """Logits (B, 1, V) after given tokens (B, T)."""
        for column in ids.unbind(dim=1):
            logits: Tensor = self.one(input_ids=column[:, None], cache=self.cache, use_cache=True).logits
        return logits


@torch.no_grad()
def dense_logits(dense: Any, prompt: models.Prompt, ids: Tensor) -> list[float]:
    """Sums of the absolute logits behind the prompt, and behind the tokens."""
    cache = dense.extensions.make_cache(dense)
    first = models.prefill_output(dense, prompt, cache)
    models.feed(dense, cache_of(first), ids[:, :-1])
    last = dense(input_ids=ids[:, -1:], cache=cache_of(first), use_cache=True)
    return [each.logits.abs().sum().item() for each in (first, last)]


def check_same(dense: Any, statics: Sequence[Static], prompt: models.Prompt, ids: Tensor) -> None:
    """Static caches give the dense model's logits, and so does FastV when it keeps everything.

    Raises:
        FlagError: they do not.
    """
    expected = dense_logits(dense, prompt, ids)
    for static in statics:
        found = [static.prefill(prompt).abs().sum().item(), static.feed(ids).abs().sum().item()]
        check_equal("logits with a static cache", found, expected, TOLERANCE)
    whole = FastV(dense, keep=1.0)
    logits, cache = whole.prefill(prompt)
    whole.feed(cache, ids[:, :-1])
    found = [logits.abs().sum().item(), whole.step(cache, ids[:, -1:]).abs().sum().item()]
    check_equal("logits of FastV that keeps everything", found, expected, TOLERANCE)


def measure(
    shape: Shape, keep: float, batch: int, tokens: int, compiled: bool, clock: Clock, rounds: int, rates: Rates
) -> dict[str, Any]:
    """Times of all models for `batch` rows, and every other model's over ours.

    Raises:
        FlagError: what should be the same work is not.
    """
    settings = settings_of(shape, keep)
    size = models.Size(shape.layers, shape.width, shape.inner, shape.heads, shape.patches, shape.vocabulary)
    cpu = torch.device("cpu")
    dense, sparse = (models.build(size, each, cpu, torch.float32) for each in (None, settings))
    prompt, ids = models.make_prompt(dense, size, batch), models.random_ids(dense, batch, tokens)
    room = shape.patches + 2 + tokens
    statics = {STATIC: Static(dense, room)} | ({COMPILED: Static(dense, room, compiled=True)} if compiled else {})
    check_same(dense, list(statics.values()), prompt, ids)
    rules = {FASTV: FastV(dense, settings.sparse_layer), FASTV_EQUAL: FastV(dense, settings.sparse_layer, keep)}

    # The cache of each prompt is kept, for decoding continues behind it.
    caches: dict[str, Any] = {}
    prefills: dict[str, Callable[[], object]] = {
        OURS: lambda: caches.update({OURS: models.prefill(sparse, prompt)}),
        DENSE: lambda: caches.update({DENSE: models.prefill(dense, prompt)}),
        STATIC: lambda: statics[STATIC].prefill(prompt),
    }
    decodings: dict[str, Callable[[], object]] = {
        OURS: lambda: models.feed(sparse, caches[OURS], ids),
        DENSE: lambda: models.feed(dense, caches[DENSE], ids),
    }
    for name, rule in rules.items():
        prefills[name] = lambda name=name, rule=rule: caches.update({name: rule.prefill(prompt)[1]})
        decodings[name] = lambda name=name, rule=rule: rule.feed(caches[name], ids)
    for name, static in statics.items():
        decodings[name] = lambda static=static: static.feed(ids)

    first = take_turns(prefills, clock, rounds)
    then: dict[str, list[float]] = {name: [] for name in decodings}
    for _ in range(rounds):
        for run in (*prefills.values(), *(lambda each=each: each.prefill(prompt) for each in statics.values())):
            run()  # outside the clock
        for name, values in take_turns(decodings, clock, 1, warmup=0).items():
            then[name] += values
    return {
        "batch": batch,
        "tokens": tokens,
        "keep_rate": keep,
        "sparse_layer": settings.sparse_layer,
        "prefill": _entry(first, _prefill_floors(shape, settings, batch, rates)),
        "decoding": _entry(then, _decoding_floors(shape, settings, batch, tokens, rates)),
    }


def _entry(times: dict[str, list[float]], floors: dict[str, float]) -> dict[str, Any]:
    """Seconds, floors, and ratios to ours, of the floors too."""
    return {
        "seconds": {name: spread(values) for name, values in times.items()},
        "floor": floors,
        "peer_over_ours": {name: quotient(values, times[OURS]) for name, values in times.items() if name != OURS},
        "floors_over_ours": {name: floors[name] / floors[OURS] for name in times if name != OURS},
    }


def _decoder(shape: Shape) -> Decoder:
    return Decoder(shape.width, shape.layers, shape.inner, shape.width, shape.width)


def _prefill_floors(shape: Shape, settings: SparseConfig, batch: int, rates: Rates) -> dict[str, float]:
    """By operations of the layers and of one row of the head; predictors and scores are left out."""
    decoder, work = _decoder(shape), Workload(image=shape.patches, text=2)
    head = 2 * shape.width * shape.vocabulary
    half = SparseConfig(vision_keep_rate=0.5, sparse_layer=settings.sparse_layer)
    costs = {name: prefill(decoder, each, work) for name, each in ((OURS, settings), (FASTV, half))}
    flops = {OURS: costs[OURS].sparse, FASTV_EQUAL: costs[OURS].sparse, FASTV: costs[FASTV].sparse}
    flops |= dict.fromkeys((DENSE, STATIC), costs[OURS].dense)
    return {name: rates.floor(batch * (value + head)) for name, value in flops.items()}


def _decoding_floors(shape: Shape, settings: SparseConfig, batch: int, tokens: int, rates: Rates) -> dict[str, float]:
    """By operations, or by reading all weights and the kept keys and values for each token."""
    decoder, head = _decoder(shape), shape.width * shape.vocabulary
    weights = shape.layers * (4 * shape.width**2 + 3 * shape.width * shape.inner) + head
    shares = {OURS: (settings.vision_keep_rate, 0.5), FASTV: (0.5, 1.0), FASTV_EQUAL: (settings.vision_keep_rate, 1.0)}
    found = {}
    for name, (share, output) in shares.items():
        config = SparseConfig(vision_keep_rate=share, sparse_layer=settings.sparse_layer)
        work = Workload(shape.patches, 2, tokens, kept_output=output)
        middle = Workload(shape.patches, 2, tokens // 2, kept_output=output)  # its cache is the mean of all steps
        flops, read = decode(decoder, config, work), kv_bytes(decoder, config, middle, 4)
        dense = rates.floor(batch * (flops.dense + 2 * tokens * head), tokens * (4 * weights + batch * read.dense))
        found[name] = rates.floor(
            batch * (flops.sparse + 2 * tokens * head), tokens * (4 * weights + batch * read.sparse)
        )
    return found | dict.fromkeys((DENSE, STATIC, COMPILED), dense)

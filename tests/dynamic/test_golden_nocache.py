"""Decoding without cache: the original's rule put together from our functions, and what we do instead.

The original keeps the k generated tokens with the largest keep logit, k being that of the batch's row with most; it
repeats the last token of the prompt on the first call, and remembers the start of the answer for ever. With the
instruct predictor it judges generated tokens as instruction. We decide as with cache, so that the tokens are the same.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynamic.config import SparseConfig, kept_count
from dynamic.inspection import record_decisions
from dynamic.layer import hard_keep, top_keep
from dynamic.model import predictors
from dynamic.sequence import take_positions, with_mask
from llava.extension import Attached, Extension, ExtensionSet
from llava.segments import DecoderState
from tests.dynamic.golden_model import golden_model
from tests.golden import load_case

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class OriginalRule(Extension):
    """Section 3.9 of the golden data, for batches whose image lies at one place; `start` outlives its prompt."""

    name = "original_rule"

    def __init__(self, config: SparseConfig, start: int | None) -> None:
        self.settings, self.start = config, start
        self.positions: Tensor | None = None

    def before_layer(self, model: Any, config: Any, index: int, state: DecoderState) -> DecoderState:
        if index != self.settings.sparse_layer:
            return state
        judges, image = predictors(model), state.segments[0].images[0]
        x, count = state.hidden_states, kept_count(image.end - image.start, self.settings.vision_keep_rate)
        best = image.start + top_keep(judges.image(x[:, image.start : image.end]), count)  # (B, count)
        rows = torch.arange(x.shape[1]).expand(len(x), -1)  # (B, L)
        kept = torch.cat([rows[:, : image.start], best, rows[:, image.end :]], dim=1)
        if self.start is None:
            self.start = kept.shape[1]
        logits = judges.output_text(take_positions(state, kept[:, self.start : -1]).hidden_states)  # (B, n, 2)
        k = int(hard_keep(logits).sum(dim=1).max()) if logits.numel() else 0
        largest = self.start + logits[..., 0].topk(k, dim=1).indices.sort(dim=1).values
        kept = torch.cat([kept[:, : self.start], kept.gather(1, largest), kept[:, -1:]], dim=1)
        state = take_positions(state, kept)
        self.positions = state.position_ids
        return with_mask(model, self.settings, replace(state, cache=None), torch.ones_like(kept, dtype=torch.bool))


def tokens_so_far(tensors: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    return {
        "input_ids": torch.cat([tensors["in/input_ids"], tensors["out/tokens"][:, :step]], dim=1),
        "images": tensors["in/images"],
    }


@pytest.mark.parametrize("name", ["nocache_b1", "nocache_b2", "nocache_quirk_stale"])
def test_the_rule_of_the_original(golden_tower: Path, name: str) -> None:
    case, tensors = load_case("dynamic", name)
    ours, model = (golden_model(golden_tower, case["sparse_config"])[0] for _ in range(2))
    rule = OriginalRule(SparseConfig.from_dict(case["sparse_config"]), case["hp"].get("answer_indice_preset"))
    model.extensions = model.get_model().extensions = ExtensionSet([Attached(rule, {})])  # the predictors stay
    for step, expected in enumerate(case["scalars"]["steps"]):
        with torch.no_grad():
            logits = model(**tokens_so_far(tensors, step), use_cache=False).logits[:, -1]
        torch.testing.assert_close(logits, tensors["out/logits_last"][step], **CLOSE)
        assert rule.positions.tolist() == expected["position_ids_after"]
        assert rule.start == expected["answer_indice"]
    with torch.no_grad():
        other = ours(**tokens_so_far(tensors, 0), use_cache=False).logits[:, -1]
    differs = (other - tensors["out/logits_last"][0]).abs().max()
    assert differs > 1e-3, "the last token twice, or a stale start, must make a difference"


def test_generated_tokens_given_as_prompt_are_instruction(golden_tower: Path) -> None:
    """`nocache_quirk_instruct`: ids alone do not tell what was generated; `generate` does, and decides otherwise."""
    case, tensors = load_case("dynamic", "nocache_quirk_instruct")
    model, _ = golden_model(golden_tower, case["sparse_config"])
    for step, expected in enumerate(case["scalars"]["steps"]):
        with torch.no_grad(), record_decisions(model) as log:
            logits = model(**tokens_so_far(tensors, step), use_cache=False).logits[:, -1]
        torch.testing.assert_close(logits, tensors["out/logits_last"][step], **CLOSE)
        assert log.prompts[0].keep[0].nonzero().flatten().tolist() == expected["position_ids_after"][0]


@pytest.mark.parametrize("name", ["nocache_b1", "nocache_b2", "nocache_quirk_stale", "nocache_quirk_instruct"])
def test_ours_is_what_the_cache_gives(golden_tower: Path, name: str) -> None:
    case, tensors = load_case("dynamic", name)
    model, _ = golden_model(golden_tower, case["sparse_config"])
    options = {"do_sample": False, "max_new_tokens": 10, "min_new_tokens": 10}
    inputs = {"inputs": tensors["in/input_ids"], "images": tensors["in/images"], **options}
    with record_decisions(model) as log:
        cached = model.generate(**inputs)
    assert torch.equal(model.generate(**inputs, use_cache=False), cached)
    assert log.stored().any()
    assert not log.stored().all()

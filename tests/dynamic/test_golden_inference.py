"""Prefill, decoding and later turns against the original's numbers; batches against its samples alone.

The golden data's own tolerance is 1e-4; our measured worst case is 9e-6 at logits up to 10.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynamic.cache import SparseCache
from dynamic.inspection import DecisionLog, record_decisions
from llava.extension import Extension
from llava.runtime.cache_name import cache_of
from llava.segments import DecoderState
from tests.dynamic.golden_model import golden_model, segments_of
from tests.golden import load_case

CLOSE = {"rtol": 1e-4, "atol": 1e-4}


class Listener(Extension):
    """Remembers what enters each layer; attached behind 'dynamic', it sees the shortened sequence."""

    name = "listener"

    def __init__(self) -> None:
        self.states: dict[int, DecoderState] = {}

    def before_layer(self, model: Any, config: Any, index: int, state: DecoderState) -> DecoderState:
        self.states[index] = replace(state)
        return state


class Case:
    """A golden case, the model with its configuration, and what was decided."""

    def __init__(self, name: str, tower: Path) -> None:
        content, self.tensors = load_case("dynamic", name)
        self.hp, self.scalars = content["hp"], content["scalars"]
        self.model, _ = golden_model(tower, content["sparse_config"])
        self.listener = Listener()
        self.model.extensions.attach(self.model, self.listener, {})
        self.log = DecisionLog()

    def prefill(self, cache: SparseCache | None, **kwargs: Any) -> Tensor:
        """Logits of a prompt that is given as embeddings."""
        segments = segments_of(self.hp["input_embeds_indices"])
        embeds = self.tensors["in/inputs_embeds"]
        return self.run(inputs_embeds=embeds, segments=segments, cache=cache, **kwargs)

    def run(self, **kwargs: Any) -> Tensor:
        with torch.no_grad(), record_decisions(self.model) as self.log:
            return self.model(use_cache=kwargs.get("cache") is not None, **kwargs).logits

    def cache(self) -> SparseCache:
        cache = self.model.extensions.make_cache(self.model)
        assert isinstance(cache, SparseCache)
        return cache


def in_padded_form(segments: Any) -> list[dict[str, list[int]]]:
    return [
        {
            "system": list(row.system),
            "image": list(row.images[0]),
            "instruct": list(row.instruct),
            "answer": list(row.answer),
            "last_instruct": list(row.last_instruct),
        }
        for row in segments
    ]


@pytest.mark.parametrize("with_cache", [True, False], ids=["cache", "no cache"])
@pytest.mark.parametrize("name", ["b1_k02", "b1_k05", "b2_k02", "b2_k05", "b1_instruct"])
def test_prefill(golden_tower: Path, name: str, with_cache: bool) -> None:
    case = Case(f"prefill_{name}", golden_tower)
    cache = case.cache() if with_cache else None
    logits = case.prefill(cache)
    tensors, scalars = case.tensors, case.scalars
    torch.testing.assert_close(logits, tensors["out/logits"], **CLOSE)
    torch.testing.assert_close(logits[:, -1], tensors["out/logits_last"], **CLOSE)
    batch = len(logits)
    kept = [case.log.prompts[0].images(row)[0].tolist() for row in range(batch)]
    assert kept == scalars["kept_image_index"]
    if "kept_last_instruct_index" in scalars:
        assert [case.log.prompts[0].instruction(row).tolist() for row in range(batch)] == scalars[
            "kept_last_instruct_index"
        ]
    state = case.listener.states[2]
    assert torch.equal(state.position_ids, tensors["out/position_ids_after"].expand(batch, -1))
    assert torch.equal(case.listener.states[1].position_ids, tensors["out/position_ids_before"])
    if "out/sparse_layer_input_after_drop" in tensors:
        torch.testing.assert_close(state.hidden_states, tensors["out/sparse_layer_input_after_drop"], **CLOSE)
    assert in_padded_form(state.segments) == scalars["input_embeds_indices_after"]
    if cache is not None:
        assert cache.report().lengths == scalars["true_cache_length_per_layer"]
        assert [cache.get_seq_length(layer) for layer in range(4)] == scalars["kv_len_per_layer"]
        if "out/key_cache_last" in tensors:
            torch.testing.assert_close(cache.layers[-1].keys, tensors["out/key_cache_last"], **CLOSE)


def test_a_left_padded_batch_is_not_sliced_by_its_first_sample(golden_tower: Path) -> None:
    """`prefill_quirk_left_padding`: sample 0 as the original has it, sample 1 as it is alone."""
    case = Case("prefill_quirk_left_padding", golden_tower)
    mask = case.tensors["in/attention_mask"]
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    logits = case.prefill(case.cache(), attention_mask=mask, position_ids=positions)
    torch.testing.assert_close(logits[0], case.tensors["out/logits"][0], **CLOSE)
    padding = int((mask[1] == 0).sum())
    segments = segments_of(case.hp["input_embeds_indices"])[1]
    shifted = segments_of(
        [{k: [bound - padding for bound in span] for k, span in in_padded_form([segments])[0].items()}]
    )
    alone = case.run(inputs_embeds=case.tensors["in/inputs_embeds"][1:, padding:], segments=shifted)
    assert alone.shape[1] == logits.shape[1] - padding
    torch.testing.assert_close(logits[1, padding:], alone[0], rtol=0, atol=1e-5)
    assert not torch.allclose(logits[1, padding:], case.tensors["out/logits"][1, padding:], atol=0.1)


def steps(case: Case, tokens: Tensor, cache: SparseCache) -> Iterator[tuple[Tensor, Tensor | None, list[Any]]]:
    """Last logits (B, V), decision (B,) and cache lengths after the prompt and after each of `tokens` but the last."""
    logits = case.prefill(cache)
    yield logits[:, -1], None, cache.report().lengths
    for step in range(tokens.shape[1] - 1):
        logits = case.run(input_ids=tokens[:, step : step + 1], cache=cache)
        yield logits[:, -1], case.log.stored()[:, 0], cache.report().lengths


@pytest.mark.parametrize("name", ["decode_b1", "decode_b2_alone_0", "decode_b2_alone_1"])
def test_decoding(golden_tower: Path, name: str) -> None:
    case = Case(name, golden_tower)
    cache = case.cache()
    expected = case.tensors
    for step, (logits, decision, lengths) in enumerate(steps(case, expected["out/tokens"], cache)):
        torch.testing.assert_close(logits, expected["out/logits"][step], **CLOSE)
        assert lengths == expected["out/true_cache_length"][step].tolist()
        if decision is not None:
            assert decision.long().tolist() == expected["out/text_decision"][step].tolist()
            assert case.listener.states[2].position_ids.tolist() == [[int(expected["out/position_of_input"][step])]]
    if "out/final_key_cache_last_layer" in expected:
        torch.testing.assert_close(cache.layers[-1].keys, expected["out/final_key_cache_last_layer"], **CLOSE)
    report = cache.report()
    assert report.bytes_held == report.bytes_of_tokens + report.bytes_of_free_slots


def test_a_batch_decodes_as_its_samples_alone(golden_tower: Path) -> None:
    """`decode_b2_original` lets attention see padding; the samples alone are the reference."""
    case = Case("decode_b2_original", golden_tower)
    cache = case.cache()
    alone = [load_case("dynamic", f"decode_b2_alone_{row}")[1] for row in range(2)]
    tokens = torch.cat([each["out/tokens"] for each in alone])
    differs = 0.0
    for step, (logits, decision, lengths) in enumerate(steps(case, tokens, cache)):
        torch.testing.assert_close(logits, torch.cat([each["out/logits"][step] for each in alone]), **CLOSE)
        assert lengths == torch.cat([each["out/true_cache_length"][step] for each in alone], dim=1).tolist()
        if decision is not None:
            assert decision.long().tolist() == [int(each["out/text_decision"][step]) for each in alone]
        same_tokens = torch.equal(tokens[:, :step], case.tensors["out/tokens"][:, :step])
        differs = max(differs, float((logits - case.tensors["out/logits"][step]).abs().max()) if same_tokens else 0.0)
    assert differs > 1e-3, "the original's padding must make a difference"
    kept = [int(each["out/true_cache_length"][-1, -1]) for each in alone]
    assert cache.get_seq_length(3) == max(kept) > min(kept)


def test_greedy_generation(golden_tower: Path) -> None:
    case = Case("generate_b1", golden_tower)
    tensors = case.tensors
    with record_decisions(case.model) as log:
        out = case.model.generate(
            tensors["in/input_ids"],
            images=tensors["in/images"],
            do_sample=False,
            max_new_tokens=24,
            min_new_tokens=24,
            output_logits=True,
            return_dict_in_generate=True,
        )
    assert out.sequences.tolist() == tensors["out/sequences"][:, 1:].tolist()
    torch.testing.assert_close(torch.stack(out.logits), tensors["out/scores"], **CLOSE)
    assert log.stored().T.long().tolist() == tensors["out/text_decision"][1:].tolist()
    assert cache_of(out).report().lengths == tensors["out/true_cache_length"][-1].tolist()


@pytest.mark.parametrize("name", ["multiround_instruct", "multiround_noinstruct"])
def test_a_later_turn_on_a_filled_cache(golden_tower: Path, name: str) -> None:
    case = Case(name, golden_tower)
    cache = case.cache()
    call = 0
    for turn, length in enumerate(case.hp["steps"]):
        ids = case.tensors[f"in/round{turn}_input_ids"]
        for _ in range(length):
            images = case.tensors["in/images"] if call == 0 else None
            logits = case.run(input_ids=ids, images=images, cache=cache)
            expected = case.scalars["calls"][call]
            torch.testing.assert_close(logits, case.tensors[f"out/call{call}_logits"], **CLOSE)
            assert case.listener.states[0].position_ids.tolist() == expected["layer0_position_ids"]
            assert case.listener.states[3].position_ids.tolist() == expected["last_layer_position_ids"]
            assert cache.report().lengths == expected["true_cache_length"]
            if expected["text_decision"] is not None:
                assert case.log.stored().long().tolist() == expected["text_decision"]
            ids = logits[:, -1:].argmax(-1)
            assert ids.flatten().tolist() == expected["argmax"]
            call += 1
    if "out/final_key_cache_last_layer" in case.tensors:
        torch.testing.assert_close(cache.layers[-1].keys, case.tensors["out/final_key_cache_last_layer"], **CLOSE)

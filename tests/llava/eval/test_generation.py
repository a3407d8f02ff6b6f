"""Sampling that belongs to the question, not to the batch."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from llava.errors import FlagError
from llava.eval.answering.generation import TOP_K, GenerationOptions, RowSampler

VOCABULARY = 120
DRAWS = 4000


def logits(rows: int) -> torch.Tensor:
    return torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(3)) * 2


def draw(options: GenerationOptions, keys: list[str], scores: torch.Tensor) -> list[int]:
    masked = RowSampler(options, keys)(torch.zeros(len(keys), 1, dtype=torch.long), scores)
    assert masked.dtype == scores.dtype
    assert (masked > -torch.inf).sum(-1).tolist() == [1] * len(keys)
    return masked.argmax(-1).tolist()


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, None), (0.7, 0.8), (0.2, 0.95)])
def test_draws_follow_the_distribution_of_transformers(temperature: float, top_p: float | None) -> None:
    scores = logits(1)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(temperature), TopKLogitsWarper(TOP_K)])
    if top_p is not None:
        warpers.append(TopPLogitsWarper(top_p))
    expected = warpers(None, scores).softmax(-1)[0]
    options = GenerationOptions(temperature=temperature, top_p=top_p)
    keys = [str(number) for number in range(DRAWS)]
    counts = Counter(draw(options, keys, scores.expand(DRAWS, -1)))
    assert all(expected[token] > 0 for token in counts)
    for token in expected.topk(5).indices.tolist():
        share = expected[token].item()
        # Four standard errors: the draws are fixed by the seed, so this cannot fail by chance on another machine.
        assert counts[token] / DRAWS == pytest.approx(share, abs=4 * (share * (1 - share) / DRAWS) ** 0.5 + 1e-9)


def test_a_row_draws_the_same_in_any_batch() -> None:
    options = GenerationOptions(temperature=1.0, top_p=0.9)
    keys, scores = ["a", "b", "c", "d"], logits(4)
    together = draw(options, keys, scores)
    assert together == [draw(options, [key], scores[[row]])[0] for row, key in enumerate(keys)]
    assert together[::-1] == draw(options, keys[::-1], scores.flip(0))


def test_seed_and_key_change_the_draws() -> None:
    scores = logits(1).expand(40, -1)
    keys = [str(number) for number in range(40)]
    first = draw(GenerationOptions(temperature=1.0), keys, scores)
    assert first == draw(GenerationOptions(temperature=1.0), keys, scores)
    assert first != draw(GenerationOptions(temperature=1.0, seed=1), keys, scores)
    assert len(set(first)) > 10


def test_the_stream_goes_on_from_token_to_token() -> None:
    sampler = RowSampler(GenerationOptions(temperature=1.0), ["a"])
    drawn = [sampler(torch.zeros(1, 1, dtype=torch.long), logits(1)).argmax().item() for _ in range(20)]
    assert len(set(drawn)) > 5


def test_greedy_asks_for_no_sampling() -> None:
    assert GenerationOptions(temperature=0).arguments(["a"]) == {
        "num_beams": 1,
        "max_new_tokens": 128,
        "do_sample": False,
    }


def test_beam_sampling_reseeds_for_every_question() -> None:
    options = GenerationOptions(temperature=0.7, num_beams=2)
    states = []
    for key in ("a", "b", "a"):
        assert options.arguments([key])["do_sample"] is True
        states.append(torch.get_rng_state())
    assert torch.equal(states[0], states[2])
    assert not torch.equal(states[0], states[1])


@pytest.mark.parametrize(
    "values",
    [{"temperature": -0.1}, {"top_p": -0.1}, {"top_p": 1.2}, {"num_beams": 0}, {"max_new_tokens": 0}],
    ids=str,
)
def test_values_out_of_range_are_refused(values: dict[str, float]) -> None:
    with pytest.raises(FlagError, match=f"--{next(iter(values))} "):
        GenerationOptions(**values)


def test_what_a_batch_would_change_is_refused() -> None:
    with pytest.raises(FlagError, match="--batch-size 2 would change the answers"):
        GenerationOptions(temperature=0.2, num_beams=2).check_batch_size(2)
    with pytest.raises(FlagError, match="--batch-size 0"):
        GenerationOptions().check_batch_size(0)
    for fine in ({"temperature": 0.0, "num_beams": 2}, {"temperature": 0.2}):
        GenerationOptions(**fine).check_batch_size(2)

"""Rules before decoder layers against slow formulas of their own, token by token, on random numbers."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import pytest
import torch

from dynamic.rules.dart import DartRule
from dynamic.rules.fastv import FastVRule
from dynamic.rules.pyramiddrop import PyramidDropRule, root
from dynamic.rules.rule import LayerRule
from dynamic.rules.sparsevlm import SparseVlmRule, raters
from llava.errors import FlagError
from tests.dynamic.rules.row_views import HEADS, KEY_HEADS, RandomRow

Slow = Callable[[RandomRow, int], set[int]]


@functools.cache
def attention_map(row: RandomRow, layer: int, rotary: bool) -> list[list[list[float]]]:
    """Attention weights by head, query and key up to the query."""
    q, k = row.heads_of(layer, rotary)
    scale, group = math.sqrt(q.shape[-1]), HEADS // KEY_HEADS
    rows = []
    for head in range(HEADS):
        queries, keys = q[:, head].tolist(), k[:, head // group].tolist()
        powers = [
            [math.exp(sum(x * y for x, y in zip(queries[at], key, strict=True)) / scale) for key in keys[: at + 1]]
            for at in range(row.length)
        ]
        rows.append([[power / sum(each) for power in each] for each in powers])
    return rows


def probability(row: RandomRow, layer: int, head: int, query: int, key: int, rotary: bool = True) -> float:
    """One attention weight."""
    return attention_map(row, layer, rotary)[head][query][key] if key <= query else 0.0


def top(scores: list[float], keep: int) -> set[int]:
    return set(sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:keep])


def last_token(row: RandomRow, layer: int) -> list[float]:
    query = row.length - 1
    return [
        sum(probability(row, layer, head, query, place) for head in range(HEADS)) for place in row.image_places.tolist()
    ]


def fastv_code(row: RandomRow, keep: int) -> set[int]:
    return top(last_token(row, row.layer - 1), keep)


def fastv_paper(row: RandomRow, keep: int) -> set[int]:
    scores = []
    for place in row.image_places.tolist():
        later = range(place + 1, row.length)
        given = [probability(row, row.layer - 1, head, query, place) for query in later for head in range(HEADS)]
        scores.append(sum(given) / len(later))
    return top(scores, keep)


def fastv_key_norm(row: RandomRow, keep: int) -> set[int]:
    keys = row.heads_of(row.layer - 1, True)[1]
    return top([-math.sqrt(sum(x * x for x in keys[place].flatten().tolist())) for place in row.image_places], keep)


def pyramiddrop(row: RandomRow, keep: int) -> set[int]:
    return top(last_token(row, row.layer), keep)


def dart(row: RandomRow, keep: int, image_pivots: int = 4, text_pivots: int = 4) -> set[int]:
    keys = row.heads_of(row.layer - 1, True)[1]
    norm = [sum(abs(x) for x in keys[place].flatten().tolist()) for place in range(row.length)]
    places, words = row.image_places.tolist(), row.text_places.tolist()
    chosen = sorted(places, key=lambda place: -norm[place])[: min(image_pivots, keep)]
    pivots = chosen + sorted(words, key=lambda place: -norm[place])[:text_pivots]
    states, left = row.normed(), keep - len(chosen)
    for number, pivot in enumerate(pivots):
        quota = left // len(pivots) + (number < left % len(pivots))
        rest = [place for place in places if place not in chosen]
        similar = {place: float(torch.cosine_similarity(states[place], states[pivot], dim=0)) for place in rest}
        chosen = chosen + sorted(rest, key=lambda place: similar[place])[:quota]
    return {places.index(place) for place in chosen}


def sparsevlm(row: RandomRow, keep: int) -> set[int]:
    images, text = row.entered()
    votes = [0.0] * len(text)
    for image in images:
        powers = [math.exp(float(image @ word)) for word in text]
        votes = [vote + power / sum(powers) for vote, power in zip(votes, powers, strict=True)]
    mean = sum(votes) / len(votes)
    chosen = [place for place, vote in zip(row.text_places.tolist(), votes, strict=True) if vote > mean]
    assert 0 < len(chosen) < row.text
    weight = {
        (head, word, place): probability(row, row.layer - 1, head, word, place, rotary=False)
        for head in range(HEADS)
        for word in chosen
        for place in row.image_places.tolist()
    }
    mass = [sum(value for (at, _, _), value in weight.items() if at == head) for head in range(HEADS)]
    looking = top(mass, 2)  # 14 / 32 of 4 heads
    scores = [
        sum(weight[head, word, place] for head in looking for word in chosen) for place in row.image_places.tolist()
    ]
    return top(scores, keep)


RULES: dict[str, tuple[LayerRule, Slow]] = {
    "fastv": (FastVRule(), fastv_code),
    "fastv, paper": (FastVRule(variant="paper"), fastv_paper),
    "fastv, key norm": (FastVRule(score="key_norm"), fastv_key_norm),
    "pyramiddrop": (PyramidDropRule(), pyramiddrop),
    "dart": (DartRule(), dart),
    "dart, text alone": (DartRule(0, 3), lambda row, keep: dart(row, keep, 0, 3)),
    "sparsevlm": (SparseVlmRule(), sparsevlm),
}
ROWS = [RandomRow(seed) for seed in range(3)] + [RandomRow(3, (9, 14)), RandomRow(4, (30,), 3, layer=5, between=1)]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.seed}")
def test_the_slow_formula(name: str, row: RandomRow) -> None:
    rule, slow = RULES[name]
    for keep in (1, 3, 5, 11, len(row.image_places) - 1):
        assert set(rule.select(row, keep).kept.tolist()) == slow(row, keep), keep


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("row", [RandomRow(5), RandomRow(5, (3,), 1), RandomRow(6, (2, 5), same=True)], ids=repr)
def test_exactly_as_many_as_asked_for_and_always_the_same(name: str, row: RandomRow) -> None:
    rule, _ = RULES[name]
    for keep in range(1, len(row.image_places)):
        found = rule.select(row, keep)
        found.check(len(row.image_places), keep, rule.name)
        assert found.merge is None
        again = rule.select(dataclasses.replace(row), keep)
        assert torch.equal(again.kept, found.kept)


def test_the_rules_differ() -> None:
    """The negative control of the formulas above: no two of them choose the same tokens of all rows."""
    chosen = {name: [frozenset(slow(row, 8)) for row in ROWS[:3]] for name, (_, slow) in RULES.items()}
    assert len({tuple(sets) for sets in chosen.values()}) == len(chosen)


def test_of_equal_tokens_the_first_stay() -> None:
    row = RandomRow(7, (12,), same=True)
    for rule in (FastVRule(), FastVRule(score="key_norm"), PyramidDropRule(), SparseVlmRule()):
        assert rule.select(row, 5).kept.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_queries_by_pieces_are_all_queries(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dynamic.rules.fastv.QUERIES_AT_ONCE", at_once)
    assert set(FastVRule(variant="paper").select(ROWS[0], 9).kept.tolist()) == fastv_paper(ROWS[0], 9)


def test_pyramiddrop_sees_the_layer_itself_and_fastv_the_one_in_front() -> None:
    row = RandomRow(8)
    above = dataclasses.replace(row, layer=row.layer + 1)
    assert torch.equal(PyramidDropRule().select(row, 7).kept, FastVRule().select(above, 7).kept)
    assert not torch.equal(PyramidDropRule().select(row, 7).kept, FastVRule().select(row, 7).kept)


@pytest.mark.parametrize(
    ("images", "text", "expected"),
    [
        ([[1.0, 0.0]], [[9.0, 0.0], [0.0, 0.0], [0.0, 9.0]], [True, False, False]),
        ([[1.0, 0.0], [0.0, 1.0]], [[9.0, 0.0], [0.0, 0.0], [0.0, 9.0]], [True, False, True]),
        ([[1.0, 1.0]], [[2.0, 3.0]], [True]),  # a single word rates
        ([[1.0, 1.0]], [[2.0, 3.0], [3.0, 2.0]], [True, True]),  # as do words that all receive the same
    ],
)
def test_raters(images: list[list[float]], text: list[list[float]], expected: list[bool]) -> None:
    assert raters(torch.tensor(images), torch.tensor(text)).tolist() == expected


def test_pyramids_count_as_lambda_says() -> None:
    rule = PyramidDropRule()
    assert rule.counts(72, 576, (8, 16, 24)) == [288, 144, 72]  # the paper's lambda of 0.5
    for tokens in (1, 2, 5, 100, 576, 2880):
        for stages in (1, 2, 3, 4):
            below = [0] * stages
            for keep in range(1, tokens + 1, max(1, tokens // 40)):
                counts = rule.counts(keep, tokens, range(stages))
                ratio = (keep / tokens) ** (1 / stages)
                plain = [ratio ** (stage + 1) * tokens for stage in range(stages)]
                # Rounded down, where the plain formula is not within rounding errors of a whole number.
                assert all(0 <= value - count + 1e-6 < 1 + 1e-5 for value, count in zip(plain, counts, strict=True))
                assert counts[-1] == keep
                assert counts == sorted(counts, reverse=True)
                assert all(now >= before for now, before in zip(counts, below, strict=True))
                below = counts


@pytest.mark.parametrize("degree", [1, 2, 3, 7])
def test_whole_roots(degree: int) -> None:
    for base in (1, 2, 9, 576, 99_999):
        assert [root(base**degree + step, degree) for step in (-1, 0, 1)][degree == 1 :] == (
            [base - 1, base, base + (degree == 1)][degree == 1 :]
        )


@pytest.mark.parametrize("published", [(300, 200, 118), (238, 108, 60), (66, 34, 20)])
def test_sparsevlm_counts_are_the_tables(published: tuple[int, ...]) -> None:
    rule = SparseVlmRule()
    assert tuple(rule.counts(published[-1], 576, rule.layers)) == published
    five = [5 * count for count in published]
    assert rule.counts(five[-1], 2880, rule.layers) == five
    assert rule.counts(published[-1], 576, (4,)) == [published[-1]]
    assert rule.counts(published[-1], 576, (4, 9)) == [published[0], published[-1]]
    assert rule.counts(published[-1], 576, (1, 2, 3, 4, 5))[::2] == list(published)


@pytest.mark.parametrize("tokens", [1, 2, 7, 144, 576, 2880])
@pytest.mark.parametrize("stages", [1, 2, 3, 4])
def test_sparsevlm_counts_never_fall_as_more_is_kept(tokens: int, stages: int) -> None:
    below = [0] * stages
    for keep in range(1, tokens + 1, max(1, tokens // 150)):
        counts = SparseVlmRule().counts(keep, tokens, range(stages))
        assert counts[-1] == keep
        assert counts == sorted(counts, reverse=True)
        assert counts[0] <= tokens
        assert all(now >= before for now, before in zip(counts, below, strict=True))
        below = counts


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: FastVRule(variant="both"), "variant is 'both'"),
        (lambda: FastVRule(score="norm"), "score is 'norm'"),
        (lambda: FastVRule(variant="paper", score="key_norm"), "score=key_norm"),
        (lambda: DartRule(image_pivots=-1), "image_pivots is -1"),
        (lambda: DartRule(0, 0), "text_pivots 0"),
        (lambda: SparseVlmRule(heads=0.0), "heads is 0.0"),
        (lambda: SparseVlmRule(heads=1.5), "heads is 1.5"),
    ],
)
def test_options_that_are_refused(make: Callable[[], LayerRule], named: str) -> None:
    with pytest.raises(FlagError, match=named):
        make()

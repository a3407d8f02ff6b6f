"""Each rule as its definition reads, in Python's floats and loops, token by token; shares no code with the rules."""

from __future__ import annotations

import math

import torch

from tests.dynamic.rules.views import PlainView

Vector = list[float]
Weights = dict[int, dict[int, float]]
"""For each kept token, the weight of each token that it is made of."""


def cosine(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def without_mean(features: list[Vector]) -> list[Vector]:
    mean = [sum(column) / len(features) for column in zip(*features, strict=True)]
    return [[x - m for x, m in zip(vector, mean, strict=True)] for vector in features]


def min_max(scores: Vector) -> Vector:
    return [(score - min(scores)) / (max(scores) - min(scores)) for score in scores]


def first_best(scores: dict[int, float]) -> int:
    return min(scores, key=lambda index: (-scores[index], index))


def top(scores: Vector, count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda index: (-scores[index], index))[:count]


def similarities(features: list[Vector]) -> list[Vector]:
    return [[cosine(a, b) for b in features] for a in features]


def distinct(similarity: list[Vector]) -> Vector:
    return min_max([-sum(row) / len(row) for row in similarity])


def hired(view: PlainView, keep: int) -> list[int]:
    return top(view.received.tolist(), keep)


def divprune(view: PlainView, keep: int, *, cen: bool = False) -> list[int]:
    features = view.projected.tolist()
    similarity = similarities(without_mean(features) if cen else features)
    tokens = range(len(features))
    weight = distinct(similarity) if cen else [1.0] * len(features)
    chosen: list[int] = []
    while len(chosen) < keep:
        scores = {}
        for i in tokens:
            if i not in chosen:
                others = chosen or [j for j in tokens if j != i]
                scores[i] = weight[i] * min(1 - similarity[i][j] for j in others)
        chosen.append(first_best(scores))
    return chosen


def scope(view: PlainView, keep: int, *, alpha: float = 1.0) -> list[int]:
    similarity = similarities(view.tower.tolist())
    attention = view.received.tolist()
    chosen: list[int] = []
    while len(chosen) < keep:
        open_ = [i for i in range(len(attention)) if i not in chosen]
        scores = {}
        for i in open_:
            gain = 0.0
            for j in open_:
                cover = max((similarity[k][j] for k in chosen), default=0.0)
                gain += max(0.0, similarity[i][j] - max(cover, 0.0))
            scores[i] = gain * attention[i] ** alpha
        chosen.append(first_best(scores))
    return chosen


def vispruner(view: PlainView, keep: int, *, step: int = 8) -> list[int]:
    important = top(view.received.tolist(), keep // 2)
    features = view.tower.tolist()
    left = [i for i in range(len(features)) if i not in important]
    while len(left) > keep - len(important):
        scores = {i: max(cosine(features[i], features[j]) for j in left[1::2]) for i in left[0::2]}
        for _ in range(min(step, len(left) - (keep - len(important)), len(scores))):
            going = first_best(scores)
            del scores[going]
            left.remove(going)
    return important + left


def cdpruner(view: PlainView, keep: int, *, cen: bool = False, sign: int = -1) -> list[int]:
    """By the determinants themselves, in float64; only for as many tokens as their width admits."""
    features, words = view.projected.tolist(), view.question.tolist()
    relevance = min_max([sign * sum(cosine(a, word) for word in words) / len(words) for a in features])
    similarity = similarities(without_mean(features) if cen else features)
    if cen:
        relevance = [r * g for r, g in zip(relevance, distinct(similarity), strict=True)]
    r = torch.tensor(relevance, dtype=torch.float64).diag()
    kernel = r @ torch.tensor(similarity, dtype=torch.float64) @ r
    chosen: list[int] = []
    while len(chosen) < keep:
        open_ = [i for i in range(len(features)) if i not in chosen]
        chosen.append(
            first_best({i: float(torch.linalg.slogdet(kernel[[*chosen, i]][:, [*chosen, i]])[1]) for i in open_})
        )
    return chosen


def visionzip(view: PlainView, keep: int, *, contextual: float = 10 / 64, variant: str = "paper") -> Weights:
    count = int(keep * contextual + 0.5)
    dominant = top(view.received.tolist(), keep - count)
    weights: Weights = {i: {i: 1.0} for i in dominant}
    keys = view.keys.tolist()
    rest = [i for i in range(len(keys)) if i not in dominant]
    targets = [rest[number * (len(rest) // count)] for number in range(count)]
    joined: dict[int, list[int]] = {target: [] for target in targets}
    for i in rest:
        if count and i not in targets:
            joined[first_best({target: cosine(keys[i], keys[target]) for target in targets})].append(i)
    for target, members in joined.items():
        if variant == "paper":
            weights[target] = {i: 1 / (1 + len(members)) for i in [target, *members]}
        else:
            weights[target] = {target: 1.0, **{i: 1 / len(members) for i in members}}
    return weights


def pool(view: PlainView, keep: int) -> Weights:
    """On a whole tile: bands of rows, in each of them ranges of columns, and the mean of what is in both."""
    height, width = view.grid
    bands = max(math.ceil(keep / width), min(height, keep, round(math.sqrt(keep * height / width))))
    weights: Weights = {}
    for band in range(bands):
        rows = range(band * height // bands, (band + 1) * height // bands)
        columns = (band + 1) * keep // bands - band * keep // bands
        for column in range(columns):
            inside = range(column * width // columns, (column + 1) * width // columns)
            members = [row * width + place for row in rows for place in inside]
            middle = rows[(len(rows) - 1) // 2] * width + inside[(len(inside) - 1) // 2]
            weights[middle] = {i: 1 / len(members) for i in members}
    return weights


def grid(view: PlainView, keep: int) -> list[int]:
    return list(pool(view, keep))


def hired_quotas(tiles: list[PlainView], keep: int, alpha: float) -> list[int]:
    """Where nothing is full and no shares are equal: whole parts first, then one more each by remainders."""

    def share_out(weights: Vector, total: int) -> list[int]:
        exact = [total * weight / sum(weights) for weight in weights]
        more = top([share - math.floor(share) for share in exact], total - sum(map(math.floor, exact)))
        return [math.floor(share) + (number in more) for number, share in enumerate(exact)]

    small, rest = share_out([alpha, 1 - alpha], keep)
    rows, columns = tiles[0].grid
    counts = [0.0] * (len(tiles) - 1)
    for patch in top(tiles[0].received_early.tolist(), small):
        y, x = (patch // columns + 0.5) / rows, (patch % columns + 0.5) / columns
        for number, tile in enumerate(tiles[1:]):
            upper, left, lower, right = tile.region
            counts[number] += upper <= y < lower and left <= x < right
    return [small, *share_out(counts, rest)]

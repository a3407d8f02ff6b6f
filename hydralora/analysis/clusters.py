"""Clusters of points and the number of them that fits: k-means with elbow and silhouette, or DBSCAN.

scikit-learn does the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from tqdm import tqdm

from hydralora.analysis.features import scikit_learn
from llava.errors import FlagError

SILHOUETTE_SAMPLE = 2000
"""Points on which the silhouette is computed; it compares each with every other."""


@dataclass(frozen=True)
class Clustering:
    """What was found.

    Attributes:
        suggested: number of clusters.
        labels: cluster of each point; -1 for points of none.
        scores: for each number that k-means tried: `k`, `inertia` (mean squared distance from the centre, per point)
            and `silhouette`.
        distances: for DBSCAN, of each point to its `min_samples`-th neighbour, the largest first.
        eps: for DBSCAN, the radius.
    """

    suggested: int
    labels: list[int]
    scores: list[dict[str, float]] = field(default_factory=list)
    distances: list[float] = field(default_factory=list)
    eps: float = 0.0

    @property
    def noise(self) -> int:
        """Points that belong to no cluster."""
        return self.labels.count(-1)


def elbow(numbers: Sequence[int], inertias: Sequence[float]) -> int:
    """The number at which the inertia lies furthest below the line from its first to its last value.

    Both axes are scaled to 0..1 first, so the place does not depend on units.
    """
    x = np.asarray(numbers, dtype=float)
    y = np.asarray(inertias, dtype=float)
    x, y = (x - x[0]) / (x[-1] - x[0]), (y - y[-1]) / max(y[0] - y[-1], 1e-12)
    return int(numbers[int(np.argmax(1 - x - y))])


def k_means(points: np.ndarray, max_components: int, criterion: str, seed: int) -> Clustering:
    """k-means for 1 to `max_components` clusters.

    Args:
        points: (texts, dimensions).
        max_components: largest number that is tried; fewer if there are not enough different points.
        criterion: `elbow` (of at least three numbers), or `silhouette` (the best one of at least two clusters).
        seed: of the starting points.

    Raises:
        FlagError: scikit-learn is not installed, or too few numbers of clusters can be tried.
    """
    with scikit_learn():
        from sklearn.cluster import KMeans
        from sklearn.metrics import silhouette_score
    most = min(max_components, len(points) - 1, len(np.unique(points.round(9), axis=0)))
    if most < 2:
        raise FlagError(f"--max-components {max_components} of {len(points)} texts leaves fewer than 2 clusters to try")
    if criterion == "elbow" and most < 3:
        raise FlagError(
            f"--criterion elbow: --max-components {max_components} of {len(points)} texts leaves 1 and 2 clusters to "
            "try, and an elbow lies between two others; raise --max-components, give more texts, or use --criterion "
            "silhouette"
        )
    fits, scores = {}, []
    for number in tqdm(range(1, most + 1), desc="k-means"):
        fit = fits[number] = KMeans(number, n_init=10, random_state=seed).fit(points)
        sample = min(SILHOUETTE_SAMPLE, len(points))
        silhouette = 0.0
        if number > 1:
            silhouette = float(silhouette_score(points, fit.labels_, sample_size=sample, random_state=seed))
        scores.append({"k": number, "inertia": float(fit.inertia_) / len(points), "silhouette": silhouette})
    if criterion == "elbow":
        suggested = elbow([int(row["k"]) for row in scores], [row["inertia"] for row in scores])
    else:
        suggested = int(max(scores[1:], key=lambda row: row["silhouette"])["k"])
    return Clustering(suggested, [int(label) for label in fits[suggested].labels_], scores)


def dbscan(points: np.ndarray, eps: float | None, min_samples: int) -> Clustering:
    """DBSCAN; the number of clusters follows from the density.

    Args:
        points: (texts, dimensions).
        eps: radius; None: the elbow of the sorted distances to the `min_samples`-th neighbour.
        min_samples: neighbours that make a point a core point, itself included.

    Raises:
        FlagError: scikit-learn is not installed, or no cluster is found.
    """
    with scikit_learn():
        from sklearn.cluster import DBSCAN
        from sklearn.neighbors import NearestNeighbors
    neighbours = NearestNeighbors(n_neighbors=min(min_samples, len(points))).fit(points)
    falling = np.sort(neighbours.kneighbors(points)[0][:, -1])[::-1].tolist()
    if eps is None:
        eps = max(falling[elbow(range(len(falling)), falling)], 1e-9)
    labels = [int(label) for label in DBSCAN(eps=eps, min_samples=min_samples).fit_predict(points)]
    suggested = len(set(labels) - {-1})
    if suggested == 0:
        raise FlagError(f"DBSCAN finds no cluster with --eps {eps:.4g} --min-samples {min_samples}; try a larger --eps")
    return Clustering(suggested, labels, distances=falling, eps=eps)

"""Figures: scores of clusterings, and the A and B matrices of adapters as points in a plane. PNG and PDF.

The scatter plots correspond to figure 3 of the paper (`Motivation/tsen_lora.py` of its repository).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hydralora.analysis.adapters import AdaptedLayer
from hydralora.analysis.clusters import Clustering
from hydralora.analysis.features import scikit_learn
from llava.errors import FlagError
from llava.runtime.output import replacing
from llava.runtime.recognize import refuse_foreign_bytes

MARKERS = "osD^vP*X"
MATRICES = ("A", "B")
MAGIC = {".png": b"\x89PNG", ".pdf": b"%PDF"}
"""First bytes of a figure: only a figure is replaced by one."""


def _pyplot() -> Any:
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        raise FlagError("figures need matplotlib: pip install 'llava-extensions[analysis]'") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> list[Path]:
    """Write the figure as PNG and PDF; `path` has no suffix."""
    written = [path.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for each in written:
        # Without a date in it, equal runs write equal files.
        metadata = {"CreationDate": None} if each.suffix == ".pdf" else None
        refuse_foreign_bytes(each, MAGIC[each.suffix])
        with replacing(each) as partial:
            figure.savefig(partial, bbox_inches="tight", dpi=150, metadata=metadata)
    _pyplot().close(figure)
    return written


def plot_scores(clustering: Clustering, path: Path) -> list[Path]:
    """Inertia and silhouette by number of clusters, the suggested one marked."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.2))
    numbers = [row["k"] for row in clustering.scores]
    for axis, name in zip(axes, ("inertia", "silhouette"), strict=True):
        axis.plot(numbers, [row[name] for row in clustering.scores], marker="o")
        axis.axvline(clustering.suggested, linestyle="--", color="grey")
        axis.set_xlabel("clusters")
        axis.set_ylabel(name)
    return _save(figure, path)


def plot_distances(clustering: Clustering, path: Path) -> list[Path]:
    """Distance of each point to its neighbour that makes it a core point of DBSCAN, the radius marked."""
    figure, axis = _pyplot().subplots(figsize=(4.5, 3.2))
    axis.plot(clustering.distances)
    axis.axhline(clustering.eps, linestyle="--", color="grey")
    axis.set_xlabel("texts")
    axis.set_ylabel("distance to the neighbour --min-samples")
    return _save(figure, path)


def plane(points: np.ndarray, method: str, seed: int) -> np.ndarray:
    """Points (n, dimensions) in two dimensions by `tsne` or `pca`, (n, 2).

    Raises:
        FlagError: scikit-learn is not installed.
    """
    with scikit_learn():
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
    if len(points) < 3:
        return np.pad(points[:, :2], ((0, 0), (0, max(0, 2 - points.shape[1]))))
    if method == "pca":
        return PCA(2, random_state=seed).fit_transform(points)
    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(2, init="pca", perplexity=perplexity, random_state=seed).fit_transform(points)


def plot_matrices(adapters: Mapping[str, Mapping[str, AdaptedLayer]], method: str, seed: int, path: Path) -> list[Path]:
    """One panel per module and matrix: every A, and every B, as a point; colour by adapter, number by layer.

    Matrices of different shape cannot share a panel; an adapter whose shape differs from the first one's is left out of
    that panel.
    """
    pyplot = _pyplot()
    modules = list(dict.fromkeys(layer.module for layers in adapters.values() for layer in layers.values()))
    size = (4 * len(modules), 4 * len(MATRICES))
    figure, axes = pyplot.subplots(len(MATRICES), len(modules), figsize=size, squeeze=False)
    for column, module in enumerate(modules):
        for row, matrix in enumerate(MATRICES):
            axis = axes[row][column]
            _panel(axis, adapters, module, matrix, method, seed)
            axis.set_title(f"{matrix} of {module}")
            axis.set_xticks([])
            axis.set_yticks([])
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=len(adapters), bbox_to_anchor=(0.5, -0.04))
    return _save(figure, path)


def _panel(
    axis: Any, adapters: Mapping[str, Mapping[str, AdaptedLayer]], module: str, matrix: str, method: str, seed: int
) -> None:
    points, owners, numbers = [], [], []
    for owner, (_, layers) in enumerate(adapters.items()):
        chosen = [layer for layer in layers.values() if layer.module == module]
        for number, layer in enumerate(chosen):
            for each in [layer.shared_a] if matrix == "A" else layer.experts_b:
                flat = each.flatten().numpy()
                if not points or flat.shape == points[0].shape:
                    points.append(flat)
                    owners.append(owner)
                    numbers.append(number)
    if not points:
        return
    placed = plane(np.stack(points), method, seed)  # (n, 2)
    for owner, name in enumerate(adapters):
        mine = [index for index, each in enumerate(owners) if each == owner]
        marker = MARKERS[owner % len(MARKERS)]
        axis.scatter(*placed[mine].T, marker=marker, color=f"C{owner}", label=name, alpha=0.7)
        for index in mine:
            axis.annotate(str(numbers[index]), placed[index], fontsize=6)

"""Suggest a number of experts: clusters of the instructions of a data set.

    python -m hydralora.components DATA.json --output-dir components

HydraLoRA (section 3.2) takes the number of B matrices from k-means over TF-IDF features of the training texts; its code
was not published. The file `components.json` in the output folder is what `--lora_nums auto:FILE` reads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from llava.errors import FlagError
from llava.runtime.output import replace_text
from llava.runtime.places import Input, refuse_file
from llava.runtime.program import run_program

if TYPE_CHECKING:
    from hydralora.analysis.clusters import Clustering

RESULT_FILE = "components.json"
EXAMPLES = 3
"""Instructions shown for each cluster."""


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(
        prog="python -m hydralora.components",
        description="Suggest a number of experts: cluster the instructions of a data set.",
    )
    parser.add_argument(
        "data", type=Path, nargs="+", help="JSON lists or lines of instruction, input and output, or of messages"
    )
    parser.add_argument("--output-dir", type=Path, default=Path("components"), help="where result and plot are written")
    parser.add_argument("--method", choices=["kmeans", "dbscan"], default="kmeans")
    parser.add_argument(
        "--criterion", choices=["elbow", "silhouette"], default="elbow", help="k-means: what decides the number"
    )
    parser.add_argument(
        "--max-components", type=int, default=10, help="k-means: largest number that is tried; at least 3 for the elbow"
    )
    parser.add_argument("--eps", type=float, default=None, help="DBSCAN: radius; none given: from the data")
    parser.add_argument("--min-samples", type=int, default=5, help="DBSCAN: neighbours that make a point a core point")
    parser.add_argument(
        "--model", default=None, help="folder of a language model: cluster its embeddings instead of TF-IDF features"
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


def read_texts(paths: Sequence[Path]) -> list[str]:
    """What every record asks: instruction and input, or the messages that are no answers.

    Raises:
        BadSampleError: a record is malformed.
        FlagError: a file does not exist.
    """
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise FlagError(f"{', '.join(missing)}: no such file")
    from hydralora.text.messages import asked
    from hydralora.text.samples import read_samples

    return [asked(record) for path in paths for record in read_samples(path)]


def describe(texts: Sequence[str], clustering: Clustering) -> list[dict[str, Any]]:
    """Size, typical words and first instructions of each cluster."""
    from hydralora.analysis.features import typical_words

    words = typical_words(texts, clustering.labels)
    members: dict[int, list[str]] = {}
    for label, text in zip(clustering.labels, texts, strict=True):
        members.setdefault(label, []).append(text)
    return [
        {"cluster": label, "size": len(members[label]), "words": words[label], "examples": members[label][:EXAMPLES]}
        for label in sorted(members)
        if label >= 0
    ]


def print_result(clustering: Clustering, clusters: Sequence[dict[str, Any]], result: Path) -> None:
    """Show scores and clusters, and what to run next."""
    console = Console()
    if clustering.scores:
        scores = Table(title="Numbers of clusters", title_justify="left")
        for heading in ("clusters", "inertia", "silhouette"):
            scores.add_column(heading, justify="right")
        for row in clustering.scores:
            scores.add_row(str(row["k"]), f"{row['inertia']:.3f}", f"{row['silhouette']:.3f}")
        console.print(scores)
    table = Table(title="Clusters", title_justify="left")
    table.add_column("cluster", justify="right")
    table.add_column("size", justify="right")
    table.add_column("typical words")
    for cluster in clusters:
        table.add_row(str(cluster["cluster"]), str(cluster["size"]), ", ".join(cluster["words"]))
    console.print(table)
    if clustering.noise:
        console.print(f"{clustering.noise} texts belong to no cluster")
    print(f"suggested number of experts: {clustering.suggested}")
    print(f"next: python -m hydralora.finetune --lora_nums auto:{result} ...")


def main(argv: Sequence[str] | None = None) -> Path:
    """Run the program.

    Returns:
        Path of the result file.

    Raises:
        LlavaError: data or options are wrong.
    """
    args = build_parser().parse_args(argv)
    refuse_file("--output-dir", args.output_dir / RESULT_FILE, [Input("DATA", path) for path in args.data])
    from hydralora.analysis.clusters import dbscan, k_means
    from hydralora.analysis.features import embeddings, tf_idf
    from hydralora.analysis.figures import plot_distances, plot_scores

    texts = read_texts(args.data)
    features = tf_idf(texts, args.seed) if args.model is None else embeddings(texts, args.model)
    if args.method == "kmeans":
        clustering = k_means(features, args.max_components, args.criterion, args.seed)
    else:
        clustering = dbscan(features, args.eps, args.min_samples)
    clusters = describe(texts, clustering)
    plot = plot_scores if clustering.scores else plot_distances
    plot(clustering, args.output_dir / "components")
    record = {
        "suggested": clustering.suggested,
        "method": args.method,
        "criterion": args.criterion if args.method == "kmeans" else None,
        "features": "tf-idf" if args.model is None else args.model,
        "scores": clustering.scores,
        "eps": clustering.eps if args.method == "dbscan" else None,
        "clusters": clusters,
        "assignments": clustering.labels,
        "data": {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in args.data},
    }
    result = args.output_dir / RESULT_FILE
    replace_text(result, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    print_result(clustering, clusters, result)
    return result


if __name__ == "__main__":
    run_program(main)

"""The number of experts: clusters that are known, found again by every method, and the file that training reads."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from hydralora.analysis.clusters import dbscan, elbow, k_means
from hydralora.components import main
from hydralora.text.options import number_of_experts
from llava.errors import FlagError
from tests.golden import golden_dir

pytest.importorskip("sklearn", reason="the extra `analysis` is not installed")
pytest.importorskip("matplotlib", reason="the extra `analysis` is not installed")

TOPICS = {
    "cooking": ["boil", "rice", "fry", "onion", "bake", "bread", "salt", "soup", "chop", "garlic", "oven", "butter"],
    "astronomy": [
        "orbit",
        "planet",
        "light",
        "star",
        "phase",
        "moon",
        "tail",
        "comet",
        "mass",
        "galaxy",
        "telescope",
        "dust",
    ],
    "law": [
        "contract",
        "tenant",
        "landlord",
        "court",
        "appeal",
        "duty",
        "judge",
        "clause",
        "notice",
        "damages",
        "lease",
        "party",
    ],
}


def save_data(path: Path) -> list[str]:
    """Twenty records of each topic, mixed; returns the topics in order."""
    random = Random(0)
    records, topics = [], []
    for _ in range(20):
        for topic, words in TOPICS.items():
            records.append({"instruction": " ".join(random.sample(words, 7)), "input": "", "output": "yes"})
            topics.append(topic)
    path.write_text(json.dumps(records))
    return topics


def run(folder: Path, *options: str) -> dict[str, Any]:
    return json.loads(main([str(folder / "data.json"), "--output-dir", str(folder / "out"), *options]).read_text())


def same_partition(labels: list[int], topics: list[str]) -> bool:
    pairs = set(zip(labels, topics, strict=True))
    return len(pairs) == len(set(labels)) == len(set(topics))


@pytest.mark.parametrize("criterion", ["elbow", "silhouette"])
def test_k_means_finds_the_topics(criterion: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    topics = save_data(tmp_path / "data.json")
    result = run(tmp_path, "--criterion", criterion)
    assert result["suggested"] == 3
    assert same_partition(result["assignments"], topics)
    assert [row["k"] for row in result["scores"]] == list(range(1, 11))
    inertias = [row["inertia"] for row in result["scores"]]
    assert inertias == sorted(inertias, reverse=True)
    found = {frozenset(cluster["words"]) for cluster in result["clusters"]}
    assert len(found) == 3
    assert all(any(words <= set(topic) for topic in TOPICS.values()) for words in found)
    assert [cluster["size"] for cluster in result["clusters"]] == [20, 20, 20]
    assert (tmp_path / "out" / "components.png").stat().st_size > 1000
    assert (tmp_path / "out" / "components.pdf").read_bytes().startswith(b"%PDF")
    assert number_of_experts(f"auto:{tmp_path / 'out' / 'components.json'}") == 3
    assert "--lora_nums auto:" in capsys.readouterr().out


def test_dbscan_finds_the_topics(tmp_path: Path) -> None:
    save_data(tmp_path / "data.json")
    result = run(tmp_path, "--method", "dbscan", "--eps", "0.9", "--min-samples", "4")
    assert result["suggested"] == 3
    assert result["criterion"] is None
    assert result["eps"] == 0.9
    assert (tmp_path / "out" / "components.png").stat().st_size > 1000
    assert (tmp_path / "out" / "components.pdf").read_bytes().startswith(b"%PDF")


def test_embeddings_of_a_model(tmp_path: Path) -> None:
    """A tiny random model groups texts somehow; the features are its own and not the words'."""
    save_data(tmp_path / "data.json")
    model = str(golden_dir("llava") / "tiny-vicuna")
    first, again = (run(tmp_path, "--model", model, "--max-components", "4") for _ in range(2))
    assert first == again
    assert first["scores"] != run(tmp_path, "--max-components", "4")["scores"]


def test_methods_on_points() -> None:
    generator = np.random.default_rng(0)
    centres = np.array([[0, 0], [10, 0], [0, 10], [10, 10]])
    points = np.concatenate([centre + generator.normal(0, 0.3, (20, 2)) for centre in centres])
    for criterion in ("elbow", "silhouette"):
        assert k_means(points, 8, criterion, seed=0).suggested == 4
    found = dbscan(np.concatenate([points, [[100.0, 100.0]]]), eps=1.5, min_samples=5)
    assert (found.suggested, found.noise) == (4, 1)
    assert dbscan(points, None, 5).suggested >= 1
    assert elbow([1, 2, 3, 4], [10, 2, 1.5, 1]) == 2


def test_refused(tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="no such file"):
        main([str(tmp_path / "missing.json")])
    (tmp_path / "data.json").write_text('[{"instruction": "a", "output": "b"}]')
    with pytest.raises(FlagError, match="cannot be clustered"):
        run(tmp_path)
    save_data(tmp_path / "data.json")
    with pytest.raises(FlagError, match="fewer than 2"):
        run(tmp_path, "--max-components", "1")
    with pytest.raises(FlagError, match="leaves 1 and 2 clusters to"):
        run(tmp_path, "--max-components", "2")
    assert run(tmp_path, "--max-components", "2", "--criterion", "silhouette")["suggested"] == 2
    with pytest.raises(FlagError, match="no cluster"):
        run(tmp_path, "--method", "dbscan", "--eps", "0.0001", "--min-samples", "30")

"""The comparison of preprocessing: what is compared is equal where it should be."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.preprocessing import cases, measure, table


def test_values_of_pillow_are_equal_and_those_of_torchvision_are_not(tmp_path: Path) -> None:
    runs = cases(tmp_path)
    results = {case: measure(runs[case], 1) for case in ("image, pad", "sample, square", "tokens, three rounds")}
    for case in ("image, pad", "sample, square"):
        assert results[case]["difference"]["pillow"] == 0, case
        assert 0 < results[case]["difference"]["torchvision"] < 0.1, case
    ours, theirs = (runs["tokens, three rounds"][name]() for name in ("ours", "pillow"))
    # Theirs has a name for the image where ours has -200, and a blank fewer behind it.
    assert abs(len(ours) - len(theirs)) <= 1
    assert len(ours) > 300
    assert not torch.equal(runs["image, square"]["ours"](), runs["image, pad"]["ours"]())
    assert table(results).count("\n") == 1 + len(results)

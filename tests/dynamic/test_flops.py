"""FLOPs and bytes against the table of the golden data, every number of it; the program."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dynamic import flops
from dynamic.config import SparseConfig
from dynamic.flops import DECODERS, Cost, Decoder, Workload
from llava.errors import CheckpointError, FlagError
from tests.golden import golden_dir

TABLE: dict[str, Any] = json.loads((golden_dir("dynamic") / "flops_table.json").read_text(encoding="utf-8"))


def check(cost: Cost, expected: dict[str, float]) -> None:
    assert cost.dense == pytest.approx(expected["dense"], rel=1e-12)
    assert cost.sparse == pytest.approx(expected["sparse"], rel=1e-12)
    assert cost.reduction == pytest.approx(expected["reduction"], rel=1e-9)


@pytest.mark.parametrize("name", DECODERS)
def test_the_table(name: str) -> None:
    expected, exact, config = dict(TABLE[name]), DECODERS[name], SparseConfig()
    paper, image = exact.paper(), Workload()
    assert exact == Decoder(
        expected.pop("hidden"), expected.pop("layers"), expected.pop("intermediate"), *[exact.width] * 2
    )
    assert config.sparse_layer == expected.pop("sparse_layer")
    assert image.image == expected.pop("image_tokens")
    assert image.kept_prompt(config.vision_keep_rate) == expected.pop("kept_image_tokens")
    check(flops.prefill(paper, config, image), expected.pop("prefill_image_tokens_only_paper_convention_flops"))
    check(flops.prefill(exact, config, image), expected.pop("prefill_image_tokens_only_exact_llama_flops"))
    assert flops.vision_predictor_flops(exact, config, 576) == expected.pop("vision_predictor_flops")
    assert flops.text_predictor_flops(exact, config) == expected.pop("text_predictor_flops_per_token")
    example = expected.pop("example_decode")
    work = Workload(
        text=example.pop("prompt_text_tokens"),
        generated=example.pop("generated_tokens"),
        kept_output=example.pop("kept_fraction_of_generated_tokens"),
    )
    check(flops.decode(paper, config, work), example.pop("with_kv_cache_total_flops"))
    check(flops.decode(paper, config, work, cached=False), example.pop("without_kv_cache_total_flops"))
    check(flops.kv_bytes(exact, config, work), example.pop("kv_cache_bytes_fp16_at_end"))
    assert not expected
    assert not example


def test_grouped_heads_cost_less() -> None:
    """By hand: q and o 4 N C^2, k and v 4 N C K, attention 4 N S C, MLP 6 N C I."""
    grouped = Decoder(8, 3, 20, 4, 8)
    assert grouped.layer(5, 7) == 4 * 5 * 8 * 8 + 4 * 5 * 8 * 4 + 4 * 5 * 7 * 8 + 6 * 5 * 8 * 20
    full = replace(grouped, kv_width=8)
    work = Workload(10, 6, 4)
    assert flops.kv_bytes(grouped, SparseConfig(), work).dense * 2 == flops.kv_bytes(full, SparseConfig(), work).dense


def test_keeping_everything_saves_nothing() -> None:
    config, work = SparseConfig(vision_keep_rate=1.0), Workload(30, 5, 7, kept_output=1.0)
    for cost in (flops.prefill, flops.decode, flops.kv_bytes):
        assert cost(DECODERS["7b"], config, work).reduction == 0


def test_the_program(tmp_path: Path) -> None:
    text = flops.main(["--model", "7b", "--text-tokens", "0", "--generated", "0"])
    assert "10.07" in text
    assert "2.49" in text
    assert "75.3%" in text
    assert "4.66" in flops.main(["--model", "13b", "--text-tokens", "0", "--generated", "0"])
    exact = flops.main(["--generated", "1000", "--convention", "exact"])
    assert "54.9%" in exact.splitlines()[4]
    sizes = {"hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 11008, "num_attention_heads": 32}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"extensions": {"dynamic": {"sparse_layer": 4}}}))
    assert flops.main(["--model", str(tmp_path), "--sparse-layer", "2", "--convention", "exact"]) == exact
    assert flops.main(["--model", str(tmp_path), "--convention", "exact"]) != exact
    dense = {"use_vision_predictor": False, "use_text_predictor": False}
    (tmp_path / "config.json").write_text(json.dumps(sizes | {"sparse_config": dense}))
    assert flops.main(["--model", str(tmp_path)]).count(" 0.0%") == 4


def test_wrong_options(tmp_path: Path) -> None:
    for argv, message in (
        (["--model", "70b"], r"--model 70b: neither one of \['13b', '7b'\]"),
        (["--sparse-layer", "33"], "the model has 32 layers"),
        (["--vision-keep-rate", "0"], "vision_keep_rate is 0"),
        (["--kept-output", "1.5"], "lies between 0 and 1"),
        (["--dropped-instruction", "65"], "65 with --text-tokens 64"),
    ):
        with pytest.raises(FlagError, match=message):
            flops.main(argv)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="has no 'hidden_size'"):
        flops.main(["--model", str(tmp_path)])
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is no valid JSON"):
        flops.main(["--model", str(tmp_path)])

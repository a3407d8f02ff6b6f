"""The benchmark of the sparse model: what it compares is the same work, and what it records is complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import dynamic
from benchmarks import sparse_models as models
from dynamic import flops
from dynamic.config import SparseConfig
from llava.errors import FlagError

SIZE = models.Size(layers=4, width=32, inner=64, heads=2, patches=16)
SETTINGS = SparseConfig(
    use_instruct_predictor=False, d_model=8, nhead=2, dim_feedforward=16, num_layers=1, vision_keep_rate=0.25
)
CPU = torch.device("cpu")
TINY = (
    "--layers 4 --width 32 --patches 16 --keep-rate 0.25 --tokens 8 --tokens-without-cache 2 --train-text 64 "
    "--decode-batches 3 --tokens-in-batch 4"
)


def test_dense_and_sparse_have_the_same_weights() -> None:
    dense, sparse = (models.build(SIZE, settings, CPU, torch.float32) for settings in (None, SETTINGS))
    weights = sparse.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in dense.state_dict().items())
    assert len(weights) > len(dense.state_dict())


def test_the_caches_hold_what_the_formula_counts() -> None:
    dense, sparse = (models.build(SIZE, settings, CPU, torch.float32) for settings in (None, SETTINGS))
    caches = [models.prefill(model, models.make_prompt(model, SIZE, 2)) for model in (dense, sparse)]
    decoder = flops.Decoder(SIZE.width, SIZE.layers, SIZE.inner, SIZE.width, SIZE.width)
    bytes_ = flops.kv_bytes(decoder, SETTINGS, flops.Workload(image=SIZE.patches, text=2), bytes_per_value=4)
    assert [models.kept_bytes(cache, SIZE, torch.float32) for cache in caches] == [2 * bytes_.dense, 2 * bytes_.sparse]
    free = caches[1].report().bytes_of_free_slots
    assert models.cache_bytes(caches[1]) == 2 * bytes_.sparse + free > 2 * bytes_.sparse
    ids = models.random_ids(sparse, 2, 12)
    models.feed(sparse, caches[1], ids)
    last = caches[1].report().lengths[-1]
    assert all(6 < length < 6 + 12 for length in last)  # some of the fed tokens are kept, some are not


def test_the_training_step_is_the_same_with_both_implementations() -> None:
    sparse = models.build(SIZE, SETTINGS, CPU, torch.float32).train()
    losses = []
    for name in ("eager", "blockwise"):
        step, x = models.training_step(sparse, SIZE, models.make_prompt(sparse, SIZE, 1), 64, name)
        torch.manual_seed(0)  # of the Gumbel noise
        losses.append(float(step(x).detach()))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_the_program_writes_record_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "dynamic.json"
    record = dynamic.main([*TINY.split(), "--repeats", "2", "--batches", "1", "2", "--output", str(path)])
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(record))
    assert [entry["batch"] for entry in record["prefill"]] == [1, 2]
    cache = record["answer"]["cache"]
    assert cache["curve"]["tokens"][-1] == 8
    dense, sparse = (cache["curve"][name][-1] for name in ("dense", "sparse"))
    free = cache["bytes_of_free_slots"]
    assert cache["ratio"] == sparse / dense > (sparse - free) / dense
    assert (sparse - free) / dense == pytest.approx(cache["ideal"])
    assert (1 + cache["over_kept_tokens"]) * (sparse - free) == pytest.approx(sparse)
    kept = record["training"]["saved_bytes"]
    assert kept["blockwise"] < kept["eager"]
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    assert "| prefill, batch 2 (ms) |" in table
    assert [(entry["batch"], entry["tokens"]) for entry in record["decoding"]] == [(3, 4)]
    assert "| decoding with cache, batch 3, 4 tokens (ms per token of all) |" in table
    assert table.strip() in capsys.readouterr().out
    assert path.with_suffix(".png").stat().st_size > 5_000


def test_wrong_options_are_named() -> None:
    with pytest.raises(FlagError, match=r"\.json"):
        dynamic.parse_args(["--output", "table.txt"])
    with pytest.raises(FlagError, match="vision_keep_rate"):
        dynamic.settings_of(dynamic.parse_args(["--keep-rate", "2"]))

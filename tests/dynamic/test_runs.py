"""Training runs by the real command line: what moves, what is saved, what resumes, alone and with the other methods."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dynamic.config import SparseConfig
from llava.errors import CheckpointError, FlagError
from llava.model.checkpoint import bare_model
from llava.model.components import Component, components
from llava.train import continued
from llava.train.continued import recorded_extensions
from llava.train.run import Run
from llava.train.train import build_run, main, parse_args
from llava.train.train_sparse import DEFAULTS
from tests.llava.train.test_training import HYDRA, LLAVA, command_line, logits, losses

pytestmark = pytest.mark.versions

SPARSE: dict[str, Any] = {
    "sparse_layer": 1, "d_model": 16, "nhead": 2, "dim_feedforward": 32, "num_layers": 1,
    "output_text_len_for_training": 3, "instruct_len_for_training": 3, "predictor_lr": 5e-3, "mask_loss_weight": 2.0,
    "vision_keep_rate": 0.5, "learning_rate": 1e-3, "requires_image": False,
}  # fmt: skip

# Recipe: options, parts that are trained.
RECIPES: dict[str, tuple[dict[str, Any], set[Component]]] = {
    "full": ({}, {Component.PROJECTOR, Component.LANGUAGE_MODEL, Component.EXTENSION}),
    "backbone frozen": ({"freeze_backbone": True}, {Component.PROJECTOR, Component.EXTENSION}),
    "predictors alone": ({"freeze_backbone": True, "freeze_mm_mlp_adapter": True}, {Component.EXTENSION}),
    "lora": ({"lora_enable": True, "lora_r": 4}, {Component.ADAPTER, Component.PROJECTOR, Component.EXTENSION}),
    "hydralora": (HYDRA | {"moe_balance_w": 0.05}, {Component.ADAPTER, Component.PROJECTOR, Component.EXTENSION}),
}


def sparse_line(output: Path, **changes: Any) -> list[str]:
    return command_line(output, **(SPARSE | changes))


def build(output: Path, **changes: Any) -> Run:
    return build_run(parse_args(sparse_line(output, **changes), defaults=DEFAULTS))


def copied(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in named.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str, tmp_path: Path) -> None:
    """Exactly the declared parts move, every parameter of the extensions among them; the checkpoint has the logits."""
    options, trained = RECIPES[recipe]
    run = build(tmp_path / "out", **options)
    parts = components(run.model)
    assert {part for part, named in parts.items() if any(w.requires_grad for w in named.values())} == trained
    before = {part: copied(named) for part, named in parts.items()}
    run.trainer.train()
    for part, named in parts.items():
        moved = {name for name, weight in named.items() if not torch.equal(weight, before[part][name])}
        assert bool(moved) == (part in trained), f"{part}: {sorted(moved)[:3]} moved"
        if part is Component.EXTENSION:
            assert moved == set(named)
    live = bare_model(run.model)
    assert set(live.extensions.configs) == {"dynamic", *(["hydralora"] if recipe == "hydralora" else [])}
    ids = torch.tensor([[1, 350, -200, 400, 500, 13]])
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = live.eval()(input_ids=ids, images=image).logits
    image_tokens = live.get_vision_tower().num_features
    assert expected.shape[1] < 5 + image_tokens, "tokens must have been dropped"
    torch.testing.assert_close(logits(tmp_path / "out" / "checkpoint-3"), expected, rtol=0, atol=1e-5)


def test_what_is_logged(tmp_path: Path) -> None:
    main(sparse_line(tmp_path, gumbel_end_tau=0.1, **RECIPES["hydralora"][0]), defaults=DEFAULTS)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    first, *_, last = [entry for entry in history if "loss" in entry]
    parts = ["lm", "dynamic/image", "dynamic/output_text", "dynamic/instruct", "hydralora/balance"]
    assert first["loss"] == pytest.approx(sum(first[f"loss/{part}"] for part in parts), abs=1e-4)
    assert {"dynamic/kept_image", "dynamic/kept_output_text", "dynamic/kept_instruct"} <= first.keys()
    assert first["dynamic/tau"] == 1.0
    assert last["dynamic/tau"] == pytest.approx(0.1 ** (2 / 3))
    assert first["learning_rate"] == pytest.approx(1e-3)
    assert first["learning_rate/predictors"] == pytest.approx(5e-3)


@pytest.mark.parametrize("recipe", ["full", "hydralora"])
def test_resume_is_exact(recipe: str, tmp_path: Path) -> None:
    """Noise, temperature, dropout and order go on where they were."""
    options = RECIPES[recipe][0] | {"max_steps": 4, "save_steps": 2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(sparse_line(whole, **options), defaults=DEFAULTS)
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    main(sparse_line(cut, **options), defaults=DEFAULTS)
    assert losses(cut) == losses(whole)
    assert torch.equal(logits(cut), logits(whole))
    assert losses(cut)[2:] != losses(cut)[:2]


def test_checkpointing_changes_nothing(tmp_path: Path) -> None:
    shared = HYDRA | {"lora_dropout": 0.0, "save_strategy": "no"}
    main(sparse_line(tmp_path / "plain", **shared), defaults=DEFAULTS)
    main(sparse_line(tmp_path / "checkpointed", gradient_checkpointing=True, **shared), defaults=DEFAULTS)
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "checkpointed"), abs=1e-6)


def test_half_precision_keeps_the_predictors_in_fp32(tmp_path: Path) -> None:
    run = build(tmp_path, bf16=True, lora_enable=True, lora_r=4)
    parts = components(run.model)
    assert {weight.dtype for weight in parts[Component.EXTENSION].values()} == {torch.float32}
    assert {weight.dtype for weight in parts[Component.LANGUAGE_MODEL].values()} == {torch.bfloat16}
    assert 0 < run.trainer.train().training_loss < 30


def test_a_base_of_4_bits(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    run = build(tmp_path, bits=4, lora_enable=True, lora_r=4)
    parts = components(run.model)
    before = copied(parts[Component.EXTENSION])
    run.trainer.train()
    for name, weight in parts[Component.EXTENSION].items():
        assert not torch.equal(weight, before[name]), name
    assert logits(tmp_path / "checkpoint-3").isfinite().all()


def test_rows_without_image_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = build(tmp_path / "all").dataset
    chosen = build(tmp_path / "chosen", requires_image=True, group_by_modality_length=True).dataset
    with_image = [length > 0 for length in rows.modality_lengths]
    assert len(chosen) == sum(with_image) < len(rows)
    assert all(length > 0 for length in chosen.modality_lengths)
    said = f"--requires_image True: {len(rows) - len(chosen)} rows without image are left out, {len(chosen)} remain"
    assert said in capsys.readouterr().out


def test_predictors_of_the_base_are_trained_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A second run goes on with the predictors of the first, whatever settings it changes; it never drops them."""
    main(sparse_line(tmp_path / "first"), defaults=DEFAULTS)
    then = {name: weight.clone() for name, weight in predictors_in(tmp_path / "first").items()}
    again = {"model_name_or_path": tmp_path / "first", "vision_tower": LLAVA / "tiny-clip", "vision_keep_rate": 0.25}
    second = build(tmp_path / "second", seed=7, **again)
    now = components(second.model)[Component.EXTENSION]
    assert now.keys() == then.keys()
    assert all(torch.equal(now[name], then[name]) for name in then)
    assert "dynamic: trained on from" in (said := capsys.readouterr().out)
    assert "vision_keep_rate 0.5 -> 0.25" in said
    with pytest.raises(CheckpointError, match="shape"):
        build(tmp_path / "other", **again, d_model=32)
    with pytest.raises(FlagError, match=r"was trained with \['dynamic'\]"):
        build_run(parse_args(command_line(tmp_path / "dense", model_name_or_path=tmp_path / "first")))


def predictors_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "extensions" / "dynamic" / "model.safetensors")


@pytest.mark.parametrize("layout", ["ours", "original", "none"])
def test_a_base_on_a_hub(layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one that holds predictors a folder is asked for; only its small files are looked at."""
    config = {"model_type": "llava_llama"} | (
        {"sparse_config": SparseConfig().to_dict()} if layout == "original" else {}
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    if layout == "ours":
        (tmp_path / "extensions" / "dynamic").mkdir(parents=True)
        (tmp_path / "extensions" / "dynamic" / "config.json").write_text(json.dumps(SparseConfig().to_dict()))
    monkeypatch.setattr(continued, "local_folder", lambda *_, **__: tmp_path)
    if layout == "none":
        assert recorded_extensions("owner/name") == {}
    else:
        with pytest.raises(CheckpointError, match=r"owner/name was trained with \['dynamic'\].*hf download"):
            recorded_extensions("owner/name")

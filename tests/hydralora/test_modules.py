"""Runs with `--hydralora_modules`: what is trained, saved, loaded and resumed, beside routed MLP blocks and LoRA."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hydralora.linears import routed_updates
from llava.convert.original import export_original
from llava.errors import FlagError
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import bare_model
from llava.model.components import Component, components
from llava.train.train import build_run, main, parse_args
from tests.checkpointed import checkpoint_layers
from tests.llava.train.test_training import HYDRA, LLAVA, command_line, logits, losses

ALL = HYDRA | {"hydralora_modules": "attention,vision"}
QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
CLIP = ("q_proj", "k_proj", "v_proj", "out_proj")
BLOCK = {f"{matrix}_{kind}" for matrix in ("shared_A", "experts_B") for kind in ("gate", "up", "down")}
BLOCK |= {"router.weight", "router.bias"}

# Options; projections with HydraLoRA in the decoder and in the tower; projections with LoRA; routed MLP blocks?
RECIPES: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[str, ...], tuple[str, ...], bool]] = {
    "all three": (ALL, QKVO, CLIP, (), True),
    "vision beside LoRA": (HYDRA | {"hydralora_modules": "vision"}, (), CLIP, QKVO, True),
    "single projections beside LoRA": (
        HYDRA | {"hydralora_modules": "attention.q_proj, attention.v_proj,vision.k_proj"},
        ("q_proj", "v_proj"),
        ("k_proj",),
        ("k_proj", "o_proj"),
        True,
    ),
    "without routed blocks": (ALL | {"llm_moe": False, "hydralora_num_experts": 1}, QKVO, CLIP, (), False),
}


def expected_names(recipe: str) -> set[str]:
    """Every parameter that must be trained, by its name in the bare model: three decoder layers, two tower blocks."""
    _, decoder, tower, lora, blocks = RECIPES[recipe]
    names = {f"model.mm_projector.{layer}.{kind}" for layer in (0, 2) for kind in ("weight", "bias")}
    places = [f"model.layers.{i}.self_attn.{name}" for i in range(3) for name in decoder]
    places += [f"model.vision_tower.vision_tower.encoder.layers.{i}.self_attn.{n}" for i in range(2) for n in tower]
    names |= {f"{place}.routed.{part}" for place in places for part in ("shared_A", "experts_B", "router")}
    places = [f"model.layers.{i}.self_attn.{name}" for i in range(3) for name in lora]
    names |= {f"{place}.lora_{side}.default.weight" for place in places for side in "AB"}
    return names | {f"model.layers.{i}.mlp.{part}" for i in range(3) for part in BLOCK if blocks}


def batch(text_only: bool = False) -> dict[str, Tensor]:
    """One row; the image of a row of text alone takes no place in it, as in training."""
    ids = torch.tensor([[1, 350, 350 if text_only else -200, 400, 500, 13]])
    images = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    return {"input_ids": ids, "labels": torch.where(ids > 0, ids, -100), "images": images}


def gradients(model: torch.nn.Module, **options: Any) -> dict[str, Tensor]:
    model.train().zero_grad()
    model(**batch(**options)).loss.backward()
    return {name: w.grad for name, w in bare_model(model).named_parameters() if w.grad is not None}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str, tmp_path: Path) -> None:
    """The exact set is trained, all of it gets gradients, and the checkpoint gives the trained model's logits."""
    options, _, _, lora, _ = RECIPES[recipe]
    run = build_run(parse_args(command_line(tmp_path / "out", **options)))
    llava = bare_model(run.model)
    trained = {name for name, weight in llava.named_parameters() if weight.requires_grad}
    assert trained == expected_names(recipe)
    base = logits(LLAVA / "tiny-llava-v1.5")
    assert torch.equal(llava.eval()(**batch()).logits, base), "B = 0: the identity"
    before = {name: weight.detach().clone() for name, weight in llava.named_parameters()}
    run.trainer.train()
    moved = {name for name, weight in llava.named_parameters() if not torch.equal(weight, before[name])}
    # One expert has no alternative, so that its router gets zeros.
    assert moved == {name for name in trained if options.get("llm_moe", True) or not name.endswith(".routed.router")}
    found = gradients(run.model)
    assert found.keys() == trained
    assert {name for name, value in found.items() if not value.any()} <= {n for n in trained if n.endswith("router")}

    folder = tmp_path / "out" / "checkpoint-3"
    files = {str(path.relative_to(folder)) for path in folder.rglob("*.safetensors")}
    assert files == {"extensions/hydralora/model.safetensors", "mm_projector.safetensors"} | (
        {"adapter_model.safetensors"} if lora else set()
    )
    live = llava.eval()(**batch()).logits
    # Merging LoRA into the weights changes the order of sums: 2e-6 at most here; without LoRA nothing is merged.
    torch.testing.assert_close(logits(folder), live, rtol=0, atol=1e-5 if lora else 0)
    assert (live - base).abs().max() > 0.1
    for update in routed_updates(llava).values():
        update.reset_parameters()
    assert (llava(**batch()).logits - live).abs().max() > 1e-2, "the updates must have a part in it"


def test_a_frozen_tower_without_updates_passes_no_gradient(tmp_path: Path) -> None:
    for modules, passes in (("attention", False), ("vision.v_proj", True)):
        run = build_run(parse_args(command_line(tmp_path, **HYDRA, hydralora_modules=modules)))
        tower = bare_model(run.model.train()).get_vision_tower()
        assert tower(batch()["images"]).requires_grad is passes
        assert (tower.trainable, tower.training) == (passes, passes)
        assert not any(weight.requires_grad for weight in components(run.model)[Component.VISION_TOWER].values())


def test_rows_of_text_alone_run_the_same_modules(tmp_path: Path) -> None:
    """Data parallelism needs a gradient of every parameter, also of the tower's, from a batch without images."""
    model = build_run(parse_args(command_line(tmp_path, **ALL))).model
    found = gradients(model, text_only=True)
    assert found.keys() == {name for name, weight in model.named_parameters() if weight.requires_grad}
    inside = {id(weight) for weight in model.get_vision_tower().parameters()}
    in_tower = [name for name, weight in model.named_parameters() if id(weight) in inside and weight.requires_grad]
    assert len(in_tower) == 2 * 4 * 3
    assert not any(found[name].any() for name in in_tower)
    assert any(gradients(model)[name].any() for name in in_tower)


def test_batches_are_answered_as_single_rows(tmp_path: Path) -> None:
    main(command_line(tmp_path, **ALL))
    _, model, _, _ = load_pretrained_model(str(tmp_path), device="cpu")
    rows = [[1, 350, -200, 400, 500, 13], [1, 350, -200, 13]]
    images = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    options: dict[str, Any] = {"do_sample": False, "max_new_tokens": 6}
    padded = torch.tensor([row + [0] * (6 - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (6 - len(row)) for row in rows])
    together = model.generate(padded, images=images, attention_mask=mask, **options).tolist()
    for row, image, answer in zip(rows, images, together, strict=True):
        alone = model.generate(torch.tensor([row]), images=image[None], **options)[0].tolist()
        assert answer[: len(alone)] == alone


def test_balance_loss_and_metrics(tmp_path: Path) -> None:
    """Two losses of their own; the tower's routers, whose tokens are no tokens of the text, take no part."""
    main(command_line(tmp_path / "on", **ALL, hydralora_balance_w=0.5, hydralora_num_experts=2))
    main(command_line(tmp_path / "off", **ALL, hydralora_num_experts=2))
    first = [json.loads((tmp_path / n / "trainer_state.json").read_text())["log_history"][0] for n in ("on", "off")]
    shares = {f"hydralora/share_{e}" for e in range(3)} | {f"hydralora/attention_share_{e}" for e in range(2)}
    for entry in first:
        assert {name for name in entry if "share" in name} == shares
        assert sum(entry[f"hydralora/attention_share_{e}"] for e in range(2)) == pytest.approx(1)
        assert 0 < entry["hydralora/attention_entropy"] <= 0.6932
    assert 0.25 <= first[0]["loss/hydralora/attention_balance"] <= 0.5  # 1/E when balanced, 1 for one expert alone
    assert first[0]["loss/hydralora/balance"] == first[1]["loss/hydralora/balance"]
    assert "loss/hydralora/attention_balance" not in first[1]
    assert losses(tmp_path / "on") != losses(tmp_path / "off")


def test_own_sizes(tmp_path: Path) -> None:
    sizes = {"hydralora_rank": 2, "hydralora_alpha": 3.5, "hydralora_dropout": 0.25, "hydralora_num_experts": 5}
    llava = bare_model(build_run(parse_args(command_line(tmp_path, **ALL, **sizes))).model)
    for update in routed_updates(llava).values():
        assert (update.rank, update.alpha, update.dropout, update.experts) == (2, 3.5, 0.25, 5)
    for update in routed_updates(bare_model(build_run(parse_args(command_line(tmp_path, **ALL))).model)).values():
        assert (update.rank, update.alpha, update.dropout, update.experts) == (4, 8, 0.05, 3)


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True, "bf16": True}], ids=str)
def test_resume_is_exact(options: dict[str, Any], tmp_path: Path) -> None:
    options = ALL | options | {"max_steps": 4}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(command_line(whole, **options))
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    main(command_line(cut, **options))
    assert losses(cut) == losses(whole)
    for name in ("extensions/hydralora/model.safetensors", "mm_projector.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_gradient_checkpointing_changes_nothing(tmp_path: Path) -> None:
    model = build_run(parse_args(command_line(tmp_path, **ALL, lora_dropout=0.0, hydralora_balance_w=0.5))).model
    plain = {name: value.clone() for name, value in gradients(model).items()}
    checkpoint_layers(model)
    checkpointed = gradients(model)
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bits", [4, 8])
def test_on_a_quantised_base(bits: int, tmp_path: Path) -> None:
    """Without LoRA no PEFT model is around it; the tower stays in full precision."""
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    run = build_run(parse_args(command_line(tmp_path, **ALL, bits=bits, lora_dropout=0.0)))
    assert {name for name, w in run.model.named_parameters() if w.requires_grad} == expected_names("all three")
    run.trainer.train()
    assert all(value.any() for name, value in gradients(run.model).items() if not name.endswith("router"))
    live = bare_model(run.model).eval()(**batch()).logits
    _, again, _, _ = load_pretrained_model(str(tmp_path / "checkpoint-3"), device="cpu", **{f"load_{bits}bit": True})
    torch.testing.assert_close(again(**batch()).logits, live, rtol=0, atol=1e-5)
    _, base, _, _ = load_pretrained_model(str(LLAVA / "tiny-llava-v1.5"), device="cpu", **{f"load_{bits}bit": True})
    assert (base(**batch()).logits - live).abs().max() > 0.1


def test_export_is_refused(tmp_path: Path) -> None:
    main(command_line(tmp_path / "out", **HYDRA, hydralora_modules="vision", max_steps=1))
    with pytest.raises(FlagError, match=r"--hydralora_modules.*no place"):
        export_original(tmp_path / "out", tmp_path / "original")
    assert not (tmp_path / "original").exists()


def test_routers_that_no_loss_depends_on_are_not_trained(tmp_path: Path) -> None:
    """Sparse blocks without balance loss: every parameter that is trained has a gradient, and the routers are saved."""
    options = HYDRA | {"dense_moe": False, "moe_balance_w": 0.0}
    run = build_run(parse_args(command_line(tmp_path, **options)))
    llava = bare_model(run.model)
    frozen = {name for name, w in components(llava)[Component.EXTENSION].items() if not w.requires_grad}
    assert frozen == {f"model.layers.{i}.mlp.router.{kind}" for i in range(3) for kind in ("weight", "bias")}
    assert gradients(run.model).keys() == {n for n, w in llava.named_parameters() if w.requires_grad}
    run.trainer.train()
    torch.testing.assert_close(logits(tmp_path / "checkpoint-3"), llava.eval()(**batch()).logits, rtol=0, atol=1e-5)
    balanced = build_run(parse_args(command_line(tmp_path / "balanced", **options | {"moe_balance_w": 0.1}))).model
    assert all(weight.requires_grad for weight in components(balanced)[Component.EXTENSION].values())

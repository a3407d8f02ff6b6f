"""Training runs by the real command line: what moves, what is saved, what resumes, alone and with the other methods."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.errors import FlagError
from llava.extension import installed_extensions
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import bare_model
from llava.model.components import Component, components
from llava.train.run import Run
from llava.train.train import build_run, main, parse_args
from mma.config import MmaConfig, MmaOptions
from mma.model import MODALITIES
from tests.golden import load_case
from tests.llava.model.test_generation import prompts
from tests.llava.train.test_training import BASE, HYDRA, LLAVA, command_line, logits, losses
from tests.mma.golden_model import write_tower

pytestmark = pytest.mark.versions

MMA: dict[str, Any] = {"mma": True, "visual_input": "llava", "visual_adapter_type": "router"}
SPARSE: dict[str, Any] = {
    "dynamic": True, "sparse_layer": 1, "d_model": 16, "nhead": 2, "dim_feedforward": 32, "num_layers": 1,
    "output_text_len_for_training": 3, "instruct_len_for_training": 3, "predictor_lr": 5e-3,
}  # fmt: skip
OWN = {Component.PROJECTOR, Component.EXTENSION}

# Recipe: options, parts that are trained.
RECIPES: dict[str, tuple[dict[str, Any], set[Component]]] = {
    "attn, router": (MMA, OWN),
    "block, router_block": (MMA | {"adapter_type": "block", "visual_adapter_type": "router_block"}, OWN),
    "plain adapters in the tower": (MMA | {"visual_adapter_type": "normal"}, OWN),
    "tower too": (
        MMA | {"unfreeze_mm_vision_tower": True, "mm_vision_tower_lr": 1e-3},
        OWN | {Component.VISION_TOWER},
    ),
    "lora": (MMA | {"lora_enable": True, "lora_r": 4}, OWN | {Component.ADAPTER}),
    "all three": (
        MMA | HYDRA | SPARSE | {"adapter_type": "block", "drop_path": 0.1, "moe_balance_w": 0.05},
        OWN | {Component.ADAPTER},
    ),
}


def build(output: Path, **changes: Any) -> Run:
    return build_run(parse_args(command_line(output, **changes)))


def copied(named: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in named.items()}


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str, tmp_path: Path) -> None:
    """Exactly the declared parts move, every adapter and router among them; the checkpoint has the model's logits."""
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
            assert moved == set(named), f"{sorted(set(named) - moved)[:3]} did not move"
    live = bare_model(run.model)
    expected_names = {"mma", "hydralora", "dynamic"} if recipe == "all three" else {"mma"}
    assert set(live.extensions.configs) == expected_names
    ids = torch.tensor([[1, 350, -200, 400, 500, 13]])
    image = torch.randn(1, 3, 28, 28, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = live.eval()(input_ids=ids, images=image).logits
    torch.testing.assert_close(logits(tmp_path / "out" / "checkpoint-3"), expected, rtol=0, atol=1e-5)
    batch = prompts()
    fixed = {"do_sample": False, "max_new_tokens": 4}
    together = live.generate(batch.ids, images=batch.images, attention_mask=batch.mask, **fixed)
    for number, (row, images) in enumerate(zip(batch.rows, batch.images_of_rows, strict=True)):
        assert torch.equal(live.generate(row[None], images=images, **fixed)[0], together[number])


@pytest.mark.parametrize("recipe", ["attn, router", "tower too", "all three"])
def test_resume_is_exact(recipe: str, tmp_path: Path) -> None:
    """Dropout, drop path, moments and order go on where they were."""
    options = RECIPES[recipe][0] | {"max_steps": 4, "save_steps": 2}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(command_line(whole, **options))
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    main(command_line(cut, **options))
    assert losses(cut) == losses(whole)
    assert torch.equal(logits(cut), logits(whole))
    assert losses(cut)[2:] != losses(cut)[:2]


def test_checkpointing_changes_nothing(tmp_path: Path) -> None:
    shared = RECIPES["all three"][0] | {"lora_dropout": 0.0, "save_strategy": "no"}
    main(command_line(tmp_path / "plain", **shared))
    main(command_line(tmp_path / "checkpointed", gradient_checkpointing=True, **shared))
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "checkpointed"), abs=1e-6)


def test_as_published(tmp_path: Path) -> None:
    """Six class tokens (two here) of a text model's first images: what LaVIN's flags alone give."""
    case, _ = load_case("lavin", "clip_base")
    tower = write_tower(tmp_path / "tower", case["config"])
    options = {
        "mma": True, "visual_adapter_type": "router", "hidden_proj": 16, "model_name_or_path": LLAVA / "tiny-vicuna",
        "vision_tower": tower, "learning_rate": 5e-2,
    }  # fmt: skip
    line = command_line(tmp_path / "out", **options)
    line = [
        word
        for name, value in zip(line[::2], line[1::2], strict=True)
        if name not in ("--mm_vision_select_layer", "--mm_projector_type", "--image_aspect_ratio")
        for word in (name, value)
    ]
    run = build_run(parse_args(line))
    live = bare_model(run.model)
    assert live.get_vision_tower().num_features == 2
    assert live.get_vision_tower().image_processor.image_mean == [0.485, 0.456, 0.406]
    assert (live.config.image_aspect_ratio, live.config.mm_projector_type) == ("stretch", "bottleneck16_silu")
    pixels = next(row["image"] for row in (run.dataset[index] for index in range(len(run.dataset))) if "image" in row)
    run.trainer.train()
    _, again, processor, _ = load_pretrained_model(
        str(tmp_path / "out" / "checkpoint-3"), str(LLAVA / "tiny-vicuna"), device="cpu"
    )
    assert processor.image_mean == [0.485, 0.456, 0.406]
    ids = torch.tensor([[1, 350, -200, 400, 500, 13]])
    with torch.no_grad():
        expected = live.eval()(input_ids=ids, images=pixels[None]).logits
        assert expected.shape[1] == 5 + 2
        torch.testing.assert_close(again(input_ids=ids, images=pixels[None]).logits, expected, rtol=0, atol=1e-5)
    saved = json.loads((tmp_path / "out" / "checkpoint-3" / "extensions" / "mma" / "config.json").read_text())
    assert MmaConfig.from_dict(saved) == MmaConfig(visual_adapter_type="router")


def test_half_precision_keeps_the_adapters_in_fp32(tmp_path: Path) -> None:
    run = build(tmp_path, bf16=True, **MMA)
    parts = components(run.model)
    assert {weight.dtype for weight in parts[Component.EXTENSION].values()} == {torch.float32}
    assert {weight.dtype for weight in parts[Component.LANGUAGE_MODEL].values()} == {torch.bfloat16}
    assert 0 < run.trainer.train().training_loss < 30


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantised_base(bits: int, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    run = build(tmp_path, bits=bits, **MMA)
    parts = components(run.model)
    before = copied(parts[Component.EXTENSION])
    run.trainer.train()
    for name, weight in parts[Component.EXTENSION].items():
        assert not torch.equal(weight, before[name]), name
    assert logits(tmp_path / "checkpoint-3").isfinite().all()


def test_batches_of_one_modality_train_that_row_alone(tmp_path: Path) -> None:
    """A batch of text sends no gradient into the row of images, and every parameter gets one all the same."""
    run = build(tmp_path, **MMA)
    live = bare_model(run.model)
    live.train()
    ids = torch.tensor([[1, 350, 400, 500, 13]])
    live(input_ids=ids, images=torch.zeros(1, 3, 28, 28), labels=ids).loss.backward()
    parameters = live.extensions.named_parameters(live)
    assert all(weight.grad is not None for weight in parameters.values())
    (embedding,) = (weight for name, weight in parameters.items() if "modality_embedding" in name)
    assert MODALITIES == ("text", "image")
    assert not embedding.grad[1].any()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "off, but given": ({"adapter_dim": 4}, "--adapter_dim 4: without effect while --mma is off"),
    "unknown type": (MMA | {"adapter_type": "mlp"}, "adapter_type is 'mlp'"),
    "groups": (MMA | {"adapter_dim": 7}, "adapter_dim 7 is not a multiple"),
    "temperature": (MMA | {"temperature": 0}, "--temperature 0.0: must be more than 0"),
    "image": ({"mma": True}, "--mm_vision_select_layer -2: --visual_input lavin has -1"),
    "image, the default": ({"mma": True, "mm_vision_select_layer": -1, "image_aspect_ratio": "square"}, "square"),
    "no such projector": (MMA | {"hidden_proj": 128}, "--hidden_proj 128: is the width"),
    "nothing to drop": (MMA | {"adapter_type": "none", "drop_path": 0.1}, "--drop_path 0.1: belongs to the adapters"),
    "input": (MMA | {"visual_input": "six"}, "--visual_input is 'six'"),
    "reentrant": (
        MMA | {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"use_reentrant": true}'},
        "use_reentrant",
    ),
    "normalization": (MMA | {"mm_image_normalization": "mean"}, "--mm_image_normalization is 'mean'"),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_is_refused(reason: str, tmp_path: Path) -> None:
    options, message = REFUSED[reason]
    with pytest.raises(FlagError, match=message):
        build(tmp_path, **options)


def test_the_flags_are_the_originals() -> None:
    """Every option that LaVIN's `train.py` has by the same name has the same default here."""
    case, _ = load_case("lavin", "cli_flags")
    theirs = {flag["dest"]: flag for flag in case["train_py"]}
    ours = vars(MmaOptions())
    assert len(ours.keys() & theirs.keys()) == 8
    for name in ours.keys() & theirs.keys():
        assert ours[name] == theirs[name]["default"], name


def test_it_is_installed_with_the_package() -> None:
    assert "mma" in installed_extensions()
    assert BASE.is_dir()

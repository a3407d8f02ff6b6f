"""Training runs on the tiny checkpoint: what moves, what is saved, what resumes, what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llava.errors import BadSampleError, CheckpointError, FlagError
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import bare_model
from llava.model.components import Component, components
from llava.runtime import checkpointing
from llava.train.train import build_run, main, parse_args
from tests.golden import golden_dir

pytestmark = pytest.mark.versions

LLAVA = golden_dir("llava")
BASE = LLAVA / "tiny-llava-v1.5"
HYDRA = {"use_lora": True, "lora_rank": 4, "lora_alpha": 8, "mm_projector_lr": 1e-3}

# Recipe: options, parts that are trained, files that a checkpoint must hold.
RECIPES: dict[str, tuple[dict[str, Any], set[Component], set[str]]] = {
    "projector": ({"tune_mm_mlp_adapter": True}, {Component.PROJECTOR}, {"mm_projector.safetensors"}),
    "full": ({}, {Component.PROJECTOR, Component.LANGUAGE_MODEL}, {"model.safetensors"}),
    "full, projector frozen": ({"freeze_mm_mlp_adapter": True}, {Component.LANGUAGE_MODEL}, {"model.safetensors"}),
    "backbone frozen": ({"freeze_backbone": True}, {Component.PROJECTOR}, {"mm_projector.safetensors"}),
    "tower too": (
        {"unfreeze_mm_vision_tower": True, "mm_vision_tower_lr": 1e-3},
        {Component.VISION_TOWER, Component.PROJECTOR, Component.LANGUAGE_MODEL},
        {"model.safetensors", "vision_tower/model.safetensors"},
    ),
    "lora": (
        {"lora_enable": True, "lora_r": 4},
        {Component.ADAPTER, Component.PROJECTOR},
        {"adapter_model.safetensors", "adapter_config.json", "mm_projector.safetensors"},
    ),
    "lora, projector frozen": (
        {"lora_enable": True, "lora_r": 4, "freeze_mm_mlp_adapter": True},
        {Component.ADAPTER},
        {"adapter_model.safetensors"},
    ),
    "hydralora, dense": (
        HYDRA,
        {Component.ADAPTER, Component.PROJECTOR, Component.EXTENSION},
        {"adapter_model.safetensors", "extensions/hydralora/model.safetensors", "mm_projector.safetensors"},
    ),
    "hydralora, sparse": (
        HYDRA | {"dense_moe": False},
        {Component.ADAPTER, Component.PROJECTOR, Component.EXTENSION},
        {"adapter_model.safetensors", "extensions/hydralora/model.safetensors", "mm_projector.safetensors"},
    ),
    "lora on attention by the other name": (
        HYDRA | {"llm_moe": False},
        {Component.ADAPTER, Component.PROJECTOR},
        {"adapter_model.safetensors", "mm_projector.safetensors"},
    ),
}


def command_line(output: Path, **changes: Any) -> list[str]:
    options: dict[str, Any] = {
        "model_name_or_path": BASE,
        "vision_tower": LLAVA / "tiny-clip",
        "data_path": LLAVA / "data" / "finetune.json",
        "image_folder": LLAVA / "data" / "images",
        "mm_vision_select_layer": -2,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad",
        "version": "v1",
        "output_dir": output,
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    options |= changes
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def logits(folder: Path | str) -> Tensor:
    """Logits of the model in a folder for a fixed prompt with an image."""
    _, model, _, _ = load_pretrained_model(str(folder), device="cpu")
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([[1, 350, -200, 400, 500, 13]])
    return model(input_ids=ids, images=torch.randn(1, 3, 28, 28, generator=generator)).logits


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe(recipe: str, tmp_path: Path) -> None:
    """Exactly the declared parts move; each checkpoint is complete and gives the trained model's logits."""
    options, trained, files = RECIPES[recipe]
    run = build_run(parse_args(command_line(tmp_path / "out", **options)))
    before = {
        part: {name: weight.detach().clone() for name, weight in named.items()}
        for part, named in components(run.model).items()
    }
    run.trainer.train()
    for part, named in components(run.model).items():
        moved = [name for name, weight in named.items() if not torch.equal(weight, before[part][name])]
        assert bool(moved) == (part in trained), f"{part}: {moved[:3]} moved"
        assert {weight.requires_grad for weight in named.values()} in ({part in trained}, {True, False}, set())
    checkpoints = sorted(path.name for path in (tmp_path / "out").glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-2", "checkpoint-3"]
    for name in checkpoints:
        folder = tmp_path / "out" / name
        present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        weights = {name for name in present if name.endswith((".safetensors", "adapter_config.json"))}
        assert weights == files | ({"adapter_config.json"} if "adapter_model.safetensors" in files else set())
        assert {"config.json", "trainer_state.json", "optimizer.pt", "tokenizer.model"} <= present
    after = logits(tmp_path / "out" / "checkpoint-3")
    assert not torch.allclose(after, logits(BASE), atol=1e-4), "training must have changed the model"
    live = bare_model(run.model).eval()
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([[1, 350, -200, 400, 500, 13]])
    with torch.no_grad():
        expected = live(input_ids=ids, images=torch.randn(1, 3, 28, 28, generator=generator)).logits
    # Merging LoRA into the weights changes the order of sums: 2e-6 at most here.
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("recipe", ["full", "tower too", "hydralora, dense"])
def test_resume_is_exact(recipe: str, tmp_path: Path) -> None:
    """A run that lost everything after its second update ends as one that was not interrupted, dropout included."""
    options = RECIPES[recipe][0] | {"max_steps": 5, "save_steps": 2, "group_by_modality_length": True}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    main(command_line(whole, **options))
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    main(command_line(cut, **options))
    assert losses(cut) == losses(whole)
    assert torch.equal(logits(cut), logits(whole))
    assert losses(cut)[3:] != losses(cut)[:2]


@pytest.mark.parametrize("base", ["tiny-vicuna", "tiny-llava-v1.5"])
def test_a_frozen_projector_that_the_base_lacks_is_saved(base: str, tmp_path: Path) -> None:
    """LoRA on a language model with a projector of stage 1 that is not trained: the checkpoint is complete."""
    stage_1 = LLAVA / ("tiny-llava-pretrain" if base == "tiny-vicuna" else "tiny-llava-v1.5") / "mm_projector.bin"
    options = {"lora_enable": True, "lora_r": 4, "freeze_mm_mlp_adapter": True, "pretrain_mm_mlp_adapter": stage_1}
    kind = json.loads((stage_1.parent / "config.json").read_text())["mm_projector_type"]
    options |= {"model_name_or_path": LLAVA / base, "mm_projector_type": kind}
    run = build_run(parse_args(command_line(tmp_path, **options)))
    run.trainer.train()
    assert not any(weight.requires_grad for weight in components(run.model)[Component.PROJECTOR].values())
    _, again, _, _ = load_pretrained_model(str(tmp_path / "checkpoint-3"), device="cpu")
    live = bare_model(run.model).get_model().mm_projector.state_dict()
    for name, weight in again.get_model().mm_projector.state_dict().items():
        assert torch.equal(weight, live[name])


def test_same_seed_same_curve(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        main(command_line(tmp_path / name, **HYDRA, seed=seed, save_strategy="no"))
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert losses(tmp_path / "a") != losses(tmp_path / "c")


@pytest.mark.parametrize("extra", [{}, HYDRA | {"lora_dropout": 0.0, "moe_balance_w": 0.0}], ids=["full", "hydralora"])
def test_accumulation_does_not_change_the_update(extra: dict[str, Any], tmp_path: Path) -> None:
    """Four rows at once or one by one: the same loss over the same tokens, although rows have different lengths."""
    shared = extra | {"max_steps": 2, "save_strategy": "no", "train_sampling_strategy": "sequential"}
    main(command_line(tmp_path / "once", per_device_train_batch_size=4, **shared))
    main(command_line(tmp_path / "steps", per_device_train_batch_size=1, gradient_accumulation_steps=4, **shared))
    assert losses(tmp_path / "once") == pytest.approx(losses(tmp_path / "steps"), abs=2e-5)
    torch.testing.assert_close(logits(tmp_path / "once"), logits(tmp_path / "steps"), rtol=0, atol=2e-3)
    main(command_line(tmp_path / "other", per_device_train_batch_size=1, **shared))
    assert losses(tmp_path / "other") != pytest.approx(losses(tmp_path / "steps"), abs=1e-3)


@pytest.mark.parametrize("recipe", ["full", "hydralora, dense", "hydralora, sparse"])
def test_gradient_checkpointing_changes_nothing(recipe: str, tmp_path: Path) -> None:
    options = RECIPES[recipe][0] | {"save_strategy": "no", "lora_dropout": 0.0}
    main(command_line(tmp_path / "plain", **options))
    main(command_line(tmp_path / "checkpointed", gradient_checkpointing=True, **options))
    assert losses(tmp_path / "plain") == pytest.approx(losses(tmp_path / "checkpointed"), abs=1e-6)
    torch.testing.assert_close(logits(tmp_path / "plain"), logits(tmp_path / "checkpointed"), rtol=0, atol=1e-5)


def test_other_settings_of_gradient_checkpointing_do_not_make_it_reentrant(tmp_path: Path) -> None:
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"preserve_rng_state": true}'}
    run = build_run(parse_args(command_line(tmp_path, **HYDRA | settings)))
    assert getattr(run.trainer.args, checkpointing.OPTIONS) == {"use_reentrant": False, "preserve_rng_state": True}


def test_half_precision_keeps_trained_weights_in_fp32(tmp_path: Path) -> None:
    run = build_run(parse_args(command_line(tmp_path, **HYDRA, bf16=True)))
    for part, named in components(run.model).items():
        dtypes = {weight.dtype for weight in named.values()}
        frozen = part in (Component.LANGUAGE_MODEL, Component.VISION_TOWER)
        assert not named or dtypes == {torch.bfloat16 if frozen else torch.float32}, part
    result = run.trainer.train()
    assert 0 < result.training_loss < 20


def test_run_record(tmp_path: Path) -> None:
    main(command_line(tmp_path, **HYDRA, seed=7))
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["seed"] == 7
    assert record["arguments"]["extensions"]["hydralora"]["experts"] == 3
    assert record["arguments"]["model"]["model_name_or_path"] == str(BASE)
    assert record["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert json.loads((tmp_path / "checkpoint-2" / "run.json").read_text()) == record


def data_with_bad_rows(folder: Path) -> Path:
    rows = json.loads((LLAVA / "data" / "finetune.json").read_text())
    rows[1]["conversations"][-1]["value"] = ""  # nothing to train on
    rows[3]["image"] = "missing.png"
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


def test_bad_sample_stops(tmp_path: Path) -> None:
    data = data_with_bad_rows(tmp_path)
    with pytest.raises(BadSampleError, match=r"data\.json"):
        main(command_line(tmp_path / "out", data_path=data, num_train_epochs=1, max_steps=-1))


@pytest.mark.parametrize("workers", [0, 2])
def test_bad_sample_skip(workers: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = data_with_bad_rows(tmp_path)
    options = {"num_train_epochs": 1, "max_steps": -1, "on_bad_sample": "skip", "dataloader_num_workers": workers}
    main(command_line(tmp_path / "out", data_path=data, **options))
    listed = [json.loads(line) for line in (tmp_path / "out" / "skipped_samples.jsonl").read_text().splitlines()]
    assert sorted({entry["row"] for entry in listed}) == [1, 3]
    assert "2 samples were skipped" in capfd.readouterr().out


def test_resume_of_another_kind_of_run_is_refused(tmp_path: Path) -> None:
    main(command_line(tmp_path, **HYDRA))
    with pytest.raises(FlagError, match="extension hydralora"):
        main(command_line(tmp_path, max_steps=4))
    for path in [*tmp_path.rglob("run.json"), *tmp_path.rglob("checkpoint_files.json")]:
        path.unlink()
    with pytest.raises(CheckpointError, match="holds the extension"):
        main(command_line(tmp_path, max_steps=4))


def test_several_data_files_make_the_run_of_one(tmp_path: Path) -> None:
    """Same rows, same order, same losses; and a resumed run goes on in them."""
    rows = json.loads((LLAVA / "data" / "finetune.json").read_text())
    first, second = tmp_path / "a.json", tmp_path / "b.jsonl"
    first.write_text(json.dumps(rows[:3]))
    second.write_text("\n".join(map(json.dumps, rows[3:])))
    options = {"group_by_modality_length": True, "max_steps": 4, "save_steps": 2}
    main(command_line(tmp_path / "one", **options))
    several = [*command_line(tmp_path / "two", **options), "--data_path", str(first), str(second)]
    main(several)
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    shutil.rmtree(tmp_path / "two" / "checkpoint-4")
    main(several)
    assert losses(tmp_path / "two") == losses(tmp_path / "one")
    with pytest.raises(FlagError, match=r"--data_path .*c\.json: no such file"):
        main([*several, str(tmp_path / "c.json")])

"""Four updates of the original's trainer: losses, learning rates, temperature, parameter groups, weights afterwards."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dynamic.extension import DynamicExtension
from dynamic.layer import temperature
from llava.extension import installed_extensions
from llava.model.checkpoint import bare_model
from llava.train.arguments import parse_args
from llava.train.freeze import freeze
from llava.train.llava_trainer import LLaVATrainer
from llava.train.optimizer import optimizer_groups
from tests.dynamic.golden_model import golden_model
from tests.dynamic.test_training_golden import LIKE_ORIGINAL, use_noise
from tests.golden import golden_dir, load_case

CASE, TENSORS = load_case("dynamic", "trainer_steps")
FACTS = json.loads((golden_dir("dynamic") / "trainer_facts.json").read_text(encoding="utf-8"))
BATCH: dict[str, Any] = {key.removeprefix("in/batch_"): v for key, v in TENSORS.items() if key.startswith("in/batch_")}


def command_line(output: Path) -> list[str]:
    data = output / "data.json"
    data.write_text("[]")
    options = CASE["hp"]["training_arguments"] | CASE["sparse_config"]
    options |= {"dynamic": True, "output_dir": output / "out", "data_path": data, "vision_tower": "golden"}
    options |= {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "mm_use_im_patch_token": False,
    }
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]


def build(tower: Path, output: Path) -> tuple[Any, DynamicExtension, LLaVATrainer]:
    """The golden model, frozen as by default, and a trainer that gives it the batch of the case in every update."""
    extensions = {name: item for name, item in installed_extensions().items() if name == "dynamic"}
    args = parse_args(command_line(output), extensions)
    model, extension = golden_model(tower, CASE["sparse_config"])
    freeze(model, args)
    config = model.extensions.configs["dynamic"]
    assert config == args.extensions["dynamic"]
    trainer = LLaVATrainer(
        run=args,
        model=model,
        train_dataset=[0, 1],
        data_collator=lambda _: BATCH | LIKE_ORIGINAL,
        callbacks=extension.callbacks(model, config, args),
    )
    return model, extension, trainer


def test_updates_equal_golden(golden_tower: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, extension, trainer = build(golden_tower, tmp_path)
    use_noise(monkeypatch, iter([TENSORS[f"noise/{name}"] for name in CASE["hp"]["noise_order"]]))
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    golden = [entry for entry in CASE["scalars"]["log_history"] if "loss" in entry]
    assert [entry["loss"] for entry in history] == pytest.approx(CASE["scalars"]["loss_per_forward"], rel=1e-4)
    pairs = {
        "loss/dynamic/image": "image_masks_loss",
        "loss/dynamic/output_text": "output_text_mask_loss",
        "dynamic/tau": "gumbel_tau",
    }
    for ours, original in pairs.items():
        # The original rounds to 4 decimals.
        expected = [entry[original] for entry in golden]
        assert [entry[ours] for entry in history] == pytest.approx(expected, rel=1e-4, abs=6e-5), ours
    # We log the rate that an update was made with, the original that of the next one.
    for ours, original in {"learning_rate": "llm", "learning_rate/predictors": "predictor"}.items():
        expected = [entry[f"{original}_learning_rate"] for entry in golden]
        assert [entry[ours] for entry in history] == pytest.approx([0.0, *expected[:-1]], abs=1e-12)
    assert extension._schedule(model).tau == pytest.approx(CASE["scalars"]["gumbel_tau_at_end"])
    final = {key.removeprefix("out/final/"): value for key, value in TENSORS.items() if key.startswith("out/final/")}
    assert final.keys() == set(CASE["hp"]["saved_parameters"])
    parameters = dict(model.named_parameters())
    for name, value in final.items():
        torch.testing.assert_close(
            parameters[name].detach(), value, rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_parameter_groups_are_those_of_the_original(golden_tower: Path, tmp_path: Path) -> None:
    model, _, trainer = build(golden_tower, tmp_path)
    names = {id(weight): name for name, weight in model.named_parameters()}
    groups = [
        ({names[id(weight)] for weight in group["params"]}, group["lr"], group["weight_decay"])
        for group in optimizer_groups(bare_model(trainer.model), trainer.run)
    ]
    # The original makes a predictor although it is switched off; ours does not exist then.
    unused = "model.instruct_score_predictor."
    expected = [
        ({name for name in group["names"] if not name.startswith(unused)}, group["lr"], group["weight_decay"])
        for group in CASE["optimizer_groups"]
    ]
    assert len(groups) == 4
    assert groups == [*expected[2:], *expected[:2]], "our order is base, predictors"


def test_everything_but_the_tower_is_trained_by_default(golden_tower: Path, tmp_path: Path) -> None:
    model, _, _ = build(golden_tower, tmp_path)
    frozen = {name for name, weight in model.named_parameters() if not weight.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if name.startswith("model.vision_tower.")}
    assert len(frozen) == len(FACTS["trainable_parameters_default"]["frozen"])


@pytest.mark.parametrize("setting", FACTS["gumbel_tau_schedule"]["values"])
def test_temperature_equals_golden(setting: str) -> None:
    values = dict(pair.split("=") for pair in setting.split(","))
    for step, tau in FACTS["gumbel_tau_schedule"]["values"][setting].items():
        computed = temperature(int(step), int(values["max_steps"]), float(values["start"]), float(values["end"]))
        assert computed == pytest.approx(tau, rel=1e-12)


def test_unused_batch_entries_do_not_exist() -> None:
    assert all(isinstance(value, Tensor) for value in BATCH.values())

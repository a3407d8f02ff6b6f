"""Configuration of the blocks, the flags of MLLM-HydraLoRA, and what they switch on."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import typing
from pathlib import Path
from typing import Any

import pytest

from hydralora.config import (
    HydraLoraOptions,
    HydraLoraSettings,
    OriginalOptions,
    RoutedLinearConfig,
    RoutedMLPConfig,
)
from hydralora.extension import HydraLoraExtension
from llava.errors import FlagError
from llava.runtime import checkpointing
from llava.train.options import DataArguments, ModelArguments, RunArguments, TrainingArguments
from tests.golden import golden_dir

FLAGS = json.loads((golden_dir("mllm_hydralora") / "flags.json").read_text())
ROOT = Path(__file__).resolve().parents[2]


class TestConfig:
    def test_json_round_trip(self) -> None:
        config = RoutedMLPConfig(experts=5, rank=8, alpha=16, dropout=0.1, dense=False, balance_weight=0.5)
        assert RoutedMLPConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config

    def test_missing_values_take_defaults_and_unknown_ones_are_refused(self) -> None:
        assert RoutedMLPConfig.from_dict({}) == RoutedMLPConfig()
        with pytest.raises(ValueError, match=r"unknown \['expert'\]"):
            RoutedMLPConfig.from_dict({"expert": 3})

    @pytest.mark.parametrize(
        "wrong",
        [
            {"experts": 0},
            {"experts": 2.0},
            {"experts": True},
            {"rank": 0},
            {"alpha": -1},
            {"alpha": "8"},
            {"dropout": 1.0},
            {"dropout": math.nan},
            {"dense": 1},
            {"balance_weight": -0.1},
            {"balance_weight": None},
        ],
        ids=str,
    )
    def test_wrong_values_are_named(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            RoutedMLPConfig.from_dict(wrong)

    def test_all_problems_are_reported_at_once(self) -> None:
        with pytest.raises(ValueError, match=r"dense is 1.*experts is 0.*rank is -2"):
            RoutedMLPConfig(experts=0, rank=-2, dense=1)  # type: ignore[arg-type]

    @pytest.mark.parametrize(("experts", "weight", "needed"), [(3, 0.1, True), (1, 0.1, False), (3, 0.0, False)])
    def test_needs_balance_loss(self, experts: int, weight: float, needed: bool) -> None:
        assert RoutedMLPConfig(experts=experts, balance_weight=weight).needs_balance_loss is needed


def test_flags_have_the_originals_names_types_and_defaults() -> None:
    hints = typing.get_type_hints(OriginalOptions)
    ours = [(field.name, hints[field.name].__name__, field.default) for field in dataclasses.fields(OriginalOptions)]
    assert sorted(ours) == sorted((flag["name"], flag["type"], flag["default"]) for flag in FLAGS["added"])


def make_args(tmp_path: Path, training: dict[str, Any] | None = None, **options: Any) -> RunArguments:
    """Parsed options of a run."""
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **(training or {}))
    model = ModelArguments(vision_tower=options.pop("vision_tower", None))
    model.unfreeze_mm_vision_tower = options.pop("unfreeze_mm_vision_tower", False)
    return RunArguments(model, DataArguments(), arguments, {HydraLoraExtension.name: HydraLoraOptions(**options)})


class TestConfigure:
    def test_defaults_leave_everything_off(self, tmp_path: Path) -> None:
        args = make_args(tmp_path)
        assert HydraLoraExtension().configure(args) is None
        assert not args.training.lora_enable
        assert args.training.lora_target_modules is None

    def test_use_lora_switches_lora_and_blocks_on(self, tmp_path: Path) -> None:
        training = {"lora_alpha": 64, "lora_dropout": 0.1}
        args = make_args(
            tmp_path, training, use_lora=True, lora_rank=32, llm_moe_num_experts=4, dense_moe=False, moe_balance_w=0.5
        )
        config = HydraLoraExtension().configure(args)
        assert config == RoutedMLPConfig(4, 32, 64, 0.1, False, 0.5).to_dict()
        assert (args.training.lora_enable, args.training.lora_r) == (True, 32)
        assert args.training.lora_target_modules == "q_proj,k_proj,v_proj,o_proj"

    def test_without_llm_moe_it_is_plain_lora(self, tmp_path: Path) -> None:
        args = make_args(tmp_path, use_lora=True, llm_moe=False, lora_modules="q_proj, down_proj")
        assert HydraLoraExtension().configure(args) is None
        assert args.training.lora_enable
        assert args.training.lora_target_modules == "q_proj,down_proj"

    @pytest.mark.parametrize(
        "training",
        [{"lora_enable": True}, {"lora_r": 8}, {"lora_target_modules": "q_proj"}],
        ids=["lora_enable", "lora_r", "lora_target_modules"],
    )
    def test_flags_of_the_core_that_agree_are_accepted(self, training: dict[str, Any], tmp_path: Path) -> None:
        args = make_args(tmp_path, training, use_lora=True, lora_rank=8, lora_modules="q_proj")
        assert HydraLoraExtension().configure(args) is not None

    @pytest.mark.parametrize(
        ("training", "options", "flags"),
        [
            ({}, {"use_lora": True, "lora_modules": "q_proj,gate_proj"}, ["--lora_modules", "gate_proj", "--llm_moe"]),
            ({}, {"use_lora": True, "lora_modules": ""}, ["--lora_modules"]),
            ({}, {"use_lora": True, "lora_modules": "q_proj,,v_proj"}, ["--lora_modules"]),
            ({"lora_r": 16}, {"use_lora": True, "lora_rank": 32}, ["--lora_r 16", "--lora_rank 32"]),
            ({"lora_target_modules": "q_proj"}, {"use_lora": True}, ["--lora_target_modules", "--lora_modules"]),
            ({}, {"use_lora": True, "llm_moe_num_experts": 0}, ["--llm_moe_num_experts 0", "at least 1"]),
            ({}, {"use_lora": True, "moe_balance_w": -1.0}, ["--moe_balance_w"]),
            ({}, {"vit_trainable": "all"}, ["--vit_trainable", "--unfreeze_mm_vision_tower"]),
            ({}, {"lora_rank": 8, "dense_moe": False}, ["--lora_rank 8", "--dense_moe False", "--use_lora True"]),
            (
                {checkpointing.SWITCH: True, checkpointing.OPTIONS: {"use_reentrant": True}},
                {"use_lora": True},
                ["--gradient_checkpointing_kwargs", "use_reentrant"],
            ),
        ],
        ids=lambda value: str(value)[:60],
    )
    def test_what_cannot_be_carried_out_is_refused(
        self, training: dict[str, Any], options: dict[str, Any], flags: list[str], tmp_path: Path
    ) -> None:
        with pytest.raises(FlagError) as caught:
            HydraLoraExtension().configure(make_args(tmp_path, training, **options))
        assert all(flag in str(caught.value) for flag in flags)

    def test_modules_take_the_place_of_lora(self, tmp_path: Path) -> None:
        """Sizes are those of LoRA and of the blocks; what is left of the default of --lora_modules keeps LoRA."""
        training = {"lora_alpha": 64, "lora_dropout": 0.1}
        options = {"use_lora": True, "lora_rank": 32, "llm_moe_num_experts": 4, "llm_moe": False}
        args = make_args(tmp_path, training, **options, hydralora_modules="attention.q_proj, attention.k_proj")
        config = HydraLoraExtension().configure(args)
        targets = ["attention.q_proj", "attention.k_proj"]
        assert config == HydraLoraSettings(None, RoutedLinearConfig(targets, 4, 32, 64, 0.1, 0.0)).to_dict()
        assert (args.training.lora_enable, args.training.lora_target_modules) == (True, "v_proj,o_proj")
        assert not args.model.freeze_backbone

    def test_modules_in_place_of_all_lora_freeze_the_language_model(self, tmp_path: Path) -> None:
        args = make_args(tmp_path, use_lora=True, hydralora_modules="attention")
        config = HydraLoraExtension().configure(args)
        assert config is not None
        assert config["mlp"] == RoutedMLPConfig().to_dict()
        assert (args.training.lora_enable, args.model.freeze_backbone) == (False, True)

    @pytest.mark.parametrize(
        ("options", "flags"),
        [
            ({"hydralora_modules": "mlp"}, ["--hydralora_modules", "'mlp'", "attention or vision"]),
            ({"hydralora_modules": "attention,"}, ["--hydralora_modules 'attention,'", "empty name"]),
            ({"hydralora_modules": "vision"}, ["--hydralora_modules vision", "--vision_tower"]),
            (
                {"hydralora_modules": "vision", "vision_tower": "x", "unfreeze_mm_vision_tower": True},
                ["--hydralora_modules vision", "--unfreeze_mm_vision_tower"],
            ),
            (
                {"hydralora_modules": "vision", "vision_tower": "x", "hydralora_balance_w": 0.1},
                ["--hydralora_balance_w 0.1", "--hydralora_modules vision"],
            ),
            (
                {"hydralora_modules": "attention", "lora_modules": "q_proj"},
                ["--lora_modules names ['q_proj']", "--hydralora_modules attention"],
            ),
            ({"hydralora_modules": "attention", "hydralora_rank": 0}, ["--hydralora_rank 0", "at least 1"]),
            ({"hydralora_num_experts": 2}, ["--hydralora_num_experts 2", "--hydralora_modules"]),
            ({"use_lora": False, "hydralora_modules": "attention"}, ["--hydralora_modules attention", "--use_lora"]),
        ],
        ids=str,
    )
    def test_modules_that_cannot_be_carried_out(
        self, options: dict[str, Any], flags: list[str], tmp_path: Path
    ) -> None:
        with pytest.raises(FlagError) as caught:
            HydraLoraExtension().configure(make_args(tmp_path, **{"use_lora": True} | options))
        assert all(flag in str(caught.value) for flag in flags)

    @pytest.mark.parametrize(
        ("options", "said"),
        [({}, True), ({"llm_moe_num_experts": 1, "moe_balance_w": 0.1}, True), ({"moe_balance_w": 0.1}, False)],
        ids=str,
    )
    def test_routers_that_cannot_learn_are_named(
        self, options: dict[str, Any], said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        options = {"use_lora": True, "dense_moe": False, "moe_balance_w": 0.0} | options
        HydraLoraExtension().configure(make_args(tmp_path, **options))
        printed = capsys.readouterr().out
        assert all(flag in printed for flag in ("--dense_moe False", "--moe_balance_w")) == said

    def test_reentrant_checkpointing_is_fine_without_blocks(self, tmp_path: Path) -> None:
        training = {checkpointing.SWITCH: True, checkpointing.OPTIONS: {"use_reentrant": True}}
        assert HydraLoraExtension().configure(make_args(tmp_path, training, use_lora=True, llm_moe=False)) is None


def script_flags(name: str, *arguments: str, **environment: str) -> dict[str, str]:
    """Flags that a script gives to Python, the last one winning."""
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / name), *arguments],
        env={"PATH": os.environ["PATH"], "PYTHON": "echo", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.split()
    return {words[i].removeprefix("--"): words[i + 1] for i, word in enumerate(words) if word.startswith("--")}


class TestScripts:
    def test_training_flags_are_the_published_ones(self) -> None:
        ours = script_flags("MLLM_HydraLoRA.sh")
        paths = {"model_name_or_path", "data_path", "image_folder", "vision_tower", "pretrain_mm_mlp_adapter"}
        published = FLAGS["published_command_line"]
        assert set(ours) == set(published) | paths | {"output_dir"}
        for name, value in published.items():
            kind = type(value)
            assert (ours[name] == str(value)) if kind in (bool, str) else (kind(float(ours[name])) == value), name

    @pytest.mark.parametrize(
        ("script", "variable", "flag"),
        [
            ("MLLM_HydraLoRA.sh", "MODEL", "model_name_or_path"),
            ("MLLM_HydraLoRA.sh", "OUTPUT", "output_dir"),
            ("MLLM_HydraLoRA.sh", "PROJECTOR", "pretrain_mm_mlp_adapter"),
            ("MLLM_HydraLoRA_eval.sh", "CHECKPOINT", "model-path"),
            ("MLLM_HydraLoRA_eval.sh", "ANSWERS", "answers-file"),
        ],
    )
    def test_paths_come_from_the_environment(self, script: str, variable: str, flag: str) -> None:
        assert script_flags(script, **{variable: "/elsewhere"})[flag] == "/elsewhere"

    def test_further_flags_win(self) -> None:
        assert script_flags("MLLM_HydraLoRA.sh", "--lora_rank", "4")["lora_rank"] == "4"

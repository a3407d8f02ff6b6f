"""Flags for experts that become different: their way into the configuration, refusals, and the routers' own rate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from hydralora.finetune import build_run, main, parse_args
from llava.errors import FlagError
from tests.hydralora.text.test_finetune import command_line, folder

pytestmark = pytest.mark.versions

__all__ = ["folder"]


def test_experts_that_become_different(folder: Path, tmp_path: Path) -> None:
    """The flags reach the configuration, and training moves routers by their own rate."""
    options = {"init": "centered", "balance": "batch", "balance_weight": 0.1, "balance_ema": 0.5, "balance_warmup": 2}
    options |= {"information_weight": 0.01, "head_dropout": 0.2, "head_dropout_start": 1, "expert_dropout": 0.1}
    stored = []
    for rate in (0.0, 1e-2):
        main(command_line(folder, tmp_path / str(rate), **options, router_learning_rate=rate))
        adapter = tmp_path / str(rate) / "sft_lora_model"
        tensors = load_file(adapter / "adapter_model.safetensors")
        stored.append(max(value.abs().max() for name, value in tensors.items() if ".lora_router." in name))
    assert stored[0] == 0, "the routers start at 0"
    assert stored[1] > 1e-3
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert {name: config[name] for name in options} == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "centered", "head_dropout": 0.2}, "needs all experts at the start"),
        ({"balance_ema": 0.5}, "balance_ema is 0.5, which is of balance='batch'"),
        ({"lora_nums": 1, "router_learning_rate": 0.1}, "--router_learning_rate 0.1: one expert has no router"),
        ({"head_dropout": 1.0}, "--head_dropout 1.0"),
        ({"information_weight": -1.0}, "--information_weight -1.0"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(
    folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(FlagError, match=message):
        build_run(parse_args(command_line(folder, tmp_path, **options)))


def test_an_adapter_to_start_from_keeps_its_own(folder: Path, tmp_path: Path) -> None:
    main(command_line(folder, tmp_path / "first", init="centered", balance="batch", max_steps=1))
    words = [*command_line(folder, tmp_path / "out"), "--peft_path", str(tmp_path / "first" / "sft_lora_model")]
    config = build_run(parse_args(words)).model.active_peft_config
    assert (config.init, config.balance) == ("centered", "batch")
    for name, value in {"head_dropout": "0.5", "balance": "sample", "balance_warmup": "3"}.items():
        with pytest.raises(FlagError, match=rf"--{name} {value} contradicts the adapter"):
            parse_args([*words, f"--{name}", value])

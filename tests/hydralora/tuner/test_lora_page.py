"""`docs/hydralora_lora.md`: its snippets run, and its table has the options of LoRA that the configuration has."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from hydralora import HydraLoraConfig
from hydralora.tuner import hydralora_layers
from tests.hydralora.tuner.models import IDS, adapted, logits, tiny_llama

BASIC = {"r", "lora_alpha", "lora_dropout", "target_modules"}
"""Options that need no row: the first snippet of `hydralora/README.md` has them."""


@pytest.fixture(scope="module")
def page() -> str:
    return (Path(__file__).resolve().parents[3] / "docs" / "hydralora_lora.md").read_text(encoding="utf-8")


def test_the_snippets_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, name in enumerate(("first-adapter", "second-adapter")):
        adapted(seed=seed, r=2 + seed).save_pretrained(tmp_path / name, save_embedding_layers=False)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {"base": tiny_llama(), "other_base": tiny_llama(), "ids": IDS[:2, :4]}
    for block in blocks[:2]:
        exec(compile(block, "docs/hydralora_lora.md", "exec"), names)  # noqa: S102 (the page is ours)
    ranks = {name.split("layers.")[1]: layer.r["default"] for name, layer in hydralora_layers(names["model"]).items()}
    assert ranks["1.self_attn.q_proj"] == 8
    assert ranks["0.mlp.down_proj"] == ranks["1.mlp.down_proj"] == 16  # the first pattern that matches
    assert ranks["0.self_attn.q_proj"] == 4
    moved = {name for name, gradient in names["gradients"].items() if gradient.any()}
    assert any("lora_B" in name for name in moved)
    assert all(gradient.shape[0] == 2 for gradient in names["gradients"].values())
    assert all(torch.isfinite(gradient).all() for gradient in names["gradients"].values())
    exec(compile(blocks[2], "docs/hydralora_lora.md", "exec"), names)  # noqa: S102 (the page is ours)
    torch.testing.assert_close(logits(names["model"]), logits(adapted(seed=1, r=3)), rtol=0, atol=1e-6)
    assert {layer.r["default"] for layer in hydralora_layers(names["model"]).values()} == {16}


def test_the_table_has_every_option_that_lora_has_too(page: str) -> None:
    rows = re.findall(r"^\| (.*?) \|", page, re.MULTILINE)
    written = set(re.findall(r"`(\w+)", " ".join(rows)))
    common = {item.name for item in dataclasses.fields(LoraConfig)} & {
        item.name for item in dataclasses.fields(HydraLoraConfig)
    }
    of_peft = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "task_type"}
    assert common - BASIC - of_peft - {"inference_mode"} - written == set()
    assert written - common == set()

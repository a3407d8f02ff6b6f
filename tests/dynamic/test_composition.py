"""Predictors beside every other method: trained together by flags, read back, and generated with, batch and alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dynamic.layer import TextPredictor, VisionPredictor
from hydralora.layer import RoutedUpdate
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import bare_model
from llava.model.components import Component, components
from llava.train.train import build_run, parse_args
from llava.train.train_sparse import DEFAULTS
from tests.dynamic.sparse_models import BASE, greedy
from tests.dynamic.test_runs import sparse_line
from tests.llava.model.test_generation import distance, prompts
from tests.llava.train.test_training import HYDRA

LORA: dict[str, Any] = {"lora_enable": True, "lora_r": 4}

# Beside predictors: options of training, options of loading.
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "lora": (LORA, {}),
    "qlora": (LORA | {"bits": 4}, {"load_4bit": True}),
    "routed mlp and lora": (HYDRA, {}),
    "hydralora on attention and tower": (HYDRA | {"hydralora_modules": "attention,vision"}, {}),
}
# Relative, of logits in a batch against those alone; twice what was measured over all methods.
IN_BATCH = 1e-6


@pytest.mark.parametrize("method", METHODS)
def test_trained_and_generated(method: str, tmp_path: Path) -> None:
    """Every adapter moves, predictors too; what is read back drops tokens row by row as each row does alone."""
    training, loading = METHODS[method]
    if loading:
        pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    run = build_run(parse_args(sparse_line(tmp_path, **training, instruct_keep_rate=0.5), defaults=DEFAULTS))
    parts = components(run.model)
    before = {name: weight.detach().clone() for name, weight in parts[Component.EXTENSION].items()}
    run.trainer.train()
    moved = {name for name, weight in parts[Component.EXTENSION].items() if not torch.equal(weight, before[name])}
    assert moved == before.keys()
    names = {type(module) for module in bare_model(run.model).modules()}
    assert (RoutedUpdate in names) == ("hydralora_modules" in training)
    assert {VisionPredictor, TextPredictor} <= names

    model = load_pretrained_model(str(tmp_path / "checkpoint-3"), str(BASE), device="cpu", **loading)[1]
    batch = prompts()
    together = greedy(model, batch.ids, batch.images, attention_mask=batch.mask)
    for number, (row, images) in enumerate(zip(batch.rows, batch.images_of_rows, strict=True)):
        alone = greedy(model, row[None], images)
        assert distance(together.logits[number], alone.logits[0]) < IN_BATCH
        assert torch.equal(together.tokens[number], alone.tokens[0])
        assert [kept[number] for kept in together.cache.report().lengths] == [
            kept[0] for kept in alone.cache.report().lengths
        ]
        if images is not None and len(images):
            first, last = alone.cache.report().lengths[0][0], alone.cache.report().lengths[-1][0]
            assert last < first, "tokens must have been dropped"

"""A sparse checkpoint that can be tokenized for: the tiny golden LLaVA with predictors of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dynamic.extension import DynamicExtension
from dynamic.model import added_parameters
from llava.eval.answering.loading import load_model
from llava.model.checkpoint import save_checkpoint
from tests.golden import golden_dir

SPARSE = {"sparse_layer": 1, "d_model": 16, "nhead": 2, "dim_feedforward": 32, "num_layers": 1, "vision_keep_rate": 0.5}


def write_sparse_checkpoint(folder: Path, **settings: Any) -> Path:
    """Write the checkpoint into `folder`; `settings` go over `SPARSE`.

    The predictors' weights are drawn widely enough for every decision to occur.
    """
    loaded = load_model(str(golden_dir("llava") / "tiny-llava-v1.5"), device="cpu")
    extension = DynamicExtension()
    loaded.model.extensions.attach(loaded.model, extension, SPARSE | settings)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in added_parameters(loaded.model):
        if parameter.ndim > 1:
            parameter.data.normal_(std=0.5, generator=generator)
    loaded.model.config.mm_vision_tower = str(golden_dir("llava") / "tiny-clip")
    loaded.model.requires_grad_(True)  # full weights, so that the folder needs no base
    loaded.model.get_vision_tower().requires_grad_(False)
    save_checkpoint(loaded.model, folder, loaded.tokenizer)
    return folder

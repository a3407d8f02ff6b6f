"""How the predictors of Dynamic-LLaVA enter a decoder, and how they are found there.

The host is any causal language model of transformers' shape: `get_decoder()` returns the decoder. The predictors become
its children under the original's names, so that its checkpoints need no renaming (upstream:
`DynamicLlamaModel.__init__` in `dynamic_modeling_llama.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from dynamic.config import SparseConfig
from dynamic.layer import TextPredictor, VisionPredictor, reset_predictor

IMAGE, OUTPUT_TEXT, INSTRUCT = "image_score_predictor", "output_text_score_predictor", "instruct_score_predictor"
SETTINGS = "predictor_settings"
"""Attribute of the decoder: the `SparseConfig` of its predictors."""


@dataclass(frozen=True)
class Predictors:
    """The predictors of one decoder; None where its switch is off."""

    image: VisionPredictor | None
    output_text: TextPredictor | None
    instruct: TextPredictor | None


def attach(model: nn.Module, config: SparseConfig, dtype: torch.dtype = torch.float32) -> Predictors:
    """Add the predictors that `config` switches on, freshly drawn, as children of the decoder.

    They stand on the device of the input embeddings (the meta device included). Nothing else changes.

    Args:
        model: with `get_decoder()` and `config.hidden_size`.
        config: of the predictors.
        dtype: of their parameters.

    Raises:
        ValueError: the decoder has no layer `sparse_layer`, or has predictors already.
    """
    host: Any = model
    decoder, width = host.get_decoder(), host.config.hidden_size
    if any(hasattr(decoder, name) for name in (IMAGE, OUTPUT_TEXT, INSTRUCT)):
        raise ValueError("the decoder has predictors already")
    if config.sparse_layer >= len(decoder.layers):
        raise ValueError(
            f"sparse_layer is {config.sparse_layer}, but the decoder has {len(decoder.layers)} layers, counted from 0; "
            f"choose 1 to {len(decoder.layers) - 1}"
        )
    d = config.d_model
    wanted: dict[str, nn.Module] = {}
    with torch.device(host.get_input_embeddings().weight.device):
        if config.use_vision_predictor:
            wanted[IMAGE] = VisionPredictor(width, d, config.nhead, config.dim_feedforward, config.num_layers)
        if config.judges_output_text:
            wanted[OUTPUT_TEXT] = TextPredictor(width, d)
        if config.judges_instruction:
            wanted[INSTRUCT] = TextPredictor(width, d)
    for name, predictor in wanted.items():
        reset_predictor(predictor, getattr(host.config, "initializer_range", 0.02))
        decoder.add_module(name, predictor.to(dtype).train(decoder.training))
    # Read in every pass: parsed once, and an attribute is something that `torch.compile` can trace.
    setattr(decoder, SETTINGS, config)
    return predictors(model)


def settings(model: nn.Module) -> SparseConfig:
    """The configuration of the predictors of `model`."""
    found: SparseConfig = getattr(model.get_decoder(), SETTINGS)  # type: ignore[operator]
    return found


def predictors(model: nn.Module) -> Predictors:
    """The predictors of the decoder of `model`."""
    decoder = model.get_decoder()  # type: ignore[operator]
    return Predictors(*(getattr(decoder, name, None) for name in (IMAGE, OUTPUT_TEXT, INSTRUCT)))


def added_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters of the predictors by their name in `model`: exactly these are trained and saved."""
    for prefix, module in model.named_modules():
        if isinstance(module, VisionPredictor | TextPredictor):
            for name, parameter in module.named_parameters():
                yield f"{prefix}.{name}", parameter

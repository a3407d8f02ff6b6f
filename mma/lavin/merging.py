"""Adapters folded into the weights of a model, for one modality; the program is `mma/lavin/merge.py`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.errors import CheckpointError
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import save_checkpoint
from llava.model.components import Component, components
from llava.model.tower_record import is_own
from llava.runtime.output import check_new, new_path
from mma import folding
from mma.config import MmaConfig
from mma.extension import MmaExtension


def merge(model: Any, modality: str, plain: bool = False) -> MmaConfig:
    """Fold the adapters of a model for one modality, in place.

    Args:
        model: LLaVA with adapters, other adapters merged, not quantised; in training or evaluation mode.
        modality: `image` or `text`.
        plain: leave nothing of the extension, the check of the modality included.

    Returns:
        The configuration of what is left: adapters of the tower that are routed by token, and the check.

    Raises:
        CheckpointError: the model has no adapters, or layers that they cannot be folded into; or with `plain`, routed
            adapters of the tower would stay. Nothing has been changed then.
    """
    values = model.extensions.configs.get(MmaExtension.name)
    if values is None or MmaConfig.from_dict(values).adapter_type == "none":
        raise CheckpointError("the language model has no adapters to be merged")
    config = MmaConfig.from_dict(values)
    foldable = config.visual_adapter_type in ("normal", "none")
    if plain and not foldable:
        raise CheckpointError(
            f"visual_adapter_type is '{config.visual_adapter_type}': adapters of the tower that are routed by token "
            "cannot be merged; leave --plain out"
        )
    decoder, tower = model.get_decoder(), model.get_vision_tower()
    try:
        folds = folding.plan_decoder(decoder, modality, next(decoder.layers.parameters()).dtype)
        if config.visual_adapter_type == "normal":
            folds += folding.plan_blocks(tower.blocks(tower.loaded()))
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    folding.carry_out(folds, decoder)
    left = MmaConfig.from_dict(
        {
            **config.to_dict(),
            "adapter_type": "none",
            "visual_adapter_type": "none" if foldable else config.visual_adapter_type,
            "merged_for": modality,
        }
    )
    model.extensions.reconfigure(MmaExtension.name, None if plain else left.to_dict())
    return left


def declare_biases(model: Any) -> None:
    """Let the configuration of a merged model say that its projections have biases, and add those that are zero.

    Raises:
        CheckpointError: layers of this backbone have no setting for them.
    """
    layers = model.get_decoder().layers
    for holders, setting in (
        ([layer.self_attn for layer in layers], "attention_bias"),
        ([layer.mlp for layer in layers], "mlp_bias"),
    ):
        biased = _biased(holders[0])
        if biased == _biased(_built(holders[0], model.config)):
            continue
        config = copy.deepcopy(model.config)
        setattr(config, setting, True)
        expected = _biased(_built(holders[0], config))
        if not hasattr(model.config, setting) or not biased <= expected:
            raise CheckpointError(
                f"merged layers of a {model.config.model_type} have biases ({', '.join(sorted(biased))}) that no "
                "setting of its config.json would read back; keep the adapters beside the weights"
            )
        setattr(model.config, setting, True)
        for linear in (holder.get_submodule(name) for holder in holders for name in expected - biased):
            linear.bias = nn.Parameter(linear.weight.new_zeros(linear.out_features))


def _biased(holder: nn.Module) -> set[str]:
    """Names of the linear layers of an attention or MLP that have a bias."""
    return {name for name, child in holder.named_children() if getattr(child, "bias", None) is not None}


def _built(like: nn.Module, config: Any) -> nn.Module:
    """An attention or MLP of the same kind as transformers builds it from `config`."""
    with torch.device("meta"):
        return type(like)(config, 0) if hasattr(like, "layer_idx") else type(like)(config)


def merge_checkpoint(
    checkpoint: str | Path,
    output: str | Path,
    modality: str = "image",
    model_base: str | None = None,
    dtype: torch.dtype = torch.float16,
    plain: bool = False,
) -> Path:
    """Write a merged checkpoint.

    Args:
        checkpoint: folder with adapters.
        output: folder to write.
        modality: of the samples that it will answer.
        model_base: base of the checkpoint, where it is not the recorded one.
        dtype: of the weights that are written; the folding is computed in float64.
        plain: leave nothing of the extension.

    Returns:
        The folder written. It appears whole or not at all.

    Raises:
        CheckpointError: see `merge` and `declare_biases`; or `output` exists.
    """
    check_new(output, [checkpoint, model_base])
    with new_path(output, [checkpoint, model_base]) as folder:
        tokenizer, model, _, _ = load_pretrained_model(
            str(checkpoint), model_base, device="cpu", torch_dtype=torch.float32
        )
        tower_before = model.extensions.configs.get(MmaExtension.name, {}).get("visual_adapter_type")
        merge(model, modality, plain)
        declare_biases(model)
        parts = components(model)
        written = [Component.LANGUAGE_MODEL, Component.PROJECTOR]
        if tower_before == "normal" or is_own(model.get_vision_tower()):
            written.append(Component.VISION_TOWER)
        for weight in (weight for part in written for weight in parts[part].values()):
            weight.data = weight.data.to(dtype)
            weight.requires_grad_(True)  # what is trained is written
        model.config.dtype = dtype
        save_checkpoint(model, folder, tokenizer)
    return Path(output)

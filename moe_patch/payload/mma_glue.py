"""Mixture-of-Modality Adaptation in a patched checkout: flags, adapters, and the routing of each pass.

Adapters and projector are trained on a frozen model, on the images as LLaVA feeds them (`--visual_input llava`). A
sample's modality is read off its token ids, see `modalities.py`. The folder written is that of llava-extensions, since
the original's file has no place for LLaVA's projector.
"""

from __future__ import annotations

import dataclasses
import re
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mma.config import MmaConfig, MmaOptions
from mma.model import added_parameters
from moe_patch.payload.extension import Extension, State
from moe_patch.payload.gradients import keep_the_graph
from moe_patch.payload.modalities import ATTRIBUTE, Modalities, check_torch

OUR_BLOCKS = "model.vision_tower.vision_tower.encoder.layers."
"""Beginning of the names of the tower's blocks in llava-extensions; upstream's older CLIP has one more level."""


class Mma(Extension):
    """Adapters mixed by the modality of a sample, in the language model and in the vision tower."""

    name = "mma"
    options = MmaOptions

    def configure(self, model_args: Any, training_args: Any) -> None:
        """Freeze the language model, and refuse what would not be carried out."""
        if not training_args.mma:
            given = [f.name for f in dataclasses.fields(MmaOptions) if getattr(training_args, f.name) != f.default]
            if given:
                raise ValueError(f"{', '.join('--' + name for name in given)}: without effect; pass --mma True too")
            return
        if training_args.visual_input != "llava":
            raise ValueError(
                f"--visual_input {training_args.visual_input}: upstream's LLaVA does not feed images as LaVIN does; "
                "pass --visual_input llava, or train in llava-extensions"
            )
        if model_args.vision_tower is None:
            raise ValueError("--mma True needs --vision_tower")
        if training_args.lora_enable or getattr(training_args, "use_lora", False):
            raise ValueError("--mma True beside LoRA is not carried by moe_patch; train both in llava-extensions")
        if model_args.tune_mm_mlp_adapter:
            raise ValueError("--tune_mm_mlp_adapter True freezes all but the projector, the adapters of --mma too")
        _config(training_args)
        check_torch()
        model_args.freeze_backbone = True
        if training_args.gradient_checkpointing:
            keep_the_graph(training_args, "the loss does not reach the routers of --mma")

    def is_active(self, training_args: Any) -> bool:
        """With `--mma True`."""
        return bool(training_args.mma)

    def writes_itself(self, training_args: Any) -> bool:
        """With `--mma True`."""
        return bool(training_args.mma)

    def attach_beside_tower(self, model: Any, training_args: Any) -> None:
        """Put the adapters in place; they and the projector are what is trained."""
        if not training_args.mma:
            return
        config = _config(training_args)
        model.requires_grad_(False)
        model.get_model().mm_projector.requires_grad_(not training_args.freeze_mm_mlp_adapter)
        setattr(model, ATTRIBUTE, Modalities(model, config))
        if config.adapters_per_block:
            _let_gradients_through(model.get_vision_tower())

    def attach(self, model: Any, config: Mapping[str, Any], tensors: State) -> None:
        """Put adapters with trained weights in place; loads the tower, which holds some of them."""
        settings = MmaConfig.from_dict(config)
        if settings.merged_for or settings.shifted_decoding:
            raise ValueError("a checkpoint that was merged for a modality, or decodes with shifted positions as LaVIN")
        tower = model.get_vision_tower()
        if settings.adapters_per_block and not tower.is_loaded:
            tower.load_model()
            tower.to(device=model.device, dtype=model.dtype)
        setattr(model, ATTRIBUTE, Modalities(model, settings))
        parameters = {self._our_name(model, name): parameter for name, parameter in added_parameters(model)}
        wrong = sorted(n for n in {*parameters, *tensors} if _shape(parameters, n) != _shape(tensors, n))
        if wrong:
            raise ValueError(f"{len(wrong)} weights of adapters are missing, unknown or of another shape: {wrong[:3]}")
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(tensors[name])
                parameter.requires_grad_(False)

    def own_config(self, model: Any) -> dict[str, Any] | None:
        """Configuration of the adapters."""
        modalities = getattr(model, ATTRIBUTE, None)
        return None if modalities is None else modalities.config.to_dict()

    def to_ours(self, model: Any, state: State) -> State:
        """Adapters and modality embedding."""
        names = {name for name, _ in added_parameters(model)}
        return {self._our_name(model, name): tensor for name, tensor in state.items() if name in names}

    def refuse(self, config: Any) -> None:
        """LaVIN's own image is not to be had in upstream's LLaVA."""
        feature = getattr(config, "mm_vision_select_feature", "patch")
        pixels = getattr(config, "mm_image_normalization", "tower")
        if feature not in ("patch", "cls_patch") or pixels != "tower":
            raise ValueError(
                f"the checkpoint was trained with --visual_input lavin (features '{feature}', pixels normalised by "
                f"'{pixels}'), which upstream's LLaVA does not have; load it in llava-extensions"
            )

    @staticmethod
    def _our_name(model: Any, name: str) -> str:
        """Name in llava-extensions of an adapter's weight: the tower's blocks lie elsewhere there."""
        found = re.search(r"\.layers\.(\d+\..*)$", name)
        return OUR_BLOCKS + found[1] if found and "vision_tower" in name.split(".") else name


def _config(training_args: Any) -> MmaConfig:
    """The configuration of the adapters that the flags ask for."""
    return MmaOptions(**{f.name: getattr(training_args, f.name) for f in dataclasses.fields(MmaOptions)}).config()


def _let_gradients_through(tower: Any) -> None:
    """Upstream runs the tower under `torch.no_grad`, which would leave its adapters untrained.

    Raises:
        ValueError: the tower's forward is built otherwise.
    """
    inner = getattr(type(tower).forward, "__wrapped__", None)
    if inner is None:
        raise ValueError(f"{type(tower).__name__}.forward is not wrapped in torch.no_grad; this LLaVA is not known")
    tower.forward = types.MethodType(inner, tower)


def _shape(tensors: Mapping[str, Tensor], name: str) -> tuple[int, ...] | None:
    return tuple(tensors[name].shape) if name in tensors else None

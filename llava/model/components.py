"""Which parameter belongs to which part of the model, found by module and never by a substring of a name.

Freezing, saving, loading and the optimizer all ask here, so that they cannot disagree.
"""

from __future__ import annotations

from enum import StrEnum

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from llava.model.image_tokens import EmbeddingWithTrainedRows


class Component(StrEnum):
    """The parts of a model, in the order in which they are printed."""

    VISION_TOWER = "vision tower"
    PROJECTOR = "projector"
    IMAGE_TOKENS = "image tokens"
    LANGUAGE_MODEL = "language model"
    ADAPTER = "adapter"
    EXTENSION = "extension"


def _adapter_ids(model: nn.Module) -> set[int]:
    """Identities of all parameters that PEFT layers hold beside their base layer."""
    ids: set[int] = set()
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            base = {id(weight) for weight in module.get_base_layer().parameters()}
            ids |= {id(weight) for weight in module.parameters()} - base
    return ids


def components(model: nn.Module) -> dict[Component, dict[str, nn.Parameter]]:
    """Parameters of each part.

    Args:
        model: LLaVA model, or a PEFT model around one.

    Returns:
        For every part its parameters by their name in the bare LLaVA model; PEFT's renaming of wrapped layers
        (`...base_layer.weight`) is undone for the language model.
    """
    llava = model.get_base_model() if isinstance(model, PeftModel) else model
    decoder = llava.get_model()
    adapter_ids = _adapter_ids(llava)
    extension_ids = {id(weight) for weight in llava.extensions.named_parameters(llava).values()}
    tower = decoder.get_vision_tower()
    tower_ids = set() if tower is None else {id(weight) for weight in tower.parameters()}
    projector = decoder.mm_projector
    projector_ids = set() if projector is None else {id(weight) for weight in projector.parameters()}
    if isinstance(getattr(decoder, "image_newline", None), nn.Parameter):
        projector_ids.add(id(decoder.image_newline))

    table = decoder.embed_tokens
    token_ids = {id(table.rows)} if isinstance(table, EmbeddingWithTrainedRows) else set()

    parts: dict[Component, dict[str, nn.Parameter]] = {part: {} for part in Component}
    for name, weight in llava.named_parameters():
        if id(weight) in adapter_ids:
            parts[Component.ADAPTER][name] = weight
        elif id(weight) in extension_ids:
            parts[Component.EXTENSION][name] = weight
        elif id(weight) in tower_ids:
            parts[Component.VISION_TOWER][name] = weight
        elif id(weight) in token_ids:
            parts[Component.IMAGE_TOKENS][name] = weight
        elif id(weight) in projector_ids:
            parts[Component.PROJECTOR][name] = weight
        else:
            parts[Component.LANGUAGE_MODEL][name.replace(".base_layer.", ".")] = weight
    return parts

"""Where the parts of a loaded model are that transformers did not place itself: tower, projector, what extensions add.

With a device map some layers are on the CPU or on disk between passes (`llava/runtime/offloading.py`).
"""

from __future__ import annotations

from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.runtime.offloading import bring_in, bring_in_tensor, check_placed


def keep_here(model: LlavaForCausalLM, tokens: bool) -> None:
    """Take what is filled from the checkpoint, or used outside of a layer, out of the hands of accelerate.

    Args:
        model: as `from_pretrained` placed it.
        tokens: whether rows of image tokens will be filled.
    """
    decoder = model.get_model()
    bring_in(decoder, recurse=False)
    newline = getattr(decoder, "image_newline", None)
    if newline is not None and newline.is_meta:
        bring_in_tensor(model, "model.image_newline")
    if decoder.mm_projector is not None:
        bring_in(decoder.mm_projector)
    if tokens:
        table, head = model.get_input_embeddings(), model.get_output_embeddings()
        tied = getattr(model.config, "tie_word_embeddings", False)
        for module in (table, head):
            bring_in(module)
        if tied:
            head.weight = table.weight


def place_new_parts(model: LlavaForCausalLM) -> None:
    """Put tower, projector and extensions where their neighbors compute, when transformers placed the rest.

    Raises:
        CheckpointError: a layer has no place.
    """
    decoder = model.get_model()
    device = model.device
    for part in (decoder.get_vision_tower(), decoder.mm_projector):
        if part is not None:
            part.to(device)
    newline = getattr(decoder, "image_newline", None)
    if newline is not None and not newline.is_meta:
        newline.data = newline.data.to(device)
    owners = dict(model.named_modules())
    for name, parameter in model.extensions.named_parameters(model).items():
        neighbours = owners[name.rpartition(".")[0]].parameters()
        here = (p.device for p in neighbours if p is not parameter and not p.is_meta)
        parameter.data = parameter.data.to(next(here, device))
    check_placed(model)

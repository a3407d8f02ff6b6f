"""Quantising the language model with bitsandbytes, for training on top of it (QLoRA) and for evaluation.

Tower, projector and head stay in full precision: they are small and sensitive, and the projector is trained.
Corresponds to the `BitsAndBytesConfig` in upstream's `train.py` and `builder.py`.
"""

from __future__ import annotations

import importlib.util
import math

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from llava.errors import FlagError
from llava.runtime.partition import full_shape

QUANT_TYPES = ("nf4", "fp4")
"""4-bit data types: NF4 (QLoRA, section 3) and plain 4-bit floats."""

FULL_PRECISION_MODULES = ["model.mm_projector", "model.vision_tower", "lm_head"]
"""Modules that are left as they are, by the beginning of their name (transformers' rule for this list)."""


def quantisation_config(
    bits: int, compute_dtype: torch.dtype, quant_type: str = "nf4", double_quant: bool = True
) -> BitsAndBytesConfig:
    """How `from_pretrained` is to quantise the decoder's linear layers.

    Args:
        bits: 4, or 8 (LLM.int8).
        compute_dtype: of the matrix products with 4 bits; 8 bits follow the input.
        quant_type: one of `QUANT_TYPES`; 4 bits only.
        double_quant: quantise the constants of the 4-bit blocks too (QLoRA, section 3).

    Raises:
        FlagError: bitsandbytes is not installed, or `bits` or `quant_type` is not known.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise FlagError(f"{bits} bits need bitsandbytes; install the extra: pip install 'llava-extensions[quant]'")
    if bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=FULL_PRECISION_MODULES)
    if bits != 4 or quant_type not in QUANT_TYPES:
        raise FlagError(f"{bits} bits of type '{quant_type}': known are 8, and 4 of the types {QUANT_TYPES}")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=compute_dtype,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_quant_type=quant_type,
        llm_int8_skip_modules=FULL_PRECISION_MODULES,
    )


def parameter_count(weight: nn.Parameter) -> int:
    """Number of weights that a parameter stands for: two 4-bit weights share one element, ZeRO-3 leaves none here."""
    state = getattr(weight, "quant_state", None)
    return full_shape(weight).numel() if state is None else math.prod(state.shape)


CPU_KERNEL_ROWS = 32
"""Output features that the 4-bit kernel of bitsandbytes for CPUs with AVX-512 BF16 takes at a time."""


def choose_cpu_kernels(model: nn.Module, trained: bool) -> None:
    """Keep 4-bit layers from a CPU kernel that cannot serve them; others, and other devices, are left alone.

    On CPUs with AVX-512 BF16, bitsandbytes repacks a layer in place at its first inference. The packed layout exists
    for certain sizes only (it stops with an assertion at others), computes in bf16 and has no gradient.

    Args:
        model: quantised model, or one without any 4-bit layer.
        trained: True if gradients will be wanted, now or after an evaluation.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return
    from bitsandbytes.nn import Linear4bit

    for module in model.modules():
        if isinstance(module, Linear4bit) and module.weight.quant_state is not None:
            rows, columns = module.weight.quant_state.shape
            fits = rows % CPU_KERNEL_ROWS == 0 and columns % module.weight.blocksize == 0
            if trained or not fits:
                module.support_avx512bf16_for_cpu = False

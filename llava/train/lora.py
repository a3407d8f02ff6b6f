"""LoRA on the decoder's linear layers, through PEFT (upstream: `find_all_linear_names` and `LoraConfig` in train.py).

Only the decoder is wrapped. Upstream's rule also wraps the vision tower, whose adapters never get a gradient.
"""

from __future__ import annotations

import re

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from llava.errors import FlagError
from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.train.options import TrainingArguments


def decoder_linears(model: LlavaForCausalLM) -> dict[str, nn.Linear]:
    """Linear layers of the decoder's blocks by their full name; those that extensions added are left out."""
    added = {id(weight) for weight in model.extensions.named_parameters(model).values()}
    return {
        f"model.layers.{name}": module
        for name, module in model.get_model().layers.named_modules()
        if isinstance(module, nn.Linear) and id(module.weight) not in added
    }


def add_lora(model: LlavaForCausalLM, training: TrainingArguments) -> PeftModel:
    """Wrap the decoder's linear layers in LoRA.

    Args:
        model: bare model, extensions attached.
        training: rank, alpha, dropout, and `lora_target_modules` (None: every linear layer of the decoder).

    Raises:
        FlagError: a target module does not exist; the message lists those that do.
    """
    linears = decoder_linears(model)
    available = sorted({name.rpartition(".")[2] for name in linears})
    wanted = available
    if training.lora_target_modules is not None:
        wanted = [name.strip() for name in training.lora_target_modules.split(",") if name.strip()]
    unknown = sorted(set(wanted) - set(available))
    if unknown or not wanted:
        raise FlagError(f"LoRA target modules {unknown or '(none given)'}: the decoder has {available}")
    targets = [name for name in linears if name.rpartition(".")[2] in wanted]
    # A pattern and not a list of last names, so that the tower's layers of the same names stay as they are.
    parents = sorted({name.split(".", 3)[3].rpartition(".")[0] for name in targets})
    pattern = rf"model\.layers\.\d+\.({'|'.join(map(re.escape, parents))})\.({'|'.join(map(re.escape, wanted))})"
    config = LoraConfig(
        r=training.lora_r,
        lora_alpha=training.lora_alpha,
        target_modules=pattern,
        lora_dropout=training.lora_dropout,
        bias=training.lora_bias,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)

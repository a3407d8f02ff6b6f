"""The model of a training command without its weights, by the steps of `llava/train/build.py`, of configurations alone.

Everything is called within `llava.runtime.rehearsal.fake_device.on_device`, so parameters have shapes and no numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from llava.errors import FlagError
from llava.extension import installed_extensions
from llava.model.components import Component
from llava.model.image_tokens import add_image_tokens, train_image_tokens, wanted_tokens
from llava.model.language_model.backbones import backbone_class, load_config
from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.model.loss import LossReduction
from llava.model.multimodal_encoder.builder import resolve_vision_tower, set_normalization, tower_at
from llava.model.multimodal_encoder.transformers_tower import TransformersTower
from llava.runtime.quantization import FULL_PRECISION_MODULES, quantisation_config
from llava.train.build import record_settings, weight_dtype
from llava.train.freeze import freeze, trained_components
from llava.train.lora import add_lora
from llava.train.options import RunArguments
from llava.train.peft_file import add_adapter
from llava.train.plan.four_bits import shape_class


def planned_model(args: RunArguments, tokenizer: Any, attention: str | None, half: torch.dtype | None) -> nn.Module:
    """Base, tower, projector, extensions and LoRA, frozen and unfrozen as the options say.

    Args:
        args: options of the run.
        tokenizer: of the base.
        attention: used where `--attn_implementation` is not given.
        half: the dtype of all weights under DeepSpeed; None without.

    Raises:
        CheckpointError: a configuration is missing or damaged.
        FlagError: the plan does not support the tower, or options cannot be used with this model.
    """
    llava = _base(args, attention)
    if args.model.vision_tower is not None:
        _add_vision(llava, args)
        add_image_tokens(llava, tokenizer, wanted_tokens(args.model))
        if args.model.mm_use_im_start_end and Component.LANGUAGE_MODEL not in trained_components(args):
            train_image_tokens(llava)
    record_settings(llava, args, tokenizer)
    available = installed_extensions(list(args.extensions)) if args.extensions else {}
    for name, config in args.extensions.items():
        llava.extensions.attach(llava, available[name], config)
    model: nn.Module = llava
    if args.training.peft_config is not None:
        model = add_adapter(llava, args.training.peft_config)
    elif args.training.lora_enable:
        model = add_lora(llava, args.training)
    freeze(model, args)
    for weight in model.parameters():  # as `set_precision`
        if half is not None and weight.is_floating_point():
            weight.data = weight.data.to(half)
        elif half is None and weight.requires_grad:
            weight.data = weight.data.float()
    return model


def _base(args: RunArguments, attention: str | None) -> LlavaForCausalLM:
    """The language model or LLaVA of a folder's `config.json`."""
    name, cache_dir = args.model.model_name_or_path, args.training.cache_dir
    config = load_config(name, cache_dir)
    implementation = args.model.attn_implementation or attention or "sdpa"
    if implementation == "flash_attention_2":  # needs a GPU to be chosen; torch's own takes the same memory
        implementation = "sdpa"
    model = backbone_class(name, cache_dir)._from_config(
        config, dtype=weight_dtype(args), attn_implementation=implementation
    )
    if args.training.bits == 4:
        settings = quantisation_config(4, weight_dtype(args), args.training.quant_type, args.training.double_quant)
        _quantize(model, settings)
    model.config.use_cache = False
    model.loss_reduction = LossReduction(args.training.loss_reduction)
    model.label_smoothing = args.training.label_smoothing_factor
    return model


def _quantize(model: nn.Module, settings: Any) -> None:
    """Replace the linear layers that bitsandbytes would quantize by such of the same bytes."""
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and not name.startswith(tuple(FULL_PRECISION_MODULES)):
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, shape_class()(module, settings))
    model.is_loaded_in_4bit = True


def _add_vision(llava: LlavaForCausalLM, args: RunArguments) -> None:
    """Tower and projector by their configurations; see `LlavaMetaModel.initialize_vision_modules`.

    Raises:
        FlagError: the tower is not one of transformers, or the base has another projector.
    """
    decoder, config = llava.get_model(), llava.config
    config.mm_vision_tower = args.model.vision_tower
    config.mm_vision_select_layer = args.model.mm_vision_select_layer
    config.mm_vision_select_feature = args.model.mm_vision_select_feature
    config.mm_patch_merge_type = args.model.mm_patch_merge_type
    config.mm_image_normalization = args.model.mm_image_normalization
    config.use_mm_proj = True
    tower = tower_at(resolve_vision_tower(args.model.vision_tower, [str(Path(args.model.model_name_or_path))]), config)
    if not isinstance(tower, TransformersTower):
        raise FlagError(f"--vision_tower {args.model.vision_tower}: the plan supports towers of transformers")
    tower.image_processor = tower.read_image_processor()
    set_normalization(tower.image_processor, config.mm_image_normalization)
    dtype = torch.float32 if args.model.unfreeze_mm_vision_tower else weight_dtype(args)
    tower.vision_tower = tower.model_class._from_config(tower.config, dtype=dtype).requires_grad_(False)
    tower.eval()
    decoder.vision_tower = tower
    decoder.initialize_projector(args.model, tower.hidden_size)
    for weight in decoder.mm_projector.parameters():
        weight.data = weight.data.float()


def trained(model: nn.Module) -> list[Tensor]:
    """The trained parameters."""
    return [weight for weight in model.parameters() if weight.requires_grad]

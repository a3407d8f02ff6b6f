"""The parts of a training run, each from the options: base, tower, projector, vocabulary, extensions, LoRA, data.

`build_model` is the order in which weights come together (upstream `llava/train/train.py`, the middle of `train`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llava.conversation import Conversation
from llava.data.answer_end import answer_end, end_problem, turn_end
from llava.data.dataset import LazySupervisedDataset
from llava.data.markers import user_marker_ids
from llava.data.rows import RowFiles, open_rows
from llava.data.streams.dataset import StreamedDataset
from llava.data.templates import select_template
from llava.data.tiling import check_grid_pinpoints
from llava.data.trained_template import record_template
from llava.errors import CheckpointError, FlagError
from llava.extension import installed_extensions
from llava.model.checkpoint import copy_tensors
from llava.model.components import Component, components
from llava.model.formats import (
    IMAGE_TOKENS_FILE,
    NEWLINE,
    TOKEN_TABLE,
    TOWER_FOLDER,
    projector_file,
    read_projector,
)
from llava.model.generation_defaults import mend_generation_config
from llava.model.head import LanguageHead, liger_loss
from llava.model.image_tokens import (
    BORDER_TOKENS,
    add_image_tokens,
    load_image_tokens,
    train_image_tokens,
    wanted_tokens,
)
from llava.model.language_model.backbones import backbone_class, load_config
from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.model.loss import LossReduction
from llava.model.multimodal_encoder.builder import build_vision_tower, resolve_vision_tower
from llava.model.multimodal_encoder.identity import is_carried, lasting_name
from llava.model.multimodal_encoder.stored import StoredTower, is_stored_tower, stored_tower
from llava.runtime.program import errors_only
from llava.runtime.quantization import choose_cpu_kernels, quantisation_config
from llava.runtime.tokenizer import add_ends
from llava.runtime.weights.base_weights import read_base
from llava.runtime.weights.tensors import describe
from llava.runtime.weights.weight_files import check_base
from llava.runtime.zero import same_draws, set_precision, zero_stage
from llava.train.continued import check_recorded, recorded_extensions, train_on
from llava.train.freeze import freeze, print_trainable, trained_components
from llava.train.lora import add_lora
from llava.train.options import RunArguments, TrainingArguments
from llava.train.peft_file import add_adapter
from llava.train.steps import say, say_base, say_settings, say_tower
from llava.train.streaming import stream_of_run


def skipped_file(args: RunArguments) -> Path:
    """Where the samples are listed that `--on_bad_sample skip` left out."""
    return Path(args.training.output_dir) / "skipped_samples.jsonl"


def weight_dtype(args: RunArguments) -> torch.dtype:
    """Dtype in which the base is kept: half precision only for what is frozen.

    Weights that are trained stay in fp32 under autocast; an optimizer step on bf16 weights would lose small updates.
    DeepSpeed's optimizer has fp32 copies of its own, so there all weights are read in the dtype that it computes in;
    those of a file of that dtype stay mapped, and take no memory of the process.
    """
    if args.training.deepspeed:
        dtype: torch.dtype = args.training.hf_deepspeed_config.dtype()
        return dtype
    base_is_frozen = args.training.has_adapter or args.model.freeze_backbone or args.model.tune_mm_mlp_adapter
    if not base_is_frozen:
        return torch.float32
    return torch.bfloat16 if args.training.bf16 else torch.float16 if args.training.fp16 else torch.float32


def load_base(args: RunArguments, attn_implementation: str | None, claimed: Collection[str] = ()) -> LlavaForCausalLM:
    """The language model or LLaVA named by `--model_name_or_path`, without its tower.

    Args:
        args: options of the run.
        attn_implementation: of the tests; `--attn_implementation` holds over it.
        claimed: names of weights in the base that belong to extensions.

    Raises:
        CheckpointError: weights are missing, or some belong to nobody.
    """
    name = args.model.model_name_or_path
    options: dict[str, Any] = {"dtype": weight_dtype(args), "cache_dir": args.training.cache_dir}
    implementation = args.model.attn_implementation or attn_implementation
    if implementation is not None:
        options["attn_implementation"] = implementation
    if args.training.bits != 16:
        options["quantization_config"] = quantisation_config(
            args.training.bits, weight_dtype(args), args.training.quant_type, args.training.double_quant
        )
        if args.training.device.type == "cuda":  # quantised weights cannot be moved there later
            options["device_map"] = {"": args.training.device}
    cache_dir = args.training.cache_dir
    config = load_config(name, cache_dir)
    check_base(name)
    with errors_only(), same_draws(args.training):  # a tower among the weights is read later; the rest are errors
        model, missing = read_base(
            backbone_class(name, cache_dir),
            name,
            config,
            lambda weight: is_stored_tower(weight) or weight in claimed,
            **options,
        )
    if missing:
        raise CheckpointError(
            f"{name}: lacks {len(missing)} weights that its config.json asks for: {sorted(missing)[:3]}"
        )
    mend_generation_config(model, str(name))
    if args.training.bits == 4:
        choose_cpu_kernels(model, trained=True)
    model.config.use_cache = False
    model.loss_reduction = LossReduction(args.training.loss_reduction)
    model.label_smoothing = args.training.label_smoothing_factor
    return model


def add_vision(model: LlavaForCausalLM, args: RunArguments) -> None:
    """Tower and projector, the latter with the weights of `--pretrain_mm_mlp_adapter` if given.

    Raises:
        CheckpointError: tower or projector file is missing or does not fit, or the tower that the base names has other
            weights now.
    """
    base = args.model.model_name_or_path
    elsewhere = args.model.replace_vision_tower or is_carried(str(Path(base) / TOWER_FOLDER))
    stored = None if elsewhere else stored_tower(base, args.training.cache_dir)
    model.get_model().initialize_vision_modules(args.model, [base], stored)
    check_same_tower(args, model.get_vision_tower())
    if args.model.pretrain_mm_mlp_adapter:
        source = projector_file(args.model.pretrain_mm_mlp_adapter)
        wanted, tensors = components(model)[Component.PROJECTOR], read_projector(source)
        if f"model.{NEWLINE}" not in tensors:  # upstream's files never have it; a fresh one is trained then
            wanted.pop(f"model.{NEWLINE}", None)
        copy_tensors(wanted, tensors, source)
        model.get_model().has_new_projector = True
        if not args.model.mm_use_im_start_end and TOKEN_TABLE in describe([source]):
            say(args, "projector", f"{source}: its {TOKEN_TABLE} is used by --mm_use_im_start_end True alone")
    if args.training.deepspeed:  # has one precision for all; see `set_precision`
        return
    if not args.model.unfreeze_mm_vision_tower:
        model.get_vision_tower().to(dtype=weight_dtype(args))
    # Trained in fp32; a base loaded in half precision brings a projector in half precision along.
    model.get_model().mm_projector.to(torch.float32)


def check_same_tower(args: RunArguments, tower: Any) -> None:
    """Compare the weights of a tower with those that the base was trained with, as far as it recorded them.

    Raises:
        CheckpointError: they differ although no flag asked for another tower.
    """
    expected = args.base.digest
    if expected is None or expected == tower.digest:
        return
    words = (
        f"its weights have the SHA-256 {tower.digest[:16]}..., those that the base was trained with {expected[:16]}..."
    )
    if "vision_tower" not in args.given:
        raise CheckpointError(
            f"{tower.vision_tower_name}: {words}; name the tower of then by --vision_tower, or this one to use it"
        )
    say(args, "settings", f"--vision_tower {args.model.vision_tower}: {words}")


def _is_named(stored: StoredTower, config: Any) -> bool:
    """Whether a tower in full weights is the one that the configuration names, as in LLaVA-1.5's folders."""
    try:
        return stored.equals(build_vision_tower(config, [stored.folder]).named_entries())
    except CheckpointError:  # the named one is not here: what is in the weights is all there is
        return False


def record_unread_tower(config: Any, args: RunArguments) -> None:
    """Name the tower of a base that a run on text alone leaves unread, so that it resolves from anywhere.

    Raises:
        FlagError: the full weights of the base have another tower, which checkpoints have to carry.
    """
    base = args.model.model_name_or_path
    stored = stored_tower(base, args.training.cache_dir)
    if stored is not None and not _is_named(stored, config):
        raise FlagError(
            f"--vision_tower none: {base} has a vision tower of its own in its weights, which checkpoints have to "
            "carry; leave the flag out, the rows may be text alone"
        )
    with contextlib.suppress(CheckpointError):  # not here: the name is all that is known of it
        config.mm_vision_tower = lasting_name(resolve_vision_tower(config.mm_vision_tower, [base]))


def record_settings(model: LlavaForCausalLM, args: RunArguments, tokenizer: Any) -> None:
    """Write into the configuration what evaluation needs to know about the training, under upstream's names."""
    config, tower = model.config, model.get_vision_tower()
    if tower is not None or args.base.tower is None:  # a run on text alone says nothing new about images
        config.image_aspect_ratio = args.data.image_aspect_ratio
        config.image_grid_pinpoints = None
        config.mm_use_im_start_end = args.model.mm_use_im_start_end
        config.mm_use_im_patch_token = args.model.mm_use_im_patch_token and tower is not None
    if args.data.image_aspect_ratio == "anyres" and tower is not None:
        config.image_grid_pinpoints = check_grid_pinpoints(args.data.image_grid_pinpoints, tower.image_size)
    config.user_marker_ids = user_marker_ids(select_template(args.model.version, tokenizer), tokenizer)
    record_template(config, None if args.program else args.model.version, tokenizer)
    config.tokenizer_padding_side = tokenizer.padding_side
    config.tokenizer_model_max_length = tokenizer.model_max_length
    config.tune_mm_mlp_adapter = args.model.tune_mm_mlp_adapter
    config.freeze_mm_mlp_adapter = args.training.freeze_mm_mlp_adapter
    config.mm_projector_lr = args.training.mm_projector_lr


def check_answer_end(args: RunArguments, tokenizer: Any) -> None:
    """Say, before anything large is loaded, if the model would not learn to end its answers by a token."""
    if args.program:  # which ends answers by the end-of-sequence token
        return
    template = select_template(args.model.version, tokenizer)
    problem = end_problem(template, turn_end(template, tokenizer), tokenizer, args.model.version)
    if problem is not None:
        say(args, "answer end", problem)


def record_answer_end(model: LlavaForCausalLM, args: RunArguments, tokenizer: Any) -> None:
    """Make the token with which the template ends an answer end generation too; checkpoints carry it along."""
    turn = None if args.program else turn_end(select_template(args.model.version, tokenizer), tokenizer)
    added = add_ends(model.generation_config, answer_end(turn, tokenizer, model.generation_config).ids)
    if turn is not None and turn.token is not None:
        also = "" if turn.token not in added else ", added to those of generation_config"
        say(args, "answer end", f"{turn.text!r}, token {turn.token}{also}")


def add_vocabulary(model: LlavaForCausalLM, args: RunArguments, tokenizer: Any) -> None:
    """The image tokens that the options ask for, with the rows that stage 1 trained.

    Raises:
        CheckpointError: the projector file of stage 1 has no rows for them.
        FlagError: they cannot be trained on this base.
    """
    new = add_image_tokens(model, tokenizer, wanted_tokens(args.model))
    if args.model.pretrain_mm_mlp_adapter and set(new) & set(BORDER_TOKENS):
        source = projector_file(args.model.pretrain_mm_mlp_adapter)
        beside = source.with_name(IMAGE_TOKENS_FILE)
        if not load_image_tokens(model, beside if beside.is_file() else source):
            raise CheckpointError(
                f"--mm_use_im_start_end True, but neither {source} nor {beside} holds the tokens {BORDER_TOKENS}; "
                "train stage 1 with that option too, or pass False"
            )
    if args.model.mm_use_im_start_end and Component.LANGUAGE_MODEL not in trained_components(args):
        train_image_tokens(model)


def use_fused_loss(llava: LlavaForCausalLM, args: RunArguments) -> None:
    """Let liger-kernel compute the loss on a GPU, where it is installed; its kernels run nowhere else."""
    head = llava.get_output_embeddings()
    fused = liger_loss() if args.training.device.type == "cuda" else None
    if isinstance(head, LanguageHead) and head.bias is None and fused is not None:
        head.fused = fused
        say(args, "loss", "of trained tokens, fused by liger-kernel")


def declare_parameters(llava: LlavaForCausalLM, training: TrainingArguments) -> None:
    """Tell ZeRO-3 of parameters that are used outside of the module that owns them, so that they are whole in time."""
    if zero_stage(training) != 3:
        return
    import deepspeed

    register = deepspeed.zero.register_external_parameter
    tower, newline = llava.get_vision_tower(), getattr(llava.get_model(), "image_newline", None)
    if newline is not None:
        register(llava, newline)
    for part in [] if tower is None else tower.embedding_modules(tower.loaded()):
        if isinstance(part, nn.Parameter):
            register(tower, part)


def build_model(args: RunArguments, tokenizer: Any, attn_implementation: str | None = None) -> nn.Module:
    """Base, tower, projector, extensions and LoRA, frozen and unfrozen as the options say; prints the table.

    Raises:
        CheckpointError: weights are missing or do not fit.
        FlagError: options that cannot be carried out on this model.
    """
    recorded = recorded_extensions(args.model.model_name_or_path, args.training.cache_dir)
    check_recorded(args.model.model_name_or_path, recorded, args.extensions)
    claimed = frozenset().union(*(each.claimed for each in recorded.values()))
    llava = load_base(args, attn_implementation, claimed)
    say_base(args, llava)
    say_settings(args)
    if args.model.vision_tower is not None:
        add_vision(llava, args)
        add_vocabulary(llava, args, tokenizer)
    elif args.base.tower is not None:
        record_unread_tower(llava.config, args)
    say_tower(args, llava)
    record_settings(llava, args, tokenizer)
    record_answer_end(llava, args, tokenizer)
    available = installed_extensions(list(args.extensions)) if args.extensions else {}
    for name, config in args.extensions.items():
        llava.extensions.attach(llava, available[name], config)
    train_on(llava, recorded, announce=args.training.should_log)
    say(args, "extensions", ", ".join(llava.extensions.configs) or "none")
    model: nn.Module = llava
    if args.training.peft_config is not None:
        model = add_adapter(llava, args.training.peft_config)
    elif args.training.lora_enable:
        model = add_lora(llava, args.training)
    use_fused_loss(llava, args)  # after adapters: one around the head rules the kernel out
    counts = freeze(model, args)
    set_precision(model, args.training)
    declare_parameters(llava, args.training)
    if args.training.should_log:
        print_trainable(counts)
    return model


def rows_of_run(args: RunArguments) -> RowFiles:
    """The rows of a run's data files, found by one process while the others wait to use what it keeps of large ones.

    Raises:
        FlagError: see `open_rows`.
    """
    with args.training.main_process_first(local=False), args.training.main_process_first(local=True):
        seed = args.training.seed if args.training.data_seed is None else args.training.data_seed
        return open_rows(args.data.data_path or [], seed=seed)


def sample_options(args: RunArguments, tokenizer: Any, model: LlavaForCausalLM) -> dict[str, Any]:
    """How the rows of a run become items, as `Samples` takes it; all but the tokenizer."""
    template: Conversation = select_template(args.model.version, tokenizer)
    tower = model.get_vision_tower()
    return {
        "image_processor": None if tower is None else tower.image_processor,
        "template": template,
        "image_folder": args.data.image_folder,
        "image_aspect_ratio": args.data.image_aspect_ratio,
        "image_grid_pinpoints": getattr(model.config, "image_grid_pinpoints", None),
        "is_multimodal": tower is not None,
        "mm_use_im_start_end": args.model.mm_use_im_start_end,
        "model_max_length": tokenizer.model_max_length,
        "image_length": None if tower is None else model.image_length(),
        "on_bad_sample": args.data.on_bad_sample,
        "skipped_file": skipped_file(args),
    }


def build_dataset(args: RunArguments, tokenizer: Any, model: LlavaForCausalLM) -> LazySupervisedDataset:
    """The rows of `--data_path` as a list: the training data of a run that does not stream, and all evaluation data."""
    options = sample_options(args, tokenizer, model)
    dataset = LazySupervisedDataset(rows_of_run(args), tokenizer, requires_image=args.data.requires_image, **options)
    if args.data.requires_image and args.training.should_log:
        print(f"--requires_image True: {dataset.left_out} rows without image are left out, {len(dataset)} remain")
    return dataset


def training_data(
    args: RunArguments, tokenizer: Any, model: LlavaForCausalLM
) -> LazySupervisedDataset | StreamedDataset:
    """The training data of a run: a list of rows, or with `--streaming True` a stream of them."""
    if not args.data.streaming:
        return build_dataset(args, tokenizer, model)
    return StreamedDataset(
        stream_of_run(args),
        tokenizer,
        batch_size=args.training.train_batch_size,
        **sample_options(args, tokenizer, model),
    )

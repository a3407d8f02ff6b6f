"""Which settings of a run have an effect, and which of these change a number.

What has no effect is not recorded: a rank without LoRA or a number of epochs next to `--max_steps` says nothing about
the weights that were trained. What changes no number may change when a run resumes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from llava.runtime import checkpointing

Settings = Mapping[str, Any]
"""Options of a run by name, from all sections of its record."""

NEVER_READ = frozenset(
    [
        *("lazy_preprocess", "is_multimodal", "mpt_attn_impl", "n_prompt", "keep_linebreaks", "use_fast_tokenizer"),
        *("do_predict", "remove_unused_columns", "prediction_loss_only", "_n_gpu", "n_gpu", "cpu_load", "dist_url"),
        *("dist_on_itp", "start_epoch", "preprocessing_num_workers"),
    ]
)
"""Options that are accepted so that published command lines run."""

LOGGING = frozenset(
    [
        *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("logging_dir", "logging_steps", "logging_first_step", "logging_strategy", "logging_nan_inf_filter"),
        *("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "include_num_input_tokens_seen"),
        *("skip_memory_metrics", "debug", "enable_jit_checkpoint", "include_for_metrics", "batch_eval_metrics"),
        "eval_shown",
    ]
)
SAVING = frozenset(
    [
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "resume_changed"),
        *("save_steps", "save_strategy"),
        *("save_total_limit", "save_only_model", "save_on_each_node", "save_safetensors"),
        *("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push"),
        *("hub_base_model", "hub_license", "hub_revision", "push_to_hub_token", "push_to_hub_model_id"),
        "push_to_hub_organization",
    ]
)
MACHINE = frozenset(
    [
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "local_rank", "ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb"),
        *("ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph", "use_cpu", "no_cuda"),
        *("use_mps_device", "deepspeed", "parallelism_config", *checkpointing.FLAGS),
        *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        *("torch_empty_cache_steps", "auto_find_batch_size", "attn_implementation", "flash_attn", "cache_dir"),
        *("data_cache_dir", "overwrite_cache", "preprocessing_num_workers", "use_auth_token", "use_liger_kernel"),
        *("eval_accumulation_steps", "eval_use_gather_object", "per_device_eval_batch_size", "eval_on_start"),
        *("num_workers", "pin_mem", "dist_url", "dist_on_itp", "world_size", "device", "cpu_load", "log_dir", "resume"),
    ]
)
FREE = LOGGING | SAVING | MACHINE | NEVER_READ | {"do_train"}
"""Options that change no number of a run, or only in the order of sums."""

OFF = (None, False, 0, "", "None", "no", "none", "[]")
"""Values of an option that switch something off; texts are those of records of earlier versions."""

WITHOUT_MOMENTS = frozenset({"sgd", "adagrad", "adafactor", "rmsprop", "galore_adafactor", "lomo", "adalomo"})
"""Optimizers that read no `--adam_...`."""


def is_on(settings: Settings, name: str) -> bool:
    """True if an option is set to something, or if the record does not know it."""
    return name not in settings or settings[name] not in (*OFF, [])


def _is(name: str, *values: Any) -> Callable[[Settings], bool]:
    return lambda settings: name not in settings or settings[name] in values


def _on(*names: str) -> Callable[[Settings], bool]:
    return lambda settings: any(is_on(settings, name) for name in names)


def _known(settings: Settings, name: str) -> bool:
    return name in settings and is_on(settings, name)


@dataclass(frozen=True)
class Rule:
    """Settings that have an effect only under a condition.

    Attributes:
        needs: whether the settings of a run meet it.
        names: those settings.
    """

    needs: Callable[[Settings], bool]
    names: tuple[str, ...]


TOWER_SETTINGS = (
    *("mm_vision_select_layer", "mm_vision_select_feature", "mm_projector_type", "mm_patch_merge_type"),
    *("mm_image_normalization", "mm_use_im_start_end", "mm_use_im_patch_token", "pretrain_mm_mlp_adapter"),
    *("unfreeze_mm_vision_tower", "freeze_mm_mlp_adapter", "mm_projector_lr", "mm_vision_tower_lr"),
    *("image_aspect_ratio", "image_grid_pinpoints"),
)

MODEL_RULES = (
    Rule(_on("vision_tower"), TOWER_SETTINGS),
    Rule(_is("image_aspect_ratio", "anyres"), ("image_grid_pinpoints", "mm_patch_merge_type")),
    Rule(_on("unfreeze_mm_vision_tower"), ("mm_vision_tower_lr",)),
    Rule(lambda settings: not _known(settings, "freeze_mm_mlp_adapter"), ("mm_projector_lr",)),
    Rule(
        _on("lora_enable"),
        ("lora_r", "lora_alpha", "lora_dropout", "lora_bias", "lora_target_modules", "lora_weight_path"),
    ),
    Rule(_is("bits", 4, "4bit"), ("double_quant", "quant_type")),
    Rule(_is("load_in_kbits", 4), ("double_quant", "quant_type")),
    Rule(
        lambda settings: not _known(settings, "peft_path"),
        ("lora_rank", "lora_alpha", "lora_dropout", "lora_nums", "routing", "trainable", "modules_to_save"),
    ),
    Rule(_on("use_vicuna"), ("vicuna_weights",)),
)
"""What is trained. Of an adapter that is trained on, the files are compared."""

SCHEDULE_RULES = (
    # LaVIN's schedule is defined by epochs even where the updates are counted.
    Rule(lambda settings: "epochs" in settings or not _counts_updates(settings), ("num_train_epochs",)),
    Rule(
        lambda settings: "warmup_epochs" not in settings,
        ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "warmup_ratio"),
    ),
    Rule(lambda settings: "blr" in settings and not _known(settings, "lr"), ("blr",)),
    Rule(
        lambda settings: settings.get("lr_scheduler_type") not in ("constant", "reduce_lr_on_plateau"),
        ("warmup_steps", "warmup_ratio"),
    ),
    Rule(
        lambda settings: settings.get("optim") not in WITHOUT_MOMENTS,
        ("adam_beta1", "adam_beta2", "adam_epsilon"),
    ),
)

DATA_RULES = (
    Rule(_on("use_caption"), ("caption_file",)),
    Rule(
        lambda settings: not _known(settings, "do_pretrain"),
        ("prompt_format", "options", "use_caption", "caption_file"),
    ),
    Rule(lambda settings: not _known(settings, "train_file"), ("dataset_dir", "include_held_out")),
    Rule(
        lambda settings: is_on(settings, "do_eval") and not _known(settings, "validation_file"),
        ("validation_split_percentage",),
    ),
    Rule(_is("train_sampling_strategy", "group_by_length"), ("length_column_name",)),
    Rule(_is("streaming", True), ("shuffle_buffer",)),
    Rule(
        _on("dataloader_num_workers"),
        (
            *("dataloader_prefetch_factor", "dataloader_persistent_workers", "dataloader_multiprocessing_context"),
            "dataloader_in_order",
        ),
    ),
)

HOST_RULES = (
    Rule(
        _on("do_eval", "eval_strategy"),
        (
            *("eval_steps", "eval_delay", "per_device_eval_batch_size", "eval_batch_size", "eval_on_start"),
            *("eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps", "include_for_metrics"),
            *("batch_eval_metrics", "bf16_full_eval", "fp16_full_eval"),
        ),
    ),
    Rule(
        lambda settings: is_on(settings, "load_best_model_at_end") or _known(settings, "early_stopping_patience"),
        ("metric_for_best_model", "greater_is_better"),
    ),
    Rule(_on("early_stopping_patience"), ("early_stopping_threshold",)),
    Rule(
        _on("eval_questions"), ("eval_data_dir", "eval_image_folder", "eval_limit", "eval_max_new_tokens", "eval_shown")
    ),
    Rule(_is("save_strategy", "steps"), ("save_steps",)),
    Rule(_is("logging_strategy", "steps"), ("logging_steps",)),
    Rule(
        _on("report_to"),
        ("run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "log_dir"),
    ),
    Rule(
        _on("push_to_hub"),
        (
            *("hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push", "hub_revision"),
            *("hub_base_model", "hub_license"),
        ),
    ),
    Rule(_on(*checkpointing.SPELLINGS), tuple(f"{name}_kwargs" for name in checkpointing.SPELLINGS)),
    Rule(_on("torch_compile"), ("torch_compile_backend", "torch_compile_mode")),
    Rule(_on("use_liger_kernel"), ("liger_kernel_config",)),
    Rule(_on("fsdp"), ("fsdp_config",)),
)
"""What concerns the machine, logs and files alone."""


def _counts_updates(settings: Settings) -> bool:
    updates = settings.get("max_steps")
    return isinstance(updates, int) and updates > 0


def unused(settings: Settings) -> set[str]:
    """The names of those settings that have no effect under the others.

    Args:
        settings: options of a run from all sections of its record. A switch that is not among them counts as on.
    """
    names = set(NEVER_READ & settings.keys())
    for rule in (*MODEL_RULES, *SCHEDULE_RULES, *DATA_RULES, *HOST_RULES):
        if not rule.needs(settings):
            names |= settings.keys() & set(rule.names)
    return names


def without(section: Settings, names: Iterable[str]) -> dict[str, Any]:
    """A section of a record without some settings."""
    left_out = set(names)
    return {name: value for name, value in section.items() if name not in left_out}

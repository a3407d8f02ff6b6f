"""Is this the run that the output folder belongs to? Its record (`run.json`) against the options of now.

A resumed run under other options would be neither the old run nor a new one, and its record would call old weights by
new settings. What changes no number may change; the table below lists it, everything else has to be equal.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError, FlagError
from llava.runtime import checkpointing
from llava.runtime.files import read_json
from llava.runtime.weights.completeness import RUN_FILE
from llava.runtime.weights.fingerprint import WEIGHT_SUFFIXES, weights_fingerprint

LOGGING = frozenset(
    [
        *("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
        *("logging_dir", "logging_steps", "logging_first_step", "logging_strategy", "logging_nan_inf_filter"),
        *("log_level", "log_level_replica", "log_on_each_node", "disable_tqdm", "include_num_input_tokens_seen"),
        *("skip_memory_metrics", "debug", "enable_jit_checkpoint", "include_for_metrics", "batch_eval_metrics"),
    ]
)
SAVING = frozenset(
    [
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "save_steps", "save_strategy"),
        *("save_total_limit", "save_only_model", "save_on_each_node", "save_safetensors"),
        *("push_to_hub", "hub_model_id", "hub_strategy", "hub_token", "hub_private_repo", "hub_always_push"),
        *("hub_revision", "push_to_hub_token", "push_to_hub_model_id", "push_to_hub_organization"),
    ]
)
MACHINE = frozenset(
    [
        *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers"),
        *("dataloader_prefetch_factor", "local_rank", "ddp_backend", "ddp_timeout", "ddp_bucket_cap_mb"),
        *("ddp_find_unused_parameters", "ddp_broadcast_buffers", "ddp_static_graph", "use_cpu", "no_cuda"),
        *("use_mps_device", "deepspeed", "accelerator_config", "parallelism_config", *checkpointing.FLAGS),
        *("torch_compile", "torch_compile_backend", "torch_compile_mode"),
        *("torch_empty_cache_steps", "auto_find_batch_size", "attn_implementation", "flash_attn", "cache_dir"),
        *("data_cache_dir", "overwrite_cache", "preprocessing_num_workers", "use_auth_token", "use_liger_kernel"),
        *("eval_accumulation_steps", "eval_use_gather_object", "per_device_eval_batch_size", "eval_on_start"),
        *("num_workers", "pin_mem", "dist_url", "dist_on_itp", "world_size", "device", "cpu_load", "log_dir", "resume"),
    ]
)
NEVER_READ = frozenset(
    [
        *("lazy_preprocess", "is_multimodal", "mpt_attn_impl", "n_prompt", "keep_linebreaks", "use_fast_tokenizer"),
        *("do_train", "do_predict", "remove_unused_columns", "prediction_loss_only", "_n_gpu", "n_gpu"),
    ]
)
FREE = LOGGING | SAVING | MACHINE | NEVER_READ
"""Options that change no number of a run, or only in the order of sums."""

PATHS = frozenset(
    [
        *("model_name_or_path", "vision_tower", "pretrain_mm_mlp_adapter", "data_path", "image_folder", "dataset_dir"),
        *("train_file", "validation_file", "tokenizer_name_or_path", "tokenizer_name", "peft_path", "data_root"),
        *("caption_file", "llama_model_path"),
    ]
)
"""Options that are paths: equal if they lead to the same place."""

DATA_FILES = {"dataset_dir": "*.json", "data_root": "pid_splits.json"}
"""Of `PATHS`, folders of data with the names of the files in them that decide what a run trains on."""

EVALUATION = frozenset({"eval_strategy", "eval_steps", "eval_delay", "eval_batch_size"})
"""Free unless the best checkpoint is loaded at the end."""

LENGTH = frozenset({"max_steps", "num_train_epochs", "epochs"})
"""Options that say when the run ends. Free under a schedule that does not depend on it."""
LENGTHLESS = ("constant", "constant_with_warmup", "inverse_sqrt")

BATCH = ("per_device_train_batch_size", "gradient_accumulation_steps")
BATCH_NAMES = frozenset({*BATCH, "train_batch_size", "batch_size", "accum_iter"})
"""Free as long as the global batch, their product with the number of processes, stays the same."""

WORLD, FINGERPRINTS = "world_size", "fingerprints"
"""Keys of a record: the number of processes, and a digest of what each of `PATHS` leads to."""

SECTIONS = ("program", "model", "data", "training")
"""Of a record: what a program was told, and what came of it."""


def fingerprints(options: Mapping[str, Any]) -> dict[str, str]:
    """Digests of the files and weights that the options of a run name; hub ids and folders of images have none."""
    found = {}
    for name in sorted(PATHS & options.keys()):
        paths = options[name] if isinstance(options[name], list) else [options[name]]
        digests = [_fingerprint(Path(path), DATA_FILES.get(name)) for path in paths if isinstance(path, str)]
        if digests and None not in digests:
            found[name] = " ".join(map(str, digests))
    return found


def _fingerprint(path: Path, data_files: str | None = None) -> str | None:
    """Of a file its content; of a folder the names and content of its data files, or the ends of its weights."""
    if path.is_dir() and data_files is not None:
        named = [f"{file.name} {_fingerprint(file)}" for file in sorted(path.glob(data_files)) if file.is_file()]
        return hashlib.sha256("\n".join(named).encode()).hexdigest()[:16] if named else None
    if path.is_file() and path.suffix not in WEIGHT_SUFFIXES:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    has_weights = path.is_dir() and any(child.suffix in WEIGHT_SUFFIXES for child in path.iterdir())
    return weights_fingerprint(path) if has_weights or path.is_file() else None


def flat(record: Mapping[str, Any]) -> dict[str, Any]:
    """The options in a record by their names, whatever section they are in."""
    sections = record.get("arguments", record)
    options: dict[str, Any] = {}
    for section in SECTIONS:
        options |= sections.get(section) or {}
    for name, values in (sections.get("options") or {}).items():
        options |= values or {}
        options[f"extension {name}"] = (sections.get("extensions") or {}).get(name)
    if "experts" in sections:
        options["number of experts"] = sections["experts"]
    return options


def check_sections(record: Mapping[str, Any], path: Path) -> None:
    """Refuse a record whose sections are not tables of options.

    Raises:
        CheckpointError: names the file and the sections.
    """
    sections = record.get("arguments", record)
    tables: dict[str, Any] = {FINGERPRINTS: record.get(FINGERPRINTS)}
    if isinstance(sections, dict):
        tables |= {name: sections.get(name) for name in (*SECTIONS, "options", "extensions")}
        options = sections.get("options")
        tables |= {f"options.{name}": values for name, values in options.items()} if isinstance(options, dict) else {}
    wrong = [name for name, value in tables.items() if value is not None and not isinstance(value, dict)]
    wrong += [] if isinstance(sections, dict) else ["arguments"]
    if wrong:
        raise CheckpointError(
            f"{path}: {', '.join(sorted(wrong))} should contain options by name; the record of this run is damaged. "
            "Get the file again, or choose another --output_dir"
        )


def _same_path(one: Any, other: Any) -> bool:
    """True if two values of an option lead to the same files."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_same_path, one, other))
    if not (isinstance(one, str) and isinstance(other, str)):
        return one == other
    return one == other or Path(one).resolve() == Path(other).resolve()


def _same(name: str, then: Mapping[str, Any], now: Mapping[str, Any], before: Any, after: Any) -> bool:
    """True if an option has the same meaning in both records."""
    if name not in PATHS:
        return before == after
    prints = [(record.get(FINGERPRINTS) or {}).get(name) for record in (then, now)]
    return prints[0] == prints[1] if None not in prints else _same_path(before, after)


def _batch(record: Mapping[str, Any], options: Mapping[str, Any]) -> int | None:
    factors = [*(options.get(name) for name in BATCH), record.get(WORLD)]
    return math.prod(factors) if all(isinstance(factor, int) for factor in factors) else None


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Options of two records that make them records of different runs, one line each.

    Args:
        then: the stored record.
        now: that of the options of now.
    """
    # Both as they come out of a file: tuples are lists there, and numbers that are no JSON become strings.
    now = json.loads(json.dumps(now, default=str))
    before, after = flat(then), flat(now)
    free = set(FREE)
    if _batch(then, before) is not None and _batch(then, before) == _batch(now, after):
        free |= BATCH_NAMES
    no_schedule = before.get("lr_scheduler_type") in LENGTHLESS and not any(
        value for name, value in after.items() if name.startswith("extension ")
    )
    free |= LENGTH if no_schedule else set()
    free |= set() if after.get("load_best_model_at_end") else EVALUATION
    lines = []
    for name in sorted((before.keys() & after.keys()) - free):
        if not _same(name, then, now, before[name], after[name]):
            what = name if " " in name else f"--{name}"
            changed = "the same path, other content" if before[name] == after[name] else f"{after[name]!r:.200} now"
            lines.append(f"{what}: {before[name]!r:.200} then, {changed}")
    return lines


def refuse_changes(now: Mapping[str, Any], output: Path, resume_from: Path | None, results: bool) -> None:
    """Refuse to continue, or to replace, what other options have made.

    Args:
        now: the record of the options of now.
        output: output folder of the run.
        resume_from: the checkpoint that the run would continue from.
        results: the output folder contains trained weights.

    Raises:
        FlagError: lists the options that differ.
        CheckpointError: the record is damaged.
    """
    places = [] if resume_from is None else [resume_from / RUN_FILE]
    if resume_from is None or resume_from.parent.resolve() == output.resolve():
        places.append(output / RUN_FILE)
    record = next((path for path in places if path.is_file()), None)
    if record is None or (resume_from is None and not results):
        return
    then = read_json(record)
    check_sections(then, record)
    lines = differences(then, now)
    if lines:
        what = "be resumed from" if resume_from is not None else "be replaced by a run that is not the same"
        raise FlagError(
            f"{resume_from or output}: cannot {what} under changed options; according to {record}:\n  "
            + "\n  ".join(lines)
            + "\nGive the options of then, or another --output_dir"
        )

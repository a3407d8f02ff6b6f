"""The record of a checkpoint's files, by which a missing or shortened one is noticed, and what other files name.

`checkpoint_files.json` is written with a checkpoint: the size of each file of weights, of small ones a digest, and the
keys of each JSON file, whose values may be edited. Folders without it are judged by what their other files name.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError
from llava.runtime.files import read_json, refuse_pointer
from llava.runtime.output import MARKER
from llava.runtime.places import RUN_FILE
from llava.runtime.weights.run_file import latest

FILE_LIST = "checkpoint_files.json"

TOWER_FOLDER = "vision_tower"
"""Folder of a vision tower inside a checkpoint, and what `mm_vision_tower` in its `config.json` says then."""

RESUME_FILES = (
    *("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", "trainer_state.json", "run.json"),
    *("global_step*", "latest"),
)
"""Files, and folders of DeepSpeed, that only resuming a run needs: they may be deleted from a finished checkpoint."""

SIZED = frozenset({".safetensors", ".bin", ".pt", ".pth", ".model"})
"""Files whose size is recorded: a cut or foreign one shows by it."""

FULL_WEIGHTS = ("model.safetensors*", "pytorch_model.bin*", "model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
"""Full weights, whose one file may be split and whose shards may be joined. An index says what belongs to it."""

MAX_DIGESTED = 2**24
"""Longest file whose content is recorded by a digest; larger ones by their size alone, so that checking is instant."""

MAX_KEYS = 1000
"""A JSON object with more keys is a vocabulary."""

UNLISTED = frozenset({FILE_LIST, MARKER, "training_args.bin", "README.md", "zero_to_fp32.py"})
"""Files that nobody reads."""


def _parts(folder: Path) -> list[Path]:
    """Files of a checkpoint, relative to it, without those of other checkpoints below it."""
    paths = (path.relative_to(folder) for path in sorted(folder.rglob("*")) if path.is_file())
    others = ("checkpoint-", "tmp-")
    return [path for path in paths if path.name not in UNLISTED and not path.parts[0].startswith(others)]


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _is_for_resuming(path: Path) -> bool:
    return any(Path(path.parts[0]).match(pattern) for pattern in RESUME_FILES)


def _description(path: Path) -> dict[str, Any]:
    if path.suffix in SIZED:
        size = path.stat().st_size
        return {"bytes": size} | ({"sha256": _digest(path)} if size <= MAX_DIGESTED else {})
    if path.suffix == ".json":
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict) and len(content) <= MAX_KEYS:
            return {"keys": sorted(_keys(content))}
    return {}


def _keys(content: Mapping[str, Any], above: str = "") -> Iterator[str]:
    """The keys of a JSON object and of the objects in it, as `added_tokens_decoder/896`; not those of a vocabulary."""
    for key, value in content.items():
        yield above + key
        if isinstance(value, dict) and len(value) <= MAX_KEYS:
            yield from _keys(value, f"{above}{key}/")


def write_file_list(folder: Path) -> None:
    """Record the files that a complete folder consists of; an earlier record is replaced."""
    parts = _parts(folder)
    record = {
        "about": "files of this checkpoint; those under 'resume' are needed to resume its run only",
        "model": {path.as_posix(): _description(folder / path) for path in parts if not _is_for_resuming(path)},
        "resume": {path.as_posix(): _description(folder / path) for path in parts if _is_for_resuming(path)},
    }
    (folder / FILE_LIST).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def check_file_list(folder: Path, resume: bool = False) -> None:
    """Refuse a folder that lacks something of its own record. A folder without a record passes.

    Args:
        folder: of a checkpoint.
        resume: ask for the files that resuming needs too.

    Raises:
        CheckpointError: a file is missing, has another size, or a JSON file lacks a key; names both files.
    """
    path = folder / FILE_LIST
    if not path.is_file():
        return
    record = read_json(path)
    for section in ("model", "resume") if resume else ("model",):
        named = record.get(section)
        if not isinstance(named, dict) or not all(isinstance(each, dict) for each in named.values()):
            raise CheckpointError(f"{path}: its '{section}' is not a table of files; delete the file to do without")
        for name, described in named.items():
            if _is_split_otherwise(folder, name) or _has_grown(folder, name, described) or _is_unused(folder, name):
                continue
            _check_file(folder / name, described, path)


def _is_split_otherwise(folder: Path, name: str) -> bool:
    """True for full weights that are in the folder all the same, in another number of files than were recorded."""
    if (folder / name).is_file() or not any(Path(name).match(pattern) for pattern in FULL_WEIGHTS):
        return False
    others = (path for pattern in FULL_WEIGHTS[:2] for path in folder.glob(pattern))
    return any(path.suffix == ".json" or "-of-" not in path.name for path in others)


def _has_grown(folder: Path, name: str, described: Mapping[str, Any]) -> bool:
    """True for full weights to which another program has added tensors, such as the vision tower.

    A file of safetensors says its own length, and what it contains is compared with `config.json` when it is read.
    """
    path, size = folder / name, described.get("bytes")
    if path.suffix != ".safetensors" or not path.is_file() or not isinstance(size, int):
        return False
    return any(Path(name).match(pattern) for pattern in FULL_WEIGHTS) and path.stat().st_size > size


def _is_unused(folder: Path, name: str) -> bool:
    """True for a file of the tower's folder where `config.json` names another tower since."""
    if Path(name).parts[0] != TOWER_FOLDER or not (folder / "config.json").is_file():
        return False
    return read_json(folder / "config.json").get("mm_vision_tower") not in (None, TOWER_FOLDER)


def _check_file(file: Path, described: Mapping[str, Any], record: Path) -> None:
    if not file.resolve().is_relative_to(record.parent.resolve()) and not file.is_symlink():
        raise CheckpointError(f"{record}: names '{file}', which is outside its folder")
    if not file.is_file():
        raise CheckpointError(
            f"{file}: is missing; {record} names it as a part of this checkpoint. Get the file again; if the folder "
            f"was changed on purpose, delete {record.name}"
        )
    refuse_pointer(file)
    size = described.get("bytes")
    if size is not None and file.stat().st_size != size:
        raise CheckpointError(f"{file}: has {file.stat().st_size} bytes, but {size} according to {record}")
    digest = described.get("sha256")
    if digest is not None and file.stat().st_size <= MAX_DIGESTED and _digest(file) != digest:
        raise CheckpointError(f"{file}: has another content than when it was written ({record})")
    keys = described.get("keys")
    if keys is None:
        return
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{record}: the keys of '{file.name}' are not a list of names")
    missing = set(keys) - set(_keys(read_json(file)))
    lacking = sorted(key for key in missing if key.rpartition("/")[0] not in missing)
    if lacking:
        raise CheckpointError(f"{file}: lacks {lacking[:5]}, which it had when it was written ({record})")


def require(path: Path, named_by: Path, how: str, others: Sequence[str] = ()) -> None:
    """Refuse a folder that lacks a file which another one names.

    Args:
        path: the file.
        named_by: where it was named.
        how: what that file says of it.
        others: names under which other programs write the same part next to `path`; one of them will do.

    Raises:
        CheckpointError: names the file, and where and how it was named.
    """
    if not any(each.is_file() for each in (path, *(path.parent / name for name in others))):
        also = f" ({', '.join(others)} too)" if others else ""
        raise CheckpointError(f"{path}: is missing{also}, but {named_by} {how}")


def check_run_record(folder: Path) -> None:
    """Refuse a checkpoint that lacks what its run trained, as far as `run.json` tells.

    Raises:
        CheckpointError: names the missing part.
    """
    path = folder / RUN_FILE
    if not path.is_file():
        return
    arguments = latest(read_json(path)).get("arguments")
    sections = arguments if isinstance(arguments, dict) else {}
    found = (sections.get(name) for name in ("model", "training", "extensions"))
    model, training, extensions = (part if isinstance(part, dict) else {} for part in found)
    for part, flags in _trained_parts(model, training).items():
        if not any((folder / name).is_file() for name in part):
            require(folder / part[0], path, f"says that this part was trained ({flags})")
    for name in extensions:
        require(folder / "extensions" / str(name) / "config.json", path, f"names the extension '{name}'")


def _trained_parts(model: Mapping[str, Any], training: Mapping[str, Any]) -> dict[tuple[str, ...], str]:
    """Files, of each tuple at least one, by the options of a run; as `llava.train.freeze.trained_components`."""
    parts: dict[tuple[str, ...], str] = {}
    lora, alone = training.get("peft_config") or training.get("lora_enable"), model.get("tune_mm_mlp_adapter")
    frozen = model.get("freeze_backbone")
    if lora is None or alone is None or frozen is None:  # the record of another program
        return parts
    full = not (lora or alone or frozen)
    if full:
        parts["model.safetensors", "model.safetensors.index.json"] = "neither LoRA nor --freeze_backbone"
    if lora:
        parts["adapter_model.safetensors",] = "LoRA"
        parts["adapter_config.json",] = "LoRA"
    if model.get("vision_tower") and not full and not training.get("freeze_mm_mlp_adapter"):
        parts["mm_projector.safetensors",] = "no --freeze_mm_mlp_adapter"
    if model.get("unfreeze_mm_vision_tower") and not alone:
        parts["vision_tower/config.json", "vision_tower/open_clip_config.json"] = "--unfreeze_mm_vision_tower"
    if model.get("vision_tower") and model.get("mm_use_im_start_end") and not full:
        parts["image_tokens.safetensors",] = "--mm_use_im_start_end"
    return parts

"""Checkpoint folders of a patched checkout: the original layout of an extension, and that of llava-extensions.

Original: `non_lora_trainables.bin` and an extension's file beside it. llava-extensions: `extensions/<name>/config.json`
and `model.safetensors`, `mm_projector.safetensors`. LoRA lies in PEFT's files in both. Found from the files, never from
words in a path; no pickled code is run.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_patch.payload.extension import Extension, State

NON_LORA_FILE = "non_lora_trainables.bin"
PROJECTOR_FILE = "mm_projector.safetensors"
PEFT_PREFIX = "base_model.model."
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
NOT_CARRIED = {
    "image_tokens.safetensors": "trained rows of <im_start> and <im_end>",
    "vision_tower": "a trained vision tower",
}
"""Parts of a folder of llava-extensions that upstream's LLaVA has no place for."""


@dataclass(frozen=True)
class Folder:
    """What a folder holds beside LoRA.

    Attributes:
        path: the folder.
        extensions: configuration and tensors of each extension by its name.
        projector: weights of the projector by their name in the bare model.
        is_whole: True if the weights of the whole model are in it too, so that it needs no base.
    """

    path: Path
    extensions: dict[str, tuple[dict[str, Any], State]] = field(default_factory=dict)
    projector: State = field(default_factory=dict)
    is_whole: bool = False


def is_whole(folder: Path) -> bool:
    """True for a folder with the weights of a whole model."""
    return any((folder / name).is_file() for name in (*SINGLE_FILES, *INDEX_FILES))


def read_weights(folder: Path, prefixes: tuple[str, ...]) -> State:
    """The tensors of a whole model whose names begin so.

    Raises:
        ValueError: the folder has no weights, or a file of them is damaged.
    """
    index = next((folder / name for name in INDEX_FILES if (folder / name).is_file()), None)
    if index is not None:
        table = json.loads(index.read_text(encoding="utf-8")).get("weight_map", {})
        files = sorted({folder / Path(file).name for name, file in table.items() if name.startswith(prefixes)})
    else:
        files = [folder / name for name in SINGLE_FILES if (folder / name).is_file()][:1]
    if index is None and not files:
        raise ValueError(f"{folder}: holds no weights of a model ({', '.join((*SINGLE_FILES, *INDEX_FILES))})")
    found: State = {}
    for path in files:
        found |= _read_some(path, prefixes)
    return found


def _read_some(path: Path, prefixes: tuple[str, ...]) -> State:
    """The tensors of a file whose names begin so; of a large shard nothing else is read."""
    if path.suffix != ".safetensors":
        # Copies, since a tensor of a mapped file keeps all of it open.
        mapped = read_bin(path, mmap=zipfile.is_zipfile(path))
        return {name: tensor.clone() for name, tensor in mapped.items() if name.startswith(prefixes)}
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys() if name.startswith(prefixes)}  # noqa: SIM118


def is_ours(folder: Path) -> bool:
    """True for a folder of llava-extensions that needs a base: it has files that upstream never writes."""
    return any((folder / "extensions").glob("*/config.json")) or (folder / PROJECTOR_FILE).is_file()


def read_bin(path: Path, *, mmap: bool = False) -> State:
    """Tensors of a file that `torch.save` wrote, without running pickled code.

    Args:
        path: of the file.
        mmap: read a tensor when it is used; not for files in the format of torch before 1.6, which are not zip files.

    Raises:
        ValueError: it holds something else.
    """
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path}: holds something else than a table of named tensors")
    return content


def bare_names(state: Mapping[str, Tensor]) -> State:
    """The tensors by their names in the bare model."""
    return {name[len(PEFT_PREFIX) :] if name.startswith(PEFT_PREFIX) else name: t for name, t in state.items()}


def read_folder(folder: Path, carried: Sequence[Extension]) -> Folder | None:
    """Read a folder of either layout; None if it holds nothing of any extension and is not ours.

    Raises:
        ValueError: it holds an extension that this checkout does not carry, or is damaged.
    """
    if is_ours(folder):
        return _read_ours(folder, carried)
    found = {e.name: saved for e in carried if (saved := e.read_original(folder)) is not None}
    if not found:
        return None
    if is_whole(folder):
        return Folder(folder, found, is_whole=True)
    rest = {name: t for name, t in read_bin(folder / NON_LORA_FILE).items() if not any(e.owns(name) for e in carried)}
    unknown = [name for name in rest if not is_projector(name)]
    if unknown:
        raise ValueError(
            f"{folder / NON_LORA_FILE}: {len(unknown)} tensors belong to nothing here, first {unknown[:3]}"
        )
    return Folder(folder, found, bare_names(rest))


def _read_ours(folder: Path, carried: Sequence[Extension]) -> Folder:
    from safetensors.torch import load_file

    lost = [f"{name} ({what})" for name, what in NOT_CARRIED.items() if (folder / name).exists()]
    paths = {path.parent.name: path.parent for path in sorted((folder / "extensions").glob("*/config.json"))}
    unknown = sorted(set(paths) - {extension.name for extension in carried})
    if lost or unknown:
        raise ValueError(
            f"{folder}: "
            + "; ".join(
                [f"holds {part}, for which upstream's LLaVA has no place" for part in lost]
                + [f"was trained with '{name}', which moe_patch has not put into this checkout" for name in unknown]
            )
        )
    found = {
        name: (json.loads((path / "config.json").read_text(encoding="utf-8")), load_file(path / "model.safetensors"))
        for name, path in paths.items()
    }
    projector = load_file(folder / PROJECTOR_FILE) if (folder / PROJECTOR_FILE).is_file() else {}
    return Folder(folder, found, projector, is_whole(folder))


def write_ours(folder: Path, config: Any, extensions: Mapping[str, tuple[dict[str, Any], State]], rest: State) -> None:
    """Write a folder in the layout of llava-extensions.

    Args:
        folder: created if missing.
        config: of the model, with `save_pretrained`.
        extensions: configuration and tensors of each by its name.
        rest: weights of the projector by their name in the bare model.
    """
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    for name, (settings, state) in extensions.items():
        target = folder / "extensions" / name
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, target / "model.safetensors")
    if rest:
        save_file({key: tensor.contiguous() for key, tensor in rest.items()}, folder / PROJECTOR_FILE)
    config.save_pretrained(folder)


def is_projector(name: str) -> bool:
    """True for weights of the projector and the image newline, by their name."""
    return bool({"mm_projector", "image_newline"}.intersection(name.split(".")))

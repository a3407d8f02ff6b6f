"""What lies in a checkpoint folder, found from the files' content and never from words in a path.

Covers our own layout and upstream's: full weights, LoRA adapters with `non_lora_trainables.bin`, and a projector
alone. Pickled code is never run: `.bin` files are read by torch's weights-only loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from llava.errors import CheckpointError
from llava.runtime.files import read_json, refuse_pointers
from llava.runtime.weights.completeness import (
    FILE_LIST,
    RUN_FILE,
    TOWER_FOLDER,
    check_file_list,
    check_run_record,
    require,
)
from llava.runtime.weights.tensors import check_numbers, read_tensors
from llava.runtime.weights.weight_files import WEIGHT_FILES, first_file, listing, weight_files

SHARDS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
"""Names of the files that such an index lists."""
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
NON_LORA_FILE = "non_lora_trainables.bin"
EXTENSIONS_FOLDER = "extensions"
NEWLINE = "image_newline"
TOWER_MARKERS = ("config.json", "open_clip_config.json")
IMAGE_TOKENS_FILE = "image_tokens.safetensors"

TOKEN_TABLE = "model.embed_tokens.weight"
"""Upstream puts the embedding table into a projector file if `<im_start>` and `<im_end>` were trained with it."""

_PEFT_PREFIX = "base_model.model."


def strip_peft_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names relative to the LLaVA model, as `model.mm_projector.0.weight`."""
    return {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class CheckpointContents:
    """What a checkpoint folder holds; absent parts are None or empty.

    Attributes:
        folder: the folder.
        weights: full weights: a file, or the index of several.
        adapter: PEFT adapter weights; `adapter_config.json` lies beside.
        projector: projector weights on their own.
        non_lora: upstream's file of everything trained beside LoRA.
        extensions: folder of each extension by name.
        tower: folder of a vision tower trained along.
        image_tokens: rows of `<im_start>`, `<im_end>` and `<im_patch>`, see `llava/model/image_tokens.py`.
    """

    folder: Path
    weights: Path | None
    adapter: Path | None
    projector: Path | None
    non_lora: Path | None
    extensions: dict[str, Path]
    tower: Path | None
    image_tokens: Path | None

    @property
    def needs_base(self) -> bool:
        """True if the language model's weights have to come from another folder."""
        return self.weights is None


def inspect_checkpoint(folder: str | Path) -> CheckpointContents:
    """Look at a folder.

    Raises:
        CheckpointError: the folder does not exist, has no `config.json`, or nothing that could be loaded.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such checkpoint folder")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json, so it is no checkpoint (found: {listing(folder)})")
    refuse_pointers(folder)
    check_file_list(folder)
    check_run_record(folder)
    contents = CheckpointContents(
        folder=folder,
        weights=first_file(folder, WEIGHT_FILES),
        adapter=first_file(folder, ADAPTER_FILES),
        projector=first_file(folder, PROJECTOR_FILES),
        non_lora=first_file(folder, (NON_LORA_FILE,)),
        extensions={path.name: path for path in sorted((folder / EXTENSIONS_FOLDER).glob("*")) if path.is_dir()},
        tower=folder / TOWER_FOLDER if first_file(folder / TOWER_FOLDER, TOWER_MARKERS) else None,
        image_tokens=first_file(folder, (IMAGE_TOKENS_FILE,)),
    )
    _check_named(contents, read_json(folder / "config.json"))
    parts = (contents.weights, contents.adapter, contents.projector, contents.non_lora, contents.image_tokens)
    if not any(parts) and not contents.extensions:
        raise CheckpointError(f"{folder}: holds no weights of any known kind (found: {listing(folder)})")
    return contents


def has_results(folder: Path) -> bool:
    """True if a folder contains trained weights of any kind."""
    names = (*WEIGHT_FILES, *ADAPTER_FILES, *PROJECTOR_FILES, NON_LORA_FILE)
    return first_file(folder, names) is not None or any((folder / EXTENSIONS_FOLDER).glob("*/model.safetensors"))


def _check_named(contents: CheckpointContents, config: Mapping[str, Any]) -> None:
    """Refuse a folder that lacks a part which one of its files names.

    Raises:
        CheckpointError: names the part, and where it was named.
    """
    folder, config_file = contents.folder, contents.folder / "config.json"
    adapter_config = folder / "adapter_config.json"
    if contents.adapter is not None and not adapter_config.is_file():
        raise CheckpointError(f"{contents.adapter}: there is no adapter_config.json next to it")
    if contents.adapter is None and adapter_config.is_file():
        require(folder / ADAPTER_FILES[0], adapter_config, "describes an adapter", ADAPTER_FILES[1:])
    _check_extensions(contents, config)
    if (folder / TOWER_FOLDER).is_dir() and contents.tower is None:
        raise CheckpointError(f"{folder / TOWER_FOLDER}: contains none of {TOWER_MARKERS}, so it is not a vision tower")
    own = config.get("mm_vision_tower") == TOWER_FOLDER and contents.weights is not None  # else that of the base
    if own and contents.tower is None and (folder / RUN_FILE).is_file():
        require(folder / TOWER_FOLDER / TOWER_MARKERS[0], config_file, "names the tower inside this folder")
    shards = sorted(path for pattern in SHARDS for path in folder.glob(pattern))
    if contents.weights is None and shards:
        index = WEIGHT_FILES[1] if shards[0].suffix == ".safetensors" else WEIGHT_FILES[3]
        raise CheckpointError(f"{folder / index}: is missing, but {shards[0].name} is one of several files of weights")
    apart = contents.projector is not None or contents.non_lora is not None
    if contents.weights is None and not apart:
        if config.get("tune_mm_mlp_adapter"):
            require(folder / PROJECTOR_FILES[0], config_file, "says the projector was trained", PROJECTOR_FILES[1:])
        if contents.adapter is not None and config.get("mm_vision_tower") and not _is_ours(folder):
            require(folder / NON_LORA_FILE, contents.adapter, "comes from a program that always writes both")
    if config.get("use_mm_proj") and config.get("mm_hidden_size") and not config.get("mm_vision_tower"):
        raise CheckpointError(f"{config_file}: describes a projector, but has no 'mm_vision_tower' for it")


def _is_ours(folder: Path) -> bool:
    """True if a run of ours wrote the folder."""
    return (folder / RUN_FILE).is_file() or (folder / FILE_LIST).is_file() or (folder / EXTENSIONS_FOLDER).is_dir()


def _check_extensions(contents: CheckpointContents, config: Mapping[str, Any]) -> None:
    """`extensions` in `config.json` and the folders below `extensions/` must say the same."""
    config_file, root = contents.folder / "config.json", contents.folder / EXTENSIONS_FOLDER
    for path in contents.extensions.values():
        refuse_pointers(path)
        for name in ("config.json", "model.safetensors"):
            require(path / name, path, "is the folder of an extension")
    named = config.get("extensions")
    if named is None:
        return
    if not isinstance(named, dict) or not all(isinstance(each, dict) for each in named.values()):
        raise CheckpointError(f"{config_file}: its 'extensions' is not a table of configurations")
    for name in named:
        if Path(name).name != name:
            raise CheckpointError(f"{config_file}: {name!r} is not the name of an extension")
        require(root / name / "config.json", config_file, f"names the extension '{name}'")
    strange = sorted(set(contents.extensions) - set(named))
    if strange:
        raise CheckpointError(f"{root / strange[0]}: is an extension that {config_file} does not name")


def projector_file(path: str | Path) -> Path:
    """The file that `--pretrain_mm_mlp_adapter` means.

    Args:
        path: a file; or a folder that holds one. Stage 1 writes `mm_projector.safetensors` here and `mm_projector.bin`
            upstream: of the two, the name of either finds the other, so published command lines work on both.

    Raises:
        CheckpointError: there is neither.
    """
    path = Path(path)
    if path.is_file():
        return path
    folder = path if path.is_dir() else path.parent if path.name in PROJECTOR_FILES else None
    found = None if folder is None else first_file(folder, PROJECTOR_FILES)
    if found is None:
        raise CheckpointError(f"{path}: no such file, and none of {PROJECTOR_FILES} in its place")
    return found


def projector_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the tensors in upstream's file of everything trained next to LoRA: projector and image newline."""
    parts = {"mm_projector", NEWLINE}
    return {name: tensor for name, tensor in tensors.items() if parts.intersection(name.split("."))}


def read_projector(path: Path) -> dict[str, Tensor]:
    """Weights of projector and image newline by their name in the model; upstream's token rows are left out.

    Raises:
        CheckpointError: a tensor in the file belongs to something else.
    """
    marker = "mm_projector."
    tensors: dict[str, Tensor] = {}
    for name, tensor in read_tensors(path).items():
        if name == TOKEN_TABLE:
            continue
        _, found, rest = name.partition(marker)
        if found:
            tensors[f"model.{marker}{rest}"] = tensor
        elif name.rpartition(".")[2] == NEWLINE:
            tensors[f"model.{NEWLINE}"] = tensor
        else:
            raise CheckpointError(f"{path}: '{name}' is no weight of a projector")
    check_numbers(tensors, path)
    return tensors


def weight_file_names(folder: Path) -> str:
    """The files with the full weights of a folder, for messages."""
    return ", ".join(path.name for path in weight_files(first_file(folder, WEIGHT_FILES)))

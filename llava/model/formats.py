"""What lies in a checkpoint folder, found from the files' content and never from words in a path.

Covers our own layout and upstream's: full weights, LoRA adapters with `non_lora_trainables.bin`, and a projector
alone. Pickled code is never run: `.bin` files are read by torch's weights-only loader.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from llava.errors import CheckpointError
from llava.runtime.files import refuse_pointer, refuse_pointers
from llava.runtime.weights.completeness import RECORD_FILE, RUN_FILE, check_record, check_run_record, require
from llava.runtime.weights.tensors import Entry, check_numbers, describe, read_tensors
from llava.runtime.weights.torch_files import load_plain
from llava.utils import read_json

WEIGHT_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Full weights, one file or the index of several, in the order in which transformers looks for them."""
SHARDS = ("model-*-of-*.safetensors", "pytorch_model-*-of-*.bin")
"""Names of the files that such an index lists."""
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
NON_LORA_FILE = "non_lora_trainables.bin"
EXTENSIONS_FOLDER = "extensions"
NEWLINE = "image_newline"
TOWER_FOLDER = "vision_tower"
TOWER_MARKERS = ("config.json", "open_clip_config.json")
IMAGE_TOKENS_FILE = "image_tokens.safetensors"

TOKEN_TABLE = "model.embed_tokens.weight"
"""Upstream puts the embedding table into a projector file if `<im_start>` and `<im_end>` were trained with it."""

_PEFT_PREFIX = "base_model.model."


def strip_peft_prefix(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names relative to the LLaVA model, as `model.mm_projector.0.weight`."""
    return {name.removeprefix(_PEFT_PREFIX): tensor for name, tensor in tensors.items()}


def _first(folder: Path, names: tuple[str, ...]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_file()), None)


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
        raise CheckpointError(f"{folder}: has no config.json, so it is no checkpoint (found: {_listing(folder)})")
    refuse_pointers(folder)
    check_record(folder)
    check_run_record(folder)
    contents = CheckpointContents(
        folder=folder,
        weights=_first(folder, WEIGHT_FILES),
        adapter=_first(folder, ADAPTER_FILES),
        projector=_first(folder, PROJECTOR_FILES),
        non_lora=_first(folder, (NON_LORA_FILE,)),
        extensions={path.name: path for path in sorted((folder / EXTENSIONS_FOLDER).glob("*")) if path.is_dir()},
        tower=folder / TOWER_FOLDER if _first(folder / TOWER_FOLDER, TOWER_MARKERS) else None,
        image_tokens=_first(folder, (IMAGE_TOKENS_FILE,)),
    )
    _check_named(contents, read_json(folder / "config.json"))
    parts = (contents.weights, contents.adapter, contents.projector, contents.non_lora, contents.image_tokens)
    if not any(parts) and not contents.extensions:
        raise CheckpointError(f"{folder}: holds no weights of any known kind (found: {_listing(folder)})")
    return contents


def has_results(folder: Path) -> bool:
    """True if a folder contains trained weights of any kind."""
    names = (*WEIGHT_FILES, *ADAPTER_FILES, *PROJECTOR_FILES, NON_LORA_FILE)
    return _first(folder, names) is not None or any((folder / EXTENSIONS_FOLDER).glob("*/model.safetensors"))


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
    if config.get("mm_vision_tower") == TOWER_FOLDER and contents.tower is None and (folder / RUN_FILE).is_file():
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
    return (folder / RUN_FILE).is_file() or (folder / RECORD_FILE).is_file() or (folder / EXTENSIONS_FOLDER).is_dir()


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
    found = None if folder is None else _first(folder, PROJECTOR_FILES)
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


def weight_files(weights: Path | None) -> list[Path]:
    """The files of full weights, each there and of full length.

    Args:
        weights: a file of weights or the index of several; None for none.

    Raises:
        CheckpointError: the index names a file that is missing or lies elsewhere, or a file is damaged.
    """
    if weights is None:
        return []
    if weights.suffix != ".json":
        files = [weights]
    else:
        table = read_json(weights).get("weight_map")
        if not isinstance(table, dict) or not table or not all(isinstance(name, str) for name in table.values()):
            raise CheckpointError(f"{weights}: has no 'weight_map' of file names, so it is not an index of weights")
        names = sorted(set(table.values()))
        elsewhere = [name for name in names if Path(name).name != name]
        if elsewhere:
            raise CheckpointError(f"{weights}: names files outside its folder: {elsewhere}")
        missing = [name for name in names if not (weights.parent / name).is_file()]
        if missing:
            raise CheckpointError(f"{weights}: names {len(names)} files, of which {missing} are missing")
        if not isinstance(read_json(weights).get("metadata"), dict):  # without it transformers reads no index
            raise CheckpointError(f"{weights}: its 'metadata' is missing or not an object")
        files = [weights.parent / name for name in names]
    for path in files:
        _check_length(path)
    return files


def check_weight_files(folder: str | Path) -> None:
    """Look at the weights in a folder here that transformers is about to read; others are left to it.

    Raises:
        CheckpointError: as `weight_files`.
    """
    weight_files(_first(Path(folder), WEIGHT_FILES))


def weight_file_names(folder: Path) -> str:
    """The files with the full weights of a folder, for messages."""
    return ", ".join(path.name for path in weight_files(_first(folder, WEIGHT_FILES)))


def described_weights(weights: Path | None) -> dict[str, Entry]:
    """What the files of full weights contain, values not read.

    Raises:
        CheckpointError: as `weight_files`, or the index names a tensor that its file does not have.
    """
    entries = describe(weight_files(weights))
    if weights is not None and weights.suffix == ".json":
        for name, file in read_json(weights)["weight_map"].items():
            if name not in entries or entries[name].path.name != file:
                raise CheckpointError(f"{weights.parent / file}: lacks '{name}', which {weights} says is in it")
    return entries


def weights_of(folder: Path) -> dict[str, Entry]:
    """As `described_weights`, of a folder; nothing if it has no full weights."""
    return described_weights(_first(folder, WEIGHT_FILES))


def check_base(folder: str | Path) -> None:
    """Look at the weights of a base that is a folder here; one on a model hub is left to transformers.

    Raises:
        CheckpointError: it holds no weights, or as `weight_files`.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        return
    weights = _first(folder, WEIGHT_FILES)
    if weights is None:
        raise CheckpointError(f"{folder}: holds none of {WEIGHT_FILES}, so it is no base (found: {_listing(folder)})")
    check_record(folder)
    refuse_pointers(folder)
    weight_files(weights)


def _check_length(path: Path) -> None:
    """Refuse a file that was cut off, and a pickle that asks for more than tensors; most of it is not read."""
    try:
        if path.suffix == ".safetensors":
            refuse_pointer(path)
            with safe_open(path, "pt"):
                return
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: is damaged or was cut off ({error})") from error
    load_plain(path, mapped=True)


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "an empty folder"

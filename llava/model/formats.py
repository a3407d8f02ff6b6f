"""What lies in a checkpoint folder, found from the files' content and never from words in a path.

Covers our own layout and upstream's: full weights, LoRA adapters with `non_lora_trainables.bin`, and a projector
alone. Pickled code is never run: `.bin` files are read by torch's weights-only loader.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from llava.errors import CheckpointError
from llava.torch_files import load_plain
from llava.utils import read_json

WEIGHT_FILES = (
    *("model.safetensors", "model.safetensors.index.json"),
    *("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
"""Full weights, one file or the index of several, in the order in which transformers looks for them."""
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


def read_tensors(path: Path, inner: str | None = None) -> dict[str, Tensor]:
    """Tensors of one file, safetensors or torch's format, told apart by their first bytes.

    Args:
        path: the file.
        inner: if the file holds a table under this name, that one is read.

    Raises:
        CheckpointError: the file is missing, damaged, or holds anything else than named tensors.
    """
    try:
        with path.open("rb") as file:
            head = file.read(9)
        if len(head) == 9 and head[8:9] == b"{":
            return load_file(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error})") from error
    except Exception as error:  # damaged files surface as many kinds of error, all meaning the same here
        raise CheckpointError(f"{path}: is damaged or no file of tensors ({error})") from error
    content = load_plain(path)
    if inner is not None and isinstance(content, dict) and isinstance(content.get(inner), dict):
        content = content[inner]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise CheckpointError(f"{path}: holds something else than a table of named tensors")
    return content


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
    extension_root = folder / EXTENSIONS_FOLDER
    contents = CheckpointContents(
        folder=folder,
        weights=_first(folder, WEIGHT_FILES),
        adapter=_first(folder, ADAPTER_FILES),
        projector=_first(folder, PROJECTOR_FILES),
        non_lora=_first(folder, (NON_LORA_FILE,)),
        extensions={path.parent.name: path.parent for path in sorted(extension_root.glob("*/config.json"))},
        tower=folder / TOWER_FOLDER if _first(folder / TOWER_FOLDER, TOWER_MARKERS) else None,
        image_tokens=_first(folder, (IMAGE_TOKENS_FILE,)),
    )
    if contents.adapter is not None and not (folder / "adapter_config.json").is_file():
        raise CheckpointError(f"{contents.adapter}: there is no adapter_config.json beside it")
    parts = (contents.weights, contents.adapter, contents.projector, contents.non_lora, contents.image_tokens)
    if not any(parts) and not contents.extensions:
        raise CheckpointError(f"{folder}: holds no weights of any known kind (found: {_listing(folder)})")
    return contents


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
        if not isinstance(table, dict) or not table:
            raise CheckpointError(f"{weights}: has no 'weight_map', so it is no index of weights")
        names = sorted(set(table.values()))
        elsewhere = [name for name in names if Path(name).name != name]
        if elsewhere:
            raise CheckpointError(f"{weights}: names files outside its folder: {elsewhere}")
        missing = [name for name in names if not (weights.parent / name).is_file()]
        if missing:
            raise CheckpointError(f"{weights}: names {len(names)} files, of which {missing} are missing")
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
    weight_files(weights)


def _check_length(path: Path) -> None:
    """Refuse a file that was cut off, and a pickle that asks for more than tensors; most of it is not read."""
    try:
        with path.open("rb") as file:
            is_zip = file.read(2) == b"PK"
        if path.suffix == ".safetensors":
            with safe_open(path, "pt"):
                return
        if is_zip and not zipfile.is_zipfile(path):
            raise CheckpointError(f"{path}: is damaged or was cut off")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: is damaged or was cut off ({error})") from error
    load_plain(path, mapped=True)


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "") if names else "an empty folder"

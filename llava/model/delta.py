"""The difference between a LLaVA and the language model that it was made from, and putting the two together again.

Some weights may be passed on only as such a difference. Used by `make_delta` and `apply_delta`.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import save_torch_state_dict
from torch import Tensor

from llava.errors import CheckpointError
from llava.model.formats import NEWLINE, inspect_checkpoint, read_tensors, weight_file_names
from llava.model.language_model.backbones import backbone_class, load_config
from llava.runtime.output import new_path
from llava.runtime.tokenizer import load_tokenizer
from llava.runtime.weights.base_weights import check_fit, check_generation
from llava.runtime.weights.completeness import FILE_LIST
from llava.runtime.weights.derived import check_frequencies, is_derived
from llava.runtime.weights.tensors import check_numbers
from llava.runtime.weights.weight_files import WEIGHT_FILES, weight_files, weights_of

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
"""May have more rows than the base's: tokens were added behind."""

OWN_PARTS = ("model.mm_projector.", "model.vision_tower.", f"model.{NEWLINE}")
"""What a LLaVA has and its base has not: part of the difference as it is."""

NOT_COPIED = (*WEIGHT_FILES, FILE_LIST)
"""Indexes and the record of `other`, which do not describe what is written."""

Combine = Callable[[Tensor, Tensor], Tensor]


def _weights(folder: Path) -> dict[str, Tensor]:
    contents = inspect_checkpoint(folder)
    if contents.weights is None:
        raise CheckpointError(f"{folder}: holds none of {WEIGHT_FILES}")
    tensors: dict[str, Tensor] = {}
    for path in weight_files(contents.weights):
        found = read_tensors(path)
        check_numbers({name: tensor for name, tensor in found.items() if tensor.is_floating_point()}, path)
        tensors |= found
    return {name: tensor for name, tensor in tensors.items() if not is_derived(name)}  # `_check_files` compares them


def _check_files(folder: Path, difference: bool) -> None:
    """Refuse a folder whose other files are damaged, or whose weights are not those that its configuration asks for.

    They are copied as they are, so nobody else would notice before the result is loaded.

    Args:
        folder: of a model, or of the difference of two.
        difference: which of the two.

    Raises:
        CheckpointError: names the file.
    """
    backbone, config = backbone_class(folder), load_config(folder)
    check_generation(folder)
    entries = weights_of(folder)
    check_fit(backbone, config, entries, folder)
    check_frequencies(backbone, config, entries, difference)
    if any(folder.glob("tokenizer*")):
        load_tokenizer(folder)


def combine(base: Path, other: Path, output: Path, operation: Combine, difference: bool = False) -> Path:
    """Combine each weight of `other` with that of `base`, and write the result with the other files of `other`.

    Args:
        base: folder of the language model.
        other: folder of a LLaVA or of a difference.
        output: folder to write.
        operation: of (other, base), both fp32; the result is rounded to the dtype in `other`.
        difference: `other` is a difference.

    Returns:
        The folder written. It appears whole or not at all.

    Raises:
        CheckpointError: the two do not belong together, or `output` exists already.
    """
    with new_path(output, [base, other]) as folder:
        _check_files(base, difference=False)
        _check_files(other, difference)
        ours, theirs = _weights(other), _weights(base)
        _check(ours, theirs, base, other)
        result = {name: tensor.clone() for name, tensor in ours.items()}
        for name, tensor in theirs.items():
            rows = result[name][: len(tensor)]
            rows.copy_(operation(rows.float(), tensor.float()))
        folder.mkdir()
        save_torch_state_dict(result, folder, metadata={"format": "pt"})
        for path in other.iterdir():
            if path.is_dir() and not path.name.startswith("checkpoint-"):
                shutil.copytree(path, folder / path.name)
            elif path.is_file() and path.suffix not in (".bin", ".safetensors") and path.name not in NOT_COPIED:
                shutil.copyfile(path, folder / path.name)
    return output


def _check(ours: dict[str, Tensor], theirs: dict[str, Tensor], base: Path, other: Path) -> None:
    """Every weight must have its partner of the same shape."""
    lacking = sorted(set(theirs) - set(ours))
    strange = sorted(name for name in set(ours) - set(theirs) if not name.startswith(OWN_PARTS))
    if lacking or strange:
        raise CheckpointError(
            f"{other} ({weight_file_names(other)}) and {base} ({weight_file_names(base)}) do not belong together: the "
            f"first lacks {lacking[:3]}, the second {strange[:3]}"
        )
    for name, tensor in theirs.items():
        grown = name in TABLES and len(ours[name]) > len(tensor) and ours[name].shape[1:] == tensor.shape[1:]
        if ours[name].shape != tensor.shape and not grown:
            raise CheckpointError(
                f"'{name}' has shape {tuple(ours[name].shape)} in {other} and {tuple(tensor.shape)} in {base}"
            )
        for folder, weight in ((other, ours[name]), (base, tensor)):
            if not weight.is_floating_point():
                raise CheckpointError(
                    f"{folder}: '{name}' is {weight.dtype}; only floating-point weights have differences"
                )

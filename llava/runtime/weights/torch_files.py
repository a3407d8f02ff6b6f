"""Files of `torch.save`, read or checked without running what their pickle may ask for.

Everything that this project opens itself goes through torch's weights-only reader. DeepSpeed opens its part of a
checkpoint with the full unpickler, which runs any code that a file names: those files are read here first, by the same
reader, which makes tensors, plain values and the few classes of `deepspeed_classes`, and refuses all else.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from llava.errors import CheckpointError
from llava.runtime.files import check_torch_file

SUFFIXES = (".pt", ".pth", ".bin")
"""What libraries call files of `torch.save` in a checkpoint."""

WEIGHT_PATTERNS = ("pytorch_model*.bin", "adapter_model.bin")
"""Names of weights in torch's format: of transformers, in one file or several, and of PEFT."""

NEVER_READ = ("training_args.bin",)
"""Written by the Trainer for people: a pickled object, which no program of this project and no library opens."""

TAG_FILES = ("latest", "latest_universal")
"""Where DeepSpeed keeps the name of the folder that it resumes from."""


def load_plain(path: Path, classes: Sequence[Any] = (), *, mapped: bool = False) -> Any:
    """Content of a file of `torch.save` on the CPU, made of tensors, plain values and `classes` alone.

    Args:
        path: the file.
        classes: further classes that its pickle may name; they must do nothing when they are made.
        mapped: leave tensors in the file until they are used; files of torch before 1.6 are read all the same.

    Raises:
        CheckpointError: the file is missing, damaged, a Git LFS pointer, or asks for anything else; names the file and
            what it asks for.
    """
    check_torch_file(path)
    with torch.serialization.safe_globals(list(classes)):
        try:
            # Files of torch before 1.6 are no zip archives and cannot be mapped.
            mmap = mapped and zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
        except Exception as error:  # damaged files surface as many kinds of error, all meaning the same here
            asked = _foreign_names(path)
            reason = f"it asks for {', '.join(asked[:3])}" if asked else type(error).__name__
            raise CheckpointError(
                f"{path}: is damaged or holds more than tensors and plain values ({reason}). Nothing of it was loaded, "
                "because loading it could run any code; get the file again from where it was written"
            ) from error


def _foreign_names(path: Path) -> list[str]:
    """What the pickle of a file asks for beyond tensors and plain values, as far as it can be told."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:  # for a message: a damaged file, or one of the old format
        return []


def random_state_classes() -> list[Any]:
    """What the saved state of numpy's random generator is made of."""
    return [np._core.multiarray._reconstruct, np.ndarray, np.dtype, type(np.dtype(np.uint32))]


def deepspeed_classes() -> list[Any]:
    """The classes in DeepSpeed's own files: an enumeration, an address in a tensor and two loss scales, plain data."""
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    return [ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler]


def torch_files(folder: Path) -> Iterator[Path]:
    """Files of `torch.save` in a folder and in all below it, through links as well, each once."""
    seen: set[Path] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = Path(parent).resolve()
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        yield from (Path(parent) / name for name in sorted(names) if name.endswith(SUFFIXES) and name not in NEVER_READ)


def check_weights(folder: Path) -> None:
    """Read the weights in torch's format in a folder that transformers or PEFT is about to load; tensors stay there.

    Raises:
        CheckpointError: as `load_plain`.
    """
    for pattern in WEIGHT_PATTERNS:
        for path in sorted(folder.glob(pattern)):
            load_plain(path, mapped=True)


def check_training_state(folder: Path, deepspeed: bool) -> None:
    """Read every file of `torch.save` in a checkpoint that a run is about to resume from, before anything opens it.

    Args:
        folder: the checkpoint.
        deepspeed: DeepSpeed wrote it.

    Raises:
        CheckpointError: a file is damaged or could run code, or DeepSpeed would look elsewhere; names the file.
    """
    if deepspeed:
        _check_tags(folder)
    classes = [*random_state_classes(), *(deepspeed_classes() if deepspeed else ())]
    for path in torch_files(folder):
        load_plain(path, classes, mapped=True)


def _check_tags(folder: Path) -> None:
    """What DeepSpeed resumes from lies in the checkpoint itself, where `check_training_state` looks."""
    if not (folder / TAG_FILES[0]).is_file():
        raise CheckpointError(f"{folder}: has no file '{TAG_FILES[0]}', which says where DeepSpeed's state is")
    for path in (folder / name for name in TAG_FILES if (folder / name).is_file()):
        tag = path.read_text(encoding="utf-8", errors="replace").strip()
        if not re.fullmatch(r"\w[\w.-]*", tag) or not (folder / tag).is_dir():
            raise CheckpointError(f"{path}: names '{tag[:80]}', which is not a folder of this checkpoint")

"""Which weights an evaluation used, and which data set a run: fingerprints that are stored with their results."""

from __future__ import annotations

import hashlib
from pathlib import Path

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pth"})
WEIGHT_FOLDERS = ("*", "extensions/*/*", "vision_tower/*")
"""Where a checkpoint folder keeps weights; `checkpoint-N` below it are checkpoints of their own."""

SAMPLE_BYTES = 1 << 20

SAVED_ROOTS = ("state.json", "dataset_dict.json")
SAVED_TEXTS = frozenset({*SAVED_ROOTS, "dataset_info.json"})
"""Files of a folder that `save_to_disk` of `datasets` wrote; one of the former is in the folder itself."""


def weights_fingerprint(checkpoint: str | Path | None) -> str | None:
    """A digest that changes when the weights in a checkpoint change; copies of it share it.

    Reads the size, the first and the last MiB of each weight file, so that it is instant for a model of any size. A
    file that `torch.save` wrote ends with a checksum of every tensor.

    Args:
        checkpoint: folder, or a file of weights.

    Returns:
        16 hexadecimal digits, or None if there is no such file or folder (the name of a model on a hub).
    """
    if checkpoint is None or not Path(checkpoint).exists():
        return None
    digest = hashlib.sha256()
    folder = Path(checkpoint)
    found = {folder} if folder.is_file() else {path for pattern in WEIGHT_FOLDERS for path in folder.glob(pattern)}
    for path in sorted(path for path in found if path.is_file() and (path == folder or path.suffix in WEIGHT_SUFFIXES)):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(SAMPLE_BYTES, size - SAMPLE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]


def saved_fingerprint(folder: Path) -> str | None:
    """A digest of a folder of `datasets`; None for anything else.

    Reads its descriptions, in which `datasets` keeps a fingerprint of the content, and the sizes of its Arrow files.
    """
    if not any((folder / name).is_file() for name in SAVED_ROOTS):
        return None
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.name in SAVED_TEXTS or path.suffix == ".arrow":
            digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size}\n".encode())
            digest.update(path.read_bytes() if path.name in SAVED_TEXTS else b"")
    return digest.hexdigest()[:16]

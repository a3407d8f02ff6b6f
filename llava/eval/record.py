"""Which weights an evaluation used: a fingerprint that is stored beside its results."""

from __future__ import annotations

import hashlib
from pathlib import Path

WEIGHT_SUFFIXES = frozenset({".safetensors", ".bin", ".pth"})
WEIGHT_FOLDERS = ("*", "extensions/*/*", "vision_tower/*")
"""Where a checkpoint folder keeps weights; `checkpoint-N` below it are checkpoints of their own."""

SAMPLE_BYTES = 1 << 20


def weights_fingerprint(folder: str | Path | None) -> str | None:
    """A digest that changes when the weights in a checkpoint folder change; copies of a folder share it.

    Reads the size, the first and the last MiB of each weight file, so that it is instant for a model of any size.

    Returns:
        16 hexadecimal digits, or None if `folder` is no local folder (the name of a model on a hub).
    """
    if folder is None or not Path(folder).is_dir():
        return None
    digest = hashlib.sha256()
    found = {path for pattern in WEIGHT_FOLDERS for path in Path(folder).glob(pattern)}
    for path in sorted(path for path in found if path.suffix in WEIGHT_SUFFIXES and path.is_file()):
        size = path.stat().st_size
        digest.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(SAMPLE_BYTES))
            file.seek(max(SAMPLE_BYTES, size - SAMPLE_BYTES))
            digest.update(file.read())
    return digest.hexdigest()[:16]

"""Tokenized data sets, cached by content, and their batches.

The name of a cache file is a hash of the data file, the tokenizer and the length, so that a changed file, another
tokenizer or another length never reads a stale cache (the original's name is made of the file's name and the length).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from hydralora.text.samples import IGNORED, Example, read_samples, tokenize
from llava.errors import FlagError
from llava.runtime.output import replacing

CACHE_FOLDER = ".tokenized"
WITHOUT_EFFECT = frozenset({"name_or_path", "vocab_file", "tokenizer_file", "local_files_only", "model_max_length"})
"""Settings of a tokenizer that say where it lies, or that tokenizing without truncation does not read."""

HELD_OUT = frozenset({"test", "val", "valid", "validation", "dev", "eval", "evaluation"})
"""Words in the name of a file that hold data back from training, unless "train" is one too."""

FORMAT = 2
"""Part of the name of a cache file; to be raised when its meaning changes."""


class InstructionDataset(Dataset[Example]):
    """Tokenized records."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = list(examples)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each record."""
        return [len(example.input_ids) for example in self.examples]

    def split(self, share: float, seed: int) -> tuple[InstructionDataset, InstructionDataset]:
        """Two parts, the second with `share` of the records (at least one), drawn by `seed`.

        Raises:
            FlagError: one part would be empty.
        """
        count = max(1, round(share * len(self)))
        if not 0 < share < 1 or count >= len(self):
            raise FlagError(f"--validation_split_percentage {share} of {len(self)} records leaves nothing to train on")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed)).tolist()
        first, second = sorted(order[count:]), sorted(order[:count])
        return InstructionDataset([self[i] for i in first]), InstructionDataset([self[i] for i in second])


def training_files(
    dataset_dir: str | None, train_file: str | None, validation_file: str | None, include_held_out: bool = False
) -> list[Path]:
    """Files to train on: `train_file`, or every `.json` and `.jsonl` in `dataset_dir` but the validation file, by name.

    Files that are named as test or validation data are left out too, unless `include_held_out`.

    Raises:
        FlagError: there is none.
    """
    if train_file is not None:
        return [Path(train_file)]
    folder = Path(dataset_dir or ".")
    left_out = set() if include_held_out else set(held_out_files(dataset_dir, validation_file))
    files = [path for path in _data_files(folder, validation_file) if path not in left_out]
    if not files:
        names = sorted(path.name for path in left_out)
        more = f"; --include_held_out True trains on {names}" if names else ""
        raise FlagError(f"--dataset_dir {folder}: has no .json file to train on besides the validation file{more}")
    return files


def held_out_files(dataset_dir: str | None, validation_file: str | None) -> list[Path]:
    """Files beside the validation file that are not for training, by their names: `test.json`, `mmlu_val.json`."""
    files = _data_files(Path(dataset_dir or "."), validation_file)
    words = {path: set(re.split(r"[^a-z0-9]+", path.stem.lower())) for path in files}
    return [path for path in files if words[path] & HELD_OUT and "train" not in words[path]]


def _data_files(folder: Path, validation_file: str | None) -> list[Path]:
    validation = None if validation_file is None else Path(validation_file).resolve()
    found = sorted(path for pattern in ("*.json", "*.jsonl") for path in folder.glob(pattern))
    return [path for path in found if path.resolve() != validation]


def cache_name(path: Path, tokenizer: Any, max_length: int, chat: bool = False) -> str:
    """Name of the cache file of a data file, from its content; the other arguments are those of `tokenize`."""
    digest = hashlib.sha256(path.read_bytes())
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    options = {name: value for name, value in tokenizer.init_kwargs.items() if name not in WITHOUT_EFFECT}
    form = [chat, tokenizer.chat_template, type(tokenizer).__name__, sorted(options.items()), vocabulary]
    settings = [FORMAT, max_length, tokenizer.eos_token, *form]
    digest.update(json.dumps(settings, default=str).encode())
    return f"{path.stem}-{digest.hexdigest()[:32]}.safetensors"


def load_examples(
    path: Path,
    tokenizer: Any,
    max_length: int,
    cache_dir: str | Path | None = None,
    overwrite: bool = False,
    chat: bool = False,
) -> list[Example]:
    """Tokenized records of a file, from its cache if that has been made of the very same content.

    Args:
        path: JSON list or JSON lines of records.
        tokenizer: tokenizer of the model.
        max_length: longest sequence in tokens.
        cache_dir: where the cache lies; None: `.tokenized` beside the file.
        overwrite: rebuild the cache.
        chat: instructions by the tokenizer's chat template too.

    Raises:
        BadSampleError: a record is malformed.
        FlagError: the cache cannot be written.
    """
    cache = Path(cache_dir or path.parent / CACHE_FOLDER) / cache_name(path, tokenizer, max_length, chat)
    if cache.is_file() and not overwrite:
        return _unpack(load_file(cache))
    examples = tokenize(read_samples(path), tokenizer, max_length, chat)
    with replacing(cache) as partial:
        save_file(_pack(examples), partial)
    return examples


def _pack(examples: Sequence[Example]) -> dict[str, Tensor]:
    ids = [torch.tensor(example.input_ids, dtype=torch.int32) for example in examples]
    later = [(row, *span) for row, example in enumerate(examples) for span in example.asked_later]
    tasks = list(dict.fromkeys(example.task for example in examples))
    number = {task: place for place, task in enumerate(tasks)}
    return {
        "input_ids": torch.cat(ids) if ids else torch.empty(0, dtype=torch.int32),
        "lengths": torch.tensor([len(each) for each in ids], dtype=torch.int64),
        "source_lengths": torch.tensor([example.source_length for example in examples], dtype=torch.int64),
        "asked_later": torch.tensor(later, dtype=torch.int64).view(-1, 3),  # row, from, to
        "tasks": torch.tensor([number[example.task] for example in examples], dtype=torch.int64),
        "task_names": torch.tensor(list(json.dumps(tasks).encode()), dtype=torch.uint8),
    }


def _unpack(tensors: dict[str, Tensor]) -> list[Example]:
    ids = tensors["input_ids"].split(tensors["lengths"].tolist())
    sources, tasks = tensors["source_lengths"].tolist(), tensors["tasks"].tolist()
    names = json.loads(bytes(tensors["task_names"].tolist()))
    later: dict[int, list[tuple[int, int]]] = {}
    for row, start, end in tensors["asked_later"].tolist():
        later.setdefault(row, []).append((start, end))
    return [
        Example(each.tolist(), source, names[task], tuple(later.get(row, ())))
        for row, (each, source, task) in enumerate(zip(ids, sources, tasks, strict=True))
    ]


class InstructionCollator:
    """Pads examples on the right.

    Args:
        pad_id: id in place of padding.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, examples: Sequence[Example]) -> dict[str, Tensor | list[int | str]]:
        """`input_ids`, `labels` (-100 at source and padding) and `attention_mask`, (B, T) int64, and `task_types`.

        These are B numbers or texts for statistics alone, no tensor, so that nobody waits for a device to read them.
        """
        ids = [torch.tensor(example.input_ids) for example in examples]
        labels = [torch.tensor(example.labels) for example in examples]
        return {
            "input_ids": pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORED),
            "attention_mask": pad_sequence([torch.ones_like(each) for each in ids], batch_first=True),
            "task_types": [example.task for example in examples],
        }

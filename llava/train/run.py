"""One training run before its first step: options, tokenizer, model, data and Trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from llava.data.dataset import LazySupervisedDataset
from llava.data.streams.dataset import StreamedDataset
from llava.train.llava_trainer import LLaVATrainer
from llava.train.options import RunArguments


@dataclass
class Run:
    """Everything that a run is made of, before its first step."""

    args: RunArguments
    tokenizer: Any
    model: nn.Module
    dataset: LazySupervisedDataset | StreamedDataset
    trainer: LLaVATrainer

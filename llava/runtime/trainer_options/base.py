"""Options of transformers' Trainer as every training program here takes them: checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
import transformers

from llava.runtime.options import CHANGED_HELP, option
from llava.runtime.ranges import Range
from llava.runtime.trainer_options.check import (
    launcher_problems,
    option_problems,
    trial_problems,
    warn_of_unknown_fields,
)
from llava.runtime.trainer_options.row import Table
from llava.runtime.trainer_options.table import TABLE
from llava.runtime.values import refuse, value_problems
from llava.runtime.zero import zero_settings


@dataclass
class CheckedTrainingArguments(transformers.TrainingArguments):
    """transformers' `TrainingArguments` without the values that a program does not support.

    Attributes:
        table: what becomes of each of transformers' options in the program.
        ranges: what the numbers of the program's own options may be.

    Raises:
        FlagError: lists every option that is refused, with the reason and what to do instead.
    """

    table: ClassVar[Table] = TABLE
    ranges: ClassVar[Mapping[str, Range]] = {}

    remove_unused_columns: bool = option("drop columns that the model does not take; does not apply here", False)
    resume_changed: bool = option(CHANGED_HELP, False)

    def __post_init__(self) -> None:
        """Refuse what cannot be carried out, and resolve `--deepspeed` before transformers reads it."""
        warn_of_unknown_fields()
        refuse(value_problems(self, self.ranges) + option_problems(self, self.table) + launcher_problems())
        self.deepspeed = zero_settings(self)
        super().__post_init__()
        refuse(trial_problems(self))

    @property
    def device(self) -> torch.device:
        """Device of this process. Accelerate numbers CPUs among several processes, which `torch.load` does not know."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

"""Started by a launcher: several training runs one after another in the same processes, since starting costs most.

Usage: `several_runs.py RUNS.json`, a list of objects: `arguments` for `llava/train/train.py`, and optionally `program`,
another module whose `main` takes them, `copy`, source and target of a folder that is copied first, `killed_at`, the
update at which process 1 is killed, `untargeted`, the process whose rows have no targets while the loss of the others
is computed in chunks of four, or `refused`, a part of the message with which the run has to end.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from llava.constants import IGNORE_INDEX
from llava.data.collator import DataCollatorForSupervisedDataset
from llava.errors import LlavaError
from llava.model import head
from llava.train.llava_trainer import LLaVATrainer


def kill_process_1_at(update: int) -> None:
    """Let process 1 die by SIGKILL in the middle of an update."""
    step = LLaVATrainer.training_step

    def training_step(self: LLaVATrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.args.process_index == 1 and self.state.global_step + 1 == update:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args, **kwargs)

    LLaVATrainer.training_step = training_step  # type: ignore[method-assign]


@contextlib.contextmanager
def untargeted(process: int | None) -> Iterator[None]:
    """Take the targets of one process away, and let the others have several chunks of them."""
    collate = DataCollatorForSupervisedDataset.__call__

    def without(self: DataCollatorForSupervisedDataset, items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        if torch.distributed.get_rank() == process:
            items = [item | {"labels": torch.full_like(item["labels"], IGNORE_INDEX)} for item in items]
        return collate(self, items)

    with contextlib.ExitStack() as stack:
        if process is not None:
            stack.enter_context(mock.patch.object(DataCollatorForSupervisedDataset, "__call__", without))
            stack.enter_context(mock.patch.multiple(head, CHUNK_BYTES=0, CHUNK_STEP=4))
        yield


if __name__ == "__main__":
    for run in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        joined = torch.distributed.is_initialized()
        if "copy" in run:
            if not joined or torch.distributed.get_rank() == 0:
                shutil.copytree(*run["copy"])
            if joined:
                torch.distributed.barrier()
        if "killed_at" in run:
            kill_process_1_at(run["killed_at"])
        program = importlib.import_module(run.get("program", "llava.train.train"))
        if "refused" not in run:
            with untargeted(run.get("untargeted")):
                program.main(run["arguments"])
            continue
        try:
            program.main(run["arguments"])
        except LlavaError as error:
            if run["refused"] not in str(error):
                raise
        else:
            raise AssertionError(f"not refused: {run['arguments']}")

"""How many records a run has, counted before anything is loaded: too few for one batch are none at all."""

from __future__ import annotations

from pathlib import Path

from hydralora.text.dataset import training_files
from hydralora.text.options import RunArguments
from hydralora.text.samples import read_samples
from llava.runtime.values import too_few_rows


def row_problems(args: RunArguments) -> list[str]:
    """Too few records for one batch, where `--dataloader_drop_last` leaves an incomplete one out.

    Raises:
        BadSampleError: a file is malformed.
        FlagError: there is no file.
    """
    data, training = args.data, args.training
    if not training.dataloader_drop_last:
        return []
    evaluation = 0
    if data.validation_file and training.do_eval:
        evaluation = len(read_samples(Path(data.validation_file)))
    train = 0
    if training.do_train:
        train = sum(
            len(read_samples(path))
            for path in training_files(data.dataset_dir, data.train_file, data.validation_file, data.include_held_out)
        )
        if training.do_eval and not data.validation_file:
            evaluation = max(1, round(data.validation_split_percentage * train))
            train -= evaluation
    processes = training.world_size
    found = []
    if training.do_train:
        size = training.per_device_train_batch_size
        found.append(too_few_rows(train, size, processes, "--per_device_train_batch_size"))
    if training.do_eval:
        size = training.per_device_eval_batch_size
        found.append(too_few_rows(evaluation, size, processes, "--per_device_eval_batch_size"))
    return [line for line in found if line is not None]

"""`--streaming True`: what it takes and refuses, and the rows of this process.

A stream has no length, so a run on one ends by `--max_steps`. It never runs out either: every process reads its own
rows pass after pass, and none waits for another that has fewer.
"""

from __future__ import annotations

from llava.data.streams.dataset import may_have_image
from llava.data.streams.sources import Share, open_sources
from llava.data.streams.stream import RowStream
from llava.train.options import RunArguments

EPOCHS = ("save_strategy", "eval_strategy", "logging_strategy")
"""Options that may say when something is done by epochs."""


def stream_problems(args: RunArguments) -> list[str]:
    """Options that a stream contradicts, or that belong to one that is off."""
    data, training = args.data, args.training
    if not data.streaming:
        given = "shuffle_buffer" in args.given
        return ["--shuffle_buffer belongs to --streaming True; add it, or leave it out"] if given else []
    problems = []
    if data.shuffle_buffer < 0:
        problems.append(f"--shuffle_buffer {data.shuffle_buffer}: must be at least 0; 0 keeps the order of each source")
    if training.max_steps <= 0:
        problems.append("--streaming True: how many rows there are is not known; say by --max_steps when the run ends")
    order = "it orders all rows by their lengths, and a stream has not read them"
    grouped = {
        "--group_by_modality_length": training.group_by_modality_length,
        "--train_sampling_strategy group_by_length": training.train_sampling_strategy == "group_by_length",
    }
    problems += [f"{flag} and --streaming True: {order}; leave one of them out" for flag, on in grouped.items() if on]
    if training.train_sampling_strategy == "sequential":
        problems.append(
            "--train_sampling_strategy sequential and --streaming True: a stream keeps the order of each source with "
            "--shuffle_buffer 0; leave the strategy out"
        )
    if training.ignore_data_skip:
        problems.append(
            "--ignore_data_skip True and --streaming True: a stream resumes at its position without opening the images "
            "before it; leave the flag out"
        )
    problems += [
        f"--{name} epoch and --streaming True: a stream has no end at which it would be done; pass steps"
        for name in EPOCHS
        if getattr(training, name) == "epoch"
    ]
    return problems


def stream_of_run(args: RunArguments) -> RowStream:
    """The rows of this process.

    Raises:
        FlagError: a source is missing, cannot be read, or has no row for this process.
    """
    training = args.training
    stream = RowStream(
        open_sources(args.data.data_path or []),
        Share(training.process_index, training.world_size),
        training.seed if training.data_seed is None else training.data_seed,
        args.data.shuffle_buffer,
        **({"keeps": may_have_image} if args.data.requires_image else {}),
    )
    stream.check()
    return stream

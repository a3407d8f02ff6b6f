"""The records of a run, tokenized: what is left out is said, and what could not be trained on is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from hydralora.text.dataset import InstructionDataset, held_out_files, load_examples, training_files
from hydralora.text.messages import OWN, turn_end
from hydralora.text.options import DataArguments, RunArguments
from hydralora.text.samples import Example
from hydralora.text.tasks import asked_tasks, check_tasks, names_of
from llava.errors import FlagError
from llava.runtime.values import refuse, too_few_rows

MOST_NAMED = 5
"""Rows that a message lists."""


def load_data(args: RunArguments, tokenizer: Any) -> tuple[InstructionDataset | None, InstructionDataset | None]:
    """The records to train and to evaluate on; None where nothing is asked for.

    Raises:
        BadSampleError: a record is malformed, or has no task although the run routes by task.
        FlagError: there is nothing to evaluate on, or no file holds a record with something to train on.
    """
    data, training = args.data, args.training
    announce = training.should_log
    train, tasks = None, asked_tasks(args)
    if training.do_train:
        if announce and data.dataset_dir and not data.train_file and not data.include_held_out:
            _say_held_out(data)
        files = training_files(data.dataset_dir, data.train_file, data.validation_file, data.include_held_out)
        train = InstructionDataset(_read(files, data, tokenizer, announce, tasks))
        tasks = names_of(train.examples) if tasks == [] else tasks
    evaluation = None
    if training.do_eval and data.validation_file:
        evaluation = InstructionDataset(_read([Path(data.validation_file)], data, tokenizer, announce, tasks))
    elif training.do_eval:
        if train is None:
            raise FlagError("--do_eval without --do_train needs --validation_file")
        train, evaluation = train.split(data.validation_split_percentage, training.seed)
    if training.dataloader_drop_last:
        _check_batches(train, evaluation, args)
    return train, evaluation


def _say_held_out(data: DataArguments) -> None:
    names = [path.name for path in held_out_files(data.dataset_dir, data.validation_file)]
    if names:
        print(
            f"--dataset_dir {data.dataset_dir}: {', '.join(names)} left out, by the name not for training; "
            "--include_held_out True trains on them too"
        )


def _read(
    files: Sequence[Path], data: DataArguments, tokenizer: Any, announce: bool, tasks: Sequence[str] | None
) -> list[Example]:
    """The examples of files that have a target; with `tasks`, every record must have one of them, or any if []."""
    kept: list[Example] = []
    without: list[str] = []
    cache, overwrite, chat = data.data_cache_dir, data.overwrite_cache, data.chat_template is not None
    for path in files:
        examples = load_examples(path, tokenizer, data.max_seq_length, cache, overwrite, chat)
        if tasks is not None:
            check_tasks(path, examples, tasks)
        kept += [example for example in examples if example.has_target]
        without += [f"{path}, row {row}" for row, example in enumerate(examples) if not example.has_target]
    names = ", ".join(map(str, files))
    rows = "; ".join(without[:MOST_NAMED]) + ("; ..." if len(without) > MOST_NAMED else "")
    if not kept and not without:
        raise FlagError(f"{names}: no records")
    if not kept:
        raise FlagError(
            f"{names}: of none of the {len(without)} records is anything of the answer left within --max_seq_length "
            f"{data.max_seq_length} tokens, so nothing would be trained or evaluated; pass a larger number ({rows})"
        )
    if without and announce:
        print(
            f"{len(without)} of {len(kept) + len(without)} records left out: nothing of the answer is within "
            f"--max_seq_length {data.max_seq_length} ({rows})"
        )
    return kept


def _check_batches(train: InstructionDataset | None, evaluation: InstructionDataset | None, args: RunArguments) -> None:
    """As `counts.row_problems`, of the records that are left."""
    training = args.training
    sizes = [
        (train, training.per_device_train_batch_size, "--per_device_train_batch_size"),
        (evaluation, training.per_device_eval_batch_size, "--per_device_eval_batch_size"),
    ]
    found = [too_few_rows(len(each), size, training.world_size, flag) for each, size, flag in sizes if each is not None]
    refuse([line for line in found if line is not None])


def check_vocabulary(base: nn.Module, tokenizer: Any, examples: Sequence[Example], name: str) -> None:
    """Refuse ids for which the base has no embedding, before a batch holds one.

    Args:
        base: the model.
        tokenizer: of the run.
        examples: all of the run.
        name: of the tokenizer.

    Raises:
        FlagError: names the token, and how many each of the two has.
    """
    rows = base.get_input_embeddings().num_embeddings
    used = {tokenizer.pad_token_id, *(max(example.input_ids, default=0) for example in examples)}
    beyond = sorted(token for token in used if token >= rows)
    if beyond:
        raise FlagError(
            f"--tokenizer_name_or_path {name}: has {len(tokenizer)} tokens, but the base has embeddings for {rows}; "
            f"{tokenizer.convert_ids_to_tokens(beyond[0])!r} (token {beyond[0]}), which the data or its padding uses, "
            "has none. Pass the base's own tokenizer, or enlarge the base by transformers' resize_token_embeddings and "
            "save it with this tokenizer"
        )


def answer_ends(tokenizer: Any, examples: Sequence[Example], chat_template: str | None) -> tuple[list[int], str | None]:
    """The tokens with which answers of the data end, and what to say if some do not end with a token.

    Args:
        tokenizer: of the run.
        examples: all of the run.
        chat_template: value of `--chat_template`.
    """
    text, of_turn = turn_end(tokenizer) if tokenizer.chat_template else ("", None)
    ends = [
        token
        for token in dict.fromkeys((tokenizer.eos_token_id, of_turn))
        if any(token in example.input_ids[example.source_length :] for example in examples)
    ]
    if ends or not tokenizer.chat_template:
        return ends or [tokenizer.eos_token_id], None
    source = "the tokenizer's chat template" if chat_template in (None, OWN) else f"--chat_template {chat_template}"
    return [tokenizer.eos_token_id], (
        f"{source} writes {text!r} behind an answer, which is not an end token of this tokenizer; the model learns to "
        "write it as text, and nothing ends its answers: let the template write the end-of-sequence token, or add "
        f"{text!r} to the base's tokenizer as a special token"
    )

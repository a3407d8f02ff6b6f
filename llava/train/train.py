"""Training a LLaVA from the command line (upstream `llava/train/train.py`).

The order of `main` is the order in which data and weights flow: options, tokenizer, base model, tower and projector,
extensions, LoRA, freezing, data, trainer, checkpoint, summary; `build.py` makes the parts. `--help` lists every option.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from llava.data.collator import DataCollatorForSupervisedDataset
from llava.data.dataset import LazySupervisedDataset
from llava.data.skipped import remove_skipped
from llava.data.streams.dataset import StreamedDataset
from llava.model.formats import has_results
from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.model.language_model.packed_attention import use_packed_attention
from llava.runtime import checkpointing
from llava.runtime.monitoring.stopping import early_stopping
from llava.runtime.program import run_program
from llava.runtime.publishing.access import check_access, destination_of
from llava.runtime.publishing.publish import named
from llava.runtime.resume_check import check_has_state, check_resumable
from llava.runtime.run_record import Resumption, resumption, run_record, write_run_record
from llava.runtime.saving import prepare_folder
from llava.runtime.tokenizer import load_tokenizer
from llava.runtime.zero import join_processes, prepare_resume
from llava.train.arguments import parse_args
from llava.train.build import build_model, check_answer_end, skipped_file, training_data
from llava.train.compilation import compile_model
from llava.train.evaluation.rows import EvaluationRows, NoRows, evaluation_rows
from llava.train.evaluation.scores import examination
from llava.train.inputs import inputs_of
from llava.train.llava_trainer import LLaVATrainer
from llava.train.opened_data import check_data
from llava.train.options import DataArguments, ModelArguments, RunArguments, TrainingArguments
from llava.train.publication import publish_llava
from llava.train.run import Run
from llava.train.steps import say, say_data, say_evaluation, say_packing, say_training
from llava.train.summary import next_command, print_summary

__all__ = ["DataArguments", "ModelArguments", "Run", "TrainingArguments", "build_run", "main", "parse_args"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Parts:
    """What the program of an extension may make in its own way.

    Attributes:
        dataset: makes the training data from options, tokenizer and bare model.
        trainer: makes the Trainer from what `LLaVATrainer` takes.
        next_command: the command that the summary of a finished run ends with.
        evaluation_rows: makes the rows whose loss is measured in evaluations, as `dataset` makes its own.
        model: makes the model from options and tokenizer.
        records: whether a new run writes its `run.json`; not where nothing is trained.
    """

    dataset: Callable[[RunArguments, Any, LlavaForCausalLM], LazySupervisedDataset | StreamedDataset] = training_data
    trainer: Callable[..., LLaVATrainer] = LLaVATrainer
    next_command: Callable[[RunArguments], str] = next_command
    evaluation_rows: Callable[[RunArguments, Any, LlavaForCausalLM], EvaluationRows | NoRows] = evaluation_rows
    model: Callable[[RunArguments, Any, str | None], nn.Module] = build_model
    records: bool = True


USUAL_PARTS = Parts()


def build_run(
    args: RunArguments,
    attn_implementation: str | None = None,
    parts: Parts = USUAL_PARTS,
    resumed: Resumption | None = None,
) -> Run:
    """Everything up to the first step; writes `run.json` of a new run."""
    training = args.training
    questions = examination(args)  # before anything is loaded or written
    if training.should_save and resumed is None and parts.records:
        write_run_record(args)
    set_seed(training.seed)
    tokenizer = load_tokenizer(args.model.model_name_or_path, model_max_length=training.model_max_length)
    check_answer_end(args, tokenizer)
    checkpointing.keep_the_graph(training)
    model = parts.model(args, tokenizer, attn_implementation)
    llava = model.get_base_model() if training.has_adapter else model
    if args.data.packing:
        use_packed_attention(llava)
    compile_model(args, llava)
    dataset = parts.dataset(args, tokenizer, llava)
    say_data(args, dataset)
    say_packing(args, llava)
    rows = parts.evaluation_rows(args, tokenizer, llava)
    say_evaluation(args, len(rows), questions)
    stops = args.evaluation
    callbacks = [
        callback for item in llava.extensions for callback in item.extension.callbacks(llava, item.config, args)
    ]
    trainer = parts.trainer(
        run=args,
        model=model,
        examination=questions,
        train_dataset=dataset,
        eval_dataset=rows,
        data_collator=DataCollatorForSupervisedDataset(tokenizer, llava.splice_planner(args.data.packing)),
        processing_class=tokenizer,
        callbacks=callbacks + early_stopping(stops.early_stopping_patience, stops.early_stopping_threshold),
    )
    trainer.resumption = resumed
    return Run(args, tokenizer, model, dataset, trainer)


def main(
    argv: Sequence[str] | None = None,
    attn_implementation: str | None = None,
    defaults: Mapping[str, Any] | None = None,
) -> Path:
    """Train as the command line says; an output folder that holds checkpoints is resumed.

    Args:
        argv: options; None takes those of the process.
        attn_implementation: used where `--attn_implementation` is not given.
        defaults: values of options that are not given, where they are not the usual ones.

    Returns:
        The output folder, a complete checkpoint.

    Raises:
        LlavaError: a problem with options, data or checkpoints that the user can mend.
    """
    return train(parse_args(argv, defaults=defaults), attn_implementation)


def train(args: RunArguments, attn_implementation: str | None = None, parts: Parts = USUAL_PARTS) -> Path:
    """Train as the options say; see `main`.

    Args:
        args: checked options.
        attn_implementation: as in `main`.
        parts: what is made in another way.
    """
    join_processes(args.training)
    output = Path(args.training.output_dir)
    publishes = args.training.push_to_hub and args.training.process_index == 0
    repository = check_access(destination_of(args.training)) if publishes else ""
    resume_from = args.training.resume_from_checkpoint or (get_last_checkpoint(output) if output.is_dir() else None)
    # What is recorded is what runs: a default of the program counts as if it were given
    args.model.attn_implementation = args.model.attn_implementation or attn_implementation
    changed = args.training.resume_changed
    resumed = resumption(run_record(args), output, resume_from, has_results(output), changed)
    if resume_from is not None:
        check_has_state(Path(resume_from))
    check_data(args)
    if args.training.should_save:
        prepare_folder(output, inputs_of(args))
        if resume_from is None:
            remove_skipped(skipped_file(args))  # an earlier run's list of samples
    if resume_from is not None:
        prepare_resume(args.training, Path(resume_from))
        check_resumable(Path(resume_from), args.training)
    run = build_run(args, attn_implementation, parts, resumed)
    say_training(args, resumed)
    result = run.trainer.train(resume_from_checkpoint=resume_from)
    if args.training.do_eval and args.training.eval_strategy == "no":
        run.trainer.evaluate()
    say(args, "saving", str(output))
    run.trainer.save_model()
    run.trainer.save_state()
    if args.training.should_save:
        print_summary(run, result.metrics, parts.next_command(args))
    if publishes:
        print(f"published: {publish_llava(output, named(destination_of(args.training), repository))}")
    return output


def preferred_attention() -> str:
    """FlashAttention 2 where it can run, SDPA elsewhere."""
    available = torch.cuda.is_available() and importlib.util.find_spec("flash_attn") is not None
    return "flash_attention_2" if available else "sdpa"


if __name__ == "__main__":
    run_program(main)

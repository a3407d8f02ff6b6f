"""Instruction fine-tuning with HydraLoRA from the command line (`HydraLoRA/fine-tuning.py` of the original).

    python -m hydralora.finetune --model_name_or_path BASE --dataset_dir DATA --output_dir OUTPUT --do_train

Works on any causal language model of transformers and any set of its linear layers. `--help` lists every option.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel
from torch import nn
from transformers import set_seed
from transformers.trainer_utils import get_last_checkpoint

from hydralora.text.arguments import build_parser, inputs_of, parse_args
from hydralora.text.dataset import InstructionCollator
from hydralora.text.loading import answer_ends, check_vocabulary, load_data
from hydralora.text.options import RunArguments
from hydralora.text.tasks import names_of
from hydralora.text.training import (
    ADAPTER_FOLDER,
    HydraLoraTrainer,
    add_adapter,
    load_base,
    load_tokenizer,
    record_end,
    require_adapter,
)
from hydralora.tuner.original import OUR_WEIGHTS
from llava.runtime import checkpointing
from llava.runtime.monitoring.stopping import early_stopping
from llava.runtime.places import RUN_FILE
from llava.runtime.program import run_program
from llava.runtime.publishing.access import check_access, destination_of
from llava.runtime.publishing.publish import named, publish_adapter
from llava.runtime.resume_check import check_has_state, check_resumable
from llava.runtime.run_record import Resumption, describe, resumption, used_sections, write_run_record
from llava.runtime.saving import prepare_folder
from llava.runtime.weights.run_file import GIVEN
from llava.runtime.zero import join_processes, prepare_resume, set_precision

__all__ = ["TextRun", "build_parser", "build_run", "main", "parse_args"]


@dataclass
class TextRun:
    """Everything that a run is made of, before its first step."""

    args: RunArguments
    tokenizer: Any
    model: nn.Module
    trainer: HydraLoraTrainer


def run_record(args: RunArguments) -> dict[str, Any]:
    """What `run.json` says of a run: resolved options, package versions, and digests of what it reads."""
    sections = {
        "model": dataclasses.asdict(args.model),
        "data": dataclasses.asdict(args.data),
        "training": args.training.to_dict(),
        "experts": args.experts,
    }
    return describe(used_sections(sections) | {GIVEN: sorted(args.given)}, args.training)


def start_record(args: RunArguments) -> None:
    """Write `run.json` of a new run, before the first step; an evaluation alone replaces the record of no run."""
    folder = Path(args.training.output_dir)
    if args.training.do_train or not (folder / RUN_FILE).is_file():
        write_run_record(args, run_record(args))


def build_run(args: RunArguments, resumed: Resumption | None = None) -> TextRun:
    """Everything up to the first step; writes `run.json` of a new run."""
    training = args.training
    if training.should_save:
        prepare_folder(Path(training.output_dir), inputs_of(args))
        if resumed is None:
            start_record(args)
    set_seed(training.seed)
    checkpointing.keep_the_graph(training)
    tokenizer = load_tokenizer(args)
    train, evaluation = load_data(args, tokenizer)
    examples = [example for part in (train, evaluation) if part is not None for example in part.examples]
    ends, unended = answer_ends(tokenizer, examples, args.data.chat_template)
    if unended and training.should_log:
        print(unended)
    base = load_base(args)
    check_vocabulary(base, tokenizer, examples, args.tokenizer_name)
    model = add_adapter(base, args, names_of(examples))
    if training.deepspeed:
        set_precision(model, training)
    if checkpointing.is_checkpointed(training):
        model.enable_input_require_grads()
    if training.should_log:
        model.print_trainable_parameters()
    trainer = HydraLoraTrainer(
        ends=record_end(model, tokenizer, training.should_log, ends),
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=InstructionCollator(tokenizer.pad_token_id),
        processing_class=tokenizer,
        callbacks=early_stopping(training.early_stopping_patience, training.early_stopping_threshold),
    )
    trainer.resumption = resumed
    return TextRun(args, tokenizer, model, trainer)


def _evaluate(run: TextRun) -> dict[str, float]:
    metrics = run.trainer.evaluate()
    metrics["perplexity"] = math.exp(min(metrics["eval_loss"], 700.0))
    run.trainer.log_metrics("eval", metrics)
    run.trainer.save_metrics("eval", metrics)
    return metrics


def main(argv: Sequence[str] | None = None) -> Path:
    """Train and evaluate as the command line says; an output folder that holds checkpoints is resumed.

    Returns:
        The folder of the finished adapter, or the output folder of a run that only evaluates.

    Raises:
        LlavaError: a problem with options, data or checkpoints that the user can mend.
    """
    args = parse_args(argv)
    training, output = args.training, Path(args.training.output_dir)
    join_processes(training)
    publishes = training.push_to_hub and training.do_train and training.process_index == 0
    repository = check_access(destination_of(training)) if publishes else ""
    resume_from, resumed = None, None
    if training.do_train:
        resume_from = training.resume_from_checkpoint or (get_last_checkpoint(output) if output.is_dir() else None)
        finished = (output / ADAPTER_FOLDER / OUR_WEIGHTS).is_file()
        resumed = resumption(run_record(args), output, resume_from, finished, training.resume_changed)
    if resume_from is not None:
        check_has_state(Path(resume_from))
        prepare_resume(training, Path(resume_from))
        check_resumable(Path(resume_from), training)
        require_adapter(Path(resume_from))
    run = build_run(args, resumed)
    for note in resumed.notes if resumed is not None and training.should_log else ():
        print(note)
    adapter = output / ADAPTER_FOLDER
    if training.do_train:
        result = run.trainer.train(resume_from_checkpoint=resume_from)
        run.trainer.save_model(str(adapter))
        run.trainer.log_metrics("train", result.metrics)
        run.trainer.save_metrics("train", result.metrics)
        run.trainer.save_state()
    metrics = _evaluate(run) if training.do_eval else {}
    if training.should_save:
        _print_summary(run, adapter if training.do_train else None, metrics)
    if publishes:
        print(f"published: {publish_adapter(adapter, named(destination_of(training), repository))}")
    return adapter if training.do_train else output


def _print_summary(run: TextRun, adapter: Path | None, metrics: dict[str, float]) -> None:
    history = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    updates, trained = run.trainer.state.global_step, run.args.training.do_train
    title, lines = "Finished", [f"{updates} updates"]
    if trained and updates == run.trainer.updates_before:
        title, lines = "Nothing was left to train", [f"all {updates} updates were made before"]
    if history:
        lines.append(f"loss: {history[0]:.4f} at first, {history[-1]:.4f} at last")
    if metrics:
        lines.append(f"evaluation: loss {metrics['eval_loss']:.4f}, perplexity {metrics['perplexity']:.2f}")
    if adapter is not None:
        lines += [f"adapter: {adapter}", "", "It loads on its base in every process that imports hydralora:"]
    Console().print(Panel("\n".join(lines), title=title, title_align="left", expand=False))
    if adapter is not None:
        print(f'import hydralora; PeftModel.from_pretrained(base, "{adapter}")')
        if run.trainer.by_task:
            print("and is evaluated task by task: hydralora.save_tasks_as_lora writes a LoRA for each")
            return
        print("and is evaluated (extra harness) by")
        models = f"pretrained={run.args.model.model_name_or_path},peft={adapter}"
        chat = " --apply_chat_template" if run.args.data.chat_template is not None else ""
        print(f"python -m hydralora.evaluate --model_args {models} --tasks mmlu --num_fewshot 0{chat}")


if __name__ == "__main__":
    run_program(main)

"""What a finished run prints: how long, how good, where it is, and what to run next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel

from llava.data.skipped import count_skipped
from llava.data.trained_template import conv_mode_of_version
from llava.train.options import RunArguments
from llava.train.run import Run


def next_command(args: RunArguments) -> str:
    """The command that answers questions with the model that a run has trained."""
    output = args.training.output_dir
    base = f" --model-base {args.model.model_name_or_path}"
    trains_language_model = not (
        args.training.has_adapter or args.model.freeze_backbone or args.model.tune_mm_mlp_adapter
    )
    return (
        f"python -m llava.eval.model_vqa_loader --model-path {output}{'' if trains_language_model else base} "
        f"--question-file QUESTIONS.jsonl --image-folder {args.data.image_folder} --answers-file ANSWERS.jsonl "
        f"--temperature 0 --conv-mode {conv_mode_of_version(args.model.version)}"
    )


def print_summary(run: Run, metrics: dict[str, Any], command: str) -> None:
    """Print the summary of a finished run.

    Args:
        run: the run.
        metrics: what the Trainer returned (`train_runtime` in seconds, `train_loss`).
        command: what to run next.
    """
    history = [entry["loss"] for entry in run.trainer.state.log_history if "loss" in entry]
    seconds, speed = metrics.get("train_runtime", 0.0), metrics.get("train_samples_per_second", 0.0)
    lines = [f"{run.trainer.state.global_step} updates in {seconds:.0f} s, {speed:.1f} samples/s"]
    if history:
        lines.append(f"loss: {history[0]:.4f} at first, {history[-1]:.4f} at last")
    skipped = count_skipped(run.dataset.skipped_file)
    if skipped:
        lines.append(f"{skipped} samples were skipped; they are listed in {run.dataset.skipped_file}")
    lines += [f"checkpoint: {Path(run.args.training.output_dir)}", "", "Next:"]
    title = "Training finished"
    if run.trainer.state.global_step == run.trainer.updates_before:
        title = "Nothing was left to train"
        lines[0] = f"all {run.trainer.state.global_step} updates were made before"
    Console().print(Panel("\n".join(lines), title=title, title_align="left", expand=False))
    print(command)

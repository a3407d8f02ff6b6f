"""What the text experiment varies and what it holds fixed, and the command of each run.

Every adapter is trained by `python -m hydralora.finetune` on all linear layers of the decoder; LoRA is HydraLoRA with
one expert, which is LoRA number for number. The update is scaled by 2 in every run (alpha = 2 r).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.experiments.common.methods import Method, MethodRun, methods_of
from benchmarks.experiments.common.sizes import Sizes
from benchmarks.experiments.text.tasks import TASKS

SEEDS = (0, 1, 2)
BASE_SEED = 0


@dataclass(frozen=True)
class Recipe:
    """All settings.

    Attributes:
        sizes: of the decoder.
        base_rows, base_batch, base_rate: training of the base, one epoch.
        rank: r of the table; the adapters of LoRA-split have rank r / tasks.
        rows: training rows of each task.
        held_out: test rows of each task.
        epochs: over the training rows.
        batch: rows in an update on the mixture; on one task it is divided by the number of tasks, so that a run on one
            task makes as many updates and sees as many rows of the task as a run on the mixture.
        rate: peak learning rate.
    """

    sizes: Sizes = field(default_factory=lambda: Sizes(layers=4, vocabulary=128, max_length=64))
    base_rows: int = 96_000
    base_batch: int = 64
    base_rate: float = 1e-3
    rank: int = 5
    rows: int = 2_000
    held_out: int = 200
    epochs: int = 1
    batch: int = 30
    rate: float = 3e-3

    @property
    def methods(self) -> list[Method]:
        """The lines of the table, in order."""
        return methods_of(self.rank, [task.name for task in TASKS])


def finetune_command(recipe: Recipe, run: MethodRun, base: Path, rows: Path, output: Path) -> tuple[str, ...]:
    """Words after `python` that train one adapter on the file `rows`."""
    batch = recipe.batch if run.task is None else recipe.batch // len(TASKS)
    flags = {
        "model_name_or_path": base,
        "train_file": rows,
        "output_dir": output,
        "trainable": "all-linear",
        "lora_rank": run.method.rank,
        "lora_alpha": 2 * run.method.rank,
        "lora_nums": max(1, run.method.experts),
        "lora_dropout": 0.0,
        "num_train_epochs": recipe.epochs,
        "per_device_train_batch_size": batch,
        "learning_rate": recipe.rate,
        "warmup_ratio": 0.05,
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.0,
        "logging_steps": 50,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "max_seq_length": recipe.sizes.max_length,
        "seed": run.seed,
    }
    words = (word for name, value in flags.items() for word in (f"--{name}", str(value)))
    return ("-m", "hydralora.finetune", "--do_train", *words)

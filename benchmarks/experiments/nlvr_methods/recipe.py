"""What this experiment holds fixed, and the command of each run; the larger one is `benchmarks/experiments/nlvr`.

One base serves all runs. Base, tower and projector stay frozen, so a run differs from another in its adapters alone.
LoRA lies on all seven linear layers of every decoder layer; HydraLoRA is the routed MLP with LoRA of the same rank on
the attention projections, so both touch the same matrices. The update is scaled by 2 everywhere (alpha = 2 r).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from benchmarks.experiments.common.methods import Method, MethodRun, methods_of
from benchmarks.experiments.common.sizes import Sizes, Training
from benchmarks.experiments.nlvr import recipe as larger

SEEDS = (0, 1, 2)
BASE_SEED = 0
TASKS = ("verify", "exist", "most", "count")


@dataclass(frozen=True)
class Recipe:
    """All settings.

    Attributes:
        sizes: as in the larger experiment, with patches of 12 pixels: 64 of them instead of 144.
        base: training of the base.
        rows: training rows of each task, each one image with questions of this task.
        turns: for each task, the most questions in a row.
        batch: rows in an update on the mixture; on one task it is divided by the number of tasks, so that a run on one
            task makes as many updates and sees as many rows of the task as a run on the mixture.
        rate: peak learning rate.
        rank: r of the table; the adapters of LoRA-split have rank r / tasks.
        every: one in so many test images is asked about.
    """

    sizes: Sizes = field(default_factory=lambda: Sizes(patch=12))
    base: Training = field(default_factory=lambda: Training(40_000, 16, 6e-4, {"count": 3, "exist": 3}))
    rows: int = 640
    turns: Mapping[str, int] = field(default_factory=lambda: {"verify": 1, "exist": 3, "most": 1, "count": 3})
    batch: int = 8
    rate: float = 5e-3
    rank: int = 4
    every: int = 2

    @property
    def methods(self) -> list[Method]:
        """The lines of the table, in order."""
        return methods_of(self.rank, TASKS)

    @property
    def as_larger(self) -> larger.Recipe:
        """The same in the words of the larger experiment, for what is shared with it."""
        return larger.Recipe(sizes=self.sizes, base=self.base)

    def as_run(self, one_task: bool) -> larger.Recipe:
        """The same for one fine-tuning run."""
        batch = self.batch // len(TASKS) if one_task else self.batch
        training = Training(self.rows if one_task else self.rows * len(TASKS), batch, self.rate, self.turns)
        return replace(self.as_larger, tuned=training)


def tuned_command(
    recipe: Recipe, run: MethodRun, base: Path, rows: Path, images: Path, output: Path
) -> tuple[str, ...]:
    """Words after `python` that train one adapter."""
    method = run.method
    scale = (str(method.rank), "--lora_alpha", str(2 * method.rank), "--lora_dropout", "0.0")
    if method.experts:
        adapter = [
            *("--use_lora", "True", "--lora_modules", "q_proj,k_proj,v_proj,o_proj", "--lora_rank", *scale),
            *("--llm_moe", "True", "--dense_moe", "True", "--llm_moe_num_experts", str(method.experts)),
            *("--moe_balance_w", "0.05"),
        ]
    else:
        adapter = ["--lora_enable", "True", "--lora_r", *scale]
    return (
        "llava/train/train_mem.py",
        *("--model_name_or_path", str(base), "--vision_tower", str(base / "vision_tower")),
        *("--freeze_backbone", "True", "--freeze_mm_mlp_adapter", "True"),
        *adapter,
        *larger.common_flags(recipe.as_run(run.task is not None), "tuned", rows, images, run.seed, output),
    )

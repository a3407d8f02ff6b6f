"""What this experiment holds fixed, and the command of each run.

One base serves all runs, that of `benchmarks/experiments/nlvr_methods`. Base, tower and projector stay frozen, so a run
differs from another in its adapters alone. The three kinds have as many trained parameters as the LoRA, as nearly as
their widths allow. "Without router" is the same adapter at a temperature so high that both up-projections weigh one
half for every sample: they start equal, get equal gradients and stay equal, so that the two are one plain adapter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.experiments.common.sizes import Sizes, Training
from benchmarks.experiments.nlvr.recipe import common_flags, lora_parameters
from benchmarks.experiments.nlvr_methods.recipe import Recipe as BaseRecipe

SEEDS = (0, 1, 2)
GROUPS = 2
"""Groups of the up-projection, `mma.config.MmaConfig.adapter_groups`."""

NO_ROUTING = 1e12
"""Temperature at which float32 knows no weight but one half."""


def plain_parameters(sizes: Sizes, hidden: int) -> int:
    """One adapter in every decoder layer: down with bias, and one grouped up-projection with bias."""
    down = sizes.width * hidden + hidden
    up = sizes.width * hidden // GROUPS + sizes.width
    return sizes.layers * (down + up)


def mma_parameters(sizes: Sizes, hidden: int) -> int:
    """The same with a second up-projection and a router for two ways, and an embedding of the two modalities."""
    up = sizes.width * hidden // GROUPS + sizes.width
    router = 2 * sizes.width + 2
    return plain_parameters(sizes, hidden) + sizes.layers * (up + router) + 2 * sizes.width


def nearest_width(parameters: Callable[[Sizes, int], int], sizes: Sizes, wanted: int) -> int:
    """The hidden width, a multiple of the groups, whose number of parameters comes nearest to `wanted`."""
    widths = range(GROUPS, wanted, GROUPS)
    return min(widths, key=lambda hidden: abs(parameters(sizes, hidden) - wanted))


@dataclass(frozen=True)
class Method:
    """One line of the table.

    Attributes:
        name: as in names of files.
        title: as in the table.
        width: hidden width of an adapter, or rank.
        temperature: of the router; None: LoRA.
    """

    name: str
    title: str
    width: int
    temperature: float | None = None


@dataclass(frozen=True)
class Recipe:
    """All settings.

    Attributes:
        sizes: those of the base.
        base: training of the base.
        rows: training rows of each modality.
        turns: for each kind of question, the most in a row, of either modality.
        batch: rows in an update.
        rates: peak learning rate of each method, settled by the pilots.
        candidates: rates that the pilots try.
        rank: of LoRA; the widths of the adapters follow.
        temperature: of MMA's routers; LaVIN's own.
        every: one in so many test images is asked about.
        held_out: test lists, each with one question of every kind.
    """

    sizes: Sizes = field(default_factory=lambda: BaseRecipe().sizes)
    base: Training = field(default_factory=lambda: BaseRecipe().base)
    rows: int = 1200
    turns: Mapping[str, int] = field(default_factory=lambda: {"exist": 2, "most": 1, "count": 2})
    batch: int = 8
    rates: Mapping[str, float] = field(default_factory=lambda: {"mma": 1.5e-2, "plain": 5e-3, "lora": 5e-3})
    candidates: tuple[float, ...] = (5e-3, 1.5e-2)
    rank: int = 4
    temperature: float = 10.0
    every: int = 4
    held_out: int = 100

    @property
    def as_base(self) -> BaseRecipe:
        """The same in the words of the experiment that the base comes from."""
        return BaseRecipe(sizes=self.sizes, base=self.base, every=self.every)

    @property
    def prepared(self) -> dict[str, Any]:
        """The settings that what is prepared and every run depend on: all but the rates, which a run's name has."""
        return {name: value for name, value in asdict(self).items() if name not in ("rates", "candidates")}

    @property
    def methods(self) -> list[Method]:
        """The lines of the table, in order."""
        wanted = lora_parameters(self.sizes, self.rank)
        routed = nearest_width(mma_parameters, self.sizes, wanted)
        plain = nearest_width(plain_parameters, self.sizes, wanted)
        return [
            Method("mma", f"MMA, h = {routed}", routed, self.temperature),
            Method("plain", f"adapters without router, h = {plain}", plain, NO_ROUTING),
            Method("lora", f"LoRA, r = {self.rank}", self.rank),
        ]


@dataclass(frozen=True)
class TunedRun:
    """One fine-tuning run.

    Attributes:
        method: how it is trained.
        seed: of its weights at the start and of its training rows.
        rate: peak learning rate.
    """

    method: Method
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """As in names of files; the rate is a part of it, so that a pilot at the settled rate is a run of the table."""
        return f"{self.method.name}-{self.rate:g}-{self.seed}"


def tuned_command(recipe: Recipe, run: TunedRun, base: Path, rows: Path, images: Path, output: Path) -> tuple[str, ...]:
    """Words after `python` that train one run."""
    method = run.method
    if method.temperature is None:
        adapter = ["--lora_enable", "True", "--lora_r", f"{method.width}", "--lora_alpha", f"{2 * method.width}"]
        adapter += ["--lora_dropout", "0.0"]
    else:
        adapter = [
            *("--mma", "True", "--visual_input", "llava", "--adapter_type", "attn", "--visual_adapter_type", "none"),
            *("--adapter_dim", f"{method.width}", "--temperature", f"{method.temperature:g}"),
            *("--adapter_dropout", "0.0"),
        ]
    training = Training(2 * recipe.rows, recipe.batch, run.rate, recipe.turns)
    return (
        "llava/train/train_mem.py",
        *("--model_name_or_path", str(base), "--vision_tower", str(base / "vision_tower")),
        *("--freeze_backbone", "True", "--freeze_mm_mlp_adapter", "True"),
        *adapter,
        *common_flags(replace(recipe.as_base.as_larger, tuned=training), "tuned", rows, images, run.seed, output),
    )

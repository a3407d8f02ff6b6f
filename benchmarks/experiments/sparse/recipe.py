"""What the experiment varies and what it holds fixed: three models, ways of dropping, and the command of each run.

Every run of a model starts from the same base and makes the same number of updates on the same rows: dense, with the
learned predictor at each keep rate, and at some with chance as judge. The vision tower stays frozen; projector
and language model are trained along, as Dynamic-LLaVA does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks.experiments.nlvr_methods.recipe import Recipe as BaseRecipe

SEEDS = (0, 1, 2)
RATES = (0.5, 0.2, 0.1)
RULES = ("random", "attention")
SPARSE_LAYER = 1
TRAIN = "benchmarks.experiments.sparse.train"


@dataclass(frozen=True)
class Setting:
    """One model that the ways of dropping are compared on.

    Attributes:
        name: as in names of files.
        title: as in README.md.
        groups: what is shown, each with its categories of questions; the first is drawn.
        updates: of every run.
        read_from: first layer in which text sees the image.
        rates: keep rates below 1.
        control_rates: those at which a model is also trained with chance as its judge.
    """

    name: str
    title: str
    groups: Mapping[str, Sequence[str]]
    updates: int
    read_from: int = 0
    rates: Sequence[float] = RATES
    control_rates: Sequence[float] = ()


NLVR_TASKS = {"count": ("count",), "exist": ("exist",)}
TINY_TASKS = {"questions about images": ("colour", "shape", "digit", "position", "count")}
SETTINGS = (
    Setting("nlvr", "NLVR", NLVR_TASKS, 80),
    Setting("late", "NLVR, late reading", NLVR_TASKS, 160, read_from=SPARSE_LAYER, control_rates=(0.2,)),
    # Of nine patches, 0.1 keeps one as 0.2 does.
    Setting("tiny", "tiny base of the demo", TINY_TASKS, 80, rates=(0.5, 0.2)),
)


@dataclass(frozen=True)
class Recipe:
    """All settings.

    Attributes:
        base: of the NLVR base, as in `nlvr_methods`.
        late_rows: rows that teach the NLVR base to read late, before anything is compared.
        turns: for each task, the most questions in a row of NLVR.
        batch: rows in an update.
        rate: peak learning rate of projector and language model.
        predictor_rate: that of the predictor.
        mask_loss_weight: of the keep-rate loss. The default of 100 is for runs of ten thousand updates: its gradient
            follows the noise of the decisions, and so few updates do not average it away (see README.md).
        predictor: its sizes.
        every: for each task of NLVR, one in so many test images is asked about.
    """

    base: BaseRecipe = field(default_factory=BaseRecipe)
    late_rows: int = 8000
    turns: Mapping[str, int] = field(default_factory=lambda: {"count": 3, "exist": 3})
    settings: Sequence[Setting] = SETTINGS
    batch: int = 16
    rate: float = 3e-4
    predictor_rate: float = 5e-3
    mask_loss_weight: float = 2.0
    predictor: Mapping[str, int] = field(
        default_factory=lambda: {"d_model": 64, "nhead": 4, "dim_feedforward": 128, "num_layers": 2}
    )
    every: Mapping[str, int] = field(default_factory=lambda: {"count": 4, "exist": 16})


class Place(NamedTuple):
    """Where the parts of a setting lie.

    Attributes:
        base: what every run starts from.
        tower: its vision tower.
        images: folder of the images.
        flags: how images are read.
    """

    base: Path
    tower: Path
    images: Path
    flags: tuple[str, ...]


class TrainedModel(NamedTuple):
    """One trained model: a way of training, a keep rate (1: dense), a seed."""

    setting: Setting
    way: str
    keep_rate: float
    seed: int

    @property
    def name(self) -> str:
        """As in names of files."""
        rate = [] if self.way == "dense" else [f"{self.keep_rate:g}"]
        return "-".join([self.setting.name, self.way, *rate, str(self.seed)])


def runs_of(setting: Setting, seed: int) -> list[TrainedModel]:
    """The trained models of a setting."""
    learned = [TrainedModel(setting, "learned", rate, seed) for rate in setting.rates]
    controls = [TrainedModel(setting, "random", rate, seed) for rate in setting.control_rates]
    return [TrainedModel(setting, "dense", 1.0, seed), *learned, *controls]


def training_command(
    recipe: Recipe, place: Place, rows: Path, output: Path, *, seed: int, updates: int, read_from: int
) -> tuple[str, ...]:
    """Words after `python` that train a dense model."""
    flags = {
        "model_name_or_path": place.base,
        "vision_tower": place.tower,
        "version": "v1",
        "data_path": rows,
        "image_folder": place.images,
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "output_dir": output,
        "max_steps": updates,
        "per_device_train_batch_size": recipe.batch,
        "learning_rate": recipe.rate,
        "weight_decay": 0.0,
        "warmup_ratio": 0.05,
        "lr_scheduler_type": "cosine",
        "save_strategy": "no",
        "logging_steps": 10,
        "model_max_length": 512,
        "dataloader_num_workers": 0,
        "report_to": "none",
        "use_cpu": True,
        "seed": seed,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    reading = ("--read-from", str(read_from)) if read_from else ()
    return ("-m", TRAIN, *words, *place.flags, *reading)


def sparse_flags(recipe: Recipe, run: TrainedModel) -> tuple[str, ...]:
    """What a run with a judge has besides."""
    flags = {
        "dynamic": True,
        "use_text_predictor": False,
        "vision_keep_rate": run.keep_rate,
        "sparse_layer": SPARSE_LAYER,
        **recipe.predictor,
        "predictor_lr": recipe.predictor_rate,
        "mask_loss_weight": recipe.mask_loss_weight,
    }
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    return (*words, "--judge", "random") if run.way == "random" else tuple(words)

"""The recipe of a playground: seed, sizes, amounts of data and training stages, and its fingerprint.

Everything that decides the result is here. The fingerprint also covers the source of the modules that make data and
models, so that a playground built by older code is noticed and built anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llava.runtime.output import replace_text
from playground.tiny import Sizes

RECIPE_FILE = "recipe.json"

SOURCES = ("scenes", "draw", "families", "questions", "tokenizer", "tiny", "stages", "recipe")
"""Modules of this package that decide what a playground contains."""


@dataclass(frozen=True)
class Stage:
    """Length and speed of one training stage.

    Attributes:
        steps: optimizer updates.
        batch_size: rows per update.
        learning_rate: its peak; warmed up over `warmup` of the updates, then lowered along a cosine.
        warmup: share of the updates.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup: float = 0.05


@dataclass(frozen=True)
class Recipe:
    """What a playground is made from.

    Attributes:
        seed: of data, tokenizer, initial weights and batches.
        sizes: of the tiny models.
        caption_rows: images with a caption, for the first two stages.
        base_rows: conversations of the base families, for the third stage.
        new_rows: conversations of the new families, for fine-tuning the base.
        questions_per_family: rows of each family in a question file; fewer of a text family with few questions.
        turns: questions per conversation.
        text_share: share of the conversations that have no image.
        tower: stage 1, everything from random weights on captions.
        projector: stage 2, a new projector between the tower and the language model of stage 1.
        full: stage 3, language model and projector on conversations; its result is the base.
        tune: fine-tuning on the new families, as the demo does it.
        sparse: training of predictors that drop image tokens, on the base's conversations, as the demo does it.
    """

    seed: int = 0
    sizes: Sizes = field(default_factory=Sizes)
    caption_rows: int = 6000
    base_rows: int = 4000
    new_rows: int = 3000
    questions_per_family: int = 60
    turns: int = 6
    text_share: float = 0.25
    tower: Stage = field(default_factory=lambda: Stage(steps=900, batch_size=32, learning_rate=1.5e-3))
    projector: Stage = field(default_factory=lambda: Stage(steps=80, batch_size=32, learning_rate=2e-3))
    full: Stage = field(default_factory=lambda: Stage(steps=220, batch_size=16, learning_rate=2e-3))
    tune: Stage = field(default_factory=lambda: Stage(steps=200, batch_size=16, learning_rate=2e-3))
    sparse: Stage = field(default_factory=lambda: Stage(steps=120, batch_size=16, learning_rate=5e-4))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return dataclasses.asdict(self)

    def fingerprint(self) -> str:
        """16 hexadecimal digits, others if data, models or stages would be; what the demo trains does not count."""
        values = self.to_dict()
        del values["tune"], values["sparse"]
        digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
        for name in SOURCES:
            digest.update(Path(__file__).with_name(f"{name}.py").read_bytes())
        return digest.hexdigest()[:16]


def minimal_recipe(seed: int = 0) -> Recipe:
    """Every stage at the smallest size that runs, to test the machinery; the model that comes out knows nothing."""
    stage = Stage(steps=2, batch_size=4, learning_rate=1e-3)
    sizes = Sizes(tower_width=32, tower_layers=2, tower_heads=2, width=32, mlp_width=48, layers=2, heads=2)
    return Recipe(
        seed=seed,
        sizes=sizes,
        caption_rows=12,
        base_rows=16,
        new_rows=16,
        questions_per_family=2,
        turns=3,
        tower=stage,
        projector=stage,
        full=stage,
        tune=stage,
        sparse=stage,
    )


def write_atomically(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    replace_text(path, text, check=False)

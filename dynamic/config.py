"""What can be varied: the configuration of Dynamic-LLaVA's predictors, and its flags.

The configuration is what a checkpoint stores, under the names of the original's `sparse_config`; the flags are what a
command line offers (upstream: `SparseArguments` and additions to `TrainingArguments` in `train/train_sparse.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from llava.runtime.checked_config import CheckedConfig
from llava.runtime.options import config_of, flags_of, option
from llava.runtime.ranges import COUNT, NOT_NEGATIVE, POSITIVE, Range

KEEP_RATE = Range(0, 1, above=True)

GUMBEL = "gumbel"
"""Each image token is drawn by itself from its two logits, and a loss pulls the share to the keep rate."""

TOPK = "topk"
"""Of each image exactly the tokens with the highest keep logits under noise, as many as at inference."""


@dataclass(frozen=True)
class SparseConfig(CheckedConfig):
    """Configuration of the predictors of one model; names and defaults are those of the original's `sparse_config`.

    Raises:
        ValueError: a value is out of range or of the wrong type; the message names all of them.
    """

    subject: ClassVar[str] = "the predictors"
    ranges: ClassVar[Mapping[str, Range]] = {
        "vision_keep_rate": KEEP_RATE,
        "output_text_keep_rate": KEEP_RATE,
        "instruct_keep_rate": KEEP_RATE,
        # The layer below the first sparse one gives the predictors something contextual to look at.
        "sparse_layer": COUNT,
        "d_model": Range(4),
        "nhead": COUNT,
        "dim_feedforward": COUNT,
        "num_layers": NOT_NEGATIVE,
        "output_text_len_for_training": NOT_NEGATIVE,
        "instruct_len_for_training": NOT_NEGATIVE,
        "mask_loss_weight": NOT_NEGATIVE,
    }

    use_vision_predictor: bool = option("drop image tokens", True)

    vision_keep_rate: float = option("share of each image's tokens that is kept", 0.2)

    vision_decision: str = option(
        "how training chooses image tokens: gumbel draws each by itself, and a loss pulls the share to the keep rate; "
        "topk keeps exactly that share of each image, the best under noise that falls with the temperature",
        GUMBEL,
        choices=[GUMBEL, TOPK],
    )
    """The original knows the first alone. At inference both keep the best."""

    use_text_predictor: bool = option("drop text tokens; False switches both text predictors off", True)
    """Each of the two text predictors has a switch of its own too."""

    use_output_text_predictor: bool = option("judge the tokens of the answer", True)
    """A generated token that is dropped is not remembered by the sparse layers."""

    output_text_keep_rate: float = option("share of the answer's tokens that is kept", 0.5)
    """What training aims at; at inference the predictor decides for each token."""

    output_text_len_for_training: int = option("answers with fewer tokens are kept whole in training", 50)

    use_instruct_predictor: bool = option("judge the tokens of the last instruction", True)

    instruct_keep_rate: float = option("share of the last instruction's tokens that is kept", 0.7)
    """What training aims at, as above."""

    instruct_len_for_training: int = option("instructions with fewer tokens are kept whole in training", 25)

    sparse_layer: int = option("first decoder layer, counted from 0, that works on kept tokens only", 2)
    """The predictors see its input."""

    d_model: int = option("width of the predictors", 512)
    """Called d where shapes are given."""

    nhead: int = option("attention heads of the vision predictor", 8)

    dim_feedforward: int = option("inner width of the vision predictor's feed-forward layers", 2048)

    num_layers: int = option("transformer blocks of the vision predictor", 2)

    mask_loss_weight: float = option("weight of the keep-rate losses", 100.0)

    def _out_of_range(self) -> list[str]:
        problems = super()._out_of_range()
        if isinstance(self.vision_decision, str) and self.vision_decision not in (GUMBEL, TOPK):
            problems.append(f"vision_decision is '{self.vision_decision}', expected '{GUMBEL}' or '{TOPK}'")
        if not problems and not self._wrong_types():
            if self.d_model % self.nhead:
                problems.append(f"d_model {self.d_model} is not a multiple of nhead {self.nhead}")
            if self.d_model % 4:
                problems.append(f"d_model {self.d_model} is not a multiple of 4")
        return problems

    @property
    def judges_output_text(self) -> bool:
        """True if generated tokens are judged."""
        return self.use_text_predictor and self.use_output_text_predictor

    @property
    def judges_instruction(self) -> bool:
        """True if the tokens of the last instruction are judged."""
        return self.use_text_predictor and self.use_instruct_predictor


@flags_of(SparseConfig, after={"dynamic": [item.name for item in dataclasses.fields(SparseConfig)]})
class SparseOptions:
    """Options of Dynamic-LLaVA, with the original's names, types and defaults; `dynamic` switches them on.

    Every field of `SparseConfig` is one.
    """

    _argument_group_name: ClassVar[str] = "Dynamic-LLaVA"

    dynamic: bool = option("train predictors that drop vision and text tokens (llava.train.train_sparse: True)", False)
    gumbel_start_tau: float = option("temperature of the decisions in training at the first step", 1.0)
    gumbel_end_tau: float = option("temperature that it falls to, exponentially", 0.1)
    predictor_lr: float = option("learning rate of the predictors", 3e-4)
    predictor_weight_decay: float = option("weight decay of the predictors", 0.0)

    def config(self) -> SparseConfig:
        """The part that a checkpoint stores.

        Raises:
            ValueError: a value is refused.
        """
        return config_of(SparseConfig, self)


FLAG_RANGES: Mapping[str, Range] = {
    **SparseConfig.ranges,
    "gumbel_start_tau": POSITIVE,
    "gumbel_end_tau": POSITIVE,
    "predictor_lr": NOT_NEGATIVE,
    "predictor_weight_decay": NOT_NEGATIVE,
}
"""What the numbers of `SparseOptions` may be; `SparseConfig` checks what depends on several."""


def kept_count(tokens: int, keep_rate: float) -> int:
    """How many of `tokens` are kept: `tokens * keep_rate` rounded down as in the original, but never none of them."""
    return min(tokens, max(1, int(tokens * keep_rate)))

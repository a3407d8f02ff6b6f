"""What can be varied: the configuration of Dynamic-LLaVA's predictors, and its flags.

The configuration is what a checkpoint stores, under the names of the original's `sparse_config`; the flags are what a
command line offers (upstream: `SparseArguments` and additions to `TrainingArguments` in `train/train_sparse.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar


@dataclass(frozen=True)
class SparseConfig:
    """Configuration of the predictors of one model; names and defaults are those of the original's `sparse_config`.

    Raises:
        ValueError: a value is out of range or of the wrong type; the message names all of them.
    """

    use_vision_predictor: bool = True
    """Drop image tokens."""

    vision_keep_rate: float = 0.2
    """Share of each image's tokens that is kept."""

    use_text_predictor: bool = True
    """Switch of both text predictors; each has one of its own besides."""

    use_output_text_predictor: bool = True
    """Judge generated tokens: a dropped one is not remembered by the sparse layers."""

    output_text_keep_rate: float = 0.5
    """Share of the answer's tokens that training aims at."""

    output_text_len_for_training: int = 50
    """Answers with fewer tokens are kept whole in training."""

    use_instruct_predictor: bool = True
    """Judge the tokens of the last instruction."""

    instruct_keep_rate: float = 0.7
    """Share of the last instruction's tokens that training aims at."""

    instruct_len_for_training: int = 25
    """Instructions with fewer tokens are kept whole in training."""

    sparse_layer: int = 2
    """First decoder layer that works on kept tokens only; the predictors see its input. Layers count from 0."""

    d_model: int = 512
    """Width d of the predictors."""

    nhead: int = 8
    """Attention heads of the vision predictor."""

    dim_feedforward: int = 2048
    """Inner width of the vision predictor's feed-forward layers."""

    num_layers: int = 2
    """Transformer blocks of the vision predictor."""

    mask_loss_weight: float = 100.0
    """Factor of the keep-rate losses."""

    def __post_init__(self) -> None:
        problems = [*self._wrong_types(), *self._out_of_range()]
        if problems:
            raise ValueError("configuration of the predictors: " + "; ".join(problems))

    def _wrong_types(self) -> list[str]:
        """One line per field whose value is not of its type; bool is no number here, int is a float."""
        kinds: dict[str, tuple[type, ...]] = {"bool": (bool,), "int": (int,), "float": (int, float)}
        return [
            f"{item.name} is {value!r}, expected {item.type}"
            for item in dataclasses.fields(self)
            if not isinstance(value := getattr(self, item.name), kinds[str(item.type)])
            or (isinstance(value, bool) and item.type != "bool")
        ]

    def _out_of_range(self) -> list[str]:
        """One line per numeric field outside its range; values of a wrong type are `_wrong_types`' business."""
        problems = []
        for name in ("vision_keep_rate", "output_text_keep_rate", "instruct_keep_rate"):
            value = getattr(self, name)
            if isinstance(value, int | float) and not 0 < value <= 1:
                problems.append(f"{name} is {value}, expected more than 0 and at most 1")
        # The layer below the first sparse one gives the predictors something contextual to look at.
        least = {"sparse_layer": 1, "d_model": 4, "nhead": 1, "dim_feedforward": 1, "num_layers": 0}
        least |= {"output_text_len_for_training": 0, "instruct_len_for_training": 0, "mask_loss_weight": 0}
        problems += [
            f"{name} is {value}, expected at least {minimum}"
            for name, minimum in least.items()
            if isinstance(value := getattr(self, name), int | float) and not minimum <= value < math.inf
        ]
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

    def to_dict(self) -> dict[str, Any]:
        """JSON values, as the original's `sparse_config`; `from_dict` is the inverse."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparseConfig:
        """Configuration from JSON values; a missing one takes its default.

        Raises:
            ValueError: a name is unknown, or a value is refused.
        """
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"configuration of the predictors: unknown {unknown}; known: {sorted(known)}")
        return cls(**values)


def _option(default: Any, help_text: str) -> Any:
    """A command-line option with its help text."""
    return field(default=default, metadata={"help": help_text})


@dataclass
class SparseOptions:
    """Options of Dynamic-LLaVA, with the original's names, types and defaults; `dynamic` switches them on."""

    _argument_group_name: ClassVar[str] = "Dynamic-LLaVA"

    dynamic: bool = _option(False, "train predictors that drop vision and text tokens (llava.train.train_sparse: True)")
    use_vision_predictor: bool = _option(True, "drop image tokens")
    vision_keep_rate: float = _option(0.2, "share of each image's tokens that is kept")
    use_text_predictor: bool = _option(True, "drop text tokens; False switches both text predictors off")
    use_output_text_predictor: bool = _option(True, "judge the tokens of the answer")
    output_text_keep_rate: float = _option(0.5, "share of the answer's tokens that is kept")
    output_text_len_for_training: int = _option(50, "answers with fewer tokens are kept whole in training")
    use_instruct_predictor: bool = _option(True, "judge the tokens of the last instruction")
    instruct_keep_rate: float = _option(0.7, "share of the last instruction's tokens that is kept")
    instruct_len_for_training: int = _option(25, "instructions with fewer tokens are kept whole in training")
    sparse_layer: int = _option(2, "first decoder layer, counted from 0, that works on kept tokens only")
    d_model: int = _option(512, "width of the predictors")
    nhead: int = _option(8, "attention heads of the vision predictor")
    dim_feedforward: int = _option(2048, "inner width of the vision predictor's feed-forward layers")
    num_layers: int = _option(2, "transformer blocks of the vision predictor")
    mask_loss_weight: float = _option(100.0, "weight of the keep-rate losses")
    gumbel_start_tau: float = _option(1.0, "temperature of the Gumbel-softmax at the first step")
    gumbel_end_tau: float = _option(0.1, "temperature that it falls to, exponentially")
    predictor_lr: float = _option(3e-4, "learning rate of the predictors")
    predictor_weight_decay: float = _option(0.0, "weight decay of the predictors")

    def config(self) -> SparseConfig:
        """The part that a checkpoint stores.

        Raises:
            ValueError: a value is refused.
        """
        return SparseConfig(**{item.name: getattr(self, item.name) for item in dataclasses.fields(SparseConfig)})

"""What configuration files must say, and in which range: a table for each kind of file.

transformers fills a missing number by a default of its own and takes most values as they are, which gives another model
in silence, a traceback from deep inside, or a request for terabytes. Values outside these tables come from damage.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llava.errors import CheckpointError

SIZE, COUNT, TOKEN = 2**17, 2**10, 2**31


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes:
        kind: `int`, `float`, `bool`, `str`, `dict`; `floats` for three numbers, one per color; `ids` for
            one or more token ids, `list of ids` for a list of them; `pixels` for one or more sides.
        low, high: range of a number, both included.
        required: the file must have it; otherwise a missing or null value takes the default of the reader.
        choices: possible strings.
    """

    kind: str
    low: float = -math.inf
    high: float = math.inf
    required: bool = False
    choices: tuple[str, ...] = ()

    def problem(self, value: Any) -> str | None:
        """Why a value is refused, or None."""
        if self.kind == "floats":
            three = isinstance(value, list) and len(value) == 3
            fits = three and all(self._fits_number(each, "float") for each in value)
            return None if fits else f"expected three numbers from {self.low:g} to {self.high:g}"
        if self.kind in ("int", "float"):
            if self._fits_number(value, self.kind):
                return None
            return f"expected {'a whole number' if self.kind == 'int' else 'a number'}{self._range()}"
        if self.kind in ("ids", "list of ids"):
            ids = value if isinstance(value, list) else [value if self.kind == "ids" else None]
            return None if all(self._fits_number(each, "int") for each in ids) else "expected token ids"
        if self.kind == "pixels":
            sides = list(value.values()) if isinstance(value, dict) else [value]
            fits = sides and all(self._fits_number(each, "int") for each in sides)
            return None if fits else f"expected sides in pixels{self._range()}"
        kinds: dict[str, type] = {"bool": bool, "str": str, "dict": dict}
        if not isinstance(value, kinds[self.kind]):
            return f"expected a {self.kind}"
        return f"expected one of {self.choices}" if self.choices and value not in self.choices else None

    def _fits_number(self, value: Any, kind: str) -> bool:
        kinds = (int,) if kind == "int" else (int, float)
        return isinstance(value, kinds) and not isinstance(value, bool) and self.low <= value <= self.high

    def _range(self) -> str:
        return "" if math.isinf(self.high) else f" from {self.low:g} to {self.high:g}"


Rules = Mapping[str, Rule]

LANGUAGE_MODEL: Rules = {
    "hidden_size": Rule("int", 1, SIZE, required=True),
    "intermediate_size": Rule("int", 1, 8 * SIZE, required=True),
    "num_hidden_layers": Rule("int", 1, COUNT, required=True),
    "num_attention_heads": Rule("int", 1, COUNT, required=True),
    "num_key_value_heads": Rule("int", 1, COUNT),
    "head_dim": Rule("int", 1, SIZE),
    "vocab_size": Rule("int", 1, 2**24, required=True),
    "rms_norm_eps": Rule("float", 1e-12, 1e-2, required=True),
    "hidden_act": Rule("str", required=True),
    "rope_theta": Rule("float", 1, 1e12),
    "rope_parameters": Rule("dict"),
    "rope_scaling": Rule("dict"),
    "max_position_embeddings": Rule("int", 1, TOKEN),
    "attention_bias": Rule("bool"),
    "mlp_bias": Rule("bool"),
    "tie_word_embeddings": Rule("bool"),
    "attention_dropout": Rule("float", 0, 1),
    "initializer_range": Rule("float", 0, 1e3),
    "bos_token_id": Rule("int", -1, TOKEN),
    "pad_token_id": Rule("int", -1, TOKEN),
    "eos_token_id": Rule("ids", -1, TOKEN),
}
"""`config.json` of a language model."""

GENERATION: Rules = {
    **{name: Rule("ids", -1, TOKEN) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    **{name: Rule("float", 0, 1e6) for name in ("temperature", "top_p", "min_p", "typical_p", "repetition_penalty")},
    **{name: Rule("int", 0, TOKEN) for name in ("top_k", "max_length", "max_new_tokens", "num_beams")},
    **{name: Rule("bool") for name in ("do_sample", "use_cache")},
}
"""`generation_config.json`."""


ROPE: Rules = {
    "rope_theta": Rule("float", 1, 1e12),
    "factor": Rule("float", 1e-3, 1e6),
    "rope_type": Rule("str"),
    "original_max_position_embeddings": Rule("int", 1, TOKEN),
}
"""`rope_parameters` or `rope_scaling` in a `config.json`."""

NOT_NULL = (
    *("mm_use_im_start_end", "mm_use_im_patch_token", "use_mm_proj", "mm_vision_select_feature", "mm_projector_type"),
    *("image_aspect_ratio", "tie_word_embeddings", "attention_bias", "mlp_bias", "rope_theta"),
    *("do_rescale", "rescale_factor", "do_center_crop", "do_pad", "num_channels"),
    *("fan_in_fan_out", "use_rslora", "use_dora", "train_batch_size", "logging_steps", "save_steps"),
)
"""Keys that a file may lack, but that are never null where a program wrote them."""


LORA: Rules = {
    "r": Rule("int", 1, SIZE, required=True),
    "lora_alpha": Rule("float", 1e-6, 1e6, required=True),
    "peft_type": Rule("str", required=True),
    "fan_in_fan_out": Rule("bool"),
    "use_rslora": Rule("bool"),
    "use_dora": Rule("bool"),
    "lora_bias": Rule("bool"),
    "rank_pattern": Rule("dict"),
    "alpha_pattern": Rule("dict"),
    "lora_dropout": Rule("float", 0, 1),
}
"""`adapter_config.json`."""


def check_settings(values: Mapping[str, Any], rules: Rules, path: str | Path, complete: bool = True) -> None:
    """Refuse a configuration that lacks a value or has one outside its range.

    Args:
        values: content of the file.
        rules: by key; other keys are left alone.
        path: of the file.
        complete: False where a writer leaves out what equals a default, so that a required value may be missing; it is
            never null.

    Raises:
        CheckpointError: lists every problem.
    """
    problems = []
    for name, rule in rules.items():
        value = values.get(name)
        if value is None:
            missing = rule.required and (complete or name in values)
            if missing or (name in NOT_NULL and name in values):
                problems.append(f"'{name}' is {'null' if name in values else 'missing'}")
        elif (problem := rule.problem(value)) is not None:
            problems.append(f"'{name}' is {value!r:.60}, {problem}")
    if problems:
        raise CheckpointError(f"{path}: {'; '.join(problems)}")


def check_language_model(values: Mapping[str, Any], path: str | Path, complete: bool = True) -> None:
    """Refuse impossible settings of a language model; arguments as of `check_settings`.

    Raises:
        CheckpointError: lists every problem.
    """
    check_settings(values, LANGUAGE_MODEL, path, complete)
    for name in ("rope_parameters", "rope_scaling"):
        check_settings(values.get(name) or {}, ROPE, f"{path} ({name})")

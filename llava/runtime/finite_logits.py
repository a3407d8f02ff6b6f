"""No answer is made of logits that are not numbers: NaN, +inf, or -inf for every token.

float16 overflows on models trained in bfloat16; decoding would make an empty answer or repeated words of that.
`LlavaForCausalLM.generate` puts a `LogitsWatch` in front of all other processors. Flags stay on the device until
generation has ended, so that no step waits for them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from llava.errors import NotFiniteError

NEVER = torch.iinfo(torch.int64).max
"""The step at which a sound row breaks."""

INSTEAD = {torch.float16: "bfloat16", torch.bfloat16: "float32"}
"""What to try where the weights have a dtype."""


def are_sound(logits: Tensor) -> Tensor:
    """Bool (...) for logits (..., V): True if the greatest is a finite number. -inf for some tokens is legitimate."""
    return logits.amax(-1).isfinite()  # NaN wins every comparison


def no_answer(where: str, dtype: torch.dtype, option: str = "--torch-dtype {}") -> str:
    """The message of a `NotFiniteError`.

    Args:
        where: names the question.
        dtype: of the weights.
        option: how the program at hand is told of another dtype, with braces in its place.
    """
    name = str(dtype).removeprefix("torch.")
    if dtype in INSTEAD:
        advice = f"{name} overflows on some models: pass {option.format(INSTEAD[dtype])}"
    else:
        advice = "no other dtype will help: the checkpoint is damaged, or its training diverged"
    return f"{where}: the logits are NaN or infinite with weights in {name}, so there is no answer; {advice}"


class LogitsWatch(LogitsProcessor):
    """Notes for each row of a batch the first step whose logits are not numbers, and lets decoding pass over it.

    A caller that passes one of its own to `generate` reads it by itself; otherwise `generate` raises.

    Args:
        at_once: raise at the step itself, which waits for the device; for answers that are shown as they come.
        dtype: of the weights, for the message of `at_once`.
        where: names the question in it.
    """

    def __init__(self, *, at_once: bool = False, dtype: torch.dtype = torch.float32, where: str = "") -> None:
        self.at_once, self._dtype, self._where = at_once, dtype, where
        self._rows, self._ends = 1, torch.empty(0, dtype=torch.long)
        self._start: int | None = None
        self._first: Tensor | None = None

    def begin(self, rows: int, ends: Sequence[int]) -> None:
        """Say what is generated, before the first step.

        Args:
            rows: B, beams not counted.
            ends: tokens that end a row; what is computed behind them does not count.
        """
        self._rows, self._ends = rows, torch.tensor(list(ends), dtype=torch.long)
        self._start = self._first = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Look at a step.

        Args:
            input_ids: (B * beams, T) tokens so far.
            scores: (B * beams, V) logits of the next token, or their log-softmax.

        Returns:
            the same, with 0 for every token in a row that is broken: whatever follows has numbers to work with.

        Raises:
            NotFiniteError: a row is broken, and this is to be said at once.
        """
        if self._start is None or self._first is None:
            self._start = input_ids.shape[1]
            self._first = torch.full((self._rows,), NEVER, device=scores.device)
            self._ends = self._ends.to(scores.device)
        broken = ~are_sound(scores)
        broken &= ~torch.isin(input_ids[:, self._start :], self._ends).any(-1)
        by_row = broken.view(self._rows, -1).any(-1)  # of beams, one is enough
        step = input_ids.shape[1] - self._start
        self._first = torch.where(by_row & (self._first == NEVER), step, self._first)
        if self.at_once and bool(by_row.any()):
            raise NotFiniteError(no_answer(self._where, self._dtype))
        return scores.masked_fill(broken[:, None], 0.0)

    def first(self) -> list[int]:
        """The step from 0 at which each row broke, or `NEVER`; waits for the device."""
        return [NEVER] * self._rows if self._first is None else self._first.tolist()

    def broken(self, length: int) -> list[int]:
        """The rows that broke within the first `length` steps; waits for the device."""
        return [row for row, first in enumerate(self.first()) if first < length]

    def has_ended(self, copies: int) -> Tensor:
        """Bool (B * copies,): nothing more is wanted of a broken row."""
        if self._first is None:
            return torch.zeros(self._rows * copies, dtype=torch.bool)
        return (self._first != NEVER).repeat_interleave(copies)

    @property
    def rows(self) -> int:
        """B."""
        return self._rows


class _EndsBroken(StoppingCriteria):
    """Ends the rows that a watch found broken."""

    def __init__(self, watch: LogitsWatch) -> None:
        self.watch = watch

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Bool (B * copies,)."""
        return self.watch.has_ended(len(input_ids) // self.watch.rows).to(input_ids.device)


class WatchedGeneration:
    """The watch of one call of `generate`, added to its arguments.

    Args:
        model: whose `generate` is called.
        arguments: keyword arguments of transformers' `generate`; changed.
        rows: B, the prompts.
    """

    def __init__(self, model: Any, arguments: dict[str, Any], rows: int) -> None:
        processors = list(arguments.pop("logits_processor", None) or [])
        given = [processor for processor in processors if isinstance(processor, LogitsWatch)]
        self._own = not given
        self._watch = LogitsWatch() if self._own else given[0]
        self._dtype = model.dtype
        self._watch.begin(rows, _end_ids(model, arguments))
        criteria = list(arguments.pop("stopping_criteria", None) or [])
        rest = [processor for processor in processors if processor is not self._watch]
        arguments["logits_processor"] = LogitsProcessorList([self._watch, *rest])
        arguments["stopping_criteria"] = StoppingCriteriaList([*criteria, _EndsBroken(self._watch)])
        # Runs before the watch and would hide what it looks for; some folders' generation_config.json switch it on.
        config = arguments.get("generation_config")
        if config is None:
            arguments["remove_invalid_values"] = False
        else:  # a copy of the caller's: transformers will take a configuration or single options, not both
            arguments["generation_config"] = config = copy.deepcopy(config)
            config.remove_invalid_values = False
            arguments.pop("remove_invalid_values", None)

    def checked(self, output: Any) -> Any:
        """What `generate` returned.

        Raises:
            NotFiniteError: rows are broken, and the caller has no watch of its own; holds the rows and the output.
        """
        ids = output if isinstance(output, Tensor) else output.sequences
        broken = self._watch.broken(ids.shape[1]) if self._own else []
        if broken:
            option = "torch_dtype=torch.{0} to load_pretrained_model, or --torch-dtype {0} to a program"
            raise NotFiniteError(
                no_answer(f"row(s) {broken} of {self._watch.rows} prompts", self._dtype, option), broken, ids
            )
        return output


def _end_ids(model: Any, arguments: dict[str, Any]) -> list[int]:
    """Tokens at which `generate` ends a row."""
    config = arguments.get("generation_config") or model.generation_config
    ends = arguments.get("eos_token_id", config.eos_token_id)
    if ends is None:
        return []
    return torch.as_tensor(ends).flatten().tolist()

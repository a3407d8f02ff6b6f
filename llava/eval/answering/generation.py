"""How the next token is chosen: greedy, beam search, or sampling that does not depend on the batch.

transformers samples with one random stream for a whole batch, so an answer would change with its neighbours and after
an interruption. Here every question has a stream of its own, seeded by `--seed` and the question's key.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from llava.data.answer_end import AnswerEnd
from llava.errors import FlagError

TOP_K = 50
"""Sampling keeps the 50 best tokens: the default of transformers, in force upstream without being named there."""


@dataclass(frozen=True)
class GenerationOptions:
    """The decoding options of the original programs.

    Attributes:
        temperature: 0 is greedy decoding (or plain beam search), above 0 is sampling.
        top_p: nucleus size in [0, 1], or None for no limit; only used in sampling. 0 keeps the most probable token.
        num_beams: number of beams; 1 is no beam search.
        max_new_tokens: limit on the tokens of one answer, the end-of-sequence token included.
        seed: seed of sampling; the same seed gives the same answers, whatever the batch size.
    """

    temperature: float = 0.2
    top_p: float | None = None
    num_beams: int = 1
    max_new_tokens: int = 128
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise FlagError(f"--temperature {self.temperature}: must be at least 0 and finite; 0 is greedy decoding")
        if self.top_p is not None and not 0 <= self.top_p <= 1:
            raise FlagError(f"--top_p {self.top_p}: must be from 0 to 1; 0 keeps the most probable token")
        if self.num_beams < 1:
            raise FlagError(f"--num_beams {self.num_beams}: must be at least 1")
        if self.max_new_tokens < 1:
            raise FlagError(f"--max_new_tokens {self.max_new_tokens}: must be at least 1")

    @property
    def samples(self) -> bool:
        """True if tokens are drawn at random. A nucleus of 0 leaves one token to draw, which greedy decoding finds."""
        return self.temperature > 0 and (self.top_p != 0 or self.num_beams > 1)

    def check_batch_size(self, batch_size: int | None) -> None:
        """Refuse what cannot give the same answers as one question at a time; None stands for `auto`.

        Raises:
            FlagError: `batch_size` is below 1, or above 1 for beam search with sampling, which has one random stream
                for the whole batch.
        """
        if batch_size is None:
            return
        if batch_size < 1:
            raise FlagError(f"--batch-size {batch_size}: must be at least 1")
        if batch_size > 1 and self.samples and self.num_beams > 1:
            raise FlagError(
                f"--num_beams {self.num_beams} with --temperature {self.temperature} draws from one random stream for "
                f"a whole batch, so --batch-size {batch_size} would change the answers; use --batch-size 1 or "
                f"--temperature 0"
            )

    def arguments(self, keys: Sequence[str]) -> dict[str, Any]:
        """Keyword arguments of `generate` for a batch.

        Seeds torch's global generator in the one case that needs it, beam search with sampling.

        Args:
            keys: one string for each row of the batch; the random stream of a row follows from it and `seed`.
        """
        arguments: dict[str, Any] = {"num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens}
        if not self.samples:
            return arguments | {"do_sample": False}
        if self.num_beams == 1:
            # The processor leaves one token standing, so that greedy decoding carries out its choice.
            return arguments | {"do_sample": False, "logits_processor": LogitsProcessorList([RowSampler(self, keys)])}
        torch.manual_seed(row_stream(self.seed, keys[0]).getrandbits(63))
        return arguments | {
            "do_sample": True,
            "temperature": float(self.temperature),
            "top_p": 1.0 if self.top_p is None else float(self.top_p),
            "top_k": TOP_K,
        }


def row_stream(seed: int, key: str) -> random.Random:
    """The random stream of one question; seeding by a string is stable between processes and machines."""
    return random.Random(f"{seed}/{key}")


class RowSampler(LogitsProcessor):
    """Draws each row's token from the row's own stream and masks all others.

    The draw inverts the cumulative distribution at one uniform number for each row and step.

    Args:
        options: temperature, top_p and seed.
        keys: one for each row of the batch.
    """

    def __init__(self, options: GenerationOptions, keys: Sequence[str]) -> None:
        self.streams = [row_stream(options.seed, key) for key in keys]
        self.warpers = LogitsProcessorList([TemperatureLogitsWarper(float(options.temperature))])
        if options.top_p is not None and options.top_p < 1:
            self.warpers.append(TopPLogitsWarper(float(options.top_p)))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask all but the drawn token.

        Args:
            input_ids: (B, T) tokens so far; unused.
            scores: (B, V) logits of the next token.

        Returns:
            (B, V) of the same dtype: 0 for the drawn token, -inf elsewhere.
        """
        best, tokens = scores.topk(min(TOP_K, scores.shape[-1]))  # (B, TOP_K)
        # In the order of the token ids: the order of equal logits may depend on the batch.
        tokens, order = tokens.sort()
        best = best.gather(-1, order).cpu().double()
        cumulative = self.warpers(input_ids, best).softmax(-1).cumsum(-1)  # (B, TOP_K)
        uniform = torch.tensor([[stream.random()] for stream in self.streams], dtype=torch.float64)
        # right=True: the first token whose cumulative probability exceeds the target, never one of probability 0.
        drawn = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)  # (B, 1)
        drawn = tokens.gather(-1, drawn.clamp(max=tokens.shape[-1] - 1).to(tokens.device))
        return torch.full_like(scores, -torch.inf).scatter(-1, drawn, 0.0)


def ending_arguments(end: AnswerEnd, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Keyword arguments of `generate` that end each row of a batch at `end`."""
    arguments: dict[str, Any] = {"eos_token_id": list(end.ids)} if end.ids else {}
    if end.texts:
        arguments["stopping_criteria"] = StoppingCriteriaList([EndsAtText(end.texts, tokenizer)])
    return arguments


class EndsAtText(StoppingCriteria):
    """Stops a row of a batch once the text that it has generated contains one of several.

    Only the last tokens are decoded, as many as the longest text has bytes: no token spells less than one.

    Args:
        texts: what ends a row.
        tokenizer: tokenizer of the model.
    """

    def __init__(self, texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> None:
        self.texts, self.tokenizer = tuple(texts), tokenizer
        self.width = max(len(text.encode()) for text in self.texts) + 1

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        """Which rows stop, bool (B,), given the ids (B, T) generated so far."""
        tails = self.tokenizer.batch_decode(input_ids[:, -self.width :], skip_special_tokens=True)
        stops = [any(text in tail for text in self.texts) for tail in tails]
        return torch.tensor(stops, device=input_ids.device)


class KeywordsStoppingCriteria(StoppingCriteria):
    """Stops a row of a batch once it has generated one of several keywords.

    A row stops if it ends with the ids of a keyword, or if the text of its last new tokens, as many as the longest
    keyword has, contains one. Special tokens are no part of that text: `</s>` is only found by its id.

    Args:
        keywords: texts to stop at.
        tokenizer: tokenizer of the model.
        input_ids: (B, T) prompts; none of their tokens counts as new.
    """

    def __init__(self, keywords: Sequence[str], tokenizer: PreTrainedTokenizerBase, input_ids: Tensor) -> None:
        self.keywords = list(keywords)
        self.keyword_ids = [
            torch.tensor(tokenizer(keyword, add_special_tokens=False).input_ids) for keyword in self.keywords
        ]
        self.max_keyword_len = max((len(ids) for ids in self.keyword_ids), default=0)
        self.tokenizer = tokenizer
        self.prompt = input_ids

    def __call__(self, output_ids: Tensor, scores: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Which rows stop, as bool (B,), given the ids (B, T') so far, with or without the prompt in front."""
        return torch.tensor([self._stops(row) for row in self._generated(output_ids)], device=output_ids.device)

    def _generated(self, output_ids: Tensor) -> Tensor:
        """The new ids: generation from embeddings passes no prompt, generation from ids does."""
        start = self.prompt.shape[1]
        has_prompt = output_ids.shape[1] >= start and torch.equal(output_ids[:, :start].cpu(), self.prompt.cpu())
        return output_ids[:, start:] if has_prompt else output_ids

    def _stops(self, row: Tensor) -> bool:
        if any(torch.equal(row[-len(ids) :].cpu(), ids) for ids in self.keyword_ids):
            return True
        text = self.tokenizer.decode(row[max(0, len(row) - self.max_keyword_len) :], skip_special_tokens=True)
        return any(keyword in text for keyword in self.keywords)

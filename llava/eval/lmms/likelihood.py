"""How probable a model finds given answers: `generate` is made to write them, and every token's probability is noted.

So the probability of an answer is that of `generate` itself, whatever an extension does with prompt, cache and single
tokens (dropped tokens, weights decided by the prompt), and answers of different lengths share a batch. Upstream
LLaVA has nothing of the kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.data.images import ProcessedImage
from llava.errors import BadSampleError, NotFiniteError
from llava.eval.answering.answers import Task
from llava.eval.answering.loading import LoadedModel
from llava.eval.answering.prompts import tokenizer_image_token
from llava.eval.answering.runner import Prompt, conversation_of, generate_batch, make_prompt, named

ANSWER = "<answer>"
"""Stands for the answer while a template is asked what it writes in front of it."""


@dataclass(frozen=True)
class Candidate:
    """A prompt and one answer to it.

    Attributes:
        prompt: what the model is given.
        answer: (n,) int64, the tokens whose probability is asked for.
    """

    prompt: Prompt
    answer: Tensor


class Likelihood(NamedTuple):
    """How probable an answer is.

    Attributes:
        log: natural logarithm of the probability of its tokens, one after the other.
        is_greedy: True if greedy decoding would write the same tokens.
    """

    log: float
    is_greedy: bool


def make_candidate(key: str, task: Task, answer: str, loaded: LoadedModel, conv_mode: str) -> Candidate:
    """Put an answer behind the prompt of a task, as the template does in training.

    Blanks in front of the answer are the template's; the separator that ends an answer is not part of it.

    Raises:
        BadSampleError: the answer is empty or cannot be written; or as `make_prompt`.
        FlagError: the template is not known.
    """
    prompt = make_prompt(key, task, loaded, conv_mode)
    answer = answer.strip()
    if not answer or DEFAULT_IMAGE_TOKEN in answer:
        raise BadSampleError(f"{task.where}: {answer!r} is no answer; it has to be text, without {DEFAULT_IMAGE_TOKEN}")
    filled = conversation_of(task, loaded, conv_mode)
    filled.messages[-1][1] = ANSWER
    before = filled.get_prompt().rpartition(ANSWER)[0]
    ids = tokenizer_image_token(before + answer, loaded.tokenizer, return_tensors="pt", add_bos=not filled.writes_bos)
    return _split(prompt, ids)


def _split(prompt: Prompt, ids: Tensor) -> Candidate:
    """Cut prompt with answer in two where it begins to differ from the prompt alone.

    That is the end of the prompt, unless a tokenizer joins the end of the prompt with the answer.
    """
    width = min(len(prompt.input_ids), len(ids))
    same = int((prompt.input_ids[:width] == ids[:width]).long().cumprod(0).sum())
    length = prompt.length - len(prompt.input_ids) + same
    start = Prompt(prompt.key, prompt.task, prompt.input_ids[:same], length, prompt.end)
    answer = ids[same:]
    ends = set(prompt.end.ids) & set(answer.tolist())
    if ends or not len(answer):
        raise BadSampleError(
            f"{prompt.task.where}: the answer has {len(answer)} tokens, {len(ends)} kinds of which end a sequence; "
            f"it needs at least one, and none that ends it"
        )
    return Candidate(start, answer)


def likelihoods(
    candidates: Sequence[Candidate], images: Sequence[Sequence[ProcessedImage]], loaded: LoadedModel
) -> list[Likelihood]:
    """The probabilities of one batch of answers.

    Args:
        candidates: B prompts with an answer each.
        images: for each of them its images.
        loaded: model and tokenizer.

    Raises:
        NotFiniteError: the logits of a prompt or an answer are not numbers; names the questions.
    """
    ends = list(candidates[0].prompt.end.ids)
    # Whatever follows a shorter answer is not counted; an end lets its row rest.
    forced = ForcedAnswers([candidate.answer for candidate in candidates], filler=next(iter(ends), 0))
    arguments = {
        **({"eos_token_id": ends} if ends else {}),
        "max_new_tokens": forced.steps,
        "do_sample": False,
        "num_beams": 1,
        "logits_processor": LogitsProcessorList([forced]),
    }
    try:
        generate_batch([candidate.prompt for candidate in candidates], images, loaded, arguments)
    except NotFiniteError as error:
        tasks = named(candidates[row].prompt.task for row in error.rows)
        raise NotFiniteError(loaded.no_answer(tasks), error.rows) from error
    return forced.result()


class ForcedAnswers(LogitsProcessor):
    """Leaves in each row the next token of a given answer standing, and adds up the log-probabilities of these tokens.

    Args:
        answers: B rows (N_i,) int64.
        filler: token that is written after the end of a shorter answer.
    """

    def __init__(self, answers: Sequence[Tensor], filler: int) -> None:
        self.steps = max(map(len, answers))
        self._tokens = torch.full((len(answers), self.steps), filler, dtype=torch.long)  # (B, n)
        self._counts = torch.zeros(len(answers), self.steps, dtype=torch.bool)
        for row, answer in enumerate(answers):
            self._tokens[row, : len(answer)] = answer
            self._counts[row, : len(answer)] = True
        self._logs: list[Tensor] = []
        self._greedy: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Mask all but the next token of each answer.

        Args:
            input_ids: (B, T) tokens so far; unused.
            scores: (B, V) logits of the next token.

        Returns:
            (B, V) of the same dtype: 0 for that token, -inf elsewhere.
        """
        token = self._tokens[:, len(self._logs), None].to(scores.device)  # (B, 1)
        self._logs.append(scores.float().log_softmax(-1).gather(-1, token)[:, 0].cpu())
        self._greedy.append((scores.argmax(-1) == token[:, 0]).cpu())
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)

    def result(self) -> list[Likelihood]:
        """What was noted, when `generate` has ended.

        Raises:
            RuntimeError: `generate` ended before the longest answer did.
        """
        if len(self._logs) != self.steps:
            raise RuntimeError(f"generate() made {len(self._logs)} steps; the longest answer has {self.steps} tokens")
        logs = torch.stack(self._logs, dim=1).double().masked_fill(~self._counts, 0.0).sum(1)  # (B,)
        greedy = (torch.stack(self._greedy, dim=1) | ~self._counts).all(1)  # (B,)
        return [Likelihood(*pair) for pair in zip(logs.tolist(), greedy.tolist(), strict=True)]

"""Decoding one conversation token by token on one cache, with every logit in hand.

`generate` picks tokens; measurements of long answers feed given ones and read how probable each was, and continue the
same cache in the next turn (upstream `dynamic_eval/model_lvis_*.py`). Works alike for dense and sparse models.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache

from llava.data.answer_end import AnswerEnd
from llava.data.images import ProcessedImage
from llava.errors import NotFiniteError
from llava.eval.answering.generation import EndsAtText
from llava.eval.answering.loading import LoadedModel
from llava.eval.answering.runner import image_arguments
from llava.runtime.finite_logits import are_sound


@dataclass(frozen=True)
class ScoredAnswer:
    """How probable a given answer was.

    Attributes:
        perplexity: exp of the mean cross-entropy of its tokens.
        tokens: number of tokens that were scored, the end of sequence included.
        stored: positions that the last layer's cache grew by; less than the tokens fed where a model drops some.
    """

    perplexity: float
    tokens: int
    stored: int


class Stepper:
    """A conversation in progress.

    Args:
        loaded: model and tokenizer.
        where: names the conversation in errors.
        end: what ends an answer; None: what ends one without a template.
    """

    def __init__(self, loaded: LoadedModel, where: str = "the conversation", end: AnswerEnd | None = None) -> None:
        self.loaded, self.where = loaded, where
        self.end = loaded.answer_end() if end is None else end
        offered = loaded.model.extensions.make_cache(loaded.model)
        self.cache: Any = DynamicCache(config=loaded.model.config) if offered is None else offered
        self.logits: Tensor | None = None

    @property
    def positions(self) -> int:
        """Positions that went through the model, image patches included."""
        return int(self.cache.get_seq_length(0))

    @property
    def stored(self) -> int:
        """Positions in the cache of the last layer."""
        return int(self.cache.get_seq_length(self.loaded.model.config.num_hidden_layers - 1))

    @torch.no_grad()
    def feed(self, ids: Tensor | Sequence[int], images: Sequence[ProcessedImage] = ()) -> Tensor:
        """Run the next ids through the model.

        Args:
            ids: (n,) with an image token for each image; images only in the first call.
            images: of the first call.

        Returns:
            (V,) float32 logits of the token that comes next.
        """
        model = self.loaded.model
        rows = torch.as_tensor(ids, dtype=torch.long, device=model.device)[None]  # (1, n)
        arguments = image_arguments([images], self.loaded) if images else {}
        output = model(input_ids=rows, cache=self.cache, use_cache=True, logits_to_keep=1, **arguments)
        self.logits = output.logits[0, -1].float()
        return self.logits

    def score(self, ids: Sequence[int]) -> ScoredAnswer:
        """Score a given answer one token per call; its last token is scored and not fed.

        Args:
            ids: of the answer, the end of sequence included; at least one.

        Raises:
            NotFiniteError: a logit, or the perplexity, is not a number.
        """
        if self.logits is None:
            raise RuntimeError("feed the prompt before scoring an answer")
        before, losses, sound = self.stored, [], []
        for index, token in enumerate(ids):
            sound.append(are_sound(self.logits))
            losses.append(F.cross_entropy(self.logits[None], torch.tensor([token], device=self.logits.device)))
            if index + 1 < len(ids):
                self.feed([token])
        perplexity = float(torch.stack(losses).mean().exp())
        self._check(torch.stack(sound).all())
        if not math.isfinite(perplexity):
            raise NotFiniteError(f"{self.where}: the perplexity of the answer is {perplexity}")
        return ScoredAnswer(perplexity, len(ids), self.stored - before)

    def _check(self, sound: Tensor) -> None:
        """Raise if a flag on the device says that logits were not numbers."""
        if not bool(sound):
            raise NotFiniteError(self.loaded.no_answer(self.where))

    def answer(self, max_new_tokens: int) -> list[int]:
        """Greedy decoding until the end of the answer or `max_new_tokens`; a token that ends it is not returned or fed.

        Of an end that is a text, all tokens are returned, and all but the last are fed.

        Raises:
            NotFiniteError: a logit is not a number.
        """
        if self.logits is None:
            raise RuntimeError("feed the prompt before asking for an answer")
        ids: list[int] = []
        texts = EndsAtText(self.end.texts, self.loaded.tokenizer) if self.end.texts else None
        while len(ids) < max_new_tokens:
            self._check(are_sound(self.logits))
            token = int(self.logits.argmax())
            if token in self.end.ids:
                break
            ids.append(token)
            if texts is not None and bool(texts(torch.tensor([ids]), self.logits)):
                break
            self.feed([token])
        return ids

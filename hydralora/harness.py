"""The model type `hydralora` of lm-evaluation-harness: HFLM with an adapter; the program is `hydralora/evaluate.py`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import LogitsProcessorList

from hydralora.harness_options import MODEL_TYPE, require_harness
from hydralora.tuner import RoutingUnit, hydralora_layers
from hydralora.tuner.batch import IGNORED
from hydralora.tuner.loading import load_adapter
from llava.errors import CheckpointError, NotFiniteError
from llava.runtime.finite_logits import LogitsWatch, are_sound, no_answer
from llava.runtime.hub import local_folder
from llava.runtime.weights.base_weights import GENERATION_FILE

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

SHOWN = 80
"""Characters of a question in a message."""

ADAPTER_FILES = ("adapter_config.json", "adapter_model.*", GENERATION_FILE)


class AdaptedModel:
    """What a model type of the harness does otherwise for adapters; goes in front of HFLM.

    `peft` may name an adapter of ours, of the original HydraLoRA or of any other method of PEFT; without it, the base
    alone is evaluated.
    """

    _model: Any
    _targets = 0  # of the row under way, for routing by sequence

    def _create_model(self, *args: Any, peft: str | None = None, revision: str | None = None, **kwargs: Any) -> None:
        """Base and adapter.

        HFLM cuts the base's vocabulary down to the tokenizer's as soon as there is an adapter, which changes the
        probabilities of the base itself; an adapter of a linear layer needs nothing of the kind.

        Raises:
            CheckpointError: there is no adapter of that name, or it cannot be read.
        """
        super()._create_model(*args, revision=revision, **kwargs)  # type: ignore[misc]
        if not peft:
            return
        try:
            self._model = load_adapter(self._model, local_folder(peft, ADAPTER_FILES, revision=revision))
        except ValueError as error:
            raise CheckpointError(f"peft={peft}: {error}") from error

    def _loglikelihood_tokens(self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any) -> list[Any]:
        """Log-likelihoods of continuations; where a router decides for the whole sequence, row by row.

        The harness pads without a mask, and the continuation must not take part in the decision.
        """
        compute = super()._loglikelihood_tokens  # type: ignore[misc]
        layers = hydralora_layers(self._model).values()
        if not any(unit is RoutingUnit.SEQUENCE for layer in layers for unit in layer.routing.values()):
            return compute(requests, disable_tqdm=disable_tqdm, **kwargs)
        answers = []
        for request in tqdm(requests, desc="log-likelihoods, row by row", disable=disable_tqdm):
            self._targets = len(request[2])
            answers += compute([request], disable_tqdm=True, override_bs=1)
        self._targets = 0
        return answers

    def _model_call(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Logits (B, T, V) for `inps` (B, T).

        Raises:
            NotFiniteError: they are not numbers.
        """
        logits = self._logits(inps, *args, **kwargs)
        self._refuse_broken((~are_sound(logits).all(-1)).nonzero().flatten().tolist(), inps)
        return logits

    def _model_generate(self, context: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Ids (B, T + new) that continue `context` (B, T).

        Raises:
            NotFiniteError: logits are not numbers.
        """
        watch = LogitsWatch()
        watch.begin(len(context), [self.eot_token_id])  # type: ignore[attr-defined]
        kwargs["logits_processor"] = LogitsProcessorList([watch])
        output = super()._model_generate(context, *args, **kwargs)  # type: ignore[misc]
        self._refuse_broken(watch.broken(output.shape[1] - context.shape[1]), context)
        return output

    def _refuse_broken(self, rows: Sequence[int], ids: Tensor) -> None:
        """Raise for rows whose logits are not numbers; the harness knows them by their text alone."""
        if rows:
            end = self.tokenizer.decode(ids[rows[0]], skip_special_tokens=True)[-SHOWN:]  # type: ignore[attr-defined]
            where = f"{len(rows)} of {len(ids)} questions in a batch (the first ends with {end!r})"
            raise NotFiniteError(no_answer(where, self._model.dtype, "dtype={} in --model_args"), rows)

    def _logits(self, inps: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not self._targets:
            return super()._model_call(inps, *args, **kwargs)  # type: ignore[misc]
        # `inps` ends one token before the continuation does, and the labels say where the prompt ends.
        labels = inps.clone()
        labels[:, : inps.shape[1] + 1 - self._targets] = IGNORED
        with torch.no_grad():
            return self._model(input_ids=inps, labels=labels).logits


@cache
def register() -> type[HFLM]:
    """Make the model type known to the harness in this process; returns its class.

    Raises:
        FlagError: the harness is not installed.
    """
    require_harness()
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM

    @register_model(MODEL_TYPE)
    class HydraLoraLM(AdaptedModel, HFLM):
        """A model of transformers with an adapter."""

    return HydraLoraLM

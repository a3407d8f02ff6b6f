"""Asking the model that is being trained, in batches shared out over the processes.

Layers that ZeRO-3 has split are gathered by all processes together, so each makes the same number of passes, about
images in the same ones; `generate` keeps them in step within one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object
from torch import nn

from llava.eval.answering.answers import row_keys
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.loading import LoadedModel
from llava.eval.answering.prefetch import Prefetcher
from llava.eval.answering.runner import Prompt, answer_batch, load_images, make_prompt
from llava.runtime.monitoring.shares import ShareSampler
from llava.runtime.partition import whole
from llava.train.evaluation.questions import QuestionSet

NAME = "training"
"""The `model_id` of answer rows."""

THREADS = 4
"""That read images."""


def ask_all(
    questions: QuestionSet, loaded: LoadedModel, conv_mode: str, batch_size: int, process: int, processes: int
) -> list[str]:
    """The answers to all questions, in their order; the same in every process.

    Args:
        questions: what is asked.
        loaded: the model, in evaluation mode.
        conv_mode: the template that it is trained with.
        batch_size: questions in one `generate`.
        process: number of this process.
        processes: how many there are.

    Raises:
        LlavaError: a question or image cannot be read, or the logits are not numbers.
    """
    keys = row_keys(questions.to_row(task, "", NAME) for task in questions.tasks)
    prompts = [make_prompt(key, task, loaded, conv_mode) for key, task in zip(keys, questions.tasks, strict=True)]
    options = GenerationOptions(temperature=0.0, max_new_tokens=questions.max_new_tokens)
    texts: dict[str, str] = {}
    with whole(_owned(loaded.model)):
        for with_images in (True, False):
            chosen = [prompt for prompt in prompts if bool(prompt.task.images) == with_images]
            chosen.sort(key=lambda prompt: -prompt.length)  # rows of one batch need little padding
            if chosen:
                sampler = ShareSampler(len(chosen), batch_size, process, processes)
                texts |= _ask(chosen, sampler, questions, loaded, options)
    everywhere: dict[str, str] = {}
    for part in gather_object([texts]):
        everywhere |= part
    return [everywhere[key] for key in keys]


def _ask(
    prompts: Sequence[Prompt],
    sampler: ShareSampler,
    questions: QuestionSet,
    loaded: LoadedModel,
    options: GenerationOptions,
) -> dict[str, str]:
    """The answers of this process's batches; one that only keeps in step with others counts nothing."""

    def images_of(batch: Sequence[Prompt]) -> list[Any]:
        return [load_images(prompt.task, loaded, questions.open_image) for prompt in batch]

    texts: dict[str, str] = {}
    batches = [[prompts[place] for place in places] for places in sampler]
    with Prefetcher(batches, images_of, THREADS) as queue:
        for counts in sampler.counted():
            ((batch, images),) = queue.take(1)
            answers = answer_batch(batch, images, loaded, options)
            texts |= answers if counts else {}
    return texts


def _owned(model: Any) -> list[nn.Parameter]:
    """Parameters that the model uses by itself, outside of a module's pass."""
    return [weight for module in (model, model.get_model()) for weight in module.parameters(recurse=False)]

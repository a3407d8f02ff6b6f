"""What lmms-eval asks of a model, in the terms of `llava.eval`: requests as tasks, generation arguments as options."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from PIL import Image

from llava.constants import DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER
from llava.data.images import ProcessedImage, convert_rgb
from llava.errors import BadSampleError, FlagError
from llava.eval.answering.answers import Task
from llava.eval.answering.generation import TOP_K, GenerationOptions
from llava.eval.answering.loading import LoadedModel
from llava.eval.answering.runner import load_images

MAX_NEW_TOKENS = 1024
"""Limit for tasks that name none, that of lmms-eval's own LLaVA."""

UNNAMED_STOP = ["\n\n"]
"""What lmms-eval writes into `until` for tasks that name no end; obeyed, it would cut answers of several paragraphs."""

WITHOUT_EFFECT = {
    "repetition_penalty": (1, None),
    "length_penalty": (1, None),
    "num_return_sequences": (1, None),
    "min_new_tokens": (0, None),
    "stop_sequences": ([], None),
    "use_cache": (True, None),
}
"""Generation arguments that are not carried out, with the values that ask for nothing."""

IGNORED = {"image_aspect_ratio", "skip_special_tokens"}
"""How an image is cut is part of the checkpoint, as in lmms-eval's own LLaVA; answers never show special tokens."""


@dataclass(frozen=True)
class Request:
    """One request, before its images are read.

    Attributes:
        key: of this request alone; the random stream of sampling follows from it.
        context: the question with all that the task puts around it.
        what: the generation arguments, or the answer whose probability is asked for.
        to_visual: from a document to its images; None if there are none.
        document: gives the document of the task.
        where: task, split and number of the document, for error messages.
    """

    key: str
    context: str
    what: Any
    to_visual: Callable[[Any], Sequence[Any] | None]
    document: Callable[[], Any]
    where: str


def read_requests(instances: Iterable[Any], documents: Mapping[str, Any]) -> list[Request]:
    """The requests of lmms-eval's instances, in order.

    The same question may come more than once (`--repeats`), and every time is a request of its own.

    Args:
        instances: their `args` are (context, what, doc_to_visual, doc_id, task, split).
        documents: data by task and split.
    """
    seen: Counter[str] = Counter()
    requests = []
    for instance in instances:
        context, what, to_visual, number, task, split = instance.args
        where = f"{task}/{split}:{number}"
        data = documents[task][split]
        key = f"{where}#{seen[where]}"
        seen[where] += 1
        requests.append(Request(key, context, what, to_visual, lambda data=data, n=number: data[n], where))
    return requests


def load_request(request: Request, loaded: LoadedModel) -> tuple[Task, list[ProcessedImage]]:
    """The task of a request, and its images made ready for the model.

    `<image>` in the context is the place of an image; without any, the images stand in front.

    Raises:
        BadSampleError: the task has something else than images, or not as many as its text names.
        BadImageError: an image cannot be used.
        CheckpointError: there are images, and the model has no vision tower.
    """
    visuals = request.to_visual(request.document()) or []
    others = [type(visual).__name__ for visual in visuals if not isinstance(visual, Image.Image)]
    if others:
        raise BadSampleError(f"{request.where}: the task shows {others}; this model takes images (PIL.Image) only")
    question = request.context.replace(DEFAULT_IMAGE_TOKEN, IMAGE_PLACEHOLDER)
    task = Task(request.key, question, request.context, tuple(map(str, range(len(visuals)))), request.where)
    names = f"{request.where}: image"
    return task, load_images(task, loaded, lambda name, _: convert_rgb(visuals[int(name)], f"{names} {name}"))


def generation_options(
    arguments: Mapping[str, Any], where: str, seed: int
) -> tuple[GenerationOptions, tuple[str, ...]]:
    """Decoding options, and the texts that end an answer.

    `do_sample: false` is greedy decoding whatever the temperature; `do_sample: true` without a temperature means 1.

    Args:
        arguments: the task's `generation_kwargs`.
        where: names the request in errors.
        seed: of sampling.

    Raises:
        FlagError: an argument is out of range, or unknown and not without effect.
    """
    rest = dict(arguments)
    samples, temperature = rest.pop("do_sample", None), rest.pop("temperature", None)
    if temperature is None:
        temperature = 1.0 if samples else 0.0
    if samples is False:
        temperature = 0.0
    top_p, top_k = rest.pop("top_p", None), rest.pop("top_k", None)
    if temperature and top_k not in (None, TOP_K):
        raise FlagError(f"{where}: top_k is {top_k}, and sampling takes the {TOP_K} best tokens here; leave it out")
    beams, until = rest.pop("num_beams", None), rest.pop("until", None)
    limits = [rest.pop(name, None) for name in ("max_new_tokens", "max_gen_toks")]
    limit = next((value for value in limits if value is not None), MAX_NEW_TOKENS)
    own_seed = rest.pop("seed", None)
    unknown = {
        name: value
        for name, value in rest.items()
        if name not in IGNORED and not any(value == neutral for neutral in WITHOUT_EFFECT.get(name, ()))
    }
    if unknown:
        raise FlagError(
            f"{where}: the generation arguments {unknown} are not carried out, so the answers would not be those that "
            f"the task asks for; leave them out of its generation_kwargs"
        )
    try:
        options = GenerationOptions(
            temperature=float(temperature),
            top_p=float(top_p) if temperature and top_p is not None else None,
            num_beams=1 if beams is None else int(beams),
            max_new_tokens=int(limit),
            seed=seed if own_seed is None else int(own_seed),
        )
    except ValueError as error:
        raise FlagError(f"{where}: generation arguments {dict(arguments)}: {error}") from error
    return options, _stops(until, where)


def _stops(until: object, where: str) -> tuple[str, ...]:
    texts = [until] if isinstance(until, str) else until or []
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise FlagError(f"{where}: until is {until!r}; it has to be a text or a list of texts")
    return () if texts == UNNAMED_STOP else tuple(filter(None, texts))


def cut(text: str, stops: Sequence[str]) -> str:
    """What stands in front of the first of `stops`."""
    ends = [end for end in map(text.find, stops) if end >= 0]
    return text[: min(ends, default=len(text))].rstrip()

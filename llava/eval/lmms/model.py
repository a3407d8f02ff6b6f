"""The model type `llava_extensions` of lmms-eval: any checkpoint of ours, in batches, by the runner of `llava.eval`.

Corresponds to lmms-eval's own `llava`, which wraps upstream's package. Prompts, images, decoding and batches are
those of `llava.eval`, and so are the answers. Only `LlavaExtensions` needs lmms-eval to be installed.
"""

from __future__ import annotations

import importlib.util
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from tqdm import tqdm

from llava.data.images import ProcessedImage
from llava.errors import FlagError
from llava.eval.answering.answers import Task
from llava.eval.answering.batches import Batches, first_batch_size
from llava.eval.answering.conv_mode import conv_mode_of_questions
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.loading import LoadedModel, load_model
from llava.eval.answering.options import Fallback
from llava.eval.answering.prefetch import Prefetcher
from llava.eval.answering.runner import answer_batch, make_prompt, most_together
from llava.eval.lmms.likelihood import Likelihood, likelihoods, make_candidate
from llava.eval.lmms.requests import Request, cut, generation_options, load_request, read_requests
from llava.inference_options import option_names, put_on
from llava.runtime.ranges import COUNT, NOT_NEGATIVE, check_ranges

if TYPE_CHECKING:
    from lmms_eval.api.instance import GenerationResult, Instance

Asked = tuple[Request, Task, list[ProcessedImage]]
"""A request, its task, and the images of the task."""

Answer = TypeVar("Answer")


class Loss(NamedTuple):
    """What lmms-eval 0.7 wants to know of a choice: it takes the one with the smallest number.

    Attributes:
        loss: minus the log-likelihood of the choice, summed over its tokens.
        is_greedy: True if greedy decoding would write it.
    """

    loss: float
    is_greedy: bool

    def strip(self) -> str:
        """Nothing: lmms-eval's cache of responses can only keep texts, and asks in this way whether there is one."""
        return ""


class BatchedModel:
    """The methods that lmms-eval calls; goes in front of its base class.

    Args:
        pretrained: checkpoint folder of any format that `load_pretrained_model` reads.
        model_base: base model, for a checkpoint that holds only adapters or a projector.
        conv_template: conversation template; None: that of the model's training, or `vicuna_v1` where its folder does
            not say.
        device: as `--device`; each of several processes takes the GPU of its local rank.
        dtype: as `--torch-dtype`.
        load_8bit: quantise the weights to 8 bits.
        load_4bit: quantise the weights to 4 bits.
        batch_size: questions in one `generate`; `auto` begins with many, and halves them when memory runs out.
        max_batch_size: limit on `auto`.
        seed: of sampling, where a task samples.
        workers: threads that read and preprocess images.
        options: those that installed packages add, for example `reduce` and `keep` of `dynamic`.

    Raises:
        FlagError: an option is refused, or the device is not available.
        CheckpointError: the folder cannot be loaded.
    """

    task_dict: dict[str, Any]

    def __init__(
        self,
        pretrained: str,
        model_base: str | None = None,
        conv_template: str | None = None,
        device: str | None = None,
        dtype: str = "auto",
        load_8bit: bool = False,
        load_4bit: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        seed: int = 0,
        workers: int = 4,
        **options: Any,
    ) -> None:
        super().__init__()
        if unknown := sorted(set(options) - set(option_names())):
            raise FlagError(f"--model_args {unknown[0]}=...: not known; next to the named ones: {list(option_names())}")
        template = Fallback("vicuna_v1") if conv_template is None else conv_template
        self.conv_mode = conv_mode_of_questions(template, pretrained, option="conv_template")
        self.batch_size = read_batch_size(batch_size)
        self.max_batch_size, self.seed, self.workers = max_batch_size, seed, workers
        check_ranges(self, {"max_batch_size": COUNT, "workers": NOT_NEGATIVE})
        self.device = torch.device(own_device(device))
        loaded = load_model(
            pretrained,
            model_base,
            device=str(self.device),
            torch_dtype=dtype,
            load_8bit=load_8bit,
            load_4bit=load_4bit,
        )
        put_on(loaded, SimpleNamespace(**options))
        self.loaded: LoadedModel = replace(loaded, dtype_option="dtype={} in --model_args")
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers of the model, each cut where the task wants it to end.

        Raises:
            LlavaError: a request cannot be asked as the task wants it; names the document.
        """
        asked = read_requests(requests, self.task_dict)
        groups: dict[GenerationOptions, list[Request]] = defaultdict(list)
        stops = {}
        for request in asked:
            options, stops[request.key] = generation_options(request.what, request.where, self.seed)
            groups[options].append(request)
        texts: dict[str, str] = {}
        for options, group in groups.items():

            def work(batch: list[Asked], options: GenerationOptions = options) -> list[str]:
                prompts = [make_prompt(request.key, task, self.loaded, self.conv_mode) for request, task, _ in batch]
                answers = answer_batch(prompts, [images for *_, images in batch], self.loaded, options)
                return [answers[prompt.key] for prompt in prompts]

            texts |= self._in_batches(group, work, "answers", limit=most_together(options))
        return [cut(texts[request.key], stops[request.key]) for request in asked]

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """For each choice what lmms-eval compares, which is minus the log-likelihood.

        lmms-eval 0.7 turns a bare pair into text before it scores it, and leaves alone what a `GenerationResult` holds.

        Raises:
            LlavaError: a request cannot be asked; names the document.
        """
        from lmms_eval.api.instance import GenerationResult

        asked = read_requests(requests, self.task_dict)

        def work(batch: list[Asked]) -> list[Likelihood]:
            candidates = []
            for request, task, _ in batch:
                answer = request.what if isinstance(request.what, str) else request.what(request.document())
                candidates.append(make_candidate(request.key, task, answer, self.loaded, self.conv_mode))
            return likelihoods(candidates, [images for *_, images in batch], self.loaded)

        found = self._in_batches(asked, work, "log-likelihoods")
        return [GenerationResult(Loss(-found[request.key].log, found[request.key].is_greedy)) for request in asked]

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not offered.

        Raises:
            FlagError: always.
        """
        raise FlagError(f"{requests[0].task_name}: this model answers in one round, and the task asks in several")

    def clean(self) -> None:
        """Free the memory of the model; lmms-eval calls this when all answers are there."""
        self.__dict__.pop("loaded", None)
        super().clean()  # type: ignore[misc]

    def _in_batches(
        self,
        requests: Sequence[Request],
        work: Callable[[list[Asked]], list[Answer]],
        unit: str,
        limit: int | None = None,
    ) -> dict[str, Answer]:
        """What `work` gives for each request, by key; the longest contexts first, images read ahead."""
        limits = [size for size in (limit, self.max_batch_size) if size is not None]
        first = first_batch_size(self.device, min(limits, default=None))
        size = first if self.batch_size is None else min(self.batch_size, limit or self.batch_size)
        ordered = sorted(requests, key=lambda request: -len(request.context))
        found: dict[str, Answer] = {}
        with (
            tqdm(total=len(requests), desc=f"llava: {unit}", disable=self._rank != 0) as progress,
            Prefetcher(ordered, lambda request: load_request(request, self.loaded), self.workers) as queue,
        ):

            def carry_out(batch: list[tuple[Request, tuple[Task, list[ProcessedImage]]]]) -> list[Answer]:
                return work([(request, task, images) for request, (task, images) in batch])

            for batch, answers in Batches(
                queue, carry_out, size, fixed=self.batch_size is not None, say=progress.write
            ):
                found |= {request.key: answer for (request, _), answer in zip(batch, answers, strict=True)}
                progress.update(len(batch))
        return found


def read_batch_size(value: int | str) -> int | None:
    """lmms-eval's `--batch_size`: a number, or None for `auto` and `auto:N`.

    Raises:
        FlagError: neither of them.
    """
    text = str(value)
    if text.partition(":")[0] == "auto":
        return None
    if not text.isdecimal() or int(text) < 1:
        raise FlagError(f"--batch_size {value}: must be a number from 1 on, or auto")
    return int(text)


def own_device(device: str | None) -> str:
    """The device of this process; with several processes on GPUs, that of its local rank.

    Raises:
        FlagError: a certain GPU is named for several processes.
    """
    processes, local_rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("LOCAL_RANK", "0")
    wanted = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if processes == 1 or not wanted.startswith("cuda"):
        return wanted
    if wanted not in ("cuda", f"cuda:{local_rank}"):
        raise FlagError(f"device={device} with {processes} processes: leave it out, each takes a GPU of its own")
    return f"cuda:{local_rank}"


def is_installed() -> bool:
    """True if lmms-eval can be imported."""
    return importlib.util.find_spec("lmms_eval") is not None


@cache
def model_class() -> type[BatchedModel]:
    """The class that lmms-eval makes.

    Raises:
        FlagError: lmms-eval is not installed.
    """
    if not is_installed():
        raise FlagError("lmms-eval is not installed; pip install 'llava-extensions[lmms]'")
    from lmms_eval.api.model import lmms

    class LlavaExtensions(BatchedModel, lmms):
        """A LLaVA with whatever extensions its checkpoint has."""

    return LlavaExtensions


def __getattr__(name: str) -> type[BatchedModel]:
    """`LlavaExtensions`, made when lmms-eval asks for it."""
    if name == "LlavaExtensions":
        return model_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

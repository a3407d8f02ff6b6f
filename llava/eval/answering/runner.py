"""Answers questions in batches: tasks, prompts, length-sorted batches, left-padded `generate`, answers file.

All programs that write an answers file share this, through `options.py` (upstream repeats the loop in `model_vqa.py`,
`model_vqa_loader.py`, `model_vqa_science.py` and `model_vqa_mmbench.py`, one question at a time). A program brings its
tasks, a way to open an image, and the row of an answer.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from llava.conversation import Conversation
from llava.data.answer_end import AnswerEnd
from llava.data.images import ProcessedImage
from llava.data.pixels import process_images
from llava.errors import CheckpointError, NotFiniteError
from llava.eval.answering.answers import AnswersFile, Task
from llava.eval.answering.batches import Batches, first_batch_size
from llava.eval.answering.generation import GenerationOptions, ending_arguments
from llava.eval.answering.loading import LoadedModel
from llava.eval.answering.prefetch import Prefetcher
from llava.eval.answering.prompts import add_image_markers, ask, prompt_ids

OpenImage = Callable[[str, str], Image.Image]
"""From an entry of `Task.images` and `Task.where` to an RGB image; its errors name both."""


LONGEST_NAME = 1000
"""Characters of an image's name that an error repeats; a request's image may be named by its whole content."""


@dataclass(frozen=True)
class Prompt:
    """A task made ready for the model.

    Attributes:
        key: names the row in the answers file.
        input_ids: (T,) int64 with `IMAGE_TOKEN_INDEX` for each image.
        length: positions in the spliced sequence, for sorting; tiles of an image are not counted.
        end: what ends the answer; the same for all prompts of a batch.
    """

    key: str
    task: Task
    input_ids: Tensor
    length: int
    end: AnswerEnd


ToPrompt = Callable[[str, Task, LoadedModel], Prompt]
"""From the key of a task, the task and the model to its prompt."""


ToText = Callable[[Prompt, Sequence[int], LoadedModel], str]
"""From a prompt, the generated token ids of its row (padding included) and the model to the text of the answer."""


def stripped_text(prompt: Prompt, ids: Sequence[int], loaded: LoadedModel) -> str:
    """An answer up to its end, without special tokens and surrounding white space, as upstream's programs write it."""
    return prompt.end.text(ids, loaded.tokenizer).strip()


@dataclass
class Speed:
    """How fast a run went.

    Attributes:
        questions: number of answers.
        images: number of images shown.
        seconds: from the first batch to the last, without loading the model.
        batch_size: questions in one `generate`, at the end of the run.
    """

    questions: int = 0
    images: int = 0
    seconds: float = 0.0
    batch_size: int = 1

    def __str__(self) -> str:
        """Rates for people."""
        rates = f"{self.questions / self.seconds:.2f} questions/s, {self.images / self.seconds:.2f} images/s"
        return f"{rates}, batches of {self.batch_size}, {self.seconds:.0f} s"


class UnansweredError(NotFiniteError):
    """Questions of a batch have no answer, because the model's logits for them are not numbers.

    Args:
        message: names the questions.
        answers: of the other questions of the batch, by key.
    """

    def __init__(self, message: str, answers: Mapping[str, str]) -> None:
        super().__init__(message)
        self.answers = dict(answers)


def answer_tasks(
    answers: AnswersFile,
    loaded: LoadedModel,
    open_image: OpenImage,
    options: GenerationOptions,
    *,
    conv_mode: str,
    batch_size: int | None = 1,
    workers: int = 4,
    to_prompt: ToPrompt | None = None,
    to_text: ToText = stripped_text,
) -> Speed:
    """Answer all pending tasks.

    The answers of a finished batch are in the file before the next batch begins. Answers do not depend on the batch
    size beyond rounding: rows are left-padded, positions count real tokens only, each question has its own seed.

    Args:
        answers: the tasks and where their answers go.
        loaded: model, tokenizer and image processor.
        open_image: opens one image of a task.
        options: decoding options.
        conv_mode: name of the conversation template.
        batch_size: questions in one `generate`; None begins with many, halves them when the device runs out of memory,
            and continues with the batch that did not fit.
        workers: threads that read and preprocess images.
        to_prompt: makes the prompt of a task where `conv_mode` names no conversation template.
        to_text: makes the text of an answer from its token ids.

    Raises:
        FlagError: unknown template, options that do not go with the batch size, or the memory of the device is too
            small for the batch size asked for, or for one question.
        BadSampleError, BadImageError: a task that cannot be asked; names the row, and the file of an image.
        UnansweredError: the logits of a question are not numbers; the answers of the batch's other questions are in
            the file.
    """
    options.check_batch_size(batch_size)
    to_prompt = to_prompt or partial(make_prompt, conv_mode=conv_mode)
    prompts = [to_prompt(key, task, loaded) for key, task in answers.pending.items()]
    # Longest first: running out of memory shows at once, and rows of one batch need little padding.
    prompts.sort(key=lambda prompt: -prompt.length)
    size = batch_size or first_batch_size(loaded.model.device, most_together(options))
    speed, started = Speed(batch_size=size), time.monotonic()
    failures: list[UnansweredError] = []

    def answer(batch: list[tuple[Prompt, list[ProcessedImage]]]) -> dict[str, str]:
        group, images = zip(*batch, strict=True)
        try:
            return answer_batch(group, images, loaded, options, to_text)
        except UnansweredError as error:
            failures.append(error)
            return error.answers

    with (
        tqdm(total=len(answers.keys), initial=len(answers.rows), unit="question", smoothing=0.1) as progress,
        Prefetcher(prompts, lambda prompt: load_images(prompt.task, loaded, open_image), workers) as queue,
    ):
        batches = Batches(queue, answer, size, fixed=batch_size is not None, say=progress.write)
        for batch, texts in batches:
            answers.append(texts)
            if failures:
                raise failures[0]
            speed.batch_size = batches.size
            speed.questions += len(batch)
            speed.images += sum(len(images) for _, images in batch)
            speed.seconds = time.monotonic() - started
            progress.set_postfix_str(f"{speed.images / speed.seconds:.2f} images/s", refresh=False)
            progress.update(len(batch))
    return speed


def most_together(options: GenerationOptions) -> int | None:
    """Limit on the questions of a batch: one for beam search with sampling, otherwise none."""
    return 1 if options.samples and options.num_beams > 1 else None


def make_prompt(key: str, task: Task, loaded: LoadedModel, conv_mode: str) -> Prompt:
    """Build and tokenize the conversation of one task.

    Raises:
        FlagError: the template is not known.
        BadSampleError: markers and images of the question do not match.
    """
    input_ids = prompt_ids(conversation_of(task, loaded, conv_mode), loaded.tokenizer)  # (T,)
    length = len(input_ids) + len(task.images) * (loaded.patches_per_image - 1)
    return Prompt(key, task, input_ids, length, loaded.answer_end(conv_mode))


def conversation_of(task: Task, loaded: LoadedModel, conv_mode: str) -> Conversation:
    """The question of a task with its image markers, and the answer still open; errors as `make_prompt`."""
    wrap = bool(getattr(loaded.model.config, "mm_use_im_start_end", False))
    message = add_image_markers(task.question, len(task.images), mm_use_im_start_end=wrap, where=task.where)
    return ask(message, conv_mode, loaded.tokenizer)


def answer_batch(
    prompts: Sequence[Prompt],
    images: Sequence[Sequence[ProcessedImage]],
    loaded: LoadedModel,
    options: GenerationOptions,
    to_text: ToText = stripped_text,
) -> dict[str, str]:
    """Generate the answers of one batch.

    Args:
        prompts: B prompts.
        images: for each of them its images.
        loaded: model and tokenizer.
        options: decoding options.
        to_text: makes the text of an answer from its token ids.

    Returns:
        the answer of each prompt by key.

    Raises:
        UnansweredError: the logits of a question are not numbers; names it, and holds the other answers.
    """
    broken: Sequence[int] = ()
    arguments = options.arguments([prompt.key for prompt in prompts])
    try:
        ending = ending_arguments(prompts[0].end, loaded.tokenizer)
        output_ids = generate_batch(prompts, images, loaded, arguments | ending)
    except NotFiniteError as error:
        output_ids, broken = error.output, error.rows
    rows = list(zip(prompts, output_ids.tolist(), strict=True))
    texts = {prompt.key: to_text(prompt, ids, loaded) for row, (prompt, ids) in enumerate(rows) if row not in broken}
    if broken:
        raise UnansweredError(loaded.no_answer(named(prompts[row].task for row in broken)), texts)
    return texts


def named(tasks: Iterable[Task]) -> str:
    """Questions in a message: where each is, and its id."""
    return ", ".join(f"{task.where} (question_id {task.question_id!r})" for task in tasks)


def generate_batch(
    prompts: Sequence[Prompt],
    images: Sequence[Sequence[ProcessedImage]],
    loaded: LoadedModel,
    arguments: Mapping[str, Any],
) -> Tensor:
    """Token ids (B, new) that the model writes after B prompts; `arguments` go to `generate`.

    Raises:
        NotFiniteError: the logits of a row are not numbers; holds the rows, and the ids of all.
    """
    warn_if_cut(prompts, images, loaded)
    device, tokenizer = loaded.model.device, loaded.tokenizer
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    input_ids, attention_mask = pad_left([prompt.input_ids for prompt in prompts], pad)
    with torch.no_grad():
        return loaded.model.generate(
            input_ids.to(device),
            attention_mask=attention_mask.to(device),
            **image_arguments(images, loaded),
            **arguments,
            use_cache=True,
            pad_token_id=pad,
        )


def pad_left(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Stack rows of token ids, padded in front: generation continues at the right end of every row.

    Args:
        rows: B tensors (T_i,) int64.
        pad: id of the padding.

    Returns:
        input_ids (B, T) int64 and attention_mask (B, T) bool, with T the longest T_i.
    """
    width = max(map(len, rows))
    input_ids = torch.full((len(rows), width), pad, dtype=torch.long)
    attention_mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for index, row in enumerate(rows):
        input_ids[index, width - len(row) :] = row
        attention_mask[index, width - len(row) :] = True
    return input_ids, attention_mask


def image_arguments(images: Sequence[Sequence[ProcessedImage]], loaded: LoadedModel) -> dict[str, Any]:
    """`images` and `image_sizes` of `generate` for the rows of a batch.

    Images are consumed in row order, and a row without one consumes an image too: it gets a black dummy, which enters
    no sequence. A batch of text-only rows passes no images at all.
    """
    present = [image for row in images for image in row]
    if not present:
        return {"images": None, "image_sizes": None}
    tiles = present[0].pixels
    # Like one whole image: (3, height, width), or one tile (1, 3, height, width) in the anyres mode.
    dummy = ProcessedImage(
        torch.zeros_like(tiles if tiles.ndim == 3 else tiles[:1]), (tiles.shape[-1], tiles.shape[-2])
    )
    flat = [image for row in images for image in (row or [dummy])]
    batch = [image.pixels.to(loaded.model.device, loaded.model.dtype) for image in flat]
    same_shape = len({pixels.shape for pixels in batch}) == 1
    return {"images": torch.stack(batch) if same_shape else batch, "image_sizes": [image.size for image in flat]}


def load_images(task: Task, loaded: LoadedModel, open_image: OpenImage) -> list[ProcessedImage]:
    """Open and preprocess the images of one task, each by itself so that the batch has no influence.

    Raises:
        BadImageError: an image cannot be opened; names row and file.
        CheckpointError: the model has no vision tower.
    """
    if task.images and loaded.image_processor is None:
        raise CheckpointError(
            f"{task.where}: the question has an image, but the model '{loaded.name}' has no vision tower"
        )
    images = []
    for number, name in enumerate(task.images, start=1):
        image = open_image(name, task.where)
        said = f"{task.where}: image {name if len(name) <= LONGEST_NAME else number}"
        pixels = process_images([image], loaded.image_processor, loaded.model.config, name=said)[0]
        images.append(ProcessedImage(pixels, image.size))
    return images


def warn_if_cut(prompts: Sequence[Prompt], images: Sequence[Sequence[ProcessedImage]], loaded: LoadedModel) -> None:
    """Warn of prompts that the model will cut at its `tokenizer_model_max_length`, as upstream does silently."""
    limit = getattr(loaded.model.config, "tokenizer_model_max_length", None)
    if limit is None:
        return
    for prompt, row in zip(prompts, images, strict=True):
        length = len(prompt.input_ids) - len(row)
        if row:
            sizes = [image.size for image in row]
            length += sum(loaded.model.image_lengths([image.pixels for image in row], sizes))
        if length > limit:
            warnings.warn(
                f"{prompt.task.where}: the prompt has {length} positions, the model keeps {limit} "
                f"(tokenizer_model_max_length); the end of the question is lost, shorten it",
                stacklevel=2,
            )

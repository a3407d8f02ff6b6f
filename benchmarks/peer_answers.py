"""Answers a second: our runner, transformers' `generate` in batches, and lmms-eval's `llava_hf`, on the same questions.

Everything from the image file to the text is timed. `llava_hf` answers one question at a time, whatever is asked of it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import statistics
import sys
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from benchmarks.eval import TEMPLATE, in_batches
from benchmarks.floors import Rates
from benchmarks.measuring import Clock, quotient, spread, take_turns
from benchmarks.peer_models import Pair, check_equal, load_ours, load_theirs, tasks_of
from dynamic.flops import Decoder
from llava.eval.answering.answers import Task
from llava.eval.answering.runner import make_prompt

OURS, GENERATE, LMMS = "llava.eval", "transformers, generate in batches", "lmms-eval, llava_hf"
LEAST = 8
"""Questions that are answered at least; larger batches take as many as one batch has."""


def in_generate(tasks: Sequence[Task], model: Any, processor: Any, folder: Path, tokens: int, size: int) -> list[str]:
    """The usual loop with transformers: the rows of a batch padded on the left, questions in their order."""
    answers = []
    for start in range(0, len(tasks), size):
        batch = tasks[start : start + size]
        turns = [
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": task.question}]}]
            for task in batch
        ]
        texts = [processor.apply_chat_template(turn, add_generation_prompt=True) for turn in turns]
        images = [Image.open(folder / task.images[0]).convert("RGB") for task in batch]
        inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, do_sample=False, max_new_tokens=tokens)
        new = output[:, inputs["input_ids"].shape[1] :]
        answers += [text.strip() for text in processor.batch_decode(new, skip_special_tokens=True)]
    return answers


class Lmms:
    """lmms-eval's own class for transformers' LLaVA, asked as its evaluator asks it."""

    def __init__(self, pair: Pair) -> None:
        if importlib.util.find_spec("decord") is None:
            # Reads videos, of which there are none here.
            decord: Any = types.ModuleType("decord")
            decord.VideoReader = decord.cpu = None
            sys.modules["decord"] = decord
        from lmms_eval.models.simple.llava_hf import LlavaHf

        self.model = LlavaHf(str(pair.theirs), device="cpu", dtype="float32", device_map="cpu")

    def __call__(self, tasks: Sequence[Task], folder: Path, tokens: int) -> list[str]:
        """The answers in the order of the questions."""
        from lmms_eval.api.instance import Instance

        documents = [task.images[0] for task in tasks]
        self.model.task_dict = {"peers": {"test": documents}}

        def visual(name: str) -> list[Image.Image]:
            return [Image.open(folder / name).convert("RGB")]

        requests = [
            Instance(
                request_type="generate_until",
                arguments=(
                    task.question,
                    {"max_new_tokens": tokens, "temperature": 0},
                    visual,
                    number,
                    "peers",
                    "test",
                ),
                idx=number,
                metadata={"task": "peers", "doc_id": number, "repeats": 1},
            )
            for number, task in enumerate(tasks)
        ]
        return [text.strip() for text in self.model.generate_until(requests)]


def lmms_or_reason(pair: Pair) -> Lmms | str:
    """lmms-eval's class, or why it cannot be compared with."""
    if importlib.util.find_spec("lmms_eval") is None:
        return "lmms-eval is not installed"
    return Lmms(pair)


def floor_seconds(pair: Pair, positions: float, tokens: int, batch: int, rates: Rates) -> float:
    """Seconds of one question: its prompt by operations; its tokens by operations, or by reading weights and cache."""
    shape = pair.shape
    decoder = Decoder(shape.width, shape.layers, shape.inner, shape.width, shape.width)
    layers = shape.layers * (4 * shape.width**2 + 3 * shape.width * shape.inner)
    head = shape.width * shape.vocabulary
    tower = (shape.tower_layers - 1) * (4 * shape.tower_width**2 + 2 * shape.tower_width * shape.tower_inner)
    projector = shape.tower_width * shape.width + shape.width**2
    prompt = shape.layers * decoder.layer(positions, positions) + 2 * shape.patches * (tower + projector) + 2 * head
    seconds = rates.floor(prompt)
    for step in range(1, tokens):
        flops = batch * (shape.layers * decoder.layer(1, positions + step) + 2 * head)
        read = 4 * (layers + head + batch * 2 * shape.layers * shape.width * (positions + step))
        seconds += rates.floor(flops, read) / batch
    return seconds


def measure(pair: Pair, work: Path, tokens: int, size: int, clock: Clock, rounds: int, rates: Rates) -> dict[str, Any]:
    """Answers a second in batches of `size`, and the peers' time over ours.

    Raises:
        FlagError: answers differ.
    """
    loaded = load_ours(pair)
    model, processor = load_theirs(pair)
    lmms = lmms_or_reason(pair) if size == 1 else None
    tasks = tasks_of(pair, max(size, LEAST))
    answers: dict[str, list[str]] = {}

    def ours() -> None:
        texts = in_batches(tasks, loaded, pair.images, tokens, size, work / f"answers-{size}.jsonl")
        answers[OURS] = [texts[task.question_id] for task in tasks]

    def generate() -> None:
        answers[GENERATE] = in_generate(tasks, model, processor, pair.images, tokens, size)

    ways: dict[str, Callable[[], object]] = {OURS: ours, GENERATE: generate}
    if isinstance(lmms, Lmms):
        ways[LMMS] = lambda: answers.update({LMMS: lmms(tasks, pair.images, tokens)})
    # A round that is not timed shows whether all answer the same.
    with contextlib.redirect_stderr(io.StringIO()):
        for way in ways.values():
            way()
        for name in ways:
            check_equal(f"answers in batches of {size}, {name}", answers[OURS], answers[name])
        times = take_turns(ways, clock, rounds, warmup=0)
    positions = statistics.mean(make_prompt("", task, loaded, TEMPLATE).length for task in tasks)
    return {
        "batch": size,
        "tokens": tokens,
        "questions": len(tasks),
        "positions": positions,
        "answers_per_second": {name: spread([len(tasks) / each for each in values]) for name, values in times.items()},
        "floor": {"answers_per_second": 1 / floor_seconds(pair, positions, tokens, size, rates)},
        "peer_over_ours": {name: quotient(values, times[OURS]) for name, values in times.items() if name != OURS},
        "left_out": {LMMS: lmms} if isinstance(lmms, str) else {},
    }

"""The second half of the demo: predictors that drop image tokens, trained on the tiny base, against the base itself.

An image of the playground is nine patches, one for each cell, so it can be said how many of the patches that stay show
something.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dynamic.figures import KeptImage
from dynamic.inspection import record_decisions
from dynamic.visualize import kept_images
from llava.data.images import load_image
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.loading import LoadedModel, load_model
from llava.eval.answering.questions import Question
from llava.eval.answering.runner import answer_batch, image_arguments, load_images, make_prompt, pad_left
from llava.eval.model_vqa_loader import make_task
from llava.runtime.cache_name import cache_of
from llava.train.train import main as train
from llava.train.train_sparse import DEFAULTS
from playground.evaluate import BATCH_SIZE, CONV_MODE, MAX_NEW_TOKENS, Result
from playground.generate import Playground
from playground.outputs import remove_earlier_run
from playground.questions import BASE_TRAIN, SCENES
from playground.recipe import Stage
from playground.stages import TRAINED_TOWER, model_flags, stage_flags

KEEP_RATE = 0.5
SPARSE_LAYER = 1
PREDICTOR = {
    **{"d_model": 64, "nhead": 4, "dim_feedforward": 128, "num_layers": 1},
    # The defaults, 3e-4 and 100, are for runs of ten thousand updates (see benchmarks/experiments/sparse).
    **{"predictor_lr": 5e-3, "mask_loss_weight": 2.0},
}

ROUNDS = 20
EXAMPLES = 8


@dataclass(frozen=True)
class Example:
    """A question with the sparse model's answer and the patches that it kept."""

    question: Question
    answer: str
    image: KeptImage


@dataclass(frozen=True)
class Cost:
    """What a batch of prompts costs.

    Attributes:
        milliseconds: from ids and images to the first token, tower included; median.
        cache_bytes: of all positions in the key-value cache afterwards; free slots for an answer do not count.
    """

    milliseconds: float
    cache_bytes: int


@dataclass(frozen=True)
class SparseRun:
    """Everything that this half has found out.

    Attributes:
        tuned: the sparse checkpoint.
        updates: of its training, which follow those of the base.
        dense_result: the base's answers to the questions of the base families.
        sparse_result: the sparse model's answers to them.
        dense_cost: of the base.
        sparse_cost: of the sparse model.
        speedup: median over the rounds of the base's prefill time over the sparse model's.
        things_kept: of the patches that show something, the share that was kept.
        patches_kept: of all patches, the share that was kept.
        examples: for the report.
    """

    tuned: Path
    updates: int
    dense_result: Result
    sparse_result: Result
    dense_cost: Cost
    sparse_cost: Cost
    speedup: float
    things_kept: float
    patches_kept: float
    examples: list[Example]

    @property
    def cache_ratio(self) -> float:
        """Bytes of the base's cache over those of the sparse model's."""
        return self.dense_cost.cache_bytes / self.sparse_cost.cache_bytes

    @property
    def loss(self) -> float:
        """Points of accuracy that sparsity costs over all questions."""
        return 100 * (self.dense_result.accuracy - self.sparse_result.accuracy)


def train_sparse(place: Playground, output: Path, stage: Stage) -> None:
    """Train predictors on the conversations of the base's last stage, the model along with them."""
    remove_earlier_run(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    sparse = {
        "use_text_predictor": False,
        "vision_keep_rate": KEEP_RATE,
        "sparse_layer": SPARSE_LAYER,
        **PREDICTOR,
        "requires_image": False,
    }
    flags = [
        *model_flags(place.base, place.checkpoints / TRAINED_TOWER, place.images),
        *stage_flags(stage, place.recipe.seed),
        *("--version", "v1", "--data_path", str(place.data / BASE_TRAIN), "--output_dir", str(output)),
        *(word for name, value in sparse.items() for word in (f"--{name}", str(value))),
    ]
    log = output.parent / f"{output.name}.log"
    # The progress bar goes to the terminal, everything else into the log.
    with log.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        train(flags, defaults=DEFAULTS)


def compare(place: Playground, tuned: Path, dense_result: Result, sparse_result: Result) -> SparseRun:
    """Costs of both models on a batch of questions about images, and what the sparse one keeps."""
    dense, sparse = (load_model(str(path), device="cpu") for path in (place.base, tuned))
    questions = [question for question in dense_result.questions if question.images]
    costs, speedup = prefill_costs([dense, sparse], questions[:BATCH_SIZE], place.images)
    things, patches = kept_shares(sparse, questions, place)
    return SparseRun(
        tuned=tuned,
        updates=place.recipe.sparse.steps,
        dense_result=dense_result,
        sparse_result=sparse_result,
        dense_cost=costs[0],
        sparse_cost=costs[1],
        speedup=speedup,
        things_kept=things,
        patches_kept=patches,
        examples=[example(sparse, question, place.images) for question in _spread(questions)],
    )


def _spread(questions: Sequence[Question]) -> list[Question]:
    """A few questions of all families, of every family the first ones."""
    families: dict[str, list[Question]] = {}
    for question in questions:
        families.setdefault(question.category, []).append(question)
    turns = [question for group in zip(*families.values(), strict=False) for question in group]
    return turns[:EXAMPLES]


def prompt_arguments(loaded: LoadedModel, questions: Sequence[Question], images: Path) -> dict[str, Any]:
    """Arguments of a pass of the model over the prompts of some questions."""
    tasks = [make_task(question) for question in questions]
    prompts = [make_prompt(str(index), task, loaded, CONV_MODE) for index, task in enumerate(tasks)]
    shown = [load_images(task, loaded, lambda name, where: load_image(images, name, row=where)) for task in tasks]
    ids, mask = pad_left([prompt.input_ids for prompt in prompts], loaded.tokenizer.pad_token_id)
    return {"input_ids": ids, "attention_mask": mask, **image_arguments(shown, loaded)}


@torch.no_grad()
def prefill_costs(
    models: Sequence[LoadedModel], questions: Sequence[Question], images: Path
) -> tuple[list[Cost], float]:
    """What a pass over the prompts costs each of two models, which take turns; the first round does not count.

    Returns:
        the costs, and the median over the rounds of the first one's time over the second one's.
    """
    arguments = [prompt_arguments(loaded, questions, images) for loaded in models]
    times: list[list[float]] = [[] for _ in models]
    bytes_held = [0 for _ in models]
    for number in range(ROUNDS + 1):
        for index, loaded in enumerate(models):
            started = time.perf_counter()
            output = loaded.model(**arguments[index], use_cache=True, logits_to_keep=1)
            if number:
                times[index].append(1e3 * (time.perf_counter() - started))
            states = [states for layer in cache_of(output).layers for states in (layer.keys, layer.values)]
            bytes_held[index] = sum(tensor.nbytes for tensor in states)
    costs = [Cost(statistics.median(mine), held) for mine, held in zip(times, bytes_held, strict=True)]
    return costs, statistics.median(first / second for first, second in zip(*times, strict=True))


@torch.no_grad()
def kept_shares(sparse: LoadedModel, questions: Sequence[Question], place: Playground) -> tuple[float, float]:
    """Of the patches that show something, and of all patches, the share that is kept."""
    scenes = json.loads((place.data / SCENES).read_text(encoding="utf-8"))
    things = kept_things = patches = kept_patches = 0
    for start in range(0, len(questions), BATCH_SIZE):
        batch = questions[start : start + BATCH_SIZE]
        with record_decisions(sparse.model) as log:
            sparse.model(**prompt_arguments(sparse, batch, place.images), logits_to_keep=1)
        for row, question in enumerate(batch):
            cells = scenes[question.images[0]]
            kept = log.prompts[0].images(row)[0].tolist()
            shown = {index for index, cell in enumerate(cells) if cell is not None}
            things, kept_things = things + len(shown), kept_things + len(shown.intersection(kept))
            patches, kept_patches = patches + len(cells), kept_patches + len(kept)
    return kept_things / things, kept_patches / patches


def example(sparse: LoadedModel, question: Question, images: Path) -> Example:
    """One question, answered by the sparse model."""
    task = make_task(question)
    shown = load_images(task, sparse, lambda name, where: load_image(images, name, row=where))
    options = GenerationOptions(temperature=0, max_new_tokens=MAX_NEW_TOKENS)
    with record_decisions(sparse.model) as log:
        answers = answer_batch([make_prompt("0", task, sparse, CONV_MODE)], [shown], sparse, options)
    return Example(question, answers["0"], kept_images(log, shown, sparse)[0])

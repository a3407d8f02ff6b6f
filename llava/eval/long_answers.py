r"""Measure long answers on conversations with references: perplexity of the reference, or METEOR of the model's answer.

The four LVIS programs of Dynamic-LLaVA (`llava.dynamic_eval.model_lvis_*`) are this one with two switches. A first
turn is asked with the conversation template; in the multi-round programs later turns continue the same cache, so that
what a sparse model has dropped stays dropped. An interrupted run is continued by the same command.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from llava.conversation import Conversation, SeparatorStyle
from llava.data.images import load_image
from llava.data.templates import template_of_mode
from llava.eval.answering.answers import AnswersFile, Row, Task
from llava.eval.answering.conv_mode import conv_mode_of_turns
from llava.eval.answering.loading import LoadedModel, choose_device, choose_dtype, load_model
from llava.eval.answering.long_options import SINGLE_PREDICTION
from llava.eval.answering.options import refuse_input_as_answers
from llava.eval.answering.questions import get_chunk
from llava.eval.answering.runner import load_images, make_prompt
from llava.eval.answering.stepwise import Stepper
from llava.eval.scoring.meteor import find_wordnet, meteor
from llava.eval.scoring.references import ReferenceConversation, read_conversations
from llava.inference_options import given_options, put_on
from llava.runtime.hub import get_model_name_from_path
from llava.runtime.ranges import COUNT, NOT_NEGATIVE, check_ranges
from llava.runtime.weights.fingerprint import weights_fingerprint

RANGES = {"temperature": NOT_NEGATIVE, "max_new_tokens": COUNT, "num_chunks": COUNT}
"""What the numbers of these programs may be."""

FIRST, ANSWERED = "What?", "(an answer)"
"""A first turn, of which `later_turn` needs what comes after it."""

Measure = Callable[[Stepper, str], dict[str, Any]]
"""From a conversation whose prompt was fed, and the reference of the turn, to the values of the turn."""


def measure_perplexity(stepper: Stepper, reference: str) -> dict[str, Any]:
    """Perplexity of the reference, fed one token per call; `tokens` scored, `stored` in the last layer's cache."""
    tokenizer, end = stepper.loaded.tokenizer, stepper.end
    # As in training: the template's own end. The original takes the tokenizer's, which is the same for v1.
    text = tokenizer.eos_token if end.of_turn is None else tokenizer.convert_ids_to_tokens(end.of_turn)
    ids = tokenizer(reference + text, add_special_tokens=False).input_ids
    scored = stepper.score(ids)
    return {"ppl": scored.perplexity, "tokens": scored.tokens, "stored": scored.stored}


def measure_meteor(max_new_tokens: int, wordnet: Any) -> Measure:
    """METEOR of the greedy answer; `tokens` generated, `stored` in the last layer's cache."""

    def measure(stepper: Stepper, reference: str) -> dict[str, Any]:
        before = stepper.stored
        ids = stepper.answer(max_new_tokens)
        text = stepper.end.text(ids, stepper.loaded.tokenizer).strip()
        score = meteor(reference, text, wordnet)
        return {"meteor": score, "text": text, "tokens": len(ids), "stored": stepper.stored - before}

    return measure


def later_turn(template: Conversation, question: str) -> str:
    """What is fed between an answer, whose end was not, and the next one.

    The original has its own words, without blanks and without an end of the answer, whatever the template is. They stay
    for the templates that it was made for (v1); a model that was trained with another one gets that template's turn.
    """
    if template.sep_style is SeparatorStyle.TWO:
        return f"{template.roles[0]}:{question}{template.roles[1]}:"
    for role, text in zip(template.roles * 2, (FIRST, ANSWERED, question, None), strict=True):
        template.append_message(role, text)
    return template.get_prompt().rpartition(ANSWERED)[2]


def measure_conversation(
    conversation: ReferenceConversation, loaded: LoadedModel, args: argparse.Namespace, measure: Measure, rounds: int
) -> dict[str, Any]:
    """Values of one conversation: of each of its first `rounds` turns, their sums, and the positions it took.

    Raises:
        BadSampleError, BadImageError: a row that cannot be asked; names the row, and the file of an image.
        NotFiniteError: the logits are not numbers; names the row.
    """
    stepper, turns = Stepper(loaded, conversation.where, loaded.answer_end(args.conv_mode)), []
    suffix = f"\n{SINGLE_PREDICTION}" if args.single_pred_prompt else ""
    for number, turn in enumerate(conversation.turns[:rounds]):
        if number == 0:
            task = _task(conversation, suffix)
            images = load_images(task, loaded, lambda name, where: load_image(args.image_folder, name, row=where))
            stepper.feed(make_prompt("", task, loaded, args.conv_mode).input_ids, images)
        else:
            text = later_turn(template_of_mode(args.conv_mode, loaded.tokenizer), turn.question + suffix)
            stepper.feed(loaded.tokenizer(text, add_special_tokens=False).input_ids)
        turns.append(measure(stepper, turn.reference))
    return {"turns": turns, "positions": stepper.positions}


def main(
    args: argparse.Namespace, metric: str, *, multi_round: bool, load: Callable[..., LoadedModel] = load_model
) -> Path:
    """Measure the chunk of `--question-file` that is asked for.

    Args:
        args: of `long_options.build_parser`.
        metric: `ppl` or `meteor`.
        multi_round: all turns of a conversation instead of the first.
        load: loads the model.

    Returns:
        the finished results file; a summary is printed.

    Raises:
        LlavaError: a flag, a row, an image or the checkpoint is wrong; the message says what to do.
    """
    check_ranges(args, RANGES, dashes=True)
    args.conv_mode = conv_mode_of_turns(args.conv_mode, args.model_path)
    refuse_input_as_answers(args, args.answers_file)
    measure = measure_perplexity if metric == "ppl" else measure_meteor(args.max_new_tokens, find_wordnet())
    rows = get_chunk(read_conversations(args.question_file), args.num_chunks, args.chunk_idx)
    results = _results_file(args, rows, metric, multi_round)
    if results.pending:
        loaded = put_on(load(args.model_path, args.model_base, device=args.device, torch_dtype=args.torch_dtype), args)
        by_place = {row.where: row for row in rows}
        with tqdm(total=len(rows), initial=len(results.rows), unit="conversation") as progress:
            for key, task in results.pending.items():
                rounds = len(by_place[task.where].turns) if multi_round else 1
                values = measure_conversation(by_place[task.where], loaded, args, measure, rounds)
                results.append({key: json.dumps(values)})
                progress.update()
    results.finish()
    print(summary(list(results.rows.values()), metric, results.path))
    return results.path


def summary(rows: Sequence[Row], metric: str, path: Path) -> str:
    """Mean over conversations of the mean over turns, and how much of the answers the last layer stored."""
    means = [sum(turn[metric] for turn in row["turns"]) / len(row["turns"]) for row in rows]
    tokens = sum(turn["tokens"] for row in rows for turn in row["turns"])
    stored = sum(turn["stored"] for row in rows for turn in row["turns"])
    return (
        f"{path}: {len(rows)} conversations, mean {metric} {sum(means) / len(means):.4f}; "
        f"{tokens} answer tokens, {stored} stored by the last layer; {sum(row['positions'] for row in rows)} positions"
    )


def _task(conversation: ReferenceConversation, suffix: str = "") -> Task:
    """The first turn as a task of the runner."""
    question = conversation.turns[0].question + suffix
    return Task(conversation.question_id, question, question, conversation.images, conversation.where)


def _results_file(
    args: argparse.Namespace, rows: Sequence[ReferenceConversation], metric: str, multi_round: bool
) -> AnswersFile:
    """The file of results, with those that an interrupted run left."""
    settings = {
        "weights": weights_fingerprint(args.model_path) or args.model_path,
        "base_weights": weights_fingerprint(args.model_base) or args.model_base,
        "torch_dtype": str(choose_dtype(args.torch_dtype, choose_device(args.device))),
        "conv_mode": args.conv_mode,
        "single_pred_prompt": args.single_pred_prompt,
        "metric": metric,
        "multi_round": multi_round,
        "max_new_tokens": getattr(args, "max_new_tokens", None),
        **given_options(args),
    }
    return AnswersFile(
        args.answers_file,
        [_task(row) for row in rows],
        model_id=get_model_name_from_path(args.model_path),
        settings=settings,
        arguments=vars(args),
        to_row=_result_row,
        restart=args.restart,
    )


def _result_row(task: Task, text: str, model_id: str) -> Row:
    """`text` is the JSON of the values."""
    row = {"question_id": task.question_id, "prompt": task.prompt, "model_id": model_id}
    return row | (json.loads(text) if text else {"turns": [], "positions": 0})

"""Exact match of greedy answers, by task.

python -m benchmarks.experiments.text.evaluate --model BASE --adapter ADAPTER --data TEST.json --output SCORE.json
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

import hydralora  # noqa: F401 (makes the method known to PEFT)
from benchmarks.experiments.common.steps import write_json
from hydralora.text.samples import read_samples, tokenize

LONGEST_ANSWER = 8
BATCH = 250


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the base, with its tokenizer")
    parser.add_argument("--adapter", type=Path, help="folder of an adapter; none given: the base itself")
    parser.add_argument("--data", type=Path, required=True, help="rows with instruction, input, output and task_type")
    parser.add_argument("--output", type=Path, required=True, help="where the accuracies go")
    return parser


@torch.inference_mode()
def answers(model: nn.Module, tokenizer: Any, rows: Sequence[dict[str, Any]], max_length: int) -> list[str]:
    """Greedy answers to the rows."""
    sources = [torch.tensor(one.input_ids[: one.source_length]) for one in tokenize(rows, tokenizer, max_length)]
    texts: list[str] = []
    for start in tqdm(range(0, len(sources), BATCH), desc="answers"):
        chunk = sources[start : start + BATCH]
        ids = pad_sequence(chunk, batch_first=True, padding_value=tokenizer.pad_token_id, padding_side="left")  # (B, T)
        mask = pad_sequence([torch.ones_like(each) for each in chunk], batch_first=True, padding_side="left")
        made = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=LONGEST_ANSWER, do_sample=False)
        texts += tokenizer.batch_decode(made[:, ids.shape[1] :], skip_special_tokens=True)
    return texts


def accuracies(rows: Sequence[dict[str, Any]], texts: Sequence[str]) -> dict[str, float]:
    """Share of rows whose answer is the output word by word, by `task_type`."""
    right: dict[str, list[bool]] = defaultdict(list)
    for row, text in zip(rows, texts, strict=True):
        right[str(row["task_type"])].append(text.split() == row["output"].split())
    return {task: sum(hits) / len(hits) for task, hits in right.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program.

    Raises:
        BadSampleError: a row is malformed.
    """
    args = build_parser().parse_args(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    model = AutoModelForCausalLM.from_pretrained(args.model)
    if args.adapter is not None:
        model = PeftModel.from_pretrained(model, args.adapter)
    rows = read_samples(args.data)
    found = accuracies(rows, answers(model.eval(), tokenizer, rows, model.config.max_position_embeddings))
    write_json(args.output, found)
    print(json.dumps(found))


if __name__ == "__main__":
    main()

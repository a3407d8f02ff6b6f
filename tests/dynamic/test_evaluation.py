"""Evaluation of sparse checkpoints by programs that know nothing of sparsity."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from llava.dynamic_eval import model_lvis_for_ppl
from llava.eval.answering.loading import LoadedModel, load_model
from llava.eval.answering.stepwise import Stepper
from tests.dynamic.sparse_checkpoint import write_sparse_checkpoint

CONVERSATION = [
    {"from": "human", "value": "What is a lake?"},
    {"from": "gpt", "value": "Water with a shore, twice as large as two dogs."},
]


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sparse_checkpoint(tmp_path_factory.mktemp("sparse") / "tiny-sparse-v1")


@pytest.fixture(scope="module")
def loaded(sparse: Path) -> LoadedModel:
    return load_model(str(sparse), device="cpu")


def test_an_answer_scored_step_by_step_is_the_masked_pass(loaded: LoadedModel) -> None:
    """One pass that hides dropped tokens gives the logits of decoding that does not remember them."""
    tokenizer = loaded.tokenizer
    prompt = tokenizer("A question about a lake. USER: What is red? ASSISTANT:").input_ids
    answer = tokenizer("The lake is as large as two dogs and a sign.", add_special_tokens=False).input_ids
    stepper = Stepper(loaded)
    stepper.feed(prompt)
    scored = stepper.score(answer)
    assert 0 < scored.stored < scored.tokens - 1  # some tokens are dropped and some are kept
    ids = torch.tensor([prompt + answer])
    labels = ids.clone()
    labels[:, : len(prompt)] = -100
    with torch.no_grad():
        logits = loaded.model(input_ids=ids, labels=labels).logits[0, len(prompt) - 1 : -1]
    expected = float(F.cross_entropy(logits, torch.tensor(answer)).exp())
    assert scored.perplexity == pytest.approx(expected, rel=1e-4)


def test_the_lvis_program_counts_what_was_stored(sparse: Path, tmp_path: Path) -> None:
    rows = tmp_path / "lvis.json"
    rows.write_text(json.dumps([{"id": "a", "conversations": CONVERSATION}]), encoding="utf-8")
    arguments = f"--model-path {sparse} --question-file {rows} --answers-file {tmp_path}/out.jsonl --device cpu"
    path = model_lvis_for_ppl.main([*arguments.split(), "--conv-mode", "vicuna_v1"])
    (turn,) = json.loads(path.read_text(encoding="utf-8"))["turns"]
    assert turn["stored"] < turn["tokens"] - 1

"""Sparse models in the programs that know nothing of sparsity, and beside other extensions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamic.config import SparseConfig
from dynamic.inspection import record_decisions
from llava.errors import FlagError
from llava.eval import model_vqa_loader
from llava.eval.answering.generation import GenerationOptions
from llava.eval.answering.loading import load_model
from llava.eval.run_llava import open_image
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import bare_model, save_checkpoint
from llava.serve.chat import Chat
from tests.dynamic.sparse_models import BASE, SMALL, attach_predictors, greedy, sparse_llava
from tests.golden import golden_dir
from tests.llava.eval.conftest import QUESTIONS
from tests.llava.model.test_generation import distance, prompts

IMAGES = golden_dir("llava") / "data" / "images"
ROUTED = golden_dir("mllm_hydralora") / "tiny-llava-v1.5-lora-mohle"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with predictors, to be read on top of the tiny LLaVA."""
    model = sparse_llava()
    for parameter in model.extensions.named_parameters(model).values():
        parameter.requires_grad_(True)
    folder = tmp_path_factory.mktemp("sparse") / "llava-sparse"
    save_checkpoint(model, folder)
    return folder


def answers(checkpoint: Path | None, folder: Path, batch_size: int) -> dict[int, str]:
    questions, target = folder / "questions.jsonl", folder / f"{checkpoint is None}{batch_size}.jsonl"
    questions.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS), encoding="utf-8")
    model = ["--model-path", BASE] if checkpoint is None else ["--model-path", checkpoint, "--model-base", BASE]
    values = [*model, "--question-file", questions, "--image-folder", IMAGES, "--answers-file", target]
    values += ["--temperature", 0, "--max_new_tokens", 8, "--device", "cpu", "--batch-size", batch_size]
    path = model_vqa_loader.main([str(value) for value in values])
    return {row["question_id"]: row["text"] for row in map(json.loads, path.read_text().splitlines())}


def test_evaluation_in_batches(checkpoint: Path, tmp_path: Path) -> None:
    one, four = (answers(checkpoint, tmp_path, size) for size in (1, 4))
    assert one == four
    assert len(one) == len(QUESTIONS)
    assert one != answers(None, tmp_path, 4), "dropping tokens must matter"


def test_conversations_are_read_anew_every_turn(checkpoint: Path) -> None:
    """Of earlier turns nothing but images is judged; the last instruction is."""
    loaded = load_model(str(checkpoint), str(BASE), device="cpu")
    loaded.model.config.user_marker_ids = loaded.tokenizer("</s>USER:", add_special_tokens=False).input_ids[1:]
    chat = Chat(loaded, "vicuna_v1", GenerationOptions(temperature=0, max_new_tokens=4), open_image)
    chat.show([str(IMAGES / "im0.png")])
    spans = []
    for message in ("What is shown?", "How many dogs are there? Count the small ones too."):
        with record_decisions(loaded.model) as log:
            "".join(chat.ask(message))
        (decision,) = log.prompts
        keep, segments = decision.keep[0], decision.segments[0]
        spans.append(segments)
        assert len(decision.images(0)[0]) == int(0.4 * (segments.images[0].end - segments.images[0].start))
        assert keep[segments.instruct.start : segments.last_instruct.start].all()
        last = keep[segments.last_instruct.start : segments.last_instruct.end]
        assert last[-1]
        assert not last.all()
        assert len(log.stored()[0]) == 3
    assert spans[1].last_instruct.start > spans[0].last_instruct.end


@pytest.mark.parametrize("options", [{}, {"load_4bit": True}], ids=["merged", "4 bits beside LoRA"])
def test_beside_routed_experts_and_lora(options: dict[str, Any]) -> None:
    """The routed blocks see the shortened sequence."""
    if options:
        pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    routed = load_pretrained_model(str(ROUTED), str(BASE), device="cpu", **options)[1]
    model, batch = attach_predictors(bare_model(routed)), prompts()
    together = greedy(model, batch.ids, batch.images, attention_mask=batch.mask)
    for number, (row, images) in enumerate(zip(batch.rows, batch.images_of_rows, strict=True)):
        alone = greedy(model, row[None], images)
        assert distance(together.logits[number], alone.logits[0]) < 2e-6
    plain = greedy(sparse_llava(), batch.ids, batch.images, attention_mask=batch.mask)
    assert distance(plain.logits, together.logits) > 0.01, "the experts must matter"


def test_an_attention_that_was_asked_for_stays(checkpoint: Path) -> None:
    """Policy attention is for losses; generation takes what `load_pretrained_model` was told."""
    model = load_pretrained_model(str(checkpoint), str(BASE), device="cpu", attn_implementation="eager")[1]
    usual = load_pretrained_model(str(checkpoint), str(BASE), device="cpu")[1]
    assert model.config._attn_implementation == "eager" != usual.config._attn_implementation
    batch = prompts()
    ours, theirs = (greedy(each, batch.ids, batch.images, attention_mask=batch.mask) for each in (model, usual))
    torch.testing.assert_close(ours.logits, theirs.logits, rtol=0, atol=1e-5)
    row = batch.rows[0][None]
    with pytest.raises(FlagError, match=r"'eager', which knows no policy; call model\.set_attn_implementation"):
        model(input_ids=row, images=batch.images_of_rows[0], labels=row)
    assert torch.isfinite(usual(input_ids=row, images=batch.images_of_rows[0], labels=row).loss)


def test_switches_are_independent() -> None:
    """Each predictor alone drops what it judges and nothing else."""
    off = {"use_vision_predictor": False, "use_instruct_predictor": False, "use_output_text_predictor": False}
    batch = prompts()
    for switch in off:
        model = sparse_llava(SparseConfig(**SMALL.to_dict() | off | {switch: True}))
        with record_decisions(model) as log:
            model.generate(batch.rows[0][None], images=batch.images_of_rows[0], max_new_tokens=12, min_new_tokens=12)
        decision, segments = log.prompts[0], log.prompts[0].segments[0]
        assert (len(decision.images(0)[0]) < segments.images[0].end - segments.images[0].start) == (
            switch == "use_vision_predictor"
        )
        asked = segments.last_instruct.end - segments.last_instruct.start
        assert (len(decision.instruction(0)) < asked) == (switch == "use_instruct_predictor")
        assert (not log.stored().all()) == (switch == "use_output_text_predictor")

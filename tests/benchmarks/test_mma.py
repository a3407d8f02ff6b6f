"""The benchmark of LaVIN's adapters: what it compares is the same work, and what it records is complete."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import mma, sparse_models
from benchmarks import mma_models as models
from llava.errors import FlagError

SIZE = sparse_models.Size(layers=3, width=32, inner=64, heads=2, patches=12)
CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", mma.KINDS)
def test_both_places_of_the_token_give_the_same_loss_and_gradients(kind: str) -> None:
    adapted = models.build(SIZE, kind, CPU, torch.float32).train()
    prompt = models.mixed_prompt(adapted, SIZE, 2)
    assert [sample.has_image for sample in prompt.segments] == [True, False]
    found = []
    for step in (models.Step(adapted, prompt), models.InSequence(adapted, prompt)):
        adapted.zero_grad()
        loss = step(prompt.embeddings)
        loss.backward()
        gradients = {name: weight.grad.clone() for name, weight in adapted.named_parameters() if weight.requires_grad}
        found.append((loss.item(), gradients))
    (ours, our_gradients), (theirs, their_gradients) = found
    assert ours == pytest.approx(theirs, rel=1e-6)
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradient, their_gradients[name], rtol=1e-3, atol=1e-7)


def test_lora_has_as_many_parameters() -> None:
    size = sparse_models.Size(layers=2, width=256, inner=512, heads=4, patches=4)
    parameters = models.trained_parameters(models.build(size, "attn", CPU, torch.float32))
    lora = models.with_lora(models.build(size, None, CPU, torch.float32), size, parameters)
    assert models.trained_parameters(lora) == pytest.approx(parameters, rel=0.15)


def test_the_merged_model_is_the_adapted_one() -> None:
    adapted, merged = (
        models.build(SIZE, "block", CPU, torch.float32),
        models.build_merged(SIZE, "block", CPU, torch.float32),
    )
    prompt = sparse_models.make_prompt(adapted, SIZE, 1)
    plain = models.build(SIZE, None, CPU, torch.float32)
    with torch.no_grad():
        logits = [m(inputs_embeds=prompt.embeddings, segments=prompt.segments).logits for m in (adapted, merged, plain)]
    torch.testing.assert_close(logits[1], logits[0], rtol=1e-3, atol=1e-6)
    assert (logits[2] - logits[0]).abs().max() > 1e-3


def test_the_program_writes_record_and_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "mma.json"
    words = "--layers 2 --width 32 --patches 8 --tokens 2 --repeats 2 --rows 2 --output"
    record = mma.main([*words.split(), str(path)])
    assert json.loads(path.read_text(encoding="utf-8")) == json.loads(json.dumps(record))
    table = path.with_suffix(".md").read_text(encoding="utf-8")
    assert table in capsys.readouterr().out
    assert "block: token in the sequence" in table
    assert set(record["training"]) == set(mma.KINDS)
    assert set(record["inference"]) == {f"{k}, {rows}" for k in mma.KINDS for rows in ("an image", "2 mixed rows")}
    assert "- Adapters, at most 1.03 times the unadapted model: " in table
    with pytest.raises(FlagError, match=r"ends in \.json"):
        mma.main(["--output", str(tmp_path / "mma.txt")])

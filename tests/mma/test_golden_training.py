"""Training against the original's numbers: loss, logits, routing and every gradient.

Where the original routes all images of a batch by the first one, the comparison is made twice: with that coupling put
in by the test, and with ours against each sample alone in the original.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mma.extension import MmaExtension
from mma.original import original_names
from tests.checkpointed import checkpoint_layers
from tests.mma.golden_model import golden_model, spliced_rows

CASES = ["train_attn_mixed", "train_block", "train_attn_visual_normal"]
FORWARD = {"rtol": 1e-4, "atol": 1e-4}


def run(model: Any, case: dict, tensors: dict[str, Tensor], rows: slice = slice(None)) -> Any:
    ids, labels = spliced_rows(case, tensors)
    return model(
        input_ids=ids[rows], labels=labels[rows], images=tensors["in/images"][rows],
        attention_mask=torch.ones_like(ids[rows]), output_hidden_states=True,
    )  # fmt: skip


@pytest.mark.usefixtures("coupled")
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_a_batch(name: str, checkpointing: bool, tmp_path: Path) -> None:
    model, case, tensors = golden_model(name, tmp_path, adapter_dropout=0.0)
    model.requires_grad_(False)
    names = original_names(model)
    trained = {theirs: model.get_parameter(ours).requires_grad_() for ours, theirs in names.items()}
    model.get_vision_tower().trainable = True
    model.train()
    if checkpointing:
        checkpoint_layers(model)
    out = run(model, case, tensors)
    torch.testing.assert_close(out.hidden_states[0], tensors["out/h0"][:, 1:], **FORWARD)
    torch.testing.assert_close(out.logits[:, :-1], tensors["out/logits"][:, 1:], **FORWARD)
    torch.testing.assert_close(out.loss, tensors["out/loss"][0], rtol=1e-5, atol=0)
    out.loss.backward()
    expected = {key.removeprefix("grad/"): value for key, value in tensors.items() if key.startswith("grad/")}
    assert trained.keys() == expected.keys() == {key for key, _ in case["trainable_parameters"]}
    for key, value in expected.items():
        gradient = trained[key].grad
        assert gradient is not None, key
        error = float((gradient - value).abs().max())
        assert error <= 1e-3 * float(value.abs().max()), f"{key}: {error} of {float(value.abs().max())}"


@pytest.mark.parametrize("name", CASES)
def test_samples_are_alone_in_a_batch(name: str, tmp_path: Path) -> None:
    """Whatever stands beside it, a sample has the loss that the original gives it alone."""
    model, case, tensors = golden_model(name, tmp_path)
    for row, expected in enumerate(case["loss_per_sample_alone"]):
        if expected is not None:
            with torch.no_grad():
                assert run(model, case, tensors, slice(row, row + 1)).loss == pytest.approx(expected, rel=1e-5)
    with torch.no_grad():
        together = run(model, case, tensors).logits
        for row in range(len(together)):
            alone = run(model, case, tensors, slice(row, row + 1)).logits
            torch.testing.assert_close(together[row, : alone.shape[1]], alone[0], **FORWARD)


@pytest.mark.parametrize("name", CASES)
def test_routing_of_the_language_model(name: str, tmp_path: Path) -> None:
    model, case, tensors = golden_model(name, tmp_path)
    with torch.no_grad():
        run(model, case, tensors)
    (extension,) = (item.extension for item in model.extensions)
    assert isinstance(extension, MmaExtension)
    table = extension._tables[model][0].weights  # (layers, M, A, 2)
    for number, place in enumerate(("attn", "mlp")[: table.shape[2]]):
        ours = table[:, tensors["in/img_indicators"], number]  # (layers, B, 2)
        torch.testing.assert_close(ours, tensors[f"out/routing_llm_adapter_{place}"], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(table[:, 0], table[:, 1], atol=1e-3), "the modalities must be routed apart"

"""Weights that a call forces: refusals, checkpoints, the ablation, experts from LoRAs; and the page about it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

import hydralora
from tests.checkpointed import checkpoint_layers
from tests.hydralora.tuner.models import IDS, MASK, TARGETS, adapted, logits, tiny_llama

pytestmark = pytest.mark.versions


def lora(seed: int, **changes: Any) -> Any:
    base = tiny_llama()
    torch.manual_seed(seed)
    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "init_lora_weights": False} | changes
    return get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **options)).eval()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expert": 3}, "expert 3: adapter 'default' has experts 0 to 2"),
        ({"expert": 1.5}, "expected the number of an expert"),
        ({"routing_weights": [0.5, 0.5]}, "2 weights, but a layer of adapter 'default' has 3 experts"),
        ({"routing_weights": [[1.0, 0, 0]]}, "for 1 rows, but the batch has 3"),
        ({"routing_weights": [float("nan"), 0, 1]}, "not finite"),
        ({"routing_weights": [1.0, 0, 0], "expert": 1}, "both given"),
        ({"tasks": "law"}, "none of the adapters"),
    ],
)
def test_what_cannot_be_carried_out_is_refused(options: dict[str, Any], message: str) -> None:
    model = adapted()
    expected = logits(model)
    with pytest.raises(ValueError, match=message):
        logits(model, **options)
    assert torch.equal(logits(model), expected), "nothing stays behind"
    assert not model.get_base_model()._forward_pre_hooks


def test_a_recomputation_is_routed_as_its_own_call() -> None:
    """Two calls with other experts before the first backward pass, with and without checkpointing."""
    found = []
    for spared in (False, True):
        model = adapted().train()
        if spared:
            checkpoint_layers(model, {"use_reentrant": False})
            model.enable_input_require_grads()
        batch = {"input_ids": IDS, "attention_mask": MASK, "labels": IDS, "use_cache": False}
        losses = [
            model(**batch, expert=1).loss,
            model(**batch, routing_weights=[0.0, 0.5, 0.5]).loss,
            model(**batch).loss,
        ]
        sum(loss * factor for loss, factor in zip(losses, (1.0, 2.0, 3.0), strict=True)).backward()
        found.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-7)


def test_the_ablation_is_the_loss_of_each_expert() -> None:
    model = adapted()
    batches = [{"input_ids": IDS[:1], "labels": IDS[:1]}, {"input_ids": IDS[1:2, :4], "labels": IDS[1:2, :4]}]
    found = hydralora.ablate_experts(model, batches, groups=["a", "b"])
    assert list(found.losses) == ["router", "uniform", "expert 0", "expert 1", "expert 2"]
    with torch.no_grad():
        for name, options in {
            "router": {},
            "expert 2": {"expert": 2},
            "uniform": {"routing_weights": [1 / 3] * 3},
        }.items():
            a, b = (float(model(**batch, **options).loss) for batch in batches)
            assert found.losses[name] == pytest.approx({"a": a, "b": b, "all": (5 * a + 3 * b) / 8}, rel=1e-5)
    assert "expert 2" in str(found)


@pytest.mark.parametrize("same", [False, True], ids=["own A", "one A"])
def test_experts_from_loras(same: bool, tmp_path: Path) -> None:
    """With an expert forced the model is its LoRA; another rank, rsLoRA and fewer layers too."""
    changes = {} if same else {"r": 2, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}
    loras = [lora(1), lora(2, **changes)]
    if same:
        weights = dict(loras[0].named_parameters())
        for name, weight in loras[1].named_parameters():
            if "lora_A" in name:
                weight.data.copy_(weights[name])
    loras[1].save_pretrained(str(tmp_path))
    model = hydralora.from_loras(tiny_llama(), [loras[0], tmp_path]).eval()
    assert model.peft_config["default"].r == (4 if same else 6)
    for number, each in enumerate(loras):
        torch.testing.assert_close(logits(model, expert=number), logits(each), rtol=0, atol=2e-6)
    assert not torch.allclose(logits(loras[0]), logits(loras[1]), atol=1e-3)
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert trained
    assert all("lora_router" in name for name in trained)


def test_what_is_more_than_a_lora_is_refused() -> None:
    with pytest.raises(ValueError, match="use_dora"):
        hydralora.from_loras(tiny_llama(), [lora(1), lora(2, use_dora=True)])
    with pytest.raises(ValueError, match="at least 2"):
        hydralora.from_loras(tiny_llama(), [lora(1)])


def test_the_snippets_of_the_page_run() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "hydralora_routing.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    names: dict[str, Any] = {name: tiny_llama() for name in ("base", "other_base", "third_base", "fourth_base")}
    names |= {"ids": IDS[:2, :4], "first_lora": lora(1), "second_lora": lora(2)}
    for block in blocks:
        exec(compile(block, "docs/hydralora_routing.md", "exec"), names)  # noqa: S102 (the page is ours)

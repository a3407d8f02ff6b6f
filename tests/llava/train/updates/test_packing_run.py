"""`--packing True`: a run has the losses of the same run without it, with extensions that allow it; others say so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hydralora import layer as hydralora_layer
from llava.data.collator import DataCollatorForSupervisedDataset
from llava.errors import FlagError
from llava.extension import Extension
from llava.model.checkpoint import bare_model
from llava.train.train import build_run, main, parse_args
from tests.host_waits import host_waits
from tests.llava.train.test_training import HYDRA, LLAVA, command_line, losses

ROWS = 4
CLOSE = {"rtol": 1e-4, "atol": 2e-6}
MMA = {"mma": True, "adapter_type": "block", "visual_input": "llava", "adapter_dropout": 0.0}
RUNS: dict[str, dict[str, Any]] = {
    "full": {},
    "hydralora": HYDRA
    | {"lora_dropout": 0.0, "moe_balance_w": 0.5, "hydralora_modules": "attention", "hydralora_dropout": 0.0},
    "mma": MMA,
}
"""Without dropout, whose draws depend on the places of the tokens."""


def options(**changes: Any) -> dict[str, Any]:
    return {"packing": True, "per_device_train_batch_size": ROWS, "model_max_length": 512} | changes


def step(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    """Losses and gradients; what starts as zero has been moved before, so that every gradient says something."""
    model.zero_grad(set_to_none=True)
    output = model(**batch, skip_logits=True)
    output.loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None}
    return output.losses | gradients


@pytest.mark.parametrize("name", RUNS)
def test_a_step_is_that_of_a_row_each(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses of extensions included, with and without image in one row; the host waits no more often."""
    run = build_run(parse_args(command_line(tmp_path / "out", **options(**RUNS[name]))))
    model = bare_model(run.model)
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in run.model.parameters():
            weight.add_(0.1 * torch.randn_like(weight) if weight.requires_grad else 0)
    items = [run.dataset[index] for index in range(ROWS)]
    packed = run.trainer.data_collator(items)
    apart = DataCollatorForSupervisedDataset(run.tokenizer, model.splice_planner())(items)
    assert len(packed["plan"].input_ids) < ROWS
    assert len({segments.has_image for segments in packed["plan"].segments}) == 2
    assert torch.equal(run.trainer.count_targets(packed), run.trainer.count_targets(apart))
    run.model.train()
    found, expected = step(run.model, packed), step(run.model, apart)
    assert found.keys() == expected.keys()
    assert len(found) > 5
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, **CLOSE, msg=lambda text, key=key: f"{key}: {text}")
    with host_waits() as waits:
        run.model(**packed, skip_logits=True).loss.backward()
    assert not waits
    if name == "hydralora":  # the negative control: rows taken for samples
        balance = hydralora_layer._balance_of_equals
        monkeypatch.setattr(
            hydralora_layer, "_balance_of_equals", lambda group, mask, texts: balance(group, mask, None)
        )
        other = step(run.model, packed)
        assert abs(other["hydralora/balance"] - expected["hydralora/balance"]) > 2e-4


def test_a_run_has_the_losses_of_one_without(tmp_path: Path) -> None:
    """Also with accumulated micro batches and evaluations; a run that was cut continues in the same order."""
    rows = str(LLAVA / "data" / "finetune.json")
    common = options(
        gradient_accumulation_steps=2, eval_data_path=rows, eval_strategy="steps", eval_steps=2, model_max_length=512
    )
    for name, changes in {"packed": {}, "apart": {"packing": False}}.items():
        main(command_line(tmp_path / name, **(common | changes)))
    packed, apart = (losses(tmp_path / name) for name in ("packed", "apart"))
    assert len(packed) == 3
    assert packed == pytest.approx(apart, rel=1e-4)
    logs = [
        json.loads((tmp_path / name / "trainer_state.json").read_text())["log_history"] for name in ("packed", "apart")
    ]
    evaluated = [[entry["eval_loss"] for entry in log if "eval_loss" in entry] for log in logs]
    assert evaluated[0] == pytest.approx(evaluated[1], rel=1e-3)
    assert evaluated[0]
    shutil.copytree(tmp_path / "packed" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    main(command_line(tmp_path / "cut", **common))
    assert losses(tmp_path / "cut") == packed


class Unaware(Extension):
    """An extension that has never heard of packed rows."""

    name = "unaware"


def adapter(folder: Path, **settings: Any) -> str:
    path = folder / "adapter.json"
    path.write_text(json.dumps({"peft_type": "HYDRALORA", "r": 4, "lora_nums": 3, **settings}), encoding="utf-8")
    return str(path)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dynamic": ({"dynamic": True, "sparse_layer": 1}, "the extension 'dynamic': its predictors"),
    "drop path": (MMA | {"drop_path": 0.1}, "the extension 'mma': --drop_path 0.1 skips layers for a sample"),
    "attention": ({"attn_implementation": "flex_attention"}, "--attn_implementation flex_attention: it does not keep"),
    "one sample": ({"per_device_train_batch_size": 1}, "--per_device_train_batch_size 1: samples of one micro batch"),
    "sequence": ({"peft_config": {"routing": "sequence"}}, "adapter.json: routing 'sequence' is decided once"),
    "balance": (
        {"peft_config": {"balance_weight": 0.1}},
        "adapter.json: balance_weight 0.1: the loss is over the tokens",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_packed_says_so(case: str, tmp_path: Path) -> None:
    """Before anything is loaded: the base is a folder without weights. Without the flag the options are accepted."""
    changes, message = REFUSED[case]
    changes = dict(changes)
    if "peft_config" in changes:
        changes["peft_config"] = adapter(tmp_path, **changes["peft_config"])
    words = command_line(tmp_path / "out", **options(**changes))
    with pytest.raises(FlagError) as refusal:
        parse_args(words)
    lines = [line for line in str(refusal.value).splitlines() if "--packing True" in line]
    assert len(lines) == 1
    assert message in lines[0]
    parse_args(command_line(tmp_path / "out", **options(**changes | {"packing": False})))


def test_an_extension_has_to_say_that_it_packs() -> None:
    assert "does not say" in str(Unaware().packing_problem({}))

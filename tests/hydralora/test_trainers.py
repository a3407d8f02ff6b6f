"""`docs/hydralora_training.md`: its snippets train, and every trainer gives routers the same gradient."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from hydralora import HydraLoraConfig
from hydralora.tuner import hydralora_layers
from playground.tiny import build_tiny

ROOT = Path(__file__).resolve().parents[2]
IDS = [[1, 5, 9, 31, 7, 60, 22, 14], [1, 40, 8, 3, 44, 12, 50, 33]]
OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 2,
    "max_steps": 1,
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(build_tiny(tmp_path_factory.mktemp("tiny")).language_model)


def adapted(folder: Path, balance_weight: float) -> PeftModel:
    torch.manual_seed(0)
    targets = {"r": 4, "lora_nums": 3, "target_modules": ["q_proj", "down_proj"], "init_weights": False}
    config = HydraLoraConfig(**targets, balance_weight=balance_weight, task_type="CAUSAL_LM")
    return get_peft_model(AutoModelForCausalLM.from_pretrained(folder), config)


def moved_routers(kind: str, folder: Path, out: Path, balance_weight: float = 50.0) -> dict[str, Tensor]:
    """How one update of plain gradient descent, of two micro batches, moved the routers: minus their gradient."""
    from datasets import Dataset

    model, tokenizer = adapted(folder, balance_weight), AutoTokenizer.from_pretrained(folder)
    before = routers(model)
    rows = Dataset.from_dict({"input_ids": IDS})
    trainer: Trainer
    if kind == "Trainer":
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        trainer = Trainer(model, TrainingArguments(str(out), **OPTIONS), train_dataset=rows, data_collator=collator)
    else:
        trl = pytest.importorskip("trl", reason="the extra `trl` is not installed")
        arguments = trl.SFTConfig(str(out), loss_type=kind, bf16=False, **OPTIONS)
        trainer = trl.SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    trainer.train()
    assert balance_weight == 0 or any("balance_loss" in row for row in trainer.state.log_history)
    return {name: weight - before[name] for name, weight in routers(model).items()}


def routers(model: PeftModel) -> dict[str, Tensor]:
    layers = hydralora_layers(model).items()
    return {name: layer.lora_router["default"].weight.detach().clone() for name, layer in layers}


@pytest.mark.parametrize("kind", ["nll", "chunked_nll"])
@pytest.mark.filterwarnings("ignore")
def test_routers_get_the_same_gradient_from_every_trainer(kind: str, folder: Path, tmp_path: Path) -> None:
    expected = moved_routers("Trainer", folder, tmp_path / "trainer")
    found = moved_routers(kind, folder, tmp_path / "sft")
    for name, moved in expected.items():
        torch.testing.assert_close(found[name], moved, rtol=1e-3, atol=1e-4 * float(moved.abs().max()))
    without = moved_routers(kind, folder, tmp_path / "without", balance_weight=0.0)
    assert any((without[name] - moved).abs().max() > 0.1 * moved.abs().max() for name, moved in expected.items())


@pytest.mark.filterwarnings("ignore")
def test_the_snippets_train(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trl", reason="the extra `trl` is not installed")
    from datasets import Dataset

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    page = (ROOT / "docs" / "hydralora_training.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    row = {"prompt": "what colour ?", "completion": " red", "chosen": " red", "rejected": " blue"}
    columns = {
        "answered": ("prompt", "completion"),
        "pairs": ("prompt", "chosen", "rejected"),
        "prompts": ("prompt",),
    }
    names: dict[str, Any] = {
        name: Dataset.from_list([{key: row[key] for key in keys}] * 4) for name, keys in columns.items()
    }
    judged = [
        {"prompt": row["prompt"], "completion": row["completion"], "label": bool(number % 2)} for number in range(4)
    ]
    names |= {"folder": str(folder), "tokenizer": AutoTokenizer.from_pretrained(folder)}
    names |= {"judged": Dataset.from_list(judged), "tokens": Dataset.from_dict({"input_ids": IDS})}
    ids = torch.tensor(IDS)
    names["batches"] = [{"input_ids": ids[:1], "labels": ids[:1]}, {"input_ids": ids[1:], "labels": ids[1:]}]
    trained = 0
    for block in blocks:
        names.pop("trainer", None)
        exec(compile(block, "docs/hydralora_training.md", "exec"), names)  # noqa: S102 (the page is ours)
        if "trainer" in names:
            trained += 1
            assert any("balance_loss" in line for line in names["trainer"].state.log_history), block
    assert trained == 5
    assert any(parameter.any() for name, parameter in names["model"].named_parameters() if "lora_B" in name)

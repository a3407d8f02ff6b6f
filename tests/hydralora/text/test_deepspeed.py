"""Text fine-tuning with DeepSpeed ZeRO-3 in two processes on the CPU, against one plain process.

All runs share one launch, because starting takes longer than training.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from hydralora.finetune import main, parse_args
from llava.errors import FlagError
from tests.hydralora.text.test_finetune import CASE, command_line, history, save_base, save_data
from tests.llava.train.launching import ROOT, launch_runs

pytest.importorskip("deepspeed", reason="the extra 'train' is not installed")

WEIGHTS = "sft_lora_model/adapter_model.safetensors"
# Plain SGD shows the scale of the gradients, which Adam hides.
EQUAL: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.5,
    "max_grad_norm": 1.0,
    "max_steps": 3,
    "balance_weight": 0.1,
    "train_sampling_strategy": "sequential",
    "save_strategy": "no",
    "do_eval": True,
}
RESUMED: dict[str, Any] = {"gradient_checkpointing": True, "lora_dropout": 0.2, "per_device_train_batch_size": 1}
OFFLOADED: dict[str, Any] = {
    "bf16": True,
    "torch_dtype": "bfloat16",
    "gradient_checkpointing": True,
    "per_device_train_batch_size": 2,
}
IDS = torch.tensor([[1, 300, 400, 17, 5]])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, compiled_extensions: Path) -> Path:
    """Base and data, and the outputs of every run of two processes."""
    path = tmp_path_factory.mktemp("zero")
    save_base(path / "base")
    save_data(path / "data")
    (path / "data" / "test.json").write_text(json.dumps(CASE["records"][:2]))
    settings = json.loads((ROOT / "scripts" / "zero3.json").read_text())
    # Otherwise ZeRO-3 keeps parameters whole that are as small as all of this model's.
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (path / "zero3.json").write_text(json.dumps(settings))
    zero3 = {"deepspeed": path / "zero3.json"}
    runs = [
        run(path, "equal", **EQUAL, **zero3, per_device_train_batch_size=1, gradient_accumulation_steps=2),
        run(path, "whole", **RESUMED, **zero3),
        run(path, "cut", **RESUMED, **zero3),
    ]
    runs[-1]["copy"] = [str(path / name / "checkpoint-2") for name in ("whole", "cut")]
    if shutil.which("g++"):
        offload = ROOT / "scripts" / "hydralora" / "ds_zero3_offload.json"
        runs.append(run(path, "offloaded", **OFFLOADED, deepspeed=offload))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCH_EXTENSIONS_DIR", str(compiled_extensions))
        launch_runs(2, runs, path)
    return path


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    return {"validation_file": folder / "data" / "test.json"} | changes


def run(folder: Path, output: str, **changes: Any) -> dict[str, Any]:
    return {
        "program": "hydralora.finetune",
        "arguments": command_line(folder, folder / output, **options(folder, **changes)),
    }


def losses(output: Path) -> list[float]:
    return [row["loss"] for row in history(output) if "loss" in row]


def logits(folder: Path, adapter: Path) -> Tensor:
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    with torch.no_grad():
        return PeftModel.from_pretrained(base, str(adapter)).eval()(input_ids=IDS).logits


@pytest.mark.slow
def test_equals_one_plain_process(folder: Path) -> None:
    """Same losses, gradient norms, weights and logits; only the order of sums differs."""
    plain, zero = folder / "plain", folder / "equal"
    main(command_line(folder, plain, **options(folder, **EQUAL)))
    assert losses(zero) == pytest.approx(losses(plain), abs=1e-5)
    norms = [[row["grad_norm"] for row in history(each) if "grad_norm" in row] for each in (zero, plain)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    ours, reference = load_file(zero / WEIGHTS), load_file(plain / WEIGHTS)
    assert ours.keys() == reference.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            value, reference[name], rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name} {text}"
        )
    torch.testing.assert_close(
        logits(folder, zero / "sft_lora_model"), logits(folder, plain / "sft_lora_model"), rtol=0, atol=1e-4
    )
    evaluated = [json.loads((each / "eval_results.json").read_text())["eval_loss"] for each in (zero, plain)]
    assert evaluated[0] == pytest.approx(evaluated[1], abs=1e-5)
    unbalanced = folder / "unbalanced"
    main(command_line(folder, unbalanced, **options(folder, **EQUAL | {"balance_weight": 0.0})))
    other = load_file(unbalanced / WEIGHTS)
    assert any((other[name] - reference[name]).abs().max() > 1e-4 for name in reference), "the balance loss must matter"


@pytest.mark.slow
def test_resume_is_exact(folder: Path) -> None:
    assert losses(folder / "cut") == losses(folder / "whole")
    assert (folder / "cut" / WEIGHTS).read_bytes() == (folder / "whole" / WEIGHTS).read_bytes()
    early = load_file(folder / "whole" / "checkpoint-2" / WEIGHTS)
    assert any(not torch.equal(value, early[name]) for name, value in load_file(folder / "whole" / WEIGHTS).items())


@pytest.mark.slow
def test_the_published_settings_for_offloading(folder: Path) -> None:
    """bf16 with optimizer and weights in the host's memory; what is saved are the optimizer's fp32 values."""
    if shutil.which("g++") is None:
        pytest.skip("DeepSpeed compiles its optimizer for offloading with g++, which is not here")
    output = folder / "offloaded"
    tensors = load_file(output / WEIGHTS)
    assert {value.dtype for value in tensors.values()} == {torch.float32}
    assert any(not torch.equal(value, value.bfloat16().float()) for value in tensors.values())
    main(command_line(folder, folder / "one", **options(folder, **OFFLOADED | {"per_device_train_batch_size": 4})))
    assert losses(output) == pytest.approx(losses(folder / "one"), rel=0.01)
    start = logits(folder, folder / "one" / "checkpoint-2")
    assert (logits(folder, output / "sft_lora_model") - start).abs().max() > 1e-3


def test_refusals(tmp_path: Path) -> None:
    save_data(tmp_path / "data")
    zero3 = {"deepspeed": ROOT / "scripts" / "zero3.json"}
    with pytest.raises(FlagError, match="ZeRO-3 cannot split quantised weights"):
        parse_args(command_line(tmp_path, tmp_path / "out", **zero3, load_in_kbits=4))
    with pytest.raises(FlagError, match="cannot be read"):
        parse_args(command_line(tmp_path, tmp_path / "out", deepspeed=tmp_path / "missing.json"))
    with pytest.raises(FlagError, match="torchrun"):
        main(command_line(tmp_path, tmp_path / "out", **zero3))

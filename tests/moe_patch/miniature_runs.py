"""A program for a process of its own: trains and loads in a patched miniature, once for all tests that look at it.

    python miniature_runs.py BASE OURS WORK

with the miniature on PYTHONPATH. BASE is a base model, OURS a checkpoint of llava-extensions; everything goes to WORK.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from llava.model.builder import load_pretrained_model
from llava.train.train import train

LORA = ["--use_lora", "True", "--lora_rank", "4", "--lora_alpha", "8", "--lora_modules", "q_proj,v_proj"]
IDS = torch.arange(5, 25).reshape(2, 10)


def run(base: Path, output: Path, steps: int, *flags: str) -> None:
    """One training run, at a constant rate, so that its first steps do not depend on how many follow."""
    sys.argv = [
        *("train.py", "--model_name_or_path", str(base), "--output_dir", str(output), "--max_steps", str(steps)),
        *("--lr_scheduler_type", "constant", "--learning_rate", "5e-2", "--per_device_train_batch_size", "2"),
        *("--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1", "--report_to", "none"),
        *("--use_cpu", "True", "--gradient_checkpointing", "True", "--seed", "3", "--disable_tqdm", "True"),
        *("--lora_dropout", "0.0", *LORA, *flags),
    ]
    train()


def logits(folder: Path, base: Path) -> tuple[torch.Tensor, Any]:
    """Of a loaded checkpoint, and the model."""
    _, model, _, _ = load_pretrained_model(str(folder), str(base), folder.name, device="cpu")
    with torch.no_grad():
        return model(input_ids=IDS).logits, model


def refusal(base: Path, output: Path, *flags: str) -> str:
    """The message of a run that is refused."""
    try:
        run(base, output, 1, *flags)
    except (ValueError, SystemExit) as error:
        return str(error)
    return "not refused"


def main() -> None:
    """Run everything."""
    base, ours, work = map(Path, sys.argv[1:])
    run(base, work / "whole", 4)
    shutil.copytree(work / "whole" / "checkpoint-2", work / "again" / "checkpoint-2")
    run(base, work / "again", 4)
    run(base, work / "plain", 1, "--llm_moe", "False")
    found: dict[str, torch.Tensor] = {}
    for name, folder in {
        **{name: work / name for name in ("whole", "again")},
        **{"middle": work / "whole" / "checkpoint-2", "ours": ours},
    }.items():
        found[name], model = logits(folder, base)
        found[f"{name}.blocks"] = torch.tensor(sum(type(m).__name__ == "RoutedMLP" for m in model.modules()))
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, work / "logits.safetensors")
    refused = {
        "modules": ("--lora_modules", "q_proj,gate_proj"),
        "unknown": ("--lora_modules", "q_proj,w_pack"),
        "experts": ("--llm_moe_num_experts", "0"),
        "idle": ("--use_lora", "False", "--moe_balance_w", "0.5"),
        "tower": ("--vit_trainable", "all"),
        "contradiction": ("--lora_r", "8"),
        "projector": ("--tune_mm_mlp_adapter", "True"),
        "reentrant": ("--gradient_checkpointing_kwargs", '{"use_reentrant": true}'),
    }
    messages = {name: refusal(base, work / "refused", *flags) for name, flags in refused.items()}
    try:
        load_pretrained_model(str(work / "whole"), None, "anything")
    except ValueError as error:
        messages["base"] = str(error)
    (work / "again" / "moe_args.pth").unlink()
    try:
        load_pretrained_model(str(work / "again"), str(base), "anything")
    except ValueError as error:
        messages["settings"] = str(error)
    (work / "messages.json").write_text(json.dumps(messages))


if __name__ == "__main__":
    main()

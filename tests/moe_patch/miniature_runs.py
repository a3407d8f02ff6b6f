"""A program for a process of its own: trains and loads in a patched miniature, once for all tests that look at it.

    python miniature_runs.py BASE TOWER OURS WORK

with the miniature on PYTHONPATH. BASE is a base model, TOWER its tower, OURS a checkpoint of llava-extensions, OURS-mma
one with adapters, OURS-sparse one with predictors; everything goes to WORK.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig

from llava import extensions_moe
from llava.extensions_moe.mma.config import MmaOptions
from llava.extensions_moe.mma_glue import Mma
from llava.model import LlavaLlamaForCausalLM
from llava.model.builder import load_pretrained_model
from llava.train.train import train

LORA = ["--use_lora", "True", "--lora_rank", "4", "--lora_alpha", "8", "--lora_modules", "q_proj,v_proj"]
MMA = ["--mma", "True", "--visual_input", "llava", "--visual_adapter_type", "router", "--adapter_dropout", "0.0"]
IDS = torch.arange(5, 25).reshape(2, 10)
WITH_IMAGE = IDS.clone()
WITH_IMAGE[:, 3] = -200


def run(base: Path, output: Path, steps: int, *flags: str, method: list[str] = LORA) -> None:
    """One training run, at a constant rate, so that its first steps do not depend on how many follow."""
    sys.argv = [
        *("train.py", "--model_name_or_path", str(base), "--output_dir", str(output), "--max_steps", str(steps)),
        *("--lr_scheduler_type", "constant", "--learning_rate", "5e-2", "--per_device_train_batch_size", "2"),
        *("--save_strategy", "steps", "--save_steps", "2", "--logging_steps", "1", "--report_to", "none"),
        *("--use_cpu", "True", "--gradient_checkpointing", "True", "--seed", "3", "--disable_tqdm", "True"),
        *("--lora_dropout", "0.0", *method, *flags),
    ]
    train()


def logits(folder: Path, base: Path, **inputs: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Of a loaded checkpoint, and the model."""
    _, model, _, _ = load_pretrained_model(str(folder), str(base), folder.name, device="cpu")
    with torch.no_grad():
        return model(**(inputs or {"input_ids": IDS})).logits, model


def gradients(base: Path, ours: Path, images: torch.Tensor, waiting: bool) -> dict[str, torch.Tensor]:
    """Of adapters and projector, as in a run with checkpointing, for a batch with images and one without.

    With `waiting` the first backward pass begins after both forward passes.
    """
    model = LlavaLlamaForCausalLM.from_pretrained(base)
    model.get_vision_tower().load_model()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    settings = json.loads((ours / "extensions" / "mma" / "config.json").read_text())
    defaults = {option.name: option.default for option in dataclasses.fields(MmaOptions)}
    chosen = {name: settings.get(name, default) for name, default in defaults.items()}
    args = SimpleNamespace(
        **chosen | {"mma": True, "freeze_mm_mlp_adapter": False, "use_lora": False, "dynamic": False}
    )
    extensions_moe.attach_beside_tower(model, args)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    adapters = Mma().to_ours(model, trained)
    named = {name: parameter for name, parameter in trained.items() if "mm_projector" in name} | adapters
    assert len(named) == len(trained)
    files = (ours / "extensions" / "mma" / "model.safetensors", ours / "mm_projector.safetensors")
    tensors = {name: tensor for path in files for name, tensor in load_file(path).items()}
    with torch.no_grad():
        for name, parameter in named.items():
            parameter.copy_(tensors[name])
    model.train()
    losses = (model(input_ids=ids, images=images, labels=ids.where(ids >= 0, -100)).loss for ids in (WITH_IMAGE, IDS))
    for loss in list(losses) if waiting else losses:
        loss.backward()
    return {name: parameter.grad for name, parameter in named.items()}


def refusal(base: Path, output: Path, *flags: str, method: list[str] = LORA) -> str:
    """The message of a run that is refused."""
    try:
        run(base, output, 1, *flags, method=method)
    except (ValueError, SystemExit) as error:
        return str(error)
    return "not refused"


def unknown_modality(folder: Path, base: Path) -> dict[str, str]:
    """The messages where nothing says the modality of the sequences."""
    _, model, _, _ = load_pretrained_model(str(folder), str(base), folder.name, device="cpu")
    embeddings = model.get_model().embed_tokens(IDS)
    found = {}
    for name, call in {
        "rows": lambda: model(inputs_embeds=embeddings),
        "rows-generate": lambda: model.generate(inputs_embeds=embeddings, max_new_tokens=2),
        "rows-number": lambda: model(inputs_embeds=embeddings, modality_rows=torch.ones(3).long()),
        "rows-layer": lambda: model.get_model()(inputs_embeds=embeddings),
    }.items():
        try:
            call()
        except (ValueError, RuntimeError) as error:
            found[name] = str(error)
    return found


def main() -> None:
    """Run everything."""
    base, tower, ours, work = map(Path, sys.argv[1:])
    run(base, work / "whole", 4)
    shutil.copytree(work / "whole" / "checkpoint-2", work / "again" / "checkpoint-2")
    run(base, work / "again", 4)
    run(base, work / "plain", 1, "--llm_moe", "False")
    found: dict[str, torch.Tensor] = {}
    size = CLIPVisionConfig.from_pretrained(tower).image_size
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(2))
    flags = ("--vision_tower", str(tower), "--per_device_train_batch_size", "1", "--learning_rate", "2e-2")
    run(base, work / "mma", 4, *flags, method=MMA)
    for folder in (work / "mma", ours.with_name("ours-mma")):
        found[folder.name], _ = logits(folder, base, input_ids=IDS)
        found[f"{folder.name}.image"], model = logits(folder, base, input_ids=WITH_IMAGE, images=images)
    with torch.no_grad():  # step by step, as in generation
        first = model(input_ids=WITH_IMAGE[:, :-2], images=images, use_cache=True)
        cache = {"past_key_values": first.past_key_values, "use_cache": True, "modality_rows": torch.ones(2).long()}
        steps = [model(input_ids=WITH_IMAGE[:, place : place + 1], **cache).logits for place in (-2,)]
        steps.append(model(input_ids=WITH_IMAGE[:, -1:], **cache).logits)
        for beams in (1, 2):
            prompts = torch.cat([WITH_IMAGE[:1], WITH_IMAGE[:1]]) if beams > 1 else WITH_IMAGE
            options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
            found[f"generated.{beams}"] = model.generate(prompts, images=images, **options)
    for waiting in (False, True):
        name = "waiting" if waiting else "gradient"
        values = gradients(base, ours.with_name("ours-mma"), images, waiting)
        found |= {f"{name}.{key}": gradient for key, gradient in values.items()}
    found["steps"], found["images"] = torch.cat([first.logits, *steps], dim=1), images
    for name, folder in {
        **{name: work / name for name in ("whole", "again")},
        **{"middle": work / "whole" / "checkpoint-2", "ours": ours},
    }.items():
        found[name], model = logits(folder, base)
        found[f"{name}.blocks"] = torch.tensor(sum(hasattr(m, "experts_B_gate") for m in model.modules()))
    save_file({name: tensor.contiguous() for name, tensor in found.items()}, work / "logits.safetensors")
    refused = {
        "modules": ("--lora_modules", "q_proj,gate_proj"),
        "unknown": ("--lora_modules", "q_proj,w_pack"),
        "experts": ("--llm_moe_num_experts", "0"),
        "idle": ("--use_lora", "False", "--moe_balance_w", "0.5"),
        "tower": ("--vit_trainable", "all"),
        "contradiction": ("--lora_r", "8"),
        "projector": ("--tune_mm_mlp_adapter", "True"),
        "beside": [*MMA, "--vision_tower", str(tower)],
        "reentrant": ("--gradient_checkpointing_kwargs", '{"use_reentrant": true}'),
    }
    messages = {name: refusal(base, work / "refused", *flags) for name, flags in refused.items()}
    alone: dict[str, list[str]] = {
        "mma-image": ["--mma", "True", "--vision_tower", str(tower)],
        "mma-tower": MMA,
        "mma-idle": ["--adapter_dim", "4"],
        "mma-values": [*MMA, "--vision_tower", str(tower), "--adapter_type", "everywhere"],
        "sparse": ["--dynamic", "True", "--vision_tower", str(tower)],
        "sparse-idle": ["--predictor_lr", "1e-3", "--vision_keep_rate", "0.5"],
    }
    messages |= {name: refusal(base, work / "refused", method=flags) for name, flags in alone.items()}
    try:
        load_pretrained_model(str(ours.with_name("ours-sparse")), None, "anything")
    except ValueError as error:
        messages["sparse-load"] = str(error)
    messages |= unknown_modality(ours.with_name("ours-mma"), base)
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

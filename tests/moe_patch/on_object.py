"""A program for upstream's environment: `hydralora.patch_llava` on an object of upstream's class, and back.

    python on_object.py BASE CASE OUTPUT

with an unpatched checkout first on PYTHONPATH and this repository behind it. CASE are a batch and weights of the
original code. The balance loss of the batch, and the logits before, during and after the patch go to OUTPUT.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

import hydralora
from hydralora.original import from_original, is_original_key
from llava.model import LlavaLlamaForCausalLM

PREFIX = "base_model.model."


def main() -> None:
    """Run the program."""
    base, case_path, output = map(Path, sys.argv[1:])
    case, tensors = json.loads(case_path.read_text()), load_file(case_path.with_suffix(".safetensors"))
    batch = {name: tensors[f"in/{name}"] for name in ("input_ids", "labels", "attention_mask", "images")}
    weights = {name[2:]: tensor for name, tensor in tensors.items() if name.startswith("w/")}
    bare = LlavaLlamaForCausalLM.from_pretrained(base)
    bare.get_vision_tower().load_model()
    found = {"before": bare(**batch)}

    settings = {"experts": case["experts"], "rank": case["rank"], "alpha": case["alpha"], "dense": case["dense"]}
    config = hydralora.RoutedMLPConfig(dropout=0.0, balance_weight=case["balance_w"], **settings)
    patch = hydralora.patch_llava(bare, config)
    patch.load(from_original(weights, config, case_path))
    lora = LoraConfig(r=case["rank"], lora_alpha=case["alpha"], target_modules=case["modules"].split(","))
    model = get_peft_model(bare, lora)
    for _, parameter in patch.parameters():
        parameter.requires_grad_(True)
    result = model.load_state_dict({n: t for n, t in weights.items() if not is_original_key(n)}, strict=False)
    assert not result.unexpected_keys
    model.eval()
    found["patched"] = model(**batch)
    balance = patch.balance_loss
    found["patched"].loss.backward()
    routers = [p.grad for name, p in patch.parameters() if name.endswith("router.weight")]
    patch.revert()
    found["after"] = model.unload()(**batch)
    logits = {name: value.logits.detach().contiguous() for name, value in found.items()}
    losses = {f"{name}.loss": value.loss.detach() for name, value in found.items()}
    print(f"balance loss {balance:.6f}; {len(patch.blocks)} blocks put in and taken out")
    save_file({**logits, **losses, "balance": balance, "router_gradient": torch.stack(routers)}, output)


if __name__ == "__main__":
    main()

"""A program that runs inside a patched checkout: `train` as its train.py does, and `logits` of a loaded checkpoint.

Started with the checkout on PYTHONPATH, so that `llava` is the checkout's; it may import nothing of ours. Upstream's
evaluation knows fp16 and CUDA only, for which a CPU has no kernels: `--cpu` turns both into fp32 and the CPU. What
`torch.save` writes then is wrong, so training has `--fp32-tower` instead, which does it to the vision tower alone.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def use_cpu() -> None:
    """Let fp16 mean fp32 and `cuda` mean `cpu`, after everything that reads tables of dtypes has been imported."""
    import safetensors.torch  # noqa: F401
    import torch
    import transformers.modeling_utils  # noqa: F401

    import llava.model.builder  # noqa: F401

    move = torch.Tensor.to

    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple("cpu" if str(value).startswith("cuda") else value for value in args)
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return move(self, *args, **kwargs)

    torch.Tensor.to = to
    torch.float16 = torch.half = torch.float32


def start_alike() -> None:
    """Draw the new modules of every run from one seed, whatever was drawn before: it differs with DeepSpeed's stage."""
    import torch

    from llava import extensions_moe

    def seeded(step: Callable[..., Any]) -> Callable[..., Any]:
        def from_one_seed(*args: Any) -> Any:
            torch.manual_seed(0)
            return step(*args)

        return from_one_seed

    # The first is called in front of PEFT, which then draws the LoRA of the other linear layers.
    for name in ("choose_lora_modules", "attach", "attach_beside_tower"):
        setattr(extensions_moe, name, seeded(getattr(extensions_moe, name)))


def write_logits(args: argparse.Namespace) -> None:
    """Load a checkpoint by the checkout's own loader and write the logits of the given inputs."""
    import torch
    from safetensors.torch import load_file, save_file

    from llava.model.builder import load_pretrained_model

    inputs = load_file(args.inputs)
    _, model, _, _ = load_pretrained_model(
        args.model_path, args.model_base or None, Path(args.model_path).name, device="cpu"
    )
    with torch.no_grad():
        output = model(**inputs)
    blocks = sum(hasattr(module, "experts_B_gate") for module in model.modules())
    save_file({"logits": output.logits.float().contiguous(), "blocks": torch.tensor(blocks)}, args.output)
    print(f"{blocks} routed blocks, logits {tuple(output.logits.shape)}")


def main() -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--deepspeed-on-cpu", action="store_true")
    parser.add_argument("--fp32-tower", action="store_true")
    parser.add_argument("--start-alike", action="store_true")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run")
    run.add_argument("module")
    run.add_argument("arguments", nargs=argparse.REMAINDER)
    logits = commands.add_parser("logits")
    for name in ("model_path", "model_base", "inputs", "output"):
        logits.add_argument(name)
    args = parser.parse_args()
    if args.deepspeed_on_cpu:
        import deepspeed_on_cpu

        deepspeed_on_cpu.use_cpu()
    if args.fp32_tower:
        import deepspeed_on_cpu

        deepspeed_on_cpu.keep_towers_in_fp32()
    if args.cpu:
        use_cpu()
    if args.start_alike:
        start_alike()
    if args.command == "logits":
        write_logits(args)
    else:
        sys.argv = [args.module, *args.arguments]
        runpy.run_module(args.module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()

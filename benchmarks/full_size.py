"""A LLaVA-1.5-7B of random weights: updates of LoRA and HydraLoRA next to their plan, and answers by batch.

    python -m benchmarks.full_size lora hydralora answers --output benchmarks/results/full-size-gpu.json

The model is made on the device of its configuration, so no weights are read. The record is written after each case, so
what was measured is kept if the program is stopped. `--small` measures a tiny model of the same form.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers import CLIPImageProcessor, CLIPVisionConfig, GenerationConfig, LlamaConfig

from benchmarks.measuring import Clock, clock_for
from benchmarks.record import check_run, provenance, show
from llava.model.checkpoint import bare_model
from llava.runtime.output import replace_text
from llava.runtime.program import run_program
from llava.train.evaluation.rows import NoRows
from llava.train.plan.command import Command, read_command
from llava.train.plan.model import planned_model, trained
from llava.train.plan.rows import planned_rows
from llava.train.plan.shares import share_of
from llava.train.plan.update import PlannedTrainer, measure, prepare
from llava.train.train import Parts, build_run
from playground.tokenizer import save_tokenizer

METHODS = {
    "lora": "--lora_enable True --lora_r 128 --lora_alpha 256 --mm_projector_lr 2e-5",
    "hydralora": "--use_lora True --lora_rank 32 --lora_alpha 64 --llm_moe True --dense_moe True "
    "--llm_moe_num_experts 3 --lora_modules q_proj,k_proj,v_proj,o_proj --freeze_backbone True",
}
"""The published options of each method."""

LLAMA = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32}
CLIP = {"image_size": 336, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24}
SMALL_LLAMA = {"vocab_size": 1000, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2}
SMALL_CLIP = {"image_size": 56, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def build_parser() -> argparse.ArgumentParser:
    """The options of this program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("cases", nargs="+", choices=(*METHODS, "answers"), help="what is measured, in this order")
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--small", action="store_true", help="a tiny model of the same form")
    add("--batch", type=int, default=4, help="rows of a micro batch (default %(default)s)")
    add("--length", type=int, default=2048, help="positions of a row (default %(default)s)")
    add("--batch-sizes", type=int, nargs="+", default=[1, 32], help="questions answered together (default 1 32)")
    add("--tokens", type=int, default=32, help="tokens of an answer (default %(default)s)")
    add("--repeats", type=int, default=3, help="timed rounds, after one that does not count (default %(default)s)")
    add("--output", type=Path, default=None, help="JSON file, written after each case")
    return parser


def write_configurations(folder: Path, small: bool) -> None:
    """A base and a tower as their folders are, without weights."""
    base, tower = folder / "base", folder / "tower"
    llama, clip = (SMALL_LLAMA, SMALL_CLIP) if small else (LLAMA, CLIP)
    heads = 4 if small else 32
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    LlamaConfig(
        architectures=["LlamaForCausalLM"], num_attention_heads=heads, max_position_embeddings=4096, **llama, **ids
    ).save_pretrained(base)
    GenerationConfig(**ids).save_pretrained(base)
    save_tokenizer(base, 0)
    CLIPVisionConfig(patch_size=14, num_attention_heads=4 if small else 16, **clip).save_pretrained(tower)
    side = clip["image_size"]
    CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}).save_pretrained(tower)
    (folder / "rows.json").write_text("[]", encoding="utf-8")


def command_of(folder: Path, args: argparse.Namespace, options: str, number: int) -> Command:
    """The training command of a case."""
    words = (
        f"--model_name_or_path {folder}/base --version v1 --data_path {folder}/rows.json --image_folder {folder} "
        f"--vision_tower {folder}/tower --mm_projector_type mlp2x_gelu --mm_vision_select_layer -2 "
        f"--mm_use_im_patch_token False --bf16 True --gradient_checkpointing True --output_dir {folder}/{number} "
        f"--per_device_train_batch_size {args.batch} --model_max_length {args.length} {options}"
    ).split()
    return read_command([*words, *(("--use_cpu", "True") if args.device == "cpu" else ())])


def on_device(command: Command) -> Any:
    """The run of a command with random weights on its device; nothing has been trained."""

    def model(args: Any, tokenizer: Any, attention: str | None) -> nn.Module:
        with torch.device(command.device):
            return planned_model(args, tokenizer, attention, None)

    parts = Parts(
        dataset=planned_rows, trainer=PlannedTrainer, evaluation_rows=lambda *_: NoRows(), model=model, records=False
    )
    run = build_run(command.args, None, parts)
    trainer: Any = run.trainer
    trainer.planned, trainer.half = command.device, torch.bfloat16
    return run


def placed(leaf: Any, device: torch.device) -> Any:
    """A tensor, or something that has `to`, on a device."""
    return leaf.to(device) if hasattr(leaf, "to") else leaf


def updates(command: Command, batch: int, clock: Clock, repeats: int) -> dict[str, Any]:
    """Seconds of an update, and the most bytes that the device's allocator gave out, next to the planned ones."""
    run = on_device(command)
    planned = measure(command, batch)
    share = share_of(planned, 1, None, 0, 2)
    trainer: Any = run.trainer
    model, device = run.model, command.device
    prepare(trainer)
    rows = trainer.data_collator([run.dataset[0] for _ in range(batch)])
    inputs = tree_map(lambda leaf: placed(leaf, device), rows)
    optimizer = trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1
    seconds = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    for number in range(repeats + 1):
        start = clock.read()
        trainer.training_step(model, dict(inputs), trainer._get_num_items_in_batch([inputs], device))
        nn.utils.clip_grad_norm_(trained(model), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if number:
            seconds.append(clock.read() - start)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {
        "seconds": seconds,
        "median": statistics.median(seconds),
        "peak_bytes": peak,
        "planned_bytes": share.total,
        "flops": planned.flops,
        "flops_per_second": planned.flops / statistics.median(seconds),
    }


def answers(command: Command, args: argparse.Namespace, clock: Clock) -> dict[str, Any]:
    """Answers a second by the number of questions that are asked together."""
    run = on_device(command)
    model = bare_model(run.model).eval()
    tower: Any = model.get_vision_tower()
    ids = torch.randint(3, 300, (1, 64), device=command.device)
    ids[0, 8] = -200
    found: dict[str, Any] = {}
    for batch in args.batch_sizes:
        images = torch.randn(batch, 3, tower.image_size, tower.image_size, device=command.device)
        prompts: Tensor = ids.expand(batch, -1)
        seconds = []
        for number in range(args.repeats + 1):
            start = clock.read()
            with torch.no_grad(), torch.autocast(command.device.type, dtype=torch.bfloat16):
                model.generate(
                    prompts, images=images, do_sample=False, min_new_tokens=args.tokens, max_new_tokens=args.tokens
                )
            if number:
                seconds.append(clock.read() - start)
        found[str(batch)] = {"seconds": seconds, "answers_per_second": batch / statistics.median(seconds)}
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure the cases and write each as soon as it is there.

    Raises:
        FlagError: there is no GPU, or the output is not a .json file.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    args = build_parser().parse_args(words)
    check_run(args.device, args.output)
    device = torch.device(args.device)
    clock = clock_for(device, torch.get_num_threads())
    record = provenance("benchmarks.full_size", words, device) | {
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "cases": {},
    }
    with tempfile.TemporaryDirectory() as folder:
        write_configurations(Path(folder), args.small)
        for case in args.cases:
            command = command_of(Path(folder), args, METHODS.get(case, METHODS["lora"]), len(record["cases"]))
            if case == "answers":
                found = answers(command, args, clock)
            else:
                found = updates(command, args.batch, clock, args.repeats)
            record["cases"][case] = found
            show(f"{case}: {json.dumps(found)}")
            if args.output is not None:
                replace_text(args.output, json.dumps(record, indent=1) + "\n")
            if device.type == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    run_program(main)

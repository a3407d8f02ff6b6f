"""When `--fsdp` can be carried out."""

from __future__ import annotations

from typing import Any


def fsdp_problems(training: Any, bits: int, flag: str) -> list[str]:
    """What is wrong with `--fsdp` in a run; nothing if it is off.

    Args:
        training: options of the run.
        bits: precision of the frozen base.
        flag: of `bits`.
    """
    if not training.fsdp:
        return []
    version = int((training.fsdp_config or {}).get("version", 2))
    problems = []
    if training.use_cpu or training.device.type == "cpu":
        problems.append("--fsdp: needs GPUs; on CPUs accelerate would train by plain data parallelism without a word")
    elif training.world_size == 1:
        problems.append(
            "--fsdp: splits a model over processes, and there is one; start with torchrun --nproc_per_node GPUS"
        )
    if training.deepspeed:
        problems.append("--fsdp and --deepspeed both split the model; leave one of them out")
    if bits != 16:
        problems.append(f"--fsdp: cannot split weights that {flag} {bits} quantises; use --deepspeed with ZeRO-2")
    if version != 2:
        problems.append(f"--fsdp_config: version is {version}; FSDP2 is carried out here, and version 1 is retired")
    return problems

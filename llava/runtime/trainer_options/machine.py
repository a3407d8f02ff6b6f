"""Rows of the options that change no number of a run: processes, devices, data loading."""

from __future__ import annotations

from llava.runtime.trainer_options import values
from llava.runtime.trainer_options.optimization import TRAINER
from llava.runtime.trainer_options.row import refused, supported

DEVICES = (
    supported("use_cpu", TRAINER),
    supported("torch_empty_cache_steps", TRAINER),
    supported(
        "deepspeed",
        "DeepSpeed ZeRO, from a file of settings ([distributed.md](distributed.md))",
        limits="needs a launcher; an optimizer or a schedule of its own is refused",
    ),
    supported(
        "fsdp",
        "FSDP2 over several GPUs ([distributed.md](distributed.md))",
        limits="needs GPUs and a launcher; not with `--deepspeed` or a quantised base",
    ),
    supported("fsdp_config", "FSDP2", values.of_fsdp, "needs `--fsdp`"),
    refused(
        "parallelism_config",
        "the parts of a model are not spread over devices by tensor, sequence or context",
        "use --deepspeed scripts/zero3.json",
    ),
    supported(
        "accelerator_config",
        "accelerate",
        values.accelerator,
        f"only {' and '.join(f'`{name}`' for name in sorted(values.ACCELERATOR))}",
    ),
)

PROCESSES = (
    supported("local_rank", "the launcher sets it"),
    supported("ddp_backend", "torch", values.one_of("ddp_backend", values.BACKENDS)),
    supported("ddp_timeout", "torch"),
    supported("ddp_find_unused_parameters", "torch's DistributedDataParallel"),
    supported("ddp_bucket_cap_mb", "torch's DistributedDataParallel"),
    supported("ddp_broadcast_buffers", "torch's DistributedDataParallel"),
    supported("ddp_static_graph", "torch's DistributedDataParallel"),
)

LOADING = (
    supported("dataloader_num_workers", "torch's DataLoader"),
    supported("dataloader_pin_memory", "torch's DataLoader"),
    supported(
        "dataloader_persistent_workers",
        "torch's DataLoader",
        values.workers("dataloader_persistent_workers"),
        "needs `--dataloader_num_workers`",
    ),
    supported(
        "dataloader_prefetch_factor",
        "torch's DataLoader",
        values.workers("dataloader_prefetch_factor"),
        "needs `--dataloader_num_workers`",
    ),
    supported(
        "dataloader_multiprocessing_context",
        "torch's DataLoader",
        values.start_method,
        "needs `--dataloader_num_workers`",
    ),
    supported(
        "dataloader_in_order", "torch's DataLoader", values.in_order, "False is refused: no run could be repeated"
    ),
)

ROWS = DEVICES + PROCESSES + LOADING

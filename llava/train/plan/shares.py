"""What of an update is on one GPU: data parallelism keeps everything on each, ZeRO gives each a share.

DeepSpeed keeps float32 copies of the trained weights and the optimizer's state for them. Stage 1 divides these among
the processes, stage 2 the gradients too, stage 3 the weights too, which are gathered layer by layer when they are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llava.runtime.rehearsal.memory import Part
from llava.train.plan.update import Update

BUCKET = 500_000_000
"""Elements of DeepSpeed's buckets where its settings do not say."""

LIVE = 1_000_000_000
"""Parameters that stage 3 keeps gathered where its settings do not say."""


@dataclass(frozen=True)
class Share:
    """Bytes of one process.

    Attributes:
        parts: on the GPU, by part, at the peak.
        buffers: on the GPU, of the communication between processes.
        host: in the memory of the machine, moved there by DeepSpeed's offloading.
    """

    parts: dict[Part, int]
    buffers: int
    host: int

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return sum(self.parts.values()) + self.buffers


def share_of(update: Update, gpus: int, zero: Mapping[str, Any] | None, width: int, half_bytes: int) -> Share:
    """What one process has of an update.

    Args:
        update: measured on one device that has everything.
        gpus: number of processes.
        zero: DeepSpeed's settings; None without.
        width: D, by which transformers sets buckets that are `auto`.
        half_bytes: bytes of a weight in the dtype that DeepSpeed computes in.
    """
    if zero is None:
        # Gradients are copied into the buckets in which they are sent.
        return Share(dict(update.peak), 4 * update.trained if gpus > 1 else 0, 0)
    settings = zero.get("zero_optimization", {})
    stage = int(settings.get("stage", 0))
    trained = update.trained
    weights = _part(update.weights, gpus, stage >= 3)
    gradients = _part(half_bytes * trained, gpus, stage >= 2)
    optimizer = _part(4 * trained + update.state, gpus, stage >= 1)
    host = 0
    if _is_offloaded(settings, "offload_optimizer"):
        host, optimizer, gradients = optimizer + gradients, 0, 0
    if stage >= 3 and _is_offloaded(settings, "offload_param"):
        host, weights = host + weights, 0
    parts = {Part.WEIGHTS: weights, Part.GRADIENTS: gradients, Part.OPTIMIZER: optimizer, **update.work}
    return Share(parts, _buffers(update, gpus, settings, stage, width, half_bytes), host)


def _part(number: int, gpus: int, is_divided: bool) -> int:
    return -(-number // gpus) if is_divided else number


def _is_offloaded(settings: Mapping[str, Any], section: str) -> bool:
    return (settings.get(section) or {}).get("device", "none") in ("cpu", "nvme")


def _buffers(update: Update, gpus: int, settings: Mapping[str, Any], stage: int, width: int, half_bytes: int) -> int:
    """Buckets of gradients, and weights gathered by stage 3 or after a step of the others: at most all there are."""
    if stage == 0:
        return 0
    copies = 2 if settings.get("overlap_comm", stage >= 3) else 1
    sent = copies * min(_elements(settings, "reduce_bucket_size", BUCKET, width * width), update.trained)
    if stage >= 3:
        gathered = min(_elements(settings, "stage3_max_live_parameters", LIVE, LIVE), update.weights // half_bytes)
        gathered += _elements(settings, "stage3_prefetch_bucket_size", BUCKET // 10, int(0.9 * width * width))
    else:
        gathered = min(_elements(settings, "allgather_bucket_size", BUCKET, BUCKET), update.trained)
    return half_bytes * (sent + (gathered if gpus > 1 else 0))


def _elements(settings: Mapping[str, Any], name: str, default: int, automatic: int) -> int:
    """A number of elements in DeepSpeed's settings."""
    value = settings.get(name, default)
    return automatic if value == "auto" else int(float(value))

"""One line of log for each step of a training run: base, tower, extensions, data, training, saving."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from llava.data.dataset import LazySupervisedDataset
from llava.data.streams.dataset import StreamedDataset
from llava.model.language_model.causal_lm import LlavaForCausalLM
from llava.model.language_model.packed_attention import BOUNDED, NAME, packed_kernel
from llava.runtime.run_record import Resumption
from llava.train.base_settings import changed_settings, kept_settings
from llava.train.base_template import template_line
from llava.train.evaluation.scores import Examination
from llava.train.options import RunArguments


def say(args: RunArguments, step: str, text: str) -> None:
    """Print a step on the process that logs."""
    if args.training.should_log:
        print(f"{step:<12}{text}")


def say_base(args: RunArguments, model: nn.Module) -> None:
    """What was loaded as the base."""
    kept = (
        f"kept in {args.training.bits} bits" if args.training.bits != 16 else f"in {model.dtype}".replace("torch.", "")
    )
    say(args, "base", f"{args.model.model_name_or_path}: {type(model).__name__}, {kept}")


def say_settings(args: RunArguments) -> None:
    """Which settings of the base hold although no flag says so, and which ones the flags replace."""
    kept = ", ".join(f"{name} {value}" for name, value in kept_settings(args).items())
    if kept:
        say(args, "settings", f"of {args.base.source}: {kept}")
    for line in changed_settings(args):
        say(args, "settings", line)
    template = template_line(args)
    if template is not None:
        say(args, "settings", template)


def say_tower(args: RunArguments, model: Any) -> None:
    """The tower and what comes between it and the language model."""
    tower = model.get_vision_tower()
    if tower is None:
        say(args, "tower", "none: text only")
        return
    source = args.model.vision_tower
    if tower.stored is not None:
        source = f"the weights inside {tower.stored.folder}, settings of {args.model.vision_tower}"
    say(args, "tower", f"{source}: images of {tower.image_size} pixels, projector {args.model.mm_projector_type}")


def say_data(args: RunArguments, dataset: LazySupervisedDataset | StreamedDataset) -> None:
    """How many rows are trained on, or that they are read as a stream."""
    names = ", ".join(map(str, args.data.data_path or []))
    if isinstance(dataset, StreamedDataset):
        buffer = args.data.shuffle_buffer
        order = f"shuffled in a buffer of {buffer:,} rows" if buffer else "in the order of each source"
        say(args, "data", f"a stream of {names}, {order}")
    else:
        say(args, "data", f"{len(dataset):,} rows of {names}")


def say_packing(args: RunArguments, llava: LlavaForCausalLM) -> None:
    """How the samples of a row are kept apart, if rows may have several."""
    if not args.data.packing:
        return
    chosen, training = llava.config._attn_implementation, args.training
    half = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else llava.dtype
    kernel = packed_kernel(llava.config, training.device, half) if chosen == NAME else None
    means = "a block-diagonal mask" if kernel is None else kernel.__name__.replace("_", " ")
    way = chosen if chosen in BOUNDED else means
    say(args, "packing", f"rows of up to {training.model_max_length:,} positions, samples kept apart by {way}")


def say_evaluation(args: RunArguments, rows: int, questions: Examination | None) -> None:
    """What the model is measured on while it is trained; nothing if that is nothing."""
    found = [f"{rows:,} rows of {', '.join(args.evaluation.eval_data_path or [])}"] if rows else []
    found += [] if questions is None else [f"{each.name}: {len(each.tasks):,} questions" for each in questions.sets]
    if found:
        say(args, "evaluation", "; ".join(found))


def say_training(args: RunArguments, resumed: Resumption | None) -> None:
    """How large an update is, and where the run starts; of a resumed run, what differs from before."""
    for note in () if resumed is None else resumed.notes:
        say(args, "resume", note)
    training = args.training
    rows = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    length = f"updates: {training.max_steps}" if training.max_steps > 0 else f"epochs: {training.num_train_epochs:g}"
    start = "" if resumed is None else f", resumed from {resumed.folder.name}"
    processes = f"processes: {training.world_size} ({training.device.type})"
    say(args, "training", f"{length}, rows an update: {rows}, {processes}{start}")

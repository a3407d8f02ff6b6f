"""What becomes of transformers' options in `python -m hydralora.finetune`."""

from __future__ import annotations

from llava.runtime.trainer_options import values
from llava.runtime.trainer_options.optimization import TRAINER
from llava.runtime.trainer_options.row import Table, but, refused, supported
from llava.runtime.trainer_options.table import TABLE

TEXT_OPTIONS: Table = but(
    TABLE,
    supported("do_train", "the program: without it, it only evaluates"),
    supported(
        "include_num_input_tokens_seen", TRAINER, values.token_counts, f"one of {', '.join(values.TOKEN_COUNTS)}"
    ),
    supported(
        "neftune_noise_alpha",
        "transformers' Trainer: noise on all embeddings while training; T of alpha / sqrt(T D) counts padding",
    ),
    supported("bf16_full_eval", f"{TRAINER}, in the evaluation after training"),
    supported("fp16_full_eval", f"{TRAINER}, in the evaluation after training"),
    refused("remove_unused_columns", "the column that it would remove has the tasks of the records", "leave it out"),
    refused(
        "torch_compile",
        "the lengths of batches change with every update, and routing is recorded between layers",
        "leave it out; --flash_attn True saves time on a GPU",
    ),
    refused(
        "use_liger_kernel",
        "its loss replaces the forward pass of the model, which then has no logits for label smoothing and metrics",
        "leave it out; --gradient_checkpointing True saves memory",
    ),
)

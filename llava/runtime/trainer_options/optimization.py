"""Rows of the options that change the weights: updates, schedule, optimizer, precision, regularization."""

from __future__ import annotations

from llava.runtime.trainer_options import values
from llava.runtime.trainer_options.row import no_effect, refused, renamed, supported

TRAINER = "transformers' Trainer"

UPDATES = (
    supported("per_device_train_batch_size", TRAINER),
    supported("gradient_accumulation_steps", f"{TRAINER}; the loss is averaged over the targets of the whole update"),
    supported("num_train_epochs", TRAINER),
    supported("max_steps", f"{TRAINER}; replaces `--num_train_epochs`"),
    supported("learning_rate", "the optimizer; parts of the model may have rates of their own"),
    supported(
        "lr_scheduler_type", TRAINER, values.schedule, "`reduce_lr_on_plateau` and `greedy` need `--eval_strategy`"
    ),
    supported(
        "lr_scheduler_kwargs",
        "the schedule, which is made once for a trial before anything is loaded",
        values.json_object("lr_scheduler_kwargs"),
        "what the schedule does not take is refused",
    ),
    supported("warmup_steps", f"{TRAINER}; a number below 1 is a share of all updates"),
    supported("max_grad_norm", f"{TRAINER}; 0 switches clipping off"),
    supported("average_tokens_across_devices", "the loss: its targets are counted over all processes"),
    supported("seed", "everything that is drawn"),
    supported("data_seed", "the order of the data, in place of `--seed`"),
    supported("full_determinism", f"{TRAINER}: torch's deterministic kernels alone"),
    refused(
        "auto_find_batch_size",
        "an interrupted run could not be resumed, because the batches of the run would not be those of its options",
        "lower --per_device_train_batch_size and raise --gradient_accumulation_steps",
    ),
)

OPTIMIZER = (
    supported(
        "optim",
        "the optimizer of that name, over the run's parameter groups; tried on one weight before anything is loaded",
        values.optimizer,
        "GaLore, APOLLO, LOMO and schedule-free optimizers, and those whose package is not installed, are refused",
    ),
    supported("optim_args", "the optimizer", limits="what the optimizer does not read is refused"),
    refused("optim_target_modules", "only GaLore and APOLLO read it, which are not supported", "leave it out"),
    supported("weight_decay", "the optimizer; biases and norms have none"),
    supported("adam_beta1", "optimizers of the Adam family"),
    supported("adam_beta2", "optimizers of the Adam family"),
    supported("adam_epsilon", "optimizers of the Adam family"),
)

REGULARIZATION = (
    supported(
        "label_smoothing_factor",
        "the language-model loss while training, over its target positions; evaluations are not smoothed",
    ),
    supported(
        "neftune_noise_alpha",
        "noise on embeddings of text while training, uniform up to alpha / sqrt(T D) for T tokens of text in a row",
    ),
)

PRECISION = (
    supported("bf16", TRAINER),
    supported(
        "fp16", f"{TRAINER}; the scale of the loss is searched for", values.precision, "not together with `--bf16`"
    ),
    supported("tf32", "torch", values.tf32, "needs an Ampere GPU or later"),
    refused("bf16_full_eval", "evaluations are made while training, in the precision of training", "leave it out"),
    refused("fp16_full_eval", "evaluations are made while training, in the precision of training", "leave it out"),
)

_SWITCH = supported("activation_checkpointing", "the model: layers are computed again in the backward pass")
_OPTIONS = supported(
    "activation_checkpointing_kwargs",
    "torch; `use_reentrant` is false where it is not given",
    values.checkpointing,
    f"only {', '.join(f'`{name}`' for name in values.CHECKPOINTING)}",
)

MODEL = (
    _SWITCH,
    renamed(_SWITCH, "gradient_checkpointing"),
    _OPTIONS,
    renamed(_OPTIONS, "gradient_checkpointing_kwargs"),
    refused(
        "torch_compile",
        "the lengths of batches change with every update, and saving, evaluating and resuming a compiled model is not "
        "tested",
        "leave it out; --attn_implementation flash_attention_2 saves time on a GPU",
    ),
    refused("torch_compile_backend", "it switches --torch_compile on, which is not supported", "leave it out"),
    refused("torch_compile_mode", "it switches --torch_compile on, which is not supported", "leave it out"),
    refused(
        "use_liger_kernel",
        "its loss replaces the forward pass of the decoder, and with it the extensions and the named losses",
        "leave it out; --gradient_checkpointing True saves memory",
    ),
    refused("liger_kernel_config", "it belongs to --use_liger_kernel, which is not supported", "leave it out"),
    refused("use_cache", "training reads whole sequences, so that no keys and values are kept", "leave it out"),
)

DATA = (
    supported(
        "train_sampling_strategy",
        "the order of the data, which a resumed run continues",
        values.sampling,
        "`batch_rebalance` is refused",
    ),
    refused(
        "length_column_name",
        "the data has no columns; lengths are counted from the rows",
        "leave it out",
    ),
    supported("dataloader_drop_last", "torch's DataLoader"),
    refused(
        "remove_unused_columns",
        "the columns that it would remove are the images",
        "leave it out",
    ),
    supported("label_names", "targets are called labels", values.label_names, "other names are refused"),
    supported("ignore_data_skip", f"{TRAINER}: a resumed run begins its epoch again"),
)

PROGRAM = (
    no_effect("do_train", "this program always trains"),
    refused("do_predict", "there is no data to predict", "evaluate the checkpoint afterwards (docs/evaluation.md)"),
    supported("resume_from_checkpoint", "the program; without it the newest checkpoint in `--output_dir` is resumed"),
)

ROWS = UPDATES + OPTIMIZER + REGULARIZATION + PRECISION + MODEL + DATA + PROGRAM

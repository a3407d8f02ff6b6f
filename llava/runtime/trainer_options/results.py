"""Rows of the options about what a run leaves behind: checkpoints, logs, evaluations, a repository on a hub."""

from __future__ import annotations

from llava.runtime.trainer_options import values
from llava.runtime.trainer_options.optimization import TRAINER
from llava.runtime.trainer_options.row import no_effect, refused, supported

SAVING = (
    supported("output_dir", "the program; a folder with checkpoints is resumed"),
    supported("save_strategy", TRAINER, values.with_evaluations("save_strategy"), "`best` needs `--eval_strategy`"),
    supported("save_steps", f"{TRAINER}; a number below 1 is a share of all updates"),
    supported("save_total_limit", "the program: the oldest checkpoints are deleted when a new one is whole"),
    supported("save_only_model", f"{TRAINER}; such a checkpoint cannot be resumed"),
    supported("save_on_each_node", TRAINER),
    refused(
        "enable_jit_checkpoint",
        "it would save in the middle of an update",
        "lower --save_steps: a run may be killed at any moment and continues from its last checkpoint, which is whole",
    ),
    supported("restore_callback_states_from_checkpoint", TRAINER),
)

LOGGING = (
    supported("logging_strategy", TRAINER),
    supported("logging_steps", f"{TRAINER}; a number below 1 is a share of all updates"),
    supported("logging_first_step", TRAINER),
    no_effect("logging_nan_inf_filter", "a run stops at the first loss that is not finite"),
    supported("log_level", TRAINER, values.one_of("log_level", values.LOG_LEVELS)),
    supported("log_level_replica", TRAINER, values.one_of("log_level_replica", values.LOG_LEVELS)),
    supported("log_on_each_node", TRAINER),
    supported("disable_tqdm", TRAINER),
    supported(
        "include_num_input_tokens_seen",
        f"{TRAINER}; tokens of text, without the patches of images",
        values.token_counts,
        f"one of {', '.join(values.TOKEN_COUNTS)}",
    ),
    supported("report_to", TRAINER, values.reporters, "the tracker's package must be installed"),
    supported("run_name", "the tracker"),
    supported("project", "the tracker"),
    supported("trackio_space_id", "trackio"),
    supported("trackio_bucket_id", "trackio"),
    supported("trackio_static_space_id", "trackio"),
    supported("debug", TRAINER, values.debug, "`tpu_metrics_debug` is refused"),
    supported("skip_memory_metrics", f"{TRAINER}; False adds the memory of a run to its metrics"),
)

EVALUATION = (
    supported("do_eval", "the program"),
    supported("eval_strategy", TRAINER),
    supported("eval_steps", TRAINER),
    supported("eval_delay", TRAINER),
    supported("eval_on_start", TRAINER, values.with_evaluations("eval_on_start"), "needs `--eval_strategy`"),
    supported("per_device_eval_batch_size", TRAINER),
    no_effect("prediction_loss_only", "evaluations compute nothing but losses from predictions"),
    no_effect("eval_do_concat_batches", "predictions are not kept"),
    no_effect("eval_use_gather_object", "predictions are not kept"),
    no_effect("eval_accumulation_steps", "predictions are not kept"),
    no_effect("batch_eval_metrics", "there is no metric of predictions"),
    no_effect("include_for_metrics", "there is no metric of predictions"),
    supported(
        "load_best_model_at_end", TRAINER, values.with_evaluations("load_best_model_at_end"), "needs `--eval_strategy`"
    ),
    supported("metric_for_best_model", TRAINER),
    supported("greater_is_better", TRAINER),
)

HUB = (
    supported("push_to_hub", "the program publishes the finished folder once, with a model card"),
    supported("hub_model_id", "the program", limits="needs `--push_to_hub True`"),
    supported("hub_strategy", "the program, once at the end", limits="only `end`"),
    supported("hub_token", "the program"),
    supported("hub_private_repo", "the program, for a new repository"),
    no_effect("hub_always_push", "the finished folder is published once"),
    supported("hub_revision", "the program", limits="needs `--push_to_hub True`"),
)

ROWS = SAVING + LOGGING + EVALUATION + HUB

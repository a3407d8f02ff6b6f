"""The base with its adapter, the Trainer, and what a run leaves behind.

Corresponds to `main` of the original's `fine-tuning.py`. The routing statistics by task, which the original prepares
and never computes, are logged here; the balance loss acts within the layers (`hydralora/tuner/balance/auxiliary.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.trainer import TRAINER_STATE_NAME

from hydralora.model import RoutingRecorder, of_text
from hydralora.statistics import TaskStatistics
from hydralora.text.adapter_flags import adapter_config
from hydralora.text.messages import OWN
from hydralora.text.options import LossReduction, RunArguments
from hydralora.tuner import RoutingUnit, hydralora_layers, parameter_groups
from hydralora.tuner.loading import load_adapter
from hydralora.tuner.original import CONFIG_FILE, OUR_WEIGHTS
from llava.errors import CheckpointError, FlagError
from llava.runtime.files import data_text, reading
from llava.runtime.hub import TOKENIZER_FILES, local_folder
from llava.runtime.monitoring.losses import RowLosses, over_batches, over_targets
from llava.runtime.monitoring.trainer import MonitoredTrainer
from llava.runtime.partition import fetch, shared_like
from llava.runtime.quantization import choose_cpu_kernels, quantisation_config
from llava.runtime.tokenizer import add_ends
from llava.runtime.tokenizer import load_tokenizer as read_tokenizer
from llava.runtime.trainer_options.smoothing import smoothing_term
from llava.runtime.weights.adapter_counts import check_adapter
from llava.runtime.weights.base_weights import GENERATION_FILE, read_base
from llava.runtime.weights.completeness import RUN_FILE, require
from llava.runtime.weights.torch_files import check_weights
from llava.runtime.weights.weight_files import check_base
from llava.runtime.zero import same_draws

ADAPTER_FOLDER = "sft_lora_model"
"""Where the original puts the finished adapter, in the output folder and in each checkpoint."""


def load_tokenizer(args: RunArguments) -> Any:
    """The tokenizer; one without padding token pads by `<unk>`, or by the end-of-sequence token.

    Raises:
        CheckpointError: its files are missing or damaged.
        BadSampleError: the file of `--chat_template` is not text.
    """
    model, template = args.model, args.data.chat_template
    folder = local_folder(
        args.tokenizer_name,
        TOKENIZER_FILES,
        revision=model.model_revision,
        cache_dir=model.cache_dir,
        token=model.use_auth_token or None,
    )
    tokenizer = read_tokenizer(folder)
    if template is not None and template != OWN:
        tokenizer.chat_template = data_text(template)
    return tokenizer


def load_base(args: RunArguments) -> nn.Module:
    """The frozen base, in 16, 8 or 4 bits.

    Raises:
        CheckpointError: its files are damaged or incomplete, or a weight is not a finite floating-point number.
        FlagError: bitsandbytes is needed and not installed, or the base is not a causal language model.
    """
    model, training = args.model, args.training
    dtype: Any = "auto" if model.torch_dtype in (None, "auto") else getattr(torch, str(model.torch_dtype))
    name = str(model.model_name_or_path)
    origin = {"cache_dir": model.cache_dir, "revision": model.model_revision, "token": model.use_auth_token or None}
    options: dict[str, Any] = {"dtype": dtype, **origin}
    if training.deepspeed:
        options["dtype"] = training.hf_deepspeed_config.dtype()  # the one that it computes in
    if training.flash_attn:
        options["attn_implementation"] = "flash_attention_2"
    if training.load_in_kbits != 16:
        compute = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
        bits, kind = training.load_in_kbits, training.quant_type
        options["quantization_config"] = quantisation_config(bits, compute, kind, training.double_quant)
        if training.device.type == "cuda":  # quantised weights cannot be moved there later
            options["device_map"] = {"": training.device}
    check_base(name)
    check_weights(Path(name))
    with reading(Path(name) / "config.json"):
        config = AutoConfig.from_pretrained(name, **origin)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise FlagError(f"--model_name_or_path {name}: a {config.model_type} is not a causal language model")
    with same_draws(training):
        base, missing = read_base(MODEL_FOR_CAUSAL_LM_MAPPING[type(config)], name, config, **options)
    if missing:
        raise CheckpointError(
            f"{name}: lacks {len(missing)} weights that its config.json asks for: {sorted(missing)[:3]}"
        )
    if training.load_in_kbits == 4:
        choose_cpu_kernels(base, trained=True)
    base.config.use_cache = False
    return base


def add_adapter(base: nn.Module, args: RunArguments, tasks: Sequence[str] = ()) -> PeftModel:
    """The base with a new adapter, or with the one that `--peft_path` names, ours or the original's.

    `balance_weight` of its configuration is the one that holds for this run.

    Args:
        base: of the run.
        args: of the run.
        tasks: those of the data, for `--routing task`.

    Raises:
        CheckpointError: the file of the adapter that `--peft_path` names is damaged or could run code.
        FlagError: `--peft_path` names no folder with such an adapter, or a flag of a new one is out of range.
    """
    training = args.training
    if training.peft_path:
        check_weights(Path(training.peft_path))
        try:
            model = load_adapter(base, Path(training.peft_path), is_trainable=True)
        except ValueError as error:
            raise FlagError(f"--peft_path: {error}") from error
        config = model.active_peft_config
        if training.balance_weight is not None:
            config.balance_weight = training.balance_weight
            model.base_model.attach_losses()
        if training.should_log:
            print(
                f"--peft_path {training.peft_path}: training resumes with its own sizes: r {config.r}, "
                f"alpha {config.lora_alpha}, {config.lora_nums} experts, dropout {config.lora_dropout}, "
                f"routing by {config.routing}"
            )
        return model
    config = adapter_config(training, args.experts, tasks)
    try:
        return get_peft_model(base, config)
    except ValueError as error:  # a layer that is not there, or that cannot be adapted
        raise FlagError(f"the adapter of the flags does not fit --model_name_or_path: {error}") from error


def record_end(
    model: PeftModel, tokenizer: Any, announce: bool, ends: Sequence[int] | None = None
) -> GenerationConfig | None:
    """Make the tokens with which answers are trained to end also end generation.

    Args:
        model: its `generation_config` is changed.
        tokenizer: of the run.
        announce: print what was added.
        ends: the tokens; None: the tokenizer's end-of-sequence token.

    Returns:
        What the adapter's folder has to say of it; None if the base's `generation_config.json` names the tokens.
    """
    config = getattr(model, "generation_config", None)
    added = [] if config is None else add_ends(config, [tokenizer.eos_token_id] if ends is None else ends)
    if config is None or not added:
        return None
    if announce:
        for end in added:
            print(
                f"answers are trained to end with {tokenizer.convert_ids_to_tokens(end)!r} (token {end}), at which "
                f"generation did not end by the base's generation_config; {GENERATION_FILE} in the adapter's folder "
                "adds it"
            )
    return GenerationConfig(eos_token_id=config.eos_token_id)


def link_adapter(source: Path, target: Path) -> None:
    """Put the adapter and tokenizer files of `source` under `target` too, without storing them twice.

    Where the file system has no hard links, as many shares of a network, they are copied.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.is_file() and any(path.match(pattern) for pattern in ("adapter_*", GENERATION_FILE, *TOKENIZER_FILES)):
            copy = target / path.name
            copy.unlink(missing_ok=True)
            try:
                copy.hardlink_to(path)
            except OSError:
                shutil.copy2(path, copy)


def require_adapter(checkpoint: Path) -> None:
    """Refuse a checkpoint to resume from that lacks its adapter, or the description of it.

    Raises:
        CheckpointError: names the missing file and the one that names it, or the description that is not one.
    """
    weights, config = checkpoint / OUR_WEIGHTS, checkpoint / CONFIG_FILE
    require(weights, checkpoint / TRAINER_STATE_NAME, "describes a run to continue, whose adapter it is")
    require(config, weights, "is an adapter, which this file describes")
    with reading(config, "does not describe an adapter"):
        PeftConfig.from_pretrained(str(checkpoint))


class HydraLoraTrainer(MonitoredTrainer):
    """Trainer that logs expert utilization, by task where the data has tasks."""

    def __init__(self, *, ends: GenerationConfig | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.ends = ends
        self.statistics = TaskStatistics()
        by_target = self.args.loss_reduction == LossReduction.TARGET
        self.loss_reduction = over_targets if by_target else over_batches
        config: Any = self.model.active_peft_config
        self.by_task = config.routing == RoutingUnit.TASK
        self.label_smoother = None  # the model is given the labels, which are no part of what the router decides by

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The optimizer of the flags; the routers have a learning rate of their own where one is given."""
        rate, trained = self.args.router_learning_rate, self.model if model is None else model
        if rate is not None and self.optimizer is None:
            try:
                groups = parameter_groups(trained, router_lr=rate, weight_decay=self.args.weight_decay)
            except ValueError as error:
                raise FlagError(f"--router_learning_rate {rate}: {error}") from error
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            self.optimizer_cls_and_kwargs = kind, options | {"params": groups}
        return super().create_optimizer(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the adapter; in a checkpoint into `sft_lora_model` too, where the original's tools look for it."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir)
            link_adapter(folder, folder / ADAPTER_FOLDER)
            record = Path(self.args.output_dir) / RUN_FILE
            if record.is_file():
                shutil.copyfile(record, folder / RUN_FILE)

    def _write_model(self, folder: Path) -> None:
        """Write the adapter; under DeepSpeed in the optimizer's precision, not in that of the forward pass."""
        if self.ends is not None and self.args.should_save:
            self.ends.save_pretrained(folder)
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            super()._write_model(folder)
            return
        trained = {name: weight for name, weight in self.model.named_parameters() if weight.requires_grad}
        tensors = fetch(trained, keep=self.args.should_save)  # split parameters are gathered by all processes
        if self.args.should_save:
            self._save(str(folder), state_dict=tensors)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        # The Trainer would take the folder `sft_lora_model` in a checkpoint for a second adapter, and load that alone.
        target: Any = self.model if model is None else model
        tensors = check_adapter(target, Path(resume_from_checkpoint) / OUR_WEIGHTS)
        set_peft_model_state_dict(target, shared_like(tensors, target.parameters()), target.active_adapter)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The language-model loss; in training the routing is counted."""
        inputs, tasks = self._routed(inputs)
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        recorder = RoutingRecorder(hydralora_layers(self.accelerator.unwrap_model(model)))
        recorder.start()
        try:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        finally:
            recorded = recorder.stop()
        found = of_text(recorded, inputs["input_ids"].shape)
        self.statistics.add(list(found.values()), inputs.get("attention_mask"), tasks)
        if self.args.label_smoothing_factor:
            loss = loss + self._smoothing(outputs["logits"], inputs["labels"], num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def row_losses(self, model: nn.Module, batch: dict[str, Any]) -> RowLosses:
        """The losses of a batch's rows; their tasks are an input of a model that routes by task alone."""
        return super().row_losses(model, self._routed(batch)[0])

    def _routed(self, batch: dict[str, Any]) -> tuple[dict[str, Any], Sequence[int | str] | None]:
        """The inputs of the model, the tasks of the rows among them if these route; and the tasks."""
        inputs = dict(batch)
        tasks = inputs.pop("task_types", None)
        if self.by_task:
            inputs["tasks"] = [str(task) for task in tasks or ()]
        return inputs, tasks

    def row_groups(self, row: int) -> Sequence[str]:
        """The task of a record, if it has one."""
        task = self.eval_dataset[row].task
        return () if task in (-1, "") else (f"task_{task}",)

    def _smoothing(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        """What label smoothing adds to the loss, averaged as that is."""
        divided_later = not self.model_accepts_loss_kwargs or num_items_in_batch is None
        term = smoothing_term(
            logits, labels, self.args.label_smoothing_factor, None if divided_later else num_items_in_batch
        )
        shares = 1 if divided_later or not self.args.average_tokens_across_devices else self.accelerator.num_processes
        return shares * term

    def _instead_of_float16(self) -> str:
        if self.args.fp16:
            return super()._instead_of_float16()
        return "pass --torch_dtype bfloat16"

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | int | None:
        # Without a number of targets the model takes the mean of a micro batch, and the Trainer that of an update.
        by_target = self.args.loss_reduction == LossReduction.TARGET
        return super()._get_num_items_in_batch(batch_samples, device) if by_target else None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the routing since the last line of this process."""
        if "loss" in logs:
            logs = logs | self.statistics.pop()
        super().log(logs, start_time)

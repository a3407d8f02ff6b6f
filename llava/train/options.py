"""Every option of a training run of llava's own, defined once, with upstream's names and defaults.

Extensions add theirs in classes of their own; `arguments.py` makes the parser of all of them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from llava.extension import installed_extensions
from llava.runtime.options import option
from llava.runtime.ranges import COUNT, NOT_NEGATIVE, POSITIVE, PROBABILITY, Range
from llava.runtime.trainer_options.base import CheckedTrainingArguments
from llava.runtime.trainer_options.row import Table
from llava.runtime.used_settings import without
from llava.train.base_settings import BaseSettings
from llava.train.evaluation.options import EvaluationArguments
from llava.train.option_table import LLAVA_OPTIONS


@dataclass
class ModelArguments:
    """What is trained: base model, tower and projector."""

    _argument_group_name: ClassVar[str] = "model"

    model_name_or_path: str | None = option(
        "folder or hub id of the language model or LLaVA to start from", "facebook/opt-125m"
    )
    version: str | None = option(
        "conversation template: v1, vicuna_v1, plain, ...; tokenizer: the tokenizer's own chat template; not given: "
        "that of the base, or v1 where its folder does not say",
        "v0",
    )
    freeze_backbone: bool = option("train nothing of the language model itself", False)
    tune_mm_mlp_adapter: bool = option("train the projector alone (stage 1)", False)
    vision_tower: str | None = option(
        "folder or hub id of a CLIP or SigLIP, open_clip:ARCH/TAG or open_clip:ARCH/FOLDER/FILE; not given: that of "
        "the base; none: train on text alone"
    )
    mm_vision_select_layer: int | None = option("hidden layer of the tower to use; -1 is the last", -1)
    pretrain_mm_mlp_adapter: str | None = option("projector of stage 1: its folder, or mm_projector.bin/.safetensors")
    mm_projector_type: str | None = option("linear, mlpNx_gelu, identity or bottleneckH_silu", "linear")
    mm_use_im_start_end: bool = option("write <im_start> and <im_end> around every image; they are trained", False)
    mm_use_im_patch_token: bool = option("add an <im_patch> token to the vocabulary (no prompt uses it)", True)
    mm_patch_merge_type: str | None = option("how tiles of one image are merged: flat, spatial, spatial_unpad", "flat")
    mm_vision_select_feature: str | None = option(
        "patch, cls_patch to keep the class token, or cls_every_N: the class token after every Nth block alone", "patch"
    )
    mm_image_normalization: str = option("mean and deviation of pixels: tower (its own), clip or imagenet", "tower")
    unfreeze_mm_vision_tower: bool = option("train the vision tower too; it is saved inside each checkpoint", False)
    replace_vision_tower: bool = option("use --vision_tower although the base has a trained tower of its own", False)
    attn_implementation: str | None = option("sdpa, eager or flash_attention_2; train_mem.py prefers the last")


@dataclass
class DataArguments:
    """What it is trained on."""

    _argument_group_name: ClassVar[str] = "data"

    data_path: list[str] | None = option(
        "conversations (LLaVA, messages or ShareGPT): JSON, JSON lines, Parquet, a folder or hub id of datasets; "
        "several are used as one; FILE@2 repeats its rows, FILE@0.5 draws half of them once for the run"
    )
    streaming: bool = option(
        "read the data from beginning to end, pass after pass, with nothing indexed or downloaded before; needs "
        "--max_steps",
        False,
    )
    shuffle_buffer: int = option(
        "--streaming: rows among which the next one is drawn; 0 keeps the order of each source", 1000
    )
    packing: bool = option(
        "put several samples of a micro batch into one row of up to --model_max_length positions; they do not see each "
        "other, and losses are those of a row each",
        False,
    )
    lazy_preprocess: bool = option("accepted for compatibility: samples are always prepared when needed", False)
    is_multimodal: bool = option("accepted for compatibility: set whenever there is a vision tower", False)
    image_folder: str | None = option("folder that the image names in the data are relative to")
    image_aspect_ratio: str = option(
        "square or resize (centre crop), pad (to a square), stretch (whole image), anyres (tiles)", "square"
    )
    image_grid_pinpoints: str | None = option('anyres: possible sizes in pixels, "[(336, 672), (672, 336), ...]"')
    requires_image: bool = option("train on the rows with an image alone (llava.train.train_sparse: True)", False)
    on_bad_sample: str = option("stop: end with an error; skip: leave the sample out and list it in a file", "stop")


OWN_RANGES = {
    "lora_r": COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": PROBABILITY,
    "mm_projector_lr": NOT_NEGATIVE,
    "mm_vision_tower_lr": NOT_NEGATIVE,
    "model_max_length": COUNT,
}
"""What the numbers of `TrainingArguments` may be, where they are ours."""


@dataclass
class TrainingArguments(CheckedTrainingArguments):
    """How it is trained; everything else is transformers' `TrainingArguments`."""

    _argument_group_name: ClassVar[str] = "training"
    table: ClassVar[Table] = LLAVA_OPTIONS
    ranges: ClassVar[Mapping[str, Range]] = OWN_RANGES

    optim: str = option("optimizer, by transformers' name", "adamw_torch")
    cache_dir: str | None = option("where files from a model hub are kept")
    freeze_mm_mlp_adapter: bool = option("do not train the projector", False)
    hub_strategy: str = option("when to publish: end, once when the run is finished", "end")
    hub_base_model: str | None = option("--push_to_hub: id of the base on the hub, where it was read from a folder")
    hub_license: str | None = option("--push_to_hub: license of the result; not given: that of the base's model card")
    mpt_attn_impl: str | None = option("accepted for compatibility: no MPT model here", "triton")
    model_max_length: int = option("longest sequence in tokens and image patches; the rest is cut off", 512)
    double_quant: bool = option("4 bit: quantise the quantisation constants too", True)
    quant_type: str = option("4 bit: nf4 or fp4", "nf4")
    bits: int = option("precision of the frozen base: 16, or 8 or 4 (QLoRA; needs --lora_enable or --use_lora)", 16)
    lora_enable: bool = option("train LoRA adapters instead of the language model", False)
    peft_config: str | None = option(
        "train an adapter of another method of PEFT: a JSON file with its settings, as adapter_config.json has them"
    )
    lora_r: int = option("rank of the LoRA adapters", 64)
    lora_alpha: int = option("LoRA is scaled by alpha / rank", 16)
    lora_dropout: float = option("dropout before the LoRA adapters", 0.05)
    lora_weight_path: str = option("accepted for compatibility: the original never reads it", "")
    lora_bias: str = option("biases to train beside LoRA: none", "none")
    lora_target_modules: str | None = option("linear layers of the decoder that get LoRA, by comma; none given: all")
    mm_projector_lr: float | None = option("learning rate of the projector; none given: that of the run")
    mm_vision_tower_lr: float | None = option("learning rate of the tower; none given: that of the run")
    group_by_modality_length: bool = option("batches of similar length, image and text samples apart", False)
    loss_reduction: str = option(
        "target: mean over the trained tokens of an update; micro_batch, all: as the originals do", "target"
    )

    @property
    def has_adapter(self) -> bool:
        """True if an adapter is trained in place of the language model."""
        return self.lora_enable or self.peft_config is not None


NOT_OF_TRAINING = ("do_train",)
"""Options of transformers that this program, which always trains, never reads."""


@dataclass
class RunArguments:
    """All options of one run.

    Attributes:
        model: base model, tower, projector.
        data: data files and image handling.
        training: optimisation and everything of transformers' Trainer.
        options: parsed options of each installed extension, by its name.
        extensions: configuration of each extension that the options switch on, by its name.
        given: names of the options that were written down, be it with the value of their default.
        program: options of a program around this one that writes prompts of its own (`mma.train`), for `run.json`.
        base: what the base was trained with; options that were not given have its values.
        base_template: the template that the base was trained with, as a `--conv-mode`; None if it does not say.
        evaluation: what the model is measured on while it is trained.
    """

    model: ModelArguments
    data: DataArguments
    training: TrainingArguments
    options: dict[str, Any] = field(default_factory=dict)
    extensions: dict[str, dict[str, Any]] = field(default_factory=dict)
    given: frozenset[str] = frozenset()
    program: dict[str, Any] = field(default_factory=dict)
    base: BaseSettings = field(default_factory=BaseSettings)
    base_template: str | None = None
    evaluation: EvaluationArguments = field(default_factory=EvaluationArguments)

    def to_dict(self) -> dict[str, Any]:
        """Resolved values as JSON types, for `run.json`."""
        return {
            "model": dataclasses.asdict(self.model),
            "data": dataclasses.asdict(self.data),
            "training": without(self.training.to_dict(), NOT_OF_TRAINING),
            "evaluation": dataclasses.asdict(self.evaluation),
            "options": {
                name: _used(name, options) for name, options in self.options.items() if name in self.extensions
            },
            "extensions": self.extensions,
            "program": self.program,
        }


def _used(name: str, options: Any) -> dict[str, Any]:
    """The options of an extension that is on, without those that have no effect."""
    values = dataclasses.asdict(options)
    return without(values, installed_extensions([name])[name].unused_options(values))

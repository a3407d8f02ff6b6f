"""What can be put into a checkout: per extension the files it needs and the edits that switch it on.

A further extension is one more entry here and one more module in `payload/`. Edits that several entries name are made
once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from moe_patch import syntax
from moe_patch.edits import EXPRESSION, Edit
from moe_patch.errors import PatchError

PACKAGE = "llava.extensions_moe"
"""Where everything goes in the checkout."""

TRAIN = "llava/train/train.py"
BUILDER = "llava/model/builder.py"
LLAMA = "llava/model/language_model/llava_llama.py"


@dataclass(frozen=True)
class Extension:
    """One entry.

    Attributes:
        name: as `--extensions` takes it.
        switch: flags that switch it on in training, for messages.
        modules: our modules that go into the checkout; each must be plain torch, see `sources.py`.
        edits: what is inserted into upstream's files.
    """

    name: str
    switch: str
    modules: tuple[str, ...]
    edits: tuple[Edit, ...]


COMMON_MODULES = tuple(
    f"moe_patch.payload{name}"
    for name in ("", ".adapters", ".extension", ".folders", ".gradients", ".saving", ".seams", ".views")
)

CONFIG_MODULES = ("llava.errors", "llava.runtime.checked_config", "llava.runtime.options", "llava.runtime.ranges")
"""What a configuration is made of; the standard library alone."""

IMPORT = (f"from {PACKAGE.rpartition('.')[0]} import {PACKAGE.rpartition('.')[2]}",)

COMMON = (
    Edit(
        TRAIN,
        "from llava.train.llava_trainer import LLaVATrainer",
        syntax.imports(module="llava.train.llava_trainer", name="LLaVATrainer"),
        "after",
        IMPORT,
    ),
    Edit(
        TRAIN,
        "class TrainingArguments(transformers.TrainingArguments)",
        syntax.class_with_base(name="TrainingArguments", base="transformers.TrainingArguments"),
        "expression",
        (EXPRESSION,),
    ),
    Edit(
        TRAIN,
        "model_args, data_args, training_args = parser.parse_args_into_dataclasses(...) in train",
        syntax.assignment(
            function="train",
            target="model_args, data_args, training_args",
            call="parser.parse_args_into_dataclasses",
        ),
        "after",
        ("extensions_moe.configure(model_args, training_args)",),
    ),
    Edit(
        BUILDER,
        "from llava.model import *",
        syntax.imports(module="llava.model", name="*"),
        "after",
        IMPORT,
    ),
    Edit(
        BUILDER,
        "def load_pretrained_model(model_path, model_base, model_name, ...)",
        syntax.first_statement(function="load_pretrained_model", arguments=("model_path", "model_base", "model_name")),
        "before",
        ("model_name = extensions_moe.model_name(model_path, model_base, model_name)",),
    ),
    Edit(
        BUILDER,
        "if 'lora' in ... and model_base is not None in load_pretrained_model",
        syntax.branch(function="load_pretrained_model", word="lora", given="model_base"),
        "branch",
        (
            "if extensions_moe.carries(model_path, model_base):",
            "    tokenizer, model = extensions_moe.load(LlavaLlamaForCausalLM, model_path, model_base, kwargs)",
        ),
    ),
)
"""Places that every extension uses; the functions are those of `payload/seams.py`."""

PREPARE_TRAINER = Edit(
    TRAIN,
    "trainer = LLaVATrainer(...) in train",
    syntax.assignment(function="train", target="trainer", call="LLaVATrainer"),
    "after",
    ("extensions_moe.prepare_trainer(trainer, get_peft_state_non_lora_maybe_zero_3)",),
)

ATTACH_BESIDE_TOWER = Edit(
    TRAIN,
    "vision_tower.to(...) in train",
    syntax.statement(function="train", call="vision_tower.to"),
    "after",
    ("extensions_moe.attach_beside_tower(model, training_args)",),
)

BESIDE_LORA = (
    Edit(
        TRAIN,
        "lora_config = LoraConfig(...) in train",
        syntax.assignment(function="train", target="lora_config", call="LoraConfig"),
        "after",
        ("extensions_moe.choose_lora_modules(lora_config, model, training_args)",),
    ),
    Edit(
        TRAIN,
        "model = get_peft_model(...) in train",
        syntax.assignment(function="train", target="model", call="get_peft_model"),
        "after",
        ("extensions_moe.attach(model, training_args)",),
    ),
    PREPARE_TRAINER,
    Edit(
        TRAIN,
        "non_lora_state_dict = get_peft_state_non_lora_maybe_zero_3(...) in train",
        syntax.assignment(function="train", target="non_lora_state_dict", call="get_peft_state_non_lora_maybe_zero_3"),
        "after",
        ("non_lora_state_dict = extensions_moe.save(model, training_args, non_lora_state_dict)",),
    ),
)
"""Places around upstream's LoRA: for what is trained and saved beside it."""

BESIDE_TOWER = (
    ATTACH_BESIDE_TOWER,
    Edit(
        TRAIN,
        "if training_args.lora_enable with non_lora_state_dict = ... in train",
        syntax.branch_that_assigns(function="train", test="training_args.lora_enable", target="non_lora_state_dict"),
        "branch",
        (
            "if extensions_moe.writes_itself(training_args):",
            "    extensions_moe.write(model, training_args, get_peft_state_non_lora_maybe_zero_3)",
        ),
    ),
)
"""Places for what needs the vision tower and is trained without LoRA."""

LOSSES = (
    Edit(
        LLAMA,
        "from ..llava_arch import LlavaMetaForCausalLM",
        syntax.imports(module="llava_arch", name="LlavaMetaForCausalLM"),
        "after",
        (f"from {PACKAGE}.hydralora.patch import with_losses",),
    ),
    Edit(
        LLAMA,
        "def forward in class LlavaLlamaForCausalLM",
        syntax.method(cls="LlavaLlamaForCausalLM", name="forward"),
        "before",
        ("@with_losses",),
    ),
)

EXTENSIONS = {
    extension.name: extension
    for extension in (
        Extension(
            "hydralora",
            "--use_lora True",
            (
                "moe_patch.payload.hydralora_glue",
                *(f"hydralora.{name}" for name in ("block", "config", "gated", "layer", "model")),
                *(f"hydralora.{name}" for name in ("moe_args", "original", "patch")),
            ),
            (*COMMON, *BESIDE_LORA, *LOSSES),
        ),
        Extension(
            "mma",
            "--mma True --visual_input llava",
            (
                "moe_patch.payload.mma_glue",
                "moe_patch.payload.modalities",
                *(f"mma.{name}" for name in ("config", "decoder_layer", "layer", "modality", "model", "tower_norm")),
                *CONFIG_MODULES,
            ),
            (*COMMON, *BESIDE_TOWER),
        ),
        Extension(
            "dynamic",
            "--dynamic True",
            (
                "moe_patch.payload.dynamic_glue",
                *(
                    f"moe_patch.payload.sparse_{name}"
                    for name in ("attention", "cache", "decoder", "inputs", "llava", "state", "training")
                ),
                *(
                    f"dynamic.{name}"
                    for name in ("config", "decisions", "layer", "model", "spans", "statistics", "training")
                ),
                *(f"dynamic.attention.{name}" for name in ("blockwise", "function", "problem")),
                "llava.segments",
                *CONFIG_MODULES,
            ),
            (*COMMON, ATTACH_BESIDE_TOWER, PREPARE_TRAINER),
        ),
    )
}


EDITABLE = tuple(dict.fromkeys(edit.file for extension in EXTENSIONS.values() for edit in extension.edits))
"""Upstream's files that an extension edits; all others are left alone, whatever a manifest says."""


def chosen(names: Sequence[str]) -> list[Extension]:
    """The entries of these names, in the order of the table.

    Raises:
        PatchError: a name is unknown, or none is given.
    """
    unknown = sorted(set(names) - set(EXTENSIONS))
    if unknown or not names:
        raise PatchError(f"--extensions {','.join(names)}: unknown {unknown}; known: {', '.join(EXTENSIONS)}")
    return [extension for name, extension in EXTENSIONS.items() if name in names]


def edits_of(extensions: Sequence[Extension]) -> dict[str, list[Edit]]:
    """The edits by file, each once."""
    edits: dict[str, list[Edit]] = {}
    for extension in extensions:
        for edit in extension.edits:
            if edit not in edits.setdefault(edit.file, []):
                edits[edit.file].append(edit)
    return edits


def modules_of(extensions: Sequence[Extension]) -> list[str]:
    """Our modules that go into the checkout, each once."""
    return list(dict.fromkeys([*COMMON_MODULES, *(name for entry in extensions for name in entry.modules)]))

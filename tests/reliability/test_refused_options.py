"""Options of transformers that are not supported are refused by their flag before anything is loaded, in every program.

The base of every command does not exist: whatever reads it first has another error, which the controls expect.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hydralora.finetune import main as finetune
from hydralora.text.option_table import TEXT_OPTIONS
from llava.errors import FlagError, LlavaError
from llava.runtime import checkpointing
from llava.runtime.trainer_options.row import Kind, Table
from llava.train.option_table import LLAVA_OPTIONS
from llava.train.train import main as train
from mma.lavin.option_table import LAVIN_OPTIONS
from mma.lavin.train import main as train_lavin
from tests.llava.train.test_training import command_line
from tests.mma.lavin.lavin_files import LavinFiles, tiny_words
from tests.reliability.test_training_numbers import finetune_words
from tests.reliability.values import ABSENT

TABLES: dict[str, Table] = {"llava": LLAVA_OPTIONS, "hydralora.finetune": TEXT_OPTIONS, "mma": LAVIN_OPTIONS}

WRITTEN = {
    "optim_target_modules": "q_proj",
    "torch_compile_backend": "eager",
    "torch_compile_mode": "default",
    "liger_kernel_config": '{"rope": true}',
    "length_column_name": "size",
    "parallelism_config": '{"tp_size": 2}',
    "eval_strategy": "epoch",
    "per_device_train_batch_size": "3",
    "gradient_accumulation_steps": "3",
    "num_train_epochs": "2",
    "learning_rate": "0.1",
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": "{}",
    "warmup_steps": "1",
    "max_grad_norm": "2",
    "resume_from_checkpoint": "folder",
    "dataloader_num_workers": "1",
}
"""A value of each refused option; the others are switches."""

REFUSED = [
    pytest.param(program, name, id=f"{program} {name}")
    for program, table in TABLES.items()
    for name, row in table.items()
    if row.kind is Kind.REFUSED
]


@pytest.fixture
def programs(lavin: LavinFiles, tmp_path: Path) -> dict[str, Callable[..., Any]]:
    llava = command_line(tmp_path / "out", model_name_or_path=ABSENT)
    text = finetune_words(Path(ABSENT), tmp_path / "data", tmp_path / "out")
    return {
        "llava": lambda *words: train([*llava, *words]),
        "hydralora.finetune": lambda *words: finetune([*text, *words]),
        "mma": lambda *words: train_lavin(
            tiny_words(lavin, tmp_path / "out", "--llama_model_path", ABSENT, "--report_to", "none", *words)
        ),
    }


def test_the_refused_options_are_many() -> None:
    assert len(REFUSED) >= 45


@pytest.mark.parametrize(("program", "name"), REFUSED)
def test_an_option_is_refused(program: str, name: str, programs: dict[str, Callable[..., Any]], tmp_path: Path) -> None:
    value = WRITTEN.get(name, "True")
    with pytest.raises(FlagError) as raised:
        programs[program](f"--{name}", value)
    row = TABLES[program][name]
    assert f"--{name}" in str(raised.value)
    assert row.instead.removeprefix("use ") in str(raised.value)
    if row.text != "LaVIN has an option of its own for it":
        assert f"--{name} {value}" in str(raised.value)
        assert row.text in str(raised.value)
    assert ABSENT not in str(raised.value)
    assert not (tmp_path / "out").exists()


VALUES = [
    ("--optim", "galore_adamw"),
    ("--optim", "apollo_adamw_layerwise"),
    ("--optim", "lomo"),
    ("--optim", "schedule_free_adamw"),
    ("--optim", "adamw_torch_xla"),
    ("--optim", "adamw_torch_npu_fused"),
    ("--optim", "adamw_anyprecision"),
    ("--optim_args", "nonsense"),
    ("--optim_args", "momentum=0.9"),
    ("--tf32", "True"),
    ("--include_num_input_tokens_seen", "some"),
    ("--report_to", "nonsense"),
    ("--report_to", "flyte"),
    ("--save_strategy", "best"),
    ("--load_best_model_at_end", "True"),
    ("--accelerator_config", '{"split_batches": true}'),
    ("--accelerator_config", '{"dispatch_batches": true}'),
    ("--accelerator_config", "missing.json"),
    ("--dataloader_persistent_workers", "True"),
    ("--dataloader_prefetch_factor", "2"),
    ("--dataloader_multiprocessing_context", "spawn"),
    ("--dataloader_in_order", "False"),
    ("--label_names", "targets"),
    ("--train_sampling_strategy", "batch_rebalance"),
    ("--debug", "tpu_metrics_debug"),
    ("--fsdp_config", "file.json"),
    ("--fsdp", "full_shard"),
    (f"--{checkpointing.OPTIONS}", '{"nonsense": 1}'),
    (f"--{checkpointing.OPTIONS}", "nonsense"),
    ("--lr_scheduler_kwargs", '{"nonsense": 2}'),
    ("--lr_scheduler_kwargs", "file.json"),
    ("--lr_scheduler_kwargs", "[1]"),
    ("--lr_scheduler_type", "cosine_with_min_lr"),
    ("--lr_scheduler_type", "warmup_stable_decay"),
    ("--lr_scheduler_type", "reduce_lr_on_plateau"),
    ("--fp16", "True", "--bf16", "True"),
]
OF_LAVIN = ("--lr_scheduler_type", "--lr_scheduler_kwargs")


@pytest.mark.parametrize("program", TABLES)
@pytest.mark.parametrize("words", VALUES, ids=" ".join)
def test_a_value_is_refused(
    program: str, words: tuple[str, ...], programs: dict[str, Callable[..., Any]], tmp_path: Path
) -> None:
    with pytest.raises(FlagError) as raised:
        programs[program](*words)
    assert words[0] in str(raised.value)
    if words[0] != "--fsdp" and (program != "mma" or words[0] not in OF_LAVIN):
        assert words[1] in str(raised.value)
    assert ABSENT not in str(raised.value)
    assert not (tmp_path / "out").exists()


ALLOWED = [
    ("--remove_unused_columns", "False"),
    ("--torch_compile", "False"),
    ("--optim", "adafactor"),
    ("--optim", "sgd", "--optim_args", "momentum=0.9"),
    ("--accelerator_config", '{"non_blocking": true}'),
    ("--label_names", "labels"),
    ("--report_to", "tensorboard"),
    ("--train_sampling_strategy", "group_by_length"),
    ("--include_num_input_tokens_seen", "non_padding"),
    ("--label_smoothing_factor", "0.1"),
    ("--neftune_noise_alpha", "5"),
    ("--save_strategy", "no"),
]


@pytest.mark.parametrize("program", TABLES)
@pytest.mark.parametrize("words", ALLOWED, ids=" ".join)
def test_supported_values_get_as_far_as_the_base(
    program: str, words: tuple[str, ...], programs: dict[str, Callable[..., Any]]
) -> None:
    with pytest.raises((LlavaError, OSError), match=ABSENT):
        programs[program](*words)


@pytest.mark.parametrize(
    "words", [("--lora_r", "8"), ("--lora_alpha", "8"), ("--lora_dropout", "0.1"), ("--lora_target_modules", "q_proj")]
)
def test_settings_of_lora_without_lora(words: tuple[str, ...], programs: dict[str, Callable[..., Any]]) -> None:
    with pytest.raises(FlagError, match=rf"{words[0]} {words[1]}: belongs to LoRA, which is off.*--lora_enable True"):
        programs["llava"](*words)
    with pytest.raises((LlavaError, OSError), match=ABSENT):
        programs["llava"](*words, "--lora_enable", "True")


def test_two_orders_of_the_data(programs: dict[str, Callable[..., Any]]) -> None:
    words = ("--train_sampling_strategy", "group_by_length", "--group_by_modality_length", "True")
    with pytest.raises(FlagError, match="--group_by_modality_length True draws another order"):
        programs["llava"](*words)

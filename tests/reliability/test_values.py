"""Numbers that train nothing, or backwards, or decode nothing, are refused by their flag before anything is loaded.

The base of every command does not exist: whatever reads it first has another error, which the controls expect.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dynamic.config import SparseConfig
from hydralora.config import RoutedLinearConfig, RoutedMLPConfig
from hydralora.finetune import main as finetune
from hydralora.tuner import HydraLoraConfig
from llava.errors import FlagError, LlavaError
from llava.runtime.ranges import COUNT, FINITE, NOT_NEGATIVE, POSITIVE, PROBABILITY, Range, check_ranges
from llava.runtime.retired_flags import translate_retired_flags
from llava.train.arguments import parse_args
from llava.train.train import main as train
from mma.config import MmaConfig
from mma.lavin.train import main as train_lavin
from tests.llava.train.test_training import command_line
from tests.mma.lavin.lavin_files import LavinFiles, tiny_words
from tests.reliability.test_training_numbers import finetune_words
from tests.reliability.values import ABSENT, COUNTED, INF, NAN, POSITIVE_VALUES, RATE, SHARE, SIGNLESS, rows

TRANSFORMERS: dict[str, Sequence[str]] = {
    "learning_rate": RATE,
    "weight_decay": SIGNLESS,
    "warmup_steps": SIGNLESS,
    "warmup_ratio": ("-0.1", "1.5", "nan", "inf", "few"),
    "adam_beta1": SHARE,
    "adam_beta2": SHARE,
    "adam_epsilon": SIGNLESS,
    "max_grad_norm": ("-1", "nan", "-inf"),
    "label_smoothing_factor": SHARE,
    "neftune_noise_alpha": SIGNLESS,
    "max_steps": ("0", "-2"),
    "num_train_epochs": POSITIVE_VALUES,
    "per_device_train_batch_size": COUNTED,
    "per_device_eval_batch_size": COUNTED,
    "gradient_accumulation_steps": COUNTED,
    "logging_steps": POSITIVE_VALUES,
    "save_steps": POSITIVE_VALUES,
    "seed": ("-1", "4294967296"),
    "dataloader_num_workers": ("-1",),
    "torch_empty_cache_steps": COUNTED,
    "ddp_timeout": COUNTED,
}
"""Options of transformers, in every training program that has them."""

VALUES: dict[str, dict[str, Sequence[str]]] = {
    "llava": TRANSFORMERS
    | {
        "lora_r": COUNTED,
        "lora_alpha": COUNTED,
        "lora_dropout": SHARE,
        "mm_projector_lr": RATE,
        "mm_vision_tower_lr": RATE,
        "model_max_length": COUNTED,
    },
    "hydralora.finetune": TRANSFORMERS
    | {
        "lora_rank": COUNTED,
        "lora_alpha": POSITIVE_VALUES,
        "lora_dropout": SHARE,
        "lora_nums": ("0", "-1", "nan"),
        "balance_weight": SIGNLESS,
        "max_seq_length": COUNTED,
        "validation_split_percentage": SHARE,
    },
    "mma": {
        "epochs": COUNTED,
        "batch_size": COUNTED,
        "accum_iter": COUNTED,
        "lr": POSITIVE_VALUES,
        "min_lr": SIGNLESS,
        "weight_decay": SIGNLESS,
        "clip_grad": ("-1", "nan"),
        "warmup_epochs": ("-1", "nan", "inf"),
        "drop_path": SHARE,
        "adapter_dim": COUNTED,
        "adapter_scale": POSITIVE_VALUES,
        "temperature": POSITIVE_VALUES,
        "hidden_proj": COUNTED,
        "max_seq_len": ("0", "1"),
        "num_workers": ("-1",),
        "seed": ("-1",),
        "max_steps": ("0", "-2"),
        "adam_epsilon": SIGNLESS,
        "adapter_dropout": SHARE,
    },
}


@pytest.fixture
def programs(lavin: LavinFiles, tmp_path: Path) -> dict[str, Callable[..., Any]]:
    """Training programs on a base that does not exist; words are put behind a sound command."""
    absent = ("--llama_model_path", ABSENT)
    llava = command_line(tmp_path / "out", model_name_or_path=ABSENT, max_steps=-1, num_train_epochs=1)
    text = finetune_words(Path(ABSENT), tmp_path / "data", tmp_path / "out", max_steps=-1, num_train_epochs=1)
    return {
        "llava": lambda *words: train([*llava, *words]),
        "hydralora.finetune": lambda *words: finetune([*text, *words]),
        "mma": lambda *words: train_lavin(tiny_words(lavin, tmp_path / "out", *absent, *words)),
    }


def test_the_table_is_what_the_document_says() -> None:
    assert {program: len([row for row in rows({program: VALUES[program]})]) for program in VALUES} == {
        "llava": 85,
        "hydralora.finetune": 90,
        "mma": 52,
    }


@pytest.mark.parametrize(("program", "flag", "value"), rows(VALUES))
def test_a_value_is_refused_by_its_flag(
    program: str, flag: str, value: str, programs: dict[str, Callable[..., Any]], tmp_path: Path
) -> None:
    with pytest.raises(FlagError) as raised:
        programs[program](f"--{flag}={value}")
    shown = [value] if value == "few" else [value, str(float(value))]
    assert any(re.search(rf"--{flag} (is )?'?{re.escape(each)}", str(raised.value)) for each in shown)
    assert ABSENT not in str(raised.value)
    assert not (tmp_path / "out").exists()


LEGITIMATE = {
    "llava": [
        {"warmup_ratio": "0"},
        {"warmup_ratio": "1"},
        {"warmup_steps": "0"},
        {"weight_decay": "0"},
        {"max_grad_norm": "0"},
        {"max_grad_norm": "inf"},
        {"adam_epsilon": "0"},
        {"save_total_limit": "0"},
        {"mm_projector_lr": "0"},
        {"learning_rate": "0", "mm_projector_lr": "1e-3"},
        {"max_steps": "1", "num_train_epochs": "0"},
        {"logging_strategy": "no", "logging_steps": "0"},
        {"lora_dropout": "0"},
        {"dataloader_drop_last": "True"},
    ],
    "hydralora.finetune": [
        {"lora_dropout": "0"},
        {"lora_nums": "1"},
        {"balance_weight": "0"},
        {"lora_alpha": "0.5"},
        {"dataloader_drop_last": "True"},
    ],
    "mma": [
        {"clip_grad": "0"},
        {"clip_grad": "inf"},
        {"weight_decay": "0"},
        {"min_lr": "0"},
        {"warmup_epochs": "0"},
        {"drop_path": "0"},
        {"num_workers": "0"},
    ],
}
"""Values that look odd and that the originals, or transformers, give a meaning."""

SOUND = [
    pytest.param(program, given, id=f"{program} {given}") for program in LEGITIMATE for given in LEGITIMATE[program]
]


@pytest.mark.parametrize(("program", "given"), SOUND)
def test_legitimate_values_get_as_far_as_the_base(
    program: str, given: dict[str, str], programs: dict[str, Callable[..., Any]]
) -> None:
    """Negative control: the base's own error, which no value above gives."""
    with pytest.raises((LlavaError, OSError)) as raised:
        programs[program](*(word for name, value in given.items() for word in (f"--{name}", value)))
    assert ABSENT in str(raised.value)


NOTHING = {
    "the run's rate": (["--learning_rate", "0"], "--learning_rate 0"),
    "both rates": (["--learning_rate", "0", "--mm_projector_lr", "0"], "--learning_rate 0, --mm_projector_lr 0"),
    "the projector's rate in stage 1": (
        ["--tune_mm_mlp_adapter", "True", "--mm_projector_lr", "0"],
        "--mm_projector_lr 0",
    ),
    "a rate of what is frozen": (
        ["--learning_rate", "0", "--freeze_mm_mlp_adapter", "True", "--mm_projector_lr", "1"],
        "--learning_rate 0",
    ),
    "LoRA": (["--learning_rate", "0", "--lora_enable", "True"], "--learning_rate 0"),
    "the predictors' rate": (
        [
            *("--dynamic", "True", "--predictor_lr", "0", "--freeze_backbone", "True"),
            *("--freeze_mm_mlp_adapter", "True"),
        ],
        "--predictor_lr 0",
    ),
}


@pytest.mark.parametrize(("words", "said"), NOTHING.values(), ids=NOTHING)
def test_rates_of_zero_that_train_nothing(words: list[str], said: str, programs: dict[str, Callable[..., Any]]) -> None:
    with pytest.raises(FlagError, match=rf"{said}: nothing would be trained"):
        programs["llava"](*words)


def test_text_with_a_rate_of_zero(programs: dict[str, Callable[..., Any]]) -> None:
    with pytest.raises(FlagError, match="--learning_rate 0: nothing would be trained"):
        programs["hydralora.finetune"]("--learning_rate", "0")


FEW = {
    "llava": (["--per_device_train_batch_size", "11"], r"10 rows .* --per_device_train_batch_size 11"),
    "hydralora.finetune": (["--per_device_train_batch_size", "17"], r"16 rows .* --per_device_train_batch_size 17"),
    "mma": (["--batch_size", "64"], r"\d+ samples are too few .* --batch_size 64"),
}


@pytest.mark.parametrize("program", FEW)
def test_fewer_rows_than_a_batch(program: str, programs: dict[str, Callable[..., Any]]) -> None:
    words, said = FEW[program]
    drop = [] if program == "mma" else ["--dataloader_drop_last", "True"]  # LaVIN always leaves it out
    with pytest.raises(FlagError, match=said.replace(" .* ", ".*")):
        programs[program](*words, *drop)
    if drop:
        with pytest.raises((LlavaError, OSError), match=ABSENT):
            programs[program](*words)


def test_fewer_rows_than_a_batch_to_evaluate_on(programs: dict[str, Callable[..., Any]]) -> None:
    words = ["--dataloader_drop_last", "True", "--do_eval", "True", "--per_device_eval_batch_size", "2"]
    with pytest.raises(FlagError, match=r"1 rows are fewer.*--per_device_eval_batch_size 2"):
        programs["hydralora.finetune"](*words)


EXTENSIONS: dict[str, tuple[list[str], dict[str, Sequence[str]]]] = {
    "hydralora": (
        ["--use_lora", "True"],
        {"lora_rank": COUNTED, "llm_moe_num_experts": COUNTED, "moe_balance_w": SIGNLESS},
    ),
    "hydralora on attention": (
        ["--use_lora", "True", "--hydralora_modules", "attention"],
        {
            "hydralora_rank": COUNTED,
            "hydralora_alpha": POSITIVE_VALUES,
            "hydralora_dropout": SHARE,
            "hydralora_num_experts": COUNTED,
            "hydralora_balance_w": SIGNLESS,
        },
    ),
    "dynamic": (
        ["--dynamic", "True"],
        {
            "vision_keep_rate": ("0", "-0.1", "1.1", "nan", "inf"),
            "output_text_keep_rate": ("0", "1.1", "nan"),
            "instruct_keep_rate": ("0", "1.1", "nan"),
            "gumbel_start_tau": POSITIVE_VALUES,
            "gumbel_end_tau": POSITIVE_VALUES,
            "predictor_lr": RATE,
            "predictor_weight_decay": SIGNLESS,
            "mask_loss_weight": SIGNLESS,
            "sparse_layer": ("0", "-1"),
            "d_model": COUNTED,
            "nhead": COUNTED,
            "dim_feedforward": COUNTED,
            "num_layers": ("-1",),
        },
    ),
    "mma": (
        ["--mma", "True", "--visual_input", "llava"],
        {
            "temperature": POSITIVE_VALUES,
            "adapter_scale": POSITIVE_VALUES,
            "adapter_dim": COUNTED,
            "hidden_proj": COUNTED,
            "adapter_dropout": SHARE,
            "drop_path": SHARE,
        },
    ),
}


@pytest.mark.parametrize(("extension", "flag", "value"), rows({name: own for name, (_, own) in EXTENSIONS.items()}))
def test_options_of_extensions(extension: str, flag: str, value: str, programs: dict[str, Callable[..., Any]]) -> None:
    switch = EXTENSIONS[extension][0]
    with pytest.raises(FlagError) as raised:
        programs["llava"](*switch, f"--{flag}={value}")
    assert f"--{flag} " in str(raised.value)
    assert ABSENT not in str(raised.value)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_extensions_with_their_defaults_get_as_far_as_the_base(
    extension: str, programs: dict[str, Callable[..., Any]]
) -> None:
    with pytest.raises((LlavaError, OSError), match=ABSENT):
        programs["llava"](*EXTENSIONS[extension][0])


ODD: dict[str, list[Any]] = {
    "count": [0, -1, NAN, INF, 2.5, "4", True],
    "factor": [0, -1, NAN, INF, -INF, "1", True],
    "share": [-0.1, 1, NAN, INF, "0", True],
    "weight": [-1, NAN, INF, "1", True],
    "rate": [0, -0.1, 1.1, NAN, INF, "1", True],
}
CONFIGS: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "HydraLoraConfig": (
        HydraLoraConfig,
        {
            "r": "count",
            "lora_nums": "count",
            "lora_alpha": "factor",
            "lora_dropout": "share",
            "balance_weight": "weight",
        },
    ),
    "RoutedMLPConfig": (
        RoutedMLPConfig,
        {"experts": "count", "rank": "count", "alpha": "factor", "dropout": "share", "balance_weight": "weight"},
    ),
    "RoutedLinearConfig": (
        lambda **given: RoutedLinearConfig(targets=["attention"], **given),
        {"experts": "count", "rank": "count", "alpha": "factor", "dropout": "share", "balance_weight": "weight"},
    ),
    "SparseConfig": (
        SparseConfig,
        {
            "vision_keep_rate": "rate",
            "output_text_keep_rate": "rate",
            "instruct_keep_rate": "rate",
            "mask_loss_weight": "weight",
            "sparse_layer": "count",
            "nhead": "count",
            "dim_feedforward": "count",
        },
    ),
    "MmaConfig": (
        MmaConfig,
        {
            "temperature": "factor",
            "adapter_scale": "factor",
            "adapter_dim": "count",
            "adapter_groups": "count",
            "adapter_dropout": "share",
            "drop_path": "share",
        },
    ),
}
FIELDS = [
    pytest.param(name, field, value, id=f"{name} {field} {value!r}")
    for name, (_, fields) in CONFIGS.items()
    for field, kind in fields.items()
    for value in ODD[kind]
]


@pytest.mark.parametrize(("name", "field", "value"), FIELDS)
def test_configurations_in_python(name: str, field: str, value: Any) -> None:
    make = CONFIGS[name][0]
    make()  # negative control
    with pytest.raises(ValueError, match=rf"\b{field} is "):
        make(**{field: value})


# Ranges themselves

LIMITS = {
    "count": (COUNT, [1, 2, 10**9], [0, -1, NAN, INF]),
    "positive": (POSITIVE, [1e-30, 5], [0, -1, NAN, INF]),
    "not negative": (NOT_NEGATIVE, [0, 0.0, 3], [-1e-30, NAN, INF, -INF]),
    "probability": (PROBABILITY, [0, 0.999], [1, -0.1, NAN]),
    "finite": (FINITE, [0, -1e30], [NAN, INF, -INF]),
    "infinite": (Range(0, infinite=True), [0, INF], [-1, NAN, -INF]),
}


@pytest.mark.parametrize(("limits", "inside", "outside"), LIMITS.values(), ids=LIMITS)
def test_ranges(limits: Range, inside: list[float], outside: list[float]) -> None:
    for value in inside:
        check_ranges(SimpleNamespace(x_y=value), {"x_y": limits})
    for value in outside:
        with pytest.raises(FlagError, match=rf"--x-y {value}: must be "):
            check_ranges(SimpleNamespace(x_y=value), {"x_y": limits}, dashes=True)
    check_ranges(SimpleNamespace(x_y=None), {"x_y": limits, "absent": limits})


def test_all_numbers_are_named_at_once(tmp_path: Path) -> None:
    words = command_line(tmp_path, max_steps=0, learning_rate=-1, gradient_accumulation_steps=-1, lora_alpha=0)
    with pytest.raises(FlagError) as raised:
        parse_args(words)
    assert len(str(raised.value).splitlines()) == 5


def test_warm_up_over_all_updates() -> None:
    assert translate_retired_flags(["--warmup_ratio", "1"]) == ["--warmup_steps", "0.99999999"]

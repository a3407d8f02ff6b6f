"""Values of a configuration: every field with right and wrong ones, in Python and from files."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftConfig, get_peft_model

from hydralora import HydraLoraConfig
from hydralora.tuner.config import FIELDS
from hydralora.tuner.fields import COUNT, FLAG, PATTERN, POSITIVE, Kind, list_of, mapping_of, number, one_of
from tests.hydralora.tuner.models import tiny_llama

pytestmark = pytest.mark.versions

NAN, INF = math.nan, math.inf
NOT_WHOLE = [0, -1, 2.5, 8.0, NAN, INF, "8", "", True, None, [8], np.int64(8)]
NOT_NUMBERS = [NAN, INF, -INF, "0.5", "1e-3", "", True, None, [0.5], torch.tensor(0.5), 10**400]
NOT_FLAGS = [0, 1, "true", "False", "", None, [], np.bool_(True)]
NOT_TEXT = [1, True, "", b"a", ["a"]]
NOT_NAMES = [1, True, "", "(", [1], [None], [""], [True], {"q_proj": 1}, b"q_proj"]

VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "r": ([1, 64], NOT_WHOLE),
    "lora_alpha": ([1, 0.5, 16.0], [0, -1, *NOT_NUMBERS]),
    "lora_nums": ([1, 9], NOT_WHOLE),
    "lora_dropout": ([0, 0.0, 0.99], [1, -0.1, *NOT_NUMBERS]),
    "use_rslora": ([True, False], NOT_FLAGS),
    "rank_pattern": (
        [{}, {"q_proj": 2, r"layers\.1\..*": 16}],
        [None, [], "q_proj", {"q_proj": 0}, {"q_proj": "2"}, {"q_proj": 2.0}, {"q_proj": True}, {"(": 2}, {"": 2}],
    ),
    "alpha_pattern": ([{}, {"q_proj": 0.5}], [None, [], {"q_proj": 0}, {"q_proj": "2"}, {"q_proj": NAN}, {"(": 2}]),
    "target_modules": ([None, "all-linear", ".*q_proj", ["q_proj"], {"q_proj"}, ("q_proj", "v_proj")], NOT_NAMES),
    "exclude_modules": ([None, ".*1.*", ["q_proj"], {"q_proj"}], NOT_NAMES),
    "layers_to_transform": ([None, 0, [0, 1], (1,)], [-1, "0", [-1], ["1"], [True], True, 0.0, {"1": 0}]),
    "layers_pattern": ([None], [1, True, "", [1], [""]]),
    "modules_to_save": ([None, ["lm_head"], ("lm_head",), {"lm_head"}], ["lm_head", 1, True, [1], [""], {"a": 1}]),
    "trainable_token_indices": (
        [None, [0, 5], (3,), {"embed_tokens": [1]}],
        [3, "3", [-1], ["3"], [True], [1.0], {"embed_tokens": 3}, {"": [1]}, {"embed_tokens": ["3"]}],
    ),
    "bias": (["none", "all", "lora_only"], [None, True, "nothing", 0]),
    "routing": (["token", "sequence"], ["Token", "tokens", None, 1, True, ["token"]]),
    "top_k": ([None, 1, 4], [value for value in NOT_WHOLE if value is not None]),
    "top_p": ([None, 0.5, 1], [0, -0.1, 1.5, *(value for value in NOT_NUMBERS if value is not None)]),
    "router_temperature": ([1, 0.5, 10.0], [0, -1, *NOT_NUMBERS]),
    "tasks": ([None], [[], "law", [1], [""], 3, True, {"law": 1}]),
    "experts_pattern": (
        [{}, {"q_proj": 2}, {".*mlp.*": 8}],
        [None, {"q_proj": 0}, {"(": 2}, {"q": "2"}, ["q_proj"], "a"],
    ),
    "frozen_experts": ([True, False], NOT_FLAGS),
    "balance_weight": ([0, 0.5], [-1, *NOT_NUMBERS]),
    "balance": (["sample", "batch"], ["Batch", "layer", None, 1, True, ["batch"]]),
    "balance_ema": ([0, 0.0], [1, -0.1, *NOT_NUMBERS]),
    "balance_warmup": ([0, 100], [-1, 2.5, "8", True, None]),
    "information_weight": ([0, 0.5], [-1, *NOT_NUMBERS]),
    "init": (["zero", "centered"], ["centred", "random", None, 1, True, ["zero"]]),
    "head_dropout": ([0, 0.0, 0.99], [1, -0.1, *NOT_NUMBERS]),
    "expert_dropout": ([0, 0.0, 0.99], [1, -0.1, *NOT_NUMBERS]),
    "head_dropout_start": ([0, 100], [-1, 2.5, "8", True, None]),
    "init_lora_weights": (
        [True, False, "gaussian"],
        [0, 1, None, "", "pissa", "pissa_niter_4", "olora", "eva", "loftq"],
    ),
    "init_weights": ([True, False], NOT_FLAGS),
    "task_type": ([None, "CAUSAL_LM"], ["causal", 1, True]),
    "auto_mapping": ([None, {"base_model_class": "A"}], ["a", [], 1]),
    "peft_version": ([None, "0.21.0"], NOT_TEXT),
    "base_model_name_or_path": ([None, "", "model"], [1, True, Path("model"), ["a"]]),
    "revision": ([None, "main"], NOT_TEXT),
    "inference_mode": ([True, False], NOT_FLAGS),
}
SET_BY_THE_CLASS = {"peft_type"}
RIGHT = [pytest.param(name, value, id=f"{name} {value!r}") for name, (right, _) in VALUES.items() for value in right]
WRONG = [
    pytest.param(name, value, id=f"{name} {value!r}"[:60]) for name, (_, wrong) in VALUES.items() for value in wrong
]


def test_every_field_has_a_kind_and_cases() -> None:
    """A new field gets a row in `FIELDS` and one in `VALUES`."""
    names = {item.name for item in dataclasses.fields(HydraLoraConfig)}
    assert set(FIELDS) == names
    assert set(VALUES) | SET_BY_THE_CLASS == names


@pytest.mark.parametrize(("name", "value"), RIGHT)
def test_right_values_come_back_from_a_file(name: str, value: Any, tmp_path: Path) -> None:
    config = HydraLoraConfig(**{name: value})
    config.save_pretrained(str(tmp_path))
    json.loads((tmp_path / "adapter_config.json").read_text(), parse_constant=pytest.fail)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HydraLoraConfig.from_pretrained(str(tmp_path)) == config
        assert PeftConfig.from_pretrained(str(tmp_path)) == config


@pytest.mark.parametrize(("name", "value"), WRONG)
def test_wrong_values_are_named_in_python_and_in_files(name: str, value: Any, tmp_path: Path) -> None:
    # PEFT itself refuses a task that it does not know, in its own words.
    named = "Invalid task type" if name == "task_type" else rf"^HydraLoraConfig: {name} is .*, expected "
    with pytest.raises(ValueError, match=named):
        HydraLoraConfig(**{name: value})
    stored = {"peft_type": "HYDRALORA", "r": 4}
    try:
        text = json.dumps(stored | {name: value})
    except TypeError:  # nothing that a file can have
        return
    (tmp_path / "adapter_config.json").write_text(text)
    in_file = named if name == "task_type" else rf"adapter_config.json: HydraLoraConfig: {name} is "
    with pytest.raises(ValueError, match=in_file):
        HydraLoraConfig.from_pretrained(tmp_path)


def test_all_problems_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"r is 0.*; lora_alpha is '8'.*; layers_pattern needs layers_to_transform"):
        HydraLoraConfig(r=0, lora_alpha="8", layers_pattern="layers")


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"r": "8"}, "pass 8 itself, not a str"),
        ({"r": np.int64(8)}, "pass 8 itself, not a int64"),
        ({"lora_alpha": "1e1"}, r"pass 10.0 itself, not a str \(YAML reads 1e-3 as text, 1.0e-3 as a number\)"),
        ({"lora_dropout": torch.tensor(0.5)}, "pass 0.5 itself, not a Tensor"),
        ({"init_weights": "False"}, "pass False itself, not a str"),
    ],
    ids=str,
)
def test_text_that_reads_as_the_value_is_explained(changes: dict[str, Any], advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        HydraLoraConfig(**changes)


@pytest.mark.parametrize("changes", [{"r": "none"}, {"r": "2.5"}, {"lora_dropout": "2"}, {"r": True}], ids=str)
def test_no_advice_that_would_be_refused_too(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected") as raised:
        HydraLoraConfig(**changes)
    assert "itself" not in str(raised.value)


@pytest.mark.parametrize("reader", [HydraLoraConfig, PeftConfig])
def test_unknown_keys_of_a_later_version_are_said(reader: type[PeftConfig], tmp_path: Path) -> None:
    config = HydraLoraConfig(r=4)
    config.save_pretrained(str(tmp_path))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"expert_noise": 0.25}))
    with pytest.warns(
        UserWarning, match=r"Unexpected keyword arguments \['expert_noise'\] for class HydraLoraConfig"
    ) as seen:
        assert reader.from_pretrained(str(tmp_path)) == config
    if reader is HydraLoraConfig:  # as adapters are read
        assert "{'expert_noise': 0.25}" in str(seen[0].message)
        assert len(seen) == 1


def test_values_that_were_set_later_are_checked_before_anything_is_replaced() -> None:
    base, config = tiny_llama(), HydraLoraConfig(target_modules=["q_proj"])
    before = [type(module) for module in base.modules()]
    config.lora_nums = "4"
    with pytest.raises(ValueError, match="lora_nums is '4'"):
        get_peft_model(base, config)
    assert [type(module) for module in base.modules()] == before


KINDS: dict[str, tuple[Kind, str, list[Any], list[Any]]] = {
    "whole": (COUNT, "a whole number of at least 1", [1, 10**30], [0, 1.0, True]),
    "positive": (POSITIVE, "a number of more than 0", [1e-300, 3], [0, -1, NAN]),
    "within": (number(0, 1, below=True), "a number of at least 0 and less than 1", [0, 0.5], [1, -1e-9]),
    "any number": (number(), "a number", [-1e300, 0], [INF, NAN, "0", None]),
    "words": (one_of(["a", "b"]), "one of ['a', 'b']", ["a"], ["c", None, ["a"]]),
    "either": (FLAG | COUNT, "True or False or a whole number of at least 1", [True, 3], [0, "x"]),
    "list": (list_of(COUNT), "a list of (a whole number of at least 1)", [[], [1], (2,), {3}], ["1", [0], {1: 2}]),
    "filled list": (list_of(COUNT, empty=False), "a list of (a whole number of at least 1)", [[1]], [[], [None]]),
    "mapping": (
        mapping_of(PATTERN, COUNT),
        "a dict from (a regular expression) to (a whole number of at least 1)",
        [{}, {"q_.*": 2}],
        [{"(": 2}, {"q": "2"}, {1: 2}, ["q"], {"q": True}],
    ),
}


@pytest.mark.parametrize(("kind", "words", "right", "wrong"), KINDS.values(), ids=KINDS)
def test_kinds(kind: Kind, words: str, right: list[Any], wrong: list[Any]) -> None:
    assert kind.words == words
    assert [kind.holds(value) for value in right] == [True] * len(right)
    assert [kind.holds(value) for value in wrong] == [False] * len(wrong)
    assert kind.problem("x", right[0]) is None
    assert str(kind.problem("x", wrong[0])).startswith(f"x is {wrong[0]!r}, expected {words}")

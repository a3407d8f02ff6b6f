"""Flags for experts that become different: their way into the configuration, refusals, and the routers' own rate."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from hydralora.finetune import build_run, main, parse_args
from hydralora.text.adapter_flags import ROWS, AdapterArguments
from hydralora.tuner import HydraLoraConfig, hydralora_layers
from llava.errors import BadSampleError, FlagError
from tests.hydralora.text.test_finetune import CASE, command_line, folder, history

pytestmark = pytest.mark.versions

__all__ = ["folder"]


def test_experts_that_become_different(folder: Path, tmp_path: Path) -> None:
    """The flags reach the configuration, and training moves routers by their own rate."""
    options = {"init": "centered", "balance": "batch", "balance_weight": 0.1, "balance_ema": 0.5, "balance_warmup": 2}
    options |= {"information_weight": 0.01, "head_dropout": 0.2, "head_dropout_start": 1, "expert_dropout": 0.1}
    stored = []
    for rate in (0.0, 1e-2):
        main(command_line(folder, tmp_path / str(rate), **options, router_learning_rate=rate))
        adapter = tmp_path / str(rate) / "sft_lora_model"
        tensors = load_file(adapter / "adapter_model.safetensors")
        stored.append(max(value.abs().max() for name, value in tensors.items() if ".lora_router." in name))
    assert stored[0] == 0, "the routers start at 0"
    assert stored[1] > 1e-3
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert {name: config[name] for name in options} == options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "centered", "head_dropout": 0.2}, "needs all experts at the start"),
        ({"balance_ema": 0.5}, "balance_ema is 0.5, which is of balance='batch'"),
        ({"lora_nums": 1, "router_learning_rate": 0.1}, "--router_learning_rate 0.1: one expert has no router"),
        ({"head_dropout": 1.0}, "--head_dropout 1.0"),
        ({"information_weight": -1.0}, "--information_weight -1.0"),
        ({"top_k": 4}, "top_k is 4, but there are 3 experts"),
        ({"top_k": 0}, "--top_k 0"),
        ({"top_p": 0.0}, "--top_p 0.0"),
        ({"top_k": 1, "top_p": 0.5}, "two choices"),
        ({"router_temperature": 0.0}, "--router_temperature 0.0"),
        ({"experts_pattern": "gate_proj"}, "--experts_pattern gate_proj: expected a JSON object"),
        ({"experts_pattern": "[8]"}, r"--experts_pattern \[8\]: expected a JSON object"),
        ({"experts_pattern": '{"gate_proj": 0}'}, "experts_pattern is .*'gate_proj': 0"),
        ({"experts_pattern": '{"gate": 2}'}, "does not fit --model_name_or_path: experts_pattern"),
        ({"layers_to_transform": "1,two"}, "--layers_to_transform 1,two: expected whole numbers"),
        ({"tasks": "law,math"}, "routing='task' needs tasks, and only it"),
        ({"routing": "task", "balance_weight": 0.1}, "--balance_weight 0.1: an adapter that routes by task"),
        ({"routing": "task", "information_weight": 0.1}, "--information_weight 0.1: an adapter that routes by task"),
        ({"routing": "task", "router_learning_rate": 0.1}, "--router_learning_rate 0.1: an adapter that routes"),
    ],
    ids=str,
)
def test_what_contradicts_itself_is_refused(
    folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(FlagError, match=message):
        build_run(parse_args(command_line(folder, tmp_path, **options)))


def test_an_adapter_to_start_from_keeps_its_own(folder: Path, tmp_path: Path) -> None:
    main(command_line(folder, tmp_path / "first", init="centered", balance="batch", max_steps=1))
    words = [*command_line(folder, tmp_path / "out"), "--peft_path", str(tmp_path / "first" / "sft_lora_model")]
    config = build_run(parse_args(words)).model.active_peft_config
    assert (config.init, config.balance) == ("centered", "batch")
    given = {"head_dropout": "0.5", "balance": "sample", "balance_warmup": "3", "top_k": "1", "use_rslora": "True"}
    given |= {"experts_pattern": '{"gate_proj": 2}', "bias": "all"}
    for name, value in given.items():
        with pytest.raises(FlagError, match=rf"--{name} {value} contradicts the adapter"):
            parse_args([*words, f"--{name}", value])


BY_THE_PROGRAM = {"lora_nums", "task_type"}
"""Fields that have a flag with a value of its own kind, or none, since the program knows them."""
OF_PEFT = {"peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"}
FOR_TESTS = {"init_weights"}


def test_every_field_of_the_configuration_has_a_flag() -> None:
    fields = {item.name for item in dataclasses.fields(HydraLoraConfig)} - BY_THE_PROGRAM - OF_PEFT - FOR_TESTS
    assert {row.field for row in ROWS} == fields
    flags = {item.name for item in dataclasses.fields(AdapterArguments)}
    assert {row.flag for row in ROWS} | {"lora_nums"} == flags


FLAGS: dict[str, tuple[Any, Any]] = {
    "use_rslora": (True, True),
    "rank_pattern": ('{"gate_proj": 2}', {"gate_proj": 2}),
    "alpha_pattern": ('{"gate_proj": 5}', {"gate_proj": 5}),
    "experts_pattern": ('{"gate_proj": 5}', {"gate_proj": 5}),
    "exclude_modules": ("gate_proj, up_proj", ["gate_proj", "up_proj"]),
    "layers_to_transform": ("1", [1]),
    "trainable_token_indices": ("3,7", [3, 7]),
    "bias": ("lora_only", "lora_only"),
    "top_k": (1, 1),
    "top_p": (0.5, 0.5),
    "router_temperature": (4.0, 4.0),
    "frozen_experts": (True, True),
    "init_lora_weights": ("gaussian", "gaussian"),
}
"""A value of each flag as it is typed, and as it is stored; what acts in training alone is tried above."""


def gradients(model: Any) -> dict[str, torch.Tensor]:
    """By name of what is trained, on some ids, with experts that are drawn."""
    torch.manual_seed(0)
    for layer in hydralora_layers(model).values():
        layer.reset_parameters("default", identity=False)
    ids = torch.arange(3, 15).view(2, 6)
    model(input_ids=ids, labels=ids).loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def plain(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Stored configuration and gradients without any of the flags."""
    place = tmp_path_factory.mktemp("plain")
    model = build_run(parse_args(command_line(folder, place / "run"))).model
    model.save_pretrained(str(place))
    return json.loads((place / "adapter_config.json").read_text()), gradients(model)


@pytest.mark.parametrize("flag", FLAGS)
def test_each_flag_is_stored_and_acts(
    flag: str, plain: tuple[dict[str, Any], dict[str, torch.Tensor]], folder: Path, tmp_path: Path
) -> None:
    """The file says that and nothing else; what is trained, its shapes or its gradients are others."""
    typed, stored = FLAGS[flag]
    model = build_run(parse_args(command_line(folder, tmp_path / "run", **{flag: typed}))).model
    model.save_pretrained(str(tmp_path))
    config, (usual, without) = json.loads((tmp_path / "adapter_config.json").read_text()), plain
    changed = {name for name in config if config[name] != usual[name] and not isinstance(config[name], list)}
    assert changed - {flag} == set()
    assert (sorted(config[flag]) if isinstance(stored, list) else config[flag]) == stored
    found = gradients(model)
    same = found.keys() == without.keys() and all(
        found[name].shape == value.shape and torch.allclose(found[name], value, atol=1e-6)
        for name, value in without.items()
    )
    # The base has no biases, so that this flag would train none.
    assert same is (flag == "bias")


def test_layers_with_more_experts_are_trained_and_counted_apart(folder: Path, tmp_path: Path) -> None:
    """Top-k and balance with them; what is logged has a name for each number of experts."""
    options = {"experts_pattern": '{"gate_proj": 5, "up_proj": 1}', "top_k": 2, "balance_weight": 0.1, "max_steps": 1}
    adapter = main(command_line(folder, tmp_path / "out", **options))
    assert {"routing/share_4_of_5", "routing/share_2_of_3", "balance_loss"} <= history(tmp_path / "out")[0].keys()
    tensors = load_file(adapter / "adapter_model.safetensors")
    rows = {len(value) for name, value in tensors.items() if "lora_router" in name}
    assert rows == {3, 5}


def by_task(folder: Path, tmp_path: Path, **changes: Any) -> list[str]:
    records = [{**record, "task_type": ("law", 7)[row % 2]} for row, record in enumerate(CASE["records"])]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.json").write_text(json.dumps(records))
    words = {"dataset_dir": tmp_path / "data", "routing": "task", "max_steps": 2} | changes
    return command_line(folder, tmp_path / "out", **words)


def test_routing_by_the_task_of_each_record(folder: Path, tmp_path: Path) -> None:
    """The tasks are those of the data; a run that continues from the adapter knows them; evaluation says them too."""
    adapter = main(by_task(folder, tmp_path, do_eval=True, validation_split_percentage=0.3, learning_rate=1e-2))
    assert sorted(json.loads((adapter / "adapter_config.json").read_text())["tasks"]) == ["7", "law"]
    assert "eval_task_law_loss" in json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert "routing/task_7/entropy" in history(tmp_path / "out")[0]
    words = command_line(folder, tmp_path / "more", dataset_dir=tmp_path / "data", peft_path=adapter, max_steps=1)
    assert main(words).is_dir()
    model = build_run(parse_args(words)).model.eval()
    with torch.no_grad():
        found = [model(input_ids=torch.arange(3, 9)[None], tasks=task).logits for task in ("law", "7")]
    assert not torch.allclose(found[0], found[1], atol=1e-6)


@pytest.mark.parametrize(
    ("record", "changes", "message"),
    [
        ({"task_type": None}, {}, r"train.json, row 2: has no task_type"),
        ({"task_type": "art"}, {"tasks": "law,7"}, r"train.json, row 2: has task_type 'art', .*\['law', '7'\]"),
    ],
    ids=["none", "another"],
)
def test_a_record_that_cannot_be_routed_by_task(
    record: dict[str, Any], changes: dict[str, Any], message: str, folder: Path, tmp_path: Path
) -> None:
    words = by_task(folder, tmp_path, **changes)
    path = tmp_path / "data" / "train.json"
    records = json.loads(path.read_text())
    records[2] |= record
    path.write_text(json.dumps(records))
    with pytest.raises(BadSampleError, match=message):
        build_run(parse_args(words))

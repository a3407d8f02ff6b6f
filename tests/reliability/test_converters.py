"""Adapters with wrong counts, shapes or numbers are refused by `hydralora.convert` in both directions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hydralora.tuner.original import CONFIG_FILE, ORIGINAL_WEIGHTS, OUR_WEIGHTS, export_adapter, import_adapter
from tests.hydralora.tuner.models import as_earlier

LAYERS, EXPERTS, RANK, WIDTH = 3, 2, 4, 6
Tensors = dict[str, Tensor]


def original(folder: Path) -> Path:
    """A complete adapter of the original's layout."""
    folder.mkdir()
    tensors: Tensors = {}
    for layer in range(LAYERS):
        for name in ("q_proj", "v_proj"):
            prefix = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{prefix}.lora_A.weight"] = torch.randn(RANK, WIDTH)
            tensors[f"{prefix}.lora_route.weight"] = torch.randn(EXPERTS, WIDTH)
            tensors |= {f"{prefix}.lora_B{number}.weight": torch.randn(WIDTH, RANK) for number in range(EXPERTS)}
    torch.save(tensors, folder / ORIGINAL_WEIGHTS)
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "r": RANK, "lora_alpha": 8}
    values |= {"lora_nums": EXPERTS, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj"]}
    (folder / CONFIG_FILE).write_text(json.dumps(values))
    return folder


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: value for name, value in tensors.items() if part not in name}


def each(part: str, change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: change(value) if part in name else value for name, value in tensors.items()}


TENSORS: dict[str, Callable[[Tensors], Tensors]] = {
    "an expert less everywhere": without("lora_B1"),
    "a layer less": without("layers.1."),
    "a layer of one kind less": without("layers.2.self_attn.q_proj"),
    "a target less": without("v_proj"),
    "other ranks of two experts": lambda tensors: each("lora_B1", lambda b: b[:, :0].clone())(
        each("lora_B0", lambda b: torch.cat([b, b], dim=1))(tensors)
    ),
    "another rank": each("lora_A", lambda value: value[:-1].clone()),
    "a router of another width": each("lora_route", lambda value: value[:, :-1].clone()),
    "a router of more experts": each("lora_route", lambda value: torch.cat([value, value])),
    "NaN": each("layers.1.self_attn.q_proj.lora_A", lambda value: value * float("nan")),
    "integers": each("layers.1.self_attn.q_proj.lora_A", lambda value: value.int()),
}
SETTINGS = [
    ("lora_nums", 3),
    ("lora_nums", None),
    ("r", 8),
    ("r", "4"),
    ("lora_alpha", -1),
    ("target_modules", ["q_proj"]),
]


@pytest.mark.parametrize("kind", TENSORS)
def test_wrong_tensors(kind: str, tmp_path: Path) -> None:
    path = original(tmp_path / "original") / ORIGINAL_WEIGHTS
    torch.save(TENSORS[kind](torch.load(path, weights_only=True)), path)
    with pytest.raises(ValueError, match=ORIGINAL_WEIGHTS):
        import_adapter(tmp_path / "original", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(("key", "value"), SETTINGS)
def test_wrong_settings(key: str, value: object, tmp_path: Path) -> None:
    path = original(tmp_path / "original") / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match="adapter_config"):
        import_adapter(tmp_path / "original", tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_a_complete_adapter_is_converted(tmp_path: Path) -> None:
    assert import_adapter(original(tmp_path / "original"), tmp_path / "ours").lora_nums == EXPERTS


# To the original


FIRST, LAST = "layers.0.self_attn.q_proj", "layers.2.self_attn.v_proj"
OURS: dict[str, Callable[[Tensors], Tensors]] = {
    "an expert less everywhere": each("lora_B", lambda value: value[:, :-RANK].clone()),
    "an expert less in one layer": each(f"{LAST}.lora_B", lambda value: value[:, :-RANK].clone()),
    "an expert more": each("lora_B", lambda value: torch.cat([value, value[:, :RANK]], dim=1)),
    "a layer less": without("layers.1."),
    "a layer of one kind less": without("layers.2.self_attn.q_proj"),
    "a target less": without("v_proj"),
    "no A in a layer": without(f"{FIRST}.lora_A"),
    "no experts in a layer": without(f"{FIRST}.lora_B"),
    "no router in a layer": without(f"{FIRST}.lora_router"),
    "no router at all": without("lora_router"),
    "another rank of A": each("lora_A", lambda value: value[:-1].clone()),
    "another rank of B": each("lora_B", lambda value: value[:, :-1].clone()),
    "flat A": each(f"{LAST}.lora_A", lambda value: value.reshape(-1)),
    "a number for A": each(f"{LAST}.lora_A", lambda value: value.sum()),
    "experts below one another": each(f"{LAST}.lora_B", lambda value: value.reshape(-1, RANK)),
    "experts without outputs": each(f"{LAST}.lora_B", lambda value: value[:0].clone()),
    "a router of another width": each("lora_router", lambda value: value[:, :-1].clone()),
    "a router of more experts": each("lora_router", lambda value: torch.cat([value, value])),
    "a tensor too many": lambda tensors: tensors | {"base_model.model.lm_head.weight": torch.ones(2, 2)},
    "NaN": each(f"{FIRST}.lora_A", lambda value: value * float("nan")),
    "infinity": each(f"{LAST}.lora_router", lambda value: value / 0),
    "integers": each(f"{FIRST}.lora_B", lambda value: value.int()),
    "bools": each(f"{FIRST}.lora_B", lambda value: value.bool()),
    "nothing": lambda tensors: {},
}
"""Damages of a file of today; below, of one that an earlier version wrote."""
EARLIER: dict[str, Callable[[Tensors], Tensors]] = {
    "an expert less everywhere": each("hydralora_B", lambda value: value[:-1].clone()),
    "an expert less in one layer": each(f"{LAST}.hydralora_B", lambda value: value[:-1].clone()),
    "an expert more": each("hydralora_B", lambda value: torch.cat([value, value[:1]])),
    "a layer less": without("layers.1."),
    "a layer of one kind less": without("layers.2.self_attn.q_proj"),
    "a target less": without("v_proj"),
    "no A in a layer": without(f"{FIRST}.hydralora_A"),
    "no experts in a layer": without(f"{FIRST}.hydralora_B"),
    "no router in a layer": without(f"{FIRST}.hydralora_router"),
    "no router at all": without("hydralora_router"),
    "another rank of A": each("hydralora_A", lambda value: value[:-1].clone()),
    "another rank of B": each("hydralora_B", lambda value: value[..., :-1].clone()),
    "flat A": each(f"{LAST}.hydralora_A", lambda value: value.reshape(-1)),
    "a number for A": each(f"{LAST}.hydralora_A", lambda value: value.sum()),
    "experts in one matrix": each(f"{LAST}.hydralora_B", lambda value: value.reshape(-1, RANK)),
    "experts without outputs": each(f"{LAST}.hydralora_B", lambda value: value[:, :0].clone()),
    "a router of another width": each("hydralora_router", lambda value: value[:, :-1].clone()),
    "a router of more experts": each("hydralora_router", lambda value: torch.cat([value, value])),
    "a tensor too many": lambda tensors: tensors | {"base_model.model.lm_head.weight": torch.ones(2, 2)},
    "NaN": each(f"{FIRST}.hydralora_A", lambda value: value * float("nan")),
    "infinity": each(f"{LAST}.hydralora_router", lambda value: value / 0),
    "integers": each(f"{FIRST}.hydralora_B", lambda value: value.int()),
    "bools": each(f"{FIRST}.hydralora_B", lambda value: value.bool()),
    "nothing": lambda tensors: {},
}
OUR_SETTINGS = [
    *[("lora_nums", value) for value in (3, 0, -1, None, "2", 2.5)],
    *[("r", value) for value in (8, 0, None, "4", 10**9)],
    *[("lora_alpha", value) for value in (-1, 0, None, "8", float("nan"))],
    *[("lora_dropout", value) for value in (-0.5, 1.0, "0.1", float("nan"))],
    *[("target_modules", value) for value in (["q_proj"], ["q_proj", "v_proj", "o_proj"], 7, None, [], [7])],
    *[("routing", value) for value in ("sentence", 3)],
]


def ours(folder: Path) -> Path:
    """A complete adapter of ours."""
    import_adapter(original(folder.with_name("source")), folder)
    return folder


@pytest.mark.parametrize("kind", OURS)
def test_wrong_tensors_of_ours(kind: str, tmp_path: Path) -> None:
    path = ours(tmp_path / "ours") / OUR_WEIGHTS
    save_file({name: value.contiguous() for name, value in OURS[kind](load_file(path)).items()}, path)
    with pytest.raises(ValueError, match=OUR_WEIGHTS):
        export_adapter(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("kind", [*EARLIER, None])
def test_wrong_tensors_of_an_earlier_version(kind: str | None, tmp_path: Path) -> None:
    path = ours(tmp_path / "ours") / OUR_WEIGHTS
    earlier = as_earlier(load_file(path), EXPERTS)
    if kind is None:
        save_file(earlier, path)
        export_adapter(tmp_path / "ours", tmp_path / "back")
        return
    save_file({name: value.contiguous() for name, value in EARLIER[kind](earlier).items()}, path)
    with pytest.raises(ValueError, match=OUR_WEIGHTS):
        export_adapter(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(("key", "value"), OUR_SETTINGS, ids=str)
def test_wrong_settings_of_ours(key: str, value: object, tmp_path: Path) -> None:
    path = ours(tmp_path / "ours") / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(ValueError, match="adapter_config"):
        export_adapter(tmp_path / "ours", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("file", [OUR_WEIGHTS, CONFIG_FILE])
@pytest.mark.parametrize("content", [b"", b"text", b"[]", b"version https://git-lfs.github.com/spec/v1\noid x\n"])
def test_damaged_files_of_ours(file: str, content: bytes, tmp_path: Path) -> None:
    path = ours(tmp_path / "ours") / file
    path.write_bytes(content)
    with pytest.raises(ValueError, match=file) as raised:
        export_adapter(tmp_path / "ours", tmp_path / "back")
    assert ("git lfs pull" in str(raised.value)) == content.startswith(b"version")
    assert not (tmp_path / "back").exists()


def test_there_and_back_is_the_same_adapter(tmp_path: Path) -> None:
    export_adapter(ours(tmp_path / "ours"), tmp_path / "back")
    before, after = (torch.load(tmp_path / name / ORIGINAL_WEIGHTS, weights_only=True) for name in ("source", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

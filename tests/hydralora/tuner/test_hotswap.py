"""`peft.utils.hotswap` with HydraLoRA: outputs are those of the adapter loaded by itself, or it is refused in words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import hotswap as of_peft
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from hydralora import HydraLoraConfig, rescale, save_as_lora
from hydralora.tuner import hydralora_layers
from hydralora.tuner.export.folder import TENSORS
from hydralora.tuner.hotswap import EXTENDED, register_hotswap
from hydralora.tuner.registration import peft_type
from tests.hydralora.tuner.models import IDS, TARGETS, adapted, as_earlier, logits, tiny_llama

pytestmark = pytest.mark.versions

CLOSE = {"rtol": 0, "atol": 3e-6}
"""Measured: up to 1.1e-6 of logits up to 0.5, where zeros were filled in or the factor is a float32 tensor."""

TASKS = {"routing": "task", "tasks": ["law", "math"]}
KINDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "one expert": ({"lora_nums": 1}, {"lora_nums": 1}),
    "several": ({}, {}),
    "by sequence": ({"routing": "sequence"}, {"routing": "sequence"}),
    "by task": (TASKS, TASKS),
    "the best of them": ({"top_k": 2}, {"top_k": 2}),
    "another factor": ({}, {"lora_alpha": 20, "use_rslora": True}),
    "a lower rank": ({"r": 6}, {"r": 2}),
    "a higher rank": ({"r": 2}, {"r": 6, "lora_alpha": 20}),
    "ranks by layer": (
        {"rank_pattern": {"q_proj": 2}},
        {"rank_pattern": {"v_proj": 6}, "alpha_pattern": {"v_proj": 3}},
    ),
    "other layers": ({}, {"target_modules": ["q_proj", "down_proj"], "r": 2}),
    "experts by layer": ({"experts_pattern": {"q_proj": 2}}, {"experts_pattern": {"q_proj": 2}}),
    "trained in another way": ({"lora_dropout": 0.5, "balance_weight": 0.1}, {"lora_dropout": 0.0}),
}
"""Options of the loaded adapter and of the one that takes its place."""


def stored(folder: Path, seed: int = 5, **changes: Any) -> str:
    adapted(seed=seed, **changes).save_pretrained(folder, save_embedding_layers=False)
    return str(folder)


def loaded(folder: str) -> Any:
    return PeftModel.from_pretrained(tiny_llama(), folder).eval()


def answer(model: Any) -> Tensor:
    named = {"tasks": ["law", "math", "law"]} if model.peft_config["default"].tasks else {}
    return logits(model, **named)


def swap(model: Any, folder: str, name: str = "default") -> None:
    hotswap_adapter(model, folder, adapter_name=name, torch_device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_the_outputs_are_those_of_the_new_adapter(kind: str, tmp_path: Path) -> None:
    """There and back; and what is saved then is the new adapter too."""
    one, other = KINDS[kind]
    first, second = stored(tmp_path / "first", 0, **one), stored(tmp_path / "second", **other)
    before, expected = answer(loaded(first)), answer(loaded(second))
    assert (before - expected).abs().max() > 1e-3
    model = loaded(first)
    swap(model, second)
    torch.testing.assert_close(answer(model), expected, **CLOSE)
    model.save_pretrained(tmp_path / "saved", save_embedding_layers=False)
    torch.testing.assert_close(answer(loaded(str(tmp_path / "saved"))), expected, **CLOSE)
    swap(model, first)
    torch.testing.assert_close(answer(model), before, **CLOSE)


def test_scales_start_from_the_new_factor(tmp_path: Path) -> None:
    second = stored(tmp_path / "second", lora_alpha=20)
    model = adapted()
    hydralora_layers(model)["base_model.model.model.layers.0.self_attn.q_proj"].set_scale("default", 3)
    swap(model, second)
    for layer in hydralora_layers(model).values():
        layer.set_scale("default", 0.5)
    with rescale(loaded(second), 1.0) as _, rescale(model, 2.0):
        torch.testing.assert_close(answer(model), answer(loaded(second)), **CLOSE)


@pytest.mark.parametrize("experts", [1, 3])
def test_a_file_of_an_earlier_version(experts: int, tmp_path: Path) -> None:
    second = stored(tmp_path / "second", lora_nums=experts)
    expected = answer(loaded(second))
    path = tmp_path / "second" / TENSORS
    save_file(as_earlier(load_file(path), experts), path, metadata={"format": "pt"})
    model = adapted(lora_nums=experts)
    swap(model, second)
    assert torch.equal(answer(model), expected)


def test_an_adapter_that_is_not_active(tmp_path: Path) -> None:
    """The active one, with another number of experts, is neither asked nor touched."""
    second = stored(tmp_path / "second", lora_nums=2, r=2)
    model = adapted()
    before = answer(model)
    model.add_adapter("b", HydraLoraConfig(r=2, lora_nums=2, target_modules=TARGETS, init_weights=False))
    swap(model, second, "b")
    assert torch.equal(answer(model), before)
    model.set_adapter("b")
    assert torch.equal(answer(model), answer(loaded(second)))


def damaged(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    tensors[next(reversed(tensors))] = torch.zeros(1, 1)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


def incomplete(folder: Path) -> None:
    tensors = load_file(folder / TENSORS)
    del tensors[next(name for name in reversed(tensors) if "lora_B" in name)]
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], Callable[[Path], None] | None, str]] = {
    "experts": ({}, {"lora_nums": 2}, None, "has 3 experts and the new one 2"),
    "experts of a layer": ({}, {"experts_pattern": {"v_proj": 2}}, None, "v_proj': the loaded adapter has 3 experts"),
    "routing": ({}, {"routing": "sequence"}, None, "unit is 'token', new: 'sequence'"),
    "choice": ({"top_k": 2}, {"top_k": 1}, None, "top_k is 2, new: 1"),
    "temperature": ({}, {"router_temperature": 2.0}, None, r"temperature is 1.0, new: 2.0"),
    "tasks": (TASKS, {**TASKS, "tasks": ["math", "law"]}, None, r"tasks is \('law', 'math'\), new: \('math', 'law'\)"),
    "modules": (
        {},
        {"modules_to_save": ["lm_head"]},
        None,
        r"new adapter trained \{'modules_to_save': \['lm_head'\]\}",
    ),
    "tokens": (
        {"trainable_token_indices": [5]},
        {},
        None,
        r"loaded adapter trained \{'trainable_token_indices': \[5\]",
    ),
    "biases": ({}, {"bias": "all"}, None, r"new adapter trained \{'bias': 'all'\}"),
    "more layers": ({"target_modules": ["q_proj"]}, {}, None, "unexpected keys found: base_model.model.model.layers.0"),
    "a wrong shape": ({}, {}, damaged, "its file is damaged"),
    "half a layer": ({}, {}, incomplete, "its file is damaged"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused_changes_nothing(kind: str, tmp_path: Path) -> None:
    one, other, change, message = REFUSED[kind]
    second = stored(tmp_path / "second", **other)
    if change is not None:
        change(tmp_path / "second")
    model = adapted(**one)
    before, config = {name: value.clone() for name, value in model.state_dict().items()}, model.peft_config["default"]
    options = config.to_dict()
    with pytest.raises((ValueError, RuntimeError), match=message):
        swap(model, second)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert config.to_dict() == options


def test_states_that_are_refused(tmp_path: Path) -> None:
    second = stored(tmp_path / "second", lora_nums=1)
    model = adapted(lora_nums=1)
    with pytest.raises(ValueError, match=r"no HydraLoRA adapter 'b' to replace; known: \['default'\]"):
        swap(model, second, "b")
    model.merge_adapter()
    with pytest.raises(ValueError, match="call unmerge_adapter"):
        swap(model, second)
    model.unmerge_adapter()
    get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="Incompatible PEFT types found: HYDRALORA and LORA"):
        swap(model, str(tmp_path / "lora"))
    next(iter(hydralora_layers(model).values())).lora_B.to("meta")
    with pytest.raises(ValueError, match="are offloaded"):
        swap(model, second)


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once; and a PEFT without the functions that are extended keeps refusing."""
    present = [getattr(of_peft, name) for name in EXTENDED]
    register_hotswap()
    assert [getattr(of_peft, name) for name in EXTENDED] == present
    monkeypatch.delitem(of_peft.CONFIG_KEYS_TO_CHECK, peft_type())
    monkeypatch.delattr(of_peft, EXTENDED[1])
    register_hotswap()
    assert peft_type() not in of_peft.CONFIG_KEYS_TO_CHECK
    with pytest.raises(ValueError, match="only supports LORA"):
        of_peft.check_hotswap_configs_compatible(HydraLoraConfig(), HydraLoraConfig())


def test_lora_is_swapped_by_peft(tmp_path: Path) -> None:
    def lora(rank: int) -> Any:
        return get_peft_model(tiny_llama(), LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False)).eval()

    model, other = lora(6), lora(2)
    other.save_pretrained(tmp_path / "lora")
    assert (logits(model) - logits(other)).abs().max() > 1e-3
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    swap(model, str(tmp_path / "lora"))
    torch.testing.assert_close(logits(model), logits(other), rtol=0, atol=1e-5)


def test_a_prepared_model(tmp_path: Path) -> None:
    """Padding changes no output; it is saved, exported and rescaled with its larger rank."""
    model = adapted(rank_pattern={"q_proj": 2})
    before = answer(model)
    with pytest.raises(ValueError, match=r"target_rank is 3, but the ranks are \{'default': 4\}"):
        prepare_model_for_compiled_hotswap(model, target_rank=3)
    prepare_model_for_compiled_hotswap(model, target_rank=6)
    assert {layer.r["default"] for layer in hydralora_layers(model).values()} == {6}
    torch.testing.assert_close(answer(model), before, **CLOSE)
    model.save_pretrained(tmp_path / "padded", save_embedding_layers=False)
    torch.testing.assert_close(answer(loaded(str(tmp_path / "padded"))), before, **CLOSE)
    second = stored(tmp_path / "second", lora_nums=3, r=2, lora_alpha=20)
    swap(model, second)
    expected = answer(loaded(second))
    torch.testing.assert_close(answer(model), expected, **CLOSE)
    with rescale(model, 0.0):
        torch.testing.assert_close(answer(model), logits(tiny_llama()), **CLOSE)
    save_as_lora(model, tmp_path / "plain", 1)
    plain = logits(loaded(str(tmp_path / "plain")))
    torch.testing.assert_close(logits(model, expert=1), plain, rtol=0, atol=2e-6)


@pytest.mark.parametrize("experts", [1, 3])
@pytest.mark.parametrize("prepared", [True, False])
def test_a_prepared_model_is_compiled_once(experts: int, prepared: bool, tmp_path: Path) -> None:
    def model_of(rank: int, seed: int) -> Any:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
        torch.manual_seed(seed)
        options = {"lora_nums": experts, "target_modules": ["0", "2"], "init_weights": False}
        return get_peft_model(base, HydraLoraConfig(r=rank, lora_alpha=rank * (1 + seed), **options)).eval()

    x = torch.randn(5, 6)
    other = model_of(2, seed=1)
    other.save_pretrained(tmp_path)
    model = model_of(4, seed=2)
    if prepared:
        prepare_model_for_compiled_hotswap(model, target_rank=6)
    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad():
        before = compiled(x)
        frames = counter.frame_count
        assert frames > 0
        swap(compiled, str(tmp_path))
        after = compiled(x)
        torch.testing.assert_close(after, other(x), **CLOSE)
    assert (before - after).abs().max() > 1e-3
    assert (counter.frame_count == frames) is prepared
    torch._dynamo.reset()


def test_a_prepared_model_trains_as_before() -> None:
    """The factor is a tensor there, in forward and backward."""
    gradients = []
    for prepared in (False, True):
        model = adapted().train()
        if prepared:
            prepare_model_for_compiled_hotswap(model)
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters() if weight.grad is not None})
    assert len(gradients[0]) == 3 * 8
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)

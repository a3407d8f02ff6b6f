"""Kinds of routing: what each computes, and that a row's result never depends on its neighbors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hydralora import HydraLoraConfig
from hydralora.model import RoutingRecorder
from hydralora.tuner import hydralora_layers
from hydralora.tuner.original import config_to_original
from hydralora.tuner.routing.rule import Rule
from llava.runtime.cache_name import cache_argument, cache_of
from tests.hydralora.tuner.models import IDS, MASK, TARGETS, adapted, logits, tiny_llama, tiny_opt

pytestmark = pytest.mark.versions

TASKS = ["law", "math"]
FORCED = torch.tensor([[1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [0.2, 0.3, 0.5]])
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "temperature": {"router_temperature": 2.5},
    "top-1": {"top_k": 1},
    "top-2": {"top_k": 2},
    "top-p": {"top_p": 0.5},
    "top-2 of 64": {"lora_nums": 64, "top_k": 2},
    "sequence": {"routing": "sequence"},
    "sequence top-2": {"routing": "sequence", "top_k": 2},
    "task": {"routing": "task", "tasks": TASKS},
    "task top-1": {"routing": "task", "tasks": TASKS, "top_k": 1},
    "experts by layer": {"experts_pattern": {"q_proj": 5, r"layers\.1\.mlp\.down_proj": 1}, "top_k": 2},
    "forced weights": {},
    "forced expert": {},
}
ASKED: dict[str, Callable[[list[int]], dict[str, Any]]] = {
    "task": lambda rows: {"tasks": [TASKS[row % 2] for row in rows]},
    "task top-1": lambda rows: {"tasks": torch.tensor([row % 2 for row in rows])},
    "forced weights": lambda rows: {"routing_weights": FORCED[rows]},
    "forced expert": lambda rows: {"expert": [2 - row for row in rows]},
}
"""What a call of these rows of `IDS` asks for."""

ALL = pytest.mark.parametrize("kind", KINDS)


def asked(kind: str, rows: list[int]) -> dict[str, Any]:
    return ASKED.get(kind, lambda rows: {})(rows)


def model_of(kind: str, opt: bool = False) -> Any:
    if not opt:
        return adapted(**KINDS[kind])
    changes = KINDS[kind] | ({"experts_pattern": {"fc2": 5}} if "experts_pattern" in KINDS[kind] else {})
    return adapted(base=tiny_opt(), target_modules=["fc1", "fc2", "v_proj"], **changes)


def alone(model: Any, kind: str, row: int) -> Tensor:
    length = int(MASK[row].sum())
    return logits(model, IDS[row : row + 1, :length], MASK[row : row + 1, :length], **asked(kind, [row]))


@ALL
@pytest.mark.parametrize("opt", [False, True], ids=["llama", "opt"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_row_does_not_depend_on_its_neighbors(kind: str, opt: bool, side: str) -> None:
    """Alone, and in a batch padded on either side; OPT flattens the batch before its MLP."""
    model = model_of(kind, opt)
    expected = [alone(model, kind, row) for row in range(3)]
    flip = side == "left"
    ids, mask = IDS.clone(), MASK.clone()
    for row in range(3) if flip else ():
        ids[row], mask[row] = IDS[row].roll(6 - int(MASK[row].sum())), MASK[row].flip(0)
    options = {} if opt else {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    found = logits(model, ids, mask, **options, **asked(kind, [0, 1, 2]))
    torch.testing.assert_close(found, torch.cat(expected), rtol=0, atol=1e-5)
    order = [2, 0, 1]
    swapped = logits(model, ids[order], mask[order], **{n: v[order] for n, v in options.items()}, **asked(kind, order))
    torch.testing.assert_close(swapped, torch.cat([expected[row] for row in order]), rtol=0, atol=1e-5)


@ALL
def test_packed_rows(kind: str) -> None:
    """Texts one after another in one row; what a row asks for is then given token by token."""
    model = model_of(kind)
    lengths = MASK.sum(dim=1).tolist()
    expected = torch.cat([alone(model, kind, row) for row in range(3)])
    ids = torch.cat([IDS[row, :length] for row, length in enumerate(lengths)])[None]
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    owner = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    options = {}
    if kind in ASKED:
        (name, values), *_ = asked(kind, [0, 1, 2]).items()
        values = torch.tensor([TASKS.index(each) for each in values]) if name == "tasks" and kind == "task" else values
        options = {name: torch.as_tensor(values)[owner][None]}
    with torch.no_grad():
        found = model(input_ids=ids, position_ids=positions, use_cache=False, **options).logits[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@ALL
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_generation(kind: str, options: dict[str, Any]) -> None:
    """A row is answered as if it were alone, in a batch padded on the left; beams follow their row."""
    model = model_of(kind)
    limits = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0} | options
    together = {"input_ids": IDS.clone(), "attention_mask": MASK.flip(1)}
    for row in range(3):
        together["input_ids"][row] = IDS[row].roll(6 - int(MASK[row].sum()))
    limits |= {"output_scores": True, "return_dict_in_generate": True}
    found = model.generate(**together, **limits, **asked(kind, [0, 1, 2]))
    beams = options.get("num_beams", 1)
    for row in range(3):
        length = int(MASK[row].sum())
        single = {"input_ids": IDS[row : row + 1, :length], "attention_mask": MASK[row : row + 1, :length]}
        expected = model.generate(**single, **limits, **asked(kind, [row]))
        assert torch.equal(found.sequences[row, 6:], expected.sequences[0, length:])
        for one, other in zip(found.scores, expected.scores, strict=True):
            torch.testing.assert_close(one[row * beams : (row + 1) * beams], other, rtol=0, atol=1e-4)


@ALL
def test_with_a_cache_step_by_step(kind: str) -> None:
    """Tokens one by one from a cache give the logits of one pass, where the weights do not depend on later tokens."""
    model = model_of(kind)
    whole = logits(model, IDS[:1], MASK[:1], labels=IDS[:1].masked_fill(torch.arange(6) < 3, -100), **asked(kind, [0]))
    with torch.no_grad():
        output = model(input_ids=IDS[:1, :3], use_cache=True, **asked(kind, [0]))
        steps = [output.logits[0]]
        for place in range(3, 6):
            cache = cache_argument(model.get_base_model().forward, cache_of(output))
            output = model(input_ids=IDS[:1, place : place + 1], **cache, **asked(kind, [0]))
            steps.append(output.logits[0])
    torch.testing.assert_close(torch.cat(steps), whole, rtol=0, atol=1e-5)


def test_the_kinds_differ() -> None:
    """The negative control of everything above: no two of these adapters answer alike."""
    found = {kind: logits(model_of(kind), **asked(kind, [0, 1, 2])) for kind in KINDS}
    names = list(found)
    equal = [
        (one, other)
        for number, one in enumerate(names)
        for other in names[:number]
        if torch.allclose(found[one], found[other], atol=1e-4)
    ]
    assert equal == []


P = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7], [0.4, 0.2, 0.4]])


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        (Rule("token"), P),
        (Rule("token", top_k=3), P),
        (Rule("token", top_k=1), torch.tensor([[1.0, 0, 0], [0, 0, 1], [1, 0, 0]])),
        (Rule("token", top_k=2), torch.tensor([[0.625, 0.375, 0], [0, 2 / 9, 7 / 9], [0.5, 0, 0.5]])),
        (Rule("token", top_k=9), P),
        (Rule("token", top_p=1.0), P),
        (Rule("token", top_p=0.5), torch.tensor([[1.0, 0, 0], [0, 0, 1], [0.5, 0, 0.5]])),
        (Rule("token", top_p=1e-9), torch.tensor([[1.0, 0, 0], [0, 0, 1], [1, 0, 0]])),
        (Rule("token", top_p=0.75), torch.tensor([[0.625, 0.375, 0], [0, 2 / 9, 7 / 9], [0.5, 0, 0.5]])),
    ],
    ids=str,
)
def test_rules(rule: Rule, expected: Tensor) -> None:
    torch.testing.assert_close(rule.weights(P), expected)


@ALL
def test_observers_see_the_weights_that_act(kind: str) -> None:
    """The outputs of a layer are those of its experts under the weights that were recorded."""
    model = model_of(kind)
    layer = model.get_base_model().model.layers[0].self_attn.q_proj
    inputs: list[Tensor] = []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0])),
        layer.register_forward_hook(lambda _, args, output: inputs.append(output)),
    ]
    recorder = RoutingRecorder(hydralora_layers(model))
    recorder.start()
    logits(model, **asked(kind, [0, 1, 2]))
    recorded = recorder.stop()["base_model.model.model.layers.0.self_attn.q_proj"][0]
    for handle in handles:
        handle.remove()
    x, output = inputs
    weights = recorded.probabilities
    assert weights.shape == (3, 6, layer.experts["default"])
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 6))
    updates = torch.einsum("eor,rd,btd->bteo", layer.expert_matrices("default"), layer.lora_A["default"].weight, x)
    expected = layer.base_layer(x) + layer.scaling["default"] * (weights[..., None] * updates).sum(2)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    if KINDS[kind].get("top_k"):
        assert (weights > 0).sum(-1).unique().tolist() == [KINDS[kind]["top_k"]]
        assert recorded.learned.shape == weights.shape
        assert not torch.equal(recorded.learned, weights)


@ALL
def test_every_weight_has_a_gradient_in_every_process(kind: str) -> None:
    """Also weights of experts that no token chose: what splits weights over processes needs all of them in each."""
    model = model_of(kind).train()
    model(input_ids=IDS, attention_mask=MASK, labels=IDS, **asked(kind, [0, 1, 2])).loss.backward()
    trained = {name: weight.grad for name, weight in model.named_parameters() if weight.requires_grad}
    assert [name for name, gradient in trained.items() if gradient is None] == []
    routers = [gradient for name, gradient in trained.items() if "lora_router" in name or "lora_tasks" in name]
    constant = kind in ("top-1", "task top-1") or kind.startswith("forced")
    assert all(bool((gradient.abs() > 1e-7).any()) is not constant for gradient in routers if gradient is not None)


def test_the_balance_loss_reaches_a_router_whose_best_expert_acts_alone() -> None:
    from hydralora.layer import expert_balance_loss

    model = adapted(top_k=1).train()
    recorder = RoutingRecorder(hydralora_layers(model))
    recorder.start()
    model(input_ids=IDS, attention_mask=MASK)
    expert_balance_loss([each[0] for each in recorder.stop().values()], MASK).backward()
    routers = [weight.grad for name, weight in model.named_parameters() if "lora_router" in name]
    assert all(gradient is not None and gradient.any() for gradient in routers)


def test_experts_by_layer() -> None:
    model = adapted(experts_pattern={"q_proj": 5, r"layers\.1\.mlp\.down_proj": 1})
    counts = {
        name.removeprefix("base_model.model.model.layers."): layer.experts["default"]
        for name, layer in hydralora_layers(model).items()
    }
    others = {f"{number}.{name}": 3 for number in (0, 1) for name in ("self_attn.v_proj", "mlp.gate_proj")}
    assert counts == others | {
        "0.self_attn.q_proj": 5,
        "1.self_attn.q_proj": 5,
        "0.mlp.down_proj": 3,
        "1.mlp.down_proj": 1,
    }
    with pytest.raises(ValueError, match=r"experts_pattern \['k_prj'\]: no module"):
        adapted(experts_pattern={"k_prj": 2})


@ALL
def test_stored_and_read_again(kind: str, tmp_path: Any) -> None:
    from peft import PeftModel

    model = model_of(kind)
    model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(tiny_llama(), str(tmp_path))
    options = asked(kind, [0, 1, 2])
    torch.testing.assert_close(logits(again, **options), logits(model, **options), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"top_k": 2, "top_p": 0.5}, "top_k 2 and top_p 0.5 are two choices"),
        ({"top_k": 5}, "top_k is 5, but there are 4 experts"),
        ({"routing": "task"}, "routing='task' needs tasks"),
        ({"tasks": ["a"]}, "routing='task' needs tasks, and only it"),
        ({"routing": "task", "tasks": ["a", "a"]}, "has a name twice"),
    ],
)
def test_contradictions(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HydraLoraConfig(**changes)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if KINDS[kind]])
def test_the_format_of_the_authors_has_dense_routing_by_token_only(kind: str) -> None:
    config_to_original(HydraLoraConfig(target_modules=TARGETS))
    with pytest.raises(ValueError, match="the original"):
        config_to_original(HydraLoraConfig(target_modules=TARGETS, **KINDS[kind]))


@ALL
def test_merging_is_refused(kind: str) -> None:
    model = model_of(kind)
    with pytest.raises(ValueError, match="cannot be merged"):
        model.merge_adapter()

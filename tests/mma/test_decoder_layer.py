"""Layers that take the routing as an argument: checkpointed, compiled, exported, copied, pickled, and given back."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn

from llava.constants import IGNORE_INDEX
from llava.model.language_model.backbones import backbone_class, load_config
from llava.segments import Segments, Span
from mma.config import MmaConfig
from mma.decoder_layer import FIRST_POSITION, ROUTING, AdaptedLayer, PassRouting, adapt, problem
from mma.layer import RoutedRepAdapter
from mma.model import adapters, attach, detach
from tests.checkpointed import checkpoint_layers
from tests.mma.adapted_models import attach_adapters, shake
from tests.model import backbones

BATCH, LENGTH = 3, 12
CONFIG = MmaConfig(adapter_type="block", visual_adapter_type="none", temperature=2.0, adapter_dropout=0.0)
PLAIN = MmaConfig(adapter_type="attn", visual_adapter_type="none", adapter_dropout=0.0)
RANDOM = MmaConfig(**CONFIG.to_dict() | {"adapter_dropout": 0.3, "drop_path": 0.3})


def backbone(kind: str, folder: Path) -> Any:
    """A tiny text model of ours, in evaluation mode."""
    if not folder.exists():
        backbones.save_base(kind, folder)
    return backbone_class(folder).from_pretrained(folder, config=load_config(folder)).eval()


@pytest.fixture(scope="module", params=list(backbones.MODELS))
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """Makes models of one kind, all with the same weights."""
    folder = tmp_path_factory.mktemp("base") / "model"
    return lambda: backbone(request.param, folder)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Any]:
    """Makes Llamas."""
    folder = tmp_path_factory.mktemp("llama") / "model"
    return lambda: attach_adapters(backbone("llama", folder), CONFIG)


def batch(model: Any, modalities: tuple[bool, ...] = (True, False, True)) -> dict[str, Any]:
    """Embeddings with labels, of samples with an image and without."""
    drawn = torch.Generator().manual_seed(3)
    embeddings = torch.randn(len(modalities), LENGTH, model.config.hidden_size, generator=drawn)
    labels = torch.randint(3, 890, (len(modalities), LENGTH), generator=drawn)
    labels[:, : LENGTH // 2] = IGNORE_INDEX
    text = Span(0, LENGTH)
    segments = [Segments(Span(0, 0), (Span(0, 4),) * image, text, text, Span(LENGTH, LENGTH)) for image in modalities]
    return {"inputs_embeds": embeddings, "labels": labels, "segments": segments, "use_cache": False}


def logits(model: Any) -> Tensor:
    inputs = batch(model)
    del inputs["labels"]
    with torch.no_grad():
        return model(**inputs).logits


def trained(model: Any) -> dict[str, nn.Parameter]:
    """What a run trains, set to be trained."""
    return {n: p.requires_grad_() for n, p in model.extensions.named_parameters(model).items()}


def step(model: Any, seed: int = 5) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and all gradients of one pass in training mode."""
    parameters = trained(model.train())
    torch.manual_seed(seed)
    loss = model(**batch(model)).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in parameters.items()}


def assert_same(ours: dict[str, Tensor], expected: dict[str, Tensor], atol: float = 0.0) -> None:
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, f"{name} has no gradient at all"
        torch.testing.assert_close(ours[name], value, rtol=0, atol=atol, msg=name)


def test_fresh_adapters_change_nothing_and_detached_ones_leave_nothing(base: Callable[[], Any]) -> None:
    """The steps of the adapted layer are those of the plain one, to the bit, for every backbone."""
    model = base()
    expected, plain = logits(model), [type(layer) for layer in model.get_decoder().layers]
    keys = set(model.state_dict())
    attach(model, CONFIG)
    layers = model.get_decoder().layers
    assert [type(layer).__name__ for layer in layers] == [kind.__name__ for kind in plain]
    assert all(isinstance(layer, (AdaptedLayer, kind)) for layer, kind in zip(layers, plain, strict=True))
    added = set(model.state_dict()) - keys
    assert keys < set(model.state_dict())
    assert "model.layers.0.input_layernorm.adapter.conv_A.weight" in added
    assert not [m for m in layers.modules() if m._forward_hooks or m._forward_pre_hooks], "hooks in the decoder"
    with pytest.raises(RuntimeError, match="was called without 'modality_routing'"):
        logits(model)
    with torch.no_grad():
        routed = {ROUTING: torch.full((BATCH, 2, 2), 0.5)}
        assert torch.equal(model(inputs_embeds=batch(model)["inputs_embeds"], **routed).logits, expected)
        shake(model)
        assert (model(inputs_embeds=batch(model)["inputs_embeds"], **routed).logits - expected).abs().max() > 0.05
    for layer in layers:
        detach(layer)
    del model.get_decoder().adapter_modality_embedding
    assert [type(layer) for layer in layers] == plain
    assert set(model.state_dict()) == keys
    assert torch.equal(logits(model), expected)
    assert not [name for layer in layers for name in vars(layer) if name in ("drop_path", "layer_index")]


@pytest.mark.parametrize("config", [CONFIG, PLAIN, RANDOM], ids=["block", "attn", "dropout"])
def test_checkpointing_changes_neither_losses_nor_gradients(base: Callable[[], Any], config: MmaConfig) -> None:
    plain, checkpointed = (attach_adapters(base(), config) for _ in range(2))
    checkpoint_layers(checkpointed)
    ran: list[int] = []
    for module in (m for m in checkpointed.modules() if isinstance(m, RoutedRepAdapter)):
        module.conv_A.register_forward_hook(lambda *_: ran.append(1))
    (loss, gradients), (again, recomputed) = step(plain), step(checkpointed)
    assert torch.equal(loss, again)
    assert_same(recomputed, gradients)
    layers = len(plain.get_decoder().layers)
    assert len(ran) >= 3 * layers * config.adapters_per_layer, "something was recomputed in the backward pass"


def test_each_pass_is_recomputed_with_its_own_routing(base: Callable[[], Any]) -> None:
    """Two passes of other modalities wait for their backward pass; the first to begin is the first to go back."""
    model = attach_adapters(base(), CONFIG)
    kinds = [(True, True, True), (False, False, False)]
    for modalities in kinds:
        parameters = trained(model.train())
        model(**batch(model, modalities)).loss.backward()
    expected = {name: parameter.grad for name, parameter in parameters.items()}
    other = attach_adapters(base(), CONFIG).train()
    checkpoint_layers(other)
    parameters = trained(other)
    losses = [other(**batch(other, modalities)).loss for modalities in kinds]
    for loss in losses:
        loss.backward()
    assert_same({name: parameter.grad for name, parameter in parameters.items()}, expected)


def layer_inputs(model: Any, rows: int = BATCH, seed: int = 0) -> tuple[Any, Tensor, dict[str, Any]]:
    """A layer, hidden states, and its other arguments apart from the routing."""
    decoder = model.get_decoder()
    hidden = torch.randn(rows, 6, model.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(6)[None]
    rotary = decoder.rotary_emb(hidden, position_ids=positions)
    return decoder.layers[1], hidden, {"position_ids": positions, "position_embeddings": rotary}


def routings(layer: nn.Module) -> dict[str, Any]:
    """Every kind of routing; the first three are of the same weights, so that their outputs are equal."""
    weights = torch.tensor([[0.3, 0.7], [0.6, 0.4]])
    found = adapters(layer)
    mixed = tuple(a.mixed(weights[number]) for number, a in enumerate(found))
    other = tuple(a.mixed(torch.stack([-weights[number], weights[number]])) for number, a in enumerate(found))
    half = other[0][1].shape[0] // 2
    chosen = torch.cat([torch.zeros(half), torch.ones(half)]).expand(BATCH, 1, -1)
    return {
        "weights": weights.repeat(BATCH, 1, 1),
        "mixed": mixed,
        "of a pass": PassRouting(((), other, ()), chosen),
        "first position": FIRST_POSITION,
    }


def test_kinds_of_routing_agree(llama: Callable[[], Any]) -> None:
    layer, hidden, arguments = layer_inputs(llama())
    with torch.no_grad():
        known = routings(layer)
        expected = layer(hidden, **{ROUTING: known["weights"]}, **arguments)
        for name in ("mixed", "of a pass"):
            torch.testing.assert_close(layer(hidden, **{ROUTING: known[name]}, **arguments), expected)
        output, own = layer(hidden, **{ROUTING: FIRST_POSITION}, **arguments)
        assert own.shape == (BATCH, 2, 2)
        assert torch.equal(layer(hidden, **{ROUTING: own}, **arguments), output)
        assert (output - expected).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["weights", "mixed", "of a pass", "first position"])
def test_a_compiled_layer(llama: Callable[[], Any], kind: str) -> None:
    layer, hidden, arguments = layer_inputs(llama())
    arguments[ROUTING] = routings(layer)[kind]
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    ours, expected = compiled(hidden, **arguments), layer(hidden, **arguments)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_a_model_with_compiled_layers_trains_as_before(llama: Callable[[], Any], checkpointing: bool) -> None:
    model, compiled = llama(), llama()
    if checkpointing:
        checkpoint_layers(compiled)
    for layer in compiled.get_decoder().layers:
        layer.compile(backend="eager", fullgraph=not checkpointing)
    (loss, gradients), (ours, same) = step(model), step(compiled)
    torch.testing.assert_close(ours, loss, rtol=1e-6, atol=0)
    assert_same(same, gradients, atol=1e-5)


def test_a_compiled_model(llama: Callable[[], Any]) -> None:
    """The whole model, with breaks of the graph outside of the layers."""
    model = llama()
    expected = logits(model)
    torch.testing.assert_close(logits(torch.compile(model, backend="eager")), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["weights", "mixed", "first position"])
def test_an_exported_layer_has_the_routing_as_an_input(llama: Callable[[], Any], kind: str) -> None:
    layer, hidden, arguments = layer_inputs(llama())
    known = routings(layer)
    program = torch.export.export(layer, (hidden,), {**arguments, ROUTING: known[kind]})
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    exported = torch.export.load(file).module()
    other = {
        "weights": known["weights"].flip(-1),
        "first position": FIRST_POSITION,
    }.get(kind, tuple((down, bias, -up) for down, bias, up in known["mixed"]))
    _, changed, _ = layer_inputs(llama(), seed=1)
    with torch.no_grad():
        for x, routing in ((hidden, known[kind]), (changed, other)):
            expected = layer(x, **{ROUTING: routing}, **arguments)
            torch.testing.assert_close(exported(x, **{ROUTING: routing}, **arguments), expected, rtol=0, atol=1e-5)
        if kind != "first position":
            assert (layer(hidden, **{ROUTING: other}, **arguments) - expected).abs().max() > 1e-3


def pickled(module: Any) -> Any:
    return pickle.loads(pickle.dumps(module))  # noqa: S301  # our own bytes


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_a_copy_of_a_layer_takes_the_routing_too(llama: Callable[[], Any], copied: Callable[[Any], Any]) -> None:
    layer, hidden, arguments = layer_inputs(llama())
    arguments[ROUTING] = routings(layer)["weights"]
    with torch.no_grad():
        expected = layer(hidden, **arguments)
        other = copied(layer)
        assert type(other) is type(layer)
        assert torch.equal(other(hidden, **arguments), expected)
        adapters(other)[0].conv_B.bias.add_(1.0)
        assert torch.equal(layer(hidden, **arguments), expected)
        detach(other)
    assert isinstance(layer, AdaptedLayer)
    assert not isinstance(other, AdaptedLayer)


def test_layers_whose_forward_a_placement_has_wrapped(tmp_path: Path) -> None:
    """The bound `forward` of a layer is kept by accelerate, where a model is placed on several devices."""
    expected = logits(attach_adapters(backbone("llama", tmp_path / "base"), CONFIG))
    model = backbone("llama", tmp_path / "base")
    plain = logits(model)
    for layer in model.get_decoder().layers:
        add_hook_to_module(layer, AlignDevicesHook("cpu", io_same_device=True))
    attach_adapters(model, CONFIG)
    assert torch.equal(logits(model), expected)
    assert (plain - expected).abs().max() > 0.05
    for layer in model.get_decoder().layers:
        detach(layer)
    model.extensions = type(model.extensions)()
    model.get_decoder().extensions = model.extensions
    assert torch.equal(logits(model), plain)


class OldAttention(nn.Module):
    """As in transformers 4: returns a map and a cache too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, position_ids: Any = None, past_key_value: Any = None,
        output_attentions: bool = False, use_cache: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        return self.linear(hidden_states) * position_ids[..., None], "map" if output_attentions else None, "cache"


class OldLayer(nn.Module):
    """Of transformers 4: returns a tuple, and is checkpointed with positional arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.self_attn, self.mlp = OldAttention(), nn.Linear(8, 8)

    def forward(
        self, hidden_states: Tensor, attention_mask: Any = None, position_ids: Any = None, past_key_value: Any = None,
        output_attentions: bool = False, use_cache: bool = False,
    ) -> tuple[Any, ...]:  # fmt: skip
        attended, attention, cache = self.self_attn(
            self.input_layernorm(hidden_states), attention_mask, position_ids, past_key_value, output_attentions,
            use_cache,
        )  # fmt: skip
        hidden = hidden_states + attended
        output = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return (output, *([attention] if output_attentions else []), *([cache] if use_cache else []))


@pytest.mark.parametrize("output_attentions", [False, True])
@pytest.mark.parametrize("use_cache", [False, True])
def test_layers_of_transformers_4_return_a_tuple(output_attentions: bool, use_cache: bool) -> None:
    layer = OldLayer()
    x, positions = torch.randn(2, 3, 8), torch.arange(3.0)[None]
    expected = layer(x, None, positions, None, output_attentions, use_cache)
    layer.input_layernorm.adapter = RoutedRepAdapter(8, 4, dropout=0.0)
    adapt(layer)
    routing: dict[str, Any] = {ROUTING: torch.full((2, 1, 2), 0.5)}
    ours = layer(x, None, positions, None, output_attentions, use_cache, **routing)
    assert torch.equal(ours[0], expected[0])
    assert ours[1:] == expected[1:]
    assert len(ours) == 1 + output_attentions + use_cache
    own = layer(x, position_ids=positions, **{ROUTING: FIRST_POSITION})
    assert torch.equal(own[0], expected[0])
    assert own[1].shape == (2, 1, 2)
    with pytest.raises(TypeError, match=r"given are 1, and by name too \['attention_mask'\]"):
        layer(x, None, attention_mask=None, **routing)
    with pytest.raises(TypeError, match=r"takes 5 positional arguments after hidden_states .* given are 6"):
        layer(x, None, positions, None, False, False, None, **routing)


def test_layers_that_are_refused() -> None:
    """Layers of other steps, or with a `forward` that somebody has replaced: nothing has been changed then."""
    good = OldLayer()
    assert problem(good) is None
    other = OldLayer()
    other.pre_feedforward_layernorm = nn.LayerNorm(8)
    assert "has the children" in str(problem(other))
    scaled = OldLayer()
    scaled.scale = nn.Parameter(torch.ones(8))
    assert "tensors of its own ['scale']" in str(problem(scaled))
    replaced: Any = OldLayer()
    replaced.forward = lambda *args, **kwargs: OldLayer.forward(replaced, *args, **kwargs)
    assert "'forward' of a OldLayer was replaced" in str(problem(replaced))


def test_attaching_to_a_refused_layer_changes_nothing(tmp_path: Path) -> None:
    model = backbone("llama", tmp_path / "base")
    keys, kinds = set(model.state_dict()), [type(layer) for layer in model.get_decoder().layers]
    model.get_decoder().layers[2].extra = nn.Identity()
    with pytest.raises(ValueError, match=r"a LlamaDecoderLayer has the children .*'extra'"):
        attach(model, CONFIG)
    assert set(model.state_dict()) == keys
    assert [type(layer) for layer in model.get_decoder().layers] == kinds

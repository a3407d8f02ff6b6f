"""Options that LoRA has too: what they do to a routed adapter, and that one expert follows PEFT's LoRA."""

from __future__ import annotations

import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, OPTConfig, OPTForCausalLM, Qwen2Config, Qwen2ForCausalLM

from hydralora import HydraLoraConfig
from hydralora.tuner import hydralora_layers
from hydralora.tuner.original import export_adapter
from tests.hydralora.tuner.models import IDS, MASK, TARGETS, adapted, logits, tiny_llama, tiny_opt

pytestmark = pytest.mark.versions

SIZES: dict[str, Any] = {"vocab_size": 80, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


def tiny_qwen(**changes: Any) -> Qwen2ForCausalLM:
    """A model whose attention projections have biases."""
    torch.manual_seed(0)
    config = Qwen2Config(**SIZES, num_key_value_heads=2, intermediate_size=48, pad_token_id=0, **changes)
    return Qwen2ForCausalLM(config).eval()


def train(model: nn.Module, steps: int = 3) -> None:
    """A few updates of everything that is trained."""
    optimizer = torch.optim.SGD([weight for weight in model.parameters() if weight.requires_grad], lr=0.5)
    for _ in range(steps):
        optimizer.zero_grad()
        model.train()(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
        optimizer.step()
    model.eval()


def lora_like(model: PeftModel, **options: Any) -> PeftModel:
    """PEFT's LoRA on the same base with the same options and the weights of a routed adapter of one expert."""
    config = LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | options)
    lora = get_peft_model(tiny_llama(), config).eval()
    ours, theirs = model.state_dict(), lora.state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {name: t.shape for name, t in theirs.items()}
    lora.load_state_dict(ours)
    return lora


SCALINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 2, r"model\.layers\.1\.mlp\.down_proj": 6}},
    "alphas": {"alpha_pattern": {"down_proj": 3.0}},
    "a pattern with a start": {"rank_pattern": {"^model.layers.1.self_attn.q_proj": 7}},
    "the first that matches": {"rank_pattern": {r".*layers\.0.*": 2, "q_proj": 3}},
    "all of them": {
        "use_rslora": True,
        "rank_pattern": {"self_attn.v_proj": 1, "gate_proj": 16},
        "alpha_pattern": {"v_proj": 1, r"layers\.0\.mlp\.gate_proj": 0.5},
    },
}


@pytest.mark.parametrize("options", SCALINGS.values(), ids=SCALINGS)
def test_scalings_and_patterns_are_those_of_lora(options: dict[str, Any], tmp_path: Path) -> None:
    """With one expert the same shapes, factors and outputs; saved, loaded and merged."""
    model = adapted(lora_nums=1, **options)
    lora = lora_like(model, **options)
    theirs = {name: m for name, m in lora.named_modules() if hasattr(m, "lora_A") and hasattr(m, "scaling")}
    ours = hydralora_layers(model)
    assert set(theirs) == set(ours)
    for name, layer in ours.items():
        assert layer.scaling["default"] == pytest.approx(theirs[name].scaling["default"], rel=1e-12)
        assert layer.r["default"] == theirs[name].r["default"]
    expected = logits(lora)
    torch.testing.assert_close(logits(model), expected, rtol=1e-6, atol=1e-6)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(again), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(logits(again.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)
    if options:  # the negative control: the options act
        assert (logits(adapted(lora_nums=1)) - expected).abs().max() > 1e-3


@pytest.mark.parametrize("options", SCALINGS.values(), ids=SCALINGS)
def test_scalings_and_patterns_of_several_experts(options: dict[str, Any], tmp_path: Path) -> None:
    model = adapted(lora_nums=3, **options)
    for name, layer in hydralora_layers(model).items():
        config = model.peft_config["default"].for_layer(name.removeprefix("base_model.model."))
        rank = layer.r["default"]
        assert rank == config.r
        assert layer.lora_A["default"].weight.shape == (rank, layer.in_features)
        assert layer.lora_B["default"].weight.shape == (layer.out_features, 3 * rank)
        root = math.sqrt(rank) if options.get("use_rslora") else rank
        assert layer.scaling["default"] == pytest.approx(config.lora_alpha / root)
    before = logits(model)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()), before)


def test_patterns_that_match_nothing_are_said() -> None:
    with pytest.warns(RuntimeWarning, match=r"rank_pattern keys did not match any targeted module.*\['k_proj'\]"):
        adapted(rank_pattern={"k_proj": 2, "q_proj": 3})


def test_gaussian_start() -> None:
    torch.manual_seed(0)
    config = HydraLoraConfig(r=8, lora_nums=2, target_modules=["gate_proj"], init_lora_weights="gaussian")
    model = get_peft_model(tiny_llama(hidden_size=256), config)
    shared = torch.cat([layer.lora_A["default"].weight.flatten() for layer in hydralora_layers(model).values()])
    assert shared.std().item() == pytest.approx(1 / 8, rel=0.1)
    assert shared.abs().max() > 1 / math.sqrt(256) + 0.1  # beyond the uniform start
    assert all(not layer.lora_B["default"].weight.any() for layer in hydralora_layers(model).values())
    torch.testing.assert_close(logits(model.eval()), logits(tiny_llama(hidden_size=256)))


@pytest.mark.parametrize(
    "options", [{"init_lora_weights": False, "init_weights": True}, {"init_weights": False}], ids=str
)
def test_a_start_that_is_not_the_base(options: dict[str, Any]) -> None:
    assert (logits(adapted(**options)) - logits(tiny_llama())).abs().max() > 1e-2


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_16", "olora", "loftq", "corda", "eva", "orthogonal"])
def test_starts_that_change_the_base_are_refused_with_the_reason(start: str) -> None:
    with pytest.raises(ValueError, match=f"init_lora_weights is '{start}'.*change the frozen weights.*single B"):
        HydraLoraConfig(init_lora_weights=start)


def test_default_targets() -> None:
    """PEFT's own choice for LoRA, by the kind of model; a model that it does not know is said."""
    chosen = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
    neox = GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, intermediate_size=48))
    for base in (tiny_llama(), tiny_opt(), tiny_qwen(), neox):
        kind = base.config.model_type
        model = get_peft_model(base, HydraLoraConfig(r=2, lora_nums=2))
        names = {name.rpartition(".")[2] for name in hydralora_layers(model)}
        assert names == set(chosen[kind])
        assert model.peft_config["default"].target_modules == set(chosen[kind])
    with pytest.raises(ValueError, match="specify `target_modules`"):
        get_peft_model(nn.Sequential(nn.Linear(4, 4)), HydraLoraConfig())


BIASED = ["q_proj", "v_proj", "down_proj"]


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
@pytest.mark.parametrize("experts", [1, 3])
def test_biases(bias: str, experts: int, tmp_path: Path) -> None:
    """Trained, saved and loaded as by PEFT's LoRA; merging keeps them."""
    options: dict[str, Any] = {"bias": bias, "target_modules": BIASED, "lora_nums": experts}
    model = adapted(base=tiny_qwen(), **options)
    lora = get_peft_model(tiny_qwen(), LoraConfig(bias=bias, target_modules=BIASED, task_type="CAUSAL_LM"))

    def trained(model: nn.Module) -> set[str]:
        return {name for name, weight in model.named_parameters() if weight.requires_grad and name.endswith("bias")}

    assert trained(model) == trained(lora)
    kinds = {name.split(".")[-2] if "base_layer" not in name else name.split(".")[-3] for name in trained(model)}
    expected = {"none": set(), "all": {"q_proj", "k_proj", "v_proj"}, "lora_only": {"q_proj", "v_proj"}}
    assert kinds == expected[bias]
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    train(model)
    moved = {name for name, weight in model.named_parameters() if not torch.equal(weight, before[name])}
    assert trained(model) <= moved
    assert all(".lora_" in name or name in trained(model) for name in moved)
    after = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_qwen(), tmp_path).eval()
    torch.testing.assert_close(logits(again), after)
    resumed = PeftModel.from_pretrained(tiny_qwen(), tmp_path, is_trainable=True)
    assert trained(resumed) == trained(model)
    if experts == 1:
        torch.testing.assert_close(logits(again.merge_and_unload()), after, rtol=1e-4, atol=1e-5)


def test_biases_of_one_adapter_alone() -> None:
    """Where every row would get trained biases, and with a second adapter that has some, there is an error."""
    model = adapted(base=tiny_qwen(), bias="all", target_modules=BIASED)
    rows = {"input_ids": IDS, "attention_mask": MASK}
    assert model(**rows, adapter_names=["default"] * 3).logits.isfinite().all()
    with pytest.raises(ValueError, match=r"adapters \{'default': 'all'\} \(name: bias\) have trained biases"):
        model(**rows, adapter_names=["default", "__base__", "default"])
    with pytest.raises(ValueError, match="only 1 adapter with bias"):
        model.add_adapter("second", HydraLoraConfig(bias="lora_only", target_modules=BIASED))


LAYERS: dict[str, tuple[dict[str, Any], set[str]]] = {
    "all": ({}, {"0.q", "0.v", "0.gate", "0.down", "1.q", "1.v", "1.gate", "1.down"}),
    "one number": ({"layers_to_transform": 1}, {"1.q", "1.v", "1.gate", "1.down"}),
    "number zero": ({"layers_to_transform": 0}, {"0.q", "0.v", "0.gate", "0.down"}),
    "a list": ({"layers_to_transform": [1]}, {"1.q", "1.v", "1.gate", "1.down"}),
    "a list and its name": (
        {"layers_to_transform": [0, 1], "layers_pattern": "layers", "target_modules": ["q_proj"]},
        {"0.q", "1.q"},
    ),
    "names of the list": (
        {"layers_to_transform": [1], "layers_pattern": ["h", "layers"], "target_modules": ["q_proj"]},
        {"1.q"},
    ),
    "excluded names": ({"exclude_modules": ["q_proj", "gate_proj"]}, {"0.v", "0.down", "1.v", "1.down"}),
    "an excluded pattern": ({"exclude_modules": r".*layers\.0\..*"}, {"1.q", "1.v", "1.gate", "1.down"}),
}


@pytest.mark.parametrize(("options", "expected"), LAYERS.values(), ids=LAYERS)
def test_choice_of_layers(options: dict[str, Any], expected: set[str], tmp_path: Path) -> None:
    model = adapted(**options)
    names = [name.split(".") for name in hydralora_layers(model)]
    assert {f"{parts[4]}.{parts[-1].removesuffix('_proj')}" for parts in names} == expected
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    assert set(hydralora_layers(again)) == set(hydralora_layers(model))
    torch.testing.assert_close(logits(again), logits(model))


def test_layers_that_do_not_exist_are_said() -> None:
    with pytest.warns(UserWarning, match=r"layers_to_transform \[5, 9\]: no layer of this number was adapted"):
        adapted(layers_to_transform=[1, 5, 9])
    with pytest.raises(ValueError, match="not found in the base model"):
        adapted(layers_to_transform=[7])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        adapted(layers_to_transform=[0, 1])
    for targets in (".*q_proj", "all-linear"):
        with pytest.raises(
            ValueError, match=f"layers_to_transform is 1, but target_modules is the text '{re.escape(targets)}'"
        ):
            HydraLoraConfig(target_modules=targets, layers_to_transform=1)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("indices", [[5, 9], {"embed_tokens": [5, 9]}], ids=["list", "dict"])
def test_trained_tokens(tied: bool, indices: Any, tmp_path: Path) -> None:
    """Only the rows of these tokens move; they are saved with the adapter, and merged into the embedding."""

    def base() -> Any:
        return tiny_llama(tie_word_embeddings=tied)

    model = adapted(base=base(), lora_nums=1, trainable_token_indices=indices)
    before = base().get_input_embeddings().weight
    train(model)
    after = logits(model)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(base(), tmp_path).eval()
    torch.testing.assert_close(logits(again), after)
    with again.disable_adapter():
        torch.testing.assert_close(logits(again), logits(base()))
    plain = again.merge_and_unload()
    torch.testing.assert_close(logits(plain), after, rtol=1e-4, atol=1e-4)
    moved = (plain.get_input_embeddings().weight != before).any(dim=1).nonzero().flatten().tolist()
    assert moved == [5, 9]


def test_trained_tokens_of_several_experts(tmp_path: Path) -> None:
    model = adapted(routing="sequence", trainable_token_indices=[5, 9])
    train(model)
    after = logits(model)
    assert (after - logits(adapted(routing="sequence"))).abs().max() > 1e-2
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(again), after)
    rows = again(input_ids=IDS, attention_mask=MASK, adapter_names=["default", "__base__", "default"]).logits
    torch.testing.assert_close(rows[0], again(input_ids=IDS[:1]).logits[0])
    torch.testing.assert_close(rows[1][MASK[1].bool()], tiny_llama()(input_ids=IDS[1:2, :4]).logits[0])


@pytest.mark.parametrize(
    "names", [["lm_head"], ("lm_head",), {"embed_tokens", "lm_head"}], ids=["list", "tuple", "set"]
)
def test_modules_trained_in_full(names: Any, tmp_path: Path) -> None:
    model = adapted(modules_to_save=names)
    train(model)
    after = logits(model)
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path).eval()
    torch.testing.assert_close(logits(again), after)
    with again.disable_adapter():
        torch.testing.assert_close(logits(again), logits(tiny_llama()))


def test_trained_tokens_are_not_added_up() -> None:
    model = adapted(trainable_token_indices=[5])
    model.add_adapter("second", HydraLoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"adapters \['default'\] have trainable_token_indices"):
        model.add_weighted_adapter(["default", "second"], [1.0, 1.0], "sum")


NOT_OF_THE_ORIGINAL: dict[str, dict[str, Any]] = {
    "rslora": {"use_rslora": True},
    "ranks": {"rank_pattern": {"q_proj": 2}},
    "alphas": {"alpha_pattern": {"q_proj": 2}},
    "tokens": {"trainable_token_indices": [5]},
    "layers": {"layers_to_transform": 0},
    "excluded": {"exclude_modules": ["q_proj"]},
}


@pytest.mark.parametrize("options", NOT_OF_THE_ORIGINAL.values(), ids=NOT_OF_THE_ORIGINAL)
def test_what_the_original_does_not_have_is_not_exported(options: dict[str, Any], tmp_path: Path) -> None:
    adapted(**options).save_pretrained(tmp_path / "ours", save_embedding_layers=False)
    with pytest.raises(ValueError, match=f"{next(iter(options))}.*: the original has no such choice"):
        export_adapter(tmp_path / "ours", tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def test_how_an_adapter_began_does_not_matter_to_the_original(tmp_path: Path) -> None:
    """The negative control of the test above."""
    adapted(init_lora_weights="gaussian", balance_weight=0.1).save_pretrained(tmp_path / "ours")
    export_adapter(tmp_path / "ours", tmp_path / "theirs")
    assert (tmp_path / "theirs" / "adapter_config.json").is_file()


def test_opt_has_the_same_options() -> None:
    """Biases everywhere, and layers that flatten the batch."""
    torch.manual_seed(0)
    config = OPTConfig(**SIZES, ffn_dim=48, max_position_embeddings=32, word_embed_proj_dim=32, pad_token_id=0)
    base = OPTForCausalLM(config).eval()
    model = adapted(base=base, target_modules=["fc1", "q_proj"], bias="lora_only", rank_pattern={"fc1": 2})
    assert {layer.r["default"] for layer in hydralora_layers(model).values()} == {2, 4}
    assert sum(p.requires_grad for name, p in model.named_parameters() if name.endswith("bias")) == 4

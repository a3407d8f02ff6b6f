"""Backbones: text logits and generation are transformers' own; training with extensions; the right class is chosen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel

from llava.constants import IGNORE_INDEX
from llava.conversation import conv_templates
from llava.errors import CheckpointError, FlagError
from llava.extension import Extension
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import bare_model
from llava.model.components import Component, components
from llava.model.language_model.backbones import backbone_class, load_config
from llava.runtime.tokenizer import load_tokenizer
from llava.segments import DecoderState
from llava.train.optimizer import optimizer_groups
from llava.train.train import build_run, parse_args
from tests.llava.train.test_training import LLAVA, command_line
from tests.model import backbones

pytestmark = pytest.mark.versions

NAMES = {
    "llama": ("LlavaLlamaForCausalLM", "llava_llama"),
    "mistral": ("LlavaMistralForCausalLM", "llava_mistral"),
    "qwen2": ("LlavaQwen2ForCausalLM", "llava_qwen2"),
    "qwen3": ("LlavaQwen3ForCausalLM", "llava_qwen3"),
}
TEMPLATES = {"mistral": "mistral_instruct", "qwen2": "chatml_direct", "qwen3": "chatml_direct"}


@pytest.fixture(scope="module")
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[PreTrainedModel, Any]:
    """Transformers' model and ours with the same weights, read from the same folder."""
    folder = tmp_path_factory.mktemp("base")
    plain = backbones.plain_model(request.param)
    plain.save_pretrained(folder)
    ours = backbone_class(folder).from_pretrained(folder, config=load_config(folder))
    return plain, ours.eval()


def prompts(lengths: tuple[int, ...] = (5, 12, 9)) -> tuple[Tensor, Tensor]:
    """Rows of different length, padded on the left, and their mask."""
    generator = torch.Generator().manual_seed(2)
    longest = max(lengths)
    ids = torch.randint(3, 890, (len(lengths), longest), generator=generator)
    mask = torch.stack([torch.arange(longest) >= longest - length for length in lengths]).long()
    return ids * mask, mask


@pytest.mark.parametrize("pair", backbones.MODELS, indirect=True)
def test_text_logits(pair: tuple[PreTrainedModel, Any]) -> None:
    plain, ours = pair
    ids, mask = prompts()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        expected = plain(input_ids=ids, attention_mask=mask, position_ids=positions).logits
        result = ours(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(result[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-5)
        whole = plain(input_ids=ids[1:2]).logits
        torch.testing.assert_close(ours(input_ids=ids[1:2]).logits, whole, rtol=0, atol=2e-5)
        labels = ids.masked_fill(mask == 0, IGNORE_INDEX)
        assert torch.isfinite(ours(input_ids=ids, attention_mask=mask, labels=labels).loss)


@pytest.mark.parametrize("pair", ["mistral", "qwen2, window", "qwen3, window"], indirect=True)
def test_the_window_matters(pair: tuple[PreTrainedModel, Any]) -> None:
    """A negative control: without its window the model gives other logits for long rows, and only for those."""
    _, ours = pair
    ids = prompts((12,))[0]
    with torch.no_grad():
        expected = ours(input_ids=ids).logits
        settings = {"sliding_window": None, "layer_types": ["full_attention"] * 3}
        before = {name: getattr(ours.config, name, None) for name in settings}
        for name, value in settings.items():
            if before[name] is not None:
                setattr(ours.config, name, value)
        other = ours(input_ids=ids).logits
        for name, value in before.items():
            if value is not None:
                setattr(ours.config, name, value)
    differs = (other - expected).abs().amax(dim=(0, 2)) > 1e-4
    assert not differs[: backbones.WINDOW].any()
    assert differs[backbones.WINDOW :].all()


@pytest.mark.parametrize("pair", backbones.MODELS, indirect=True)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"use_cache": False}], ids=["greedy", "beams", "no cache"])
def test_generation(pair: tuple[PreTrainedModel, Any], options: dict[str, Any]) -> None:
    """With cache and left padding, far beyond the window."""
    plain, ours = pair
    ids, mask = prompts()
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0} | options
    expected = plain.generate(ids, attention_mask=mask, **settings)[:, ids.shape[1] :]
    result = ours.generate(ids, attention_mask=mask, **settings)
    assert torch.equal(result, expected)
    alone = ours.generate(ids[:1, -5:], **settings)
    assert torch.equal(alone, expected[:1])


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("bases")
    return {
        kind: backbones.save_base(kind, folder / kind) for kind in ("mistral", "qwen2, tied", "qwen2", "qwen3, window")
    }


def run_options(kind: str, bases: dict[str, Path], **changes: Any) -> dict[str, Any]:
    version = TEMPLATES[kind.partition(",")[0]]
    return {"model_name_or_path": bases[kind], "version": version, "learning_rate": 3e-3} | changes


HYDRA = {"use_lora": True, "llm_moe": True, "lora_rank": 4, "lora_alpha": 8, "gradient_checkpointing": True}


@pytest.mark.parametrize("options", [HYDRA, {}], ids=["hydralora", "full"])
@pytest.mark.parametrize("kind", ["mistral", "qwen2", "qwen2, tied", "qwen3, window"])
def test_training(kind: str, options: dict[str, Any], bases: dict[str, Path], tmp_path: Path) -> None:
    args = command_line(tmp_path, **run_options(kind, bases, **options))
    run = build_run(parse_args(args))
    model = bare_model(run.model)
    class_name, model_type = NAMES[kind.partition(",")[0]]
    assert (type(model).__name__, model.config.model_type) == (class_name, model_type)
    norms = [weight for name, weight in model.named_parameters() if "norm" in name and "vision_tower" not in name]
    decayed = {id(weight) for group in optimizer_groups(run.model, run.args) for weight in group["params"]}
    decayed -= {
        id(weight)
        for group in optimizer_groups(run.model, run.args)
        if group["name"].endswith("undecayed")
        for weight in group["params"]
    }
    assert len(norms) >= 7
    assert not any(id(weight) in decayed for weight in norms)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    run.trainer.train()
    moved = {
        part for part, named in components(run.model).items() if any(weight.requires_grad for weight in named.values())
    }
    expected = {Component.PROJECTOR} | (
        {Component.ADAPTER, Component.EXTENSION} if options else {Component.LANGUAGE_MODEL}
    )
    assert moved == expected
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    assert any(not torch.equal(before[name], model.get_parameter(name)) for name in trained)
    checkpoint = tmp_path / "checkpoint-3"
    assert json.loads((checkpoint / "config.json").read_text())["model_type"] == model_type
    tokenizer, loaded, _, _ = load_pretrained_model(str(checkpoint), device="cpu")
    assert type(loaded).__name__ == class_name
    assert tokenizer("What is shown?").input_ids == run.tokenizer("What is shown?").input_ids
    batch = run.trainer.data_collator([run.dataset[index] for index in range(3)])
    live, batch = model.eval(), {key: value for key, value in batch.items() if key != "labels"}
    with torch.no_grad():
        valid = live.build_inputs(**batch).attention_mask
        torch.testing.assert_close(loaded(**batch).logits[valid], live(**batch).logits[valid], rtol=1e-4, atol=1e-4)


def test_tokenizers_come_without_foreign_code(bases: dict[str, Path]) -> None:
    for kind, folder in bases.items():
        tokenizer = load_tokenizer(folder)
        prompt = conv_templates[TEMPLATES[kind.partition(",")[0]]].copy()
        prompt.append_message(prompt.roles[0], "What is shown?")
        prompt.append_message(prompt.roles[1], None)
        ids = tokenizer(prompt.get_prompt()).input_ids
        assert tokenizer.pad_token_id is not None
        if kind.startswith("qwen"):
            assert tokenizer.convert_tokens_to_ids("<|im_start|>") in ids
            assert tokenizer.decode(ids) == prompt.get_prompt()
            assert type(tokenizer) is type(AutoTokenizer.from_pretrained(folder))


def test_another_backbone_as_base_is_refused(bases: dict[str, Path], tmp_path: Path) -> None:
    run = build_run(parse_args(command_line(tmp_path, **run_options("qwen2", bases, **HYDRA, max_steps=1))))
    run.trainer.train()
    with pytest.raises(CheckpointError, match=r"llava_qwen2.*llava_mistral"):
        load_pretrained_model(str(tmp_path / "checkpoint-1"), str(bases["mistral"]), device="cpu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2'; backbones here are .*llava_llama.*llava_qwen3"),
        ({"model_type": "llava", "text_config": {}}, r"python -m llava\.convert from-hf"),
        ({"hidden_size": 3}, "None; backbones here"),
        (None, "holds no config.json"),
    ],
)
def test_models_that_are_no_backbone(content: Any, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message):
        backbone_class(tmp_path)
    if content is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "llava"}))
        assert backbone_class(tmp_path).__name__ == "LlavaLlamaForCausalLM", "the first name of upstream's models"


class Dropping(Extension):
    """Replaces the mask before layer 1, as one that drops tokens does."""

    name = "dropping"

    def before_layer(self, model: nn.Module, config: dict, index: int, state: DecoderState) -> DecoderState:
        if index == 1:
            state.causal_mask = None
        return state


@pytest.mark.parametrize("pair", ["mistral", "qwen2, window"], indirect=True)
def test_replacing_masks_of_several_kinds_is_refused(pair: tuple[PreTrainedModel, Any]) -> None:
    _, ours = pair
    ours.extensions.attach(ours, Dropping(), {})
    try:
        if len(set(ours.config.layer_types or ()) if hasattr(ours.config, "layer_types") else ()) > 1:
            with pytest.raises(FlagError, match="masks of several kinds"):
                ours(input_ids=prompts((12,))[0])
        else:
            ours(input_ids=prompts((12,))[0])
    finally:
        ours.extensions._attached.clear()


def test_training_folder_names_the_golden_base(tmp_path: Path) -> None:
    """Upstream's own folders keep their class."""
    assert backbone_class(LLAVA / "tiny-llava-v1.5").__name__ == "LlavaLlamaForCausalLM"
    assert load_config(LLAVA / "tiny-vicuna").model_type == "llava_llama"

"""`--peft_config FILE.json`: each method of PEFT is trained, resumed, loaded and merged by the same battery."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from llava.errors import CheckpointError, FlagError, LlavaError
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import bare_model
from llava.model.components import Component, components
from llava.model.full_weights import write_full_weights
from llava.train.train import build_run, main, parse_args
from tests.llava.train.test_training import BASE, HYDRA, command_line, logits

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]

METHODS: dict[str, dict[str, Any]] = {
    "LoRA": {"peft_type": "LORA", "r": 4, "lora_dropout": 0.1},
    "DoRA": {"peft_type": "LORA", "r": 4, "use_dora": True},
    "rank-stabilized LoRA": {"peft_type": "LORA", "r": 4, "use_rslora": True, "target_modules": ATTENTION},
    "PiSSA": {"peft_type": "LORA", "r": 4, "init_lora_weights": "pissa"},
    "OLoRA": {"peft_type": "LORA", "r": 4, "init_lora_weights": "olora"},
    "VeRA": {"peft_type": "VERA", "r": 8, "target_modules": ["q_proj", "up_proj"]},
    "OFT": {"peft_type": "OFT", "oft_block_size": 4, "target_modules": ATTENTION},
    "LoHa": {"peft_type": "LOHA", "r": 4},
    "IA3": {
        "peft_type": "IA3",
        "target_modules": ["k_proj", "v_proj", "down_proj"],
        "feedforward_modules": ["down_proj"],
    },
    "VB-LoRA": {"peft_type": "VBLORA", "r": 2, "num_vectors": 16, "vector_length": 4, "target_modules": ATTENTION},
    "HydraLoRA": {"peft_type": "HYDRALORA", "r": 4, "lora_nums": 3, "target_modules": ATTENTION},
}
"""Content of the file by method."""

ROUTED = {"HydraLoRA"}
"""Methods whose update depends on the input, so that no weights express it."""


def save(path: Path, content: dict[str, Any]) -> Path:
    path.write_text(json.dumps(content))
    return path


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors") | load_file(folder / "mm_projector.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_method(method: str, tmp_path: Path) -> None:
    """Only adapter and projector are trained; resuming is exact; what is loaded, and merged, is what was trained."""
    file = save(tmp_path / "adapter.json", METHODS[method])
    words = command_line(tmp_path / "out", peft_config=file)
    run = build_run(parse_args(words))
    before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    parts = {part for part, named in components(run.model).items() if any(w.requires_grad for w in named.values())}
    assert parts == {Component.ADAPTER, Component.PROJECTOR}
    run.trainer.train()
    moved = {name for name, weight in run.model.named_parameters() if not torch.equal(weight, before[name])}
    assert any("mm_projector" in name for name in moved)
    assert all(run.model.get_parameter(name).requires_grad for name in moved)

    # Resumed after the second update, with the third one made again.
    (tmp_path / "cut").mkdir()
    shutil.copytree(tmp_path / "out" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    main(command_line(tmp_path / "cut", peft_config=file))
    whole, cut = adapter(tmp_path / "out" / "checkpoint-3"), adapter(tmp_path / "cut")
    second = adapter(tmp_path / "out" / "checkpoint-2")
    assert whole.keys() == cut.keys()
    assert not [name for name in whole if not torch.equal(whole[name], cut[name])]
    assert [name for name in whole if not torch.equal(whole[name], second[name])]

    # Loaded for evaluation: merged where that is possible, which changes the order of sums.
    live = bare_model(run.model).eval()
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([[1, 350, -200, 400, 500, 13]])
    with torch.no_grad():
        expected = live(input_ids=ids, images=torch.randn(1, 3, 28, 28, generator=generator)).logits
    assert not torch.allclose(expected, logits(BASE), atol=1e-3)
    torch.testing.assert_close(logits(tmp_path / "out" / "checkpoint-3"), expected, rtol=0, atol=2e-5)
    if method in ROUTED:
        with pytest.raises(FlagError, match="cannot be merged into weights"):
            write_full_weights(tmp_path / "cut", tmp_path / "merged", str(BASE))
        assert not (tmp_path / "merged").exists()
        return
    write_full_weights(tmp_path / "cut", tmp_path / "merged", str(BASE))
    torch.testing.assert_close(logits(tmp_path / "merged"), expected, rtol=0, atol=2e-5)


FILES: dict[str, tuple[dict[str, Any], str]] = {
    "no method": ({"r": 4}, "peft_type None: known methods that adapt layers are .*HYDRALORA.*VERA"),
    "a prompt": ({"peft_type": "PROMPT_TUNING"}, "known methods that adapt layers"),
    "changing ranks": ({"peft_type": "ADALORA"}, "ADALORA changes its ranks"),
    "an unknown key": ({"peft_type": "LORA", "rank": 4}, r"LORA has no \['rank'\]"),
    "other modules": (
        {"peft_type": "LORA", "modules_to_save": ["lm_head"]},
        "modules_to_save: the projector is trained",
    ),
    "biases": ({"peft_type": "LORA", "bias": "all"}, "bias 'all'"),
    "drawn at the start": ({"peft_type": "LORA", "init_lora_weights": "pissa_niter_4"}, "would draw again"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_is_refused_before_anything_is_loaded(case: str, tmp_path: Path) -> None:
    content, message = FILES[case]
    with pytest.raises(FlagError, match=message):
        parse_args(command_line(tmp_path / "out", peft_config=save(tmp_path / "a.json", content)))


TARGETS: dict[str, tuple[dict[str, Any], str]] = {
    "no such layer": ({"target_modules": ["query"]}, r"target_modules \['query'\]: the decoder's linear layers are"),
    "a pattern of the tower's": ({"target_modules": r".*\.q_proj"}, "matches .*vision_tower"),
    "contradictory": (
        {"r": 4, "use_dora": True, "init_lora_weights": "olora", "lora_dropout": 2},
        "LORA cannot be put",
    ),
}


@pytest.mark.parametrize("case", TARGETS)
def test_settings_that_do_not_fit_the_decoder(case: str, tmp_path: Path) -> None:
    content, message = TARGETS[case]
    file = save(tmp_path / "a.json", {"peft_type": "LORA"} | content)
    with pytest.raises(FlagError, match=message):
        build_run(parse_args(command_line(tmp_path / "out", peft_config=file)))


@pytest.mark.parametrize("flags", [{"lora_enable": True}, {"lora_r": 8}, {"lora_target_modules": "q_proj"}, HYDRA])
def test_two_descriptions_of_an_adapter(flags: dict[str, Any], tmp_path: Path) -> None:
    file = save(tmp_path / "a.json", METHODS["DoRA"])
    with pytest.raises(FlagError, match="the file describes the whole adapter"):
        parse_args(command_line(tmp_path / "out", peft_config=file, **flags))


def test_layers_by_number(tmp_path: Path) -> None:
    content = {"peft_type": "LORA", "r": 2, "target_modules": ["self_attn.q_proj"], "layers_to_transform": [1]}
    run = build_run(parse_args(command_line(tmp_path / "out", peft_config=save(tmp_path / "a.json", content))))
    names = {name.partition(".lora_")[0] for name in components(run.model)[Component.ADAPTER]}
    assert names == {"model.layers.1.self_attn.q_proj"}


def test_another_file_is_another_run(tmp_path: Path) -> None:
    """The content of the file is part of what a run is; a checkpoint of another adapter is not resumed."""
    file = save(tmp_path / "a.json", METHODS["LoRA"])
    main(command_line(tmp_path / "out", peft_config=file, max_steps=2))
    save(file, METHODS["LoRA"] | {"r": 2})
    with pytest.raises(LlavaError, match="--peft_config"):
        main(command_line(tmp_path / "out", peft_config=file, max_steps=2))


def test_a_checkpoint_of_a_prompt_is_not_loaded(tmp_path: Path) -> None:
    main(command_line(tmp_path / "out", lora_enable=True, lora_r=4, max_steps=1))
    path = tmp_path / "out" / "adapter_config.json"
    stored = {"base_model_name_or_path": str(BASE), "peft_type": "PROMPT_TUNING", "num_virtual_tokens": 4}
    save(path, json.loads(path.read_text()) | stored)
    with pytest.raises(CheckpointError, match="adapts no layers"):
        load_pretrained_model(str(tmp_path / "out"), device="cpu")

"""Tokenizer and untrained tiny models: repeatable, in the published layouts, complete enough for everything else."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, CLIPVisionModel, LlamaForCausalLM

from llava.conversation import conv_templates
from llava.runtime.tokenizer import load_tokenizer
from playground.scenes import COLOURS, DIGITS, PLACES, SHAPES
from playground.tiny import TinyFolders, build_tiny
from playground.tokenizer import train_tokenizer


def test_tokenizer_is_repeatable() -> None:
    assert train_tokenizer(0) == train_tokenizer(0)
    assert train_tokenizer(0) != train_tokenizer(1)


@pytest.mark.parametrize(
    "text",
    [
        conv_templates["v1"].system,
        "USER: Which is larger, 3 or 7? ASSISTANT: 7",
        "north red circle, west blue 7",
        "Ünknown wörds, 日本 and 🦙",
    ],
    ids=["system", "question", "caption", "bytes"],
)
def test_tokenizer_round_trip(tiny_folders: TinyFolders, text: str) -> None:
    tokenizer = load_tokenizer(tiny_folders.language_model)
    assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_tokenizer_is_shaped_like_vicunas(tiny_folders: TinyFolders) -> None:
    tokenizer = load_tokenizer(tiny_folders.language_model)
    assert len(tokenizer) < 1000
    assert tokenizer.convert_tokens_to_ids(["<unk>", "<s>", "</s>", "<0x0A>"]) == [0, 1, 2, 13]
    assert tokenizer.tokenize("x</s>USER:")[-2:] == ["USER", ":"]
    assert tokenizer.tokenize("USER:") == ["▁", "USER", ":"]
    assert tokenizer.tokenize("ASSISTANT: ") == ["▁ASSISTANT", ":", "▁"]
    for word in (*COLOURS, *SHAPES, *DIGITS, *PLACES, "yes", "no"):
        assert tokenizer.tokenize(word) == [f"▁{word}"], word
        assert tokenizer.tokenize(f"{word}?") == [f"▁{word}", "?"], word


def test_auto_tokenizer_reads_it(tiny_folders: TinyFolders) -> None:
    pytest.importorskip("google.protobuf", reason="AutoTokenizer converts a tokenizer.model with protobuf only")
    text = "USER: What colour is the circle? ASSISTANT: red"
    ours = load_tokenizer(tiny_folders.language_model)(text).input_ids
    assert AutoTokenizer.from_pretrained(tiny_folders.language_model)(text).input_ids == ours


def test_models_load_from_their_folders(tiny_folders: TinyFolders) -> None:
    tower = CLIPVisionModel.from_pretrained(tiny_folders.tower)
    language_model = LlamaForCausalLM.from_pretrained(tiny_folders.language_model)
    size = tower.config.image_size
    features = tower(torch.zeros(1, 3, size, size), output_hidden_states=True).hidden_states[-2]
    assert features.shape == (1, 10, tower.config.hidden_size)  # class token and 3 x 3 patches
    assert language_model(torch.tensor([[1, 300]])).logits.shape == (1, 2, language_model.config.vocab_size)
    assert (tiny_folders.tower / "preprocessor_config.json").is_file()


def test_same_seed_same_files_other_seed_other_weights(tmp_path: Path) -> None:
    built = [build_tiny(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1))]

    def contents(folders: TinyFolders) -> dict[str, bytes]:
        files = [*folders.tower.iterdir(), *folders.language_model.iterdir()]
        return {path.name if path.parent == folders.tower else f"lm-{path.name}": path.read_bytes() for path in files}

    first, same, other = map(contents, built)
    assert first == same
    for name in ("model.safetensors", "lm-model.safetensors", "lm-tokenizer.model"):
        assert first[name] != other[name]


def test_building_leaves_the_global_random_state_alone(tmp_path: Path) -> None:
    before = torch.random.get_rng_state()
    started = time.process_time()
    build_tiny(tmp_path, 0)
    assert time.process_time() - started < 10  # about one second alone; the limit only notices a change of kind
    assert torch.equal(before, torch.random.get_rng_state())


def test_configuration_of_the_tokenizer_is_llavas(tiny_folders: TinyFolders) -> None:
    config = json.loads((tiny_folders.language_model / "tokenizer_config.json").read_text())
    assert config["legacy"] is False
    assert config["add_bos_token"] is True

"""Which class reads a folder: by model type, architectures or the weights' names; what contradicts is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.errors import CheckpointError
from llava.model.builder import load_pretrained_model
from llava.model.language_model.backbones import backbone_class
from llava.train.train import main as train
from tests.llava.train.test_training import command_line
from tests.model import backbones

pytestmark = pytest.mark.versions

READ_AS = [
    ("qwen2", "llava", ["LlavaQwenForCausalLM"]),
    ("qwen2", "llava_qwen", ["LlavaQwenForCausalLM"]),
    ("qwen2", "llava_qwen", None),
    ("qwen2", "llava_qwen2", ["LlavaQwen2ForCausalLM"]),
    ("qwen2", "llava", None),
    ("qwen3", "llava", ["LlavaQwen3ForCausalLM"]),
    ("qwen3", "llava", None),
    ("mistral", "llava", ["LlavaMistralForCausalLM"]),
    ("mistral", "llava", None),
    ("llama", "llava", ["LlavaLlamaForCausalLM"]),
    ("llama", "llava", None),
    ("llama", "llama", ["LLaMAForCausalLM"]),
    ("llama", "llava_llama", ["LlamaForCausalLM"]),
    ("llama", "llava_llama", ["SomebodysForCausalLM"]),
]
CLASSES = {name: f"Llava{name.title()}ForCausalLM" for name in ("llama", "mistral", "qwen2", "qwen3")}


def write(kind: str, folder: Path, **settings: Any) -> Path:
    """A base with other settings; None takes a key away."""
    backbones.save_base(kind, folder)
    content = json.loads((folder / "config.json").read_text()) | settings
    content = {key: value for key, value in content.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(("kind", "model_type", "architectures"), READ_AS)
def test_read_as(kind: str, model_type: str, architectures: list[str] | None, tmp_path: Path) -> None:
    folder = write(kind, tmp_path / "base", model_type=model_type, architectures=architectures)
    assert backbone_class(folder).__name__ == CLASSES[kind]
    model = load_pretrained_model(str(folder), device="cpu")[1]
    ids = torch.randint(3, 890, (2, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected, found = backbones.plain_model(kind)(ids).logits, model(ids).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


REFUSED = [
    ("qwen2", {"model_type": "llava_llama", "architectures": ["LlavaQwenForCausalLM"]}, "model_type is 'llava_llama'"),
    ("mistral", {"model_type": "mistral", "architectures": ["LlamaForCausalLM"]}, "architectures are .*LlamaForCausal"),
    ("llama", {"model_type": "llava", "architectures": ["LlavaMptForCausalLM"]}, r"LlavaMptForCausalLM.*known here"),
    (
        "llama",
        {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM", "LlavaMistralForCausalLM"]},
        "of several kinds",
    ),
    ("llama", {"model_type": "llava", "architectures": "LlavaLlamaForCausalLM"}, "expected a list of names"),
    ("qwen2", {"model_type": "llava", "architectures": ["LlavaLlamaForCausalLM"]}, r"belong to no part.*k_proj\.bias"),
    ("qwen2", {"model_type": "llama", "architectures": None}, r"belong to no part of a LlavaLlama.*k_proj\.bias"),
    ("qwen3", {"model_type": "llama", "architectures": None}, r"belong to no part of a LlavaLlama.*k_norm"),
    ("llama", {"model_type": "llava", "architectures": ["LlavaQwenForCausalLM"]}, r"(missing|lacks).*k_proj\.bias"),
]


PROGRAMS = {
    "load": lambda folder, output: load_pretrained_model(str(folder), device="cpu"),
    "train": lambda folder, output: train(command_line(output, model_name_or_path=folder, max_steps=1)),
}


@pytest.mark.parametrize(("kind", "settings", "message"), REFUSED)
@pytest.mark.parametrize("program", PROGRAMS)
def test_contradictions_are_refused(
    program: str, kind: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = write(kind, tmp_path / "base", **settings)
    with pytest.raises(CheckpointError, match=message):
        PROGRAMS[program](folder, tmp_path / "out")


FREQUENCIES = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.mark.parametrize(("theta", "fits"), [(1e4, True), (1e6, False)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_stored_frequencies_are_compared(theta: float, fits: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    """Programs of 2023 stored them with each layer."""
    folder = write("llama", tmp_path / "base")
    path = folder / "model.safetensors"
    width = backbones.SIZES["hidden_size"] // backbones.SIZES["num_attention_heads"]
    frequencies = theta ** (-torch.arange(0, width, 2) / width)
    save_file(load_file(path) | {FREQUENCIES: frequencies.to(dtype)}, path, {"format": "pt"})
    if fits:
        load_pretrained_model(str(folder), device="cpu")
        return
    with pytest.raises(CheckpointError, match=r"inv_freq' says .*rope_theta"):
        load_pretrained_model(str(folder), device="cpu")

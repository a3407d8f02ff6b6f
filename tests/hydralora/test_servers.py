"""Exported folders of plain LoRA, read by the loaders of vLLM and SGLang and by llama.cpp's converter.

Neither package belongs to this project's environments: the tests ask for them and skip without. `LLAMA_CPP_DIR` is a
checkout of ggml-org/llama.cpp. No loader needs a GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hydralora import save_as_lora, save_tasks_as_lora
from hydralora.tuner.export.folder import TENSORS
from tests.hydralora.tuner.models import adapted, tiny_llama

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FOLDERS = ["forced", "expert", "tasks/law", "tasks/math"]
PREFIX = "base_model.model."


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, and a folder of plain LoRA for each of `FOLDERS`."""
    root = tmp_path_factory.mktemp("servers")
    model = adapted(target_modules=LINEARS)
    tiny_llama().save_pretrained(root / "base")
    save_as_lora(model, root / "forced", [0.2, 0.5, 0.3])
    save_as_lora(model, root / "expert", 1)
    save_tasks_as_lora(adapted(target_modules=LINEARS, routing="task", tasks=["law", "math"]), root / "tasks")
    return root


def products(folder: Path) -> dict[str, Tensor]:
    """`B A`, (out_features, in_features), by the name of the layer, of a folder as PEFT reads it."""
    tensors = load_file(folder / TENSORS)
    names = {name.rsplit(".", 2)[0] for name in tensors}
    return {
        name.removeprefix(PREFIX): tensors[f"{name}.lora_B.weight"] @ tensors[f"{name}.lora_A.weight"] for name in names
    }


@pytest.mark.parametrize("kind", FOLDERS)
def test_vllm(kind: str, written: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lora_model = pytest.importorskip("vllm.lora.lora_model")
    helper = pytest.importorskip("vllm.lora.peft_helper").PEFTHelper.from_local_dir(written / kind, 256)
    helper.validate_legal(SimpleNamespace(max_lora_rank=helper.r, lora_dtype=None, bias_enabled=False))
    for name in ("PIN_MEMORY", "is_pin_memory_available"):  # its value decides about a copy for a GPU, without one
        if hasattr(lora_model, name):
            monkeypatch.setattr(lora_model, name, False if name.isupper() else lambda: False)
    known: dict[str, Any] = {"peft_helper": helper, "lora_model_id": 1, "device": "cpu", "dtype": torch.float32}
    read = lora_model.LoRAModel.from_local_checkpoint(str(written / kind), set(LINEARS), **known).loras
    expected = products(written / kind)
    assert read.keys() == expected.keys()
    for name, layer in read.items():
        assert layer.scaling == 2
        torch.testing.assert_close(layer.lora_b @ layer.lora_a, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("kind", FOLDERS)
def test_sglang(kind: str, written: Path) -> None:
    lora = pytest.importorskip("sglang.srt.lora.lora")
    config = pytest.importorskip("sglang.srt.lora.lora_config").LoRAConfig(str(written / kind))
    load_config = pytest.importorskip("sglang.srt.configs.load_config").LoadConfig()
    base = SimpleNamespace(num_hidden_layers=2)
    adapter = lora.LoRAAdapter("one", config, base, load_config, None)
    adapter.initialize_weights_from_tensors(load_file(written / kind / TENSORS))
    assert adapter.scaling == 2
    expected = products(written / kind)
    for number, layer in enumerate(adapter.layers):
        # Its loader stacks q, k and v, and gate and up.
        for stack, parts in (
            ("self_attn.qkv_proj", ("q_proj", "k_proj", "v_proj")),
            ("self_attn.o_proj", ("o_proj",)),
            ("mlp.gate_up_proj", ("gate_proj", "up_proj")),
            ("mlp.down_proj", ("down_proj",)),
        ):
            place = f"{PREFIX}model.layers.{number}.{stack}"
            wanted = [expected[f"model.layers.{number}.{stack.split('.')[0]}.{part}"] for part in parts]
            stacked_b = layer.weights[f"{place}.lora_B.weight"].split([len(product) for product in wanted])
            stacked_a = layer.weights[f"{place}.lora_A.weight"].chunk(len(parts))
            for product, a, b in zip(wanted, stacked_a, stacked_b, strict=True):
                torch.testing.assert_close(b @ a, product, rtol=0, atol=0)


@pytest.mark.parametrize("kind", FOLDERS)
def test_llama_cpp(kind: str, written: Path, tmp_path: Path) -> None:
    checkout = os.environ.get("LLAMA_CPP_DIR")
    if not checkout:
        pytest.skip("LLAMA_CPP_DIR names no checkout of ggml-org/llama.cpp")
    package = Path(checkout) / "gguf-py"
    program = [sys.executable, str(Path(checkout) / "convert_lora_to_gguf.py"), "--base", str(written / "base")]
    words = [*program, "--outtype", "f32", "--outfile", str(tmp_path / "lora.gguf"), str(written / kind)]
    path = os.pathsep.join([str(package), *sys.path])
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=os.environ | {"PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(tmp_path / "lora.gguf")
    assert reader.fields["adapter.lora.alpha"].parts[-1][0] == 8
    found = {tensor.name: torch.tensor(tensor.data) for tensor in reader.tensors}
    assert len(found) == 2 * 2 * len(LINEARS)
    expected = products(written / kind)
    down = found["blk.1.ffn_down.weight.lora_b"] @ found["blk.1.ffn_down.weight.lora_a"]
    torch.testing.assert_close(down, expected["model.layers.1.mlp.down_proj"], rtol=0, atol=0)

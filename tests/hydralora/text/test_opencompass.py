"""The configuration for OpenCompass: valid, complete, and its model loads adapters.

OpenCompass itself is not installed with the tests (it needs other versions of numpy and scikit-learn); modules of its
names, with the little that the two files use, stand in for it.
"""

from __future__ import annotations

import copy
import importlib
import runpy
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from hydralora import HydraLoraConfig
from tests.hydralora.text.test_finetune import save_base, save_start

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ROOT / "benchmarks" / "opencompass" / "mmlu.py"
MODEL = "benchmarks.opencompass.model"


class Retriever:
    """Stands for the retrievers."""


class BaseModel:
    """Stands for OpenCompass's class; the tokenizer is loaded as there."""

    def _load_tokenizer(self, path: str, kwargs: dict[str, Any], pad_token_id: int | None = None) -> None:
        self.options = kwargs
        self.tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left", **kwargs)


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    five_examples = {"infer_cfg": {"retriever": {"type": "FixKRetriever", "fix_id_list": [0, 1, 2, 3, 4]}}}
    contents: dict[str, dict[str, Any]] = {
        "mmengine.config": {"read_base": nullcontext},
        "opencompass.openicl.icl_retriever": {"ZeroRetriever": Retriever},
        "opencompass.models": {"HuggingFaceBaseModel": BaseModel},
        "opencompass.configs.datasets.mmlu.mmlu_ppl_ac766d": {
            "mmlu_datasets": [{"abbr": name} | copy.deepcopy(five_examples) for name in ("anatomy", "virology")]
        },
        "opencompass.configs.summarizers.groups.mmlu": {
            "mmlu_summary_groups": [{"name": "mmlu"}, {"name": "mmlu-weighted"}]
        },
    }
    made: dict[str, ModuleType] = {}
    for name, members in contents.items():
        for end in range(1, name.count(".") + 2):
            part = ".".join(name.split(".")[:end])
            made.setdefault(part, ModuleType(part))
        vars(made[name]).update(members)
    for name, module in made.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, MODEL, raising=False)
    monkeypatch.syspath_prepend(str(ROOT))
    return made


def test_the_configuration(stand_ins: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"MODEL": "base", "ADAPTER": "adapter", "GPUS": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("TOKENIZER", raising=False)
    config = {name: value for name, value in runpy.run_path(str(CONFIG)).items() if not name.startswith("__")}
    # OpenCompass writes every name into a file and reads that again; a module or a loop variable would break it.
    assert {name for name, value in config.items() if isinstance(value, dict | list)} == {
        *("datasets", "models", "summarizer", "mmlu_summary_groups")
    }
    assert not [name for name, value in config.items() if isinstance(value, ModuleType)]
    assert [data["infer_cfg"] for data in config["datasets"]] == [{"retriever": {"type": Retriever}}] * 2
    base, adapted = config["models"]
    assert base["type"].__module__ == MODEL
    assert base["path"] == base["tokenizer_path"] == "base"
    assert base["run_cfg"] == {"num_gpus": 2}
    assert adapted == base | {"abbr": "hydralora", "peft_path": "adapter"}
    known = {group["name"] for group in config["summarizer"]["summary_groups"]}
    assert set(config["summarizer"]["dataset_abbrs"]) <= known


@pytest.mark.parametrize("kind", ["ours", "original", None])
def test_the_model(kind: str | None, stand_ins: dict[str, ModuleType], tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    save_start(tmp_path / "original")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
    config = HydraLoraConfig(lora_nums=3, r=4, init_weights=False, target_modules=["q_proj"], task_type="CAUSAL_LM")
    reference = get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config).eval()
    reference.save_pretrained(tmp_path / "ours")
    model = importlib.import_module(MODEL).AdaptedModel()
    model._load_tokenizer(str(tmp_path / "base"), {})
    model._load_model(str(tmp_path / "base"), {"device_map": "cpu"}, peft_path=kind and str(tmp_path / kind))
    assert model.options == {"trust_remote_code": False}
    rows = model.tokenizer.batch_encode_plus(["The tide came in.", "Sand"], return_tensors="pt", padding=True)
    with torch.no_grad():
        ours, base, adapted = (each(**rows).logits for each in (model.model, plain, reference))
    assert torch.equal(ours, base) == (kind is None)
    assert torch.equal(ours, adapted) == (kind == "ours")

"""A run says that its loss is fused only where it will be."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from llava.model.head import LanguageHead
from llava.train import build


def adapted() -> nn.Module:
    model = nn.ModuleDict({"lm_head": LanguageHead(4, 8, bias=False)})
    return inject_adapter_in_model(LoraConfig(r=2, target_modules=["lm_head"]), model)["lm_head"]


@pytest.mark.parametrize(
    ("head", "device", "fused"),
    [
        (LanguageHead(4, 8, bias=False), "cuda", True),
        (LanguageHead(4, 8, bias=False), "cpu", False),
        (LanguageHead(4, 8, bias=True), "cuda", False),
        (adapted(), "cuda", False),
    ],
    ids=["plain", "CPU", "bias", "adapter"],
)
def test_it_is_said_where_it_will_be(
    head: nn.Module, device: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(build, "liger_loss", lambda: torch.add)
    monkeypatch.setattr(build, "say", lambda args, *words: said.append(words[-1]))
    args = SimpleNamespace(training=SimpleNamespace(device=torch.device(device)))
    build.use_fused_loss(SimpleNamespace(get_output_embeddings=lambda: head), args)
    assert said == ["of trained tokens, fused by liger-kernel"] * fused
    assert (getattr(head, "fused", None) is not None) == fused

"""What of a run's checkpoints needs no whole checkout: DeepSpeed's, without frozen parameters; and the whole check."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

from moe_patch.payload.saving import let_frozen_be_missing

ROOT = Path(__file__).resolve().parent.parent.parent


def half_frozen() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    return model


class TestFrozenParameters:
    def test_they_stay_as_they_are_and_the_others_are_read(self) -> None:
        model, saved = half_frozen(), half_frozen()
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        trained = {name: tensor for name, tensor in saved.state_dict().items() if name.startswith("1.")}
        with pytest.raises(RuntimeError, match="Missing key"):
            model.load_state_dict(trained)
        let_frozen_be_missing(model)
        model.load_state_dict(trained)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, trained.get(name, before[name])), name

    def test_a_trained_one_may_not_be_missing(self) -> None:
        model = half_frozen()
        let_frozen_be_missing(model)
        state = model.state_dict()
        del state["1.bias"]
        with pytest.raises(ValueError, match=r"lacks 1 trained tensors, first \['1.bias'\]"):
            model.load_state_dict(state)
        model.load_state_dict(state, strict=False)

    def test_nor_may_there_be_others(self) -> None:
        model = half_frozen()
        let_frozen_be_missing(model)
        with pytest.raises(ValueError, match=r"1 unknown ones, first \['2.bias'\]"):
            model.load_state_dict({**model.state_dict(), "2.bias": torch.zeros(2)})


@pytest.mark.parametrize("given", [False, True])
def test_the_whole_check_has_the_checkout_if_one_is_given(given: bool, tmp_path: Path) -> None:
    """`.ci/run`, with a `make` that notes what it is asked for."""
    shutil.copytree(ROOT / ".ci", tmp_path / "clone" / ".ci")
    make = tmp_path / "make"
    make.write_text(f'#!/bin/sh\necho "$1 $LLAVA_UPSTREAM_DIR" >> {tmp_path}/asked\n')
    make.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if name != "LLAVA_UPSTREAM_DIR"}
    environment |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | ({"LLAVA_UPSTREAM_DIR": "/there"} if given else {})
    command = [str(tmp_path / "clone" / ".ci" / "run")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    asked = (tmp_path / "asked").read_text().split("\n")
    assert ("test-upstream /there" in asked) == given
    assert ("test-upstream: not run" in done.stdout) != given
    assert len(asked) - 1 == 4 + given

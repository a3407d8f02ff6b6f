"""Ids on a model hub, served from a cache folder as the hub's own library lays it out; nothing is fetched."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants

from llava.errors import CheckpointError
from llava.model.builder import load_pretrained_model
from llava.runtime.hub import TOKENIZER_FILES, is_hub_id, local_folder
from llava.runtime.tokenizer import load_tokenizer
from tests.golden import golden_dir

COMMIT = "0123456789abcdef0123456789abcdef01234567"
BASE = golden_dir("llava") / "tiny-llava-v1.5"


def put(cache: Path, name: str, source: Path) -> None:
    folder = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(source, folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("liuhaotian/llava-v1.5-7b", True),
        ("./liuhaotian/llava", False),
        ("/owner/name", False),
        ("name", False),
        ("checkpoints/a/b", False),
        ("owner/", False),
    ],
)
def test_what_is_an_id(name: str, expected: bool) -> None:
    assert is_hub_id(name) is expected


def test_a_model_on_the_hub(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(cache, "owner/tiny-llava", BASE)
    put(cache, "owner/tiny-clip", golden_dir("llava") / "tiny-clip")
    monkeypatch.chdir(cache)
    folder = local_folder("owner/tiny-llava")
    assert (folder / "config.json").is_file()
    shutil.copytree(golden_dir("llava") / "tiny-clip", folder / "tiny-clip")
    tokenizer, model, _, _ = load_pretrained_model("owner/tiny-llava", device="cpu")
    reference_tokenizer, reference, _, _ = load_pretrained_model(str(BASE), device="cpu")
    ids = torch.tensor([[1, 350, 400, 13]])
    assert torch.equal(model(input_ids=ids).logits, reference(input_ids=ids).logits)
    assert tokenizer("a word").input_ids == reference_tokenizer("a word").input_ids
    assert len(load_tokenizer("owner/tiny-llava")) == len(tokenizer)


def test_a_folder_wins_over_an_id(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cache)
    (cache / "owner" / "here").mkdir(parents=True)
    assert local_folder("owner/here") == Path("owner/here")
    assert local_folder("no/folder/at/all") == Path("no/folder/at/all")


def test_what_cannot_be_fetched_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(cache)
    with pytest.raises(CheckpointError, match="owner/missing: there is no such folder, and it cannot be fetched"):
        local_folder("owner/missing", TOKENIZER_FILES)
    with pytest.raises(CheckpointError, match="owner/missing"):
        load_pretrained_model("owner/missing", device="cpu")

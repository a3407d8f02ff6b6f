"""`--push_to_hub`: the finished folder once, with all that loads it and a card; refused before training, or retried."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import PeftModel
from transformers import AutoModelForCausalLM

from hydralora import finetune
from llava.errors import FlagError, PublishingError
from llava.model.builder import load_pretrained_model
from llava.runtime.publishing import access
from llava.runtime.publishing.card import Kind, write_card
from llava.train import publish
from llava.train.train import main, parse_args
from mma.lavin.train import main as train_lavin
from tests.fake_hub import USER, FakeHub, fake_hub
from tests.hydralora.text import test_finetune
from tests.llava.train.test_training import BASE, HYDRA, command_line, logits
from tests.mma.lavin.lavin_files import save_lavin_files, tiny_words

__all__ = ["fake_hub"]

NAME = f"{USER}/tiny"
PUSH = {"push_to_hub": True, "hub_model_id": NAME, "max_steps": 2, "save_steps": 1}
LORA = {"lora_enable": True, "lora_r": 4}

KINDS: dict[str, tuple[dict[str, Any], set[str], bool]] = {
    "full": ({}, {"model.safetensors", "generation_config.json"}, False),
    "lora": (LORA, {"adapter_config.json", "adapter_model.safetensors", "mm_projector.safetensors"}, True),
    "hydralora": (
        HYDRA,
        {
            *("adapter_config.json", "adapter_model.safetensors", "mm_projector.safetensors"),
            *("extensions/hydralora/config.json", "extensions/hydralora/model.safetensors"),
        },
        True,
    ),
    "projector": ({"tune_mm_mlp_adapter": True}, {"mm_projector.safetensors"}, True),
}
"""Options, files that only this kind has, and whether a base is needed."""

ALWAYS = {"README.md", "run.json", "config.json", "checkpoint_files.json", "tokenizer.model", "tokenizer_config.json"}


def prompt_logits(model: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    ids = torch.tensor([[1, 350, -200, 400, 500, 13]])
    with torch.no_grad():
        return model(input_ids=ids, images=torch.randn(1, 3, 28, 28, generator=generator)).logits


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_pushed_loads_again(kind: str, tmp_path: Path, fake_hub: FakeHub) -> None:
    """One commit with everything that a reader needs, elsewhere and without what only this machine has."""
    options, files, needs_base = KINDS[kind]
    output = main(command_line(tmp_path / "out", **PUSH, **options))
    assert len(fake_hub.commits) == 1
    pushed = fake_hub.files(NAME)
    assert files | ALWAYS <= pushed
    assert {"vision_tower/config.json", "vision_tower/preprocessor_config.json"} <= pushed
    assert pushed & {"vision_tower/model.safetensors", "vision_tower/pytorch_model.bin"}
    assert not [
        name for name in pushed if name.startswith(("checkpoint-", "tmp-", "optimizer", "trainer_state", "rng"))
    ]
    for name in pushed:
        if name.endswith((".json", ".md")):
            assert str(tmp_path) not in fake_hub.folder(NAME).joinpath(name).read_text(), name
    elsewhere = shutil.copytree(fake_hub.folder(NAME), tmp_path / "elsewhere" / "download")
    base = str(BASE) if needs_base else None
    _, model, processor, _ = load_pretrained_model(str(elsewhere), base, device="cpu")
    assert processor is not None
    torch.testing.assert_close(prompt_logits(model), logits(output), rtol=0, atol=0)


def test_peft_reads_what_was_pushed(tmp_path: Path, fake_hub: FakeHub) -> None:
    """PEFT alone reads the adapter onto the base; the projector is the base's, as it was not trained."""
    output = main(command_line(tmp_path / "out", **PUSH, **LORA, freeze_mm_mlp_adapter=True))
    _, base, _, _ = load_pretrained_model(str(BASE), device="cpu")
    untrained = prompt_logits(base)
    model = PeftModel.from_pretrained(base, str(fake_hub.folder(NAME))).eval()
    found = prompt_logits(model)
    assert not torch.allclose(found, untrained, atol=1e-4)
    torch.testing.assert_close(found, logits(output), rtol=0, atol=1e-5)  # merged there: sums in another order


def test_the_card(tmp_path: Path, fake_hub: FakeHub) -> None:
    options = {"hub_base_model": "liuhaotian/llava-v1.5-7b", "hub_license": "llama2"}
    main(command_line(tmp_path / "out", **PUSH, **HYDRA, **options))
    card = ModelCard.load(fake_hub.folder(NAME) / "README.md")
    data = card.data.to_dict()
    assert data["base_model"] == "liuhaotian/llava-v1.5-7b"
    assert data["base_model_relation"] == "adapter"
    assert data["license"] == "llama2"
    assert data["pipeline_tag"] == "image-text-to-text"
    assert {"llava", "hydralora"} <= set(data["tags"])
    for words in ("finetune.json", "rank 4", "extension `hydralora`", "| `learning_rate` | `0.01` |", "2 updates"):
        assert words in card.text, words
    assert "hub_token" not in card.text
    recorded = json.loads((fake_hub.folder(NAME) / "run.json").read_text())["arguments"]["model"]
    assert recorded["model_name_or_path"] == "liuhaotian/llava-v1.5-7b"


def test_a_base_that_has_moved_is_not_taken_for_an_id(tmp_path: Path) -> None:
    """`models/base` was a folder when the run read it, and so was `data/mine`; a data set is named by its id."""
    record = {"model": {"model_name_or_path": "models/base"}, "data": {"data_path": ["owner/set@0.5", "data/mine"]}}
    data = {"data_path": "owner/set:0123@0.5 4567"}
    cards = []
    for prints in ({"model_name_or_path": "0123", **data}, data, {}):
        folder, staged = tmp_path / f"run-{len(prints)}", tmp_path / f"staged-{len(prints)}"
        folder.mkdir()
        staged.mkdir()
        (folder / "run.json").write_text(json.dumps({"arguments": record, "fingerprints": prints, "versions": {}}))
        destination = access.Destination("me/x", license="mit")
        cards.append(write_card(folder, staged, destination, Kind("text-generation", (), "m", "u")).data.to_dict())
    assert [card.get("base_model") for card in cards] == [None, "models/base", "models/base"]
    assert [card.get("datasets") for card in cards] == [["owner/set"], ["owner/set"], None]


def test_scores_of_benchmarks_are_in_the_metadata(tmp_path: Path, fake_hub: FakeHub) -> None:
    output = main(command_line(tmp_path / "out", **LORA, max_steps=1))
    result = {"benchmark": "textvqa", "title": "TextVQA", "split": "val", "metrics": {"accuracy": 58.25}}
    (tmp_path / "a.result.json").write_text(json.dumps(result))
    words = [str(output), "--hub_model_id", "tiny", "--results", str(tmp_path / "a.result.json")]
    assert publish.main(words).endswith(NAME)
    card = ModelCard.load(fake_hub.folder(NAME) / "README.md")
    (score,) = card.data.eval_results
    assert (score.dataset_type, score.metric_type, score.metric_value) == ("textvqa", "accuracy", 58.25)
    assert "| TextVQA (val) | accuracy | 58.25 |" in card.text


READER = {"name": USER, "orgs": [], "auth": {"accessToken": {"role": "read"}}}
FINE = {"name": USER, "auth": {"accessToken": {"role": "fineGrained", "fineGrained": {"scoped": []}}}}
MEMBER = {"name": USER, "orgs": [{"name": "lab", "roleInOrg": "read"}]}

BEFORE: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "another's": ({}, {"hub_model_id": "nobody/tiny"}, "not a member of nobody"),
    "a reading token": ({"whoami": READER}, {}, "may only read"),
    "a token without the permission": ({"whoami": FINE}, {}, "repo.write"),
    "a reading member": ({"whoami": MEMBER}, {"hub_model_id": "lab/tiny"}, "role of somebody in lab is read"),
    "a hub that is not there": ({"reachable": False}, {}, "no network"),
}


@pytest.mark.parametrize("case", BEFORE)
def test_what_cannot_be_published_is_refused_before_the_training(case: str, tmp_path: Path, fake_hub: FakeHub) -> None:
    hub, options, message = BEFORE[case]
    for name, value in hub.items():
        setattr(fake_hub, name, value)
    with pytest.raises(FlagError, match=message):
        main(command_line(tmp_path / "out", **PUSH | options))
    assert not (tmp_path / "out").exists()
    assert not fake_hub.commits


def test_a_repository_that_may_not_be_written(tmp_path: Path, fake_hub: FakeHub) -> None:
    fake_hub.folder(NAME).mkdir(parents=True)
    fake_hub.writable = False
    with pytest.raises(FlagError, match="403"):
        main(command_line(tmp_path / "out", **PUSH))


OPTIONS = {
    "every_save": ({"hub_strategy": "every_save"}, r"--hub_strategy every_save: .* pass end"),
    "checkpoint": ({"hub_strategy": "checkpoint"}, "--hub_strategy checkpoint"),
    "all_checkpoints": ({"hub_strategy": "all_checkpoints"}, "--hub_strategy all_checkpoints"),
    "no name": ({"hub_model_id": "a/b/c"}, "--hub_model_id a/b/c: is not the name"),
    "no publishing": ({"push_to_hub": False}, r"--hub_model_id .* without --push_to_hub"),
}


@pytest.mark.parametrize("case", OPTIONS)
def test_options_of_publishing_that_are_refused(case: str, tmp_path: Path, fake_hub: FakeHub) -> None:
    options, message = OPTIONS[case]
    with pytest.raises(FlagError, match=message):
        parse_args(command_line(tmp_path / "out", **PUSH | options))


def test_no_token_and_no_network_are_noticed_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(access, "get_token", lambda: None)
    with pytest.raises(FlagError, match="there is no token"):
        parse_args(command_line(tmp_path / "out", **PUSH))
    parse_args(command_line(tmp_path / "out", **PUSH, **{"hub_token": "given"}))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FlagError, match="HF_HUB_OFFLINE"):
        parse_args(command_line(tmp_path / "out", **PUSH, **{"hub_token": "given"}))


def test_an_upload_that_fails_loses_nothing(tmp_path: Path, fake_hub: FakeHub, capsys: pytest.CaptureFixture) -> None:
    """The message has a command, and that command publishes the same files."""
    fake_hub.uploads = False
    options = LORA | {"hub_license": "mit", "hub_private_repo": True, "hub_token": "secret"}
    with pytest.raises(PublishingError, match="connection lost") as caught:
        main(command_line(tmp_path / "out", **PUSH, **options))
    assert "Training finished" in capsys.readouterr().out
    command = str(caught.value).splitlines()[-1].split()
    assert command[:3] == ["python", "-m", "llava.train.publish"]
    assert "secret" not in str(caught.value)
    assert "secret" not in (tmp_path / "out" / "run.json").read_text()
    fake_hub.uploads = True
    publish.main(command[3:])
    assert ALWAYS | {"adapter_model.safetensors"} <= fake_hub.files(NAME)
    assert fake_hub.private == {NAME: True}
    assert "license: mit" in (fake_hub.folder(NAME) / "README.md").read_text()


def test_a_second_publication_replaces_the_first(tmp_path: Path, fake_hub: FakeHub) -> None:
    """Files of the first that the second lacks are gone; a card that somebody wrote, and other files, stay."""
    main(command_line(tmp_path / "first", **PUSH, **HYDRA))
    folder = fake_hub.folder(NAME)
    (folder / "README.md").write_text("My own card")
    (folder / "picture.png").write_bytes(b"png")
    main(command_line(tmp_path / "second", **PUSH, tune_mm_mlp_adapter=True))
    files = fake_hub.files(NAME)
    assert {"README.md", "picture.png", "mm_projector.safetensors"} <= files
    assert not [name for name in files if name.startswith(("extensions/", "adapter_"))]
    assert (folder / "README.md").read_text() == "My own card"
    assert len(fake_hub.commits) == 2


def test_a_text_adapter(tmp_path: Path, fake_hub: FakeHub) -> None:
    """`hydralora.finetune` publishes its adapter, which PEFT reads onto the base with the same logits."""
    base = test_finetune.save_base(tmp_path / "base")
    test_finetune.save_data(tmp_path / "data")
    options = {"push_to_hub": True, "hub_model_id": NAME, "max_steps": 2}
    adapter = finetune.main(test_finetune.command_line(tmp_path, tmp_path / "out", **options))
    assert len(fake_hub.commits) == 1
    pushed = fake_hub.files(NAME)
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.model", "run.json", "README.md"} <= pushed
    assert not [name for name in pushed if name.startswith(("checkpoint-", "optimizer", "training_args"))]
    ids = torch.tensor([[1, 350, 400, 500, 13]])
    found = []
    for folder in (adapter, fake_hub.folder(NAME)):
        model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(folder)).eval()
        with torch.no_grad():
            found.append(model(input_ids=ids).logits)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)
    card = ModelCard.load(fake_hub.folder(NAME) / "README.md")
    assert card.data.to_dict()["library_name"] == "peft"
    assert "import hydralora" in card.text
    assert str(tmp_path) not in card.text


def test_a_lavin(tmp_path: Path, fake_hub: FakeHub) -> None:
    """`mma.train` publishes adapters and projector; they load onto the converted base with the same logits."""
    files = save_lavin_files(tmp_path / "files")
    words = ["--max_steps", "1", "--push_to_hub", "True", "--hub_model_id", NAME]
    output = train_lavin(tiny_words(files, tmp_path / "out", *words))
    assert len(fake_hub.commits) == 1
    files_there = fake_hub.files(NAME)
    assert {"extensions/mma/model.safetensors", "mm_projector.safetensors", "config.json", "README.md"} <= files_there
    base = json.loads((output / "run.json").read_text())["arguments"]["model"]["model_name_or_path"]
    ids = torch.tensor([[1, -200, 4, 5, 6]])
    found = []
    for folder in (output, fake_hub.folder(NAME)):
        _, model, processor, _ = load_pretrained_model(str(folder), base, device="cpu")
        size = processor.crop_size["height"]
        images = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(3))
        with torch.no_grad():
            found.append(model(input_ids=ids, images=images).logits)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_a_branch(tmp_path: Path, fake_hub: FakeHub) -> None:
    main(command_line(tmp_path / "out", **PUSH, **LORA, hub_revision="v2"))
    assert fake_hub.files(NAME) == set()
    assert (fake_hub.folder(NAME, "v2") / "adapter_model.safetensors").is_file()


def test_a_folder_that_is_not_finished(tmp_path: Path, fake_hub: FakeHub) -> None:
    shutil.copytree(BASE, tmp_path / "base")
    with pytest.raises(ValueError, match="has no checkpoint_files"):
        publish.main([str(tmp_path / "base"), "--hub_model_id", "tiny"])

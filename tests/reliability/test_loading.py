"""Damaged folders: what loads computes the numbers of the undamaged one; all else is an error that names the file.

`LLAVA_FUZZ=all` tries every damage, a seeded choice runs otherwise (see `choice.py`).
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from llava.errors import CheckpointError
from llava.model.builder import load_pretrained_model
from llava.model.formats import inspect_checkpoint
from llava.runtime.recognize import POINTER
from llava.runtime.weights.completeness import FILE_LIST
from llava.runtime.weights.tensors import is_finite
from llava.train.train import main
from tests.llava.train.test_training import BASE, HYDRA, command_line
from tests.reliability.choice import chosen
from tests.reliability.damage import POINTER as POINTER_TEXT
from tests.reliability.damage import Damage, damages
from tests.reliability.loading import LLAVA, SUBJECTS, Subject, judge, numbers

OURS = "a run of ours"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with every kind of part: adapter, extension, projector, image tokens, tower."""
    folder = tmp_path_factory.mktemp("ours") / "trained"
    options = {"max_steps": 1, "save_strategy": "no", "mm_use_im_start_end": True, "unfreeze_mm_vision_tower": True}
    main(command_line(folder, **HYDRA | options))
    return folder


@pytest.fixture
def subject(request: pytest.FixtureRequest, trained: Path) -> Subject:
    if request.param == OURS:
        return Subject((trained, BASE, LLAVA / "tiny-clip"), trained.name, trained.name, BASE.name)
    return SUBJECTS[request.param]


def matters(name: str) -> bool:
    """Of a full CLIP, the tensors that features depend on: the text model and the last layer do not."""
    return "text_" not in name and "layers.2." not in name and name != "logit_scale"


UNREAD = ("run.json", "training_args.bin", "trainer_state.json", "README.md")


def undetectable(damage: Damage) -> bool:
    """What a reader cannot tell from another intended folder.

    Published folders carry no digests, so a flipped byte within the text of a SentencePiece model makes another valid
    model; values that are possible settings count as edits.
    """
    return damage.file == "tokenizer.model" and "byte" in damage.kind


@pytest.mark.parametrize("subject", [*SUBJECTS, OURS], indirect=True)
def test_damaged_folders(subject: Subject, tmp_path: Path) -> None:
    """The corpus."""
    folder = subject.copy(tmp_path)
    whole = numbers(tmp_path, subject)
    all_of_them = damages(folder, matters if "clip" in subject.damaged else lambda name: True)
    all_of_them = [each for each in all_of_them if each.file not in UNREAD]
    tried = chosen(all_of_them, 10)
    verdicts = {damage.name: judge(subject, damage, tmp_path, whole) for damage in tried if not undetectable(damage)}
    faults = [f"{name}: {found}" for name, found in verdicts.items() if found.startswith("FAULT")]
    assert not faults, "\n".join(faults)
    assert len(verdicts) > 5


def test_the_corpus_finds_faults(tmp_path: Path) -> None:
    """Negative control: a change of a value that is possible shows as other numbers, not as equal."""
    subject = SUBJECTS["full weights"]
    subject.copy(tmp_path)
    whole = numbers(tmp_path, subject)

    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))

    assert judge(subject, Damage("config.json", "edited", edit), tmp_path, whole).startswith("FAULT: other logits")


def load(folder: Path) -> None:
    load_pretrained_model(str(folder), str(BASE), device="cpu")


NAMED = ["extensions", "extensions/hydralora", "extensions/hydralora/config.json", "vision_tower"]
NAMED += ["extensions/hydralora/model.safetensors", "adapter_model.safetensors", "adapter_config.json"]
NAMED += ["mm_projector.safetensors", "image_tokens.safetensors", "vision_tower/model.safetensors"]
NAMED += ["vision_tower/config.json", "vision_tower/preprocessor_config.json"]


@pytest.mark.parametrize("recorded", [True, False], ids=["recorded", "no record"])
@pytest.mark.parametrize("part", NAMED)
def test_a_part_that_is_named_is_required(part: str, recorded: bool, trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "copy")
    if not recorded:
        (folder / FILE_LIST).unlink()
    inspect_checkpoint(folder)
    path = folder / part
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()
    with pytest.raises(CheckpointError, match=path.name) as caught:
        load(folder)
    if recorded:
        assert FILE_LIST in str(caught.value)


def test_a_key_within_an_object_is_recorded(trained: Path, tmp_path: Path) -> None:
    """Without <im_start> among the added tokens, the ids of the two border tokens would change places."""
    folder = shutil.copytree(trained, tmp_path / "copy")
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    removed = min(settings["added_tokens_decoder"], key=int)
    path.write_text(json.dumps(settings | {"chat_template": None, "comment": {"any": 1}}))
    inspect_checkpoint(folder)
    del settings["added_tokens_decoder"][removed]
    path.write_text(json.dumps(settings))
    with pytest.raises(CheckpointError, match=rf"tokenizer_config\.json: lacks \['added_tokens_decoder/{removed}'\]"):
        load(folder)


def test_extensions_named_differently(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "copy")
    (folder / FILE_LIST).unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"extensions": {}}))
    with pytest.raises(
        CheckpointError, match=r"extensions/hydralora: is an extension that .*config\.json does not name"
    ):
        load(folder)


def spoiled(part: str, change: Callable[[Tensor], Tensor], trained: Path, folder: Path) -> Path:
    """A copy without record, one tensor of a part changed."""
    shutil.copytree(trained, folder)
    (folder / FILE_LIST).unlink()
    tensors = load_file(folder / part)
    name = sorted(tensors)[0]
    save_file(tensors | {name: change(tensors[name])}, folder / part, {"format": "pt"})
    return folder


WEIGHTS = ["extensions/hydralora/model.safetensors", "adapter_model.safetensors", "mm_projector.safetensors"]
WEIGHTS += ["image_tokens.safetensors", "vision_tower/model.safetensors"]
NOT_NUMBERS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "NaN": (lambda tensor: torch.full_like(tensor, float("nan")), "NaN or infinite"),
    "infinite": (lambda tensor: tensor + float("inf"), "NaN or infinite"),
    "integers": (lambda tensor: tensor.to(torch.int32), r"torch\.int32"),
    "bools": (lambda tensor: tensor.bool(), r"torch\.bool"),
}


@pytest.mark.parametrize("kind", NOT_NUMBERS)
@pytest.mark.parametrize("part", WEIGHTS)
def test_weights_that_are_not_numbers(part: str, kind: str, trained: Path, tmp_path: Path) -> None:
    change, said = NOT_NUMBERS[kind]
    with pytest.raises(CheckpointError, match=rf"{Path(part).name}: '.*' (is|contains) {said}"):
        load(spoiled(part, change, trained, tmp_path / "copy"))


@pytest.mark.parametrize("kind", NOT_NUMBERS)
@pytest.mark.parametrize("as_base", [False, True], ids=["checkpoint", "base"])
def test_full_weights_that_are_not_numbers(kind: str, as_base: bool, trained: Path, tmp_path: Path) -> None:
    change, said = NOT_NUMBERS[kind]
    for source in (BASE, trained, LLAVA / "tiny-clip"):
        shutil.copytree(source, tmp_path / source.name)
    shard = sorted((tmp_path / BASE.name).glob("pytorch_model-*.bin"))[0]
    tensors = torch.load(shard, weights_only=True)
    name = "model.layers.0.self_attn.q_proj.weight"
    torch.save(tensors | {name: change(tensors[name])}, shard)
    base = str(tmp_path / BASE.name)
    with pytest.raises(CheckpointError, match=rf"{shard.name}: '{name}' (is|contains) {said}"):
        load_pretrained_model(*([str(tmp_path / "trained"), base] if as_base else [base]), device="cpu")
    with pytest.raises(CheckpointError, match=rf"{shard.name}: '{name}'"):
        main(command_line(tmp_path / "out", model_name_or_path=base, lora_enable=True, max_steps=1))


def test_finite_values_of_every_type() -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn):
        assert is_finite(torch.full((3, 3), 400.0).to(dtype))
    assert is_finite(torch.full((4096,), 60000.0, dtype=torch.float16)), "their sum is infinite in float16"
    assert not is_finite(torch.tensor([float("inf"), float("-inf")]))
    assert not is_finite(torch.tensor([60000.0] * 9 + [float("nan")], dtype=torch.float16))
    assert is_finite(torch.empty(0))


def test_looking_at_weights_is_fast() -> None:
    """At least a gigabyte per second, on one busy core: 13 GB in seconds."""
    weights = torch.randn(4096, 11008).to(torch.bfloat16)
    is_finite(weights)
    started = time.perf_counter()
    is_finite(weights)
    assert time.perf_counter() - started < weights.nbytes / 1e9 * 4


FILES = [*(path.relative_to(BASE).as_posix() for path in sorted(BASE.iterdir())), "../tiny-clip/pytorch_model.bin"]
FILES += ["../tiny-clip/config.json", "../tiny-clip/preprocessor_config.json"]


@pytest.mark.parametrize("file", FILES)
def test_a_git_lfs_pointer_is_called_that(file: str, tmp_path: Path) -> None:
    for source in (BASE, LLAVA / "tiny-clip"):
        shutil.copytree(source, tmp_path / source.name)
    path = tmp_path / BASE.name / file
    assert POINTER_TEXT.encode().startswith(POINTER)
    path.write_text(POINTER_TEXT)
    with pytest.raises(CheckpointError, match=rf"{path.name}: is a Git LFS pointer.*git lfs pull"):
        load_pretrained_model(str(tmp_path / BASE.name), device="cpu")

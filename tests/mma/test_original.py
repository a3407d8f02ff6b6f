"""Files of the original: read with and without `module.`, loaded, equal to the golden model, and written back."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPVisionModel, LlamaConfig

from llava.errors import CheckpointError
from llava.model.builder import load_pretrained_model
from llava.runtime.weights.fingerprint import weights_fingerprint
from mma import original as convert
from mma.config import MmaConfig
from mma.lavin import demo
from mma.lavin import eval as mma_eval
from mma.lavin.adapter_files import export_file, import_file, ready_folder
from mma.lavin.convert import main
from tests.golden import golden_dir, load_case
from tests.llava.train.test_training import BASE, LLAVA, command_line
from tests.llava.train.test_training import main as train
from tests.mma.golden_model import golden_model, llama_tensors, spliced_rows, write_tower
from tests.mma.test_golden_inference import prompt

CASES = {"train_attn_mixed": ("attn", "router"), "train_block": ("block", "router"),
         "train_attn_visual_normal": ("attn", "normal")}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The golden LLaMA in transformers' layout, with a tokenizer (of other words, which nothing here reads)."""
    folder = tmp_path_factory.mktemp("base")
    llama = load_case("lavin", "train_attn_mixed")[0]["config"]["llama"]
    LlamaConfig(
        hidden_size=llama["dim"], num_hidden_layers=llama["n_layers"], num_attention_heads=llama["n_heads"],
        vocab_size=llama["vocab_size"], intermediate_size=llama["ffn_hidden"], rms_norm_eps=llama["norm_eps"],
        architectures=["LlamaForCausalLM"], max_position_embeddings=256,
    ).save_pretrained(folder)  # fmt: skip
    tensors = {name: value.contiguous() for name, value in llama_tensors(llama["n_heads"]).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copyfile(golden_dir("llava") / "tiny-vicuna" / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def tower(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tower(tmp_path_factory.mktemp("tower"), load_case("lavin", "train_attn_mixed")[0]["config"])


def published(name: str, path: Path, prefix: str = "", **more: Any) -> Path:
    """A file as the original writes it, with the adapters of a golden case."""
    _, tensors = load_case("lavin", name)
    adapters = {f"{prefix}{key.removeprefix('w/')}": value for key, value in tensors.items() if key.startswith("w/")}
    torch.save({"model": adapters, "epoch": 3, "scaler": {}, "optimizer": {"state": {}}} | more, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", CASES)
def test_a_published_file_gives_loss_and_logits(
    name: str, prefix: str, base: Path, tower: Path, tmp_path: Path
) -> None:
    case, tensors = load_case("lavin", name)
    adapter = case["config"]["adapter"]
    settings = {key: adapter[key] for key in convert.SETTINGS}
    said = {"args": argparse.Namespace(**settings, device="cuda")} if prefix else {}
    file = published(name, tmp_path / "lavin.pth", prefix, **said)
    main([
        "import", str(file), str(tmp_path / "ours"), "--base", str(base), "--vision_tower", str(tower),
        *(() if said else (word for key, value in settings.items() for word in (f"--{key}", str(value)))),
    ])  # fmt: skip
    _, model, processor, _ = load_pretrained_model(str(tmp_path / "ours"), device="cpu")
    assert processor.image_mean == [0.485, 0.456, 0.406]
    config = MmaConfig.from_dict(model.extensions.configs["mma"])
    assert (config.adapter_type, config.visual_adapter_type) == CASES[name]
    assert {key: getattr(config, key) for key in convert.SETTINGS} == settings
    reference, _, _ = golden_model(name, tmp_path)
    model.config.tokenizer_model_max_length = reference.config.tokenizer_model_max_length
    ids, labels = spliced_rows(case, tensors)
    inputs = {
        "input_ids": ids,
        "labels": labels,
        "images": tensors["in/images"],
        "attention_mask": torch.ones_like(ids),
    }
    ours, expected = model(**inputs), reference(**inputs)
    assert torch.equal(ours.logits, expected.logits)
    assert torch.equal(ours.loss, expected.loss)


def test_a_published_file_gives_the_tokens(base: Path, tower: Path, tmp_path: Path) -> None:
    """Of each prompt alone, by the original's positions."""
    case, tensors = load_case("lavin", "infer_attn")
    folder = import_file(published("infer_attn", tmp_path / "lavin.pth"), tmp_path / "ours", base, str(tower))
    stored = folder / "extensions" / "mma" / "config.json"
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"shifted_decoding": True}))
    _, model, _, _ = load_pretrained_model(str(folder), device="cpu")
    model.generation_config.eos_token_id = None  # the original never stops
    for row, ids in enumerate(case["prompt_tokens"]):
        tokens = tensors[f"out/alone_{row}_tokens"]
        answer = model.generate(
            prompt(case, tensors["out/tokens"], row, len(ids))[None],
            images=tensors["in/images"][row : row + 1],
            do_sample=False,
            max_new_tokens=len(tokens) - len(ids),
        )
        assert torch.equal(answer[0], tokens[len(ids) :])


def test_there_and_back_is_exact(base: Path, tower: Path, tmp_path: Path) -> None:
    file = published("train_block", tmp_path / "lavin.pth", "module.")
    import_file(file, tmp_path / "ours", base, str(tower), adapter_scale=0.5)
    main(["export", str(tmp_path / "ours"), str(tmp_path / "back.pth")])
    before, after = convert.read(file), convert.read(tmp_path / "back.pth")
    assert before.tensors.keys() == after.tensors.keys()
    assert all(torch.equal(value, after.tensors[name]) for name, value in before.tensors.items())
    assert after.settings == {"adapter_scale": 0.5, "temperature": 10.0}
    with pytest.raises(CheckpointError, match="already exists"):
        export_file(tmp_path / "ours", tmp_path / "back.pth")


def taller_tower(tower: Path, folder: Path, blocks: int) -> Path:
    """A tower with further blocks behind those of `tower`."""
    clip = CLIPVisionModel.from_pretrained(tower)
    clip.config.num_hidden_layers = blocks
    taller = CLIPVisionModel(clip.config)
    assert not taller.load_state_dict(clip.state_dict(), strict=False).unexpected_keys
    taller.save_pretrained(folder)
    shutil.copyfile(tower / "preprocessor_config.json", folder / "preprocessor_config.json")
    return folder


@pytest.mark.parametrize("name", CASES)
def test_adapters_in_tower_blocks_without_effect_are_left_out(
    name: str, base: Path, tower: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The original puts adapters on every block, and takes a class token after every fourth one."""
    case, tensors = load_case("lavin", name)
    known = case["config"]["vision"]["layers"]
    assert known % 4 == 0
    block = "backbone.visual.transformer.resblocks"
    last = {key: value for key, value in tensors.items() if key.startswith(f"w/{block}.{known - 1}.")}
    behind = {
        key.removeprefix("w/").replace(f"{block}.{known - 1}.", f"{block}.{known + more}."): value + 1
        for key, value in last.items()
        for more in range(3)
    }
    assert behind
    adapters = {key.removeprefix("w/"): value for key, value in tensors.items() if key.startswith("w/")}
    torch.save({"model": adapters}, tmp_path / "plain.pth")
    torch.save({"model": adapters | behind}, tmp_path / "more.pth")
    import_file(tmp_path / "plain.pth", tmp_path / "plain", base, str(tower))
    taller = taller_tower(tower, tmp_path / "taller", known + 3)
    import_file(tmp_path / "more.pth", tmp_path / "more", base, str(taller))
    assert f"{len(behind)} tensors" in capsys.readouterr().out
    models = [load_pretrained_model(str(tmp_path / folder), device="cpu")[1] for folder in ("plain", "more")]
    images = tensors["in/images"]
    features = [model.encode_images(images) for model in models]
    assert torch.equal(*features)
    assert features[0].abs().max() > 0
    # Those of a block that the tower does not have belong to another tower.
    with pytest.raises(CheckpointError, match=f"{len(behind)} are unknown"):
        import_file(tmp_path / "more.pth", tmp_path / "again", base, str(tower))
    lacking = {key: value for key, value in (adapters | behind).items() if f"{block}.0." not in key}
    torch.save({"model": lacking}, tmp_path / "lacking.pth")
    with pytest.raises(CheckpointError, match=r"missing|are unknown"):
        import_file(tmp_path / "lacking.pth", tmp_path / "again", base, str(taller))


def test_the_layout_is_the_originals(base: Path, tower: Path, tmp_path: Path) -> None:
    """Names, shapes and dtypes of both kinds of files that the original writes."""
    case, _ = load_case("lavin", "checkpoint_layout")
    shapes = {name: shape for name, shape, _ in case["checkpoints"]["single_process"]["model_keys"]}
    for number, prefix in enumerate(("", "module.")):
        content = {f"{prefix}{name}": torch.randn(shape) for name, shape in shapes.items()}
        torch.save({"model": content}, tmp_path / f"{number}.pth")
        import_file(tmp_path / f"{number}.pth", tmp_path / str(number), base, str(tower))
        export_file(tmp_path / str(number), tmp_path / f"{number}-back.pth")
        back = torch.load(tmp_path / f"{number}-back.pth", weights_only=False)  # ours: reads `args` too
        stripped = {name.removeprefix("module."): value for name, value in content.items()}
        assert back["model"].keys() == stripped.keys()
        assert all(torch.equal(value, back["model"][name]) for name, value in stripped.items())


def test_a_file_is_converted_beside_it_once(base: Path, tower: Path, tmp_path: Path) -> None:
    file = published("train_attn_mixed", tmp_path / "lavin.pth")
    folder = ready_folder(file, base, str(tower), temperature=10.0)
    written = (folder / "run.json").stat().st_mtime_ns
    assert folder == tmp_path / "lavin-llava"
    assert ready_folder(file, base, str(tower)) == folder
    assert (folder / "run.json").stat().st_mtime_ns == written
    with pytest.raises(CheckpointError, match=r"with temperature 10\.0; delete"):
        ready_folder(file, base, str(tower), temperature=5.0)
    with pytest.raises(CheckpointError, match="with base"):
        ready_folder(file, BASE, str(tower))
    with pytest.raises(CheckpointError, match="with tower"):
        ready_folder(file, base, "another/tower")
    assert ready_folder(file, base) == folder


def test_a_file_with_other_content_is_not_taken_for_the_one_converted(base: Path, tower: Path, tmp_path: Path) -> None:
    """Trained anew to the same name: the same names, shapes and size, other values."""
    file = published("train_attn_mixed", tmp_path / "lavin.pth")
    folder, size = ready_folder(file, base, str(tower)), file.stat().st_size
    before = weights_fingerprint(file)
    content = torch.load(file, weights_only=True)
    content["model"]["layers.0.adapter_attn.conv_B.weight"][0, 0] += 1e-4
    torch.save(content, file)
    assert file.stat().st_size == size
    assert weights_fingerprint(file) != before
    with pytest.raises(CheckpointError, match=r"was written from other content than lavin\.pth has now; delete"):
        ready_folder(file, base, str(tower))
    shutil.rmtree(folder)
    assert ready_folder(file, base, str(tower)) == folder


def test_what_a_file_does_not_say_is_the_default_of_the_program(base: Path, tower: Path, tmp_path: Path) -> None:
    """The original's demo and its evaluation have other defaults; what a file says, or a user, goes before them."""
    assert demo.DEFAULTS["temperature"] != mma_eval.build_parser().get_default("temperature")
    defaults = {"adapter_scale": 1.0, "temperature": demo.DEFAULTS["temperature"]}
    file = published("train_attn_mixed", tmp_path / "silent.pth")
    folder = ready_folder(file, base, str(tower), defaults)
    assert config_in(folder)["temperature"] == 5.0
    with pytest.raises(CheckpointError, match=r"with temperature 5\.0; delete"):
        ready_folder(file, base, str(tower), defaults | {"temperature": 10.0})
    assert ready_folder(file, base, str(tower), defaults | {"temperature": 10.0}, temperature=5.0) == folder
    file = published("train_attn_mixed", tmp_path / "says.pth", args=argparse.Namespace(temperature=10.0))
    folder = ready_folder(file, base, str(tower), defaults)
    assert config_in(folder)["temperature"] == 10.0
    assert ready_folder(file, base, str(tower), defaults) == folder


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "extensions" / "mma" / "config.json").read_text())


def damaged(tensors: dict[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Contents of files that are refused, by the message."""
    without = {name: value for name, value in tensors.items() if "layers.1" not in name}
    other = tensors | {"layers.7.adapter_attn.conv_A.weight": torch.zeros(8, 48, 1)}
    return {
        "has no tensors under 'model'": {"state": tensors},
        "no tensor belongs to an adapter": {"model": {"weight": torch.zeros(1)}},
        "8 tensors are missing": {"model": without},
        "1 are unknown .first: ..layers.7": {"model": other},
        "adapter_proj.conv_A.weight' is missing": {
            "model": {name: value for name, value in tensors.items() if "adapter_proj" not in name}
        },
        "given is temperature 3.0, but the file says 10.0": {
            "model": tensors,
            "args": argparse.Namespace(temperature=10.0),
        },
    }


def test_what_is_damaged_is_refused_by_name(base: Path, tower: Path, tmp_path: Path) -> None:
    _, tensors = load_case("lavin", "train_attn_mixed")
    adapters = {key.removeprefix("w/"): value for key, value in tensors.items() if key.startswith("w/")}
    for message, content in damaged(adapters).items():
        torch.save(content, tmp_path / "lavin.pth")
        with pytest.raises(CheckpointError, match=message):
            import_file(tmp_path / "lavin.pth", tmp_path / "ours", base, str(tower), temperature=3.0)
        assert not (tmp_path / "ours").exists()
    torch.save({"model": adapters, "args": Path("code")}, tmp_path / "lavin.pth")
    with pytest.raises(CheckpointError, match="more than tensors and plain values"):
        import_file(tmp_path / "lavin.pth", tmp_path / "ours", base, str(tower))


def test_what_the_original_has_no_place_for_is_not_exported(tmp_path: Path) -> None:
    options = {"mma": True, "visual_input": "llava", "visual_adapter_type": "router", "max_steps": 1}
    train(command_line(tmp_path / "patches", **options))
    with pytest.raises(CheckpointError, match="--visual_input llava"):
        export_file(tmp_path / "patches", tmp_path / "lavin.pth")
    shutil.copytree(LLAVA / "tiny-clip", tmp_path / "patches" / "vision_tower")
    with pytest.raises(CheckpointError, match="a trained vision tower"):
        export_file(tmp_path / "patches", tmp_path / "lavin.pth")
    train(command_line(tmp_path / "lora", **options, lora_enable=True, lora_r=4))
    with pytest.raises(CheckpointError, match="a LoRA adapter"):
        export_file(tmp_path / "lora", tmp_path / "lavin.pth")
    with pytest.raises(CheckpointError, match="nothing else"):
        export_file(BASE, tmp_path / "lavin.pth")
    assert not (tmp_path / "lavin.pth").exists()

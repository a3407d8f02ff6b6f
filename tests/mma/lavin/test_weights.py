"""Base weights: Meta's files and Vicuna's differences give the logits of the original, whatever the number of files."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

import mma.lavin.demo
import mma.lavin.eval
import mma.lavin.eval_mme
from llava.errors import CheckpointError, FlagError
from llava.eval.answering.processes import Processes
from llava.model.builder import load_pretrained_model
from llava.model.language_model.backbones import backbone_class
from llava.runtime.tokenizer import load_tokenizer
from mma.lavin.adapter_files import export_file
from mma.lavin.answering import find_folders, given_options
from mma.lavin.train import parse_args, prepare_base
from mma.lavin.weights.__main__ import main
from mma.lavin.weights.base import BaseWeights, base_folder
from mma.lavin.weights.choices import VicunaKind
from mma.lavin.weights.meta import places, shard_files, to_half_split
from mma.lavin.weights.tensors import LazyTensor, of_tensor, open_folder
from mma.lavin.weights.vicuna import kind_by_itself
from tests.mma.lavin.base_files import (
    DELTA,
    DELTA_TENSORS,
    META,
    META_TENSORS,
    TOLERANCE,
    VOCABULARY,
    save_vicuna,
    under,
    weights_root,
    with_rows,
)

if TYPE_CHECKING:
    from tests.mma.lavin.lavin_files import LavinFiles


@torch.no_grad()
def logits(folder: Path, ids: Tensor) -> Tensor:
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits[..., :VOCABULARY]


@pytest.mark.parametrize("files", [1, META["n_shards"]])
def test_meta_files(tmp_path: Path, files: int) -> None:
    root = weights_root(tmp_path, META, META_TENSORS, files)
    assert len(shard_files(root / "7B")) == files
    folder = main(["--llama_model_path", str(root), "--out", str(tmp_path / "out"), "--max_shard_size", "40KB"])
    assert folder == tmp_path / "out"
    assert len(list(folder.glob("*.safetensors"))) > 1
    found = logits(folder, META_TENSORS["in/input_ids"])
    torch.testing.assert_close(found, META_TENSORS["out/logits_original"], **TOLERANCE)
    weights = open_folder(folder)
    for name, expected in under("hf/", META_TENSORS).items():
        torch.testing.assert_close(weights[name].read(), expected, rtol=0, atol=0)
        assert not torch.equal(expected, META_TENSORS[f"w/{inverse()[name]}"])  # the reordering does something


def inverse() -> dict[str, str]:
    return {ours: metas for metas, ours in META["key_map"].items()}


def test_every_weight_goes_where_the_original_says() -> None:
    assert {name: place.name for name, place in places(META["config"]["n_layers"]).items()} == META["key_map"]
    rules = {name: "replicated" if place.join is None else f"dim {place.join}" for name, place in places(2).items()}
    assert rules == META["shard_rule"]


def test_the_folder_is_a_base_of_llava(tmp_path: Path) -> None:
    folder = base_folder(BaseWeights(str(weights_root(tmp_path, META, META_TENSORS))))
    assert folder == tmp_path / "weights" / "7B-hf"
    assert backbone_class(folder).__name__ == "LlavaLlamaForCausalLM"
    _, model, processor, _ = load_pretrained_model(str(folder), device="cpu")
    assert processor is None
    ids = META_TENSORS["in/input_ids"]
    torch.testing.assert_close(
        model(input_ids=ids).logits[..., :VOCABULARY], META_TENSORS["out/logits_original"], **TOLERANCE
    )
    tokenizer = load_tokenizer(folder)
    assert tokenizer("Image: N/A").input_ids == [1, 367, 387, 840, 457, 872, 839]
    before = (folder / "config.json").stat().st_mtime_ns
    assert base_folder(BaseWeights(str(tmp_path / "weights"))) == folder  # once
    assert (folder / "config.json").stat().st_mtime_ns == before
    assert base_folder(BaseWeights(str(folder))) == folder  # and a folder of transformers' is taken as it is


@pytest.mark.parametrize("vicuna_weights", ["auto", "delta"])
def test_vicuna_as_a_difference_is_vicuna(tmp_path: Path, vicuna_weights: str) -> None:
    """The model base + difference, which the original misses by its reordered rows."""
    root = weights_root(tmp_path, DELTA, DELTA_TENSORS)
    save_vicuna(root, with_rows(under("delta/", DELTA_TENSORS)))
    folder = base_folder(BaseWeights(str(root), use_vicuna=True, vicuna_weights=vicuna_weights))
    assert folder == root / "vicuna_7B-hf"
    found = logits(folder, DELTA_TENSORS["in/input_ids"])
    torch.testing.assert_close(found, DELTA_TENSORS["out/logits_correct_hf_sum"], **TOLERANCE)
    assert (found - DELTA_TENSORS["out/logits_original"]).abs().max() > 1
    assert DELTA["max_abs_diff_between_the_two_logits"] > 1


@pytest.mark.parametrize(("theta", "fits"), [(None, True), (1e4, True), (1e6, False)])
def test_frequencies_stored_with_a_difference(theta: float | None, fits: bool, tmp_path: Path) -> None:
    """A difference of 2023 has those of both models subtracted, or those of one; other ones are of another model."""
    root = weights_root(tmp_path, DELTA, DELTA_TENSORS)
    width = DELTA["config"]["dim"] // DELTA["config"]["n_heads"]
    steps = torch.arange(0, width, 2) / width
    stored = torch.zeros_like(steps) if theta is None else theta**-steps
    save_vicuna(
        root, with_rows(under("delta/", DELTA_TENSORS)) | {"model.layers.1.self_attn.rotary_emb.inv_freq": stored}
    )
    wanted = BaseWeights(str(root), use_vicuna=True)
    if fits:
        found = logits(base_folder(wanted), DELTA_TENSORS["in/input_ids"])
        torch.testing.assert_close(found, DELTA_TENSORS["out/logits_correct_hf_sum"], **TOLERANCE)
        return
    with pytest.raises(CheckpointError, match=r"vicuna_7B.*inv_freq' says"):
        base_folder(wanted)
    assert not wanted.converted.exists()


def test_full_vicuna_weights_are_taken_as_they_are(tmp_path: Path) -> None:
    root = weights_root(tmp_path, DELTA, DELTA_TENSORS)
    save_vicuna(root, with_rows(under("delta/", DELTA_TENSORS)))
    whole = base_folder(BaseWeights(str(root), use_vicuna=True))
    full = {name: weight.read() for name, weight in open_folder(whole).items()}
    other = tmp_path / "other"
    (root / "7B").rename(tmp_path / "7B")
    save_vicuna(other, full)
    (tmp_path / "7B").rename(other / "7B")
    assert base_folder(BaseWeights(str(other), use_vicuna=True)) == other / "vicuna_7B"
    (other / "7B").rename(tmp_path / "elsewhere")
    assert base_folder(BaseWeights(str(other), use_vicuna=True)) == other / "vicuna_7B"
    asked = BaseWeights(str(other), use_vicuna=True, vicuna_weights=VicunaKind.FULL)
    assert base_folder(asked) == other / "vicuna_7B"


def test_the_originals_sum_gives_the_originals_logits(tmp_path: Path) -> None:
    """Its published adapters were trained on that sum; it stands next to Vicuna, under a name of its own."""
    root = weights_root(tmp_path, DELTA, DELTA_TENSORS)
    save_vicuna(root, with_rows(under("delta/", DELTA_TENSORS)))
    words = ["--llama_model_path", str(root), "--use_vicuna"]
    folder = main([*words, "--vicuna_weights", "original"])
    assert folder == root / "vicuna_7B-original-hf"
    found = logits(folder, DELTA_TENSORS["in/input_ids"])
    torch.testing.assert_close(found, DELTA_TENSORS["out/logits_original"], **TOLERANCE)
    assert (found - DELTA_TENSORS["out/logits_correct_hf_sum"]).abs().max() > 1
    weights, heads = open_folder(folder), DELTA["config"]["n_heads"]
    for name, ours in {"wq": "q_proj", "wk": "k_proj"}.items():
        applied = DELTA_TENSORS[f"out/applied/layers.0.attention.{name}.weight"]
        torch.testing.assert_close(
            weights[f"model.layers.0.self_attn.{ours}.weight"].read(), to_half_split(applied, heads), **TOLERANCE
        )
    assert main(words) == root / "vicuna_7B-hf"
    again = logits(root / "vicuna_7B-hf", DELTA_TENSORS["in/input_ids"])
    torch.testing.assert_close(again, DELTA_TENSORS["out/logits_correct_hf_sum"], **TOLERANCE)
    assert main([*words, "--vicuna_weights", "original"]) == folder


def test_what_the_originals_sum_cannot_be_made_of(tmp_path: Path) -> None:
    root = weights_root(tmp_path, DELTA, DELTA_TENSORS)
    save_vicuna(root, with_rows(under("delta/", DELTA_TENSORS)))
    whole = base_folder(BaseWeights(str(root), use_vicuna=True))
    full = {name: weight.read() for name, weight in open_folder(whole).items()}
    asked = ["--use_vicuna", "--vicuna_weights", "original"]
    with pytest.raises(CheckpointError, match="one set of weights, but --vicuna_weights original"):
        main(["--llama_model_path", str(whole), *asked])
    shutil.rmtree(root / "vicuna_7B")
    save_vicuna(root, full)
    with pytest.raises(CheckpointError, match="holds full weights, but --vicuna_weights original"):
        main(["--llama_model_path", str(root), *asked])
    (root / "7B").rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="look at --llama_model_path"):
        main(["--llama_model_path", str(root), *asked])
    assert not list(root.glob("*-original-hf*"))
    with pytest.raises(FlagError, match="needs --use_vicuna"):
        main(["--llama_model_path", str(root), *asked[1:]])


def of_norms(*norms: Tensor) -> dict[str, LazyTensor]:
    """Weights of layers with these norms and matrices around zero."""
    matrix = of_tensor(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))
    return {f"model.layers.{n}.input_layernorm.weight": of_tensor(norm) for n, norm in enumerate(norms)} | {"m": matrix}


def noise(size: float, around: float = 0.0) -> Tensor:
    return around + size * torch.randn(256, generator=torch.Generator().manual_seed(1))


NORMS = {
    "ones": ([torch.ones(256)], VicunaKind.FULL),
    "around one": ([noise(0.15, 1.0)], VicunaKind.FULL),
    "half precision": ([noise(0.1, 0.4).bfloat16(), noise(0.1, 0.5).half()], VicunaKind.FULL),
    "of LLaMA: small at first": (
        [noise(0.02, 0.03), noise(0.1, 0.3), noise(0.1, 0.5), noise(0.3, 1.9)],
        VicunaKind.FULL,
    ),
    "a fine difference": ([noise(0.002)], VicunaKind.DELTA),
    "a rough difference": ([noise(0.17)], VicunaKind.DELTA),
    "a difference in one direction": ([noise(0.005, 0.02)], VicunaKind.DELTA),
    "a difference of half precision": ([noise(0.01).half(), torch.zeros(256).half()], VicunaKind.DELTA),
    "no difference": ([torch.zeros(256)], VicunaKind.DELTA),
    "neither": ([noise(0.1, -1.0)], None),
    "no norms": ([], None),
}


@pytest.mark.parametrize("name", NORMS)
def test_what_a_vicuna_is_without_a_llama(name: str) -> None:
    norms, kind = NORMS[name]
    assert kind_by_itself(of_norms(*norms)) is kind


PROGRAMS = {"eval": mma.lavin.eval, "eval_mme": mma.lavin.eval_mme, "demo": mma.lavin.demo}


def find_base(program: str, root: Path, adapters: Path, *more: str) -> Path:
    """The base that a program finds, by its own command line."""
    if program == "weights":
        return main(["--llama_model_path", str(root), "--use_vicuna", *more])
    words = ["--ckpt_dir", str(root), "--adapter_path", str(adapters), "--use_vicuna", "--data_root", "d", *more]
    words += ["--max_seq_len", "512", "--max_batch_size", "4"]
    if program == "demo":
        place = words.index("--data_root")
        del words[place : place + 2]
        words += ["--llm_model", "7B"]
    parser = PROGRAMS[program].build_parser()
    args, given = parser.parse_args(words), given_options(PROGRAMS[program].build_parser(), words)
    return find_folders(args, given, Processes()).base


@pytest.mark.parametrize("program", ["weights", *PROGRAMS])
def test_a_vicuna_without_a_llama(program: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Full weights are known; of a difference the error gives advice that the program itself can follow."""
    root, adapters = tmp_path / "weights", tmp_path / "adapters"
    adapters.mkdir()
    names = {place.name for place in places(1).values()}
    shapes = {name: (4,) if "norm" in name else (4, 4) for name in names}
    full = {name: torch.ones(shape) for name, shape in shapes.items()}
    save_vicuna(root, full)
    assert find_base(program, root, adapters) == root / "vicuna_7B"
    shutil.rmtree(root)
    save_vicuna(root, {name: noise(0.01)[: torch.Size(shape).numel()].view(shape) for name, shape in shapes.items()})
    with pytest.raises(CheckpointError, match=r"is the difference to LLaMA.*--vicuna_weights full"):
        find_base(program, root, adapters)
    assert find_base(program, root, adapters, "--vicuna_weights", "full") == root / "vicuna_7B"
    capsys.readouterr()


def test_training_takes_a_vicuna_without_a_llama(lavin_files: LavinFiles, tmp_path: Path) -> None:
    from tests.mma.lavin.lavin_files import tiny_words  # which itself takes files from here

    root = tmp_path / "weights"
    save_vicuna(root, {"model.norm.weight": torch.ones(4)})
    words = tiny_words(replace(lavin_files, weights=root), tmp_path / "out", "--use_vicuna")
    for more in ((), ("--vicuna_weights", "full")):
        args = parse_args([*words, *more])
        prepare_base(args)
        assert args.run.model.model_name_or_path == str(root / "vicuna_7B")
    with pytest.raises(FlagError, match="--vicuna_weights original: needs --use_vicuna"):
        parse_args([*words[:-1], "--vicuna_weights", "original"])


def test_a_published_file_on_vicuna_is_warned_of(
    lavin_files: LavinFiles, lavin_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And loads on the original's sum."""
    file = export_file(lavin_checkpoint, tmp_path / "lavin.pth")
    more = ["--vision_tower", str(lavin_files.tower)]
    assert find_base("eval", lavin_files.weights, file, *more).name == "vicuna_7B-hf"
    assert "pass --vicuna_weights original" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "lavin-llava")
    found = find_base("eval", lavin_files.weights, file, *more, "--vicuna_weights", "original")
    assert found.name == "vicuna_7B-original-hf"
    assert "pass --vicuna_weights" not in capsys.readouterr().out
    loaded = load_pretrained_model(str(tmp_path / "lavin-llava"), str(found), device="cpu")[1]
    assert loaded.extensions.configs["mma"]


def broken(root: Path, what: str) -> None:
    first = root / "7B" / "consolidated.00.pth"
    if what == "a file is missing":
        first.unlink()
    elif what == "a file is cut off":
        first.write_bytes(first.read_bytes()[:2000])
    elif what == "a weight is missing":
        torch.save({k: v for k, v in torch.load(first).items() if k != "norm.weight"}, first)
    elif what == "half of the files":
        (root / "7B" / "consolidated.01.pth").unlink()
    elif what == "no tokenizer":
        (root / "tokenizer.model").unlink()
    elif what == "no weights at all":
        (root / "7B" / "params.json").unlink()


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("a file is missing", "without gaps"),
        ("a file is cut off", "is damaged"),
        ("a weight is missing", "1 weights are missing"),
        ("half of the files", "embeddings of width 12, but params.json says 24"),
        ("no tokenizer", "no tokenizer.model"),
        ("no weights at all", "--llama_model_path"),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_left(tmp_path: Path, what: str, message: str) -> None:
    root = weights_root(tmp_path, META, META_TENSORS, META["n_shards"])
    broken(root, what)
    with pytest.raises(CheckpointError, match=message):
        main(["--llama_model_path", str(root)])
    assert not list(root.glob("*-hf*"))


def test_a_difference_to_another_base_is_refused(tmp_path: Path) -> None:
    root = weights_root(tmp_path, DELTA, DELTA_TENSORS)
    delta = with_rows(under("delta/", DELTA_TENSORS))
    save_vicuna(root, delta | {"model.layers.1.mlp.up_proj.weight": torch.zeros(2, 2)})
    with pytest.raises(CheckpointError, match="no difference to this base"):
        base_folder(BaseWeights(str(root), use_vicuna=True))
    far = {name: tensor * 20 for name, tensor in delta.items()}
    save_vicuna(root, far, "vicuna_13B")
    (root / "7B").rename(root / "13B")
    with pytest.raises(CheckpointError, match="neither near"):
        base_folder(BaseWeights(str(root), "13B", use_vicuna=True))

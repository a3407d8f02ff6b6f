"""Comparing adapters: every kind is read, and the numbers are right where they are known."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model

from hydralora.analysis.__main__ import main, named_adapters
from hydralora.analysis.adapters import read_adapter
from hydralora.analysis.similarity import cosine, overlap
from hydralora.tuner import hydralora_layers
from hydralora.tuner.original import export_adapter
from llava.errors import CheckpointError, FlagError
from tests.command_lines import Snippet, run_with_stand_ins
from tests.hydralora.tuner.models import TARGETS, adapted, tiny_llama

pytest.importorskip("sklearn", reason="the extra `analysis` is not installed")
pytest.importorskip("matplotlib", reason="the extra `analysis` is not installed")


def save(folder: Path, seed: int, shared_a: int | None = None, **changes: object) -> Path:
    """A drawn adapter; with `shared_a` its A are those of that seed."""
    model = adapted(seed=seed, **changes)
    if shared_a is not None:
        other = hydralora_layers(adapted(seed=shared_a, **changes))
        for name, layer in hydralora_layers(model).items():
            layer.lora_A["default"].weight.data.copy_(other[name].lora_A["default"].weight)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def test_equal_a_and_different_b_are_seen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = save(tmp_path / "first", 1)
    second = save(tmp_path / "second", 2, shared_a=1)
    result = main([f"one={first}", f"two={second}", "--output-dir", str(tmp_path / "out")])
    record = json.loads(result.read_text())
    mean = record["adapters"]["mean"]
    assert mean["cosine_A"] == pytest.approx(1, abs=1e-5)
    assert mean["overlap_A"] == pytest.approx(1, abs=1e-4)
    assert abs(mean["cosine_B"]) < 0.2
    assert mean["overlap_B"] < 0.5
    assert len(record["adapters"]["layers"]) == 8
    assert record["experts of one"]["mean"].keys() == {"cosine_B", "overlap_B"}
    for suffix in ("png", "pdf"):
        assert (tmp_path / "out" / f"matrices-tsne.{suffix}").stat().st_size > 1000
    assert "cosine of A" in capsys.readouterr().out


def test_every_kind_of_adapter_is_read(tmp_path: Path) -> None:
    ours = save(tmp_path / "ours", 1)
    export_adapter(ours, tmp_path / "original")
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=TARGETS, init_lora_weights=False)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    layers = {name: read_adapter(tmp_path / name) for name in ("ours", "original", "lora")}
    assert layers["ours"].keys() == layers["original"].keys() == layers["lora"].keys()
    for name, layer in layers["ours"].items():
        assert torch.equal(layer.experts_b, layers["original"][name].experts_b)
        assert torch.equal(layer.shared_a, layers["original"][name].shared_a)
        assert layers["lora"][name].experts_b.shape == (1, *layer.experts_b.shape[1:])
    main([f"{name}={tmp_path / name}" for name in layers] + ["--method", "pca", "--output-dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "matrices-pca.png").is_file()


def test_adapters_of_different_bases(tmp_path: Path) -> None:
    """Only what two bases have in equal sizes is compared: here the A of the layers with the common width."""
    wide = {"base": tiny_llama(intermediate_size=64, num_key_value_heads=4)}
    folders = [save(tmp_path / "one", 1), save(tmp_path / "other", 1, **wide)]
    names = [f"{folder.name}={folder}" for folder in folders]
    record = json.loads(main([*names, "--method", "none", "--output-dir", str(tmp_path / "out")]).read_text())
    numbers = {row["layer"].rpartition(".")[2]: set(row) - {"layer"} for row in record["adapters"]["layers"]}
    of_a, of_b = {"cosine_A", "overlap_A"}, {"cosine_B", "overlap_B"}
    assert numbers == {"q_proj": of_a | of_b, "v_proj": of_a, "gate_proj": of_a, "down_proj": of_b}


def test_adapters_of_different_ranks(tmp_path: Path) -> None:
    folders = [save(tmp_path / "one", 1), save(tmp_path / "other", 1, r=2)]
    names = [f"{folder.name}={folder}" for folder in folders]
    record = json.loads(main([*names, "--method", "none", "--output-dir", str(tmp_path / "out")]).read_text())
    assert set(record["adapters"]["mean"]) == {"overlap_A", "overlap_B"}


def test_numbers_without_figures(tmp_path: Path) -> None:
    ours = save(tmp_path / "ours", 1)
    main([f"a={ours}", f"b={ours}", "--method", "none", "--output-dir", str(tmp_path / "out")])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["similarity.json"]


def test_measures() -> None:
    matrix = torch.randn(3, 10, generator=torch.Generator().manual_seed(0))
    mixed = torch.tensor([[0.0, 2, 0], [1, 0, 0], [0, 1, 3]]) @ matrix
    assert cosine(matrix, -matrix) == pytest.approx(-1)
    assert cosine(matrix, torch.zeros_like(matrix)) == 0
    assert overlap(matrix, mixed) == pytest.approx(1, abs=1e-5), "another basis of the same space"
    assert abs(cosine(matrix, mixed)) < 0.9
    assert overlap(torch.eye(10)[:3], torch.eye(10)[3:6]) == pytest.approx(0, abs=1e-6)


def test_refused(tmp_path: Path) -> None:
    ours = save(tmp_path / "ours", 1)
    with pytest.raises(FlagError, match="expected NAME=ADAPTER"):
        named_adapters([str(ours)])
    with pytest.raises(FlagError, match="given twice"):
        named_adapters([f"a={ours}", f"a={ours}"])
    with pytest.raises(CheckpointError, match="is no adapter"):
        named_adapters([f"a={tmp_path}"])
    for damage, message in (
        ("{", "is no valid JSON"),
        ("[]", "holds a list"),
        ('{"peft_type": "LORA"}', "cannot be read"),
    ):
        (tmp_path / "adapter_config.json").write_text(damage)
        with pytest.raises(CheckpointError, match=message):
            named_adapters([f"a={tmp_path}"])
    other = save(tmp_path / "other", 1, target_modules=["o_proj"])
    with pytest.raises(FlagError, match="no layer in common"):
        main([f"a={ours}", f"b={other}", "--output-dir", str(tmp_path / "out")])


def test_the_list_of_the_original(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and files of weights in an environment variable, which the script of the original's name passes on."""
    paths = {name: str(save(tmp_path / name, seed) / "adapter_model.safetensors") for seed, name in enumerate("ab")}
    monkeypatch.setenv("MODEL_PATHS", json.dumps(paths))
    by_list = json.loads(main(["--output-dir", str(tmp_path / "list"), "--method", "none"]).read_text())
    words = [f"{name}={Path(path).parent}" for name, path in paths.items()]
    by_words = json.loads(main([*words, "--output-dir", str(tmp_path / "words"), "--method", "none"]).read_text())
    assert by_list == by_words
    assert by_list["adapters"]["layers"]

    listed = "MODEL_PATHS=" + shlex.quote(json.dumps(paths))
    text = f"""cat > seen <<'END'
#!/bin/sh
exec python "$@" "$MODEL_PATHS"
END
chmod +x seen
{listed} PYTHON=./seen bash scripts/hydralora/tesn_lora.sh --method pca
"""
    (tmp_path / "shell").mkdir()
    (command,) = run_with_stand_ins(Snippet("block", text), tmp_path / "shell")
    assert command == ["python", "-m", "hydralora.analysis", "--method", "pca", json.dumps(paths)]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "name adapters as NAME=ADAPTER, or set MODEL_PATHS"),
        ("", "MODEL_PATHS is not valid JSON"),
        ("[]", "expected a JSON object"),
        ("{}", "expected a JSON object"),
        ('{"a": 1}', "expected a JSON object"),
    ],
)
def test_a_list_that_cannot_be_read(value: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MODEL_PATHS", raising=False)
    if value is not None:
        monkeypatch.setenv("MODEL_PATHS", value)
    with pytest.raises(FlagError, match=message):
        main([])


def test_a_file_without_its_configuration_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "first", 1)
    (folder / "adapter_model.safetensors").rename(folder / "math.safetensors")
    with pytest.raises(CheckpointError, match=r"math\.safetensors: not adapter_model"):
        read_adapter(folder / "math.safetensors")

"""`hydralora.convert to-lora`: adapters and LLaVA checkpoints as plain LoRA, from their files or measured; refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hydralora
from hydralora.config import HydraLoraSettings, RoutedLinearConfig, RoutedMLPConfig
from hydralora.convert import main
from hydralora.linears import add_updates, routed_updates
from hydralora.linears import added_parameters as added_updates
from hydralora.tuner import hydralora_layers
from hydralora.tuner.original import CONFIG_FILE, ORIGINAL_WEIGHTS, OUR_WEIGHTS
from tests.golden import golden_dir
from tests.hydralora.text.test_finetune import save_base
from tests.hydralora.tuner.models import adapted, logits, tiny_llama
from tests.reliability.test_converters import EXPERTS, RANK, original

MIXED = [0.2, 0.5, 0.3]


def plain(folder: Path) -> Any:
    return PeftModel.from_pretrained(tiny_llama(), str(folder)).eval()


def adapter(folder: Path, **options: Any) -> Path:
    adapted(**options).save_pretrained(folder, save_embedding_layers=False)
    return folder


def constant(model: Any) -> Any:
    for layer in hydralora_layers(model).values():
        layer.lora_router["default"].forward = lambda x, *rest: torch.tensor(MIXED).expand(*x.shape[:-1], 3)
    return model


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_an_adapter_with_weights(routing: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = adapter(tmp_path / "ours", routing=routing)
    main(["to-lora", str(source), str(tmp_path / "out"), "--weights", "0.2,0.5,0.3"])
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(constant(adapted())), rtol=0, atol=2e-6)
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'out'}: plain LoRA")


def test_one_expert_needs_no_weights(tmp_path: Path) -> None:
    source = adapter(tmp_path / "ours", lora_nums=1)
    main(["to-lora", str(source), str(tmp_path / "out")])
    assert torch.equal(logits(plain(tmp_path / "out")), logits(adapted(lora_nums=1)))


def test_a_folder_for_each_name(tmp_path: Path) -> None:
    source = adapter(tmp_path / "ours")
    main(["to-lora", str(source), str(tmp_path / "out"), "--weights", "math=expert:1", "law=uniform"])
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["law", "math"]
    assert not torch.equal(logits(plain(tmp_path / "out" / "law")), logits(plain(tmp_path / "out" / "math")))


def test_an_adapter_of_the_authors(tmp_path: Path) -> None:
    source = original(tmp_path / "theirs")
    main(["to-lora", str(source), str(tmp_path / "out"), "--weights", "expert:1"])
    theirs, ours = torch.load(source / ORIGINAL_WEIGHTS), load_file(tmp_path / "out" / OUR_WEIGHTS)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name.replace("lora_B.", "lora_B1.")])
    assert len(ours) * (EXPERTS + 2) == len(theirs) * 2
    assert json.loads((tmp_path / "out" / CONFIG_FILE).read_text())["r"] == RANK


def checkpoint(folder: Path, parts: tuple[str, ...]) -> tuple[Path, Any]:
    """What a LLaVA checkpoint holds of this method and of LoRA, and its model with constant weights of the experts."""
    model: Any = tiny_llama()
    settings = HydraLoraSettings(
        mlp=RoutedMLPConfig(experts=3, rank=4, alpha=8) if "mlp" in parts else None,
        linear=RoutedLinearConfig(targets=["attention.v_proj"], experts=3, rank=2, alpha=5)
        if "linear" in parts
        else None,
    )
    folder.mkdir()
    if "lora" in parts:
        lora = LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
        model = get_peft_model(model, lora)
        model.save_pretrained(folder, save_embedding_layers=False)
    bare = model.get_base_model() if "lora" in parts else model
    tensors: dict[str, torch.Tensor] = {}
    torch.manual_seed(5)
    if settings.mlp is not None:
        for block in hydralora.attach(bare, settings.mlp).values():
            block.reset_parameters(identity=False)
            with torch.no_grad():
                block.router.weight.zero_()
                block.router.bias.copy_(torch.tensor(MIXED).log())
        tensors |= dict(hydralora.added_parameters(bare))
    if settings.linear is not None:
        add_updates({"attention": bare.model.layers}, settings.linear)
        for update in routed_updates(bare).values():
            update.reset_parameters(identity=False)
            update.router.data.zero_()
        tensors |= dict(added_updates(bare))
    extension = folder / "extensions" / "hydralora"
    extension.mkdir(parents=True)
    save_file({name: value.detach().contiguous() for name, value in tensors.items()}, extension / "model.safetensors")
    (extension / "config.json").write_text(json.dumps(settings.to_dict()))
    return folder, model.eval()


@pytest.mark.parametrize(
    ("parts", "weights"),
    [(("mlp", "lora"), "0.2,0.5,0.3"), (("linear",), "uniform"), (("mlp",), "0.2,0.5,0.3")],
    ids=str,
)
def test_a_llava_checkpoint(parts: tuple[str, ...], weights: str, tmp_path: Path) -> None:
    source, model = checkpoint(tmp_path / "llava", parts)
    main(["to-lora", str(source), str(tmp_path / "out"), "--weights", weights])
    torch.testing.assert_close(logits(plain(tmp_path / "out")), logits(model), rtol=0, atol=2e-6)
    assert (logits(model) - logits(tiny_llama())).abs().max() > 1e-3


def test_a_published_llava_checkpoint(tmp_path: Path) -> None:
    """A folder of MLLM-HydraLoRA, with the LoRA on its attention."""
    source = golden_dir("mllm_hydralora") / "tiny-llava-v1.5-lora-mohle"
    main(["to-lora", str(source), str(tmp_path / "out"), "--weights", "expert:2"])
    ours = load_file(tmp_path / "out" / OUR_WEIGHTS)
    theirs = torch.load(source / "non_lora_trainables.bin", weights_only=True)
    config = json.loads((tmp_path / "out" / CONFIG_FILE).read_text())
    blocks = [name for name in ours if ".mlp." in name]
    assert len(blocks) == 3 * 3 * 2
    assert len(ours) > len(blocks)
    prefix = "base_model.model.model.layers.1.mlp"
    update = ours[f"{prefix}.gate_proj.lora_B.weight"] @ ours[f"{prefix}.gate_proj.lora_A.weight"]
    expected = theirs[f"{prefix}.moe_gate.2.LoRA_B"].float() @ theirs[f"{prefix}.shared_LoRA_A_gate"].float()
    torch.testing.assert_close(
        update.float() * config["lora_alpha"] / config["r"], expected * 8 / 4, rtol=1e-2, atol=1e-3
    )


def test_bfloat16_stays(tmp_path: Path) -> None:
    source = adapter(tmp_path / "ours")
    path = source / OUR_WEIGHTS
    save_file({name: value.bfloat16() for name, value in load_file(path).items()}, path)
    main(["to-lora", str(source), str(tmp_path / "out"), "--weights", "0.2,0.5,0.3"])
    assert {value.dtype for value in load_file(tmp_path / "out" / OUR_WEIGHTS).values()} == {torch.bfloat16}


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no folder": (lambda source: (source / CONFIG_FILE).unlink(), "adapter_config"),
    "no weights": (lambda source: (source / OUR_WEIGHTS).unlink(), OUR_WEIGHTS),
    "damaged weights": (lambda source: (source / OUR_WEIGHTS).write_bytes(b"x" * 9), OUR_WEIGHTS),
    "another rank": (lambda source: change(source, r=8), OUR_WEIGHTS),
    "another method": (lambda source: change(source, peft_type="IA3"), "not a HydraLoRA adapter"),
    "an expert less": (lambda source: change(source, lora_nums=2), OUR_WEIGHTS),
}


def change(source: Path, **values: Any) -> None:
    path = source / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_sources(kind: str, tmp_path: Path) -> None:
    source = adapter(tmp_path / "ours")
    damage, message = DAMAGES[kind]
    damage(source)
    with pytest.raises(SystemExit, match=message):
        main(["to-lora", str(source), str(tmp_path / "out"), "--weights", "uniform"])
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


WRONG: dict[str, tuple[list[str], str]] = {
    "no weights": ([], "weights 3 experts for each input"),
    "too few": (["--weights", "0.5,0.5"], "expected 3 finite numbers"),
    "an expert too many": (["--weights", "expert:3"], "one of 0 to 2"),
    "a name twice": (["--weights", "a=uniform", "a=expert:1"], "a different NAME= each"),
    "a name missing": (["--weights", "a=uniform", "expert:1"], "a different NAME= each"),
    "a path": (["--weights", "../a=uniform"], "not a name for a folder"),
    "records alone": (["--records", "x.json"], "belong together"),
    "two choices": (["--weights", "uniform", "--base", "b", "--records", "x.json"], "two choices"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_options(kind: str, tmp_path: Path) -> None:
    source = adapter(tmp_path / "ours")
    words, message = WRONG[kind]
    with pytest.raises(SystemExit, match=message):
        main(["to-lora", str(source), str(tmp_path / "out"), *words])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ours"]


@pytest.mark.parametrize("text", ["best", "a=", "expert:x", "1,b"])
def test_weights_that_cannot_be_read(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["to-lora", "source", "target", "--weights", text])
    assert "'uniform', 'expert:N' or numbers" in capsys.readouterr().err


def test_an_output_that_exists_is_left_alone(tmp_path: Path) -> None:
    source = adapter(tmp_path / "ours")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("x")
    with pytest.raises(SystemExit, match="already exists"):
        main(["to-lora", str(source), str(tmp_path / "out"), "--weights", "uniform"])
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("by", ["whole", "task", "cluster"])
def test_measured_on_records(by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The printed error is that of the model which the folder gives."""
    base = save_base(tmp_path / "base")
    source = tmp_path / "ours"
    adapted(base=AutoModelForCausalLM.from_pretrained(base)).save_pretrained(source, save_embedding_layers=False)
    rows = [{"instruction": f"Add {n} and {n}.", "output": str(2 * n), "task_type": n % 2} for n in range(4)]
    (tmp_path / "records.json").write_text(json.dumps(rows))
    words = ["--base", str(base), "--records", str(tmp_path / "records.json"), "--by", by, "--clusters", "2"]
    main(["to-lora", str(source), str(tmp_path / "out"), *words])
    names = {"whole": [""], "task": ["0", "1"], "cluster": ["0", "1"]}[by]
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [str(tmp_path / "out" / name) for name in names]
    for name in names:
        stored = json.loads((tmp_path / "out" / name / "hydralora_export.json").read_text())
        assert stored["error"]["relative_error"] > 0
        assert f"{stored['error']['relative_error']:.2%}" in lines[names.index(name)]

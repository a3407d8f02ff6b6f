"""Original checkpoints in and out: safe reading of `moe_args.pth`, the mapping of tensors, and their errors."""

from __future__ import annotations

import json
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hydralora.config import RoutedMLPConfig
from hydralora.moe_args import (
    StandIn,
    arguments_of_config,
    config_from_arguments,
    read_training_arguments,
    write_training_arguments,
)
from hydralora.original import from_original, is_original_key, read_weights, to_original
from tests.golden import golden_dir, load_case

CHECKPOINT = golden_dir("mllm_hydralora") / "tiny-llava-v1.5-lora-mohle"
CONFIG = RoutedMLPConfig(experts=3, rank=4, alpha=8, dropout=0.05, dense=True, balance_weight=0.05)
PATH = Path("non_lora_trainables.bin")


def golden_tensors() -> dict[str, Tensor]:
    return torch.load(CHECKPOINT / "non_lora_trainables.bin", weights_only=True)


def archive(folder: Path, content: bytes) -> Path:
    """A file as `torch.save` writes it, around a given pickle."""
    path = folder / "moe_args.pth"
    with zipfile.ZipFile(path, "w") as container:
        container.writestr("moe_args/data.pkl", content)
    return path


class TestReadingArguments:
    def test_golden_fields(self) -> None:
        case, _ = load_case("mllm_hydralora", "checkpoint")
        attributes = read_training_arguments(CHECKPOINT / "moe_args.pth")
        assert sorted(attributes) == case["moe_args_all_attribute_names"]
        for name, value in case["moe_args_fields"].items():
            assert attributes[name] == value, name
            assert type(attributes[name]) is type(value), name

    def test_objects_are_inert(self) -> None:
        attributes = read_training_arguments(CHECKPOINT / "moe_args.pth")
        scheduler = attributes["lr_scheduler_type"]
        assert isinstance(scheduler, StandIn)
        assert scheduler.reference == "transformers.trainer_utils.SchedulerType"
        assert len(scheduler.args) == 1
        assert isinstance(scheduler.args[0], str)
        device = attributes["distributed_state"].state["device"]
        assert device.reference == "torch.device"

    def test_configuration(self) -> None:
        path = CHECKPOINT / "moe_args.pth"
        assert config_from_arguments(read_training_arguments(path), path) == CONFIG

    @pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
    def test_pickled_code_does_not_run(self, protocol: int, tmp_path: Path) -> None:
        """A pickle that would create a file, hidden among the attributes; plain unpickling does create it."""
        witness = tmp_path / "witness"

        class Attack:
            def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
                return open, (str(witness), "w")

        attributes = {"lora_rank": 4, "attack": Attack()}
        body = pickle.dumps(attributes, protocol=protocol)
        path = archive(tmp_path, training_arguments_pickle(body))
        assert read_training_arguments(path)["lora_rank"] == 4
        assert not witness.exists()
        pickle.loads(body)["attack"].close()  # noqa: S301 - the attack is our own
        assert witness.exists(), "the attack itself does not work, so this test shows nothing"

    @pytest.mark.parametrize(
        "attack",
        [
            b"cos\nsystem\n(X\x05\x00\x00\x00falsetR.",
            b"(X\x05\x00\x00\x00falseios\nsystem\n.",
            b"(cos\nsystem\nX\x05\x00\x00\x00falseo.",
            b"c__builtin__\neval\n(X\x03\x00\x00\x001/0tR.",
        ],
        ids=["GLOBAL-REDUCE", "INST", "OBJ", "eval"],
    )
    def test_a_bare_attack_is_refused(self, attack: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("os.system", lambda command: pytest.fail("os.system was called"))
        with pytest.raises(ValueError, match="not TrainingArguments"):
            read_training_arguments(archive(tmp_path, attack))

    def test_what_runs_on_gpus_add(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Devices, plug-ins with nested state, ordered dicts, sets and tensors, pickled by `torch.save` itself."""
        foreign = types.ModuleType("foreign")
        for name in ("TrainingArguments", "DeepSpeedPlugin"):
            setattr(foreign, name, type(name, (), {"__module__": "foreign"}))
        monkeypatch.setitem(sys.modules, "foreign", foreign)
        plugin, arguments = foreign.DeepSpeedPlugin(), foreign.TrainingArguments()
        plugin.hf_ds_config = OrderedDict(zero=OrderedDict(stage=3))
        vars(arguments).update(
            lora_rank=4, deepspeed_plugin=plugin, device=torch.device("cuda", 1), names={"a"}, weight=torch.ones(2)
        )
        torch.save(arguments, tmp_path / "moe_args.pth")
        monkeypatch.delitem(sys.modules, "foreign")
        attributes = read_training_arguments(tmp_path / "moe_args.pth")
        assert attributes["lora_rank"] == 4
        assert attributes["deepspeed_plugin"].reference == "foreign.DeepSpeedPlugin"
        assert attributes["device"].args == ("cuda", 1)
        assert isinstance(attributes["weight"], StandIn)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (b"no zip at all", "no zip archive"),
            (pickle.dumps({"lora_rank": 4}, protocol=2), "no zip archive"),
            (b"", "no zip archive"),
        ],
        ids=["text", "bare_pickle", "empty"],
    )
    def test_other_files_are_refused(self, content: bytes, message: str, tmp_path: Path) -> None:
        path = tmp_path / "moe_args.pth"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message) as caught:
            read_training_arguments(path)
        assert str(path) in str(caught.value)

    def test_a_damaged_pickle_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="cannot be unpickled"):
            read_training_arguments(archive(tmp_path, b"\x80\x02cllava.train.train\n"))

    def test_an_oversized_pickle_is_refused(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("hydralora.moe_args._MAX_PICKLE_BYTES", 100)
        with pytest.raises(ValueError, match="4347 bytes, expected at most 100"):
            read_training_arguments(CHECKPOINT / "moe_args.pth")

    @pytest.mark.parametrize("name", ["llm_moe_num_experts", "lora_rank", "lora_alpha", "dense_moe", "moe_balance_w"])
    def test_missing_and_mistyped_attributes_are_named(self, name: str) -> None:
        attributes = read_training_arguments(CHECKPOINT / "moe_args.pth")
        with pytest.raises(ValueError, match="expected"):
            config_from_arguments(attributes | {name: StandIn("3")}, Path("some/moe_args.pth"))
        del attributes[name]
        with pytest.raises(ValueError, match=rf"some/moe_args\.pth.*{name}"):
            config_from_arguments(attributes, Path("some/moe_args.pth"))


def training_arguments_pickle(state: bytes) -> bytes:
    """Pickle of an original `TrainingArguments` whose state is the pickle `state` (its frame and header removed)."""
    body = state[2:]
    if body[:1] == pickle.FRAME:
        body = body[9:]
    return b"\x80" + state[1:2] + b"cllava.train.train\nTrainingArguments\n)\x81" + body[:-1] + b"b."


class TestWritingArguments:
    FIELDS = json.loads((golden_dir("mllm_hydralora") / "case_checkpoint.json").read_text())["moe_args_fields"]

    def test_our_reader_reads_it(self, tmp_path: Path) -> None:
        write_training_arguments(tmp_path / "moe_args.pth", self.FIELDS)
        assert read_training_arguments(tmp_path / "moe_args.pth") == self.FIELDS

    def test_the_originals_loader_reads_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """`torch.load` with the original's class in place gives an object of that class, as the original wants it."""
        original = types.ModuleType("llava.train.train")
        original.TrainingArguments = type("TrainingArguments", (), {})
        monkeypatch.setitem(sys.modules, "llava.train.train", original)
        write_training_arguments(tmp_path / "moe_args.pth", self.FIELDS)
        loaded = torch.load(tmp_path / "moe_args.pth", weights_only=False)
        assert type(loaded) is original.TrainingArguments
        assert vars(loaded) == self.FIELDS


class TestArgumentsOfConfig:
    NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.tower.0.self_attn.k_proj")

    @pytest.mark.parametrize(
        ("targets", "expected"),
        [
            (["v_proj", "q_proj"], "q_proj,v_proj"),
            (r"model\.layers\.\d+\.self_attn\.(q_proj|k_proj|v_proj)", "q_proj,v_proj"),
        ],
        ids=["list", "pattern"],
    )
    def test_target_modules(self, targets: Any, expected: str, tmp_path: Path) -> None:
        path = tmp_path / "adapter_config.json"
        path.write_text(json.dumps({"r": 4, "lora_alpha": 8, "target_modules": targets}))
        assert arguments_of_config(CONFIG, path, self.NAMES)["lora_modules"] == expected

    def test_round_trip_without_attention_lora(self, tmp_path: Path) -> None:
        arguments = arguments_of_config(CONFIG, tmp_path / "adapter_config.json", self.NAMES)
        assert arguments["lora_modules"] == "k_proj,o_proj,q_proj,v_proj"
        assert config_from_arguments(arguments, PATH) == CONFIG


class TestTensors:
    @pytest.mark.parametrize("content", [{"a": 1}, [torch.ones(1)], {"a": StandIn()}], ids=["number", "list", "object"])
    def test_other_content_is_refused(self, content: Any, tmp_path: Path) -> None:
        torch.save(content, tmp_path / "non_lora_trainables.bin")
        with pytest.raises(ValueError, match=r"non_lora_trainables\.bin: (holds a|is damaged or holds more)"):
            read_weights(tmp_path / "non_lora_trainables.bin")

    def test_a_damaged_file_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "non_lora_trainables.bin"
        path.write_bytes((CHECKPOINT / "non_lora_trainables.bin").read_bytes()[:1000])
        with pytest.raises(ValueError, match="is damaged"):
            read_weights(path)

    def test_golden_folder_converts_and_comes_back(self) -> None:
        stored = golden_tensors()
        ours = from_original(stored, CONFIG, PATH)
        assert len(ours) == 3 * 8
        assert ours["model.layers.0.mlp.experts_B_gate"].shape == (3, 88, 4)
        assert ours["model.layers.2.mlp.experts_B_down"].shape == (3, 40, 4)
        key = "base_model.model.model.layers.1.mlp.moe_up.2.LoRA_B"
        torch.testing.assert_close(ours["model.layers.1.mlp.experts_B_up"][2], stored[key], rtol=0, atol=0)
        back = to_original(ours.items())
        assert set(back) == {name for name in stored if "mm_projector" not in name}
        for name, tensor in back.items():
            torch.testing.assert_close(tensor, stored[name], rtol=0, atol=0)

    def test_the_peft_prefix_is_optional(self) -> None:
        bare = {name.removeprefix("base_model.model."): tensor for name, tensor in golden_tensors().items()}
        assert from_original(bare, CONFIG, PATH).keys() == from_original(golden_tensors(), CONFIG, PATH).keys()

    @pytest.mark.parametrize(
        ("key", "expected"),
        [
            ("base_model.model.model.layers.0.mlp.shared_LoRA_A_gate", True),
            ("model.layers.31.mlp.moe_down.0.LoRA_B", True),
            ("model.layers.31.mlp.router.bias", True),
            ("base_model.model.model.mm_projector.0.weight", False),
            ("model.layers.0.mlp.moe_gate.0.LoRA_B.extra", False),
            ("model.layers.0.mlp.moe_side.0.LoRA_B", False),
        ],
    )
    def test_keys(self, key: str, expected: bool) -> None:
        assert is_original_key(key) is expected

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"moe_gate.2.LoRA_B": None}, r"missing \['moe_gate.2.LoRA_B'\]"),
            ({"moe_gate.3.LoRA_B": (88, 4)}, r"3 experts .*unexpected \['moe_gate.3.LoRA_B'\]"),
            ({"router.bias": None}, r"missing \['router.bias'\]"),
            ({"shared_LoRA_A_gate": None}, r"missing \['shared_LoRA_A_gate'\]"),
            ({"moe_up.1.LoRA_B": (88, 5)}, r"moe_up.1.LoRA_B' has shape \(88, 5\), expected \(88, 4\)"),
            ({"router.weight": (2, 40)}, r"router.weight' has shape \(2, 40\), expected \(3, 40\)"),
        ],
        ids=str,
    )
    def test_what_does_not_fit_is_named(self, change: dict[str, Any], message: str) -> None:
        tensors = golden_tensors()
        for part, shape in change.items():
            key = f"base_model.model.model.layers.1.mlp.{part}"
            if shape is None:
                del tensors[key]
            else:
                tensors[key] = torch.zeros(shape)
        with pytest.raises(ValueError, match=rf"^{PATH}: .*layers\.1\.mlp.*{message}"):
            from_original(tensors, CONFIG, PATH)

    @pytest.mark.parametrize("wrong", [{"experts": 2}, {"experts": 4}, {"rank": 8}], ids=str)
    def test_another_configuration_is_refused(self, wrong: dict[str, int]) -> None:
        config = RoutedMLPConfig.from_dict(CONFIG.to_dict() | wrong)
        with pytest.raises(ValueError, match=str(PATH)):
            from_original(golden_tensors(), config, PATH)

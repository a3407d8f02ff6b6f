"""The extension on a whole LLaVA, against the original's losses, routing, gradients and checkpoint."""

from __future__ import annotations

import copy
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor

from hydralora.config import RoutedMLPConfig
from hydralora.extension import HydraLoraExtension
from hydralora.model import record_routing, routed_blocks
from hydralora.moe_args import read_training_arguments
from hydralora.original import from_original, is_original_key, to_original
from llava.errors import CheckpointError
from llava.model.builder import load_pretrained_model
from llava.model.loss import LossReduction
from llava.train.lora import add_lora
from llava.train.options import TrainingArguments
from tests.checkpointed import checkpoint_layers
from tests.golden import golden_dir, load_case

pytestmark = pytest.mark.versions

BASE = golden_dir("llava") / "tiny-llava-v1.5"
CHECKPOINT = golden_dir("mllm_hydralora") / "tiny-llava-v1.5-lora-mohle"
LOSS_CASES = ["loss_dense_e3", "loss_sparse_e3"]
# The golden data's own tolerances; measured worst cases, with and without checkpointing: losses 1.2e-7, logits 7.5e-6,
# gradients 4.0e-7 at magnitudes up to 0.19 (an eighth of what is allowed).
LOSS = 1e-5  # absolute
LOGITS = {"rtol": 1e-4, "atol": 1e-4}
GRADIENT = {"rtol": 1e-3, "atol": 1e-6}
PREFIX = "base_model.model."


@cache
def _read_base() -> Any:
    return load_pretrained_model(str(BASE), device="cpu")[1]


def load_base() -> Any:
    """A base model of one's own; reading it from files is most of a test's time."""
    return copy.deepcopy(_read_base())


class GoldenRun:
    """The wrapped model of a loss case with its weights, ready to be trained with dropout off."""

    def __init__(self, name: str, tmp_path: Path, checkpointing: bool = False) -> None:
        self.case, self.tensors = load_case("mllm_hydralora", name)
        self.config = RoutedMLPConfig(
            experts=self.case["experts"],
            rank=self.case["rank"],
            alpha=self.case["alpha"],
            dropout=0.0,
            dense=self.case["dense"],
            balance_weight=self.case["balance_w"],
        )
        self.llava = load_base()
        self.llava.loss_reduction = LossReduction.ALL
        self.extension = HydraLoraExtension()
        self.llava.extensions.attach(self.llava, self.extension, self.config.to_dict())
        training = TrainingArguments(
            output_dir=str(tmp_path), use_cpu=True, lora_r=self.case["rank"], lora_alpha=self.case["alpha"],
            lora_dropout=0.0, lora_target_modules=self.case["modules"],
        )  # fmt: skip
        self.model: PeftModel = add_lora(self.llava, training)
        self._load_weights()
        for name_, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_" in name_ or name_ in self.added or "mm_projector" in name_)
        self.model.train()
        if checkpointing:
            checkpoint_layers(self.llava)
            self.llava.enable_input_require_grads()

    @property
    def added(self) -> set[str]:
        """Names of the extension's parameters in the wrapped model."""
        return {PREFIX + name for name in self.llava.extensions.named_parameters(self.llava)}

    def _load_weights(self) -> None:
        weights = {key.removeprefix("w/"): value for key, value in self.tensors.items() if key.startswith("w/")}
        ours = {PREFIX + name: value for name, value in from_original(weights, self.config, Path("case")).items()}
        rest = {name: value for name, value in weights.items() if not is_original_key(name)}
        assert ours.keys() == self.added
        result = self.model.load_state_dict(ours | rest, strict=False)
        assert not result.unexpected_keys

    def forward(self, **changes: Any) -> Any:
        names = ("input_ids", "labels", "attention_mask", "images")
        return self.model(**{name: self.tensors[f"in/{name}"] for name in names} | changes)

    def gradients(self) -> dict[str, Tensor | None]:
        """Gradients under the original's names; None where autograd left none."""
        found: dict[str, Tensor | None] = {}
        added = dict(self.extension.named_parameters(self.llava, self.config.to_dict()))
        with_gradient = {name: p.grad for name, p in added.items() if p.grad is not None}
        found |= to_original(with_gradient.items())
        found |= {key: None for key in to_original(added.items()) if key not in found}
        return found | {n: p.grad for n, p in self.model.named_parameters() if n not in self.added}


@pytest.fixture(params=LOSS_CASES)
def golden(request: pytest.FixtureRequest, tmp_path: Path) -> GoldenRun:
    return GoldenRun(request.param, tmp_path)


class TestLoss:
    def test_losses_equal_golden(self, golden: GoldenRun) -> None:
        output, out = golden.forward(), golden.case["out"]
        expected = {"lm": out["lm_loss"], "hydralora/balance": out["balance_loss_weighted"]}
        assert output.losses.keys() == expected.keys()
        for name, value in expected.items():
            assert output.losses[name].item() == pytest.approx(value, abs=LOSS), name
        assert output.loss.item() == pytest.approx(out["total_loss"], abs=LOSS)

    def test_logits_and_routing_equal_golden(self, golden: GoldenRun) -> None:
        mask = golden.tensors["out/attention_mask"]
        with record_routing(golden.llava) as routing:
            logits = golden.forward().logits
        stride = golden.case["logit_stride"]
        torch.testing.assert_close(logits[..., ::stride][mask], golden.tensors["out/logits_strided"][mask], **LOGITS)
        torch.testing.assert_close(logits.logsumexp(-1)[mask], golden.tensors["out/logsumexp"][mask], **LOGITS)
        for layer, passes in enumerate(routing.values()):
            expected = golden.tensors["out/routing"][layer]
            torch.testing.assert_close(passes[0][mask], expected[mask], rtol=1e-4, atol=1e-5)
            index = passes[0].argmax(-1)
            assert index[mask].equal(golden.tensors["out/expert_index"][layer][mask])

    @pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
    @pytest.mark.parametrize("name", LOSS_CASES)
    def test_gradients_equal_golden(self, name: str, checkpointing: bool, tmp_path: Path) -> None:
        golden = GoldenRun(name, tmp_path, checkpointing)
        golden.forward().loss.backward()
        ours = golden.gradients()
        assert set(golden.case["trainable"]) == {
            *(key for key in ours if is_original_key(key)),
            *(key for key, p in golden.model.named_parameters() if p.requires_grad and key not in golden.added),
        }
        compared = {key: value for key, value in golden.tensors.items() if key.startswith("grad/")}
        assert len(compared) == len(golden.case["grads"]) == 15
        for key, value in compared.items():
            torch.testing.assert_close(
                ours[key.removeprefix("grad/")], value, **GRADIENT, msg=lambda m, k=key: f"{k}: {m}"
            )
        trained = [ours[key] for key in golden.case["trainable"]]
        norm = torch.stack([gradient.norm() for gradient in trained if gradient is not None]).norm()
        assert norm.item() == pytest.approx(golden.case["out"]["grad_norm_all_trainable"], rel=1e-4)

    def test_checkpointing_of_the_original_would_be_noticed(self, golden: GoldenRun) -> None:
        """Its gradients under checkpointing, without the balance loss, lie outside the tolerance of the test above."""
        key = f"{PREFIX}model.layers.0.mlp.router.weight"
        kept, cut = golden.tensors[f"grad/{key}"], golden.tensors[f"grad_ckpt/{key}"]
        assert cut.numel() == 0 or not torch.allclose(kept, cut, **GRADIENT)

    def test_without_balance_loss_gradients_are_the_originals_under_checkpointing(self, golden: GoldenRun) -> None:
        golden.forward().losses["lm"].backward()
        ours = golden.gradients()
        for key, value in golden.tensors.items():
            if key.startswith("grad_ckpt/"):
                gradient = ours[key.removeprefix("grad_ckpt/")]
                if value.numel() == 0:
                    assert gradient is None, key
                else:
                    torch.testing.assert_close(gradient, value, **GRADIENT)

    def test_no_attention_mask_means_that_all_tokens_are_valid(self, golden: GoldenRun) -> None:
        rows = {"input_ids": golden.tensors["in/input_ids"][:1], "labels": golden.tensors["in/labels"][:1]}
        rows["images"] = golden.tensors["in/images"][:1]
        ones = torch.ones_like(rows["input_ids"], dtype=torch.bool)
        without = golden.forward(attention_mask=None, **rows).losses["hydralora/balance"]
        torch.testing.assert_close(without, golden.forward(attention_mask=ones, **rows).losses["hydralora/balance"])

    def test_padding_does_not_count(self, golden: GoldenRun) -> None:
        out = golden.forward()
        wrong = golden.forward(attention_mask=torch.ones_like(golden.tensors["in/attention_mask"]))
        assert (out.losses["hydralora/balance"] - wrong.losses["hydralora/balance"]).abs() > 1e-4


class TestRecording:
    def test_nothing_is_recorded_without_labels_or_after_the_loss(self, golden: GoldenRun) -> None:
        golden.forward(labels=None)
        assert not any(block.observers for block in routed_blocks(golden.llava).values())
        golden.forward()
        assert not any(block.observers for block in routed_blocks(golden.llava).values())

    def test_metrics_since_the_last_call(self, golden: GoldenRun) -> None:
        assert golden.llava.extensions.metrics(golden.llava) == {}
        golden.forward()
        golden.forward()
        metrics = golden.llava.extensions.metrics(golden.llava)
        index = golden.tensors["out/expert_index"][:, golden.tensors["out/attention_mask"]]
        shares = torch.nn.functional.one_hot(index, 3).float().mean(dim=(0, 1))
        assert [metrics[f"hydralora/share_{e}"] for e in range(3)] == pytest.approx(shares.tolist(), abs=1e-5)
        assert 0 < metrics["hydralora/entropy"] < torch.tensor(3.0).log()
        assert golden.llava.extensions.metrics(golden.llava) == {}

    def test_an_error_leaves_nothing_behind(self, golden: GoldenRun) -> None:
        """After a pass with labels that broke off, one without records nothing, and one with labels is as ever."""

        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        expected = golden.forward().losses["hydralora/balance"]
        handle = golden.llava.get_decoder().layers[-1].register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            golden.forward()
        handle.remove()
        golden.forward(labels=None)
        assert not any(block.observers for block in routed_blocks(golden.llava).values())
        torch.testing.assert_close(golden.forward().losses["hydralora/balance"], expected)

    def test_an_evaluation_is_not_counted(self, golden: GoldenRun) -> None:
        golden.model.eval()
        assert "hydralora/balance" in golden.forward().losses
        assert golden.llava.extensions.metrics(golden.llava) == {}

    @pytest.mark.parametrize("change", [{"experts": 1}, {"balance_weight": 0.0}], ids=str)
    def test_no_balance_loss_with_one_expert_or_weight_zero(self, change: dict[str, Any]) -> None:
        llava = load_base()
        config = RoutedMLPConfig.from_dict({"rank": 2, **change})
        llava.extensions.attach(llava, HydraLoraExtension(), config.to_dict())
        _, tensors = load_case("mllm_hydralora", LOSS_CASES[0])
        names = ("input_ids", "labels", "attention_mask", "images")
        assert set(llava(**{name: tensors[f"in/{name}"] for name in names}).losses) == {"lm"}


class TestAttach:
    @pytest.mark.parametrize("config", [{"rank": 0}, {"ranks": 4}], ids=str)
    def test_a_damaged_configuration_is_named(self, config: dict[str, Any]) -> None:
        with pytest.raises(CheckpointError, match=r"'hydralora'.*rank"):
            HydraLoraExtension().attach(torch.nn.Linear(1, 1), config)


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    """The golden checkpoint through the loader, and what the original computes with it."""
    _, model, _, _ = load_pretrained_model(str(CHECKPOINT), model_base=str(BASE), device="cpu")
    return model, load_case("mllm_hydralora", "checkpoint")


class TestCheckpoint:
    def test_values_equal_golden(self, loaded: tuple[Any, Any]) -> None:
        model, (_, tensors) = loaded
        with torch.no_grad(), record_routing(model) as routing:
            logits = model(input_ids=tensors["in/input_ids"], images=tensors["in/images"]).logits
        torch.testing.assert_close(logits[..., ::16], tensors["out/logits_strided"], **LOGITS)
        torch.testing.assert_close(logits.logsumexp(-1), tensors["out/logsumexp"], **LOGITS)
        assert logits.argmax(-1).equal(tensors["out/argmax"])
        stacked = torch.stack([passes[0] for passes in routing.values()])
        torch.testing.assert_close(stacked, tensors["out/routing"], rtol=1e-4, atol=1e-5)
        merged = model.get_model().layers[0].self_attn.q_proj.weight[:4]
        torch.testing.assert_close(merged, tensors["out/merged_q_proj_layer0"], rtol=1e-4, atol=1e-5)

    def test_tokens_equal_golden(self, loaded: tuple[Any, Any]) -> None:
        model, (case, tensors) = loaded
        tokens = model.generate(
            tensors["in/input_ids"], images=tensors["in/images"], do_sample=False, max_new_tokens=10
        )
        assert tokens.tolist() == [row[1:] for row in case["out"]["tokens"]]

    def test_one_changed_expert_weight_shows(self, loaded: tuple[Any, Any]) -> None:
        model, (_, tensors) = loaded
        block = next(iter(routed_blocks(model).values()))
        with torch.no_grad():
            block.experts_B_down[0, 0, 0] += 0.05
            logits = model(input_ids=tensors["in/input_ids"], images=tensors["in/images"]).logits
            block.experts_B_down[0, 0, 0] -= 0.05
        assert (logits[..., ::16] - tensors["out/logits_strided"]).abs().max() > 10 * LOGITS["atol"]

    def test_configuration_and_claims(self) -> None:
        state = HydraLoraExtension().import_checkpoint(CHECKPOINT)
        assert state is not None
        assert RoutedMLPConfig.from_dict(state.config) == RoutedMLPConfig(3, 4, 8, 0.05, True, 0.05)
        assert len(state.claimed) == 1 + 3 * (3 + 9 + 2)
        assert "moe_args.pth" in state.claimed
        assert not any("mm_projector" in name for name in state.claimed)

    def test_other_folders_are_not_claimed(self, tmp_path: Path) -> None:
        extension = HydraLoraExtension()
        assert extension.import_checkpoint(tmp_path) is None
        assert extension.import_checkpoint(golden_dir("llava") / "tiny-llava-lora") is None
        assert extension.import_checkpoint(BASE) is None

    def test_missing_arguments_are_named(self, tmp_path: Path) -> None:
        folder = tmp_path / "any name at all"
        shutil.copytree(CHECKPOINT, folder)
        (folder / "moe_args.pth").unlink()
        with pytest.raises(CheckpointError, match=r"non_lora_trainables\.bin .*moe_args\.pth is missing"):
            HydraLoraExtension().import_checkpoint(folder)

    def test_tensors_that_do_not_fit_are_named(self, tmp_path: Path) -> None:
        folder = tmp_path / "checkpoint"
        shutil.copytree(CHECKPOINT, folder)
        tensors = torch.load(folder / "non_lora_trainables.bin", weights_only=True)
        del tensors[f"{PREFIX}model.layers.2.mlp.router.weight"]
        torch.save(tensors, folder / "non_lora_trainables.bin")
        with pytest.raises(CheckpointError, match=r"non_lora_trainables\.bin: .*layers\.2\.mlp.*router\.weight"):
            HydraLoraExtension().import_checkpoint(folder)


class TestExport:
    def test_the_original_layout_comes_back(self, loaded: tuple[Any, Any], tmp_path: Path) -> None:
        """Import, export beside what the core exports, and import again: nothing changes, file by file."""
        extension = HydraLoraExtension()
        model, _ = loaded
        shutil.copy(CHECKPOINT / "adapter_config.json", tmp_path)
        stored = torch.load(CHECKPOINT / "non_lora_trainables.bin", weights_only=True)
        torch.save({k: v for k, v in stored.items() if "mm_projector" in k}, tmp_path / "non_lora_trainables.bin")
        extension.export_checkpoint(model, model.extensions.configs["hydralora"], tmp_path)
        written = torch.load(tmp_path / "non_lora_trainables.bin", weights_only=True)
        assert written.keys() == stored.keys()
        for name, tensor in stored.items():
            torch.testing.assert_close(written[name], tensor, rtol=0, atol=0)
        fields = load_case("mllm_hydralora", "checkpoint")[0]["moe_args_fields"]
        attributes = read_training_arguments(tmp_path / "moe_args.pth")
        assert set(attributes.pop("lora_modules").split(",")) == set(fields["lora_modules"].split(","))
        assert attributes == {name: fields[name] for name in attributes}
        flags = json.loads((golden_dir("mllm_hydralora") / "flags.json").read_text())["added"]
        assert attributes.keys() >= {flag["name"] for flag in flags} - {"lora_modules"}
        before, after = extension.import_checkpoint(CHECKPOINT), extension.import_checkpoint(tmp_path)
        assert before is not None
        assert after is not None
        assert (before.config, before.claimed) == (after.config, after.claimed)

    def test_another_attention_rank_is_refused(self, loaded: tuple[Any, Any], tmp_path: Path) -> None:
        model, _ = loaded
        adapter = json.loads((CHECKPOINT / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps(adapter | {"r": 6}))
        with pytest.raises(CheckpointError, match=r"r 6 and 4"):
            HydraLoraExtension().export_checkpoint(model, model.extensions.configs["hydralora"], tmp_path)
        assert not (tmp_path / "moe_args.pth").exists()

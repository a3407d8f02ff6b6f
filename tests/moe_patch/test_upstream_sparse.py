"""Dynamic-LLaVA in the patched checkout: the golden cases by its code, a run, and checkpoints on both sides.

`upstream_checkout.py` says what these tests need; `sparse_cases.py` runs the cases.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from dynamic.extension import DynamicExtension
from dynamic.model import added_parameters
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import save_checkpoint
from tests.dynamic.sparse_checkpoint import SPARSE as SMALL
from tests.dynamic.sparse_checkpoint import write_sparse_checkpoint
from tests.golden import golden_dir, load_case
from tests.moe_patch.upstream_checkout import (
    HERE,
    LLAVA,
    NEEDS_UPSTREAM,
    SPARSE,
    Upstream,
    answers,
    losses_of,
    our_answers,
    our_logits,
    weights_of,
)

pytestmark = NEEDS_UPSTREAM
# The tolerances of the golden data.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}
TRAINED = ("tau1", "tau01", "tau1_instruct", "tau01_instruct", "vision_only", "text_only", "e2e")
SEGMENTS = ("train_single_right", "train_multi_right", "train_left", "trunc_answer", "trunc_image", "infer_single")
SEGMENTS += ("infer_multi", "infer_left_batch")


@dataclass
class Cases:
    """What the checkout computed for the golden cases."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]

    def of(self, case: str) -> dict[str, Tensor]:
        prefix = f"{case}/"
        found = {name[len(prefix) :]: tensor for name, tensor in self.tensors.items() if name.startswith(prefix)}
        assert found
        return found


@pytest.fixture(scope="module")
def applied(upstream: Upstream) -> Upstream:
    if "transformers 4.37" not in upstream.log[0]:
        pytest.skip("Dynamic-LLaVA is carried for transformers 4.37")
    upstream.moe_patch("apply", "--extensions", "dynamic")
    return upstream


@pytest.fixture(scope="module")
def cases(applied: Upstream) -> Cases:
    output = applied.work / "cases"
    program = str(HERE / "sparse_cases.py")
    applied.program("python sparse_cases.py", program, str(golden_dir("dynamic")), str(output))
    return Cases(load_file(f"{output}.safetensors"), json.loads(Path(f"{output}.json").read_text()))


class TestGolden:
    @pytest.mark.parametrize("name", SEGMENTS)
    def test_where_the_parts_lie(self, cases: Cases, name: str) -> None:
        case, tensors = load_case("dynamic", f"segments_{name}")
        assert cases.facts[f"segments_{name}"] == case["scalars"]["input_embeds_indices"]
        found = cases.of(f"segments_{name}")
        assert {f"out/{key}" for key in found} == {
            key for key in tensors if key.startswith("out/") and "image" not in key and "position" not in key
        }
        torch.testing.assert_close(found["inputs_embeds"], tensors["out/inputs_embeds"], **CLOSE)
        for key in ("labels", "attention_mask"):
            if key in found:
                assert torch.equal(found[key].long(), tensors[f"out/{key}"].long())

    @pytest.mark.parametrize("name", [*TRAINED, "tau1_instruct.checkpointed"])
    def test_a_pass_with_a_loss(self, cases: Cases, name: str) -> None:
        """Logits, policy, decisions, losses and every gradient."""
        case, tensors = load_case("dynamic", f"train_{name.partition('.')[0]}")
        found, scalars = cases.of(f"train_{name}"), case["scalars"]
        real = tensors["in/attention_mask"].bool()
        if case["hp"]["input_embeds_indices"] is None:  # the mask of the ids is not that of the spliced sequence
            real = torch.ones(found["logits"].shape[:2], dtype=torch.bool)
            for row, parts in enumerate(case["hp"]["expected_input_embeds_indices"]):
                real[row, parts["answer"][1] :] = False
        torch.testing.assert_close(found["logits"][real], tensors["out/logits"][real], **CLOSE)
        assert ("policy" in found) == ("out/policy" in tensors)
        if "policy" in found:
            torch.testing.assert_close(found["policy"], tensors["out/policy"][..., 0], rtol=0, atol=1e-6)
        assert found["loss_total"].item() == pytest.approx(scalars["loss_total"], rel=1e-5)
        judges = [key.removeprefix("out/").removesuffix("_logits") for key in tensors if key.endswith("_logits")]
        assert judges
        for judge in judges:
            expected = case["sparse_config"]["mask_loss_weight"] * scalars[f"loss_{judge}_mask_unweighted"]
            assert found[f"loss_{judge}"].item() == pytest.approx(expected, rel=1e-5)
            for row, kept in enumerate(found[f"{judge}_kept"]):
                golden = tensors["out/image_mask"][row] if judge == "image" else tensors[f"out/{judge}_mask_{row}"]
                torch.testing.assert_close(kept[: len(golden)], golden, rtol=0, atol=1e-6)
        gradients = [key for key in tensors if key.startswith("grad/")]
        assert gradients
        for key in gradients:
            if key == "grad/inputs_embeds" and key not in found:
                continue  # the program has the ids of this case
            atol = 1e-4 * max(1.0, float(tensors[key].abs().max()))
            torch.testing.assert_close(found[key], tensors[key], rtol=1e-3, atol=atol, msg=key)

    @pytest.mark.parametrize("name", ["b1_k02", "b1_k05", "b1_instruct"])
    def test_a_prompt_is_shortened(self, cases: Cases, name: str) -> None:
        case, tensors = load_case("dynamic", f"prefill_{name}")
        found = cases.of(f"prefill_{name}")
        torch.testing.assert_close(found["logits"], tensors["out/logits"], **CLOSE)
        assert cases.facts[f"prefill_{name}"][0] == case["scalars"]["kv_len_per_layer"]
        if "out/key_cache_last" in tensors:
            torch.testing.assert_close(found["prompt_key_cache_last"], tensors["out/key_cache_last"], **CLOSE)

    @pytest.mark.parametrize("name", ["decode_b1", "decode_b2_alone_0", "decode_b2_alone_1"])
    def test_generated_tokens_are_dropped(self, cases: Cases, name: str) -> None:
        _, tensors = load_case("dynamic", name)
        found = cases.of(name)
        torch.testing.assert_close(found["steps"], tensors["out/logits"], **CLOSE)
        assert cases.facts[name] == tensors["out/true_cache_length"].flatten(1).tolist()
        if "out/final_key_cache_last_layer" in tensors:
            torch.testing.assert_close(found["key_cache_last"], tensors["out/final_key_cache_last_layer"], **CLOSE)

    def test_generate(self, cases: Cases) -> None:
        _, tensors = load_case("dynamic", "generate_b1")
        found = cases.of("generate_b1")
        # The original's sequences begin with a token that stands for the prompt.
        assert found["sequences"][:, -24:].tolist() == tensors["out/sequences"][:, -24:].tolist()
        torch.testing.assert_close(found["scores"], tensors["out/scores"], **CLOSE)

    @pytest.mark.parametrize("name", ["multiround_instruct", "multiround_noinstruct"])
    def test_a_later_turn(self, cases: Cases, name: str) -> None:
        case, tensors = load_case("dynamic", name)
        found, facts, expected = cases.of(name), cases.facts[name], case["scalars"]["calls"]
        assert facts["argmax"] == [call["argmax"] for call in expected]
        assert facts["lengths"] == [[length for (length,) in call["true_cache_length"]] for call in expected]
        for call in range(len(expected)):
            torch.testing.assert_close(found[f"call{call}_logits"], tensors[f"out/call{call}_logits"], **CLOSE)

    def test_updates(self, cases: Cases) -> None:
        """Losses, temperature, groups of the optimizer and weights of four updates by upstream's Trainer."""
        case, tensors = load_case("dynamic", "trainer_steps")
        logged = [entry for entry in cases.facts["trainer_steps"] if "loss" in entry]
        golden = [entry for entry in case["scalars"]["log_history"] if "loss" in entry]
        names = {"image_loss": "image_masks_loss", "output_text_loss": "output_text_mask_loss", "tau": "gumbel_tau"}
        for ours, original in {**names, "loss": "loss", "learning_rate": "llm_learning_rate"}.items():
            expected = [entry[original] for entry in golden]
            assert [entry[ours] for entry in logged] == pytest.approx(expected, rel=1e-4, abs=6e-5), ours
        found = cases.of("trainer_steps")
        assert found.keys() == set(case["hp"]["saved_parameters"])
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, tensors[f"out/final/{name}"], rtol=0, atol=1e-5, msg=name)
        unused = "model.instruct_score_predictor."  # the original makes it although it is switched off
        groups = [
            ({name for name in group["names"] if not name.startswith(unused)}, group["lr"], group["weight_decay"])
            for group in case["optimizer_groups"]
        ]
        assert [(set(g["names"]), g["lr"], g["weight_decay"]) for g in cases.facts["groups"]] == [
            *groups[2:],
            *groups[:2],
        ]

    @pytest.mark.parametrize(
        ("what", "message"),
        [
            ("batch", "a pass over 2 sequences: moe_patch carries --dynamic for one sequence at a time"),
            ("beams", "beams and num_return_sequences count"),
            ("no cache", "use_cache False"),
            ("attentions", "output_attentions"),
            ("no segments", "where images and instructions lie in these embeddings is unknown"),
            ("images", "at most one image per sample, as in the original"),
            ("other cache", "past_key_values is a tuple"),
            ("twice", "has predictors already"),
        ],
    )
    def test_what_is_refused(self, cases: Cases, what: str, message: str) -> None:
        assert message in cases.facts[f"refused/{what}"]


def train(upstream: Upstream, output: str, *flags: str) -> list[float]:
    words = SPARSE.replace("./sparse", f"./{output}").split()
    title = f"python llava/train/train.py --dynamic True ... --output_dir ./{output}"
    return losses_of(upstream.program(title, str(upstream.checkout / "llava/train/train.py"), *words, *flags))


@pytest.fixture(scope="module")
def trained(applied: Upstream) -> list[float]:
    return train(applied, "sparse")


class TestRun:
    """In bf16, as the published command."""

    def test_a_resumed_run_ends_where_the_whole_one_does(self, applied: Upstream, trained: list[float]) -> None:
        assert len(trained) == 3
        shutil.copytree(applied.work / "sparse" / "checkpoint-2", applied.work / "resumed" / "checkpoint-2")
        assert train(applied, "resumed") == trained[2:]
        whole, again, middle = (
            weights_of(applied.work / name) for name in ("sparse", "resumed", "sparse/checkpoint-2")
        )
        assert whole.keys() == again.keys() == middle.keys()
        for name, tensor in whole.items():
            torch.testing.assert_close(again[name], tensor, rtol=0, atol=0, msg=name)
        moved = {name for name, tensor in whole.items() if not tensor.equal(middle[name])}
        parts = ("image_score_predictor", "output_text_score_predictor", "instruct_score_predictor", "lm_head")
        assert [part for part in parts if not any(part in name for name in moved)] == []
        assert [name for name in moved if "vision_tower" in name] == []

    @pytest.mark.parametrize("folder", ["sparse", "middle"])
    def test_it_answers_as_ours_does(self, applied: Upstream, trained: list[float], folder: str) -> None:
        """Its result and the checkpoint on the way; no word in the names of these folders means LLaVA."""
        if folder == "middle":
            shutil.copytree(applied.work / "sparse" / "checkpoint-2", applied.work / folder)
        found, _ = applied.logits(folder, "text")
        applied.close("the same checkpoint in llava-extensions", found, our_logits(applied, folder, "text"))
        assert answers(applied, folder) == our_answers(applied, folder)

    def test_a_run_goes_on_from_its_result_as_a_base(self, applied: Upstream, trained: list[float]) -> None:
        """Its predictors are taken over; without the flag they would be lost, which is refused."""
        base = ("--model_name_or_path", "./sparse", "--save_strategy", "no")
        train(applied, "further", *base, "--learning_rate", "0", "--predictor_lr", "0", "--max_steps", "1")
        before, after = weights_of(applied.work / "sparse"), weights_of(applied.work / "further")
        names = [name for name in before if "_score_predictor." in name]
        assert names
        assert [name for name in names if not after[name].equal(before[name])] == []

    @pytest.mark.parametrize(
        ("flags", "message"),
        [
            (("--lora_enable", "True"), "--dynamic True beside --lora_enable is not carried by moe_patch"),
            (("--tune_mm_mlp_adapter", "True"), "--tune_mm_mlp_adapter True freezes all but the projector"),
            (("--bits", "8"), "--bits 8: --dynamic trains full weights"),
            (("--vision_keep_rate", "0"), "vision_keep_rate"),
            (("--dynamic", "False"), "without effect; pass --dynamic True too"),
        ],
    )
    def test_flags_that_are_refused(self, applied: Upstream, flags: tuple[str, ...], message: str) -> None:
        with pytest.raises(AssertionError, match=message):
            train(applied, "refused", *flags)


class TestOurs:
    """Checkpoints of llava-extensions, with full weights and on a base."""

    @pytest.mark.parametrize("inputs", ["inputs", "text"])
    @pytest.mark.parametrize("kind", ["whole", "on-a-base"])
    def test_the_checkout_reads_them(self, applied: Upstream, kind: str, inputs: str) -> None:
        folder = applied.work / f"ours-{kind}"
        if not folder.exists():
            write_sparse_checkpoint(folder) if kind == "whole" else write_predictors(folder)
        logits, _ = applied.logits(folder.name, inputs)
        applied.close(
            f"the same checkpoint in llava-extensions ({inputs})", logits, our_logits(applied, folder.name, inputs)
        )
        assert logits.shape[1] < 20, "image tokens were dropped, or there were none"


def write_predictors(folder: Path) -> None:
    """Predictors alone, for the tiny base."""
    _, model, _, _ = load_pretrained_model(str(LLAVA / "tiny-llava-v1.5"), device="cpu")
    model.requires_grad_(False)
    model.extensions.attach(model, DynamicExtension(), SMALL)
    generator = torch.Generator().manual_seed(1)
    for _, parameter in added_parameters(model):
        parameter.data.normal_(std=0.5, generator=generator)
    save_checkpoint(model, folder)

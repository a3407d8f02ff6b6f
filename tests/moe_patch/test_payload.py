"""A patched miniature trains, saves, resumes and loads; its checkpoints and ours are the same to both."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from hydralora.config import RoutedMLPConfig
from hydralora.extension import HydraLoraExtension
from hydralora.moe_args import read_training_arguments
from llava.model.builder import load_pretrained_model
from llava.model.checkpoint import save_checkpoint
from llava.train.lora import add_lora
from llava.train.options import TrainingArguments
from mma.config import MmaConfig
from mma.extension import MmaExtension
from moe_patch import operations
from moe_patch.checkout import Checkout
from moe_patch.extensions import chosen
from tests.dynamic.sparse_checkpoint import write_sparse_checkpoint
from tests.golden import golden_dir
from tests.moe_patch import miniature

BASE = golden_dir("llava") / "tiny-llava-v1.5"
RUNS = Path(__file__).parent / "miniature_runs.py"
TOWER = golden_dir("llava") / "tiny-clip"
IDS = torch.arange(5, 25).reshape(2, 10)  # those of the program
WITH_IMAGE = IDS.clone()
WITH_IMAGE[:, 3] = -200
# The same weights in two loaders, in one version of torch: measured at most 2.7e-6 at logits up to 9.
LOGITS = {"rtol": 1e-5, "atol": 1e-5}


@dataclass
class Runs:
    """What `miniature_runs.py` left."""

    work: Path
    logits: dict[str, Tensor]
    messages: dict[str, str]
    our_logits: Tensor


def our_logits(folder: Path, **inputs: Tensor) -> Tensor:
    _, model, _, _ = load_pretrained_model(str(folder), str(BASE), device="cpu")
    with torch.no_grad():
        return model(**(inputs or {"input_ids": IDS})).logits


def write_our_checkpoint(folder: Path) -> None:
    """LoRA on two projections, routed blocks whose experts act, and a changed projector, in our own layout."""
    _, llava, _, _ = load_pretrained_model(str(BASE), device="cpu")
    config = RoutedMLPConfig(experts=2, rank=3, alpha=6, dropout=0.0, dense=False)
    llava.extensions.attach(llava, HydraLoraExtension(), config.to_dict())
    training = TrainingArguments(output_dir=str(folder), use_cpu=True, lora_r=4, lora_target_modules="q_proj,o_proj")
    model = add_lora(llava, training)
    llava.get_model().mm_projector.requires_grad_(True)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1)
    save_checkpoint(model, folder)


def write_our_adapters(folder: Path) -> None:
    """Adapters of LaVIN that act, in decoder and tower, and a changed projector, in our own layout."""
    _, llava, _, _ = load_pretrained_model(str(BASE), device="cpu")
    config = MmaConfig("block", "router_block", adapter_dim=4, adapter_dropout=0.0)
    llava.extensions.attach(llava, MmaExtension(), config.to_dict())
    llava.get_model().mm_projector.requires_grad_(True)
    added = MmaExtension().named_parameters(llava, config.to_dict())
    with torch.no_grad():
        for parameter in (*(p.requires_grad_(True) for _, p in added), *llava.get_model().mm_projector.parameters()):
            parameter.normal_(std=0.3)
    save_checkpoint(llava, folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    work = tmp_path_factory.mktemp("miniature")
    folder = miniature.write(work / "LLaVA")
    operations.apply(Checkout(folder), chosen(["hydralora", "mma", "dynamic"]))
    write_our_checkpoint(work / "ours")
    write_our_adapters(work / "ours-mma")
    write_sparse_checkpoint(work / "ours-sparse")
    (work / "tiny-clip").symlink_to(TOWER)  # the base names it so, relative to where the programs run
    environment = os.environ | {"PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(RUNS), str(BASE), str(TOWER), str(work / "ours"), str(work)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=work)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    messages = json.loads((work / "messages.json").read_text())
    return Runs(work, load_file(work / "logits.safetensors"), messages, our_logits(work / "ours"))


class TestTraining:
    def test_the_folder_is_that_of_the_original(self, runs: Runs) -> None:
        folder = runs.work / "whole"
        arguments = read_training_arguments(folder / "moe_args.pth")
        expected = {"lora_rank": 4, "lora_alpha": 8, "llm_moe_num_experts": 3, "dense_moe": True, "moe_balance_w": 0.05}
        assert {name: arguments[name] for name in expected} == expected
        names = set(torch.load(folder / "non_lora_trainables.bin", weights_only=True))
        golden = golden_dir("mllm_hydralora") / "tiny-llava-v1.5-lora-mohle" / "non_lora_trainables.bin"
        assert names == set(torch.load(golden, weights_only=True))

    def test_lora_is_where_the_flag_says(self, runs: Runs) -> None:
        names = load_file(runs.work / "whole" / "adapter_model.safetensors")
        assert {name.split(".")[-3] for name in names} == {"q_proj", "v_proj"}
        assert len(names) == 3 * 2 * 2  # layers, projections, A and B

    def test_every_checkpoint_on_the_way_is_whole(self, runs: Runs) -> None:
        final = {path.name for path in (runs.work / "whole").iterdir() if path.is_file()}
        middle = {path.name for path in (runs.work / "whole" / "checkpoint-2").iterdir()}
        needed = {"moe_args.pth", "non_lora_trainables.bin", "adapter_model.safetensors", "config.json"}
        assert final & middle >= needed
        torch.testing.assert_close(runs.logits["middle"], our_logits(runs.work / "whole" / "checkpoint-2"), **LOGITS)
        assert (runs.logits["middle"] - runs.logits["whole"]).abs().max() > 1e-2

    def test_a_resumed_run_ends_where_the_whole_one_does(self, runs: Runs) -> None:
        whole, again = (
            torch.load(runs.work / name / "non_lora_trainables.bin", weights_only=True) for name in ("whole", "again")
        )
        assert whole.keys() == again.keys()
        for name in whole:
            torch.testing.assert_close(again[name], whole[name], rtol=0, atol=0, msg=name)
        torch.testing.assert_close(runs.logits["again"], runs.logits["whole"], rtol=0, atol=0)

    def test_without_blocks_the_folder_is_upstreams(self, runs: Runs) -> None:
        names = torch.load(runs.work / "plain" / "non_lora_trainables.bin", weights_only=True)
        assert {name.split(".")[3] for name in names} == {"mm_projector"}
        assert not (runs.work / "plain" / "moe_args.pth").exists()
        assert (our_logits(runs.work / "plain") - our_logits(BASE)).abs().max() > 1e-3

    @pytest.mark.parametrize(
        ("case", "message"),
        [
            ("modules", "--lora_modules names ['gate_proj']"),
            ("unknown", "--lora_modules names ['w_pack']; the decoder has ['"),
            ("experts", "experts is 0, expected at least 1"),
            ("idle", "--moe_balance_w: without effect; pass --use_lora True too"),
            ("tower", "--vit_trainable all"),
            ("contradiction", "--lora_r 8 contradicts --lora_rank 4"),
            ("projector", "--tune_mm_mlp_adapter True"),
            ("reentrant", "use_reentrant"),
            ("beside", "--mma True beside LoRA is not carried by moe_patch"),
            ("mma-image", "pass --visual_input llava"),
            ("mma-tower", "--mma True needs --vision_tower"),
            ("mma-idle", "--adapter_dim: without effect; pass --mma True too"),
            ("mma-values", "adapter_type is 'everywhere'"),
            ("sparse", "Dynamic-LLaVA is carried for transformers 4.37; installed is "),
            ("sparse-idle", "--vision_keep_rate, --predictor_lr: without effect; pass --dynamic True too"),
            ("sparse-load", "Dynamic-LLaVA is carried for transformers 4.37; installed is "),
        ],
    )
    def test_flags_that_are_refused(self, runs: Runs, case: str, message: str) -> None:
        assert message in runs.messages[case]


class TestLoading:
    def test_ours_reads_what_the_checkout_wrote(self, runs: Runs) -> None:
        torch.testing.assert_close(runs.logits["whole"], our_logits(runs.work / "whole"), **LOGITS)

    def test_the_checkout_reads_what_ours_wrote(self, runs: Runs) -> None:
        torch.testing.assert_close(runs.logits["ours"], runs.our_logits, **LOGITS)

    def test_the_checkpoints_differ_from_the_base_and_each_other(self, runs: Runs) -> None:
        logits = [our_logits(BASE), *(runs.logits[name] for name in ("whole", "middle", "ours"))]
        for index, one in enumerate(logits):
            assert all((one - other).abs().max() > 1e-3 for other in logits[index + 1 :])

    def test_blocks_are_in_place_and_frozen(self, runs: Runs) -> None:
        blocks = {name: int(runs.logits[f"{name}.blocks"]) for name in ("whole", "again", "middle", "ours")}
        assert blocks == {"whole": 3, "again": 3, "middle": 3, "ours": 3}

    def test_what_is_missing_is_named(self, runs: Runs) -> None:
        assert "give it as model_base" in runs.messages["base"]
        assert "moe_args.pth, which says how they are wired, is gone" in runs.messages["settings"]


class TestModalities:
    """Adapters of LaVIN: what the checkout trained, and what ours did, on text and on images."""

    @pytest.mark.parametrize("name", ["mma", "ours-mma"])
    @pytest.mark.parametrize("kind", ["text", "image"])
    def test_both_read_it_the_same(self, runs: Runs, name: str, kind: str) -> None:
        inputs, key = {"input_ids": IDS}, name
        if kind == "image":
            inputs, key = {"input_ids": WITH_IMAGE, "images": runs.logits["images"]}, f"{name}.image"
        theirs = runs.logits[key]
        torch.testing.assert_close(theirs, our_logits(runs.work / name, **inputs), **LOGITS)
        assert (theirs - our_logits(BASE, **inputs)).abs().max() > 1e-2

    def test_the_folder_holds_what_was_trained_and_no_more(self, runs: Runs) -> None:
        names = {path.relative_to(runs.work / "mma").as_posix() for path in (runs.work / "mma").rglob("*")}
        files = {name for name in names if name.endswith((".safetensors", ".bin")) and "checkpoint-" not in name}
        assert files == {"extensions/mma/model.safetensors", "mm_projector.safetensors"}
        trained = load_file(runs.work / "mma" / "extensions" / "mma" / "model.safetensors")
        routers = [tensor for name, tensor in trained.items() if name.endswith("adapter.conv_D.weight")]
        assert len(routers) == 3 + 2  # layers of the decoder, and blocks of the tower before the selected one
        assert all(tensor.abs().max() > 0 for tensor in routers)  # they start as zero

    @pytest.mark.parametrize("name", ["gradient", "waiting"])
    def test_gradients_are_those_of_ours(self, runs: Runs, name: str) -> None:
        """Layers are checkpointed there; with `waiting` they are recomputed after a pass of the other modality."""
        _, model, _, _ = load_pretrained_model(str(runs.work / "ours-mma"), str(BASE), device="cpu")
        projector = model.get_model().mm_projector
        parameters = dict(MmaExtension().named_parameters(model, {}))
        parameters |= {f"model.mm_projector.{name}": parameter for name, parameter in projector.named_parameters()}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        model.get_vision_tower().trainable = True
        model.train()
        for ids, inputs in ((WITH_IMAGE, {"images": runs.logits["images"]}), (IDS, {})):
            model(input_ids=ids, labels=ids.where(ids >= 0, -100), **inputs).loss.backward()
        theirs = {key[len(name) + 1 :]: t for key, t in runs.logits.items() if key.startswith(f"{name}.")}
        assert theirs.keys() == parameters.keys()
        for key, parameter in parameters.items():
            apart = (theirs[key] - parameter.grad).abs().max()
            assert apart <= 1e-6 + 1e-4 * parameter.grad.abs().max(), key
        assert min(tensor.abs().max() for key, tensor in theirs.items() if "expert_weights" in key) > 1e-6

    def test_a_step_of_generation_has_the_modality_of_its_prompt(self, runs: Runs) -> None:
        torch.testing.assert_close(runs.logits["steps"], runs.logits["ours-mma.image"], **LOGITS)

    @pytest.mark.parametrize("beams", [1, 2])
    def test_generation_is_that_of_ours(self, runs: Runs, beams: int) -> None:
        _, model, _, _ = load_pretrained_model(str(runs.work / "ours-mma"), str(BASE), device="cpu")
        prompts = torch.cat([WITH_IMAGE[:1], WITH_IMAGE[:1]]) if beams > 1 else WITH_IMAGE
        options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "num_beams": beams}
        ours = model.generate(prompts, images=runs.logits["images"], **options)
        theirs = runs.logits[f"generated.{beams}"]
        assert torch.equal(theirs[:, -5:], ours[:, -5:])

    @pytest.mark.parametrize("case", ["rows", "rows-generate", "rows-number"])
    def test_a_modality_that_nothing_says_is_refused(self, runs: Runs, case: str) -> None:
        assert "the modality of 2 sequences is unknown" in runs.messages[case]

    def test_a_pass_around_the_model_is_refused(self, runs: Runs) -> None:
        assert "was called without 'modality_routing'" in runs.messages["rows-layer"]

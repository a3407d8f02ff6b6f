"""Folders of plain LoRA: the same model in a process without hydralora, the error that is reported, and refusals."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import hydralora
from hydralora import HydraLoraConfig, save_as_lora, save_clusters_as_lora, save_tasks_as_lora
from hydralora.tuner import hydralora_layers
from hydralora.tuner.export.constant import RoutedPart, plain_lora
from hydralora.tuner.export.folder import CONFIG, RECORD, TENSORS
from tests.hydralora.tuner.kinds_of_layers import tiny_gpt2
from tests.hydralora.tuner.models import IDS, MASK, TARGETS, adapted, logits, tiny_llama, tiny_opt

pytestmark = pytest.mark.versions

INPUTS = [{"input_ids": IDS, "attention_mask": MASK}, {"input_ids": IDS[:1], "attention_mask": MASK[:1]}]
PLAIN = """
import json, sys
import torch
from peft import PeftModel
from transformers import LlamaForCausalLM
base, question, *folders = sys.argv[1:]
ids, mask = torch.load(question, weights_only=True)
for folder in folders:
    model = PeftModel.from_pretrained(LlamaForCausalLM.from_pretrained(base), folder).eval()
    with torch.no_grad():
        torch.save(model(input_ids=ids, attention_mask=mask).logits[mask.bool()], folder + ".logits")
assert "hydralora" not in sys.modules
"""


def plain(folder: Path, base: Any = None) -> Any:
    return PeftModel.from_pretrained(tiny_llama() if base is None else base, str(folder)).eval()


def forced(model: Any, weights: list[float]) -> Any:
    """The model whose routers give these weights to every token: their logits do not depend on the input."""
    for layer in hydralora_layers(model).values():
        layer.lora_router["default"].forward = lambda x, *rest: torch.tensor(weights).expand(*x.shape[:-1], 3)
    return model


def by_task(**changes: Any) -> Any:
    return adapted(routing="task", tasks=["law", "math"], **changes)


class TestExact:
    """One process for all: starting one takes longer than everything else."""

    @pytest.fixture(scope="class")
    @classmethod
    def written(cls, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """By kind: the logits of ours, and of the plain folder in a process that has never seen hydralora."""
        folder = tmp_path_factory.mktemp("exact")
        expected: dict[str, torch.Tensor] = {}

        def write(kind: str, routed: Any, model: Any, weights: Any = None, **options: Any) -> None:
            expected[kind] = logits(routed, IDS[:1], MASK[:1])
            save_as_lora(model, folder / kind, weights, **options)

        one = adapted(lora_nums=1)
        write("one expert", one, one)
        write("forced", forced(adapted(), [0.2, 0.5, 0.3]), adapted(), [0.2, 0.5, 0.3])
        write("not a mean", forced(adapted(), [1.5, -1.0, 0.25]), adapted(), [1.5, -1.0, 0.25])
        write("one of three", forced(adapted(), [0.0, 0.0, 1.0]), adapted(), 2)
        sequence = adapted(routing="sequence")
        prompt = [{"input_ids": IDS[:1], "attention_mask": MASK[:1]}]
        write("by sequence", sequence, sequence, "mean-routing", inputs=prompt)
        pattern = adapted(target_modules=r".*\.1\..*(q_proj|up_proj)")
        write("some layers", forced(pattern, [0.2, 0.5, 0.3]), pattern, [0.2, 0.5, 0.3])
        weaker = adapted(lora_nums=1)
        next(iter(hydralora_layers(weaker).values())).set_scale("default", 0.3)
        write("other factors", weaker, weaker)
        tiny_llama().save_pretrained(folder / "base")
        torch.save((IDS[:1], MASK[:1]), folder / "question")
        words = [str(folder / name) for name in ("base", "question", *expected)]
        done = subprocess.run([sys.executable, "-c", PLAIN, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert "missing" not in done.stderr.lower()
        return {
            kind: (before, torch.load(folder / f"{kind}.logits", weights_only=True))
            for kind, before in expected.items()
        }

    @pytest.mark.parametrize(
        "kind",
        ["one expert", "forced", "not a mean", "one of three", "by sequence", "some layers", "other factors"],
    )
    def test_the_folder_is_the_model(self, kind: str, written: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> None:
        ours, theirs = written[kind]
        torch.testing.assert_close(theirs, ours, rtol=0, atol=2e-6)
        assert (ours - logits(tiny_llama(), IDS[:1], MASK[:1])).abs().max() > 1e-3  # the adapter does something
        others = [other for name, (other, _) in written.items() if name != kind]
        assert all((ours - other).abs().max() > 1e-4 for other in others)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_and_tensors_stay(dtype: torch.dtype, tmp_path: Path) -> None:
    model = adapted(lora_nums=1)
    for layer in hydralora_layers(model).values():
        layer.to(dtype)
    save_as_lora(model, tmp_path / "out")
    stored = load_file(tmp_path / "out" / TENSORS)
    assert len(stored) == 16
    for name, layer in hydralora_layers(model.base_model.model).items():
        for part in ("lora_A", "lora_B"):
            tensor = stored[f"base_model.model.{name}.{part}.weight"]
            assert tensor.dtype == dtype
            assert torch.equal(tensor, getattr(layer, part)["default"].weight)


def test_layers_of_other_ranks_and_factors() -> None:
    """All get one rank and one alpha, which is all that servers read; the updates are the same."""
    torch.manual_seed(0)
    sizes = (("one", 2, 0.5), ("two", 4, 2.0))
    parts = [RoutedPart(name, name, torch.randn(r, 5), torch.randn(2, 6, r), scaling) for name, r, scaling in sizes]
    weights = {part.router: torch.tensor([0.25, 0.75]) for part in parts}
    found = plain_lora(parts, weights)
    assert (found.rank, found.alpha) == (4, 4)
    for part in parts:
        a, b = found.tensors[f"{part.name}.lora_A.weight"], found.tensors[f"{part.name}.lora_B.weight"]
        assert (a.shape, b.shape) == ((4, 5), (6, 4))
        expected = part.scaling * (0.25 * part.experts_b[0] + 0.75 * part.experts_b[1]) @ part.shared_a
        torch.testing.assert_close(b @ a, expected)


class TestApproximate:
    def test_the_report_is_right(self, tmp_path: Path) -> None:
        """Compared by hand with the model that the folder gives."""
        model = adapted()
        found = save_as_lora(model, tmp_path / "mean", "mean-routing", inputs=INPUTS)
        report = found.report
        assert report is not None
        before, after = (
            torch.cat([logits(each, *batch.values()) for batch in INPUTS]) for each in (model, plain(tmp_path / "mean"))
        )
        assert report.tokens == len(before) == int(MASK.sum() + MASK[0].sum())
        assert report.relative_error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-4)
        assert report.relative_error > 1e-3
        chances, others = before.log_softmax(-1), after.log_softmax(-1)
        divergence = float((chances.exp() * (chances - others)).sum(-1).mean())
        assert report.divergence == pytest.approx(divergence, rel=1e-3)
        assert report.agreement == float((before.argmax(-1) == after.argmax(-1)).float().mean())
        stored = json.loads((tmp_path / "mean" / RECORD).read_text())
        assert stored["error"]["relative_error"] == report.relative_error
        assert stored["experts"] == found.experts

    def test_the_mean_is_that_of_the_router(self, tmp_path: Path) -> None:
        model = adapted()
        seen: dict[str, list[torch.Tensor]] = {}
        for name, layer in hydralora_layers(model.base_model.model).items():
            layer.observers.append(lambda routing, name=name: seen.setdefault(name, []).append(routing.probabilities))
        for batch in INPUTS:
            logits(model, *batch.values())
        for layer in hydralora_layers(model).values():
            layer.observers.clear()
        found = save_as_lora(model, tmp_path / "mean", "mean-routing", inputs=INPUTS)
        for name, (first, second) in seen.items():
            expected = torch.cat([first[MASK.bool()], second[MASK[:1].bool()]]).mean(dim=0)
            torch.testing.assert_close(torch.tensor(found.experts[name]), expected)

    def test_the_model_stays_as_it_is(self, tmp_path: Path) -> None:
        model = adapted()
        model.train()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        trained = {name for name, value in model.named_parameters() if value.requires_grad}
        save_as_lora(model, tmp_path / "mean", "mean-routing", inputs=INPUTS)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert {name for name, value in model.named_parameters() if value.requires_grad} == trained
        assert model.training
        assert not any(layer.observers for layer in hydralora_layers(model).values())

    def test_weights_of_a_report_are_taken_again(self, tmp_path: Path) -> None:
        model = adapted()
        first = save_as_lora(model, tmp_path / "first", "mean-routing", inputs=INPUTS)
        save_as_lora(model, tmp_path / "second", first.experts)
        one, other = (load_file(tmp_path / name / TENSORS) for name in ("first", "second"))
        assert all(torch.equal(one[name], other[name]) for name in one)

    def test_by_task(self, tmp_path: Path) -> None:
        """The mean of a task fits its inputs better than that of the other one."""
        model = adapted()
        tasks = {name: [{"input_ids": IDS[row : row + 1, :3]}] for row, name in enumerate(("math", "law"))}
        found = save_tasks_as_lora(model, tmp_path / "tasks", inputs=tasks)
        assert sorted(path.name for path in (tmp_path / "tasks").iterdir()) == ["law", "math"]
        for task, other in (("math", "law"), ("law", "math")):
            own = found[task].report
            swapped = save_as_lora(model, tmp_path / f"{task}-{other}", found[other].experts, inputs=tasks[task]).report
            assert own is not None
            assert swapped is not None
            assert own.relative_error < swapped.relative_error
        given = save_tasks_as_lora(model, tmp_path / "given", {"a": 0, "b": [0.1, 0.2, 0.7]})
        assert given["a"].report is None
        assert set(map(tuple, given["b"].experts.values())) == {tuple(torch.tensor([0.1, 0.2, 0.7]).tolist())}

    @pytest.mark.parametrize(
        "changes",
        [{}, {"top_k": 2}, {"experts_pattern": {"down_proj": 2, "v_proj": 1}}],
        ids=["all", "top-2", "layers"],
    )
    def test_by_learned_task(self, changes: dict[str, Any], tmp_path: Path) -> None:
        """What a call with this task computes, exactly, and measured as such on inputs that do not name the task."""
        model = by_task(**changes)
        found = save_tasks_as_lora(model, tmp_path / "tasks", inputs={"law": INPUTS})
        assert list(found) == ["law", "math"]
        report = found["law"].report
        assert report is not None
        assert report.relative_error < 1e-5
        assert found["math"].report is None
        answers = {}
        for task in found:
            expected = logits(model, tasks=task)
            answers[task] = logits(plain(tmp_path / "tasks" / task))
            torch.testing.assert_close(answers[task], expected, rtol=0, atol=2e-6)
        assert (answers["law"] - answers["math"]).abs().max() > 1e-3
        weights = set(map(len, found["law"].experts.values()))
        assert weights == ({1, 2, 3} if "experts_pattern" in changes else {3})

    def test_by_cluster(self, tmp_path: Path) -> None:
        """Two kinds of prompts, which share no token, are told apart; each cluster is nearer than the whole mean."""
        model = adapted()
        for layer in hydralora_layers(model).values():
            layer.lora_router["default"].weight.data *= 8
        prompts = [{"input_ids": torch.tensor([[token] * 5 + [7]])} for token in (11, 11, 50, 11, 50)]
        prompts[1] = {"input_ids": torch.tensor([[11] * 6])}
        found = save_clusters_as_lora(model, tmp_path / "clusters", 2, prompts)
        assert [each.members for each in found] == [(0, 1, 3), (2, 4)]
        whole = save_as_lora(model, tmp_path / "whole", "mean-routing", inputs=prompts).report
        reports = [each.report for each in found if each.report is not None]
        assert whole is not None
        assert [report.tokens for report in reports] == [18, 12]
        assert sum(report.tokens * report.divergence for report in reports) / 30 < whole.divergence

    def test_a_flattened_input(self, tmp_path: Path) -> None:
        model = adapted(base=tiny_opt(), target_modules=["fc1", "q_proj"])
        report = save_as_lora(model, tmp_path / "mean", "mean-routing", inputs=INPUTS).report
        after = torch.cat([logits(plain(tmp_path / "mean", tiny_opt()), *batch.values()) for batch in INPUTS])
        before = torch.cat([logits(model, *batch.values()) for batch in INPUTS])
        assert report is not None
        assert report.relative_error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)


def merged(model: Any) -> None:
    model.merge("uniform", INPUTS)


def disabled(model: Any) -> None:
    model.base_model.disable_adapter_layers()


def two(model: Any) -> None:
    model.add_adapter("b", HydraLoraConfig(target_modules=TARGETS))
    model.base_model.set_adapter(["default", "b"])


def offloaded(model: Any) -> None:
    next(iter(hydralora_layers(model).values())).lora_B.to("meta")


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no weights": (None, {}, "weights 3 experts for each input, so no single LoRA"),
    "an unknown word": ("best", {}, "expected one of"),
    "a mean of nothing": ("mean-routing", {}, "needs inputs"),
    "an expert too many": (3, {}, "expected one of 0 to 2"),
    "a bool": (True, {}, "weights is True"),
    "a weight less": ([0.5, 0.5], {}, "expected 3 finite numbers"),
    "NaN": ([0.5, float("nan"), 0], {}, "expected 3 finite numbers"),
    "text": (["1", "0", "0"], {}, "expected 3 finite numbers"),
    "layers missing": ({"model.layers.0.mlp.gate_proj": [1, 0, 0]}, {}, "7 layers are missing"),
    "an unknown adapter": (0, {"adapter_name": "other"}, "no adapter 'other'"),
}
STATES: dict[str, tuple[Callable[[Any], None], str]] = {
    "merged": (merged, "is merged"),
    "disabled": (disabled, "are disabled"),
    "two active": (two, "2 adapters are active"),
    "offloaded": (offloaded, "are offloaded"),
}


class TestRefused:
    @pytest.mark.parametrize("kind", REFUSED)
    def test_choices(self, kind: str, tmp_path: Path) -> None:
        weights, options, message = REFUSED[kind]
        with pytest.raises(ValueError, match=message):
            save_as_lora(adapted(), tmp_path / "out", weights, **options)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("kind", STATES)
    def test_states(self, kind: str, tmp_path: Path) -> None:
        change, message = STATES[kind]
        model = adapted()
        change(model)
        with pytest.raises(ValueError, match=message):
            save_as_lora(model, tmp_path / "out", 0)
        assert not list(tmp_path.iterdir())

    def test_more_than_a_lora(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"trained \{'modules_to_save': \['lm_head'\]\} too"):
            save_as_lora(adapted(modules_to_save=["lm_head"]), tmp_path / "out", 0)
        with pytest.raises(ValueError, match="no HydraLoRA layers"):
            save_as_lora(tiny_llama(), tmp_path / "out", 0)
        assert not list(tmp_path.iterdir())

    def test_an_output_that_exists(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        with pytest.raises(FileExistsError, match="already exists"):
            save_as_lora(adapted(), tmp_path / "out", 0)
        assert not list((tmp_path / "out").iterdir())

    @pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../x"])
    def test_names_that_are_paths(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="not a name for a folder"):
            save_tasks_as_lora(adapted(), tmp_path / "out", {name: 0})
        assert not list(tmp_path.iterdir())

    def test_tasks_and_clusters(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="give weights by task, or inputs"):
            save_tasks_as_lora(adapted(), tmp_path / "out")
        with pytest.raises(ValueError, match=r"tasks \['sport'\], which the adapter has not learned; known: \['law'"):
            save_tasks_as_lora(by_task(), tmp_path / "out", inputs={"sport": INPUTS, "law": INPUTS})
        with pytest.raises(ValueError, match=r"tasks \['a'\], inputs for \['b'\]"):
            save_tasks_as_lora(adapted(), tmp_path / "out", {"a": 0}, inputs={"b": INPUTS})
        with pytest.raises(ValueError, match="5 clusters of 4 prompts"):
            save_clusters_as_lora(adapted(), tmp_path / "out", 5, INPUTS)
        assert not list(tmp_path.iterdir())


class TestServers:
    """What is known of the readers, without them: names of tensors and fields of the configuration."""

    ENDS = (".lora_A.weight", ".lora_B.weight")
    FIELDS: ClassVar[set[str]] = {
        *("base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "lora_alpha", "lora_dropout"),
        *("modules_to_save", "peft_type", "r", "target_modules", "task_type", "use_dora", "use_rslora"),
    }

    @pytest.mark.parametrize("targets", [TARGETS, r".*\.1\..*q_proj"], ids=str)
    def test_names_and_configuration(self, targets: Any, tmp_path: Path) -> None:
        model = adapted(target_modules=targets)
        save_as_lora(model, tmp_path / "out", "uniform")
        assert {path.name for path in (tmp_path / "out").iterdir()} == {CONFIG, TENSORS, RECORD}
        config, tensors = json.loads((tmp_path / "out" / CONFIG).read_text()), load_file(tmp_path / "out" / TENSORS)
        assert config.keys() == self.FIELDS
        assert config.keys() <= LoraConfig(r=1).to_dict().keys()
        assert (config["peft_type"], config["task_type"]) == ("LORA", "CAUSAL_LM")
        # One rank and one alpha for all layers, integers as vLLM's field is declared.
        assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (4, 8, False)
        assert type(config["lora_alpha"]) is int
        assert all(isinstance(name, str) for name in config["target_modules"])
        weights = {f"{name}.weight" for name, _ in tiny_llama().named_modules()}
        for name, tensor in tensors.items():
            assert name.endswith(self.ENDS)
            layer = name.removeprefix("base_model.model.").removesuffix(name[-len(self.ENDS[0]) :])
            assert f"{layer}.weight" in weights
            assert tensor.shape[0 if ".lora_A." in name else 1] == config["r"]
            assert layer.rpartition(".")[2] in {target.rpartition(".")[2] for target in config["target_modules"]}
        assert len(tensors) == 2 * len(hydralora_layers(model))


@pytest.mark.parametrize(
    ("targets", "names", "transposed"),
    [
        (["c_attn", "c_fc"], ["c_attn", "c_fc"], True),
        (["attn.c_proj"], ["transformer.h.0.attn.c_proj", "transformer.h.1.attn.c_proj"], True),
        (["c_attn", "lm_head"], ["c_attn", "lm_head"], False),
    ],
    ids=["Conv1D", "a name of two layers", "both kinds"],
)
def test_layers_that_are_stored_transposed(
    targets: list[str], names: list[str], transposed: bool, tmp_path: Path
) -> None:
    """GPT-2's; PEFT loads the folder as it is, and warns only where one configuration cannot say it for all layers."""
    model = adapted(base=tiny_gpt2(), target_modules=targets, lora_nums=1)
    save_as_lora(model, tmp_path / "out")
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["fan_in_fan_out"], config["target_modules"]) == (transposed, names)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = plain(tmp_path / "out", tiny_gpt2())
    assert any("fan_in_fan_out" in str(each.message) for each in caught) is not transposed
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=2e-6)
    assert (logits(model) - logits(tiny_gpt2())).abs().max() > 1e-3


def test_lora_next_to_routed_blocks(tmp_path: Path) -> None:
    """As in a LLaVA: LoRA on attention, a routed block in place of the MLP; the folder is plain LoRA on both."""
    model = get_peft_model(
        tiny_llama(), LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    blocks = hydralora.attach(model.get_base_model(), hydralora.RoutedMLPConfig(experts=3, rank=4, alpha=8))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    for block in blocks.values():
        block.reset_parameters(identity=False)
    model.eval()
    report = save_as_lora(model, tmp_path / "mean", "mean-routing", inputs=INPUTS).report
    after = torch.cat([logits(plain(tmp_path / "mean"), *batch.values()) for batch in INPUTS])
    before = torch.cat([logits(model, *batch.values()) for batch in INPUTS])
    assert report is not None
    assert report.relative_error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)
    assert report.relative_error > 1e-4
    with torch.no_grad():
        for block in blocks.values():  # weights that no input changes: exact
            block.router.weight.zero_()
            block.router.bias.copy_(torch.tensor([0.2, 0.5, 0.3]).log())
    save_as_lora(model, tmp_path / "forced", {name: [0.2, 0.5, 0.3] for name in blocks} | one_each(model))
    torch.testing.assert_close(logits(plain(tmp_path / "forced")), logits(model), rtol=0, atol=2e-6)
    for block in blocks.values():
        block.dense = False  # the best expert alone, number 1 for every token
    save_as_lora(model, tmp_path / "sparse", "mean-routing", inputs=INPUTS)
    torch.testing.assert_close(logits(plain(tmp_path / "sparse")), logits(model), rtol=0, atol=2e-6)


def one_each(model: Any) -> dict[str, list[float]]:
    names = [name for name, _ in model.get_base_model().named_modules() if name.endswith("q_proj")]
    return {name: [1.0] for name in names}


def test_updates_on_attention(tmp_path: Path) -> None:
    from hydralora.config import RoutedLinearConfig
    from hydralora.linears import add_updates, routed_updates

    model = tiny_llama()
    config = RoutedLinearConfig(targets=["attention"], experts=3, rank=4, alpha=8)
    add_updates({"attention": model.model.layers}, config)
    for update in routed_updates(model).values():
        update.reset_parameters(identity=False)
    report = save_as_lora(model, tmp_path / "mean", "mean-routing", inputs=INPUTS).report
    after = torch.cat([logits(plain(tmp_path / "mean"), *batch.values()) for batch in INPUTS])
    before = torch.cat([logits(model, *batch.values()) for batch in INPUTS])
    assert report is not None
    assert report.relative_error == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)
    assert report.relative_error > 1e-4

"""The fine-tuning program: the original's run, its flags and files, resuming, other models and modules."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from hydralora.finetune import build_run, main, parse_args
from hydralora.text.arguments import build_parser
from hydralora.text.options import number_of_experts
from hydralora.text.training import link_adapter
from hydralora.tuner.loading import load_adapter
from hydralora.tuner.original import to_original
from llava.errors import FlagError
from llava.runtime import checkpointing
from llava.runtime.retired_flags import MEANINGLESS, RENAMED, TRANSLATED
from tests.golden import golden_dir, load_case
from tests.llava.train.test_interruptions import child, kill_me

pytestmark = pytest.mark.versions

CASE, TENSORS = load_case("hydralora", "finetune_run")
FLAGS = load_case("hydralora", "cli_flags")[0]
PREFIX = "base_model.model."

REFUSED = {
    *("config_overrides", "config_name", "deepspeed", "fsdp", "fsdp_transformer_layer_cls_to_wrap"),
    *("fsdp_min_num_params", "sharded_ddp", "xpu_backend", "per_gpu_train_batch_size", "per_gpu_eval_batch_size"),
    *("use_ipex", "torchdynamo", "push_to_hub_model_id", "push_to_hub_organization", "push_to_hub_token"),
}
"""Flags that are refused with the value "x": by their values, or with a word on what to use instead."""


def section(name: str) -> dict[str, Tensor]:
    return {key.removeprefix(f"{name}/"): value for key, value in TENSORS.items() if key.startswith(f"{name}/")}


def save_base(folder: Path) -> Path:
    """The base of the golden run with its tokenizer; norms rounded to fp16, as the original does at its start."""
    model = LlamaForCausalLM(LlamaConfig(**CASE["hyper_parameters"]["llama"]))
    weights = {k.removeprefix(PREFIX): v for k, v in section("w").items() if ".lora_" not in k}
    model.load_state_dict({k: v.half().float() if "norm" in k else v for k, v in weights.items()})
    model.save_pretrained(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(golden_dir("tokenizer") / name, folder)
    return folder


def save_start(folder: Path) -> Path:
    """The adapter that the golden run starts from, in the original's format."""
    folder.mkdir()
    torch.save({k: v for k, v in section("w").items() if ".lora_" in k}, folder / "adapter_model.bin")
    (folder / "adapter_config.json").write_text(json.dumps(CASE["results"]["adapter_config"]))
    return folder


def save_data(folder: Path) -> Path:
    folder.mkdir()
    (folder / "train.json").write_text(json.dumps(CASE["records"]))
    return folder


def command_line(folder: Path, output: Path, **changes: Any) -> list[str]:
    options: dict[str, Any] = {
        "model_name_or_path": folder / "base",
        "dataset_dir": folder / "data",
        "output_dir": output,
        "do_train": True,
        "per_device_train_batch_size": 4,
        "max_steps": 4,
        "learning_rate": 2e-3,
        "max_seq_length": 64,
        "save_steps": 2,
        "logging_steps": 1,
        "lora_dropout": 0.0,
        "lora_rank": 4,
        "lora_nums": 3,
        "trainable": "gate_proj,up_proj,down_proj",
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    return [word for key, value in (options | changes).items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, data/ and start/ of the golden run."""
    path = tmp_path_factory.mktemp("finetune")
    save_base(path / "base")
    save_data(path / "data")
    save_start(path / "start")
    return path


def history(output: Path) -> list[dict[str, float]]:
    return json.loads((output / "trainer_state.json").read_text())["log_history"]


class OriginalAdamW(torch.optim.Optimizer):
    """AdamW of transformers 4.30: epsilon is added before the bias correction; torch's adds it afterwards."""

    def __init__(self, parameters: list[torch.nn.Parameter], rate: float) -> None:
        super().__init__(parameters, {"lr": rate})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for weight in group["params"]:
                state = self.state[weight]
                state["step"] = step = state.get("step", 0) + 1
                first = state["m"] = 0.9 * state.get("m", 0) + 0.1 * weight.grad
                second = state["v"] = 0.999 * state.get("v", 0) + 0.001 * weight.grad**2
                rate = group["lr"] * (1 - 0.999**step) ** 0.5 / (1 - 0.9**step)
                weight -= rate * first / (second.sqrt() + 1e-8)


@pytest.mark.parametrize("optimizer", ["the original's", "torch's"])
def test_the_originals_run(optimizer: str, folder: Path, tmp_path: Path) -> None:
    """Losses, learning rates and final weights of the original's `main`, from its adapter and its flags."""
    given = {name.removeprefix("--"): value for name, value in CASE["arguments"].items()}
    run = build_run(parse_args(command_line(folder, tmp_path, peft_path=folder / "start", **given)))
    if optimizer == "the original's":
        trained = [weight for weight in run.model.parameters() if weight.requires_grad]
        run.trainer.optimizer = OriginalAdamW(trained, given["learning_rate"])
    run.trainer.train()
    run.trainer.save_model()
    ours = [row for row in run.trainer.state.log_history if "loss" in row]
    theirs = CASE["results"]["log_history"][:4]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine["step"] == other["step"]
        assert mine["loss"] == pytest.approx(other["loss"], abs=1e-3)
    # The original logs the rate of the next update, transformers 5 that of the update.
    assert [row["learning_rate"] for row in ours][1:] == pytest.approx([row["learning_rate"] for row in theirs][:3])
    final = to_original(load_file(tmp_path / "adapter_model.safetensors"))
    expected, start = section("out/final"), section("w")
    assert final.keys() == expected.keys()
    distances = torch.cat([(final[key] - expected[key]).abs().flatten() for key in expected])
    if optimizer == "the original's":
        assert distances.max() < 1e-5
    else:  # the few elements whose gradient is near epsilon; an update of the others is near 2e-3
        assert (distances > 1e-5).sum() <= 60  # measured: 48 of 4640, by 4e-4 at most
        assert distances.max() < 6e-4
    assert any(not torch.allclose(expected[key], start[key], atol=1e-4) for key in expected), "the run must move them"


def test_generation_ends_where_trained_answers_do(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A base whose generation_config names another token: the adapter's folder adds the one of the training."""
    base = tmp_path / "base"
    shutil.copytree(folder / "base", base)
    path = base / "generation_config.json"
    settings = json.loads(path.read_text()) if path.is_file() else {}
    for named, ends in (([5], [5, 2]), ([5, 2], None)):
        path.write_text(json.dumps(settings | {"eos_token_id": named}))
        output = tmp_path / f"out-{len(named)}"
        adapter = main(command_line(folder, output, model_name_or_path=base, max_steps=1, save_steps=1))
        assert ("'</s>' (token 2), at which generation did not end" in capsys.readouterr().out) == (ends is not None)
        for place in (adapter, output / "checkpoint-1" / "sft_lora_model"):
            assert (place / "generation_config.json").is_file() == (ends is not None)
            model = AutoModelForCausalLM.from_pretrained(base)
            assert load_adapter(model, place).generation_config.eos_token_id == (ends or named)


def test_the_files_of_the_original_are_there(folder: Path, tmp_path: Path) -> None:
    main(command_line(folder, tmp_path))
    present = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    # The adapter is stored as safetensors; the Trainer's copy of it in each checkpoint has PEFT's name.
    renamed = {"pytorch_model.bin": "adapter_model.safetensors", "adapter_model.bin": "adapter_model.safetensors"}
    wanted = set()
    for name in CASE["results"]["output_files"]:
        parent, _, last = name.rpartition("/")
        wanted.add(f"{parent}/{renamed.get(last, last)}".lstrip("/"))
    missing = {name for name in wanted if not name.endswith("special_tokens_map.json")} - present
    assert not missing


@pytest.mark.parametrize("flag", FLAGS["own_flags"] + FLAGS["trainer_flags"], ids=lambda flag: flag["flags"][0])
def test_every_flag_of_the_original_parses(flag: dict[str, Any], folder: Path, tmp_path: Path) -> None:
    name = flag["dest"]
    base = command_line(folder, tmp_path)
    if name in REFUSED:
        with pytest.raises((FlagError, SystemExit, ValueError, OSError)):
            parse_args([*base, flag["flags"][0], "x"])
        return
    known = {option for action in build_parser()._actions for option in action.option_strings}
    written = flag["flags"][0]
    assert written in known or written.removeprefix("--") in {*MEANINGLESS, *RENAMED, *TRANSLATED}


@pytest.mark.parametrize("flag", FLAGS["own_flags"], ids=lambda flag: flag["flags"][0])
def test_defaults_are_those_of_the_original(flag: dict[str, Any]) -> None:
    (action,) = [action for action in build_parser()._actions if flag["flags"][0] in action.option_strings]
    default = str(flag["default"]) if flag["dest"] == "lora_nums" else flag["default"]
    assert action.default == default
    assert (list(action.choices) if action.choices else None) == flag["choices"]


def test_resume_is_exact(folder: Path, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 1, "lora_dropout": 0.2, "balance_weight": 0.1}
    main(command_line(folder, tmp_path / "whole", **options))
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    main(command_line(folder, tmp_path / "cut", **options))
    names = "sft_lora_model/adapter_model.safetensors"
    assert (tmp_path / "cut" / names).read_bytes() == (tmp_path / "whole" / names).read_bytes()
    losses = [[row["loss"] for row in history(tmp_path / each) if "loss" in row] for each in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_killed_while_saving(folder: Path, tmp_path: Path) -> None:
    """A kill before the state of a checkpoint is written leaves the last one whole, and the same command continues."""
    main(command_line(folder, tmp_path / "whole"))
    output = tmp_path / "cut"

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        path = Path(str(arguments[0])) if event == "open" else None
        if path is not None and path.name == "trainer_state.json" and path.parent.name == "checkpoint-4":
            kill_me()

    def work() -> None:
        sys.addaudithook(hook)
        main(command_line(folder, output))

    assert os.WIFSIGNALED(child(work, tmp_path / "report"))
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    adapter = main(command_line(folder, output)) / "adapter_model.safetensors"
    assert adapter.read_bytes() == (tmp_path / "whole" / "sft_lora_model" / adapter.name).read_bytes()
    assert not list(output.rglob("tmp-*"))


def test_a_finished_run_is_not_trained_on(folder: Path, tmp_path: Path) -> None:
    """The second of two equal commands makes no update, although the last one of the first ended within an epoch."""
    options = {"max_steps": 1, "save_steps": 1, "per_device_train_batch_size": 1}
    written = [main(command_line(folder, tmp_path, **options)).joinpath("adapter_model.safetensors").read_bytes()]
    written.append(main(command_line(folder, tmp_path, **options)).joinpath("adapter_model.safetensors").read_bytes())
    assert json.loads((tmp_path / "trainer_state.json").read_text())["global_step"] == 1
    assert written[0] == written[1]


def test_the_best_checkpoint_is_found(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(json.dumps(CASE["records"][:2]))
    evaluated = {"do_eval": True, "validation_file": tmp_path / "test.json", "eval_strategy": "steps", "eval_steps": 1}
    best = {"save_steps": 1, "save_total_limit": 1, "load_best_model_at_end": True, "max_steps": 2}
    main(command_line(folder, tmp_path / "out", **evaluated, **best))
    stored = json.loads((tmp_path / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert stored["best_model_checkpoint"] == str(tmp_path / "out" / "checkpoint-2")
    assert (tmp_path / "out" / "checkpoint-2" / "sft_lora_model" / "adapter_config.json").is_file()


def test_a_disk_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: Path) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    (tmp_path / "adapter_model.safetensors").write_text("weights")
    for _ in range(2):
        link_adapter(tmp_path, tmp_path / "copy")
        assert (tmp_path / "copy" / "adapter_model.safetensors").read_text() == "weights"


def save_adapter(folder: Path, target: Path, **changes: Any) -> Path:
    """An adapter that a new run begins with, untrained."""
    run = build_run(parse_args(command_line(folder, target / "run", **changes)))
    run.model.save_pretrained(target / "adapter")
    return target / "adapter"


def test_an_adapter_to_start_from_stays_as_it_is(folder: Path, tmp_path: Path) -> None:
    """Flags that contradict it are refused together; its number of experts and its balance weight hold."""
    kept = {"modules_to_save": "embed_tokens, lm_head", "balance_weight": 0.25}
    start = save_adapter(folder, tmp_path, **kept)
    changes = {"lora_rank": 5, "lora_alpha": 7, "lora_nums": 4, "lora_dropout": 0.3, "trainable": "q_proj"}
    with pytest.raises(FlagError) as caught:
        parse_args(command_line(folder, tmp_path / "out", **changes, routing="sequence", peft_path=start))
    for name in (*changes, "routing"):
        assert f"--{name} " in str(caught.value)
    words = command_line(folder, tmp_path / "out", peft_path=start, lora_nums=2)  # the default: not given
    run = build_run(parse_args(words))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["experts"] == 3
    assert run.model.active_peft_config.modules_to_save == ["embed_tokens", "lm_head"]
    assert run.model.active_peft_config.balance_weight == 0.25
    for weight in (0.0, 0.5):
        run = build_run(parse_args([*words, "--balance_weight", str(weight)]))
        assert run.model.active_peft_config.balance_weight == weight


@pytest.mark.parametrize("trainable", ["q_proj,v_proj", "all-linear", "o_proj"])
def test_any_modules_of_any_model(trainable: str, folder: Path, tmp_path: Path) -> None:
    """A Qwen2 with modules that the original cannot adapt; the adapter loads, and `generate` works."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=896, num_key_value_heads=2, **sizes)
    shutil.copytree(folder / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    Qwen2ForCausalLM(config).save_pretrained(tmp_path / "base")
    options = {"model_name_or_path": tmp_path / "base", "trainable": trainable, "gradient_checkpointing": True}
    adapter = main(command_line(folder, tmp_path / "out", **options))
    losses = [row["loss"] for row in history(tmp_path / "out") if "loss" in row]
    assert losses[-1] < losses[0]
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), str(adapter)).eval()
    ids = torch.tensor([[1, 300, 400]])
    assert model.generate(input_ids=ids, max_new_tokens=3, min_new_tokens=3, do_sample=False).shape == (1, 6)
    with torch.no_grad():
        tuned = model(input_ids=ids).logits
        with model.disable_adapter():
            assert not torch.allclose(tuned, model(input_ids=ids).logits, atol=1e-3)


@pytest.mark.parametrize("routing", ["token", "sequence"])
def test_a_model_that_flattens_the_batch(routing: str, folder: Path, tmp_path: Path) -> None:
    """OPT hands (B * T, D) to its MLP; loss, balance loss and statistics are those of tokens in their rows."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 32, "ffn_dim": 48, "num_hidden_layers": 1}
    config = OPTConfig(vocab_size=896, num_attention_heads=4, max_position_embeddings=64, **sizes)
    shutil.copytree(folder / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    OPTForCausalLM(config).save_pretrained(tmp_path / "base")
    options = {"model_name_or_path": tmp_path / "base", "trainable": "fc1,q_proj", "balance_weight": 0.5}
    main(command_line(folder, tmp_path / "out", **options, routing=routing, max_steps=1))
    first = history(tmp_path / "out")[0]
    for prefix in ("routing", *(f"routing/task_{task}" for task in (0, 1, 2))):
        assert sum(first[f"{prefix}/share_{expert}"] for expert in range(3)) == pytest.approx(1)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_base(bits: int, folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    main(command_line(folder, tmp_path, load_in_kbits=bits, max_steps=2))
    assert [row for row in history(tmp_path) if "loss" in row]


def test_an_evaluation_between_updates_of_a_4_bit_base(folder: Path, tmp_path: Path) -> None:
    """The run with an evaluation after every update is the one without, losses and adapter.

    The layers have sizes that the packed layout of bitsandbytes' CPU kernel for inference takes; on CPUs that have the
    kernel, a layer that is packed by the evaluation has no gradient any more.
    """
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="the extra `quant` is not installed")
    (tmp_path / "data").mkdir()
    shutil.copytree(folder / "base", tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    (tmp_path / "data" / "train.json").write_text(json.dumps(CASE["records"]))
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=896, **sizes)).save_pretrained(tmp_path / "base")
    (tmp_path / "test.json").write_text(json.dumps(CASE["records"][:2]))
    evaluated = {"do_eval": True, "validation_file": tmp_path / "test.json", "eval_strategy": "steps", "eval_steps": 1}
    kept, stored = [], []
    for name, options in {"plain": {}, "evaluated": evaluated}.items():
        output = tmp_path / name
        run = build_run(parse_args(command_line(tmp_path, output, load_in_kbits=4, max_steps=3, **options)))
        layers = [layer for layer in run.model.modules() if isinstance(layer, bitsandbytes.nn.Linear4bit)]
        before = [layer.weight.data.clone() for layer in layers]
        run.trainer.train()
        assert len(layers) == 2 * 7
        assert all(torch.equal(layer.weight.data, data) for layer, data in zip(layers, before, strict=True))
        run.trainer.save_model()
        kept.append([row["loss"] for row in run.trainer.state.log_history if "loss" in row])
        stored.append(load_file(output / "adapter_model.safetensors"))
    assert sum("eval_loss" in row for row in run.trainer.state.log_history) == 3
    assert kept[0] == kept[1]
    assert all(torch.equal(stored[1][key], value) for key, value in stored[0].items())
    assert any(value.any() for key, value in stored[1].items() if key.endswith("lora_B.weight"))


def test_balance_loss_and_routing_by_task(folder: Path, tmp_path: Path) -> None:
    main(command_line(folder, tmp_path / "without"))
    main(command_line(folder, tmp_path / "with", balance_weight=0.5))
    first = [history(tmp_path / name)[0] for name in ("without", "with")]
    # The balance loss of three experts is between 1/3 and 1; at the start it is near 1/3. It has a column of its own.
    assert 0.5 / 3 - 1e-3 < first[1]["balance_loss"] < 0.5
    assert first[1]["loss"] == first[0]["loss"]
    assert "balance_loss" not in first[0]
    for task in (0, 1, 2):
        shares = [first[0][f"routing/task_{task}/share_{expert}"] for expert in range(3)]
        assert sum(shares) == pytest.approx(1)
    assert 0 < first[0]["routing/entropy"] <= torch.log(torch.tensor(3.0)).item() + 1e-6
    weights = [load_file(tmp_path / n / "sft_lora_model" / "adapter_model.safetensors") for n in ("without", "with")]
    assert any(not torch.equal(weights[0][key], weights[1][key]) for key in weights[0] if "router" in key)


def test_accumulation_does_not_change_the_update(folder: Path, tmp_path: Path) -> None:
    """Four records at once or one by one: equal losses; the balance loss is a mean over the micro batches."""
    options = {"max_steps": 2, "save_strategy": "no", "train_sampling_strategy": "sequential"}
    main(command_line(folder, tmp_path / "once", **options))
    steps = options | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    main(command_line(folder, tmp_path / "steps", **steps))
    losses = [[row["loss"] for row in history(tmp_path / n) if "loss" in row] for n in ("once", "steps")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    main(command_line(folder, tmp_path / "balanced", **steps, balance_weight=0.5))
    balanced = [row["balance_loss"] for row in history(tmp_path / "balanced") if "loss" in row]
    assert 0.5 / 3 - 1e-2 < balanced[0] < 0.5


def test_evaluation(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "test.json").write_text(json.dumps(CASE["records"][:2]))
    options = {"do_eval": True, "validation_file": tmp_path / "test.json", "eval_strategy": "steps", "eval_steps": 2}
    main(command_line(folder, tmp_path / "out", **options))
    metrics = json.loads((tmp_path / "out" / "eval_results.json").read_text())
    assert metrics["perplexity"] == pytest.approx(torch.tensor(metrics["eval_loss"]).exp().item(), rel=1e-5)
    evaluated = [row["eval_loss"] for row in history(tmp_path / "out") if "eval_loss" in row]
    assert len(evaluated) == 2
    assert evaluated[1] < evaluated[0]
    lines = history(tmp_path / "out")
    tasks = {f"eval_task_{record['task_type']}_loss" for record in CASE["records"][:2]}
    assert tasks <= next(line for line in lines if "eval_loss" in line).keys()
    speed = {"samples_per_second", "target_tokens_per_second", "peak_memory_gib", "seconds_left"}
    assert all(speed <= line.keys() for line in lines if "loss" in line)


def test_early_stopping(folder: Path, tmp_path: Path) -> None:
    """The loss falls, and is called the better the larger it is: the first evaluation is the best."""
    (tmp_path / "test.json").write_text(json.dumps(CASE["records"][:2]))
    options = {"do_eval": True, "validation_file": tmp_path / "test.json", "eval_strategy": "steps", "eval_steps": 1}
    options |= {"metric_for_best_model": "loss", "greater_is_better": True, "max_steps": 6, "save_steps": 1}
    output = tmp_path / "out"
    main(command_line(folder, output, **options, early_stopping_patience=2, load_best_model_at_end=True))
    assert [line["step"] for line in history(output) if "eval_loss" in line] == [1, 2, 3]
    result = load_file(output / "sft_lora_model" / "adapter_model.safetensors")
    best = load_file(output / "checkpoint-1" / "adapter_model.safetensors")
    assert all(torch.equal(result[name], value) for name, value in best.items())
    with pytest.raises(FlagError, match="--early_stopping_patience: needs evaluations"):
        parse_args(command_line(folder, output, early_stopping_patience=2))


def test_experts_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "components.json"
    path.write_text('{"suggested": 5}')
    assert number_of_experts(f"auto:{path}") == 5
    assert number_of_experts("3") == 3
    for value in ("0", "many", "auto:missing.json"):
        with pytest.raises(FlagError, match="--lora_nums"):
            number_of_experts(value)


def test_gradient_checkpointing_is_not_reentrant(folder: Path, tmp_path: Path) -> None:
    """Unless it is asked for; a balance loss acts under both kinds."""
    asked = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": '{"preserve_rng_state": true}'}
    run = build_run(parse_args(command_line(folder, tmp_path, **asked)))
    assert getattr(run.trainer.args, checkpointing.OPTIONS) == {"use_reentrant": False, "preserve_rng_state": True}
    asked["gradient_checkpointing_kwargs"] = '{"use_reentrant": true}'
    assert build_run(parse_args(command_line(folder, tmp_path, **asked))).trainer
    stored = []
    for reentrant in ("false", "true"):
        asked["gradient_checkpointing_kwargs"] = f'{{"use_reentrant": {reentrant}}}'
        main(command_line(folder, tmp_path / reentrant, **asked, balance_weight=0.5))
        stored.append(load_file(tmp_path / reentrant / "sft_lora_model" / "adapter_model.safetensors"))
    for name, value in stored[0].items():
        torch.testing.assert_close(stored[1][name], value)


def test_all_problems_at_once(folder: Path, tmp_path: Path) -> None:
    changes = {"do_train": False, "load_in_kbits": 3, "lora_nums": 0, "config_name": "x", "dataset_dir": "missing"}
    with pytest.raises(FlagError) as caught:
        parse_args(command_line(folder, tmp_path, **changes))
    for name in ("nothing to do", "--load_in_kbits 3", "--lora_nums", "--config_name", "missing"):
        assert name in str(caught.value)
    with pytest.raises(FlagError, match="unknown options"):
        parse_args([*command_line(folder, tmp_path), "--lora_rnak", "3"])


def test_a_folder_that_is_no_adapter_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FlagError, match="is no adapter"):
        build_run(parse_args(command_line(folder, tmp_path, peft_path=folder / "data")))

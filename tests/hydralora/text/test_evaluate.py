"""lm-evaluation-harness with adapters, on local tasks: its numbers are those of the model itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from hydralora import HydraLoraConfig
from hydralora.evaluate import main, register
from hydralora.tuner.loading import load_adapter
from llava.errors import CheckpointError, FlagError, NotFiniteError
from llava.runtime.cache_name import cache_argument, cache_of
from llava.runtime.tokenizer import load_tokenizer
from tests.hydralora.text.test_finetune import save_base, save_start
from tests.reliability.overflowing import overflow_in_float16
from tests.reliability.snapshots import snapshot

pytest.importorskip("lm_eval", reason="the extra 'harness' is not installed")

# Answers of several tokens and of different lengths, so that batches are padded.
QUESTIONS = [
    ("What came in?", ["the tide", "a castle made of sand", "snow", "one"], 0),
    ("What melted? Say it in a word or two, and not more than that.", ["the castle", "tide", "the text", "a"], 2),
    ("Two and two", ["four", "two", "sixty", "three and a half"], 1),
    ("Which one is it?", ["this", "the other one", "none", "all of them"], 3),
    ("The text is about", ["sand", "the sea and the sand", "a word", "you"], 0),
]
PROMPT = "{{question}}\nAnswer:"
TASKS: dict[str, dict[str, Any]] = {
    "local_choice": {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "gold"},
    "local_text": {
        "output_type": "generate_until",
        "doc_to_target": "{{choices[gold]}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
ADAPTERS = ("hydralora", "by sequence", "original", "lora", None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, an adapter of each kind, and the tasks with their data."""
    path = tmp_path_factory.mktemp("harness")
    save_base(path / "base")
    save_start(path / "original")
    modules = ["q_proj", "gate_proj", "down_proj"]
    routed = {"lora_nums": 3, "init_weights": False, "target_modules": modules, "r": 4, "task_type": "CAUSAL_LM"}
    for name, config in {
        "hydralora": HydraLoraConfig(**routed),
        "by sequence": HydraLoraConfig(**routed, routing="sequence"),
        "lora": LoraConfig(init_lora_weights=False, target_modules=modules, r=4, task_type="CAUSAL_LM"),
    }.items():
        torch.manual_seed(len(name))
        get_peft_model(load_base(path), config).save_pretrained(path / name)
    data = path / "questions.jsonl"
    rows = [{"question": question, "choices": choices, "gold": gold} for question, choices, gold in QUESTIONS]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = {"dataset_path": "json", "test_split": "test", "doc_to_text": PROMPT}
    source["dataset_kwargs"] = {"data_files": {"test": str(data)}, "cache_dir": str(path / "cache")}
    (path / "tasks").mkdir()
    for name, task in TASKS.items():  # JSON is YAML
        (path / "tasks" / f"{name}.yaml").write_text(json.dumps({"task": name} | source | task))
    return path


def load_base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "base").eval()


def load(folder: Path, adapter: str | None) -> Any:
    base = load_base(folder)
    return base if adapter is None else load_adapter(base, folder / adapter).eval()


def evaluate(folder: Path, adapter: str | None) -> dict[str, Any]:
    """What the harness computes on the local tasks, in batches of four."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    register()
    arguments = {"pretrained": str(folder / "base")} | ({"peft": str(folder / adapter)} if adapter else {})
    tasks = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)  # the harness's own take long
    return lm_eval.simple_evaluate(
        "hydralora", arguments, tasks=list(TASKS), task_manager=tasks, batch_size=4, device="cpu"
    )


def log_likelihood(model: Any, prompt: Tensor, answer: Tensor) -> float:
    """Of `answer` after `prompt`, (1, T) each; the prompt alone fills the cache, and so decides routing by sequence."""
    with torch.no_grad():
        first = model(input_ids=prompt, use_cache=True)
        rows = [first.logits[0, -1:]]
        if answer.shape[1] > 1:
            host = model.get_base_model() if isinstance(model, PeftModel) else model
            filled = cache_argument(host.forward, cache_of(first))
            if isinstance(model, PeftModel) and getattr(model.active_peft_config, "routing", "") == "sequence":
                filled = {**filled, "prompt_mask": torch.zeros_like(answer[:, :-1], dtype=torch.bool)}
            rows.append(model(input_ids=answer[:, :-1], **filled).logits[0])
    scores = torch.cat(rows).log_softmax(dim=-1)  # (T, vocabulary)
    return scores.gather(1, answer[0][:, None]).sum().item()


def direct(folder: Path, model: Any) -> tuple[list[list[float]], list[str]]:
    """Log-likelihood of every choice, and the greedy answer, of every question, one row at a time."""
    tokenizer = load_tokenizer(folder / "base")
    spell = AutoTokenizer.from_pretrained(folder / "base").decode  # the harness's; spells stray bytes in another way
    choices, texts = [], []
    for question, answers, _ in QUESTIONS:
        prompt = f"{question}\nAnswer:"
        start = tokenizer(prompt, return_tensors="pt").input_ids
        length = start.shape[1]
        wholes = [tokenizer(f"{prompt} {answer}", return_tensors="pt").input_ids for answer in answers]
        choices.append([log_likelihood(model, whole[:, :length], whole[:, length:]) for whole in wholes])
        made = model.generate(input_ids=start, max_new_tokens=6, do_sample=False)
        texts.append(spell(made[0, length:], skip_special_tokens=True).partition("\n")[0])
    return choices, texts


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_numbers_are_those_of_the_model(adapter: str | None, folder: Path) -> None:
    found = evaluate(folder, adapter)
    samples = {name: sorted(rows, key=lambda row: row["doc_id"]) for name, rows in found["samples"].items()}
    choices, texts = direct(folder, load(folder, adapter))
    theirs = [[answer[0][0] for answer in row["resps"]] for row in samples["local_choice"]]
    torch.testing.assert_close(torch.tensor(theirs), torch.tensor(choices), rtol=0, atol=1e-4)
    assert [row["resps"][0][0] for row in samples["local_text"]] == texts
    right = [row.index(max(row)) == gold for row, (_, _, gold) in zip(choices, QUESTIONS, strict=True)]
    assert found["results"]["local_choice"]["acc,none"] == pytest.approx(sum(right) / len(right))
    if adapter is not None:
        base, base_texts = direct(folder, load_base(folder))
        assert (torch.tensor(base) - torch.tensor(choices)).abs().min() > 1e-3, "the adapter must act"
        assert texts != base_texts


def test_routing_by_sequence_looks_at_the_prompt_alone(folder: Path) -> None:
    """The negative control: a router that sees the answer, or padding, gives other numbers."""
    model = load(folder, "by sequence")
    tokenizer = load_tokenizer(folder / "base")
    question, answers, _ = QUESTIONS[1]
    ids = tokenizer(f"{question}\nAnswer: {answers[0]}", return_tensors="pt").input_ids
    length = tokenizer(f"{question}\nAnswer:", return_tensors="pt").input_ids.shape[1]
    with torch.no_grad():
        scores = model(input_ids=ids).logits[0, length - 1 : -1].log_softmax(dim=-1)
    looking_ahead = scores.gather(1, ids[0, length:, None]).sum().item()
    assert abs(looking_ahead - log_likelihood(model, ids[:, :length], ids[:, length:])) > 1e-3


def test_the_vocabulary_stays_that_of_the_base(folder: Path, tmp_path: Path) -> None:
    """HFLM itself would cut off the rows that the tokenizer has no token for, and so change every probability."""
    base = load_base(folder)
    base.resize_token_embeddings(base.config.vocab_size + 16)
    base.save_pretrained(tmp_path / "base")
    for path in (folder / "base").glob("*token*"):
        (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    lm = register()(pretrained=str(tmp_path / "base"), peft=str(folder / "lora"), device="cpu")
    assert isinstance(lm.model, PeftModel)
    assert lm.model.get_input_embeddings().num_embeddings == base.config.vocab_size > len(lm.tokenizer)


def test_the_command_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model_args", f"pretrained={folder / 'base'},peft={folder / 'hydralora'}", "--tasks", *TASKS]
    words += ["--include_path", str(folder / "tasks"), "--batch_size", "4", "--device", "cpu"]
    main([*words, "--output_path", str(tmp_path)])
    assert "local_choice" in capsys.readouterr().out
    (path,) = tmp_path.rglob("results_*.json")
    written, expected = json.loads(path.read_text())["results"], evaluate(folder, "hydralora")["results"]
    for task, metric in (("local_choice", "acc,none"), ("local_text", "exact_match,none")):
        assert written[task][metric] == expected[task][metric]


@pytest.mark.parametrize("suffix", ["", "/new", "/results.json", "/../{name}"])
@pytest.mark.parametrize("name", ["base", "hydralora", "tasks"])
def test_results_never_fall_on_an_input(name: str, suffix: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Base, adapter and tasks, as they are and inside; also where a file of settings names them."""
    words = ["--model_args", f"pretrained={folder / 'base'},peft={folder / 'hydralora'}", "--tasks", *TASKS]
    words += ["--include_path", str(folder / "tasks"), "--device", "cpu"]
    before = snapshot(folder)
    output = str(folder / name) + suffix.format(name=name)
    with pytest.raises(FlagError, match=r"--output_path .*(is also|is inside) .*which the program reads"):
        main([*words, "--output_path", output])
    monkeypatch.chdir(folder)
    with pytest.raises(FlagError, match="which the program reads"):
        main([*words, "--output_path", name + suffix.format(name=name)])
    assert snapshot(folder) == before


@pytest.mark.parametrize("output", ["", " ", "~/results"])
def test_results_have_a_place(output: str, folder: Path) -> None:
    words = ["--model_args", f"pretrained={folder / 'base'}", "--tasks", *TASKS, "--output_path", output]
    with pytest.raises(FlagError, match=r"--output_path"):
        main(words)


def test_settings_in_a_file_are_checked_too(folder: Path, tmp_path: Path) -> None:
    arguments = f"{{pretrained: {folder / 'base'}, peft: {folder / 'hydralora'}}}"
    settings = tmp_path / "settings.yaml"
    settings.write_text(f"model_args: {arguments}\noutput_path: {folder / 'hydralora' / 'results'}\n")
    with pytest.raises(FlagError, match=r"is inside peft= of --model_args"):
        main(["--config", str(settings), "--tasks", *TASKS])


def test_a_folder_that_is_no_adapter(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is no adapter"):
        register()(pretrained=str(folder / "base"), peft=str(tmp_path), device="cpu")


@pytest.mark.parametrize("task", TASKS)
def test_logits_that_are_not_numbers_are_not_scored(task: str, folder: Path, tmp_path: Path) -> None:
    """A base that overflows in float16; in float32 the same task is scored."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    register()
    base = overflow_in_float16(folder / "base", tmp_path / "base")
    tasks = TaskManager(include_path=str(folder / "tasks"), include_defaults=False)

    def score(dtype: str) -> Any:
        arguments = {"pretrained": str(base), "dtype": dtype}
        return lm_eval.simple_evaluate(
            "hydralora", arguments, tasks=[task], task_manager=tasks, batch_size=4, device="cpu"
        )

    with pytest.raises(NotFiniteError, match=r"questions in a batch .*float16.*dtype=bfloat16 in --model_args"):
        score("float16")
    assert score("float32")["results"][task]

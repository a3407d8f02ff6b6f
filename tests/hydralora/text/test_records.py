"""What a run makes of its records: averaging, records without a target, test data, conversations, ids without a row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from hydralora.finetune import build_run, main, parse_args
from llava.errors import FlagError
from llava.runtime.tokenizer import load_tokenizer
from tests.golden import golden_dir
from tests.hydralora.text.test_finetune import CASE, command_line, history, save_base, save_data, save_start


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """base/, data/ and start/ of the golden run."""
    path = tmp_path_factory.mktemp("records")
    save_base(path / "base")
    save_data(path / "data")
    save_start(path / "start")
    return path


def test_the_originals_averaging(folder: Path, tmp_path: Path) -> None:
    """The loss of an update is the mean of the means of its micro batches, whose numbers of targets differ."""
    start = {"peft_path": folder / "start", "max_steps": 1, "save_strategy": "no", "learning_rate": 1e-3}
    steps = start | {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    settings = {"by target": steps, "as the original": steps | {"loss_reduction": "micro_batch"}}
    losses, weights = {}, {}
    for name, options in settings.items():
        adapter = main(command_line(folder, tmp_path / name, **options))
        losses[name] = next(row["loss"] for row in history(tmp_path / name) if "loss" in row)
        weights[name] = load_file(adapter / "adapter_model.safetensors")
    run = build_run(parse_args(command_line(folder, tmp_path / "rows", **start)))
    run.model.eval()
    means, counts = [], []
    for row in range(4):
        batch = run.trainer.data_collator([run.trainer.train_dataset[row]])
        del batch["task_types"]
        with torch.no_grad():
            means.append(run.model(**batch).loss.item())
        counts.append(int((batch["labels"] != -100).sum()))
    weighted = sum(mean * count for mean, count in zip(means, counts, strict=True)) / sum(counts)
    assert losses["as the original"] == pytest.approx(sum(means) / 4, abs=1e-3)
    assert losses["by target"] == pytest.approx(weighted, abs=1e-3)
    assert abs(weighted - sum(means) / 4) > 1e-2
    assert any(not torch.equal(weights["by target"][key], value) for key, value in weights["as the original"].items())


LONG = {"instruction": "Summarize the text. " * 20, "input": "", "output": "Yes"}


@pytest.mark.parametrize("part", ["training", "evaluation"])
def test_records_without_a_target(part: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are left out and counted: as a micro batch of their own their loss would be 0, in evaluation no number."""
    (tmp_path / "data").mkdir()
    rows = [*CASE["records"], LONG, LONG]
    (tmp_path / "data" / "train.json").write_text(json.dumps(rows if part == "training" else CASE["records"]))
    (tmp_path / "data" / "test.json").write_text(json.dumps([LONG, CASE["records"][0]]))
    options = {"dataset_dir": tmp_path / "data", "per_device_train_batch_size": 1, "per_device_eval_batch_size": 1}
    options |= {"do_eval": True, "validation_file": tmp_path / "data" / "test.json", "max_steps": 6}
    main(command_line(folder, tmp_path / "out", **options))
    out = capsys.readouterr().out
    assert ("2 of 6 records left out" in out) == (part == "training")
    assert "1 of 2 records left out" in out
    losses = [row["loss"] for row in history(tmp_path / "out") if "loss" in row]
    assert len(losses) == 6
    assert min(losses) > 1
    assert json.loads((tmp_path / "out" / "eval_results.json").read_text())["eval_loss"] > 1


def test_a_run_without_a_target_is_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "long.json"
    path.write_text(json.dumps([LONG] * 7))
    message = r"long\.json: of none of the 7 records .* --max_seq_length 64 .*row 0; .*\.\.\."
    with pytest.raises(FlagError, match=message):
        main(command_line(folder, tmp_path / "out", train_file=path))
    with pytest.raises(FlagError, match=message):
        main(command_line(folder, tmp_path / "out2", do_eval=True, validation_file=path))


def test_test_data_is_named_and_left_out(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_data(tmp_path / "data")
    for name in ("test.json", "val.json"):
        (tmp_path / "data" / name).write_text(json.dumps(CASE["records"] * 2))
    options = {"dataset_dir": tmp_path / "data", "max_steps": 1}
    run = build_run(parse_args(command_line(folder, tmp_path / "out", **options)))
    assert len(run.trainer.train_dataset) == len(CASE["records"])
    assert "test.json, val.json left out" in capsys.readouterr().out
    given = options | {"include_held_out": True, "validation_file": tmp_path / "data" / "val.json"}
    run = build_run(parse_args(command_line(folder, tmp_path / "all", **given)))
    assert len(run.trainer.train_dataset) == 3 * len(CASE["records"])
    assert "left out" not in capsys.readouterr().out


@pytest.mark.parametrize("beyond", ["text", "padding"])
def test_a_tokenizer_of_another_model(beyond: str, folder: Path, tmp_path: Path) -> None:
    """An id without an embedding is found before a batch holds it, with both sizes."""
    base, named = tmp_path / "base", tmp_path / "tokenizer"
    rows = 300 if beyond == "text" else 896
    sizes = CASE["hyper_parameters"]["llama"] | {"vocab_size": rows}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(base)
    tokenizer = load_tokenizer(golden_dir("tokenizer"))
    if beyond == "padding":
        tokenizer.add_special_tokens({"pad_token": "<added_pad>"})
    tokenizer.save_pretrained(named)
    size = len(tokenizer)
    options = {"model_name_or_path": base, "tokenizer_name_or_path": named}
    with pytest.raises(FlagError, match=rf"has {size} tokens, but the base has embeddings for {rows}; "):
        main(command_line(folder, tmp_path / "out", **options))


CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"


@pytest.mark.parametrize("ends", [True, False])
def test_conversations(ends: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are trained on by the template of a file, which the adapter's tokenizer keeps."""
    talk = [{"role": "user", "content": "Name a fruit."}, {"role": "assistant", "content": "Apple"}] * 2
    data, template = tmp_path / "talk.json", tmp_path / "chat.jinja"
    data.write_text(json.dumps([{"messages": talk, "task_type": "fruit"}, *CASE["records"]]))
    template.write_text(CHAT if ends else CHAT.replace("{{ eos_token }}", " END\n"))
    adapter = main(command_line(folder, tmp_path / "out", train_file=data, chat_template=template, max_seq_length=128))
    assert load_tokenizer(adapter).chat_template == template.read_text()
    out = capsys.readouterr().out
    assert ("writes 'END' behind an answer" in out) == (not ends)
    assert "--apply_chat_template" in out
    template.write_text(template.read_text() + " ")
    changed = command_line(folder, tmp_path / "out", train_file=data, chat_template=template, max_seq_length=128)
    with pytest.raises(FlagError, match="chat_template"):
        main(changed)
    template.write_text(template.read_text()[:-1])
    assert any("routing/task_fruit/share_0" in row for row in history(tmp_path / "out"))
    with pytest.raises(FlagError, match=r"--chat_template nothing: is neither a file nor 'tokenizer'"):
        parse_args(command_line(folder, tmp_path / "out2", chat_template="nothing"))

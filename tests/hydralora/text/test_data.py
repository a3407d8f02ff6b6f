"""Instruction records against the original's token ids, and what may be read from a cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hydralora.text import dataset as dataset_module
from hydralora.text.dataset import (
    InstructionCollator,
    InstructionDataset,
    held_out_files,
    load_examples,
    training_files,
)
from hydralora.text.messages import text_of, turn_end
from hydralora.text.samples import Example, read_samples, tokenize
from llava.errors import BadSampleError, FlagError
from llava.runtime.tokenizer import load_tokenizer
from tests.golden import golden_dir, load_case

CASE = load_case("hydralora", "build_dataset")[0]


def tokenizer(**options: Any) -> Any:
    return load_tokenizer(golden_dir("tokenizer"), legacy=True, **options)


@pytest.mark.parametrize("run", CASE["runs"], ids=lambda run: f"length {run['max_seq_length']}")
def test_ids_and_labels_are_the_originals(run: dict[str, Any]) -> None:
    examples = tokenize(CASE["records"], tokenizer(), run["max_seq_length"])
    assert len(examples) == len(run["rows"]) == 10
    for example, row in zip(examples, run["rows"], strict=True):
        assert example.input_ids == row["input_ids"]
        assert example.labels == row["labels"]


def test_the_task_is_optional() -> None:
    record = {"instruction": "Say yes.", "output": "Yes."}
    (example,) = tokenize([record], tokenizer(), 64)
    assert example.task == -1
    for task, meant in ((3, 3), ("", -1), (None, -1), ("number theory", "number theory"), ("3", "3")):
        assert tokenize([record | {"task_type": task, "input": None}], tokenizer(), 64) == [
            example._replace(task=meant)
        ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "no valid JSON"),
        ('{"a": 1}', "holds a dict, expected a list"),
        ('[{"instruction": "a", "output": "b"}, 3]', "row 1: is a int"),
        ('[{"instruction": "a"}]', "row 0: 'output' is None"),
        ('[{"instruction": "a", "output": "b", "input": 5}]', "row 0: 'input' is 5"),
        ('[{"instruction": "a", "output": "b", "task_type": [1]}]', r"row 0: 'task_type' is \[1\]"),
        ('[{"instruction": "a", "output": "b", "task_type": true}]', "row 0: 'task_type' is True"),
        ('[{"instruction": "a", "output": "\\ud800"}]', "row 0: holds half a surrogate pair"),
        ('[{"messages": []}]', "row 0: 'messages' is "),
        ('[{"messages": [{"role": "tool", "content": "a"}]}]', "row 0: message 0 is .*a role of"),
        ('[{"messages": [{"role": "user", "content": 3}]}]', "row 0: 'content' of message 0 is 3"),
        ('[{"messages": [{"role": "user", "content": "a"}]}]', "row 0: none of its 1 messages is from 'assistant'"),
    ],
)
def test_malformed_records_are_named(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(BadSampleError, match=message) as caught:
        read_samples(path)
    assert str(path) in str(caught.value)


def test_a_cache_is_used_only_for_the_very_same_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(CASE["records"]))
    calls: list[int] = []
    real = dataset_module.tokenize
    monkeypatch.setattr(dataset_module, "tokenize", lambda *args: calls.append(1) or real(*args))
    first = load_examples(path, tokenizer(), 64)
    assert load_examples(path, tokenizer(), 64) == first == tokenize(CASE["records"], tokenizer(), 64)
    assert len(calls) == 1
    assert load_examples(path, tokenizer(), 24) != first
    load_examples(path, load_tokenizer(golden_dir("tokenizer"), legacy=False), 64)
    path.write_text(json.dumps(CASE["records"][1:]))
    assert load_examples(path, tokenizer(), 64) == first[1:]
    assert len(calls) == 4
    load_examples(path, tokenizer(), 64, overwrite=True)
    assert len(calls) == 5
    load_examples(path, tokenizer(), 64, cache_dir=tmp_path / "elsewhere")
    assert len(list((tmp_path / "elsewhere").iterdir())) == 1


def test_a_cache_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, folder = tmp_path / "data.json", tmp_path / dataset_module.CACHE_FOLDER
    path.write_text(json.dumps(CASE["records"]))
    first = load_examples(path, tokenizer(), 64)
    (cache,) = folder.iterdir()
    content = cache.read_bytes()

    def half(tensors: Any, target: Path) -> None:
        Path(target).write_bytes(content[:100])
        raise OSError(28, "No space left on device", str(target))

    with monkeypatch.context() as patch:
        patch.setattr(dataset_module, "save_file", half)
        with pytest.raises(OSError, match="No space left"):
            load_examples(path, tokenizer(), 64, overwrite=True)
    assert [each.read_bytes() for each in folder.iterdir()] == [content]
    assert load_examples(path, tokenizer(), 64) == first


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text(json.dumps(CASE["records"]))
    (tmp_path / dataset_module.CACHE_FOLDER).write_text("mine")
    with pytest.raises(FlagError, match=rf"{dataset_module.CACHE_FOLDER}.*cannot be written"):
        load_examples(path, tokenizer(), 64)
    assert (tmp_path / dataset_module.CACHE_FOLDER).read_text() == "mine"


def test_the_validation_file_is_not_trained_on(tmp_path: Path) -> None:
    for name in ("b.json", "a.json", "test.json", "notes.txt"):
        (tmp_path / name).write_text("[]")
    held_out = str(tmp_path / "test.json")
    assert [path.name for path in training_files(str(tmp_path), None, held_out)] == ["a.json", "b.json"]
    assert training_files(None, str(tmp_path / "b.json"), held_out) == [tmp_path / "b.json"]
    with pytest.raises(FlagError, match=r"no \.json file to train on"):
        training_files(str(tmp_path / "empty"), None, None)


HELD_OUT = ("test.json", "val.json", "mmlu_TEST.json", "dev-2.jsonl", "questions.validation.json")
TRAINED = ("train.json", "a.jsonl", "test_questions_train.json", "latest.json", "evaluated.json")


def test_files_named_as_test_data_are_left_out(tmp_path: Path) -> None:
    for name in (*HELD_OUT, *TRAINED):
        (tmp_path / name).write_text("[]")
    names = [path.name for path in training_files(str(tmp_path), None, None)]
    assert sorted(names) == sorted(TRAINED)
    assert {path.name for path in held_out_files(str(tmp_path), None)} == set(HELD_OUT)
    everything = training_files(str(tmp_path), None, str(tmp_path / "val.json"), include_held_out=True)
    assert {path.name for path in everything} == {*HELD_OUT, *TRAINED} - {"val.json"}
    for name in TRAINED:
        (tmp_path / name).unlink()
    with pytest.raises(FlagError, match=r"include_held_out True trains on .*'test\.json'"):
        training_files(str(tmp_path), None, None)


def test_lines_are_records_too(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, CASE["records"])) + "\n")
    assert read_samples(path) == CASE["records"]
    path.write_text('{"instruction": "a", "output": "b"}\n\n{')
    with pytest.raises(BadSampleError, match=r"data\.jsonl, line 3: is no valid JSON"):
        read_samples(path)


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TURN = "{{ m.content }}{{ eos_token }}"
BLOCKS = TEMPLATE.replace(
    TURN,
    f"{{% if m.role == 'assistant' %}}{{% generation %}}{TURN}{{% endgeneration %}}{{% else %}}{TURN}{{% endif %}}",
)
TALK = [
    {"role": "system", "content": "Be short."},
    {"role": "user", "content": [{"type": "text", "text": "Name a "}, {"type": "text", "text": "fruit."}]},
    {"role": "assistant", "content": "Apple"},
    {"role": "user", "content": "And another one."},
    {"role": "assistant", "content": "Pear"},
]


@pytest.mark.parametrize("template", [TEMPLATE, BLOCKS], ids=["compared", "blocks"])
def test_answers_of_a_conversation_are_trained(template: str) -> None:
    mine = tokenizer()
    mine.chat_template = template
    (example,) = tokenize([{"messages": TALK, "task_type": "fruits"}], mine, 256)
    prompt = mine.apply_chat_template(
        [message | {"content": text_of(message["content"])} for message in TALK], tokenize=False
    )
    assert example.input_ids == mine(prompt, add_special_tokens=False).input_ids
    trained = [token for token, label in zip(example.input_ids, example.labels, strict=True) if label != -100]
    assert mine.decode(trained).split() == ["Apple</s>", "Pear</s>"]
    assert example.task == "fruits"
    (cut,) = tokenize([{"messages": TALK}], mine, example.input_ids.index(mine.eos_token_id) + 1)
    assert not cut.has_target
    assert example.has_target


def test_instructions_by_the_chat_template() -> None:
    mine = tokenizer()
    mine.chat_template = TEMPLATE
    record = {"instruction": "Add.", "input": "1 and 2", "output": "3"}
    talk = [{"role": "user", "content": "Add.\n1 and 2"}, {"role": "assistant", "content": "3"}]
    mixed = tokenize([record, {"messages": talk}, record], mine, 64, chat=True)
    assert mixed[0] == mixed[1] == mixed[2]
    plain = tokenize([record, {"messages": talk}, record], mine, 64)
    assert plain[0] == plain[2] != plain[1] == mixed[1]


def test_messages_need_a_template() -> None:
    with pytest.raises(FlagError, match=r"no chat template.*--chat_template FILE"):
        tokenize([{"messages": TALK}], tokenizer(), 64)
    mine = tokenizer()
    mine.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(BadSampleError, match=r"--chat_template.*no system role"):
        tokenize([{"messages": TALK}], mine, 64)


@pytest.mark.parametrize(
    ("template", "text", "token"),
    [
        (TEMPLATE, "</s>", "</s>"),
        (TEMPLATE.replace("{{ eos_token }}", "\n"), "", None),
        (TEMPLATE.replace("{{ eos_token }}", " END\n"), "END", None),
    ],
)
def test_the_end_of_a_turn(template: str, text: str, token: str | None) -> None:
    mine = tokenizer()
    mine.chat_template = template
    assert turn_end(mine) == (text, None if token is None else mine.convert_tokens_to_ids(token))


def test_a_cache_keeps_conversations_and_tasks(tmp_path: Path) -> None:
    mine = tokenizer()
    mine.chat_template = TEMPLATE
    path = tmp_path / "data.json"
    rows = [{"messages": TALK, "task_type": "a/b"}, {"messages": TALK[1:], "task_type": 3}, *CASE["records"]]
    path.write_text(json.dumps(rows))
    first = load_examples(path, mine, 64)
    assert first[0].asked_later
    assert load_examples(path, mine, 64) == first == tokenize(rows, mine, 64)
    assert load_examples(path, mine, 64, chat=True) == tokenize(rows, mine, 64, chat=True) != first
    mine.chat_template = TEMPLATE.replace("<assistant>", "<gpt>").replace("<{{ m.role }}>", "<gpt>")
    assert load_examples(path, mine, 64) == tokenize(rows, mine, 64) != first


def test_split() -> None:
    data = InstructionDataset([Example([number], 0, -1) for number in range(40)])
    train, held_out = data.split(0.05, seed=1)
    assert (len(train), len(held_out)) == (38, 2)
    assert sorted(train.examples + held_out.examples) == data.examples
    assert data.split(0.05, seed=1)[1].examples == held_out.examples
    assert data.split(0.05, seed=2)[1].examples != held_out.examples
    with pytest.raises(FlagError, match="leaves nothing to train on"):
        InstructionDataset(data.examples[:1]).split(0.05, seed=1)


def test_batches() -> None:
    """An `<unk>` of the text, id 0 as padding, stays visible."""
    batch = InstructionCollator(0)([Example([1, 0, 5, 2], 2, 4), Example([1, 7], 1, -1)])
    assert batch["input_ids"].tolist() == [[1, 0, 5, 2], [1, 7, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 5, 2], [-100, 7, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["task_types"] == [4, -1]

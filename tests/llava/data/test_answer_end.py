"""What ends an answer: the template's end in the tokens of each kind of tokenizer, and what is said of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from llava.data.answer_end import AnswerEnd, answer_end, end_problem, fitting_versions, turn_end
from llava.data.check import main as check
from llava.data.templates import select_template
from llava.eval.answering.generation import EndsAtText, ending_arguments
from llava.runtime.tokenizer import eos_ids
from tests.golden import golden_dir
from tests.llava.data.test_chat_template import CHATML, STRICT, WITH_BLOCKS
from tests.llava.runtime.tokenizers import make_tokenizer
from tests.model.backbones import byte_level_tokenizer

LLAVA = golden_dir("llava")
NO_END = "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
NO_END += "{% if add_generation_prompt %}[assistant]{% endif %}"
UNTRAINED = CHATML.replace(
    "{{ m.content }}<",
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}"
    "{% endif %}<",
)
PADDED = CHATML.replace("<|im_end|>", "\n<|im_end|><|endoftext|>")
IM_END, END_OF_TEXT = "<|im_end|>", "<|endoftext|>"


def llama(template: str | None = None) -> Any:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def qwen(template: str | None = None, end: str = IM_END) -> Any:
    tokenizer = byte_level_tokenizer()
    tokenizer.eos_token, tokenizer.chat_template = end, template
    return tokenizer


# Tokenizer, --version, the text of the end, the token that it is, and a part of what is said, or None.
CASES: dict[str, tuple[Any, str, str, str | None, str | None]] = {
    "llama v1": (llama, "v1", "</s>", "</s>", None),
    "llama, the default": (llama, "v0", "</s>", "</s>", None),
    "llama 2": (llama, "llava_llama_2", "</s>", "</s>", None),
    "llama v0": (llama, "llava_v0", "###", None, "'###', which is not one end token of this tokenizer but "),
    "llama mpt": (llama, "mpt", IM_END, None, f"'{IM_END}', which is not one end token"),
    "llama plain": (llama, "plain", "", None, None),
    "qwen chatml": (qwen, "chatml_direct", IM_END, IM_END, None),
    "qwen v1": (qwen, "v1", "</s>", None, "'</s>', which is not one end token of this tokenizer but 4 ordinary tokens"),
    "own template": (lambda: qwen(CHATML), "tokenizer", IM_END, IM_END, None),
    "own template, base": (lambda: qwen(CHATML, END_OF_TEXT), "tokenizer", IM_END, IM_END, None),
    "two tokens": (lambda: qwen(PADDED), "tokenizer", f"{IM_END}{END_OF_TEXT}", IM_END, None),
    "without end": (lambda: qwen(NO_END), "tokenizer", "", None, "nothing but white space behind an answer"),
    "untrained end": (lambda: qwen(UNTRAINED), "tokenizer", IM_END, IM_END, "block ends in front of '<|im_end|>"),
    "trained blocks": (lambda: llama(WITH_BLOCKS), "tokenizer", "</s>", "</s>", None),
}


@pytest.mark.parametrize("case", CASES)
def test_the_end_of_a_turn(case: str) -> None:
    make, version, text, token, said = CASES[case]
    tokenizer = make()
    template = select_template(version, tokenizer)
    end = turn_end(template, tokenizer)
    assert end is not None
    assert end.text == text
    assert end.token == (None if token is None else tokenizer.convert_tokens_to_ids(token))
    problem = end_problem(template, end, tokenizer, version)
    assert (problem is None) == (said is None)
    assert said is None or (said in problem and problem.startswith(f"--version {version}: "))
    # Tokens and texts of one template never both end its answers.
    found = answer_end(end, tokenizer, GenerationConfig(eos_token_id=[7, 9]))
    assert found.ids[:2] == (7, 9)
    assert set(found.ids) == {7, 9, tokenizer.eos_token_id} | ({end.token} - {None})
    assert found.texts == ((text,) if text and token is None else ())


def test_the_message_says_the_tokens_and_what_fits() -> None:
    tokenizer = qwen(CHATML)
    template = select_template("v1", tokenizer)
    problem = end_problem(template, turn_end(template, tokenizer), tokenizer, "v1")
    assert problem is not None
    assert "['<', '/', 's', '>']" in problem
    assert "pass --version tokenizer or chatml_direct or mpt, whose end is one token here" in problem
    for version in fitting_versions(tokenizer):
        fitting = select_template(version, tokenizer)
        assert end_problem(fitting, turn_end(fitting, tokenizer), tokenizer, version) is None
    assert "v1" in fitting_versions(llama())


def test_a_template_that_refuses_a_conversation_says_nothing() -> None:
    """Rows with it have problems of their own; its prompts end at the usual tokens."""
    tokenizer = qwen(STRICT)
    template = select_template("tokenizer", tokenizer)
    assert turn_end(template, tokenizer) is None
    assert end_problem(template, None, tokenizer, "tokenizer") is None
    assert answer_end(None, tokenizer, GenerationConfig()).ids == (tokenizer.eos_token_id,)


@pytest.mark.parametrize(("given", "ids"), [(None, []), (2, [2]), ([2, 5], [2, 5]), (torch.tensor([3, 4]), [3, 4])])
def test_ids_of_a_generation_config(given: Any, ids: list[int]) -> None:
    config = GenerationConfig()
    config.eos_token_id = given
    assert eos_ids(config) == ids
    assert eos_ids(None) == []


def test_the_text_of_an_answer_stops_at_the_first_end() -> None:
    tokenizer = qwen(end=END_OF_TEXT)
    end = tokenizer.eos_token_id
    ids = tokenizer("red ship</s> and more").input_ids
    assert AnswerEnd((end,), ("</s>",)).text([*ids, end, 5, 6], tokenizer) == "red ship"
    assert AnswerEnd((end,)).text([*ids, end, 5, 6], tokenizer) == "red ship</s> and more"
    assert AnswerEnd((end, ids[1])).text(ids, tokenizer) == tokenizer.decode(ids[:1])
    assert AnswerEnd().text(ids, tokenizer) == "red ship</s> and more"


def test_each_row_stops_at_its_own_text() -> None:
    """At the token that completes the text, whatever else that token spells; the other rows continue."""
    tokenizer = qwen()
    rows = [tokenizer(text).input_ids for text in ("red ship</s>", "a red ship </ s>", "</s> later lines of the lake")]
    criteria = EndsAtText(("</s>",), tokenizer)
    width = min(map(len, rows))
    stopped: list[set[int]] = [set() for _ in rows]
    for length in range(1, width + 1):
        for row, stop in enumerate(criteria(torch.tensor([ids[:length] for ids in rows]), torch.empty(0)).tolist()):
            stopped[row] |= {length} if stop else set()
    first = [min(lengths, default=None) for lengths in stopped]
    assert first[1] is None
    for row in (0, 2):
        wanted = next(n for n in range(1, len(rows[row]) + 1) if "</s>" in tokenizer.decode(rows[row][:n]))
        assert first[row] == (wanted if wanted <= width else None)
    assert list(ending_arguments(AnswerEnd((4, 5)), tokenizer)) == ["eos_token_id"]
    assert list(ending_arguments(AnswerEnd((), ("x",)), tokenizer)) == ["stopping_criteria"]


def words(folder: Path, tokenizer: Path, version: str) -> list[str]:
    options = ("--image_folder", LLAVA / "data" / "images", "--tokenizer", tokenizer, "--image_length", 4)
    files = ("--json", folder / "found.json", "--html", folder / "page.html", "--num_workers", 0)
    return [str(word) for word in (LLAVA / "data" / "finetune.json", *options, "--version", version, *files)]


@pytest.mark.parametrize(("version", "status"), [("v1", 1), ("chatml_direct", 0), ("tokenizer", 0)])
def test_the_check_of_data_finds_it(
    version: str, status: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    qwen(CHATML, END_OF_TEXT).save_pretrained(tmp_path / "base")
    assert check(words(tmp_path, tmp_path / "base", version)) == status
    out = " ".join(capsys.readouterr().out.split())
    page, found = (tmp_path / "page.html").read_text(), (tmp_path / "found.json").read_text()
    said = "4 ordinary tokens"
    assert [said in text for text in (out, page, found)] == [bool(status)] * 3
    if status:
        assert "No row has problems, but answers do not end with one token" in out
        assert check([*words(tmp_path, tmp_path / "base", version), "--allow", "answer end"]) == 0

"""`--version tokenizer`: prompts, ids and labels follow the tokenizer's own chat template."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import Conversation
from llava.data.labels import TokenizedPrompt, tokenize_conversation
from llava.data.templates import select_template
from llava.errors import BadSampleError, FlagError
from llava.eval.answering.prompts import ask, build_prompt, check_conv_mode, prompt_ids
from llava.runtime.tokenizer import load_tokenizer
from tests.llava.data.test_labels import conversation
from tests.llava.runtime.tokenizers import make_tokenizer

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WITH_BLOCKS = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
WITH_BLANKS = WITH_BLOCKS.replace("]", "] ").replace("] ] ", "]] ")
FORGETFUL = (  # answers before the last user message are shortened, as some templates do with thoughts
    "{% for m in messages %}{{ m.role }}: {{ m.content if loop.last else m.content[:2] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
STRICT = "{{ raise_exception('no messages, please') }}"
TURNS = conversation("Hi", "Hello", "Bye", "Good night")


def byte_tokenizer(template: str | None) -> PreTrainedTokenizerBase:
    """A fast tokenizer that spells everything in bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(["<s>", "</s>", *alphabet])}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<|im_start|>", "<|im_end|>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, chat_template=template, **{"bos_token": "<s>", "eos_token": "</s>"}
    )


def tokenize(template: str, turns: list = TURNS, images: int = 0) -> tuple[PreTrainedTokenizerBase, TokenizedPrompt]:
    tokenizer = byte_tokenizer(template)
    version = select_template("tokenizer", tokenizer)
    return tokenizer, tokenize_conversation(turns, tokenizer, version, image_count=images)


def trained(tokenizer: PreTrainedTokenizerBase, prompt: TokenizedPrompt) -> str:
    """Targets as text, everything else as a bar."""
    texts, ignored = [], False
    for label in prompt.labels.tolist():
        if label != IGNORE_INDEX:
            texts.append(tokenizer.decode([label]))
        elif not ignored:
            texts.append("|")
        ignored = label == IGNORE_INDEX
    return "".join(texts)


def test_without_generation_blocks_answers_are_found_by_comparing() -> None:
    tokenizer, prompt = tokenize(CHATML)
    messages = [{"role": ("user", "assistant")[i % 2], "content": turn["value"]} for i, turn in enumerate(TURNS)]
    assert prompt.prompt == tokenizer.apply_chat_template(messages, tokenize=False)
    assert prompt.input_ids.tolist() == tokenizer.apply_chat_template(messages, return_dict=False)
    assert trained(tokenizer, prompt) == "|Hello<|im_end|>\n|Good night<|im_end|>\n"


def test_generation_blocks_say_what_is_trained() -> None:
    tokenizer, prompt = tokenize(WITH_BLOCKS)
    assert prompt.prompt == "<s>[user]Hi[assistant]Hello</s>[user]Bye[assistant]Good night</s>"
    assert trained(tokenizer, prompt) == "|Hello</s>|Good night</s>"
    assert prompt.input_ids.tolist().count(tokenizer.bos_token_id) == 1, "the template writes it"
    encoded = tokenizer.apply_chat_template(
        [{"role": ("user", "assistant")[i % 2], "content": turn["value"]} for i, turn in enumerate(TURNS)],
        return_assistant_tokens_mask=True,
        return_dict=True,
    )
    assert encoded["input_ids"] == prompt.input_ids.tolist()
    assert encoded["assistant_masks"] == [int(label != IGNORE_INDEX) for label in prompt.labels.tolist()]


@pytest.mark.parametrize("template", [CHATML, WITH_BLOCKS, WITH_BLANKS])
def test_images_and_empty_answers(template: str) -> None:
    turns = conversation("<image> or <image>?", "", "Now?", "This.")
    tokenizer, prompt = tokenize(template, turns, images=2)
    assert prompt.input_ids.tolist().count(IMAGE_TOKEN_INDEX) == 2
    assert trained(tokenizer, prompt).lstrip("| ").startswith("This.")
    with pytest.raises(BadSampleError, match="no answer to train on"):
        tokenize(template, conversation("Hi", ""))


def test_the_sentencepiece_tokenizer_works_too() -> None:
    tokenizer = make_tokenizer.__wrapped__(chat_tokens=True)
    tokenizer.chat_template = WITH_BLANKS
    prompt = tokenize_conversation(TURNS, tokenizer, select_template("tokenizer", tokenizer), image_count=0)
    assert prompt.input_ids.tolist()[:1] == [tokenizer.bos_token_id] != prompt.input_ids.tolist()[1:2]
    runs = "".join(tokenizer.convert_ids_to_tokens(label) if label >= 0 else "|" for label in prompt.labels.tolist())
    assert [run for run in runs.split("|") if run] == ["\u2581Hello</s>", "\u2581Good\u2581night</s>"]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    with pytest.raises(BadSampleError, match=r"--version tokenizer: .* writes a conversation differently as it grows"):
        tokenize(FORGETFUL)
    assert trained(*tokenize(FORGETFUL, TURNS[:2])).startswith("|") is True


def test_messages_that_the_template_refuses() -> None:
    with pytest.raises(BadSampleError, match=r"--version tokenizer: .*no messages, please"):
        tokenize(STRICT)


@pytest.mark.parametrize("tokenizer", [None, byte_tokenizer(None)], ids=["none", "without template"])
def test_a_tokenizer_without_template_is_refused(tokenizer: PreTrainedTokenizerBase | None) -> None:
    with pytest.raises(FlagError, match=r"--version tokenizer: this tokenizer has no chat template"):
        select_template("tokenizer", tokenizer)


@pytest.mark.parametrize("template", [CHATML, WITH_BLOCKS, WITH_BLANKS])
def test_the_prompt_at_inference_is_the_beginning_of_the_training_prompt(template: str) -> None:
    tokenizer, prompt = tokenize(template, TURNS[:2])
    text = build_prompt("Hi", "tokenizer", tokenizer)
    assert prompt.prompt.startswith(text)
    assert text.endswith(("<|im_start|>assistant\n", "[assistant]"))
    ids = prompt_ids(ask("Hi", "tokenizer", tokenizer), tokenizer).tolist()
    first = next(i for i, label in enumerate(prompt.labels.tolist()) if label != IGNORE_INDEX)
    assert ids == prompt.input_ids.tolist()[:first]
    check_conv_mode("tokenizer")


def test_a_copy_keeps_the_tokenizer() -> None:
    tokenizer = byte_tokenizer(CHATML)
    copy: Conversation = select_template("tokenizer", tokenizer).copy()
    copy.append_message("user", "Hi")
    assert copy.get_prompt() == "<|im_start|>user\nHi<|im_end|>\n"
    assert select_template("tokenizer", tokenizer).messages == []


def test_the_template_survives_saving(tmp_path: Path) -> None:
    byte_tokenizer(WITH_BLOCKS).save_pretrained(tmp_path)
    assert build_prompt("Hi", "tokenizer", load_tokenizer(tmp_path)) == "<s>[user]Hi[assistant]"

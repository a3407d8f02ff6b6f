"""Requests that cannot be answered: each is a 4xx in OpenAI's form, names its parameter and costs little.

`RAW` are bodies as they come over the wire; the last test makes further ones by putting hostile values into a request.
"""

from __future__ import annotations

import base64
import copy
import io
import json
import random
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.eval.answering.loading import LoadedModel
from llava.serve import app, chat_request, image_urls, schema
from llava.serve.chat_request import conversation_of, read_request
from llava.serve.defaults import Defaults
from llava.serve.image_urls import ImagePolicy
from tests.llava.serve.test_api import HELLO, IMAGE, MODEL, SETTINGS, until
from tests.llava.serve.test_http import BODY, CHAT, connect, loaded, refused  # noqa: F401

pytestmark = pytest.mark.versions

HOSTS = frozenset({"127.0.0.1:9", "[::1", "localhost:abc", "a b", "127.0.0.1:99999"})
TEXT = json.dumps(BODY)


@pytest.fixture(scope="module")
def client(loaded: LoadedModel) -> Iterator[Any]:  # noqa: F811
    with connect(loaded, replace(SETTINGS, images=ImagePolicy(hosts=HOSTS))) as client:
        yield client


def also(text: str) -> str:
    """A valid request with one more parameter."""
    return f"{TEXT[:-1]},{text}}}"


def said(content: str) -> str:
    """A request of one message whose content is this JSON."""
    return TEXT.replace('"Hello"', content)


def shown(url: str) -> str:
    """A request with an image at an address, which is JSON without its quotes."""
    return said(f'[{{"type":"image_url","image_url":{{"url":"{url}"}}}}]')


def png(size: tuple[int, int], mode: str = "RGB") -> str:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


DIGITS = "0" * 400
WHOLE, MESSAGES, CONTENT = None, "messages", "messages[0].content"
RAW: dict[str, tuple[str | bytes, str | None]] = {
    # What gave an error of the server before it was checked.
    "deep list": ("[" * 100_000 + "]" * 100_000, WHOLE),
    "deep object": ('{"a":' * 90_000 + "1" + "}" * 90_000, WHOLE),
    "deep in a known field": (also('"metadata":' + "[" * 50_000 + "]" * 50_000), WHOLE),
    "surrogate in a text": (said('"\\ud800"'), WHOLE),
    "surrogate in the model": (TEXT.replace(MODEL, "\\udfff"), WHOLE),
    "surrogate in a key": (also('"\\ud800":1'), WHOLE),
    "surrogate in base64": (shown("data:image/png;base64,\\ud800"), WHOLE),
    "surrogate in a scheme": (shown("\\ud800"), WHOLE),
    "temperature 10**400": (also(f'"temperature":1{DIGITS}'), "temperature"),
    "open bracket": (shown("http://["), MESSAGES),
    "half an address": (shown("http://[::1/x.png"), MESSAGES),
    "a host that is none": (shown("http://a\u2100b/x.png"), MESSAGES),
    "a port in words": (shown("http://localhost:abc/x.png"), MESSAGES),
    "a space in an address": (shown("http://127.0.0.1:9/x y.png"), MESSAGES),
    "a line break in an address": (shown("http://127.0.0.1:9/x\\ny.png"), MESSAGES),
    "base64 that is not ASCII": (shown("data:image/png;base64,\u00e9\u00e9\u00e9\u00e9"), MESSAGES),
    # What was accepted, and means nothing.
    "surrogate in a stop": (also('"stop":"\\ud800"'), WHOLE),
    "seed 10**400": (also(f'"seed":1{DIGITS}'), "seed"),
    "deep 900": (also('"metadata":' + "[" * 900 + "]" * 900), WHOLE),
    "n is a bool": (also('"n":true'), "n"),
    "stream options as a list": (also('"stream_options":[1]'), "stream_options"),
    "UTF-16": (TEXT.encode("utf-16"), WHOLE),
    # Numbers.
    "10**5000": (also('"seed":1' + "0" * 5000), WHOLE),
    "a million digits": (also('"seed":1' + "0" * 1_000_000), WHOLE),
    "top_p 10**400": (also(f'"top_p":1{DIGITS}'), "top_p"),
    "max_tokens 10**400": (also(f'"max_tokens":1{DIGITS}'), "max_tokens"),
    "temperature 1e999": (also('"temperature":1e999'), "temperature"),
    "n 1e999": (also('"n":1e999'), "n"),
    "NaN": (also('"temperature":NaN'), WHOLE),
    "Infinity": (also('"top_p":Infinity'), WHOLE),
    "NaN in what is unknown": (also('"zz":NaN'), WHOLE),
    "max_tokens 1.5": (also('"max_tokens":1.5'), "max_tokens"),
    "max_tokens 0": (also('"max_tokens":0'), "max_tokens"),
    "both limits": (also('"max_tokens":1,"max_completion_tokens":1'), "max_tokens"),
    "logprobs 0": (also('"logprobs":0'), "logprobs"),
    "top_logprobs false": (also('"top_logprobs":false'), "top_logprobs"),
    # Not JSON, or not an object.
    "nothing": ("", WHOLE),
    "a list": ("[]", WHOLE),
    "null": ("null", WHOLE),
    "a number": ("1", WHOLE),
    "a text": ('"x"', WHOLE),
    "Latin-1": (b'{"model":"\xe9"}', WHOLE),
    "trailing": (TEXT + "x", WHOLE),
    "cut": (TEXT[:-3], WHOLE),
    "300 keys": (json.dumps({f"k{number}": 1 for number in range(300)}), WHOLE),
    "keys of metadata": (json.dumps(BODY | {"metadata": {f"k{number}": "1" for number in range(300)}}), WHOLE),
    "a million lists": ("[" + "[]," * 1_000_000 + "1]", WHOLE),
    "a million numbers": ("[" + "1," * 1_000_000 + "1]", WHOLE),
    # Types and values.
    "no model": ('{"messages":[{"role":"user","content":"Hello"}]}', "model"),
    "model null": (TEXT.replace(f'"{MODEL}"', "null"), "model"),
    "model list": (TEXT.replace(f'"{MODEL}"', "[]"), "model"),
    "no messages": (json.dumps({"model": MODEL}), MESSAGES),
    "messages object": (json.dumps({"model": MODEL, "messages": {}}), MESSAGES),
    "messages empty": (json.dumps({"model": MODEL, "messages": []}), MESSAGES),
    "a message is a number": (json.dumps({"model": MODEL, "messages": [1]}), "messages[0]"),
    "3000 messages": (json.dumps({"model": MODEL, "messages": HELLO * 3000}), MESSAGES),
    "an unknown key of a message": (json.dumps({"model": MODEL, "messages": [HELLO[0] | {"zz": 1}]}), "messages[0].zz"),
    "tool calls": (
        json.dumps({"model": MODEL, "messages": [HELLO[0] | {"tool_calls": [1]}]}),
        "messages[0].tool_calls",
    ),
    "role list": (TEXT.replace('"user"', '["user"]'), "messages[0].role"),
    "role tool": (TEXT.replace('"user"', '"tool"'), "messages[0].role"),
    "content null": (said("null"), CONTENT),
    "content number": (said("1"), CONTENT),
    "content empty": (said("[]"), CONTENT),
    "part number": (said("[1]"), f"{CONTENT}[0]"),
    "part of another type": (said('[{"type":[]}]'), f"{CONTENT}[0]"),
    "text is a number": (said('[{"type":"text","text":1}]'), f"{CONTENT}[0].text"),
    "image without address": (said('[{"type":"image_url"}]'), f"{CONTENT}[0].image_url"),
    "address is a number": (said('[{"type":"image_url","image_url":{"url":1}}]'), f"{CONTENT}[0].image_url.url"),
    "stop number": (also('"stop":1'), "stop"),
    "stop empty": (also('"stop":""'), "stop"),
    "stop nested": (also('"stop":[["a"]]'), "stop[0]"),
    "five stops": (also('"stop":["a","b","c","d","e"]'), "stop"),
    "long stop": (also(f'"stop":["a","{"b" * 250_000}"]'), "stop[1]"),
    "stream is a text": (also('"stream":"yes"'), "stream"),
    "tool_choice list": (also('"tool_choice":[]'), "tool_choice"),
    "unknown": (also('"zz":null'), "zz"),
    "a long unknown key": (also(f'"{"z" * 100_000}":1'), "z" * 200),
    "a tag of ours": (also('"<text>":1'), "<text>"),
    "system later": (json.dumps({"model": MODEL, "messages": [*HELLO, {"role": "system", "content": "x"}]}), MESSAGES),
    "an image of the system": (
        json.dumps({"model": MODEL, "messages": [json.loads(shown("x"))["messages"][0] | {"role": "system"}, *HELLO]}),
        CONTENT,
    ),
    # Images.
    "closed port": (shown("http://127.0.0.1:9/x.png"), MESSAGES),
    "impossible port": (shown("http://127.0.0.1:99999/x.png"), MESSAGES),
    "user and host": (shown("http://127.0.0.1:9@evil.example/x.png"), MESSAGES),
    "backslash": (shown("http://evil.example\\\\@127.0.0.1:9/x.png"), MESSAGES),
    "a long host": (shown("http://" + "\u00fc" * 30_000 + "/x.png"), MESSAGES),
    "a long address": (shown(f"http://127.0.0.1:9/{'x' * 100_000}"), MESSAGES),
    "no address": (shown(""), MESSAGES),
    "null byte": (shown("file:a\\u0000b"), MESSAGES),
    "no comma": (shown("data:image/png;base64"), MESSAGES),
    "base64 of a wrong length": (shown("data:image/png;base64,AAA"), MESSAGES),
    "no image": (shown("data:image/png;base64,AAAA"), MESSAGES),
    "half an image": (shown(IMAGE[:200]), MESSAGES),
    "a strip": (shown(png((50, 10_000))), MESSAGES),
    "a hair": (shown(png((1, 20_000))), MESSAGES),
    "a strip with a palette": (shown(png((10_000, 50), "P")), MESSAGES),
    # Prompts.
    "20 million characters": (said(json.dumps("word " * 4_000_000)), MESSAGES),
    "a marker": (said('"<image>"'), MESSAGES),
    "a place without image": (said('"<image-placeholder>"'), MESSAGES),
}


@pytest.mark.parametrize("case", RAW)
def test_each_is_refused_in_the_form(case: str, client: Any) -> None:
    """Names the parameter, repeats nothing long, and takes a moment; 5 s is for a busy machine."""
    content, param = RAW[case]
    start = time.monotonic()
    response = client.post(CHAT, content=content, headers={"content-type": "application/json"})
    assert time.monotonic() - start < 5
    error = refused(response, 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert 0 < len(error["message"]) < 1000


def test_afterwards_it_answers(client: Any) -> None:
    for content in (TEXT, said('"a\\u0000b"'), said('""'), b"\xef\xbb\xbf" + TEXT.encode(), said('"</s><s>"')):
        assert client.post(CHAT, content=content, headers={"content-type": "application/json"}).status_code == 200
    idle = {"status": "ok", "answering": 0, "waiting": 0}
    until(lambda: client.get("/health").json() == idle)


def test_another_model(client: Any) -> None:
    error = refused(client.post(CHAT, json=BODY | {"model": "x" * 100_000}), 404)
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert len(error["message"]) < 300


HOSTILE: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 5, 0.0, -0.0, 1.0, 0.5, 1e308, 10**20, -(10**20), 10**400, 2**63, 2**63 - 1),
    *("", " ", "a", "\0", "\U0001f600", "</s>", "<image>", "<image-placeholder>", "x" * 2000, "user", "text", "auto"),
    *("http://[", "https://", "data:,", "data:image/png;base64,", "file:", "file:..", "ftp:x", "{0}", "%s", "\u202e"),
    *([], [None], [[]], [1], ["a"] * 5, {}, {"a": 1}, {"type": "text"}, {"type": "image_url"}, {"url": ""}, [{}] * 3),
    {"type": "text", "text": "a"},
    {"type": "image_url", "image_url": {"url": IMAGE}},
    {"type": "image_url", "image_url": IMAGE},
    {"role": "user", "content": "a"},
]
EVERYTHING: dict[str, Any] = BODY | {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": IMAGE}}, {"type": "text", "text": "a"}],
        },
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
    "stream_options": {"include_usage": True},
    "metadata": {"a": "b"},
    "stop": ["a", "b"],
}
TRIES = 400


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [found for key, inner in items for found in [(value, key), *places(inner)]]


def test_hostile_values(client: Any) -> None:
    """One to three values of a request are replaced; the names of the schema's other parameters are tried, too."""
    draw = random.Random(0)
    names = [*schema.ChatCompletionRequest.model_fields, "tools ", "Messages"]
    counts: dict[int, int] = {}
    for _ in range(TRIES):
        body = copy.deepcopy(EVERYTHING)
        for _ in range(draw.randint(1, 3)):
            container, key = draw.choice(places(body))
            match draw.randrange(4):
                case 0 if isinstance(container, dict):
                    del container[key]
                case 1:
                    body[draw.choice(names)] = copy.deepcopy(draw.choice(HOSTILE))
                case _:
                    container[key] = copy.deepcopy(draw.choice(HOSTILE))
            if not body:
                break
        response = client.post(CHAT, content=json.dumps(body), headers={"content-type": "application/json"})
        counts[response.status_code] = counts.get(response.status_code, 0) + 1
        if response.status_code != 200:
            assert response.status_code in (400, 404), (response.text, body)
            schema.Problem.model_validate_json(response.content)
        elif not body.get("stream"):
            schema.ChatCompletion.model_validate_json(response.content)
    assert counts[200] > 10
    assert counts[400] > TRIES // 2


def test_a_strip_is_not_decoded(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("it was decoded")

    monkeypatch.setattr(image_urls, "convert_rgb", never)
    response = client.post(CHAT, content=RAW["a strip"][0], headers={"content-type": "application/json"})
    assert "10000 x 10000 = 100,000,000, and the limit is 25,000,000" in refused(response, 400)["message"]


def test_a_long_prompt_is_not_tokenized(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("it was tokenized")

    monkeypatch.setattr(app, "prompt_ids", never)
    text = "a" * 100_001  # in two messages, of which neither is too long
    turns = [
        {"role": "user", "content": text},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": text},
    ]
    error = refused(client.post(CHAT, json=BODY | {"messages": turns}), 400)
    assert "200003 characters; this server takes up to 200000" in error["message"]


def test_pixels_of_a_whole_request(loaded: LoadedModel) -> None:  # noqa: F811
    """As padded, 300 x 300 each."""
    image = png((300, 200))
    parts = [{"type": "image_url", "image_url": {"url": image}}] * 3
    for most, status in ((269_999, 400), (270_000, 200)):
        policy = ImagePolicy(max_request_pixels=most)
        with connect(loaded, replace(SETTINGS, images=policy)) as client:
            response = client.post(CHAT, json=BODY | {"messages": [{"role": "user", "content": parts}]})
        assert response.status_code == status, response.text
        assert ("270000 pixels together" in response.text) == (status == 400)


PLACES: dict[str, tuple[list[str], str, str]] = {
    "image first": (["I", "a"], "<image>\na", "<image>\na"),
    "image last": (["a", "I"], "a\n<image>", "<image>\na"),
    "between": (["a", "I", "b"], "a\n<image>\nb", "<image>\na\nb"),
    "two between": (["a", "I", "b", "I", "c"], "a\n<image>\nb\n<image>\nc", "<image>\n<image>\na\nb\nc"),
    "only images": (["I", "I"], "<image>\n<image>", "<image>\n<image>"),
    "a place in the text": (["I", "see <image-placeholder> here"], "see <image> here", "see <image> here"),
}


@pytest.mark.parametrize("case", PLACES)
def test_the_order_of_parts(case: str, loaded: LoadedModel) -> None:  # noqa: F811
    """An image stands where the client put it, or first where the server says so."""
    parts, kept, first = PLACES[case]
    content = [
        {"type": "image_url", "image_url": "data:"} if part == "I" else {"type": "text", "text": part} for part in parts
    ]
    body = BODY | {"messages": [{"role": "user", "content": content}]}
    for images_first, wanted in ((False, kept), (True, first)):
        asked = read_request(body, Defaults(images_first=images_first))
        prompt = conversation_of(asked, "vicuna_v1", loaded.tokenizer, False).get_prompt()
        assert f"USER: {wanted} ASSISTANT:" in prompt


def test_paths_are_those_of_openai() -> None:
    assert chat_request._path(("messages", 0, "content", schema.LIST, 1, schema.TEXT, "text")) == (
        "messages[0].content[1].text"
    )


def test_a_file_is_bounded_before_it_is_read(tmp_path: Path, loaded: LoadedModel) -> None:  # noqa: F811
    (tmp_path / "large.png").write_bytes(b"\0" * 200)
    policy = ImagePolicy(max_bytes=100, folder=tmp_path)
    with connect(loaded, replace(SETTINGS, images=policy)) as client:
        response = client.post(CHAT, content=shown("file:large.png"), headers={"content-type": "application/json"})
    assert "200 bytes; this server takes up to 100" in refused(response, 400)["message"]

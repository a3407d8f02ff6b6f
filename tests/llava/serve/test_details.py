"""Details of an answer over the API: whole and streamed, in a batch with others that want none, and refused."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dynamic import kept_text
from llava.serve import details as serve_details
from llava.serve.engine import Row
from llava.serve.schema import Details
from tests.llava.serve.page_servers import IMAGE, Served, asked_by_api, two_servers
from tests.llava.serve.test_api import data_url

URL = data_url(IMAGE)


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Served, Served]]:
    with two_servers(tmp_path_factory.mktemp("details")) as found:
        yield found


WANTED = {"extra_body": {"details": True}}


def details_of(response: Any) -> dict[str, Any]:
    return response.model_extra["details"]


def test_a_sparse_model_says_what_it_kept(servers: tuple[Served, Served]) -> None:
    sparse = servers[0]
    response = asked_by_api(sparse, "Is it red?", URL, 6, **WANTED)
    details = details_of(response)
    Details.model_validate(details)
    (shown,) = details["images"]
    image = Image.open(io.BytesIO(base64.b64decode(shown.partition(",")[2])))
    tower = sparse.engine.loaded.model.get_vision_tower()
    assert image.size == (tower.config.image_size, tower.config.image_size)
    patches, instruction, answer = details["extensions"]["dynamic"]
    side = tower.num_patches_per_side
    assert (patches["kind"], patches["image"], patches["grid"]) == ("patches", 0, [side, side])
    assert len(patches["kept"]) == side * side // 2
    assert "".join(word for word, _ in instruction["words"]).split()[:3] == ["Is", "it", "red?"]
    words = "".join(word for word, _ in answer["words"])
    assert len(answer["words"]) == 5  # 6 tokens, and nothing is decided about the last one
    assert response.choices[0].message.content.startswith(words.strip())
    assert {kept for _, kept in [*instruction["words"], *answer["words"]]} == {True, False}


def test_a_routed_model_says_whom_it_used(servers: tuple[Served, Served]) -> None:
    details = details_of(asked_by_api(servers[1], "Is it red?", URL, 6, **WANTED))
    assert details["images"] == []
    (shares,) = details["extensions"]["hydralora"]
    assert shares["kind"] == "shares"
    layers = servers[1].engine.loaded.model.get_decoder().layers
    assert [label for label, _ in shares["rows"]] == [f"layer {index}" for index in range(len(layers))]
    for _, values in shares["rows"]:
        assert len(values) == len(shares["parts"]) == 3
        assert sum(values) == pytest.approx(1)


def test_a_stream_ends_with_them(servers: tuple[Served, Served]) -> None:
    whole = details_of(asked_by_api(servers[0], "Is it red?", URL, 6, **WANTED))
    chunks = list(asked_by_api(servers[0], "Is it red?", URL, 6, stream=True, **WANTED))
    said = [chunk.model_extra["details"] for chunk in chunks if "details" in chunk.model_extra]
    assert said == [whole]
    assert chunks[-1].choices[0].finish_reason == "length"
    assert "details" in chunks[-1].model_extra


def test_only_who_asks_gets_them_and_nobody_gets_another_answer(servers: tuple[Served, Served]) -> None:
    sparse = servers[0]
    questions = [f"Is {'it ' * (number % 3 + 1)}red?" for number in range(8)]
    alone = [asked_by_api(sparse, question, URL, 4 + number, **WANTED) for number, question in enumerate(questions)]
    before = len(sparse.engine.batches)

    def one(number: int) -> Any:
        wanted = WANTED if number % 2 else {}
        return asked_by_api(sparse, questions[number], URL, 4 + number, **wanted)

    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(one, range(8)))
    assert max(sparse.engine.batches[before:]) > 1, "nothing was answered together"
    for number, (response, expected) in enumerate(zip(together, alone, strict=True)):
        assert response.choices == expected.choices
        if number % 2:
            assert details_of(response) == details_of(expected)
        else:
            assert "details" not in response.model_dump()
    deadline = time.monotonic() + 60
    while sparse.engine.answering and time.monotonic() < deadline:  # the last step of the batch may be under way
        time.sleep(0.02)
    assert not sparse.engine.loaded.model.extensions._observations


@pytest.mark.parametrize("value", ["yes", 1, [True]])
def test_another_value_is_refused(servers: tuple[Served, Served], value: Any) -> None:
    import openai

    with pytest.raises(openai.BadRequestError, match="details") as refused:
        asked_by_api(servers[0], "?", None, 2, extra_body={"details": value})
    assert refused.value.body["param"] == "details"


def test_details_that_fail_end_one_row_alone(servers: tuple[Served, Served], monkeypatch: pytest.MonkeyPatch) -> None:
    import openai

    def fail(row: Row, **_: Any) -> Details:
        raise RuntimeError("broken")

    monkeypatch.setattr("llava.serve.engine._details_of", fail)
    monkeypatch.setattr(servers[0].engine, "gather_seconds", 1.0)
    with ThreadPoolExecutor(2) as pool:
        broken = pool.submit(asked_by_api, servers[0], "Is it red?", URL, 4, **WANTED)
        whole = pool.submit(asked_by_api, servers[0], "Is it red?", URL, 4)
        assert whole.result().choices[0].message.content
        with pytest.raises(openai.InternalServerError, match="the details of the answer failed"):
            broken.result()


def test_the_document_describes_them(servers: tuple[Served, Served]) -> None:
    described = servers[0].client.get("/openapi.json".replace("/openapi", "/../openapi"), cast_to=object)
    text = json.dumps(described)
    assert '"details"' in text
    assert "KeptPatches" in text


def test_a_text_model_of_the_base_says_nothing(tmp_path: Path) -> None:
    """A model without extensions has details without content."""
    from llava.eval.answering.loading import load_model
    from tests.llava.serve.page_servers import BASE, SETTINGS
    from tests.llava.serve.test_api import running

    loaded = load_model(str(BASE), device="cpu")
    with running(loaded, SETTINGS) as (client, engine):
        served = Served(loaded.name, client, engine, None)
        assert details_of(asked_by_api(served, "Is it red?", URL, 2, **WANTED)) == {"images": [], "extensions": {}}


def test_details_are_formatted_outside_the_engine(
    servers: tuple[Served, Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither words nor images are made in the thread that answers everybody."""
    threads: dict[str, set[str]] = {"png_url": set(), "words": set()}

    def noted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noting(*args: Any) -> Any:
            threads[name].add(threading.current_thread().name)
            return call(*args)

        return noting

    monkeypatch.setattr("llava.serve.details.png_url", noted("png_url", serve_details.png_url))
    monkeypatch.setattr("dynamic.kept_text.words", noted("words", kept_text.words))
    assert details_of(asked_by_api(servers[0], "Is it red?", URL, 6, **WANTED))["extensions"]["dynamic"]
    assert all(threads.values())
    assert not any("engine" in name for names in threads.values() for name in names)


def test_details_that_cannot_be_formatted_are_an_error_in_words(
    servers: tuple[Served, Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    import openai

    def fail(*_: Any) -> str:
        raise RuntimeError("broken")

    monkeypatch.setattr("llava.serve.details.png_url", fail)
    with pytest.raises(openai.InternalServerError, match="the details of the answer failed"):
        asked_by_api(servers[0], "Is it red?", URL, 4, **WANTED)
    with pytest.raises(openai.APIError, match="the details of the answer failed"):
        list(asked_by_api(servers[0], "Is it red?", URL, 4, stream=True, **WANTED))

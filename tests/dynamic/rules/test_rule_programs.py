"""Rules where users choose them: evaluation programs, the server and each of its requests, the terminal, a drawing."""

from __future__ import annotations

import base64
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from dynamic.rules import reduced
from dynamic.visualize import main as visualize
from llava.errors import FlagError
from llava.eval.answering.loading import load_model
from llava.eval.model_vqa_loader import main as model_vqa
from llava.eval.run_llava import main as run_llava
from llava.inference_options import call_extensions, given_options, option_names
from llava.serve.cli import build_parser, start_chat
from tests.dynamic.sparse_models import BASE
from tests.golden import golden_dir
from tests.llava.serve.test_api import SETTINGS, running

IMAGES = golden_dir("llava") / "data" / "images"
PLAN = ["--reduce", "divprune", "--keep", "2"]


def ask(folder: Path, *flags: str) -> list[str]:
    """The answers of an evaluation program to three questions."""
    questions = [
        {"question_id": number, "image": f"im{number % 2}.png", "text": f"What is in image {number}?"}
        for number in range(3)
    ]
    (folder / "questions.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in questions))
    model_vqa(
        ["--model-path", str(BASE), "--image-folder", str(IMAGES), "--question-file", str(folder / "questions.jsonl"),
         "--answers-file", str(folder / "answers.jsonl"), "--temperature", "0", "--max_new_tokens", "8",
         "--device", "cpu", "--conv-mode", "vicuna_v1", *flags]
    )  # fmt: skip
    return [json.loads(line)["text"] for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_an_evaluation_says_what_was_kept_and_continues_with_the_same_rule_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = ask(tmp_path)
    assert "image tokens by layer" not in capsys.readouterr().out
    with pytest.raises(FlagError, match="reduce"):
        ask(tmp_path, *PLAN)
    one, many = (ask(tmp_path, *PLAN, "--restart", "--batch-size", size) for size in ("1", "3"))
    said = capsys.readouterr().out
    assert one == many != dense
    assert "image tokens by layer, mean of 3 prompts: 2 (0-2); average 2.0 of 4" in said
    assert "cache behind a prompt, measured" in said
    with pytest.raises(FlagError, match="name one by --reduce"):
        ask(tmp_path, "--restart", "--keep", "2")


@pytest.mark.parametrize("keep", [2, 0.5, "0.5"])
def test_each_request_may_have_its_own_rule(keep: Any) -> None:
    loaded = load_model(str(BASE), device="cpu")
    url = f"data:image/png;base64,{base64.b64encode((IMAGES / 'im0.png').read_bytes()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is shown?"}]

    with running(loaded, SETTINGS, gather_seconds=0.2) as (client, engine):

        def answer(**body: Any) -> str:
            reply = client.chat.completions.create(
                model=loaded.name, messages=[{"role": "user", "content": content}], max_tokens=12, extra_body=body
            )
            return str(reply.choices[0].message.content)

        asked: list[dict[str, Any]] = [{}, {"reduce": "divprune", "keep": keep}, {"reduce": "grid", "keep": 1}]
        alone = [answer(**body) for body in asked]
        assert len(set(alone)) == 3
        with ThreadPoolExecutor(6) as pool:
            together = list(pool.map(lambda body: answer(**body), asked * 2))
        assert together == alone * 2
        assert max(engine.batches) <= 2, "requests with different rules share no batch"
        refusals = (
            ({"reduce": "none-such"}, "no rule has this name"),
            ({"keep": 3}, "name one by --reduce"),
            ({"reduce": "grid", "keep": 1.0}, "keep"),
            ({"reduce": "grid", "keep": "9" * 400}, "a number of tokens"),
        )
        for body, said in refusals:
            with pytest.raises(Exception, match=said) as refused:
                answer(**body)
            assert getattr(refused.value, "status_code", None) == 400
        # What is only known when the images are there is said, too.
        with pytest.raises(Exception, match="reaches averages from"):
            answer(reduce="fastv@2", keep="avg:1")
        assert answer() == alone[0]


def test_the_terminal_and_a_single_question(capsys: pytest.CaptureFixture[str]) -> None:
    common = [
        "--model-path",
        str(BASE),
        "--device",
        "cpu",
        "--temperature",
        "0",
        "--image-file",
        str(IMAGES / "im0.png"),
    ]
    chat = start_chat(build_parser().parse_args([*common, "--conv-mode", "vicuna_v1", *PLAN]))
    assert [item.extension.name for item in chat.loaded.model.extensions] == ["reduction"]
    question = ["--query", "What is shown?", "--conv-mode", "vicuna_v1", "--max_new_tokens", "12"]
    assert run_llava([*common, *question]) != run_llava([*common, *question, *PLAN])
    capsys.readouterr()


def test_a_rule_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    visualize(
        ["--model-path", str(BASE), "--device", "cpu", "--image-file", str(IMAGES / "im0.png"), "--query", "What?",
         "--output-dir", str(tmp_path), "--max_new_tokens", "3", "--conv-mode", "vicuna_v1", "--temperature", "0",
         *PLAN]
    )  # fmt: skip
    assert "2 of 4 patches kept" in capsys.readouterr().out
    assert (tmp_path / "kept.png").stat().st_size > 1000


def test_options_of_installed_packages() -> None:
    assert option_names() == ("reduce", "keep", "positions")
    given = given_options(type("Args", (), {"reduce": "grid", "keep": "0.5", "other": 1}))
    assert given == {"reduce": "grid", "keep": "0.5"}
    model = load_model(str(BASE), device="cpu").model
    assert call_extensions(model, {}) is None
    found = call_extensions(model, given)
    ids, images = torch.tensor([[5, -200, 7]]), torch.randn(1, 3, *[model.get_vision_tower().image_size] * 2)
    one, other = (
        model.generate(ids, images=images, extensions=each, max_new_tokens=4, min_new_tokens=4)
        for each in (found, reduced(model, "grid", 0.5))
    )
    assert torch.equal(one, other)

"""Reviews of LLaVA-Bench by a service: a local stand-in for it, interruptions, and the summary."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from llava.errors import BadSampleError, FlagError
from llava.eval import eval_gpt_review, eval_gpt_review_visual
from llava.eval import eval_gpt_review_bench as bench
from llava.eval import summarize_gpt_review as summary
from tests.llava.eval.benchmark_data import write_json, write_lines

REVIEWS = ["8 6\nThe first is better.", "9, 9\nAlike.", "7 3.5"]


class Service(BaseHTTPRequestHandler):
    """Answers the n-th request with the n-th of `replies`; None is a failure."""

    replies: list[str | None]
    requests: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(body | {"key": self.headers["Authorization"], "path": self.path})
        reply = self.replies.pop(0)
        self.send_response(429 if reply is None else 200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": reply}}]}).encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Service]]:
    Service.replies, Service.requests = list(REVIEWS), []
    with HTTPServer(("127.0.0.1", 0), Service) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        monkeypatch.setenv("OPENAI_BASE_URL", f"http://127.0.0.1:{server.server_port}/v1/")
        monkeypatch.setenv("OPENAI_API_KEY", "key")
        yield Service
        server.shutdown()
        thread.join()


@pytest.fixture
def argv(tmp_path: Path) -> list[str]:
    kinds = ("conv", "detail", "conv")
    questions = [{"question_id": n, "image": "a.jpg", "text": f"Q{n}?", "category": kinds[n]} for n in range(3)]
    write_lines(tmp_path / "questions.jsonl", questions)
    write_lines(tmp_path / "context.jsonl", [{"image": "a.jpg", "caption": ["A lake.", "A boat."]}])
    rules = {f"llava_bench_{kind}": {"role": "Assistant", "prompt": f"Judge {kind}."} for kind in kinds}
    write_json(tmp_path / "rule.json", rules)
    for name in ("first", "second"):
        rows = [{"question_id": n, "text": f"{name} {n}", "answer_id": f"{name}{n}"} for n in range(3)]
        write_lines(tmp_path / f"{name}.jsonl", rows[::-1])  # found by id, not by position
    flags = {"--question": "questions.jsonl", "--context": "context.jsonl", "--rule": "rule.json"}
    words = [word for flag, name in flags.items() for word in (flag, str(tmp_path / name))]
    words += ["--answer-list", str(tmp_path / "first.jsonl"), str(tmp_path / "second.jsonl")]
    return [*words, "--output", str(tmp_path / "reviews" / "tiny.jsonl")]


def test_reviews_and_their_summary(service: type[Service], argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    path = bench.main(argv)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert rows[0] == {
        "id": 1,
        "question_id": 0,
        "answer1_id": "first0",
        "answer2_id": "second0",
        "category": "llava_bench_conv",
        "content": REVIEWS[0],
        "tuple": [8.0, 6.0],
    }
    asked = service.requests[0]
    assert asked["messages"][1]["content"] == (
        "[Context]\nA lake.\nA boat.\n\n[Question]\nQ0?\n\n[Assistant 1]\nfirst 0\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nsecond 0\n\n[End of Assistant 2]\n\n[System]\nJudge conv.\n\n"
    )
    assert (asked["path"], asked["key"], asked["model"]) == ("/v1/chat/completions", "Bearer key", bench.MODEL)
    capsys.readouterr()
    summary.main(["-f", str(path)])
    # conv: 4.75 of 7.5; all: (6 + 9 + 3.5) / (8 + 9 + 7)
    assert capsys.readouterr().out == (
        "tiny\nall 77.1 80.0 61.7\nllava_bench_conv 63.3 75.0 47.5\nllava_bench_detail 100.0 90.0 90.0\n"
        "=================================\n"
    )
    assert summary.main(["-d", str(path.parent), "-f", "tiny.jsonl", "-i", "0", "2"])["tiny.jsonl"]["all"][0] == 100.0


def test_a_failed_request_ends_the_program_and_is_repeated(service: type[Service], argv: list[str]) -> None:
    service.replies = [REVIEWS[0], None]
    with pytest.raises(FlagError, match=r"429.*rerun the same command to resume"):
        bench.main(argv)
    service.replies = REVIEWS[1:]
    path = bench.main(argv)
    assert [json.loads(line)["question_id"] for line in path.read_text().splitlines()] == [0, 1, 2]
    assert len(service.requests) == 4


def test_what_cannot_be_reviewed(
    service: type[Service], argv: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    service.replies = ["Both are good."]
    with pytest.raises(BadSampleError, match="no pair of scores in the first line"):
        bench.main(argv)
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(FlagError, match="OPENAI_API_KEY is not set"):
        bench.main(argv)
    write_lines(tmp_path / "second.jsonl", [])
    with pytest.raises(BadSampleError, match=r"second\.jsonl: 0 answers do not fit 3 questions .*: 0, 1, 2"):
        bench.main(argv)
    write_lines(tmp_path / "bad.jsonl", [{"question_id": 0, "tuple": [-1, -1]}])
    with pytest.raises(BadSampleError, match=r"bad\.jsonl:1: the review has no pair of scores"):
        summary.main(["-f", str(tmp_path / "bad.jsonl")])
    with pytest.raises(FlagError, match="give --dir or --files"):
        summary.main([])


def without(argv: list[str], *flags: str) -> list[str]:
    """A command line without some options of one value each."""
    places = {argv.index(flag) + step for flag in flags for step in (0, 1)}
    return [word for place, word in enumerate(argv) if place not in places]


def test_reviews_of_questions_without_an_image(service: type[Service], argv: list[str], tmp_path: Path) -> None:
    """No context; a category without a rule takes the rule `default`."""
    write_json(
        tmp_path / "rule.json",
        {"default": {"role": "Assistant", "prompt": "Judge."}, "conv": {"role": "Player", "prompt": "Judge conv."}},
    )
    path = eval_gpt_review.main(without(argv, "--context"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["category"] for row in rows] == ["conv", "detail", "conv"]
    assert [row["tuple"] for row in rows] == [[8.0, 6.0], [9.0, 9.0], [7.0, 3.5]]
    asked = [request["messages"][1]["content"] for request in service.requests]
    assert asked[0] == (
        "[Question]\nQ0?\n\n[Player 1]\nfirst 0\n\n[End of Player 1]\n\n"
        "[Player 2]\nsecond 0\n\n[End of Player 2]\n\n[System]\nJudge conv.\n\n"
    )
    assert asked[1].endswith("[End of Assistant 2]\n\n[System]\nJudge.\n\n")
    assert service.requests[0]["model"] == "gpt-4"
    with pytest.raises(SystemExit):
        eval_gpt_review.main(argv)  # knows no --context


def test_reviews_with_captions_and_boxes(service: type[Service], argv: list[str], tmp_path: Path) -> None:
    box = {"category": "boat", "bbox": [0.25, 0.5, 1, 1]}
    line = {"image": "a.jpg", "captions": ["A lake.", "A boat."], "instances": [box, box | {"category": "tree"}]}
    write_lines(tmp_path / "context.jsonl", [line])
    write_json(tmp_path / "rule.json", {kind: {"role": "R", "prompt": "P"} for kind in ("conv", "detail")})
    path = eval_gpt_review_visual.main(argv)
    assert len(path.read_text().splitlines()) == 3
    assert service.requests[0]["messages"][1]["content"].startswith(
        "[Context]\nA lake.\nA boat.\n\nboat: [0.25, 0.5, 1, 1]\ntree: [0.25, 0.5, 1, 1]\n\n[Question]\nQ0?\n\n[R 1]\n"
    )
    # As in the original, only `eval_gpt_review` has a rule for categories without one.
    write_json(tmp_path / "rule.json", {"conv": {"role": "R", "prompt": "P"}, "default": {"role": "R", "prompt": "P"}})
    with pytest.raises(BadSampleError, match=r"questions\.jsonl:2: .*rule\.json has no rule 'detail'"):
        eval_gpt_review_visual.main(argv)


def test_a_context_that_does_not_fit_is_named(service: type[Service], argv: list[str], tmp_path: Path) -> None:
    rule = {"role": "R", "prompt": "P"}
    write_json(tmp_path / "rule.json", {f"{prefix}conv": rule for prefix in ("", "llava_bench_")})
    with pytest.raises(BadSampleError, match=r"context\.jsonl:1: not as expected \(KeyError\('instances'\)\)"):
        eval_gpt_review_visual.main(argv)  # the captions of LLaVA-Bench
    write_lines(tmp_path / "context.jsonl", [{"image": "b.jpg", "caption": ["A lake."]}])
    with pytest.raises(
        BadSampleError, match=r"questions\.jsonl:1: .*context\.jsonl has no line for the image 'a\.jpg'"
    ):
        bench.main(argv)
    assert not service.requests

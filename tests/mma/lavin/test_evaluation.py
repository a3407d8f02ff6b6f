"""LaVIN's evaluation programs: the original's options, answers that depend on nothing but the question, scores."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from llava.errors import BadImageError, BadSampleError, CheckpointError, FlagError
from llava.eval.answering.answers import Task
from llava.eval.answering.loading import load_model
from llava.eval.answering.processes import Processes
from llava.eval.answering.runner import stripped_text
from mma.lavin import eval as mma_eval
from mma.lavin import eval_mme
from mma.lavin.adapter_files import export_file
from mma.lavin.answering import (
    answer_settings,
    continued_text,
    find_folders,
    generation_options,
    given_options,
    load_lavin,
    make_prompt,
    output_folder,
)
from mma.lavin.data.scienceqa import read_split
from mma.lavin.scoring.scienceqa import score
from tests.golden import load_case
from tests.llava.train.launching import torchrun
from tests.mma.lavin.lavin_files import LavinFiles
from tests.mma.lavin.test_data import IMAGES
from tests.mma.lavin.test_scoring import MME, SQA, save_benchmark

FLAGS = load_case("lavin", "cli_flags")[0]
PROGRAMS = {"eval_py": mma_eval, "eval_mme_py": eval_mme}
NOT_READ = {"--tokenizer_path", "--caption_file", "--data_root"}
"""Required in the original, though one of the programs or both never read them."""


@pytest.mark.parametrize("name", PROGRAMS)
def test_options_are_those_of_the_original(name: str) -> None:
    ours = {action.option_strings[0]: action for action in PROGRAMS[name].build_parser()._actions}
    assert len(FLAGS[name]) > 20
    for flag in FLAGS[name]:
        action = ours[flag["flag"]]
        assert action.required == flag["required"] or flag["flag"] in NOT_READ
        default = str(action.default) if isinstance(action.default, Path) else action.default
        assert default == flag["default"]


def test_python_literals_are_understood() -> None:
    words = ["--ckpt_dir", "w", "--adapter_path", "a", "--data_root", "d", "--max_seq_len", "512"]
    parser, words = mma_eval.build_parser(), [*words, "--max_batch_size", "4"]
    assert not parser.parse_args(words).use_vicuna
    assert parser.parse_args([*words, "--use_vicuna"]).use_vicuna
    assert parser.parse_args([*words, "--use_vicuna", "True"]).use_vicuna
    assert not parser.parse_args([*words, "--use_vicuna", "False"]).use_vicuna
    with pytest.raises(SystemExit):
        parser.parse_args([*words, "--use_vicuna", "perhaps"])


# ScienceQA


def words_for(files: LavinFiles, checkpoint: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--ckpt_dir", str(files.weights), "--adapter_path", str(checkpoint), "--data_root", str(files.data)),
        *("--split", "train", "--max_seq_len", "512", "--max_batch_size", "4", "--device", "cpu"),
        *("--output_dir", str(output), "--max_new_tokens", "6", *more),
    ]


def answers_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "answers.jsonl").read_text().splitlines()]


def test_prompts_and_scores_of_scienceqa(
    lavin_files: LavinFiles, lavin_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "out"
    found = mma_eval.main(words_for(lavin_files, lavin_checkpoint, folder, "--random_fallback", "--seed", "7"))
    data = read_split(lavin_files.data, "train")
    rows = answers_in(folder)
    assert [row["question_id"] for row in rows] == list(data.ids)
    assert [row["prompt"] for row in rows] == [data.prompt_and_answer(n, "QCM-ALE")[0] for n in range(len(data))]
    assert json.loads((folder / "preds.json").read_text()) == found.predictions
    assert json.loads((folder / "scores.json").read_text())["scores"] == found.scores
    assert f"{found.right['acc_average']} of {len(data)}" in capsys.readouterr().out
    # The order of the questions, their number in a batch and an interruption change nothing.
    (tmp_path / "again").mkdir()
    begun = "".join(json.dumps(row) + "\n" for row in rows[:5])
    for name in ("answers.jsonl", "answers.jsonl.run.json"):
        shutil.copy(folder / name, tmp_path / "again" / name)
    (tmp_path / "again" / "answers.jsonl").write_text(begun)
    more = ("--max_batch_size", "1", "--seed", "7")
    again = mma_eval.main(words_for(lavin_files, lavin_checkpoint, tmp_path / "again", *more))
    assert again.unparsable == found.unparsable
    assert [row["text"] for row in answers_in(tmp_path / "again")] == [row["text"] for row in rows]


def test_the_prompt_of_the_model(lavin_files: LavinFiles, lavin_checkpoint: Path) -> None:
    """Six features in the original, two in this tower, behind the words; text-only questions have none."""
    loaded = load_model(str(lavin_checkpoint), str(lavin_files.weights / "7B-hf"), device="cpu")
    heads = load_case("lavin", "scienceqa_tokens")[0]["prefix_ids"]
    with_image = make_prompt("0", Task("0", SQA["first_prompt"], "", ("x.png",), "test"), loaded)
    without = make_prompt("1", Task("1", SQA["first_prompt"], "", (), "test"), loaded)
    head = heads["Image: "]["inference_bos_true"]
    assert with_image.input_ids.tolist()[: len(head) + 1] == [*head, -200]
    assert with_image.length == len(with_image.input_ids) + 1
    head = heads["Image: N/A"]["inference_bos_true"]
    assert without.input_ids.tolist()[: len(head)] == head
    assert not (without.input_ids == -200).any()


@pytest.mark.parametrize("reply", [" Yes", "Yes", "  Yes.", "\n\nYes", " A no", "no é", "", "✓ Yes"])
def test_a_reply_is_what_follows_the_prompt(reply: str, lavin_files: LavinFiles, lavin_checkpoint: Path) -> None:
    """As in the decoded whole, up to the end-of-sequence token: the blank of the first token is not lost."""
    loaded = load_model(str(lavin_checkpoint), str(lavin_files.weights / "7B-hf"), device="cpu")
    tokenizer = loaded.tokenizer
    prompt = make_prompt("0", Task("0", SQA["first_prompt"], "", ("x.png",), "test"), loaded)
    head = [token for token in prompt.input_ids.tolist() if token != -200]
    pieces = tokenizer.sp_model
    ids = pieces.encode(f"Response:{reply}")[len(pieces.encode("Response:")) :]
    assert pieces.decode(head + ids) == pieces.decode(head) + reply
    assert continued_text(prompt, [*ids, tokenizer.eos_token_id, tokenizer.pad_token_id], loaded) == reply
    if reply.startswith(" "):
        assert stripped_text(prompt, ids, loaded) != reply


def test_a_nucleus_of_nothing_keeps_the_best_token(
    lavin_files: LavinFiles, lavin_checkpoint: Path, tmp_path: Path
) -> None:
    """At any temperature and seed, the answers of greedy decoding; with a nucleus there are others."""
    runs = {
        "greedy": ("--generation_temperature", "0"),
        "none": ("--top_p", "0", "--generation_temperature", "1.5", "--seed", "3"),
        "nucleus": ("--top_p", "1", "--generation_temperature", "1.5", "--seed", "3"),
    }
    texts = {}
    for name, more in runs.items():
        mma_eval.main(words_for(lavin_files, lavin_checkpoint, tmp_path / name, "--limit", "5", *more))
        texts[name] = [row["text"] for row in answers_in(tmp_path / name)]
    assert texts["none"] == texts["greedy"] != texts["nucleus"]


@pytest.mark.parametrize("more", [(), ("--shifted_decoding",)], ids=["ours", "original"])
def test_what_the_options_make_of_the_model(
    more: tuple[str, ...], lavin_files: LavinFiles, lavin_checkpoint: Path, tmp_path: Path
) -> None:
    words = words_for(lavin_files, lavin_checkpoint, tmp_path, "--adapter_type", "repattn", *more)
    args, given = mma_eval.build_parser().parse_args(words), given_options(mma_eval.build_parser(), words)
    loaded = load_lavin(args, given, find_folders(args, given, Processes()), "cpu")
    assert loaded.model.extensions.configs["mma"]["shifted_decoding"] is bool(more)
    assert loaded.model.config.tokenizer_model_max_length == 511
    assert given["adapter_type"] == "repattn"
    assert "temperature" not in given


def test_where_answers_go(lavin_files: LavinFiles, tmp_path: Path) -> None:
    (tmp_path / "lavin-v1.5").mkdir()
    (tmp_path / "15-eph.pth").touch()
    words = words_for(lavin_files, tmp_path / "lavin-v1.5", tmp_path)
    place = words.index("--output_dir")
    args = mma_eval.build_parser().parse_args(words[:place] + words[place + 2 :])
    assert output_folder(args, "mme") == tmp_path / "lavin-v1.5" / "mme"
    args.adapter_path = str(tmp_path / "15-eph.pth")
    assert output_folder(args, "mme") == tmp_path / "15-eph" / "mme"


def test_nothing_is_written_in_the_name_of_a_missing_checkpoint(lavin_files: LavinFiles, tmp_path: Path) -> None:
    """A mistyped path, or a name on a hub, which a folder of that name would hide."""
    words = words_for(lavin_files, tmp_path / "lavin", tmp_path)
    place = words.index("--output_dir")
    with pytest.raises(FlagError, match="lavin: no such file or folder"):
        mma_eval.main(words[:place] + words[place + 2 :])
    assert not list(tmp_path.iterdir())


def test_a_file_of_the_original_answers_as_its_checkpoint(
    lavin_files: LavinFiles, lavin_checkpoint: Path, tmp_path: Path
) -> None:
    """There and back: the adapters as the original stores them, with the scripts' options beside them."""
    file = export_file(lavin_checkpoint, tmp_path / "15-eph-pretrain.pth")
    options = ("--limit", "4", "--generation_temperature", "0")
    mma_eval.main(words_for(lavin_files, lavin_checkpoint, tmp_path / "ours", *options))
    described = ("--adapter_type", "attn", "--temperature", "10.", "--visual_adapter_type", "router")
    tower = ("--vision_tower", str(lavin_files.tower))
    mma_eval.main(words_for(lavin_files, file, tmp_path / "theirs", *options, *described, *tower))
    ours, theirs = ([row["text"] for row in answers_in(tmp_path / name)] for name in ("ours", "theirs"))
    assert ours == theirs
    wrong = words_for(lavin_files, file, tmp_path / "wrong", *options, *tower, "--visual_adapter_type", "normal")
    with pytest.raises(FlagError, match="--visual_adapter_type normal, but router"):
        mma_eval.main(wrong)


def test_answers_belong_to_the_content_of_a_file(tmp_path: Path) -> None:
    """A file of the original that was written anew, or is to have another tower, has other answers."""
    file = tmp_path / "lavin.pth"

    def settings(content: float, *more: str) -> dict[str, object]:
        torch.save({"model": torch.full((3,), content)}, file)
        words = ["--ckpt_dir", "w", "--adapter_path", str(file), "--data_root", "d", "--max_seq_len", "512"]
        args = mma_eval.build_parser().parse_args([*words, "--max_batch_size", "4", "--device", "cpu", *more])
        return answer_settings(args, generation_options(args, 6), Processes())

    first = settings(1)
    assert settings(1) == first
    assert settings(2)["weights"] != first["weights"]
    for more in (["--vision_tower", "another"], ["--temperature", "5"]):
        assert settings(1, *more) != first


@pytest.mark.parametrize(
    ("more", "kind", "message"),
    [
        (["--split", "minitest"], BadSampleError, "no problems in split"),
        (["--prompt_format", "QCM"], FlagError, "--prompt_format QCM"),
        (["--use_caption"], FlagError, "--caption_file"),
        (["--temperature", "5."], FlagError, "--temperature 5.0, but 10.0"),
        (["--visual_adapter_type", "normal"], FlagError, "--visual_adapter_type normal, but router"),
        (["--hidden_proj", "128"], FlagError, "--hidden_proj 128, but 16"),
        (["--vision_tower", "another"], FlagError, "--vision_tower another: is for a .pth file"),
        (["--llm_model", "30B"], CheckpointError, "look at --llama_model_path"),
        (["--top_p", "2"], FlagError, "--top_p 2"),
        (["--limit", "0"], FlagError, "--limit 0"),
        (["--max_batch_size", "0"], FlagError, "--max_batch_size 0"),
    ],
)
def test_what_is_wrong_is_said(
    more: list[str], kind: type, message: str, lavin_files: LavinFiles, lavin_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(kind, match=message):
        mma_eval.main(words_for(lavin_files, lavin_checkpoint, tmp_path, *more))


def test_processes_share_the_questions_without_a_gap() -> None:
    for count in (1, 2, 3, 7):
        parts = [Processes(rank, count).part(range(5)) for rank in range(count)]
        assert [item for part in parts for item in part] == list(range(5))


@pytest.mark.slow
def test_two_processes_answer_what_one_answers(lavin_files: LavinFiles, lavin_checkpoint: Path, tmp_path: Path) -> None:
    alone = mma_eval.main(words_for(lavin_files, lavin_checkpoint, tmp_path / "one", "--limit", "5"))
    words = words_for(lavin_files, lavin_checkpoint, tmp_path / "two", "--limit", "5")
    (tmp_path / "two").mkdir()
    shutil.copy(tmp_path / "one" / "answers.jsonl.run.json", tmp_path / "two" / "answers.0-of-2.jsonl.run.json")
    done_before = (tmp_path / "one" / "answers.jsonl").read_text().splitlines(keepends=True)[:2]
    (tmp_path / "two" / "answers.0-of-2.jsonl").write_text("".join(done_before))  # the first has nothing left to ask
    command = [*torchrun(2), "-m", "mma.eval", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "answers.0-of-2.jsonl: 2 of 2 questions are answered" in done.stdout
    assert answers_in(tmp_path / "two") == answers_in(tmp_path / "one")
    assert json.loads((tmp_path / "two" / "preds.json").read_text()) == alone.predictions
    assert done.stdout.count("scores.json") == 1


# MME


def mme_words(files: LavinFiles, checkpoint: Path, root: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--ckpt_dir", str(files.weights), "--adapter_path", str(checkpoint), "--root_dir_", str(root)),
        *("--max_seq_len", "512", "--max_batch_size", "16", "--device", "cpu", "--output_dir", str(output), *more),
    ]


def test_mme(
    lavin_files: LavinFiles, lavin_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, folder = tmp_path / "mme", tmp_path / "out"
    save_benchmark(root)
    for path in root.rglob("*"):
        if path.suffix in (".jpg", ".png"):
            shutil.copy(IMAGES / "7.png", path)
    scores = eval_mme.main(mme_words(lavin_files, lavin_checkpoint, root, folder, "--max_new_tokens", "3"))
    rows = answers_in(folder)
    assert len(rows) == len(MME["generations"])
    prompts = {item["prompt"] for item in MME["generations"]}
    assert {row["prompt"] for row in rows} == prompts
    assert set(scores) == set(MME["per_subset"])
    assert (folder / "mme_eval.txt").read_text().count("accuracy+") == len(scores)
    assert "Cognition" in capsys.readouterr().out
    first = sorted(root.rglob("*.jpg"))[0]
    first.write_bytes(b"no image")
    with pytest.raises(BadImageError, match=first.name):
        eval_mme.main(mme_words(lavin_files, lavin_checkpoint, root, tmp_path / "broken"))


def test_scores_do_not_need_the_model_again(lavin_files: LavinFiles, lavin_checkpoint: Path, tmp_path: Path) -> None:
    """A finished file of answers is scored as it is."""
    words = words_for(lavin_files, lavin_checkpoint, tmp_path, "--limit", "3")
    mma_eval.main(words)
    rows = answers_in(tmp_path)
    data = read_split(lavin_files.data, "train")
    for number, row in enumerate(rows):
        row["text"] = f"The answer is {'ABCDE'[data.problem(number)['answer']]}."
    (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = mma_eval.main(words)
    assert found.scores["acc_average"] == "100.00"
    problems = {row["question_id"]: data.problem(number) for number, row in enumerate(rows)}
    assert found == score({row["question_id"]: row["text"] for row in rows}, problems)

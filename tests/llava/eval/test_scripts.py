"""The evaluation scripts on the tiny model: every one from questions to score, chunks that fail, a second run."""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from llava.eval.answering import question_run as program
from llava.eval.answering.loading import LoadedModel
from llava.eval.benchmarks import BENCHMARKS
from tests.command_lines import ROOT
from tests.llava.eval import benchmark_data
from tests.llava.eval.in_process import Programs, programs

SCRIPTS = {
    "vqav2": "upload to the VQAv2 server",
    "gqa": "",
    "vizwiz": "upload to the VizWiz server",
    "textvqa": "",
    "sqa": "",
    "pope": "",
    "mme": "",
    "mmbench": "upload to the MMBench server",
    "mmbench_cn": "mmbench_cn/answers_upload/mmbench_dev_cn_20231003",
    "seed": "",
    "mmvet": "score with MM-Vet's evaluator",
    "llavabench": "set OPENAI_API_KEY",
    "qbench": "",
    "qbench_zh": "",
    "chartqa": "",
    "coco_caption": "",
}
"""Each script and what it says at the end; what the programs print does not go to its output here."""

TINY = ("--device", "cpu", "--max_new_tokens", "4")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return benchmark_data.build(tmp_path_factory.mktemp("eval"))


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> Iterator[Programs]:
    monkeypatch.setattr(program, "load_model", lambda *_, **__: loaded)
    with tempfile.TemporaryDirectory() as short, programs(Path(short)) as one:
        yield one


def needs(name: str) -> None:
    if name.startswith("mmbench"):
        pytest.importorskip("openpyxl", reason="the extra `eval` is not installed")
    if name == "coco_caption":
        pytest.importorskip("pycocoevalcap", reason="the extra `eval` is not installed")


def test_every_benchmark_has_its_scripts() -> None:
    assert {path.stem for path in (ROOT / "scripts" / "v1_5" / "eval").glob("*.sh")} == set(SCRIPTS)
    assert {path.stem for path in (ROOT / "run" / "dynamic_eval").glob("eval_for_*.sh")} >= {
        f"eval_for_{name}" for name in SCRIPTS
    }
    assert {name.replace("sqa", "scienceqa") for name in SCRIPTS} == set(BENCHMARKS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_from_questions_to_score(name: str, served: Programs, data: Path, checkpoint: Path, tmp_path: Path) -> None:
    """On two GPUs' worth of chunks under the names of both projects; the second run finds all answers there."""
    needs(name)
    folder = shutil.copytree(data, tmp_path / "eval")
    paths = {"EVAL": str(folder), "MODEL": str(checkpoint), "TOKENIZER": "plain"}
    done = served.script(f"scripts/v1_5/eval/{name}.sh", *TINY, **paths)
    assert done.returncode == 0, done.stderr
    assert SCRIPTS[name] in done.stdout
    merged = next(path for path in folder.rglob("*.jsonl") if path.parent.name != "eval" and _is_merged(path))
    answers = merged.read_bytes()
    assert sum("--chunk-idx" in call for call in served.calls) == 2
    again = served.script(f"run/dynamic_eval/eval_for_{name}.sh", *TINY, **paths)
    assert again.returncode == 0, again.stderr
    assert merged.read_bytes() == answers
    assert any("llava.dynamic_eval" in word for call in served.calls for word in call) == (
        name not in ("chartqa", "coco_caption")
    )


def _is_merged(path: Path) -> bool:
    if "answers" not in path.parts[-4:]:
        return False
    return path.name == "merge.jsonl" or path.name.endswith("tiny-llava-v1.5.jsonl")


def test_a_failed_chunk_fails_the_script_and_only_the_rest_is_asked_again(
    served: Programs, data: Path, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel
) -> None:
    folder = shutil.copytree(data, tmp_path / "eval")
    paths = {"EVAL": str(folder), "MODEL": str(checkpoint), "CKPT": "named", "BATCH_SIZE": "1"}
    image = folder / "textvqa" / "train_images" / "im2.png"
    content = image.read_bytes()
    image.write_bytes(b"broken")
    done = served.script("scripts/v1_5/eval/textvqa.sh", *TINY, **paths)
    assert done.returncode == 1
    assert "chunks 1 of 2 failed; the same command again asks only what is missing" in done.stderr
    merged = folder / "textvqa" / "answers" / "named.jsonl"
    assert not merged.exists()
    assert len((merged.with_suffix("") / "2_0.jsonl").read_text().splitlines()) == 2

    image.write_bytes(content)
    generate, asked = loaded.model.generate, []
    monkeypatch.setattr(
        loaded.model, "generate", lambda inputs, **more: asked.append(len(inputs)) or generate(inputs, **more)
    )
    done = served.script("scripts/v1_5/eval/textvqa.sh", *TINY, **paths)
    assert done.returncode == 0, done.stderr
    assert asked == [1]
    assert [json.loads(line)["question_id"] for line in merged.read_text().splitlines()] == [0, 1, 2]


def test_several_machines(served: Programs, data: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Each answers its chunks; the last one to finish merges and scores, whichever that is; as one machine does."""
    one, several = (shutil.copytree(data, tmp_path / name) for name in ("one", "several"))
    common = {"MODEL": str(checkpoint), "CKPT": "named"}
    alone = served.script("scripts/v1_5/eval/textvqa.sh", *TINY, EVAL=str(one), **common)
    assert alone.returncode == 0, alone.stderr
    served.calls.clear()
    merged = several / "textvqa" / "answers" / "named.jsonl"
    slurm = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_ID": "2"}
    second = served.script("scripts/v1_5/eval/textvqa.sh", *TINY, EVAL=str(several), **common, **slurm)
    assert second.returncode == 0, second.stderr
    assert "machine 1 of 2 is done; chunks 0 1 of 4 are not" in second.stdout
    assert not merged.exists()
    assert not any("eval_textvqa" in word for call in served.calls for word in call)
    first = served.script("scripts/v1_5/eval/textvqa.sh", *TINY, EVAL=str(several), **common, NODES="2", NODE="0")
    assert first.returncode == 0, first.stderr
    assert merged.read_bytes() == (one / "textvqa" / "answers" / "named.jsonl").read_bytes()
    assert sorted(call[call.index("--chunk-idx") + 1] for call in served.calls if "--chunk-idx" in call) == list("0123")
    assert any("eval_textvqa" in word for call in served.calls for word in call)
    assert not list(one.rglob("*.done"))
    again = served.script("scripts/v1_5/eval/textvqa.sh", *TINY, EVAL=str(several), **common, **slurm)
    assert again.returncode == 0, again.stderr
    assert "is done" not in again.stdout
    wrong = served.script("scripts/v1_5/eval/textvqa.sh", *TINY, EVAL=str(several), **common, NODES="2", NODE="2")
    assert wrong.returncode == 1
    assert "NODE is 2, but NODES is 2" in wrong.stderr


@pytest.mark.slow
def test_with_processes_of_its_own(data: Path, checkpoint: Path, tmp_path: Path) -> None:
    """Nothing in between: bash, the program that answers, the scorer; without a GPU."""
    folder = shutil.copytree(data, tmp_path / "eval")
    environment = dict(os.environ) | {"EVAL": str(folder), "MODEL": str(checkpoint), "PYTHONPATH": str(ROOT)}
    environment |= {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = Programs(Path(sys.executable)).script("scripts/v1_5/eval/textvqa.sh", *TINY, **environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("tiny-llava-v1.5\nSamples: 3\nAccuracy: 0.00%")


def test_the_scripts_of_the_first_llava_answer_and_score_scienceqa(
    served: Programs, data: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Two scripts as upstream's: one answers with all GPUs, one scores."""
    folder = shutil.copytree(data / "scienceqa", tmp_path / "sqa")
    shutil.copyfile(folder / "llava_test_CQM-A.json", folder / "llava_test_QCM-LEA.json")
    paths = {"SCIENCEQA": str(folder), "ANSWERS": str(tmp_path / "mine.jsonl"), "MODEL": str(checkpoint)}
    early = served.script("scripts/sqa_eval_gather.sh", **paths)
    assert early.returncode != 0
    done = served.script("scripts/sqa_eval_batch.sh", *TINY, **paths)
    assert done.returncode == 0, done.stderr
    assert sum("--chunk-idx" in call for call in served.calls) == 2
    asked = json.loads((folder / "llava_test_QCM-LEA.json").read_text())
    assert len((tmp_path / "mine.jsonl").read_text().splitlines()) == len(asked) > 1
    done = served.script("scripts/sqa_eval_gather.sh", **paths)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "mine_result.json").read_text())
    assert result["count"] == len(asked)
    assert len(json.loads((tmp_path / "mine_output.json").read_text())) == 2

"""What a person does who has the wheel and no clone, each step from installed programs alone."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from llava.__main__ import PROGRAMS
from tests.golden import golden_dir
from tests.moe_patch import miniature
from tests.wheel.environment import Environment, WheelError

QUESTION = "What is shown in the picture?"
TINY = "--use_cpu True --tf32 False --max_steps 2 --model_max_length 512 --report_to none --dataloader_num_workers 0"
SERVER_SECONDS = 180


def lay_out_inputs(work: Path) -> None:
    """A tiny language model, tower and data set in `work`, as a person would have downloaded them."""
    golden = golden_dir("llava")
    for name in ("tiny-vicuna", "tiny-clip", "data"):
        shutil.copytree(golden / name, work / name)
    rows = json.loads((work / "data" / "finetune.json").read_text())
    images = [row["image"] for row in rows if "image" in row][:3]
    questions = [{"question_id": n, "image": image, "text": QUESTION} for n, image in enumerate(images)]
    (work / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))


def programs(environment: Environment) -> None:
    """The list of all programs, those of `scripts/` included, and the public names."""
    printed = environment.run([environment.python, "-m", "llava"])
    names = [line.split()[0] for line in printed.splitlines() if line.startswith("  ")]
    if names != [name for group in PROGRAMS.values() for name in group]:
        raise WheelError(f"python -m llava lists {names}")
    environment.run([environment.python, "-c", "from llava import Extension, load_pretrained_model"])


def scripts(environment: Environment) -> None:
    """The launch scripts, written out; a second time is refused."""
    write = [environment.python, "-m", "llava.scripts", "launch"]
    environment.run(write)
    if not (environment.work / "launch" / "scripts" / "common.bash").is_file():
        raise WheelError("python -m llava.scripts wrote nothing")
    try:
        environment.run(write)
    except WheelError as refusal:
        if "already exists" in str(refusal):
            return
        raise
    raise WheelError("python -m llava.scripts wrote over its own files")


def training(environment: Environment) -> None:
    """Both stages by the scripts: the projector, then HydraLoRA."""
    common = {"VISION_TOWER": "tiny-clip", "IMAGES": "data/images", "MODEL": "tiny-vicuna", "CUDA_VISIBLE_DEVICES": ""}
    stage_1 = {"DATA": "data/pretrain.json", "OUTPUT": "pretrained", "LAUNCHER": "python", "ZERO": ""}
    environment.run(["bash", "launch/scripts/v1_5/pretrain.sh", *TINY.split()], common | stage_1)
    stage_2 = {"DATA": "data/finetune.json", "OUTPUT": "tuned", "PROJECTOR": "pretrained/mm_projector.bin"}
    environment.run(["bash", "launch/scripts/MLLM_HydraLoRA.sh", *TINY.split()], common | stage_2)
    state = json.loads((environment.work / "tuned" / "trainer_state.json").read_text())
    record = json.loads((environment.work / "tuned" / "run.json").read_text())
    if state["global_step"] != 2 or not (environment.work / "tuned" / "extensions" / "hydralora").is_dir():
        raise WheelError(f"training: {state['global_step']} updates, no HydraLoRA in {environment.work / 'tuned'}")
    if record["commit"] is not None:
        raise WheelError(f"run.json of an installed package names a commit: {record['commit']}")


def evaluation(environment: Environment) -> None:
    """The evaluation script answers with what was trained."""
    paths = {
        "MODEL": "tiny-vicuna",
        "CHECKPOINT": "tuned",
        "QUESTIONS": "questions.jsonl",
        "IMAGES": "data/images",
        "ANSWERS": "answers.jsonl",
    }
    script = ["bash", "launch/scripts/MLLM_HydraLoRA_eval.sh", "--device", "cpu", "--max_new_tokens", "3"]
    environment.run(script, paths)
    rows = [json.loads(line) for line in (environment.work / "answers.jsonl").read_text().splitlines()]
    if [row["question_id"] for row in rows] != [0, 1, 2] or not any(row["text"] for row in rows):
        raise WheelError(f"evaluation: {rows}")


def server(environment: Environment) -> None:
    """The server answers a question about nothing, and its list of models names the checkpoint."""
    with _served(environment, "tuned", "tiny-vicuna") as url:
        models = _get(f"{url}/v1/models")
        name = models["data"][0]["id"]
        asked = {"model": name, "max_tokens": 3, "messages": [{"role": "user", "content": QUESTION}]}
        reply = _get(f"{url}/v1/chat/completions", asked)
    if reply["choices"][0]["message"]["role"] != "assistant" or reply["usage"]["completion_tokens"] < 1:
        raise WheelError(f"server: {reply}")


def moe_patch(environment: Environment) -> None:
    """Onto a small checkout of upstream's shape and off again, to the byte."""
    checkout = miniature.write(environment.work / "LLaVA")
    before = miniature.snapshot(checkout)
    program = [environment.python, "-m", "moe_patch"]
    environment.run([*program, "apply", checkout, "--extensions", "hydralora,mma"])
    applied = miniature.snapshot(checkout)
    status = environment.run([*program, "status", checkout])
    environment.run([*program, "revert", checkout])
    if applied == before or "applied" not in status or miniature.snapshot(checkout) != before:
        raise WheelError(f"moe_patch: {len(before)} files, {len(applied)} after apply; status said {status!r}")


PEFT_METHOD = """
import torch, hydralora
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("tiny-vicuna")
config = hydralora.HydraLoraConfig(r=4, lora_nums=3, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
model = get_peft_model(base, config)
ids = torch.arange(1, 9)[None]
for name, weight in model.named_parameters():
    if weight.requires_grad:
        torch.nn.init.normal_(weight, std=0.1)
loss = model(ids, labels=ids).loss
loss.backward()
assert any(weight.grad is not None for weight in model.parameters())
model.eval()
with torch.no_grad():
    expected = model(ids).logits
    model.save_pretrained("adapter")
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("tiny-vicuna"), "adapter").eval()(ids).logits
torch.testing.assert_close(again, expected)
print("trained", sum(weight.numel() for weight in model.parameters() if weight.requires_grad))
"""


def peft_method(environment: Environment) -> None:
    """HydraLoRA as a method of PEFT on a plain transformers model: a step, saved, loaded."""
    printed = environment.code(PEFT_METHOD)
    if not printed.startswith("trained ") or int(printed.split()[1]) < 1:
        raise WheelError(f"peft method: {printed}")


STEPS: tuple[Callable[[Environment], None], ...] = (
    programs,
    scripts,
    training,
    evaluation,
    server,
    moe_patch,
    peft_method,
)


@contextlib.contextmanager
def _served(environment: Environment, checkpoint: str, base: str) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [environment.python, "-m", "llava.serve.api", "--model-path", checkpoint, "--model-base", base]
    command += ["--device", "cpu", "--port", str(port)]
    log = environment.work / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            list(map(str, command)), cwd=environment.work, env=environment.variables(), stdout=file, stderr=file
        )
        try:
            url = f"http://127.0.0.1:{port}"
            deadline = time.monotonic() + SERVER_SECONDS
            while not _answers(f"{url}/health"):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise WheelError(f"the server does not start:\n{log.read_text()[-4000:]}")
                time.sleep(0.5)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=60)


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 (our own server)
    except OSError:
        return False
    return True


def _get(url: str, body: dict[str, object] | None = None) -> dict:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})  # noqa: S310 (our own server)
    with urllib.request.urlopen(request, timeout=120) as reply:  # noqa: S310
        return json.load(reply)

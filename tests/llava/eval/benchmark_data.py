"""Every benchmark in its published layout, with a few questions on the golden images."""

from __future__ import annotations

import base64
import json
import shutil
from pathlib import Path
from typing import Any

from tests.golden import golden_dir

IMAGES = golden_dir("llava") / "data" / "images"
NAMES = ("im0.png", "im1.png", "im2.png")
SHORT = "Answer the question using a single word or phrase."
YES_NO = "Please answer yes or no."


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def put_images(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        shutil.copyfile(IMAGES / name, folder / name)


def questions(text: str, category: str = "default", first: int = 0) -> list[dict[str, Any]]:
    return [
        {"question_id": first + n, "image": name, "text": text.format(n=n), "category": category}
        for n, name in enumerate(NAMES)
    ]


def build(root: Path) -> Path:
    """Write all of them below `root`, as `playground/data/eval` would hold them."""
    _open_questions(root)
    _letters(root)
    _yes_no(root)
    _charts_and_captions(root)
    return root


def _open_questions(root: Path) -> None:
    asked = questions(f"What is thing {{n}}?\n{SHORT}")
    write_lines(root / "vqav2" / "llava_vqav2_mscoco_test-dev2015.jsonl", asked)
    more = [row | {"question_id": row["question_id"] + 10} for row in asked]
    write_lines(root / "vqav2" / "llava_vqav2_mscoco_test2015.jsonl", asked + more)
    put_images(root / "vqav2" / "test2015")
    write_lines(root / "vizwiz" / "llava_test.jsonl", asked)
    put_images(root / "vizwiz" / "test")
    texts = [row | {"question_id": str(row["question_id"])} for row in asked]
    write_lines(root / "gqa" / "llava_gqa_testdev_balanced.jsonl", texts)
    kinds = ("query", "verify", "choose")
    truths = {str(n): {"answer": "x", "isBalanced": True, "types": {"structural": kinds[n]}} for n in range(3)}
    write_json(root / "gqa" / "data" / "testdev_balanced_questions.json", truths)
    put_images(root / "gqa" / "data" / "images")
    write_lines(root / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl", asked)
    annotations = [{"image_id": n, "question": f"What is thing {n}?", "answers": ["x"] * 10} for n in range(3)]
    write_json(root / "textvqa" / "TextVQA_0.5.1_val.json", {"data": annotations})
    put_images(root / "textvqa" / "train_images")
    write_lines(root / "mm-vet" / "llava-mm-vet.jsonl", questions("Describe thing {n}."))
    put_images(root / "mm-vet" / "images")
    write_lines(root / "llava-bench-in-the-wild" / "questions.jsonl", questions("Describe thing {n}.", "detail"))
    put_images(root / "llava-bench-in-the-wild" / "images")


def _letters(root: Path) -> None:
    rows, problems = [], {}
    for n, name in enumerate([*NAMES[:2], None]):
        image = {"image": f"{n}/{name}"} if name else {}
        turns = [
            {"from": "human", "value": f"Which?\nContext: N/A\nOptions: (A) {n} (B) none" + "\n<image>" * bool(name)}
        ]
        rows.append({"id": str(n), **image, "conversations": turns})
        problems[str(n)] = {"choices": ["a", "b"], "answer": 0}
        if name:
            (root / "scienceqa" / "images" / "test" / str(n)).mkdir(parents=True)
            shutil.copyfile(IMAGES / name, root / "scienceqa" / "images" / "test" / str(n) / name)
    write_json(root / "scienceqa" / "llava_test_CQM-A.json", rows)
    write_json(root / "scienceqa" / "problems.json", problems)
    write_json(root / "scienceqa" / "pid_splits.json", {"test": list(problems)})
    for folder, split in (("mmbench", "mmbench_dev_20230712"), ("mmbench_cn", "mmbench_dev_cn_20231003")):
        lines = ["index\tquestion\thint\tA\tB\tC\tD\tanswer\tcategory\timage\tsource\tl2-category\tcomment\tsplit"]
        for n, name in enumerate(NAMES):
            image = base64.b64encode((IMAGES / name).read_bytes()).decode()
            lines.append(f"{n}\tWhich is {n}?\t\t1\t2\t\t\tA\tc\t{image}\ts\tl\t\tdev")
        (root / folder).mkdir()
        (root / folder / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    seed = [
        row | {"question_id": row["question_id"], "image": f"SEED-Bench-image/{row['image']}"}
        for row in questions(
            "Which is {n}?\nA. a\nB. b\nC. c\nD. d\nAnswer with the option's letter from the given choices directly."
        )
    ]
    write_lines(root / "seed_bench" / "llava-seed-bench.jsonl", seed)
    put_images(root / "seed_bench" / "SEED-Bench-image")
    annotated = [
        {"question_id": str(n), "question_type_id": 1 + n % 2, "data_type": ("image", "video")[n % 2], "answer": "A"}
        for n in range(3)
    ]
    write_json(
        root / "seed_bench" / "SEED-Bench.json", {"question_type": {"Scene": 1, "Action": 2}, "questions": annotated}
    )
    quality = [
        {"img_path": name, "question": f"How sharp is {n}?", "candidates": ["very", "not"], "correct_ans": "not"}
        for n, name in enumerate(NAMES)
    ]
    write_json(root / "qbench" / "llvisionqa_dev.json", quality)
    put_images(root / "qbench" / "images_llvisionqa")


def _yes_no(root: Path) -> None:
    rows = [row for n, kind in enumerate(("random", "popular")) for row in questions("A {n}?", kind, 10 * n)]
    write_lines(root / "pope" / "llava_pope_test.jsonl", rows)
    for kind, labels in (("random", ("yes", "no", "yes")), ("popular", ("no", "no", "yes"))):
        write_lines(root / "pope" / "coco" / f"coco_pope_{kind}.json", [{"label": label} for label in labels])
    put_images(root / "pope" / "val2014")
    rows = []
    data = root / "MME" / "MME_Benchmark_release_version"
    for task in ("count", "code_reasoning"):
        put_images(data / task)
        for name in NAMES:
            text = "".join(f"Is it {n}? {YES_NO}\t{truth}\n" for n, truth in enumerate(("Yes", "No")))
            (data / task / name).with_suffix(".txt").write_text(text)
            image = f"{task}/{name}"
            rows += [
                {"question_id": image, "image": image, "text": f"Is it {n}? {YES_NO}\n{SHORT}", "category": task}
                for n in range(2)
            ]
    write_lines(root / "MME" / "llava_mme.jsonl", rows)


def _charts_and_captions(root: Path) -> None:
    for kind in ("human", "augmented"):
        rows = [{"imgname": name, "query": f"{kind} {n}?", "label": "10"} for n, name in enumerate(NAMES)]
        write_json(root / "chartqa" / "test" / f"test_{kind}.json", rows)
    put_images(root / "chartqa" / "test" / "png")
    words = ("cat", "dog", "cow")
    captions = [{"image_id": n, "caption": f"A {word} on a lake."} for n, word in enumerate(words)]
    images = [{"id": n, "file_name": name} for n, name in enumerate(NAMES)]
    annotation = {"images": images, "annotations": captions}
    write_json(root / "coco_caption" / "annotations" / "captions_val2014.json", annotation)
    put_images(root / "coco_caption" / "val2014")

"""`python -m llava.data.check`: every kind of problem by file and row, numbers, exit status, the page."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from llava.constants import MERGE_TYPES
from llava.data.check import build_parser, main, settings_of
from llava.data.image_names import image_names
from llava.data.inspection import RowReport, RowReports
from llava.data.kinds import Kind
from llava.data.rows import open_rows
from llava.data.statistics import distribution, summarise
from llava.errors import CheckpointError, FlagError
from llava.train.train import build_run, parse_args
from tests.golden import golden_dir
from tests.llava.model import towers
from tests.llava.train.test_training import command_line

LLAVA = golden_dir("llava")


def row(sample_id: Any, *texts: str, **more: Any) -> dict[str, Any]:
    turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]
    return {"id": sample_id, "conversations": turns} | more


LONG = "word " * 200
# The kinds that a row must be reported with, and the row.
ROWS: list[tuple[set[Kind], Any]] = [
    (set(), row("good", "Hi", "Hello")),
    (set(), row("image", "<image>\nWhat?", "A bus.", image="im0.png")),
    ({Kind.UNREADABLE_ROW}, [1, 2]),
    ({Kind.BAD_TURNS}, {"id": "no turns"}),
    ({Kind.BAD_TURNS}, {"id": "speakers", "conversations": [{"from": "human", "value": "a"}] * 2}),
    ({Kind.BAD_IMAGE_ENTRY}, row("entry", "<image>", "A.", image=3)),
    ({Kind.MISSING_IMAGE}, row("missing", "<image>", "A.", image="absent.png")),
    ({Kind.MISSING_IMAGE}, row("outside", "<image>", "A.", image="../data.json")),
    ({Kind.BROKEN_IMAGE}, row("broken", "<image>", "A.", image="broken.png")),
    ({Kind.IMAGE_COUNT}, row("count", "<image> <image> <image>", "A.", image=["im0.png", "im0.png"])),
    ({Kind.NO_TARGET}, row("empty", "Hi", "")),
    (set(), row("images", "<image>\nWhat?", "A bus.", images=["im0.png"])),
    ({Kind.BAD_IMAGE_ENTRY}, row("path", "<image>\nWhat?", "A bus.", image_path="im0.png")),
    ({Kind.BAD_IMAGE_ENTRY}, row("video", "<image>\nWhat?", "A bus.", video="im0.mp4")),
    ({Kind.BAD_IMAGE_ENTRY}, row("two keys", "<image>\nWhat?", "A bus.", image="im0.png", images=["im1.png"])),
    ({Kind.IMAGE_COUNT}, row("no image", "<image>\nWhat?", "A bus.")),
    ({Kind.IMAGE_COUNT}, row("no mark", "What?", "A bus.", image="im0.png")),
    ({Kind.IMAGE_WORD}, row("word", "Where does <image> belong in RSS?", "In <channel>.")),
    (
        {Kind.IMAGE_CUT, Kind.TRUNCATED},
        row("cut", "<image> First", "Yes.", LONG + "<image> Second", "No.", image=["im0.png", "im0.png"]),
    ),
    ({Kind.TOO_LONG}, row("long question", LONG, "A.")),
    ({Kind.TRUNCATED}, row("long answer", "Hi", LONG)),
    ({Kind.DUPLICATE_ID}, row("good", "Hi", "Hello again")),
    ({Kind.MISSING_IMAGE, Kind.BAD_TURNS}, {"id": "both", "image": "absent.png", "conversations": "none"}),
]


@pytest.fixture
def data(tmp_path: Path) -> list[Path]:
    """The rows in two files, and a folder with a good and a broken image."""
    images = tmp_path / "images"
    images.mkdir()
    Image.new("RGB", (40, 28), (200, 30, 30)).save(images / "im0.png")
    (images / "broken.png").write_bytes((images / "im0.png").read_bytes()[:60])
    rows = [value for _, value in ROWS]
    first, second = tmp_path / "data.json", tmp_path / "more.jsonl"
    first.write_text(json.dumps(rows[:6]))
    second.write_text("\n".join(map(json.dumps, rows[6:])) + '\n{"id": \n')
    return [first, second]


def check(files: list[Path], *more: Any, workers: int = 0) -> int:
    options = {
        "image_folder": files[0].parent / "images",
        "tokenizer": LLAVA / "tiny-vicuna",
        "model_max_length": 120,
        "image_length": 4,
        "num_workers": workers,
    }
    words = [word for key, value in options.items() for word in (f"--{key}", value)]
    return main([str(word) for word in (*files, *words, *more)])


@pytest.mark.parametrize("workers", [0, 2])
def test_every_problem_is_reported_with_its_row(workers: int, data: list[Path], tmp_path: Path) -> None:
    assert check(data, "--json", tmp_path / "check.json", workers=workers) == 1
    found = json.loads((tmp_path / "check.json").read_text())
    by_row: dict[tuple[str, int], set[str]] = {}
    for entry in found["list"]:
        by_row.setdefault((entry["file"], entry["row"]), set()).add(entry["kind"])
    expected = {(str(data[index >= 6]), index - 6 * (index >= 6)): kinds for index, (kinds, _) in enumerate(ROWS)}
    expected[str(data[1]), len(ROWS) - 6] = {Kind.UNREADABLE_ROW}
    assert by_row == {where: kinds for where, kinds in expected.items() if kinds}
    assert found["files"] == {str(data[0]): 6, str(data[1]): len(ROWS) - 5}
    assert found["problems"][Kind.MISSING_IMAGE] == 3
    assert sum(found["problems"].values()) == len(found["list"]) == sum(len(kinds) for kinds, _ in ROWS) + 1
    messages = {(entry["row"], entry["kind"]): entry["message"] for entry in found["list"]}
    assert messages[15, Kind.DUPLICATE_ID] == f"the id 'good' is also that of {data[0]}, row 0"


def test_what_passes_the_check_is_what_training_takes(data: list[Path], tmp_path: Path) -> None:
    """The same rows through the training data set: the check and the run must agree about each."""
    from llava.data.collator import DataCollatorForSupervisedDataset
    from llava.errors import BadSampleError
    from llava.train.train import build_run

    check(data, "--json", tmp_path / "check.json")
    stopping = {
        (entry["file"], entry["row"])
        for entry in json.loads((tmp_path / "check.json").read_text())["list"]
        if entry["kind"] not in (Kind.DUPLICATE_ID, Kind.TRUNCATED, Kind.IMAGE_WORD)
    }
    options = command_line(tmp_path / "out", image_folder=data[0].parent / "images", model_max_length=120)
    dataset = build_run(parse_args([*options, "--data_path", *map(str, data)])).dataset
    refused = set()
    for index in range(len(dataset)):
        try:
            DataCollatorForSupervisedDataset(dataset.tokenizer)([dataset[index]])
        except BadSampleError:
            path, number = dataset.rows.source(index)
            refused.add((str(path), number))
    assert refused == stopping


def test_good_data_pass_and_numbers_are_right(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    files = [LLAVA / "data" / "finetune.json"]
    options = ("--image_folder", LLAVA / "data" / "images", "--json", tmp_path / "check.json")
    assert check(files, *options) == 0
    printed = capsys.readouterr().out
    assert "No problems. Next:\npython -m llava.train.train_mem" in printed
    command = printed.splitlines()[-1].removesuffix(" OUTPUT ...").split()[3:]
    parse_args([*command, str(tmp_path), "--use_cpu", "True"])
    found = json.loads((tmp_path / "check.json").read_text())
    golden = json.loads((LLAVA / "case_dataset.json").read_text())
    cases = zip(golden["variants"], golden["out"]["variants"], strict=True)
    variant = next(out for case, out in cases if (case["data"], case["version"]) == ("data/finetune.json", "v1"))
    trained = [sum(label != -100 for label in item["labels"]) for item in variant["items"]]
    assert found["statistics"]["trained tokens per sample"]["total"] == sum(trained)
    images = sum(-200 in item["input_ids"] for item in variant["items"])
    tokens = sum(len(item["input_ids"]) for item in variant["items"])
    assert found["statistics"]["tokens per sample"]["total"] == tokens + 3 * images
    assert found["rows_with_image"] == images


def test_kinds_can_be_allowed(data: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert check(data, "--allow", *Kind) == 0
    assert check(data, "--allow", *(kind for kind in Kind if kind is not Kind.TRUNCATED)) == 1
    out = capsys.readouterr().out
    assert "missing image: and 1 more" not in out
    check(data, "--show", "2")
    out = capsys.readouterr().out
    assert "missing image: and 1 more" in out
    assert "--on_bad_sample skip" in out


def test_images_need_not_be_read(data: list[Path], tmp_path: Path) -> None:
    check(data, "--skip_images", "--json", tmp_path / "check.json")
    problems = json.loads((tmp_path / "check.json").read_text())["problems"]
    assert Kind.BROKEN_IMAGE not in problems
    assert problems[Kind.MISSING_IMAGE] == 3


def test_the_page_shows_trained_tokens_and_trusts_no_text(tmp_path: Path) -> None:
    rows = [
        row("a", "<image>\nWhat?", "A <b>red</b> bus.", image="im0.png"),
        row("<script>alert(1)</script>", "Hi", "Hello"),
        row("<script>alert(1)</script>", "Hi", LONG),
    ]
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 28)).save(tmp_path / "images" / "im0.png")
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    check([path], "--html", tmp_path / "deep" / "page.html")
    page = (tmp_path / "deep" / "page.html").read_text()
    assert "<script" not in page
    assert "http" not in page, "the page needs no network"
    assert "data:image/jpeg;base64," in page
    prompts = re.findall(r'<div class="prompt">(.*?)</div>', page, re.DOTALL)
    trained = ["".join(re.findall(r"<mark[^>]*>(.*?)</mark>", prompt, re.DOTALL)) for prompt in prompts]
    assert unescape(trained[0]) == " A <b>red</b> bus.</s>"
    assert unescape(trained[1]) == " Hello</s>"
    assert '<span class="image" title="-200">&lt;image&gt;</span>' in prompts[0]
    assert 'class="cut"' in prompts[2]
    assert 'class="cut"' not in prompts[1]
    assert list(tmp_path.joinpath("deep").iterdir()) == [tmp_path / "deep" / "page.html"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--version", "v9"], "--version v9"),
        (["--version", "tokenizer"], "has no chat template"),
        (["--image_folder", "absent"], "--image_folder absent: no such folder"),
        (["--model_max_length", "0"], "--model_max_length 0: must be at least 1"),
    ],
)
def test_wrong_options(options: list[str], message: str, data: list[Path]) -> None:
    with pytest.raises(FlagError, match=message):
        check(data, *options)
    with pytest.raises(FlagError, match=r"absent\.json"):
        check([*data, Path("absent.json")])


def test_percentiles_are_values_of_rows() -> None:
    numbers = distribution(list(range(1, 101)))
    assert numbers.percentiles == (1, 5, 25, 50, 75, 95, 99, 100)
    assert numbers.mean == 50.5
    assert distribution([]).percentiles == (0,) * 8
    assert summarise([RowReport("a", 0), RowReport("a", 1)]).rows == {"a": 2}


def test_the_options_of_a_run_have_the_same_names() -> None:
    names = {action.dest for action in build_parser()._actions}
    assert names >= {"image_folder", "model_name_or_path", "version", "model_max_length", "mm_use_im_start_end"}
    for given, expected in (([], None), (["True"], True), (["False"], False)):
        words = ["data.json", "--tokenizer", "x", *(["--mm_use_im_start_end", *given] if given else [])]
        assert build_parser().parse_args(words).mm_use_im_start_end is expected
    with pytest.raises(SystemExit):
        build_parser().parse_args(["data.json", "--tokenizer", "x", "--allow", "nonsense"])


def test_image_tokens_count_as_tokens(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text(json.dumps([row("a", "<image>\nWhat?", "A bus.", image="im0.png")]))
    (tmp_path / "images").mkdir()
    Image.new("RGB", (40, 28)).save(tmp_path / "images" / "im0.png")
    pages = []
    for value in ("False", "True"):
        check([tmp_path / "data.json"], "--html", tmp_path / "check.html", "--mm_use_im_start_end", value)
        pages.append((tmp_path / "check.html").read_text())
    for token, index in (("im_start", 896), ("im_end", 897)):
        assert [f'title="{index}">&lt;{token}&gt;</span>' in page for page in pages] == [False, True]


@pytest.mark.parametrize("merge_type", MERGE_TYPES)
def test_lengths_of_tiled_images_are_those_of_training(merge_type: str, tmp_path: Path) -> None:
    """Every row has as many positions as its spliced sequence in a training run with the same options."""
    tiles = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": merge_type}
    tiles["image_grid_pinpoints"] = "[(28, 56), (56, 28), (56, 56)]"
    words = [word for key, value in tiles.items() for word in (f"--{key}", value)]
    folder, file = LLAVA / "data" / "images", LLAVA / "data" / "finetune.json"
    options = ["--tokenizer", LLAVA / "tiny-vicuna", "--image_folder", folder, "--image_length", 4, "--tile_size", 28]
    settings = settings_of(build_parser().parse_args([str(file), *map(str, options), *words]))
    reports = [RowReports(open_rows([file]), settings)[row] for row in range(10)]
    run = build_run(parse_args(command_line(tmp_path, data_path=file, **tiles)))
    lengths = []
    for row in range(10):
        item = run.dataset[row]
        images = run.dataset._load_images(image_names(run.dataset.rows[row]), str(row))
        places = sum(run.dataset.image_length(image.pixels, image.size) for image in images)
        lengths.append(len(item["input_ids"]) - len(images) + places)
    assert [report.tokens for report in reports] == lengths
    assert len({report.tokens - report.trained for report in reports}) > 3


RECORDED = {
    "image_aspect_ratio": "anyres",
    "image_grid_pinpoints": [[336, 672]],
    "mm_patch_merge_type": "spatial_unpad",
}


@pytest.mark.parametrize(
    ("config", "flags", "expected"),
    [
        ({"mm_vision_tower": "x"} | RECORDED, [], ("anyres", [[336, 672]], "spatial_unpad", False)),
        ({"mm_vision_tower": "x", "mm_use_im_start_end": True}, [], ("square", None, "flat", True)),
        (
            {"mm_vision_tower": "x"} | RECORDED,
            ["--image_aspect_ratio", "pad"],
            ("pad", [[336, 672]], "spatial_unpad", False),
        ),
        (RECORDED, [], ("pad", None, "flat", False)),
    ],
    ids=["a LLaVA", "a LLaVA that says little", "a flag", "no LLaVA"],
)
def test_what_the_base_says_holds_unless_a_flag_is_given(
    config: dict[str, Any], flags: list[str], expected: tuple[Any, ...], tmp_path: Path
) -> None:
    for file in (LLAVA / "tiny-llava-v1.5").glob("*token*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    sizes = ["--image_length", "576", "--tile_size", "336"]
    args = build_parser().parse_args(["data.json", "--tokenizer", str(tmp_path), *sizes, *flags])
    settings = settings_of(args)
    found = (args.image_aspect_ratio, args.image_grid_pinpoints, args.mm_patch_merge_type, args.mm_use_im_start_end)
    assert found == expected
    assert settings.image_length.merge_type == expected[2] if expected[0] == "anyres" else True
    assert settings.mm_use_im_start_end is expected[3]


TOWERS = {
    "of the base": (None, [], 4),
    "clip": (lambda folder: LLAVA / "tiny-clip", [], 4),
    "clip and its class token": (
        lambda folder: LLAVA / "tiny-clip",
        ["--mm_vision_select_feature", "cls_patch"],
        5,
    ),
    "siglip": (towers.siglip, [], 4),
    "open_clip": (towers.open_clip, [], 4),
}


@pytest.mark.parametrize(("make", "flags", "expected"), TOWERS.values(), ids=TOWERS)
def test_an_image_counts_as_the_tower_makes_it(make: Any, flags: list[str], expected: int, tmp_path: Path) -> None:
    tower = [] if make is None else ["--vision_tower", str(make(tmp_path / "tower"))]
    words = ["data.json", "--model_name_or_path", str(LLAVA / "tiny-llava-v1.5"), *tower, *flags]
    args = build_parser().parse_args(words)
    settings = settings_of(args)
    assert (settings.image_length.features, args.tile_size, args.tower_is_named) == (expected, 28, True)
    settings.check_size((30, 50), name="x")


def test_rows_that_fit_are_no_alarm_and_those_that_do_not_are_seen(tmp_path: Path) -> None:
    """One more patch than fits: 576 patches for every tower would be an alarm for both, or for none."""
    file = tmp_path / "data.json"
    file.write_text(json.dumps([row("fits", "<image>\nWhat?", "A bus.", image="im0.png")]))
    base = [str(file), "--model_name_or_path", str(LLAVA / "tiny-llava-v1.5"), "--num_workers", "0"]
    base += ["--image_folder", str(LLAVA / "data" / "images")]
    assert main([*base, "--json", str(tmp_path / "out.json")]) == 0
    longest = json.loads((tmp_path / "out.json").read_text())["statistics"]["tokens per sample"]["p100"]
    assert main([*base, "--model_max_length", str(longest)]) == 0
    assert main([*base, "--model_max_length", str(longest), "--mm_vision_select_feature", "cls_patch"]) == 1


def test_a_tower_that_is_not_there_is_named(tmp_path: Path) -> None:
    words = ["data.json", "--model_name_or_path", str(LLAVA / "tiny-llava-v1.5"), "--vision_tower", "absent/tower/x"]
    with pytest.raises(CheckpointError, match=r"(?s)absent/tower/x.*or --image_length and --tile_size"):
        settings_of(build_parser().parse_args(words))


def test_without_a_tower_the_sizes_are_those_of_the_usual_one(data: list[Path], capsys: Any) -> None:
    options = ["--tokenizer", str(LLAVA / "tiny-vicuna"), "--image_folder", str(data[0].parent / "images")]
    main([str(data[0]), *options, "--num_workers", "0"])
    assert "counts as 576 positions (those of LLaVA-1.5's tower" in " ".join(capsys.readouterr().out.split())


def test_the_legend_of_the_page_has_the_colors_that_it_names(data: list[Path], tmp_path: Path) -> None:
    check(data, "--html", tmp_path / "check.html")
    page = (tmp_path / "check.html").read_text()
    styles = dict(re.findall(r"^([.\w]+) \{ ([^}]*)\}", page.replace("} .", "}\n."), re.MULTILINE))
    legend = page.partition("<h2>Sample prompts</h2>")[2].partition("</p>")[0]
    assert "<mark>green</mark>" in legend
    assert '<span class="image">blue</span>' in legend
    assert '<span class="cut">struck through</span>' in legend
    assert styles["mark"].startswith("background: #b9e6bd")
    assert styles[".image"].startswith("background: #cfe0ff")
    assert "line-through" in styles[".cut"]

"""The two halves of the mixture: questions about an image, and the same questions about a list of objects in words.

A list ("blue square black circle") is drawn by a program and stands in the prompt where an image would, before the
first question. The base of the experiment has seen the questions with images, and neither the words nor any row
without an image. Wordings and answers are those of the NLVR files.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any, NamedTuple

COLOURS = ("black", "blue", "yellow")
SHAPES = ("circle", "square", "triangle")
FEWEST, MOST = 3, 6
"""Objects in a list."""

KINDS = ("exist", "most", "count")
"""Of the tasks of NLVR; `verify` is left out: in every table it stays at the majority answer."""

MODALITIES: Mapping[str, tuple[str, ...]] = {"image": KINDS, "text": tuple(f"text {kind}" for kind in KINDS)}
"""Names of the tasks of each modality, as in the table."""

TASKS = tuple(task for tasks in MODALITIES.values() for task in tasks)


class Scene(NamedTuple):
    """A list of objects.

    Attributes:
        objects: colour and shape of each, in the order of the list.
    """

    objects: tuple[tuple[str, str], ...]

    @property
    def words(self) -> str:
        """As in a prompt."""
        return " ".join(f"{colour} {shape}" for colour, shape in self.objects)


def draw_scene(random: Random) -> Scene:
    """A random list; objects may be equal."""
    number = random.randint(FEWEST, MOST)
    return Scene(tuple((random.choice(COLOURS), random.choice(SHAPES)) for _ in range(number)))


def questions(scene: Scene) -> dict[str, dict[str, str]]:
    """Answer by kind and question; `most` is asked only if one colour has more objects than each other."""
    colours = Counter(colour for colour, _ in scene.objects)
    exist = {
        f"Is there a {colour} {shape}? Answer yes or no.": "Yes" if (colour, shape) in scene.objects else "No"
        for colour in COLOURS
        for shape in SHAPES
    }
    count = {f"How many {colour} objects are there? Answer with a number.": str(colours[colour]) for colour in COLOURS}
    (first, times), *others = colours.most_common()
    most = {"Which colour has the most objects: black, blue or yellow?": first}
    return {"exist": exist, "most": {} if others and others[0][1] == times else most, "count": count}


def held_out_scenes(count: int) -> list[Scene]:
    """The lists of the test, all different and each with a most frequent colour; the same for every seed."""
    random, scenes = Random("test/scenes"), dict[Scene, None]()
    while len(scenes) < count:
        scene = draw_scene(random)
        if questions(scene)["most"]:
            scenes[scene] = None
    return list(scenes)


def text_questions(held_out: Sequence[Scene]) -> list[dict[str, Any]]:
    """One question of each kind about each list, as lines of a question file."""
    random, lines = Random("test/questions"), []
    for number, scene in enumerate(held_out):
        for kind, task in zip(KINDS, MODALITIES["text"], strict=True):
            asked, answer = random.choice(list(questions(scene)[kind].items()))
            text = f"{scene.words}\n{asked}"
            lines.append({"question_id": f"text-{number}/{kind}", "text": text, "category": task, "label": answer})
    return lines


def text_rows(count: int, turns: Mapping[str, int], seed: int, held_out: Sequence[Scene]) -> list[dict[str, Any]]:
    """LLaVA rows without image, with the list before the first question.

    Args:
        count: number of rows.
        turns: for each kind, the most questions in a row; the order of a row's questions is random.
        seed: of lists, questions and orders.
        held_out: lists that are not asked about.
    """
    random, kept = Random(f"{seed}/text"), set(held_out)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        scene = draw_scene(random)
        if scene in kept:
            continue
        known = questions(scene)
        chosen: list[tuple[str, str]] = []
        for kind, most in turns.items():
            chosen += random.sample(list(known[kind].items()), min(most, len(known[kind])))
        random.shuffle(chosen)
        words = [
            {"from": speaker, "value": value}
            for asked, answer in chosen
            for speaker, value in (("human", asked), ("gpt", answer))
        ]
        words[0]["value"] = f"{scene.words}\n{words[0]['value']}"
        rows.append({"id": f"text-{len(rows)}", "conversations": words})
    return rows

"""Rows of the mini world's benchmarks, one function per repository, on images sampled for the question asked."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

from avg_llava.mini.glyphs import COLOURS, GROUNDS, LETTERS, SHAPES
from avg_llava.mini.questions import NUMBERS, WORDINGS, Question, all_questions, answers_of_kind, caption, choices
from avg_llava.mini.scenes import Scene, draw_scene
from avg_llava.mini.world import NOT_ASKED, encode_png

Row = dict[str, Any]
Rows = dict[tuple[str, str], list[Row]]
"""(configuration, split) -> rows."""


@dataclass(frozen=True)
class Picture:
    """A scene with a file name that is unique within its benchmark."""

    name: str
    scene: Scene

    @property
    def parquet_value(self) -> Row:
        """The value of an image column of a Parquet file."""
        return {"bytes": encode_png(self.scene.pixels()), "path": f"{self.name}.png"}


class PictureSampler:
    """Samples pictures of a benchmark; the same seed gives the same pictures."""

    def __init__(self, seed: int, benchmark: str) -> None:
        self.rng = random.Random(f"{seed}/{benchmark}")
        self._names = (f"{benchmark}-{number:03d}" for number in count(1))

    def sample(self, condition: Callable[[Scene], object]) -> Picture:
        """Draws scenes until one meets the condition."""
        while True:
            scene = draw_scene(self.rng)
            if condition(scene):
                return Picture(next(self._names), scene)

    def ask(self, question_type: str, answer: str | None = None) -> tuple[Picture, Question]:
        """A new picture and a question of this type about it (with this answer, if one is given)."""

        def matching(scene: Scene) -> list[Question]:
            found = [question for question in all_questions(scene) if question.question_type == question_type]
            return [question for question in found if answer in (None, question.answer)]

        picture = self.sample(matching)
        return picture, matching(picture.scene)[0]

    def wording(self, question: Question) -> str:
        """One of the question's wordings."""
        return self.rng.choice(question.wordings)

    def hint(self, picture: Picture, question: Question) -> str:
        """Two true statements about the picture, in the words of captions, that do not answer the question."""
        return caption(picture.scene, 2, self.rng, without=[*NOT_ASKED, question.question_type])


# ---- answered with an option's letter -----------------------------------------------------------------------------


def scienceqa(sampler: PictureSampler) -> Rows:
    """Two to five choices, with and without a hint."""
    wanted = [("writing", 2), ("shape", 3), ("shape_colour", 4), ("count", 5), ("ground", 4)]
    wanted += [("writing", 2), ("frame_small", 3), ("letter_large", 4), ("letter_small", 5), ("frame_medium", 4)]
    rows: list[Row] = []
    for question_type, num_choices in wanted:
        picture, question = sampler.ask(question_type)
        options = choices(question, num_choices, sampler.rng)
        rows.append(
            {
                "image": picture.parquet_value,
                "question": sampler.wording(question),
                "choices": options,
                "answer": options.index(question.answer),
                "hint": sampler.hint(picture, question) if len(rows) >= len(wanted) // 2 else "",
                "task": "closed choice",
                "grade": "grade2",
                "subject": "natural science",
                "topic": "mini world",
                "category": question.family,
                "skill": question.question_type,
                "lecture": "",
                "solution": f"{question.statement}.",
            }
        )
    return {("ScienceQA-IMG", "test"): rows}


def ai2d(sampler: PictureSampler) -> Rows:
    """Four options; all letters are correct equally often."""
    wanted = ["shape", "shape_colour", "ground", "count", "letter_large", "letter_small", "frame_medium", "frame_small"]
    rows: list[Row] = []
    for number, question_type in enumerate(wanted):
        picture, question = sampler.ask(question_type)
        options = [option for option in choices(question, 4, sampler.rng) if option != question.answer]
        options.insert(number % 4, question.answer)
        rows.append(
            {
                "question": sampler.wording(question),
                "options": options,
                "answer": str(number % 4),
                "image": picture.parquet_value,
            }
        )
    return {("default", "test"): rows}


CHINESE = {
    "What shape is the {key} object?": "{key}的物体是什么形状？",
    "Which shape is {key}?": "{key}的是哪种形状？",
    "What colour is the {key}?": "{key}是什么颜色？",
    "Which colour is the {key}?": "{key}是哪种颜色？",
    **dict(zip(COLOURS, ["红色", "绿色", "蓝色", "黄色", "青色", "紫色", "橙色", "白色"], strict=True)),
    **{"circle": "圆形", "square": "正方形", "triangle": "三角形", "diamond": "菱形", "ring": "圆环"},
}
ROTATION = 1_000_000
"""Added to a question's index for every step by which its options are rotated."""


def mmbench(sampler: PictureSampler) -> Rows:
    """Every question with all rotations of its options; in the Chinese split only the last two are translated."""
    wanted = [("letter_large", 4, True), ("ground", 4, False), ("frame_small", 4, False), ("count", 3, True)]
    wanted += [("shape", 4, False), ("shape_colour", 3, False)]
    english: list[Row] = []
    chinese: list[Row] = []
    for number, (question_type, num_options, has_hint) in enumerate(wanted):
        picture, question = sampler.ask(question_type)
        options = choices(question, num_options, sampler.rng)
        hint = sampler.hint(picture, question) if has_hint else "nan"
        wording = sampler.wording(question)
        pattern = wording.replace(question.key, "{key}") if question.key else wording
        for step in range(num_options):
            rotated = options[step:] + options[:step]
            row = {
                "index": 241 + number + step * ROTATION,
                "question": wording,
                "hint": hint,
                "answer": "ABCD"[rotated.index(question.answer)],
                **dict(zip("ABCD", [*rotated, "nan"], strict=False)),
                "category": question.question_type,
                "image": picture.parquet_value,
                "source": "mini world",
                "L2-category": question.family,
                "comment": "nan",
                "split": "dev",
            }
            english.append(row)
            if pattern in CHINESE:
                translated = {letter: CHINESE[option] for letter, option in zip("ABCD", rotated, strict=False)}
                row = row | translated | {"question": CHINESE[pattern].format(key=CHINESE[question.key])}
            chinese.append(row)
    return {("en", "dev"): english, ("cn", "dev"): chinese}


def mmmu(sampler: PictureSampler) -> Rows:
    """Options in words and as images, one to three images per row, and open questions answered in words and numbers."""
    rows: list[Row] = []
    lettered = {"Art": "shape_colour", "Math": "shape", "Design": "letter_large", "Physics": "frame_small"}
    lettered |= {"Basic_Medical_Science": "ground"}
    for subject, question_type in lettered.items():
        picture, question = sampler.ask(question_type)
        wording = sampler.wording(question)
        placed = f"{wording} <image 1>" if len(rows) % 2 else f"<image 1> {wording}"
        options = choices(question, 4, sampler.rng)
        rows.append(_mmmu_row(subject, 1, [picture], placed, options, "ABCD"[options.index(question.answer)]))

    for subject, answer in (("Music", "yes"), ("History", "no")):
        pictures = [sampler.ask("writing", answer)[0] for _ in range(2)]
        wording = "<image 1> <image 2> Is there small writing in the pictures?"
        rows.append(_mmmu_row(subject, 1, pictures, wording, ["yes", "no"], "AB"[answer == "no"]))
    first, question = sampler.ask("ground")
    same, _ = sampler.ask("ground", question.answer)
    other = sampler.sample(lambda scene: scene.split == "none" and scene.grounds[0] != question.answer)
    wording = "<image 1> Which picture has the same background colour?"
    options = ["<image 2>", "<image 3>"]
    rows.append(_mmmu_row("Art", 2, [first, other, same], wording, options, "B"))

    for subject, question_type in (
        ("Accounting", "count"),
        ("Economics", "shape_colour"),
        ("Computer_Science", "code"),
    ):
        picture, question = sampler.ask(question_type)
        rows.append(_mmmu_row(subject, 1, [picture], f"<image 1> {sampler.wording(question)}", [], question.answer))
    picture, question = sampler.ask("count")
    answer = str(NUMBERS.index(question.answer))
    rows.append(_mmmu_row("Math", 2, [picture], f"{sampler.wording(question)} <image 1>", [], answer))
    return {("default", "validation"): rows}


def _mmmu_row(subject: str, number: int, pictures: list[Picture], wording: str, options: list[str], answer: str) -> Row:
    return {
        "id": f"validation_{subject}_{number}",
        "question": wording,
        "options": str(options),
        "explanation": "",
        **{f"image_{number}": None for number in range(1, 8)},
        **{f"image_{number}": picture.parquet_value for number, picture in enumerate(pictures, start=1)},
        "img_type": "['Drawings']",
        "answer": answer,
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice" if options else "open",
        "subfield": "Mini world",
    }


# ---- answered in words or numbers ---------------------------------------------------------------------------------

# The VQA tasks lower-case all but the first letter of a question, so questions about letters are left out there.
PANELS = (
    {"{answer}": 10},
    {"{answer}": 5, "{title}.": 1, "the {answer}": 1, "{other}": 2, "unanswerable": 1},
    {"{answer}": 4, "{other}": 3, "unsuitable": 3},
)
"""Answers of ten annotators as format -> count: unanimous, mostly agreeing, and only four for the best answer."""


def _annotators(sampler: PictureSampler, panel: int, answer: str, other: str) -> list[str]:
    counts = PANELS[panel % len(PANELS)].items()
    answers = [
        form.format(answer=answer, title=answer.capitalize(), other=other) for form, num in counts for _ in range(num)
    ]
    return sampler.rng.sample(answers, len(answers))


def _other_answer(question: Question) -> str:
    """A wrong answer of the same kind, or the same digits in another format."""
    if question.question_type == "code":
        return question.answer.replace(" ", "")
    answers = answers_of_kind(question.answer)
    return answers[answers.index(question.answer) - 1]


def gqa(sampler: PictureSampler) -> Rows:
    """Two questions per picture, yes/no and open."""
    wanted = [("writing", "yes"), ("writing", "no"), ("ground_main", None), ("shape", None), ("shape_colour", None)]
    wanted += [("count", None), ("letter_small", None), ("frame_medium", None)]
    images: list[Row] = []
    rows: list[Row] = []
    for question_type, answer in wanted:
        picture, first = sampler.ask(question_type, answer)
        others = [q for q in all_questions(picture.scene) if q.question_type not in (*NOT_ASKED, question_type)]
        images.append({"id": picture.name, "image": picture.parquet_value})
        for question in [first, sampler.rng.choice(others)]:
            number = f"{len(rows) + 1:08d}"
            structural = "verify" if question.answer in ("yes", "no") else "query"
            rows.append(
                {
                    "id": number,
                    "imageId": picture.name,
                    "question": sampler.wording(question),
                    "answer": question.answer,
                    "fullAnswer": f"{question.statement}.",
                    "isBalanced": True,
                    "groups": {"global": question.family, "local": question.question_type},
                    "entailed": f"['{number}']",
                    "equivalent": f"['{number}']",
                    "types": {"structural": structural, "semantic": "attr", "detailed": question.question_type},
                    "annotations": {"question": [], "answer": [], "fullAnswer": []},
                    "semantic": [{"operation": structural, "argument": question.key, "dependencies": []}],
                    "semanticStr": f"{structural}: {question.key}",
                }
            )
    return {("testdev_balanced_images", "testdev"): images, ("testdev_balanced_instructions", "testdev"): rows}


def vizwiz(sampler: PictureSampler) -> Rows:
    """Ten annotators per question; some questions are about a frame that the picture does not contain."""
    wanted = {"writing": "yes/no", "count": "number", "shape": "other", "shape_colour": "other", "code": "number"}
    rows: list[Row] = []

    def add(picture: Picture, wording: str, answers: list[str], category: str) -> None:
        rows.append(
            {
                "question_id": f"VizWiz_val_{len(rows):08d}",
                "image": picture.parquet_value,
                "question": wording,
                "answers": answers,
                "category": category,
            }
        )

    for question_type, category in [*wanted.items(), ("frame_medium", "other")]:
        picture, question = sampler.ask(question_type)
        answers = _annotators(sampler, len(rows), question.answer, _other_answer(question))
        add(picture, sampler.wording(question), answers, category)
    for panel in range(len(PANELS)):
        picture, question = sampler.ask("frame_large")
        framed = [mark.colour for mark in picture.scene.marks if mark.kind == "frame"]
        missing = next(colour for colour in COLOURS if colour not in framed)
        wording = sampler.rng.choice(WORDINGS["frame"][0]).format(key=missing)
        add(picture, wording, _annotators(sampler, panel, "unanswerable", question.answer), "unanswerable")
    return {("default", "val"): rows}


def textvqa(sampler: PictureSampler) -> Rows:
    """Mostly codes to read, with ten annotators per question."""
    rows: list[Row] = []
    for question_type in ["code", "code", "code", "code", "code", "frame_small", "count", "shape", "writing"]:
        picture, question = sampler.ask(question_type)
        wording = sampler.wording(question)
        height, width = picture.scene.pixels().shape
        letters = [mark.kind for mark in picture.scene.marks if mark.kind in LETTERS]
        rows.append(
            {
                "image_id": picture.name,
                "question_id": 34602 + len(rows),
                "question": wording,
                "question_tokens": wording.lower().rstrip("?").split(),
                "image": picture.parquet_value,
                "image_width": width,
                "image_height": height,
                "flickr_original_url": "",
                "flickr_300k_url": "",
                "answers": _annotators(sampler, len(rows), question.answer, _other_answer(question)),
                "image_classes": ["Drawing"],
                "set_name": "val",
                "ocr_tokens": [*picture.scene.codes.values(), *letters],
            }
        )
    return {("default", "validation"): rows}


def chartqa(sampler: PictureSampler) -> Rows:
    """Answers as digits, percentages and words, in the human and the augmented split."""
    rows: list[Row] = []

    def add(origin: str, picture: Picture, wording: str, answer: str) -> None:
        rows.append({"type": origin, "question": wording, "answer": answer, "image": picture.parquet_value})

    for origin in ("human_test", "augmented_test"):
        for question_type in ("count", "shape_colour", "letter_large", "frame_small", "writing"):
            picture, question = sampler.ask(question_type)
            add(origin, picture, sampler.wording(question), question.answer)
        picture, question = sampler.ask("count")
        add(origin, picture, sampler.wording(question), str(NUMBERS.index(question.answer)))
        picture, question = sampler.ask("code")
        add(origin, picture, sampler.wording(question), question.answer.replace(" ", ""))
        picture = sampler.sample(lambda scene: scene.split != "none")
        length = picture.scene.columns if picture.scene.split == "columns" else picture.scene.rows
        wording = f"Which percentage of the picture has a {picture.scene.grounds[0]} background?"
        add(origin, picture, wording, f"{100 * picture.scene.share / length:g}%")
    return {("default", "test"): rows}


def docvqa(sampler: PictureSampler) -> Rows:
    """Codes with two accepted answers (with and without spaces), and questions with one."""
    wanted = [("code", "table/list")] * 5
    wanted += [("letter_small", "handwritten"), ("frame_small", "figure/diagram"), ("writing", "Yes/No")]
    wanted += [("shape_colour", "Image/Photo")]
    rows: list[Row] = []
    for question_type, document_type in wanted:
        picture, question = sampler.ask(question_type)
        answers = [question.answer]
        if question_type == "code":
            answers.append(question.answer.replace(" ", ""))
        rows.append(
            {
                "questionId": str(49153 + len(rows)),
                "question": sampler.wording(question),
                "question_types": [document_type],
                "image": picture.parquet_value,
                "docId": 14465 + len(rows),
                "ucsf_document_id": picture.name,
                "ucsf_document_page_no": str(len(rows) + 1),
                "answers": answers,
                "data_split": "val",
            }
        )
    return {("DocVQA", "validation"): rows}


def _statements(scene: Scene, category: str) -> Iterator[tuple[str, bool]]:
    """Yes/no questions of an MME category about a scene, each with whether the answer is yes."""
    shapes = {mark.kind: mark.colour for mark in scene.shapes}
    if category in ("existence", "OCR", "code_reasoning"):
        yield WORDINGS["writing"][0][category != "existence"], scene.has_writing
    if category == "existence":
        yield from ((f"Is there a {shape} in the picture?", shape in shapes) for shape in SHAPES)
    if category == "count":
        yield from ((f"Are there {NUMBERS[num]} shapes?", num == len(shapes)) for num in range(2, len(NUMBERS)))
    if category == "numerical_calculation":
        yield from ((f"Are there more than {NUMBERS[num]} shapes?", len(shapes) > num) for num in range(2, 5))
    if category == "color":
        for shape, colour in shapes.items():
            yield from ((f"Is the {shape} {other}?", other == colour) for other in COLOURS)
    if category == "scene" and scene.split == "none":
        yield from ((f"Is the background {ground}?", ground == scene.grounds[0]) for ground in GROUNDS)
    if category == "commonsense_reasoning":
        yield from ((f"Is the {colour} object round?", shape in ("circle", "ring")) for shape, colour in shapes.items())
    if category in ("OCR", "code_reasoning"):
        for sign, code in scene.codes.items():
            for digits in (code, code[::-1]):
                yield f"Is the code after the {sign} {' '.join(digits)}?", digits == code
    if category == "OCR":
        for mark in scene.marks:
            if mark.kind in LETTERS:
                yield f"Is the letter {mark.kind} {mark.colour}?", True


MME_PAIRS = {
    **{"existence": 4, "count": 1, "color": 1, "scene": 1, "OCR": 2},
    **{"commonsense_reasoning": 1, "numerical_calculation": 1, "code_reasoning": 2},
}
"""Pairs per category; each pair of existence, OCR and code reasoning has one question in the training wording."""


def _has_both_answers(scene: Scene, category: str) -> bool:
    return {truth for _, truth in _statements(scene, category)} == {True, False}


def mme(sampler: PictureSampler) -> Rows:
    """Pairs of yes/no questions about one picture, one with each answer."""
    rows: list[Row] = []
    for category, num_pairs in MME_PAIRS.items():
        for number in range(1, num_pairs + 1):
            picture = sampler.sample(partial(_has_both_answers, category=category))
            first, *others = _statements(picture.scene, category)
            second = sampler.rng.choice([other for other in others if other[1] != first[1]])
            for wording, truth in (first, second):
                rows.append(
                    {
                        "question_id": f"{category}/{number:04d}.png",
                        "image": picture.parquet_value,
                        "question": f"{wording} Please answer yes or no.",
                        "answer": "Yes" if truth else "No",
                        "category": category,
                    }
                )
    return {("default", "test"): rows}


def pope(sampler: PictureSampler) -> Rows:
    """Questions about presence in three categories, with equally many answers yes and no."""
    rows: Rows = {("Full", category): [] for category in ("adversarial", "popular", "random")}
    rows["default", "test"] = []
    for (_, category), split in list(rows.items())[:3]:
        for number in range(1, 7):
            answer = ["no", "yes"][number % 2]
            if number <= 4:
                picture, question = sampler.ask("writing", answer)
                wording = sampler.wording(question)
            else:
                picture = sampler.sample(lambda scene: 0 < len(scene.shapes) < len(SHAPES))
                drawn = [mark.kind for mark in picture.scene.shapes]
                shape = next(shape for shape in SHAPES if (shape in drawn) == (answer == "yes"))
                wording = f"Is there a {shape} in the picture?"
            split.append(
                {
                    "id": str(len(rows["default", "test"])),
                    "question_id": str(number),
                    "question": wording,
                    "answer": answer,
                    "image_source": picture.name,
                    "image": picture.parquet_value,
                    "category": category,
                }
            )
            rows["default", "test"].append(split[-1])
    return rows


ROWS: dict[str, Callable[[PictureSampler], Rows]] = {
    "GQA": gqa,
    "ScienceQA": scienceqa,
    "VizWiz-VQA": vizwiz,
    "textvqa": textvqa,
    "ChartQA": chartqa,
    "DocVQA": docvqa,
    "ai2d": ai2d,
    "MME": mme,
    "MMBench": mmbench,
    "POPE": pope,
    "MMMU": mmmu,
}
"""Repository -> function that makes its rows. MMBench holds both the English and the Chinese benchmark."""

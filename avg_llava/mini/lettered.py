"""Rows of the benchmarks that are answered with an option's letter: ScienceQA, AI2D, MMBench and MMMU."""

from __future__ import annotations

from avg_llava.mini.glyphs import COLOURS
from avg_llava.mini.questions import NUMBERS, Question, choices
from avg_llava.mini.sketchbook import Picture, Row, Rows, Sketchbook


def scienceqa(book: Sketchbook) -> Rows:
    """Two to five choices, each with a hint and without."""
    wanted = [("writing", 2), ("shape", 3), ("shape_colour", 4), ("count", 5), ("ground", 4)]
    wanted += [("writing", 2), ("frame_small", 3), ("letter_large", 4), ("letter_small", 5), ("frame_medium", 4)]
    rows: list[Row] = []
    for question_type, num_choices in wanted:
        picture, question = book.ask(question_type)
        options = choices(question, num_choices, book.rng)
        rows.append(
            {
                "image": picture.cell,
                "question": book.wording(question),
                "choices": options,
                "answer": options.index(question.answer),
                "hint": book.hint(picture, question) if len(rows) >= len(wanted) // 2 else "",
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


def ai2d(book: Sketchbook) -> Rows:
    """Four options; each letter is right as often as any other."""
    wanted = ["shape", "shape_colour", "ground", "count", "letter_large", "letter_small", "frame_medium", "frame_small"]
    rows: list[Row] = []
    for number, question_type in enumerate(wanted):
        picture, question = book.ask(question_type)
        options = [option for option in choices(question, 4, book.rng) if option != question.answer]
        options.insert(number % 4, question.answer)
        rows.append(
            {
                "question": book.wording(question),
                "options": options,
                "answer": str(number % 4),
                "image": picture.cell,
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
"""What is added to a question's index for each step that its options are turned."""


def mmbench(book: Sketchbook) -> Rows:
    """Each question with all rotations of its options, in English and (the last two in Chinese words) Chinese."""
    wanted = [("letter_large", 4, True), ("ground", 4, False), ("frame_small", 4, False), ("count", 3, True)]
    wanted += [("shape", 4, False), ("shape_colour", 3, False)]
    english: list[Row] = []
    chinese: list[Row] = []
    for number, (question_type, num_options, has_hint) in enumerate(wanted):
        picture, question = book.ask(question_type)
        options = choices(question, num_options, book.rng)
        hint = book.hint(picture, question) if has_hint else "nan"
        wording = book.wording(question)
        pattern = wording.replace(question.key, "{key}") if question.key else wording
        for turn in range(num_options):
            turned = options[turn:] + options[:turn]
            letter = "ABCD"[turned.index(question.answer)]
            index = 241 + number + turn * ROTATION
            english.append(_mmbench_row(index, picture, question, wording, hint, turned, letter))
            if pattern in CHINESE:
                translated = CHINESE[pattern].format(key=CHINESE[question.key])
                words = [CHINESE[option] for option in turned]
                chinese.append(_mmbench_row(index, picture, question, translated, hint, words, letter))
            else:
                chinese.append(english[-1])
    return {("en", "dev"): english, ("cn", "dev"): chinese}


def _mmbench_row(
    index: int, picture: Picture, question: Question, wording: str, hint: str, options: list[str], letter: str
) -> Row:
    return {
        "index": index,
        "question": wording,
        "hint": hint,
        "answer": letter,
        **dict(zip("ABCD", [*options, "nan"], strict=False)),
        "category": question.question_type,
        "image": picture.cell,
        "source": "mini world",
        "L2-category": question.family,
        "comment": "nan",
        "split": "dev",
    }


def mmmu(book: Sketchbook) -> Rows:
    """Options in words and in pictures, one to three pictures, and open questions with words and numbers."""
    rows: list[Row] = []
    lettered = {"Art": "shape_colour", "Math": "shape", "Design": "letter_large", "Physics": "frame_small"}
    lettered |= {"Basic_Medical_Science": "ground"}
    for subject, question_type in lettered.items():
        picture, question = book.ask(question_type)
        wording = book.wording(question)
        placed = f"{wording} <image 1>" if len(rows) % 2 else f"<image 1> {wording}"
        options = choices(question, 4, book.rng)
        rows.append(_mmmu_row(subject, 1, [picture], placed, options, "ABCD"[options.index(question.answer)]))

    for subject, answer in (("Music", "yes"), ("History", "no")):
        pictures = [book.ask("writing", answer)[0] for _ in range(2)]
        wording = "<image 1> <image 2> Is there small writing in the pictures?"
        rows.append(_mmmu_row(subject, 1, pictures, wording, ["yes", "no"], "AB"[answer == "no"]))
    first, question = book.ask("ground")
    same, _ = book.ask("ground", question.answer)
    other = book.draw(lambda scene: scene.split == "none" and scene.grounds[0] != question.answer)
    wording = "<image 1> Which picture has the same background colour?"
    options = ["<image 2>", "<image 3>"]
    rows.append(_mmmu_row("Art", 2, [first, other, same], wording, options, "B"))

    for subject, question_type in (
        ("Accounting", "count"),
        ("Economics", "shape_colour"),
        ("Computer_Science", "code"),
    ):
        picture, question = book.ask(question_type)
        rows.append(_mmmu_row(subject, 1, [picture], f"<image 1> {book.wording(question)}", [], question.answer))
    picture, question = book.ask("count")
    answer = str(NUMBERS.index(question.answer))
    rows.append(_mmmu_row("Math", 2, [picture], f"{book.wording(question)} <image 1>", [], answer))
    return {("default", "validation"): rows}


def _mmmu_row(subject: str, number: int, pictures: list[Picture], wording: str, options: list[str], answer: str) -> Row:
    return {
        "id": f"validation_{subject}_{number}",
        "question": wording,
        "options": str(options),
        "explanation": "",
        **{f"image_{number}": None for number in range(1, 8)},
        **{f"image_{number}": picture.cell for number, picture in enumerate(pictures, start=1)},
        "img_type": "['Drawings']",
        "answer": answer,
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice" if options else "open",
        "subfield": "Mini world",
    }

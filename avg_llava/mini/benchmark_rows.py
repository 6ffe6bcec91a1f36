"""Rows of the benchmarks that are answered in words or numbers: GQA, VizWiz, TextVQA, ChartQA, DocVQA, MME and POPE."""

from __future__ import annotations

from collections.abc import Iterator

from avg_llava.mini.glyphs import COLOURS, GROUNDS, LETTERS, SHAPES
from avg_llava.mini.questions import NUMBERS, WORDINGS, Question, all_questions
from avg_llava.mini.scenes import Scene
from avg_llava.mini.sketchbook import Picture, Row, Rows, Sketchbook
from avg_llava.mini.world import NOT_ASKED

# Tasks of VQA lower all but a question's first letter, so letters are not asked about there.
PANELS = (
    {"{answer}": 10},
    {"{answer}": 5, "{title}.": 1, "the {answer}": 1, "{other}": 2, "unanswerable": 1},
    {"{answer}": 4, "{other}": 3, "unsuitable": 3},
)
"""How ten annotators answer: of one mind, nearly so, and with four out of ten for the best answer."""


def _annotators(book: Sketchbook, panel: int, answer: str, other: str) -> list[str]:
    counts = PANELS[panel % len(PANELS)].items()
    answers = [
        form.format(answer=answer, title=answer.capitalize(), other=other) for form, num in counts for _ in range(num)
    ]
    return book.rng.sample(answers, len(answers))


def _other_answer(question: Question) -> str:
    """A wrong or differently written answer of the same kind."""
    if question.question_type == "code":
        return question.answer.replace(" ", "")
    group = next(group for group in (["yes", "no"], NUMBERS, SHAPES, list(COLOURS)) if question.answer in group)
    return group[group.index(question.answer) - 1]


def gqa(book: Sketchbook) -> Rows:
    """Two questions per picture, yes/no and open."""
    wanted = [("writing", "yes"), ("writing", "no"), ("ground_main", None), ("shape", None), ("shape_colour", None)]
    wanted += [("count", None), ("letter_small", None), ("frame_medium", None)]
    images: list[Row] = []
    rows: list[Row] = []
    for question_type, answer in wanted:
        picture, first = book.ask(question_type, answer)
        others = [q for q in all_questions(picture.scene) if q.question_type not in (*NOT_ASKED, question_type)]
        images.append({"id": picture.name, "image": picture.cell})
        for question in [first, book.rng.choice(others)]:
            rows.append(_gqa_row(f"{len(rows) + 1:08d}", picture, question, book.wording(question)))
    return {("testdev_balanced_images", "testdev"): images, ("testdev_balanced_instructions", "testdev"): rows}


def _gqa_row(number: str, picture: Picture, question: Question, wording: str) -> Row:
    structural = "verify" if question.answer in ("yes", "no") else "query"
    step = {"operation": structural, "argument": question.key, "dependencies": []}
    return {
        "id": number,
        "imageId": picture.name,
        "question": wording,
        "answer": question.answer,
        "fullAnswer": f"{question.statement}.",
        "isBalanced": True,
        "groups": {"global": question.family, "local": question.question_type},
        "entailed": f"['{number}']",
        "equivalent": f"['{number}']",
        "types": {"structural": structural, "semantic": "attr", "detailed": question.question_type},
        "annotations": {"question": [], "answer": [], "fullAnswer": []},
        "semantic": [step],
        "semanticStr": f"{structural}: {question.key}",
    }


def vizwiz(book: Sketchbook) -> Rows:
    """Ten annotators each; some questions ask for a frame that is not there."""
    wanted = {"writing": "yes/no", "count": "number", "shape": "other", "shape_colour": "other", "code": "number"}
    rows: list[Row] = []
    for question_type, category in [*wanted.items(), ("frame_medium", "other")]:
        picture, question = book.ask(question_type)
        answers = _annotators(book, len(rows), question.answer, _other_answer(question))
        rows.append(_vizwiz_row(len(rows), picture, book.wording(question), answers, category))
    for panel in range(len(PANELS)):
        picture, question = book.ask("frame_large")
        framed = [mark.colour for mark in picture.scene.marks if mark.kind == "frame"]
        missing = next(colour for colour in COLOURS if colour not in framed)
        wording = book.rng.choice(WORDINGS["frame"][0]).format(key=missing)
        answers = _annotators(book, panel, "unanswerable", question.answer)
        rows.append(_vizwiz_row(len(rows), picture, wording, answers, "unanswerable"))
    return {("default", "val"): rows}


def _vizwiz_row(number: int, picture: Picture, wording: str, answers: list[str], category: str) -> Row:
    return {
        "question_id": f"VizWiz_val_{number:08d}",
        "image": picture.cell,
        "question": wording,
        "answers": answers,
        "category": category,
    }


def textvqa(book: Sketchbook) -> Rows:
    """Mostly codes to read."""
    rows: list[Row] = []
    for question_type in ["code", "code", "code", "code", "code", "frame_small", "count", "shape", "writing"]:
        picture, question = book.ask(question_type)
        wording = book.wording(question)
        height, width = picture.scene.pixels().shape
        read = [code.digits for code in picture.scene.codes]
        read += [mark.kind for mark in picture.scene.marks if mark.kind in LETTERS]
        rows.append(
            {
                "image_id": picture.name,
                "question_id": 34602 + len(rows),
                "question": wording,
                "question_tokens": wording.lower().rstrip("?").split(),
                "image": picture.cell,
                "image_width": width,
                "image_height": height,
                "flickr_original_url": "",
                "flickr_300k_url": "",
                "answers": _annotators(book, len(rows), question.answer, _other_answer(question)),
                "image_classes": ["Drawing"],
                "set_name": "val",
                "ocr_tokens": read,
            }
        )
    return {("default", "validation"): rows}


def chartqa(book: Sketchbook) -> Rows:
    """Numbers in digits, percentages and words, from people and from a generator."""
    rows: list[Row] = []

    def add(origin: str, picture: Picture, wording: str, answer: str) -> None:
        rows.append({"type": origin, "question": wording, "answer": answer, "image": picture.cell})

    for origin in ("human_test", "augmented_test"):
        for question_type in ("count", "shape_colour", "letter_large", "frame_small", "writing"):
            picture, question = book.ask(question_type)
            add(origin, picture, book.wording(question), question.answer)
        picture, question = book.ask("count")
        add(origin, picture, book.wording(question), str(NUMBERS.index(question.answer)))
        picture, question = book.ask("code")
        add(origin, picture, book.wording(question), question.answer.replace(" ", ""))
        picture = book.draw(lambda scene: scene.split != "none")
        length = picture.scene.columns if picture.scene.split == "columns" else picture.scene.rows
        wording = f"Which percentage of the picture has a {picture.scene.grounds[0]} background?"
        add(origin, picture, wording, f"{100 * picture.scene.share / length:g}%")
    return {("default", "test"): rows}


def docvqa(book: Sketchbook) -> Rows:
    """Codes with two ways to write them, and single answers."""
    wanted = [("code", "table/list")] * 5
    wanted += [("letter_small", "handwritten"), ("frame_small", "figure/diagram"), ("writing", "Yes/No")]
    wanted += [("shape_colour", "Image/Photo")]
    rows: list[Row] = []
    for question_type, document_type in wanted:
        picture, question = book.ask(question_type)
        answers = [question.answer]
        if question_type == "code":
            answers.append(question.answer.replace(" ", ""))
        rows.append(
            {
                "questionId": str(49153 + len(rows)),
                "question": book.wording(question),
                "question_types": [document_type],
                "image": picture.cell,
                "docId": 14465 + len(rows),
                "ucsf_document_id": picture.name,
                "ucsf_document_page_no": str(len(rows) + 1),
                "answers": answers,
                "data_split": "val",
            }
        )
    return {("DocVQA", "validation"): rows}


def _claims(scene: Scene, category: str) -> Iterator[tuple[str, bool]]:
    """Questions of an MME category about a scene, each with its truth."""
    shapes = {mark.kind: mark.colour for mark in scene.marks if mark.kind in SHAPES}
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
        for code in scene.codes:
            for digits in (code.digits, code.digits[::-1]):
                yield f"Is the code after the {code.sign} {' '.join(digits)}?", digits == code.digits
    if category == "OCR":
        for mark in scene.marks:
            if mark.kind in LETTERS:
                yield f"Is the letter {mark.kind} {mark.colour}?", True


MME_PAIRS = {
    **{"existence": 4, "count": 1, "color": 1, "scene": 1, "OCR": 2},
    **{"commonsense_reasoning": 1, "numerical_calculation": 1, "code_reasoning": 2},
}
"""Pairs of questions per category; those of existence, OCR and code reasoning hold a question of the mini world."""


def _true_and_false(book: Sketchbook, category: str) -> tuple[Picture, list[tuple[str, bool]]]:
    picture = book.draw(lambda scene: {truth for _, truth in _claims(scene, category)} == {True, False})
    first, *others = _claims(picture.scene, category)
    return picture, [first, book.rng.choice([claim for claim in others if claim[1] != first[1]])]


def mme(book: Sketchbook) -> Rows:
    """Pairs of questions about one picture, one true and one false."""
    rows: list[Row] = []
    for category, num_pairs in MME_PAIRS.items():
        for number in range(1, num_pairs + 1):
            picture, pair = _true_and_false(book, category)
            for wording, truth in pair:
                rows.append(
                    {
                        "question_id": f"{category}/{number:04d}.png",
                        "image": picture.cell,
                        "question": f"{wording} Please answer yes or no.",
                        "answer": "Yes" if truth else "No",
                        "category": category,
                    }
                )
    return {("default", "test"): rows}


def _shapes(scene: Scene) -> list[str]:
    return [mark.kind for mark in scene.marks if mark.kind in SHAPES]


def pope(book: Sketchbook) -> Rows:
    """Is it there, in three categories, as often yes as no."""
    rows: Rows = {("Full", category): [] for category in ("adversarial", "popular", "random")}
    rows["default", "test"] = []
    for (_, category), split in list(rows.items())[:3]:
        for number in range(1, 7):
            answer = ["no", "yes"][number % 2]
            if number <= 4:
                picture, question = book.ask("writing", answer)
                wording = book.wording(question)
            else:
                picture = book.draw(lambda scene: 0 < len(_shapes(scene)) < len(SHAPES))
                drawn = _shapes(picture.scene)
                shape = next(shape for shape in SHAPES if (shape in drawn) == (answer == "yes"))
                wording = f"Is there a {shape} in the picture?"
            split.append(
                {
                    "id": str(len(rows["default", "test"])),
                    "question_id": str(number),
                    "question": wording,
                    "answer": answer,
                    "image_source": picture.name,
                    "image": picture.cell,
                    "category": category,
                }
            )
            rows["default", "test"].append(split[-1])
    return rows

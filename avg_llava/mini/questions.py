"""Questions and captions about a scene.

The family of a question says which granularity it needs:

scene   the whole picture: any level suffices
object  large and medium marks: coarse or middle levels suffice
fine    marks of one cell, dozens of them close together: pooling destroys the answer

Questions about letters and frames have the same wording at all sizes: only the picture shows which level is needed.
"""

from __future__ import annotations

import random
from collections.abc import Collection
from dataclasses import dataclass

from avg_llava.mini.glyphs import COLOURS, GROUNDS, LETTERS, SHAPES
from avg_llava.mini.scenes import Scene

FAMILIES = ["scene", "object", "fine"]
NUMBERS = ["zero", "one", "two", "three", "four", "five"]

# Suffixes by which instruction data and benchmarks request an answer format.
SHORT_ANSWER = (
    "\nAnswer the question using a single word or phrase.",
    "\nAnswer the question with a single word.",
    "\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n"
    "Answer the question using a single word or phrase.",
)
OPTION_LETTER = "\nAnswer with the option's letter from the given choices directly."

# question type -> (wordings of the question, statement in a caption)
WORDINGS = {
    "ground": (["What is the background colour?", "Which colour is the background?"], "background {answer}"),
    "ground_side": (
        ["What is the background colour at the {key}?", "Which colour is the background at the {key}?"],
        "{key} background {answer}",
    ),
    "ground_main": (["Which background colour covers most of the picture?"], "mostly {answer}"),
    "writing": (
        ["Is there small writing in the picture?", "Does the picture show small writing?"],
        "small writing {answer}",
    ),
    "shape": (["What shape is the {key} object?", "Which shape is {key}?"], "shape {key} {answer}"),
    "shape_colour": (["What colour is the {key}?", "Which colour is the {key}?"], "{key} {answer}"),
    "place": (["Where is the {key}?", "In which corner is the {key}?"], "{key} at {answer}"),
    "count": (["How many shapes are there?", "Count the shapes."], "shapes {answer}"),
    "letter": (
        ["What colour is the letter {key}?", "Which colour is the letter {key}?"],
        "{key} {answer}",
    ),
    "frame": (
        ["What colour is inside the {key} frame?", "Which colour is inside the {key} frame?"],
        "frame {key} {answer}",
    ),
    "code": (
        ["Which digits follow the {key}?", "What is the code after the {key}?"],
        "{key} {answer}",
    ),
}


@dataclass(frozen=True)
class Question:
    """A question about a scene and its answer.

    Attributes:
        family: One of FAMILIES.
        question_type: A key of WORDINGS; with the mark's size appended for letters and frames, e.g. "letter_small".
        key: The mark, colour or side that the question is about; empty if it is about the whole scene.
    """

    family: str
    question_type: str
    key: str
    answer: str

    @property
    def wordings(self) -> list[str]:
        """Equivalent formulations of the question."""
        return [wording.format(key=self.key) for wording in WORDINGS[self._base][0]]

    @property
    def statement(self) -> str:
        """Question and answer in a few words, as in captions."""
        return WORDINGS[self._base][1].format(key=self.key, answer=self.answer)

    @property
    def _base(self) -> str:
        if self.question_type in WORDINGS:
            return self.question_type
        return self.question_type.rsplit("_", 1)[0]


def answers_of_kind(answer: str) -> list[str]:
    """All answers of the same kind as this one, such as all shapes."""
    kinds = (["yes", "no"], NUMBERS, SHAPES, list(GROUNDS), list(COLOURS))
    return next(kind for kind in kinds if answer in kind)


def choices(question: Question, num_choices: int, rng: random.Random) -> list[str]:
    """The answer and other answers of its kind, shuffled; fewer than `num_choices` if the kind has fewer."""
    others = [answer for answer in answers_of_kind(question.answer) if answer != question.answer]
    others = rng.sample(others, min(num_choices - 1, len(others)))
    return rng.sample([question.answer, *others], len(others) + 1)


def multiple_choice(question: Question, wording: str, rng: random.Random) -> tuple[str, str]:
    """The question with up to four lettered options, and the letter of the correct one."""
    options = choices(question, 4, rng)
    lines = "".join(f"\n{letter}. {option}" for letter, option in zip("ABCD", options, strict=False))
    return f"{wording}{lines}{OPTION_LETTER}", "ABCD"[options.index(question.answer)]


def _quadrant(scene: Scene, row: int, column: int) -> str | None:
    """The quadrant that contains a large mark, or None if a centre line crosses it."""
    y, x = row + 2, column + 2
    if 2 * y == scene.rows or 2 * x == scene.columns:
        return None
    return f"{'top' if 2 * y < scene.rows else 'bottom'} {'left' if 2 * x < scene.columns else 'right'}"


def _scene_questions(scene: Scene) -> list[Question]:
    questions = [Question("scene", "writing", "", "yes" if scene.has_writing else "no")]
    if scene.split == "none":
        questions.append(Question("scene", "ground", "", scene.grounds[0]))
    else:
        sides = ["left", "right"] if scene.split == "columns" else ["top", "bottom"]
        length = scene.columns if scene.split == "columns" else scene.rows
        questions += [
            Question("scene", "ground_side", side, ground) for side, ground in zip(sides, scene.grounds, strict=True)
        ]
        questions.append(Question("scene", "ground_main", "", scene.grounds[0 if 2 * scene.share > length else 1]))
    return questions


def all_questions(scene: Scene) -> list[Question]:
    """All questions about the scene, in a fixed order."""
    questions = _scene_questions(scene)
    if scene.shapes:
        questions.append(Question("object", "count", "", NUMBERS[len(scene.shapes)]))
    for mark in scene.shapes:
        questions.append(Question("object", "shape", mark.colour, mark.kind))
        questions.append(Question("object", "shape_colour", mark.kind, mark.colour))
        quadrant = _quadrant(scene, mark.row, mark.column)
        if quadrant is not None:
            questions.append(Question("object", "place", mark.kind, quadrant))
    for mark in scene.marks:
        family = "fine" if mark.size == "small" else "object"
        if mark.kind in LETTERS:
            questions.append(Question(family, f"letter_{mark.size}", mark.kind, mark.colour))
        elif mark.kind == "frame":
            questions.append(Question(family, f"frame_{mark.size}", mark.colour, mark.inside))
    questions += [Question("fine", "code", sign, " ".join(digits)) for sign, digits in scene.codes.items()]
    return questions


def choose_questions(
    scene: Scene, num_questions: int, rng: random.Random, without: Collection[str] = ()
) -> list[Question]:
    """Samples different questions: first a family, then a question type, then a question.

    Args:
        num_questions: Number of questions; fewer are returned if the scene has fewer.
        without: Question types to exclude.
    """
    remaining = [question for question in all_questions(scene) if question.question_type not in without]
    chosen: list[Question] = []
    while remaining and len(chosen) < num_questions:
        family = rng.choice([name for name in FAMILIES if any(q.family == name for q in remaining)])
        kinds = sorted({q.question_type for q in remaining if q.family == family})
        # Twice the weight for letters and frames, whose wording does not reveal the level needed.
        kind = rng.choices(kinds, weights=[2 if name.startswith(("letter_", "frame_")) else 1 for name in kinds])[0]
        question = rng.choice([q for q in remaining if q.question_type == kind])
        remaining.remove(question)
        chosen.append(question)
    return chosen


def caption(scene: Scene, num_statements: int, rng: random.Random, without: Collection[str] = ()) -> str:
    """A caption of random statements about the scene, such as "K red, star 4 7 1, circle at top left."."""
    chosen = choose_questions(scene, num_statements, rng, without)
    return ", ".join(question.statement for question in chosen) + "."

"""Pictures drawn until one answers a question of the wanted kind: what the small benchmarks are made of."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from avg_llava.mini.questions import Question, all_questions, caption
from avg_llava.mini.scenes import Scene, draw_scene
from avg_llava.mini.world import NOT_ASKED, encode_png

Row = dict[str, Any]
Rows = dict[tuple[str, str], list[Row]]
"""(configuration, split) -> rows."""


@dataclass(frozen=True)
class Picture:
    """A drawn scene with a name of its own."""

    name: str
    scene: Scene

    @property
    def cell(self) -> Row:
        """What an image column of a Parquet file holds."""
        return {"bytes": encode_png(self.scene.pixels()), "path": f"{self.name}.png"}

    def question(self, question_type: str, answer: str | None = None) -> Question | None:
        """The first question of this type, with this answer if one is given."""
        found = (question for question in all_questions(self.scene) if question.question_type == question_type)
        return next((question for question in found if answer in (None, question.answer)), None)


class Sketchbook:
    """Endless pictures, the same for the same seed and benchmark."""

    def __init__(self, seed: int, benchmark: str) -> None:
        self.rng = random.Random(f"{seed}/{benchmark}")
        self._benchmark = benchmark
        self._num_pictures = 0

    def draw(self, wanted: Callable[[Scene], object]) -> Picture:
        """A new picture whose scene is as wanted."""
        while True:
            scene = draw_scene(self.rng)
            if wanted(scene):
                self._num_pictures += 1
                return Picture(f"{self._benchmark}-{self._num_pictures:03d}", scene)

    def ask(self, question_type: str, answer: str | None = None) -> tuple[Picture, Question]:
        """A new picture, and a question of this type (with this answer) about it."""
        picture = self.draw(lambda scene: Picture("", scene).question(question_type, answer))
        question = picture.question(question_type, answer)
        assert question is not None
        return picture, question

    def wording(self, question: Question) -> str:
        return self.rng.choice(question.wordings)

    def hint(self, picture: Picture, question: Question) -> str:
        """Two other true statements about the picture, in the words of captions."""
        return caption(picture.scene, 2, self.rng, without=[*NOT_ASKED, question.question_type])

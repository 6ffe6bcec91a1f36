"""Example questions of the mini world, from images that its models were not trained on."""

from pathlib import Path
from typing import Any

from avg_llava.mini.tokenizer import build_tokenizer
from avg_llava.mini.world import encode_png, scene_of

EXAMPLES = [
    (5, "Which digits follow the bell?"),
    (5, "What shape is the purple object?"),
    (7, "What colour is the letter L?"),
    (7, "Which background colour covers most of the picture?"),
    (16, "Which digits follow the heart?"),
    (16, "What colour is inside the yellow frame?"),
]
"""Images of the evaluation split, and a question about each."""


def knows_the_mini_world(tokenizer: Any) -> bool:
    """Whether a model reads with the mini world's tokenizer, and so was trained there."""
    return bool(tokenizer.get_vocab() == build_tokenizer().get_vocab())


def draw_examples(folder: Path) -> list[tuple[str, str]]:
    """Draws the images into a folder; (path of the image, question) for each example."""
    examples = []
    for index, question in EXAMPLES:
        path = folder / f"eval-{index:05d}.png"
        scene, _ = scene_of(0, "eval", index)
        path.write_bytes(encode_png(scene.pixels()))
        examples.append((str(path), question))
    return examples


__all__ = ["EXAMPLES", "draw_examples", "knows_the_mini_world"]

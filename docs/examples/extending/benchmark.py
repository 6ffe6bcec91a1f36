"""A benchmark in one file: the colour of a square, in three questions.

In the package, `avg_llava/evaluation/benchmarks/colours.py` would define the `Benchmark` and the table in that folder's
`__init__.py` would hold the entry. `avg-llava evaluate --benchmark colours --model DIR` then answers it.
"""

from PIL import Image

from avg_llava.evaluation.benchmarks import BENCHMARKS, Benchmark, LocalTask

QUESTIONS = [
    {"rgb": [220, 20, 20], "answer": "red"},
    {"rgb": [20, 160, 20], "answer": "green"},
    {"rgb": [20, 20, 220], "answer": "blue"},
]


def read(data):
    """Questions in a file: `return read_rows(data / "colours" / "questions.json")`, where `data` is `--data`."""
    return QUESTIONS


def prompt(doc):
    """The question, and the form of its answer."""
    return "What colour is the square?\nAnswer the question using a single word or phrase."


def images(doc):
    """Pillow images, or paths of image files."""
    return [Image.new("RGB", (64, 64), tuple(doc["rgb"]))]


def score(doc, answer):
    """1 if the answer is the colour's name, whatever its case."""
    return {"exact_match": float(answer.strip(" .").lower() == doc["answer"])}


BENCHMARKS["colours"] = Benchmark(
    title="Colours",
    num_questions=len(QUESTIONS),
    source=LocalTask(read, prompt, images, reference=lambda doc: doc["answer"], score=score),
)

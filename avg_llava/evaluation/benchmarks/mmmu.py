"""Where the harness of the paper's numbers (LMMS-AVG, lmms-eval 0.1.2) differed from today's lmms-eval.

Each entry of `PAPER_TASKS` replaces fields of today's task. Prompts and metrics that are not named here are the same in
both. The differences were collected from the public code of both.
"""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lmms_eval.tasks.mme.utils import eval_type_dict
from PIL import Image

Doc = Mapping[str, Any]

MMMU_LETTER = "Answer with the option letter from the given choices directly."
MMMU_SHORT = "Answer the question using a single word or phrase."


def score_scienceqa(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    """The letter alone, or in front of a full stop; today's harness also takes small letters."""
    answer, wanted = results[0].strip(), "ABCDE"[doc["answer"]]
    return {"exact_match": float(answer == wanted or answer.startswith(f"{wanted}."))}


def score_mme(doc: Doc, results: Sequence[str]) -> dict[str, Any]:
    """Yes or no by the first four characters; today's harness also takes a lone y or n."""
    answer = results[0].lower().strip().replace(".", "")
    said = answer if answer in ("yes", "no") else next((word for word in ("yes", "no") if word in answer[:4]), "other")
    perceived = doc["category"] in eval_type_dict["Perception"]
    record = {
        "question_id": doc["question_id"],
        "category": doc["category"],
        "score": float(said == doc["answer"].lower().strip().replace(".", "")),
    }
    return {"mme_perception_score" if perceived else "mme_cognition_score": record}


def mmmu_prompt(doc: Doc, settings: Mapping[str, Any] | None = None) -> str:
    """The question with images in their places; today's harness leaves `<image 1>` as text and the images in front."""
    lines = [doc["question"]]
    if doc["question_type"] == "multiple-choice":
        options = ast.literal_eval(doc["options"])
        lines += [f"{letter}. {option}" for letter, option in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", options, strict=False)]
        lines.append(MMMU_LETTER)
    else:
        lines.append(MMMU_SHORT)
    return re.sub(r"<image \d+>", "<image>", "\n".join(lines))


def mmmu_images(doc: Doc) -> list[Image.Image]:
    """An image for every place that the prompt has for one, in order."""
    places = re.findall(r"<image (\d+)>", f"{doc['question']}\n{doc['options']}")
    return [doc[f"image_{number}"] for number in places]


PAPER_TASKS: dict[str, dict[str, Any]] = {
    "scienceqa": {"process_results": score_scienceqa},
    "ai2d": {"filter_list": None},  # today's harness takes the letter of "A. text" as the answer
    "mme": {"process_results": score_mme},
    "mmmu": {
        "doc_to_text": mmmu_prompt,
        "doc_to_visual": mmmu_images,
        "generation_kwargs": {"max_new_tokens": 16},
    },
}

__all__ = ["PAPER_TASKS"]

"""How much sooner an answer comes: against the same model at its finest level, and against transformers' LLaVA-NeXT."""

import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from avg_llava.evaluation.answering import RANDOM, Setting
from avg_llava.evaluation.llava_next import as_llava_next, expand_placeholders
from avg_llava.evaluation.questions import Questions
from avg_llava.evaluation.results import Speed
from avg_llava.inference.answers import Decoding, Request
from avg_llava.inference.budget import Budget
from avg_llava.inference.predictor import Predictor
from avg_llava.model.images import DataError


def measure_speed(predictor: Predictor, questions: Questions, indices: Sequence[int], setting: Setting) -> Speed | None:
    """Times the same questions in three ways, one question at a time and in turn, after one run to warm up.

    Answers have the same length each way up to the answers' own differences: from the image's pixels to the last token.

    Returns:
        Medians over questions, or None where no question has an image or levels are drawn at random.
    """
    if setting.granularity == RANDOM:
        return None
    requests = []
    for index in indices:
        try:
            requests.append(questions.request(index))
        except DataError:  # told where the questions were answered
            continue
    requests = [request for request in requests if request.images]
    if not requests:
        return None
    finest, decoding = Budget(predictor.granularities[-1]), Decoding(questions.max_new_tokens, stop=questions.stop)
    forced = setting.granularity
    budget = Budget(forced) if isinstance(forced, int) else Budget(token_cost=setting.token_cost)
    ways: dict[str, Callable[[Request], object]] = {
        "routed": lambda request: predictor.predict([request], budget, decoding),
        "finest": lambda request: predictor.predict([request], finest, decoding),
        "llava_next": _llava_next(predictor, questions.max_new_tokens),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number, request in enumerate([requests[0], *requests]):
        for name, answer in ways.items():
            began = time.perf_counter()
            answer(request)
            if predictor.model.device.type == "cuda":
                torch.cuda.synchronize()
            if number:
                seconds[name].append(time.perf_counter() - began)
    routed, by_finest, by_llava_next = (median(seconds[name]) for name in ("routed", "finest", "llava_next"))
    return Speed(len(requests), routed, by_finest, by_llava_next, by_finest / routed, by_llava_next / routed)


def _llava_next(predictor: Predictor, max_new_tokens: int) -> Callable[[Request], object]:
    """Answers with transformers' own model and generation, on the same weights and pixels."""
    model, processor = predictor.model, predictor.processor
    baseline = as_llava_next(model)

    @torch.inference_mode()
    def answer(request: Request) -> object:
        inputs = predictor.inputs([request])
        ids = expand_placeholders(inputs["input_ids"][0], inputs["image_sizes"], model)[None].to(model.device)
        return baseline.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=inputs["pixel_values"].to(model.device, model.dtype),
            image_sizes=inputs["image_sizes"].to(model.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=processor.tokenizer.pad_token_id,
        )

    return answer


__all__ = ["measure_speed"]

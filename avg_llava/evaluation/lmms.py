"""AVG-LLaVA as a model of lmms-eval, registered through the package's entry point.

lmms-eval --model avg_llava --model_args pretrained=DIR,granularity=auto,token_cost=0.1 --tasks mme --batch_size 8

Runs in one process or, under torchrun or accelerate, in several that answer a share each.
"""

import os
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.models.registry_v2 import ModelManifest
from PIL import Image
from tqdm import tqdm

from avg_llava.evaluation.tasks import generation_limits
from avg_llava.inference.answers import Decoding, Request
from avg_llava.inference.budget import Budget
from avg_llava.inference.pipeline import Pipeline
from avg_llava.model.chat_templates import RefusedPromptError
from avg_llava.model.images import DataError
from avg_llava.model.modeling import PromptTooLongError

MAX_NAMED_FAILURES = 20


def manifests() -> list[ModelManifest]:
    """Returns the models that this package adds to lmms-eval; called through the entry point."""
    return [ModelManifest(model_id="avg_llava", simple_class_path=f"{__name__}.AvgLlava")]


class FailedSamplesError(RuntimeError):
    """Some questions have no answer. No score is computed, since an empty answer would count as the model's."""


class AvgLlava(lmms):
    """Answers the requests of lmms-eval.

    Args:
        pretrained: Checkpoint folder or hub id.
        granularity: "auto" (the router), or visual tokens per crop.
        token_cost: The router's price in nats per doubling of visual tokens.
        device: `cpu` or `cuda`; None uses the process's GPU, or the CPU if there is none.
        max_batch_size: Ignored; lmms-eval always passes it.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        granularity: str | int = "auto",
        token_cost: float = 0.0,
        dtype: str = "float32",
        batch_size: int | str = 1,
        device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self._rank, self._world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        local = int(os.environ.get("LOCAL_RANK", 0))
        on_gpu = torch.cuda.is_available() and (device or "cuda").startswith("cuda")
        self.device = torch.device(f"cuda:{local}" if on_gpu else "cpu")
        self.batch_size = int(batch_size)
        self.predictor = Pipeline.load(pretrained, dtype=dtype, device=self.device).predictor
        forced = None if granularity == "auto" else int(granularity)
        self.budget = Budget(forced, float(token_cost))
        if forced is not None and forced not in self.predictor.granularities:
            raise ValueError(
                f"granularity {granularity} is neither auto nor one of this model's levels "
                f"{self.predictor.granularities}"
            )

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answers greedily, in the order of the requests.

        Raises:
            FailedSamplesError: Images cannot be read, or prompts are too long or refused; all other requests are
                answered first.
        """
        answers: dict[int, str] = {}
        failures: list[str] = []
        progress = tqdm(total=len(requests), desc="answering", unit="question", disable=self.rank != 0)
        for batch in self._batches(requests):
            readable: dict[int, Request] = {}
            for index in batch:
                try:
                    readable[index] = self._request(requests[index])
                except (OSError, DataError, Image.DecompressionBombError) as error:
                    failures.append(f"{_name(requests[index])}: {error}")
            options = requests[batch[0]].args[1]
            try:
                answers |= self._answer(readable, options)
            except (PromptTooLongError, RefusedPromptError):
                for index, request in readable.items():
                    try:
                        answers |= self._answer({index: request}, options)
                    except (PromptTooLongError, RefusedPromptError) as error:
                        failures.append(f"{_name(requests[index])}: {error}")
            progress.update(len(batch))
        progress.close()
        if failures:
            raise FailedSamplesError(
                f"{len(failures)} of {len(requests)} questions failed: {'; '.join(failures[:MAX_NAMED_FAILURES])}"
                f"{' and others' if len(failures) > MAX_NAMED_FAILURES else ''}"
            )
        return [answers[index] for index in range(len(requests))]

    def _answer(self, requests: dict[int, Request], options: dict[str, Any]) -> dict[int, str]:
        if not requests:
            return {}
        max_new_tokens, stop = generation_limits(options)
        answers = self.predictor.predict(list(requests.values()), self.budget, Decoding(max_new_tokens, stop=stop))
        return {index: answer.text for index, answer in zip(requests, answers, strict=True)}

    def _batches(self, requests: Sequence[Instance]) -> Iterator[list[int]]:
        """Yields the indices of requests that are answered together: neighbours with equal options."""
        for _, group in groupby(range(len(requests)), key=lambda index: requests[index].args[1]):
            indices = list(group)
            for start in range(0, len(indices), self.batch_size):
                yield indices[start : start + self.batch_size]

    def _request(self, request: Instance) -> Request:
        prompt, _, doc_to_visual, doc_id, task, split = request.args
        images = doc_to_visual(self.task_dict[task][split][doc_id]) or []
        return Request(prompt, tuple(images))

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Not supported."""
        raise NotImplementedError("avg_llava answers tasks of the kind generate_until")

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise NotImplementedError("avg_llava answers tasks of the kind generate_until")


def _name(request: Instance) -> str:
    _, _, _, doc_id, task, split = request.args
    return f"{task} question {doc_id} ({split})"

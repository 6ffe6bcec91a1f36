"""Registers AVG-LLaVA in VLMEvalKit, which lists its models in its source, and runs its run.py.

python eval/vlmevalkit.py --kit VLMEvalKit --model DIR [--granularity N] [--token-cost X] -- --data MMBench_DEV_EN

This project does not require VLMEvalKit: clone it and install its requirements. The script is written against its
interface (`vlmeval.vlm.base.BaseModel.generate_inner`, `vlmeval.config.supported_VLM`) and has not been run with it.
"""

import argparse
import runpy
import sys
from functools import partial
from pathlib import Path
from typing import Any

NAME = "avg_llava"
MAX_NEW_TOKENS = 2048


def to_request(message: list[dict[str, Any]]) -> Any:
    """Converts a message of VLMEvalKit, a list of texts and image files, to a request with `<image>` placeholders."""
    from avg_llava import Request

    unknown = {part["type"] for part in message} - {"image", "text"}
    if unknown:
        raise ValueError(f"AVG-LLaVA reads images and text, not {', '.join(sorted(unknown))}")
    images = tuple(Path(part["value"]) for part in message if part["type"] == "image")
    text = "".join("<image>\n" if part["type"] == "image" else part["value"] for part in message)
    return Request(text, images)


def register(model: str, granularity: int | None, token_cost: float) -> None:
    """Adds the model to VLMEvalKit's table of models."""
    import torch
    from vlmeval.config import supported_VLM
    from vlmeval.vlm.base import BaseModel

    from avg_llava import Budget, Decoding, Pipeline

    class AvgLlava(BaseModel):
        INTERLEAVE = True

        def __init__(self, path: str) -> None:
            super().__init__()
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self.pipeline = Pipeline.load(path, device=device)
            self.budget = Budget(granularity, token_cost)

        def generate_inner(self, message: list[dict[str, Any]], dataset: str | None = None) -> str:
            (answer,) = self.pipeline.generate_batch([to_request(message)], self.budget, Decoding(MAX_NEW_TOKENS))
            return answer.text

    supported_VLM[NAME] = partial(AvgLlava, path=model)


def main() -> None:
    """Registers the model and runs VLMEvalKit's run.py."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, required=True, metavar="DIR", help="a clone of VLMEvalKit")
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint folder or hub id")
    parser.add_argument("--granularity", type=int, metavar="N", help="visual tokens per crop (default: the router)")
    parser.add_argument("--token-cost", type=float, default=0.0, metavar="X", help="the router's price (default 0)")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help="after --: arguments of VLMEvalKit's run.py")
    arguments = parser.parse_args()
    run = arguments.kit / "run.py"
    if not run.is_file():
        parser.error(f"{run} is missing: --kit names a clone of VLMEvalKit")
    sys.path.insert(0, str(arguments.kit))
    register(arguments.model, arguments.granularity, arguments.token_cost)
    sys.argv = [str(run), "--model", NAME, *(word for word in arguments.rest if word != "--")]
    runpy.run_path(str(run), run_name="__main__")


if __name__ == "__main__":
    main()

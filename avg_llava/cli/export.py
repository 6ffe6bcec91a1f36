"""Commands that hand a model over to engines which decode plain language models."""

import argparse
from pathlib import Path
from typing import Any

from avg_llava.cli.options import (
    ANSWERING,
    CHECKPOINT,
    DTYPE,
    FAILED,
    FINE,
    JSON,
    MODEL,
    add_command,
    add_group,
    budget_of,
    hide_bars_from_files,
    load_pipeline,
    tell,
)


def export_model(arguments: argparse.Namespace) -> int:
    """Writes the language model alone, with its tokenizer, as engines load it."""
    from avg_llava.checkpoints.loading import load
    from avg_llava.inference.export import language_model

    hide_bars_from_files()
    model, processor = load(arguments.model, dtype=arguments.dtype)
    plain = language_model(model)
    plain.save_pretrained(arguments.output)
    processor.tokenizer.save_pretrained(arguments.output)
    facts = {
        "output": str(arguments.output),
        "architecture": type(plain).__name__,
        "parameters": sum(parameter.numel() for parameter in plain.parameters()),
    }
    tell(arguments, facts, f"the language model ({facts['architecture']}) is in {arguments.output}")
    return FINE


def export_prompts(arguments: argparse.Namespace) -> int:
    """Writes questions as routed prompt embeddings, in the form in which an engine takes them."""
    from avg_llava.inference.export import ERRORS, write_prompts
    from avg_llava.inference.question_files import read_questions

    pipeline = load_pipeline(arguments)
    image_root = arguments.image_root or arguments.input.parent
    questions = read_questions(arguments.input, image_root, budget_of(arguments))
    output, form = arguments.output, arguments.format
    num_failures = write_prompts(pipeline.predictor, questions, output, form, arguments.max_new_tokens)
    facts = {"questions": len(questions), "failures": num_failures, "output": str(output)}
    errors = f", {num_failures} not: see {output / ERRORS}" if num_failures else ""
    tell(arguments, facts, f"{len(questions) - num_failures} prompts are in {output}{errors}")
    return FAILED if num_failures else FINE


def add_export(commands: Any) -> None:
    """Adds the commands of this module."""
    about = "Hand-over to engines that decode plain language models."
    export = add_group(commands, "export", about, "avg-llava export model --model DIR --output engine/model")
    output = (("--output",), {"type": Path, "required": True, "metavar": "DIR", "help": "folder to write"})
    add_command(
        export,
        "model",
        export_model,
        "avg-llava export model --model runs/mini/stage4 --output engine/model",
        [CHECKPOINT, DTYPE, output, JSON],
    )
    add_command(
        export,
        "prompts",
        export_prompts,
        "avg-llava export prompts --model runs/mini/stage4 --input questions.jsonl --output engine/prompts "
        "--format vllm",
        [
            *MODEL,
            (
                ("--input",),
                {
                    "type": Path,
                    "required": True,
                    "metavar": "JSONL",
                    "help": "questions, as `avg-llava generate` takes them",
                },
            ),
            (
                ("--image-root",),
                {"type": Path, "metavar": "DIR", "help": "folder of the images (default: that of --input)"},
            ),
            output,
            (
                ("--format",),
                {
                    "choices": ["safetensors", "vllm", "sglang"],
                    "default": "safetensors",
                    "help": "tensors for use from Python (default), or bodies of requests to an engine's server",
                },
            ),
            *ANSWERING,
            JSON,
        ],
    )

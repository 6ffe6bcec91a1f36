"""Commands that export to inference engines for plain language models."""

from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import OmitArgPrefixes

from avg_llava.cli.options import (
    AnswerOptions,
    Checkpoint,
    Group,
    ModelOptions,
    OptionalDType,
    Outcome,
    ReportingCommand,
    command,
    unset,
)


@command("avg-llava export model --model runs/mini/stage4 --output engine/model")
class ExportModel(ReportingCommand):
    """Writes the language model alone, with its tokenizer, in the format that engines load."""

    model: Checkpoint
    """Checkpoint folder or hub id."""
    dtype: OptionalDType = None
    """Data type of the weights."""
    output: Path
    """Folder to write."""

    def compute(self) -> Outcome:
        from avg_llava.checkpoints.loading import load
        from avg_llava.inference.export import language_model

        model, processor = load(self.model, dtype=self.dtype)
        exported = language_model(model)
        exported.save_pretrained(self.output)
        processor.tokenizer.save_pretrained(self.output)
        facts = {
            "output": str(self.output),
            "architecture": type(exported).__name__,
            "parameters": sum(parameter.numel() for parameter in exported.parameters()),
        }
        return Outcome(facts, f"the language model ({facts['architecture']}) is in {self.output}")


@command("avg-llava export prompts --model runs/mini/stage4 --input questions.jsonl --output prompts --format vllm")
class ExportPrompts(ReportingCommand):
    """Writes questions as routed prompt embeddings, in an engine's input format."""

    loading: OmitArgPrefixes[ModelOptions]
    input: Path
    """JSON Lines file of questions, in the format of `avg-llava generate --input`."""
    image_root: Annotated[Path | None, unset("the folder of --input")] = None
    """Folder of the images."""
    output: Path
    """Folder to write."""
    format: Literal["safetensors", "vllm", "sglang"] = "safetensors"
    """Tensors for use from Python (safetensors), or request bodies for an engine's server."""
    answering: OmitArgPrefixes[AnswerOptions] = AnswerOptions()

    def compute(self) -> Outcome:
        from avg_llava.inference.export import ERRORS, write_prompts
        from avg_llava.inference.question_files import read_questions

        pipeline = self.loading.load()
        questions = read_questions(self.input, self.image_root or self.input.parent, self.answering.budget())
        num_failures = write_prompts(
            pipeline.predictor, questions, self.output, self.format, self.answering.max_new_tokens
        )
        facts = {"questions": len(questions), "failures": num_failures, "output": str(self.output)}
        errors = f", {num_failures} failed: see {self.output / ERRORS}" if num_failures else ""
        text = f"{len(questions) - num_failures} prompts are in {self.output}{errors}"
        return Outcome(facts, text, failed=num_failures > 0)


EXPORT = Group(
    "Export to engines that decode plain language models.",
    "avg-llava export model --model DIR --output engine/model",
    {"model": ExportModel, "prompts": ExportPrompts},
)

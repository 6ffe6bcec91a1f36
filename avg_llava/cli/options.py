"""Base classes of commands, and the types and groups of options that commands share."""

import contextlib
import json
import shutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, dataclass_transform

from tyro.conf import Suppress, arg
from tyro.constructors import PrimitiveConstructorSpec

if TYPE_CHECKING:
    from avg_llava.inference.budget import Budget
    from avg_llava.inference.pipeline import Pipeline

FINE, FAILED, WRONG_USAGE, INTERRUPTED, CLOSED_OUTPUT = 0, 1, 2, 130, 141
"""Exit codes."""

T = TypeVar("T")


def parsed_by(parse: Callable[[str], T], metavar: str) -> Any:
    """Annotation of an option whose value `parse` reads; the message of its `ValueError` is shown to the user."""
    return PrimitiveConstructorSpec[T](
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda words: parse(words[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    )


def unset(meaning: str) -> Any:
    """Annotation of an option whose default is None: the help shows `(default: <meaning>)`."""
    return arg(help_behavior_hint=f"(default: {meaning})")


def _at_least_one(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65535:
        raise ValueError(f"{text!r} is not a port, 0 to 65535")
    return int(text)


COUNT = parsed_by(_at_least_one, "N")
NUMBER = parsed_by(float, "X")
Count = Annotated[int, COUNT]
TokenCost = Annotated[float, NUMBER]
Port = Annotated[int, parsed_by(_port, "N")]
DType = Literal["float32", "bfloat16", "float16"]
Checkpoint = Annotated[str, arg(metavar="DIR")]
OptionalDType = Annotated[DType | None, unset("that of the checkpoint")]
NumWorkers = Annotated[int | None, COUNT, unset("one per GPU or, without GPUs, per core")]


@dataclass(frozen=True, kw_only=True)
class Command(ABC):
    """A command: its fields are the options, and their docstrings the help texts."""

    example: ClassVar[str]

    debug: bool = False
    """Show the traceback of an error, and the warnings of libraries."""

    @abstractmethod
    def run(self) -> int:
        """Runs the command.

        Returns:
            The exit code.
        """

    @classmethod
    def epilog(cls) -> str:
        """Text after the list of options."""
        return f"example:\n  {cls.example}"


@dataclass(frozen=True, kw_only=True)
class StageCommand(Command):
    """A command that reads the YAML file of a stage, whose values its `overrides` change."""

    overrides: Suppress[tuple[str, ...]] = ()

    @classmethod
    def epilog(cls) -> str:
        from avg_llava.common.settings import describe
        from avg_llava.training.config import TrainConfig

        keys = "\n".join(describe(TrainConfig, shutil.get_terminal_size().columns))
        return f"values of the YAML file, changed by --KEY VALUE or --KEY=VALUE:\n\n{keys}\n\n{super().epilog()}"


CommandT = TypeVar("CommandT", bound=type[Command])


@dataclass_transform(frozen_default=True, kw_only_default=True)
def command(example: str) -> Callable[[CommandT], CommandT]:
    """Decorates a class of options: makes it a frozen dataclass, with an example of its use for the help."""

    def decorate(cls: CommandT) -> CommandT:
        cls.example = example
        dataclass(frozen=True, kw_only=True)(cls)
        return cls

    return decorate


@dataclass(frozen=True)
class Outcome:
    """Output of a command: facts for JSON, or text, and whether the command failed."""

    facts: Any
    text: str
    failed: bool = False


@dataclass(frozen=True, kw_only=True)
class ReportingCommand(Command):
    """A command whose output is text, or JSON with `--json`."""

    json: bool = False
    """Print JSON for a program to read."""

    def run(self) -> int:
        with contextlib.redirect_stdout(sys.stderr):  # some libraries print when they are imported
            outcome = self.compute()
        print(json.dumps(outcome.facts, indent=2) if self.json else outcome.text)
        return FAILED if outcome.failed else FINE

    @abstractmethod
    def compute(self) -> Outcome:
        """Does the work of the command."""


@dataclass(frozen=True)
class Group:
    """A command that consists of further commands."""

    description: str
    example: str
    commands: dict[str, "type[Command] | Group"]
    notes: str = ""
    """Further text for the end of the help."""

    def epilog(self) -> str:
        """Text after the list of commands."""
        return f"example:\n  {self.example}\n{self.notes}"


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """The model that answers, and how its weights are held."""

    model: Checkpoint
    """Checkpoint folder or hub id."""
    device: str = "auto"
    """Device: auto, cpu or cuda."""
    dtype: OptionalDType = None
    """Data type of the weights."""
    template: Annotated[str | None, unset("that of the checkpoint")] = None
    """Conversation template of a model that names none, such as vicuna_v1 or chatml."""
    quantization: Annotated[Literal["8bit", "4bit"] | None, unset("none")] = None
    """Quantization of the language model's weights by bitsandbytes."""
    static_cache: bool = False
    """Use a KV cache of fixed size for decoding, which is compiled on a GPU."""

    def load(self) -> "Pipeline":
        """Loads model and processor."""
        from avg_llava.inference.pipeline import Pipeline

        return Pipeline.load(
            self.model,
            template=self.template,
            dtype=self.dtype,
            device=_pick_device(self.device),
            quantization=self.quantization,
            static_cache=self.static_cache,
        )


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """Granularity and length of answers."""

    granularity: Annotated[int | None, COUNT, unset("chosen by the router")] = None
    """Visual tokens per crop."""
    token_cost: TokenCost = 0.0
    """The router's price in nats per doubling of visual tokens; 0 is the paper."""
    max_visual_tokens: Annotated[int | None, COUNT, unset("no limit")] = None
    """Maximum number of visual tokens of all images together."""
    max_new_tokens: Count = 128
    """Maximum number of generated tokens."""

    def budget(self) -> "Budget":
        """The constraints on the granularity."""
        from avg_llava.inference.budget import Budget

        return Budget(self.granularity, self.token_cost, self.max_visual_tokens)


@dataclass(frozen=True, kw_only=True)
class ListenOptions:
    """Address of a server."""

    host: str = "127.0.0.1"
    """Address to listen on: 127.0.0.1 is reachable from this machine only, 0.0.0.0 from the network."""
    port: Port
    """Port to listen on; 0 picks a free one."""


def _pick_device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError("no CUDA device is available here; use --device cpu")
    return name

"""The four stages (trained parts, objective, start) and the objectives (passes that each one makes).

A new objective is a subclass of `training.objectives.Objective` and an entry in `OBJECTIVES`: configuration, trainer,
estimates, FLOP counts and the log read the entry. This module imports no torch, so that a configuration can be read and
checked without it.
"""

import logging
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)

Part = Literal["vision", "projector", "newline", "llm", "router"]

# Parameter names of a part start with one of these.
PART_PREFIXES: dict[Part, tuple[str, ...]] = {
    "vision": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.",),
    "newline": ("model.image_newline",),
    "llm": ("model.language_model.", "lm_head."),
    "router": ("model.router.",),
}


@dataclass(frozen=True)
class Passes:
    """Forward and backward passes of an objective over a micro-batch, whose images are encoded once.

    Attributes:
        levels: Levels at which the language model reads a sample with images, as indices into the model's granularities
            (0 is the coarsest, -1 the finest); None: all levels. It reads samples without images once.
        sampled: It reads each image at only one of `levels`, sampled anew at every step.
        language_backward: Gradients flow back through the language model.
        router: The router runs.
    """

    levels: tuple[int, ...] | None = (-1,)
    sampled: bool = False
    language_backward: bool = True
    router: bool = False

    def granularities(self, granularities: Sequence[int]) -> list[int]:
        """The granularities that `levels` selects, coarse to fine."""
        if self.levels is None:
            return list(granularities)
        selected = {granularities[index] for index in self.levels}
        return [granularity for granularity in granularities if granularity in selected]

    def without_language_model(self) -> "Passes":
        """The same with feedback read from a store."""
        return replace(self, levels=())


@dataclass(frozen=True)
class ObjectiveSpec:
    """An objective as configuration and planning see it.

    Attributes:
        implementation: The subclass of `Objective`, or its import path as `module:name`.
        learns_from_feedback: It takes the answers' log-probabilities at all levels, which a feedback store can provide.
        stages: Stages in which `objective.method` may select it instead of the stage's default.
    """

    implementation: str | Callable[..., Any]
    passes: Passes
    learns_from_feedback: bool = False
    stages: tuple[int, ...] = ()


OBJECTIVES: dict[str, ObjectiveSpec] = {
    "instruction": ObjectiveSpec("avg_llava.training.objectives:InstructionObjective", Passes()),
    "multi_granularity": ObjectiveSpec(
        "avg_llava.training.objectives:MultiGranularityObjective",
        Passes(levels=None),
    ),
    "router": ObjectiveSpec(
        "avg_llava.training.objectives:RouterObjective",
        Passes(levels=None, language_backward=False, router=True),
        learns_from_feedback=True,
    ),
    "gumbel": ObjectiveSpec(
        "avg_llava.training.objectives:GumbelObjective",
        Passes(levels=None, sampled=True, router=True),
        stages=(4,),
    ),
}


@dataclass(frozen=True)
class Stage:
    """One row of the training table."""

    number: int
    purpose: str
    trains: tuple[Part, ...]
    objective: str
    """Default objective, a key of `OBJECTIVES`."""
    parent: int | None
    """Stage whose checkpoint this one starts from; None: the pretrained backbones."""

    @property
    def passes(self) -> Passes:
        """Passes of the default objective."""
        return OBJECTIVES[self.objective].passes


STAGES: dict[int, Stage] = {
    1: Stage(1, "connector alignment", ("projector",), "instruction", None),
    2: Stage(2, "visual instruction tuning", ("vision", "projector", "newline", "llm"), "instruction", 1),
    3: Stage(
        3, "multi-granularity instruction tuning", ("vision", "projector", "newline", "llm"), "multi_granularity", 2
    ),
    4: Stage(4, "router training from the language model's feedback", ("router",), "router", 3),
}


@dataclass(frozen=True)
class PartCount:
    """Numbers of parameters of one part."""

    total: int
    trainable: int


def part_of(parameter_name: str) -> Part:
    """The part that a parameter belongs to.

    Raises:
        ValueError: the name matches no part, so that no parameter is frozen or trained by accident.
    """
    for part in get_args(Part):
        if parameter_name.startswith(PART_PREFIXES[part]):
            return part
    raise ValueError(f"parameter {parameter_name} belongs to no part; add its prefix to PART_PREFIXES")


def is_adapter(parameter_name: str) -> bool:
    """True for parameters of LoRA adapters, as peft names them."""
    return ".lora_A." in parameter_name or ".lora_B." in parameter_name


def set_trainable(model: "nn.Module", stage: Stage) -> dict[Part, PartCount]:
    """Sets `requires_grad` for exactly the stage's parts of a model that is not sharded, and counts the parameters.

    In a part with adapters, only the adapters are trained.
    """
    adapted = {part_of(name) for name, _ in model.named_parameters() if is_adapter(name)}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in stage.trains and (part not in adapted or is_adapter(name)))
    return count_parameters(model)


def log_parts(stage: Stage, counts: Mapping[Part, PartCount]) -> None:
    """Logs which parts a stage trains, and their sizes."""
    logger.info("stage %d: %s", stage.number, stage.purpose)
    for part, count in counts.items():
        verb = "train" if count.trainable else "frozen"
        of_total = f" of {count.total:,}" if 0 < count.trainable < count.total else ""
        logger.info("  %-9s %-6s %15s%s parameters", part, verb, f"{count.trainable or count.total:,}", of_total)


def num_weights(parameter: "nn.Parameter") -> int:
    """Weights that a parameter stands for, which ZeRO-3 may have sharded or bitsandbytes packed in pairs."""
    state = getattr(parameter, "quant_state", None)
    return getattr(parameter, "ds_numel", parameter.numel()) if state is None else math.prod(state.shape)


def count_parameters(model: "nn.Module") -> dict[Part, PartCount]:
    """Numbers of parameters of every part, in the order of `Part`."""
    totals: Counter[Part] = Counter()
    trainable: Counter[Part] = Counter()
    for name, parameter in model.named_parameters():
        totals[part_of(name)] += num_weights(parameter)
        trainable[part_of(name)] += num_weights(parameter) * parameter.requires_grad
    return {part: PartCount(totals[part], trainable[part]) for part in get_args(Part)}

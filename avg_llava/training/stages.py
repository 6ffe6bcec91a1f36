"""The four stages: what each one trains, towards which objective, and which stage it starts from."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:  # a configuration can be read without torch
    from torch import nn

logger = logging.getLogger(__name__)

Part = Literal["vision", "projector", "newline", "llm", "router"]
ObjectiveName = Literal["instruction", "multi_granularity", "router", "gumbel"]

# Parameter names of a part start with one of these.
PART_PREFIXES: dict[Part, tuple[str, ...]] = {
    "vision": ("model.vision_tower.",),
    "projector": ("model.multi_modal_projector.",),
    "newline": ("model.image_newline",),
    "llm": ("model.language_model.", "lm_head."),
    "router": ("model.router.",),
}


@dataclass(frozen=True)
class Stage:
    """One row of the training table."""

    number: int
    purpose: str
    trains: tuple[Part, ...]
    objective: ObjectiveName
    parent: int | None
    """Stage whose checkpoint this one starts from; None: the pretrained backbones."""


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
    """Parameters of one part."""

    total: int
    trainable: int


def part_of(parameter_name: str) -> Part:
    """The part that a parameter of the model belongs to.

    Raises:
        ValueError: a name of no part, so that no parameter is ever frozen or trained by accident.
    """
    for part in get_args(Part):
        if parameter_name.startswith(PART_PREFIXES[part]):
            return part
    raise ValueError(f"parameter {parameter_name} belongs to no part; add its prefix to PART_PREFIXES")


def is_adapter(parameter_name: str) -> bool:
    """Whether a parameter belongs to an adapter of LoRA, as peft names them."""
    return ".lora_A." in parameter_name or ".lora_B." in parameter_name


def set_trainable(model: "nn.Module", stage: Stage) -> dict[Part, PartCount]:
    """Let exactly the stage's parts require gradients, and log how many parameters that is.

    Of a part with adapters, only these do.

    Args:
        model: the whole model, not yet partitioned.
        stage: the row of the table.

    Returns:
        Parameter counts of every part.
    """
    adapted = {part_of(name) for name, _ in model.named_parameters() if is_adapter(name)}
    for name, parameter in model.named_parameters():
        part = part_of(name)
        parameter.requires_grad_(part in stage.trains and (part not in adapted or is_adapter(name)))
    counts = count_parameters(model)
    logger.info("stage %d: %s", stage.number, stage.purpose)
    for part, count in counts.items():
        verb = "train" if count.trainable else "frozen"
        of_total = f" of {count.total:,}" if 0 < count.trainable < count.total else ""
        logger.info("  %-9s %-6s %15s%s parameters", part, verb, f"{count.trainable or count.total:,}", of_total)
    return counts


def count_parameters(model: "nn.Module") -> dict[Part, PartCount]:
    """Parameters of every part, in the order of the table."""
    totals = dict.fromkeys(get_args(Part), 0)
    trainable = dict.fromkeys(get_args(Part), 0)
    for name, parameter in model.named_parameters():
        totals[part_of(name)] += parameter.numel()
        trainable[part_of(name)] += parameter.numel() if parameter.requires_grad else 0
    return {part: PartCount(totals[part], trainable[part]) for part in totals}


def trainable_parameters(model: "nn.Module") -> "Iterator[tuple[Part, str, nn.Parameter]]":
    """(part, name, parameter) of everything that requires gradients."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            yield part_of(name), name, parameter

"""AdamW with one learning rate per part."""

from typing import Any

import torch
from torch import nn

from avg_llava.training.config import OptimSettings
from avg_llava.training.stages import Part, is_adapter, trainable_parameters


def learning_rate(part: Part, settings: OptimSettings, adapter: bool = False) -> float:
    """Peak learning rate of a part or its adapters: its own where the settings name one, the base rate otherwise."""
    own = settings.lora_lr if adapter else {"vision": settings.vision_lr, "projector": settings.projector_lr}.get(part)
    return settings.lr if own is None else own


def parameter_groups(model: nn.Module, settings: OptimSettings) -> list[dict[str, Any]]:
    """Optimizer groups: one per part and per whether weight decay applies to it.

    Vectors (norm weights, biases, the newline embedding, the router's norm) do not decay, matrices do; parts come in
    the order of the model, so that every rank and every resumed run builds the same groups.

    Args:
        model: the whole model, with `requires_grad` as the stage wants it.
        settings: learning rates and weight decay.

    Returns:
        Groups with `params`, `lr`, `weight_decay` and `name`.
    """
    groups: dict[str, dict[str, Any]] = {}
    for part, parameter_name, parameter in trainable_parameters(model):
        decays = settings.weight_decay > 0 and parameter.dim() > 1
        name = f"{part}/decay" if decays else part
        group = groups.setdefault(
            name,
            {
                "params": [],
                "lr": learning_rate(part, settings, is_adapter(parameter_name)),
                "weight_decay": settings.weight_decay if decays else 0.0,
                "name": name,
            },
        )
        group["params"].append(parameter)
    if not groups:
        raise ValueError("the model has no parameter that requires gradients: call set_trainable first")
    return list(groups.values())


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """AdamW of torch over `parameter_groups`: needs no compiler, and DeepSpeed shards its state."""
    beta1, beta2 = settings.betas
    return torch.optim.AdamW(parameter_groups(model, settings), lr=settings.lr, betas=(beta1, beta2), eps=settings.eps)

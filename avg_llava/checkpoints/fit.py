"""Compares the weights in a checkpoint's files with the model of its configuration, before any of them is read.

Neither takes memory: the model is built without weights, and the files are known by their headers.
"""

import copy
from collections.abc import Iterable, Mapping
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from avg_llava.checkpoints.checkpoint import Checkpoint
from avg_llava.checkpoints.stored_tensor import WEIGHT_DTYPES, CheckpointError, StoredTensor

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def empty_model(model_class: type[ModelT], checkpoint: Checkpoint, num_weights: int) -> ModelT:
    """The model of a checkpoint's configuration, without weights.

    Args:
        model_class: The model, or a part of it.
        checkpoint: The checkpoint.
        num_weights: Number of weights in its files; a model of more layers is not built.

    Raises:
        CheckpointError: The configuration describes no model.
    """
    source = checkpoint.name if checkpoint.folder is None else checkpoint.folder / "config.json"
    for part in (checkpoint.config.vision_config, checkpoint.config.text_config):
        num_layers = getattr(part, "num_hidden_layers", 0)
        if num_layers > num_weights:
            raise CheckpointError(
                f"{source}: num_hidden_layers is {num_layers}, but the files hold {num_weights} weights"
            )
    try:
        with torch.device("meta"):
            return model_class(copy.deepcopy(checkpoint.config))
    except Exception as error:  # the library's modules end in any exception
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise CheckpointError(f"{source} describes no model that can be built ({reason})") from error


def misfits(model: PreTrainedModel, stored: Mapping[str, StoredTensor], fresh: tuple[str, ...]) -> list[str]:
    """Weights that are missing, unexpected, or of another shape than in the model; `fresh` prefixes may be missing."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = set(model._tied_weights_keys or ()) if model.config.tie_word_embeddings else set()
    missing = [name for name in expected.keys() - stored.keys() - tied if not name.startswith(fresh)]
    reshaped = [
        (name, stored[name].shape, expected[name])
        for name in stored.keys() & expected.keys()
        if stored[name].shape != expected[name]
    ]
    return misfit_lines(missing, stored.keys() - expected.keys(), reshaped)


def misfit_lines(
    missing: Iterable[str], unexpected: Iterable[str], reshaped: Iterable[tuple[str, Iterable[int], Iterable[int]]]
) -> list[str]:
    """One line for each weight that does not fit; `reshaped` are names with the shapes in checkpoint and model."""
    return [
        *(f"missing    {name}" for name in sorted(missing)),
        *(f"unexpected {name}" for name in sorted(unexpected)),
        *(
            f"shape      {name}: {tuple(found)} in the checkpoint, {tuple(wanted)} in the model"
            for name, found, wanted in sorted(reshaped)
        ),
    ]


def foreign_types(model: PreTrainedModel, stored: Mapping[str, StoredTensor]) -> list[str]:
    """One line for each weight that is of a type in which the model cannot compute."""
    expected = model.state_dict()
    return [
        f"{tensor.file}: tensor {tensor.name} is of type {tensor.dtype}, and weights are floating-point numbers of 16, "
        "32 or 64 bits; take the checkpoint that is not quantised, and quantise it while loading"
        for name, tensor in stored.items()
        if tensor.dtype not in WEIGHT_DTYPES
        and (expected[name].is_floating_point() if name in expected else name.endswith(".weight"))
    ]


def check_fit(model: PreTrainedModel, stored: Mapping[str, StoredTensor], checkpoint: Checkpoint) -> None:
    """Refuses weights of other types or shapes than the model's, and a model of far more weights than there are.

    Names are not compared: the library renames and joins some while it loads them.

    Raises:
        CheckpointError: Names the weight, or lists all misfits.
    """
    for problem in foreign_types(model, stored):
        raise CheckpointError(problem)
    shapes = model.state_dict()
    held = sum(torch.Size(tensor.shape).numel() for tensor in stored.values())
    wanted = sum(
        parameter.numel() for name, parameter in model.named_parameters() if not name.startswith(checkpoint.fresh)
    )
    if wanted > 2 * held or any(
        tensor.shape != tuple(shapes[name].shape) for name, tensor in stored.items() if name in shapes
    ):
        raise misfit(checkpoint.name, misfits(model, stored, checkpoint.fresh))


def misfit(source: str, problems: list[str]) -> CheckpointError:
    """One error that lists all problems."""
    listing = "\n  ".join(problems)
    return CheckpointError(f"{source} does not fit its configuration ({len(problems)} keys):\n  {listing}")

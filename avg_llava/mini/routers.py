"""`avg-llava mini routers`: routers of one model against one another, as ablations of router training give them.

What the model answers at a level does not depend on who chose it. So it answers every held-out question once per level,
and each router is only asked which level it would take.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from avg_llava.checkpoints.formats import ROUTER_KEYS, list_weights
from avg_llava.checkpoints.weight_files import fingerprint
from avg_llava.common.workers import default_workers, map_batches
from avg_llava.mini import answers as measure
from avg_llava.mini import claims
from avg_llava.mini.claims import ClaimsError
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.reports.mini import Row


def compare_routers(
    model: Path, routers: Sequence[Path], data: Path, answers: Path, num_workers: int | None = None
) -> list[Row]:
    """The rows of all fixed levels, of chance, of each router at price 0, named after its folder, and of the oracle.

    Args:
        model: Checkpoint that answers, at all of its levels.
        routers: Checkpoints with the same weights but for the router, which may choose among some of the levels.
        data: Folder of the mini world.
        answers: Folder that the model's answers are kept in.
        num_workers: Processes; None takes one per core, or one where there is a GPU.

    Raises:
        ClaimsError: Two folders have one name, or a router is of another model.
    """
    named = {folder.name: folder for folder in routers}
    if len(named) != len(routers):
        raise ClaimsError("rows are named after the routers' folders, and two of these have the same name")
    num_workers = num_workers or default_workers()
    items = measure.read_questions(data)
    _check_same_model(model, routers)
    levels = measure.collect_answers(measure.Measurement(None, model, data, answers, num_workers), items)
    outcomes = measure.read_outcomes(answers, [item.question for item in items], levels, with_baseline=False)
    choices = _ask(named, items, num_workers)
    rows = claims.rows_without_router(outcomes)
    for name, folder in named.items():
        own = AvgLlavaConfig.from_pretrained(folder).granularities
        places = [levels.index(level) for level in own]
        of_router = replace(
            outcomes,
            granularities=tuple(own),
            correct=outcomes.correct[:, places],
            tokens=outcomes.tokens[:, places],
            router_log_probs=np.array([choices[name][item.question.id] for item in items]),
        )
        rows.append(claims.router_row(name, of_router, token_cost=0.0))
    return [*rows, claims.oracle_row(outcomes)]


def _check_same_model(model: Path, routers: Sequence[Path]) -> None:
    """Refuses routers of other weights or other levels than the model's."""
    levels, weights = AvgLlavaConfig.from_pretrained(model).granularities, _weights(model)
    for folder in routers:
        if _weights(folder) != weights:
            raise ClaimsError(
                f"{folder} and {model} differ in more than the router, so the answers of one are not those of the "
                "other; compare them with `avg-llava mini claims`"
            )
        own = AvgLlavaConfig.from_pretrained(folder).granularities
        if not set(own) <= set(levels):
            raise ClaimsError(f"{folder} chooses among {own}, not all of which are levels of {model}, {levels}")


def _weights(folder: Path) -> str:
    tensors = list_weights(folder)
    return fingerprint({name: tensor for name, tensor in tensors.items() if not name.startswith(ROUTER_KEYS)})


def _ask(
    routers: dict[str, Path], items: Sequence[measure.Item], num_workers: int
) -> dict[str, dict[str, list[float]]]:
    """Each router's log-probabilities of its levels for each question, by id."""
    choices: dict[str, dict[str, list[float]]] = {name: {} for name in routers}
    config = AvgLlavaConfig.from_pretrained(next(iter(routers.values())))
    batches = [(name, batch) for batch in measure.batch_by_length(items, config) for name in routers]
    start = partial(measure.load_predictors, routers)
    with tqdm(total=len(routers) * len(items), desc="routing", unit="question", dynamic_ncols=True) as progress:
        for name, chosen in map_batches(start, _choose, batches, num_workers):
            choices[name] |= chosen
            progress.update(len(chosen))
    return choices


def _choose(batch: tuple[str, list[measure.Item]]) -> tuple[str, dict[str, list[float]]]:
    """In a worker: a router's name and log-probabilities for a batch of questions, by id."""
    name, items = batch
    predictor = measure.predictor_of(name)
    choice = predictor.choose(predictor.encode([item.request for item in items]))
    assert choice.log_probs is not None, "the router was asked"
    return name, {item.question.id: row for item, row in zip(items, choice.log_probs.tolist(), strict=True)}


__all__ = ["compare_routers"]

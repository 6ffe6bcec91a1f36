"""Interrupting a training run in the middle of a stage."""

import pytest

from avg_llava.training import run
from avg_llava.training.config import TrainConfig


def interrupt_at(step: int, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a stage until `step` optimizer steps are taken, and raises an error in the next one."""

    class Interrupted(Exception):
        pass

    def interrupt(trainer, *arguments, **settings):
        if trainer.state.global_step == step:
            raise Interrupted
        return compute_loss(trainer, *arguments, **settings)

    compute_loss = run.StageTrainer.compute_loss
    with monkeypatch.context() as patch:
        patch.setattr(run.StageTrainer, "compute_loss", interrupt)
        with pytest.raises(Interrupted):
            run.run_stage(config)

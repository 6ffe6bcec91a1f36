"""What a run shows and writes while it goes on: the bar in the terminal, the lines of its log, a warning."""

import json
import logging
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

from avg_llava.data.sampler import MicroBatches

logger = logging.getLogger(__name__)

LOG_NAME = "log_history.jsonl"
COLLAPSE_LINES = 20  # of the log, that a collapse is looked for in
COLLAPSE_SHARE = 0.98  # of the images of these lines that get one and the same level


class RunFiles(TrainerCallback):
    """Keeps `log_history.jsonl`, tells the sampler its epoch, and leaves the last save to the end of the run."""

    def __init__(self, output_dir: Path, sampler: MicroBatches):
        self.path = output_dir / LOG_NAME
        self.sampler = sampler

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the log file, with what a resumed checkpoint knows: lines of steps that will be repeated go."""
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lines = [json.dumps(entry) + "\n" for entry in state.log_history]
            self.path.write_text("".join(lines), encoding="utf-8")

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The samplers are wrapped too deeply, in a run resumed in a later epoch, for accelerate to find them."""
        self.sampler.set_epoch(int((state.epoch or 0) + 1e-6))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A checkpoint of the last step would be superseded at once by the stage's result."""
        if state.global_step >= state.max_steps:
            control.should_save = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a line."""
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**(logs or {}), "step": state.global_step}) + "\n")


class ProgressBar(ProgressCallback):
    """transformers' progress bar, with the loss beside the time left instead of a dictionary on a line of its own."""

    def __init__(self, title: str):
        super().__init__()
        self.title = title

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.title)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss and the learning rate."""
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}", lr=f"{logs['learning_rate']:.1e}", refresh=False)


def end_tracking(trackers: Sequence[str], failed: bool) -> None:
    """Let the trackers write what they hold, and end their runs.

    They would do so when the interpreter shuts down, which processes that were joined never do.
    """
    if "wandb" in trackers:
        import wandb

        if wandb.run is not None:
            wandb.finish(exit_code=int(failed))
    if "trackio" in trackers:
        import trackio

        if trackio.context_vars.current_run.get() is not None:
            trackio.finish()


class CollapseAlarm(TrainerCallback):
    """Warns of a router that has come to choose one level for all images; once, until it chooses others again."""

    def __init__(self) -> None:
        self._lines: deque[dict[str, float]] = deque(maxlen=COLLAPSE_LINES)
        self._is_collapsed = False

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the last lines' shares of the levels."""
        shares = {name: value for name, value in (logs or {}).items() if name.startswith("share_") and "/" not in name}
        if not state.is_world_process_zero or not shares:
            return
        self._lines.append({"router_agreement": float("nan"), **(logs or {})})
        if len(self._lines) < COLLAPSE_LINES:
            return
        means = {name: sum(line[name] for line in self._lines) / COLLAPSE_LINES for name in shares}
        most = max(means, key=lambda name: means[name])
        was_collapsed, self._is_collapsed = self._is_collapsed, means[most] >= COLLAPSE_SHARE
        if self._is_collapsed and not was_collapsed:
            logger.warning("%s", self._message(most.removeprefix("share_"), means[most], state.global_step))

    def _message(self, level: str, share: float, step: int) -> str:
        agreement = sum(line["router_agreement"] for line in self._lines) / COLLAPSE_LINES
        best = "" if math.isnan(agreement) else f", which the language model's feedback prefers for {agreement:.0%}"
        return (
            f"step {step}: the router has collapsed: level {level} for {share:.1%} of the images of the last "
            f"{COLLAPSE_LINES} lines of the log{best}. If that is not what the data ask for, start again with a lower "
            "optim.lr or a larger optim.global_batch_size, objective.tie_tolerance 0, or the data that need other "
            "levels in a larger share"
        )

"""What a run shows and writes while it goes on: the bar in the terminal and the lines of its log."""

import json
from pathlib import Path
from typing import Any

from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ProgressCallback

LOG_NAME = "log_history.jsonl"


class RunFiles(TrainerCallback):
    """Keeps `log_history.jsonl`, tells the sampler its epoch, and leaves the last save to the end of the run."""

    def __init__(self, output_dir: Path, sampler: Sampler[int]):
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
        self.sampler.set_epoch(int((state.epoch or 0) + 1e-6))  # type: ignore[attr-defined]

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

"""transformers' Trainer with this project's optimizer, loss normalization, logging and checkpoints.

Loss normalization: every supervised token of an optimizer step (for the router: every image) has the same weight,
across micro-batches and processes. The released training averages over each micro-batch, then over micro-batches and
processes, so that tokens of micro-batches with many answers have less weight.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, ProcessorMixin, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import seed_worker

from avg_llava.checkpoints.checksums import compute_checksums
from avg_llava.checkpoints.loading import load_model
from avg_llava.checkpoints.routing_model import RoutingModel, load_routing_model
from avg_llava.data.dataset import ConversationDataset
from avg_llava.data.sampler import MicroBatches
from avg_llava.training.assembly import start_checkpoint
from avg_llava.training.card import write_card
from avg_llava.training.checkpoint import (
    CHECKPOINT_PREFIX,
    MANIFEST_NAME,
    StageManifest,
    checkpoint_bytes,
    remove_checkpoints,
    write_manifest,
    writing,
)
from avg_llava.training.config import OptimSettings, TrainConfig
from avg_llava.training.lora import (
    ADAPTER_FOLDER,
    adapter_shapes,
    load_adapters,
    merge_adapters,
    save_adapters,
    with_start_weights,
    without_adapters,
)
from avg_llava.training.monitor import LOG_NAME, CollapseAlarm, Monitor, ProgressBar, RunFiles, finish_trackers
from avg_llava.training.objectives import Objective
from avg_llava.training.stages import STAGES, is_adapter, part_of

CONFIG_NAME = "train_config.yaml"
TENSORBOARD_FOLDER, TRACKIO_FOLDER = "tensorboard", "trackio"
PROJECT = "avg-llava"  # project of wandb and trackio


class TrainingError(ValueError):
    """Training cannot continue; the message names the step and the samples."""


class StageTrainer(Trainer):
    """Trains one stage's objective and writes its checkpoints and result.

    Args:
        objective: Model and loss, with `requires_grad` set.
        config: Saved with every checkpoint.
        arguments: From `training_arguments`.
        collator: Turns samples into micro-batches with the arguments of `Objective.forward` and `index`.
        sampler: The micro-batches; its `set_epoch` is called at the start of every epoch.
        processor: Saved with the model.
        manifest: Its `finished`, `step` and `weights` are set when it is written.
    """

    optimizer: torch.optim.Optimizer | None

    def __init__(
        self,
        objective: Objective,
        config: TrainConfig,
        arguments: TrainingArguments,
        dataset: ConversationDataset,
        collator: Callable[[Sequence[dict[str, Any]]], dict[str, Tensor]],
        sampler: MicroBatches,
        processor: ProcessorMixin,
        manifest: StageManifest,
    ):
        self.config = config
        self.sampler = sampler
        self.processor = processor
        self.manifest = manifest
        super().__init__(model=objective, args=arguments, train_dataset=dataset, data_collator=collator)
        self.loss_is_scaled_for_ga = True  # by compute_loss
        self.monitor = Monitor(config, objective.config, adapter_shapes(objective.model), dataset, self.args.device)
        self.remove_callback(ProgressCallback)
        self.remove_callback(PrinterCallback)
        if config.logging.progress_bar:
            self.add_callback(ProgressBar(f"stage {config.stage}"))
        self.add_callback(RunFiles(Path(config.output.dir), sampler))
        self.add_callback(CollapseAlarm())

    def train(self, *arguments: Any, **settings: Any) -> Any:
        """Trains as transformers does, and marks a failed run as failed in the trackers."""
        failed = True
        try:
            result = super().train(*arguments, **settings)
            failed = False
        finally:
            finish_trackers(self.config.logging.trackers, failed)
        return result

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with a learning rate per part."""
        if self.optimizer is None:
            self.optimizer = build_optimizer(self.model.model, self.config.optim)
            self.optimizer.register_step_pre_hook(self._before_optimizer_step)
            self._group_settings = [
                {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
            ]
        return self.optimizer

    def _before_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Measures gradients; under DeepSpeed, this process's shard of them."""
        step = self.state.global_step + 1
        if step == 1 or step % self.config.logging.every == 0:  # the steps that transformers logs
            self.monitor.measure_gradients(optimizer)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """Loads as transformers does, and corrects what ZeRO-3 loads from a converted checkpoint.

        ZeRO-3 gives all parameter groups the settings of the first one, and shares one step counter among them, which
        each group would then increment.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        assert self.optimizer is not None, "created before it is loaded"
        rates = self.lr_scheduler.get_last_lr()
        for group, settings, lr in zip(self.optimizer.param_groups, self._group_settings, rates, strict=True):
            group.update(settings, lr=lr, initial_lr=settings["lr"])
        for state in self.optimizer.state.values():
            state["step"] = state["step"].clone()

    def get_train_dataloader(self) -> DataLoader:
        """The sampler's micro-batches of this process."""
        workers = self.args.dataloader_num_workers
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=self.sampler,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            worker_init_fn=partial(seed_worker, num_workers=workers, rank=self.args.process_index),
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(
        self, epoch_iterator: Iterator[dict[str, Any]], num_batches: int, device: torch.device
    ) -> tuple[list[dict[str, Any]], Tensor | int | None]:
        """The micro-batches of an optimizer step and the sum of their weights."""
        batches, num_items = super().get_batch_samples(self.monitor.waiting_for(epoch_iterator), num_batches, device)
        self.monitor.count(batches)
        return batches, num_items

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Any]], device: torch.device) -> Tensor:
        """Sum of the weights of an optimizer step's micro-batches over all processes; called by transformers."""
        local = sum(self.model.num_items(batch["input_ids"], batch["labels"]) for batch in batch_samples)
        return self.accelerator.gather(torch.tensor([local], device=device)).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, Any]:
        """The objective's loss times the micro-batch's share of the optimizer step's weight.

        The share is multiplied by the number of processes, because these average their gradients.

        Raises:
            TrainingError: the loss is not finite; the message names the micro-batch's samples.
        """
        indices = inputs.pop("index").tolist()
        outputs = model(**inputs)
        if not math.isfinite(outputs["loss"].item()):
            names = "; ".join(self.train_dataset.sample(index).name for index in indices)
            raise TrainingError(
                f"the loss is {outputs['loss'].item()} at step {self.state.global_step + 1} on {names}. Look at these "
                "samples, or lower optim.lr"
            )
        num_items = outputs["num_items"]
        assert isinstance(num_items_in_batch, Tensor), "by _get_num_items_in_batch"
        outputs["loss"] = outputs["loss"] * (
            num_items * self.accelerator.num_processes / num_items_in_batch.clamp(min=1)
        )
        self.monitor.add(outputs, indices)
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds the measurements of all processes since the last line to this line of the log."""
        if "loss" in logs:
            logs |= self.monitor.line(gather_object([self.monitor.take()]), logs.get("grad_norm"))
        super().log(logs, start_time)

    def _save(self, output_dir: str | None = None, state_dict: Mapping[str, Tensor] | None = None) -> None:
        """Writes the model (without the objective around it), its processor and the configuration."""
        if not self.args.should_save:  # only rank 0 holds the gathered weights
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        if state_dict is None:
            state_dict = self.model.state_dict()
        weights = {name.removeprefix("model."): tensor for name, tensor in state_dict.items()}
        model, lora = self.model.model, self.config.lora
        shutil.rmtree(folder / ADAPTER_FOLDER, ignore_errors=True)  # of an earlier run
        if lora is not None:
            start = start_checkpoint(self.config)
            save_adapters(folder, model, weights, start.name)
            if lora.quantization is not None:
                weights = with_start_weights(model, weights, start)
                model = without_adapters(model, weights)
            weights = merge_adapters(weights, lora)
        model.save_pretrained(folder, state_dict=weights)
        self.processor.save_pretrained(folder)
        (folder / CONFIG_NAME).write_text(self.config.to_yaml(), encoding="utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Counterpart of `_save` for runs without DeepSpeed, which loads its own files."""
        load_weights(self.model.model, Path(resume_from_checkpoint))

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Writes a checkpoint, and removes older ones."""
        folder = Path(self.args.output_dir, f"{CHECKPOINT_PREFIX}{self.state.global_step}")
        with self.monitor.paused():
            with self._writing(folder):
                super()._save_checkpoint(model, trial)
            self._complete(folder, finished=False)

    def save_stage(self) -> None:
        """Writes the stage's result, and removes all checkpoints."""
        folder = Path(self.args.output_dir)
        with self._writing(folder):
            self.save_model()
        self._complete(folder, finished=True)

    def _complete(self, folder: Path, finished: bool) -> None:
        """Writes the manifest after the files of all ranks, then removes older checkpoints: one is always complete."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            manifest = replace(self.manifest, finished=finished, step=self.state.global_step)
            with self._writing(folder):
                if finished:
                    write_card(folder, manifest)
                write_manifest(folder, replace(manifest, weights=compute_checksums(folder)))
            remove_checkpoints(Path(self.args.output_dir), keep=0 if finished else self.config.output.keep)
        self.accelerator.wait_for_everyone()

    def discard_earlier_run(self) -> None:
        """Removes the log, the checkpoints and the manifest of an earlier run from the output folder."""
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            output_dir = Path(self.args.output_dir)
            remove_checkpoints(output_dir, keep=0)
            for name in (MANIFEST_NAME, LOG_NAME):
                (output_dir / name).unlink(missing_ok=True)
            for name in (TENSORBOARD_FOLDER, TRACKIO_FOLDER, "wandb"):
                shutil.rmtree(output_dir / name, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _writing(self, folder: Path) -> AbstractContextManager[None]:
        """Turns a failure to write `folder` into an error of one line."""
        needed = checkpoint_bytes(self.model, has_master_weights=self.is_deepspeed_enabled)
        return writing(folder, Path(self.args.output_dir), needed)


def training_arguments(
    config: TrainConfig, deepspeed: dict[str, Any] | None, world_size: int, use_cpu: bool
) -> TrainingArguments:
    """Arguments of transformers' Trainer; `deepspeed` is the parsed DeepSpeed file."""
    optim, output, runtime = config.optim, config.output, config.runtime
    # DeepSpeed would cast all parameters and inputs to the run's precision. A trained router stays float32, and the
    # frozen parts have that precision already.
    is_mixed = deepspeed is not None and "router" in STAGES[config.stage].trains
    precision = "fp32" if is_mixed else runtime.precision
    os.environ["TENSORBOARD_LOGGING_DIR"] = str(Path(output.dir) / TENSORBOARD_FOLDER)
    os.environ["TRACKIO_DIR"] = str(Path(output.dir).resolve() / TRACKIO_FOLDER)
    os.environ["WANDB_DIR"] = output.dir  # wandb creates a folder in it
    os.environ.setdefault("WANDB_PROJECT", PROJECT)
    return TrainingArguments(
        output_dir=output.dir,
        seed=config.seed,
        per_device_train_batch_size=optim.micro_batch_size,
        gradient_accumulation_steps=config.accumulation_steps(world_size),
        learning_rate=optim.lr,
        weight_decay=optim.weight_decay,
        lr_scheduler_type=optim.scheduler,
        warmup_steps=optim.warmup_ratio,
        num_train_epochs=optim.epochs,
        max_steps=optim.max_steps or -1,
        max_grad_norm=optim.max_grad_norm,
        bf16=precision == "bf16",
        fp16=precision == "fp16",
        tf32=None if use_cpu else runtime.tf32,
        use_cpu=use_cpu,
        deepspeed=deepspeed,
        dataloader_num_workers=config.data.num_workers,
        dataloader_pin_memory=not use_cpu,
        remove_unused_columns=False,
        logging_steps=config.logging.every,
        logging_first_step=True,
        logging_nan_inf_filter=False,
        save_strategy="steps" if output.save_every else "no",
        save_steps=output.save_every or 500,
        report_to=list(config.logging.trackers) or "none",
        project=PROJECT,
        run_name=config.logging.run_name or f"stage{config.stage}",
        disable_tqdm=not config.logging.progress_bar,
    )


def load_weights(model: PreTrainedModel, folder: Path) -> None:
    """Loads the weights of a checkpoint into a model or a `RoutingModel`, and adapters into a model that has some."""
    if any(is_adapter(name) for name, _ in model.named_parameters()):
        load_adapters(model, folder)
        return
    load_weights_of = load_routing_model if isinstance(model, RoutingModel) else load_model
    # The router has the widest dtype: narrower weights survive the round trip unchanged.
    model.load_state_dict(load_weights_of(str(folder), dtype=model.model.router.dtype).state_dict())


def parameter_groups(model: nn.Module, settings: OptimSettings) -> list[dict[str, Any]]:
    """Optimizer groups: per part, one with and one without weight decay.

    Weight decay applies to matrices, not to vectors (norm weights, biases, the newline embedding, the router's norm).
    Groups are in the order of the model's parameters, so that all ranks and resumed runs build the same groups.
    """
    rates = {"vision": settings.vision_lr, "projector": settings.projector_lr}
    groups: dict[str, dict[str, Any]] = {}
    for parameter_name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(parameter_name)
        decays = settings.weight_decay > 0 and parameter.dim() > 1
        name = f"{part}/decay" if decays else part
        rate = settings.lora_lr if is_adapter(parameter_name) else rates.get(part)
        group = {
            "params": [],
            "lr": settings.lr if rate is None else rate,
            "weight_decay": settings.weight_decay if decays else 0.0,
            "name": name,
        }
        groups.setdefault(name, group)["params"].append(parameter)
    if not groups:
        raise ValueError("the model has no parameter that requires gradients: call set_trainable first")
    return list(groups.values())


def build_optimizer(model: nn.Module, settings: OptimSettings) -> torch.optim.AdamW:
    """Torch's AdamW over `parameter_groups`: it needs no compiler, and DeepSpeed shards its state."""
    beta1, beta2 = settings.betas
    return torch.optim.AdamW(parameter_groups(model, settings), lr=settings.lr, betas=(beta1, beta2), eps=settings.eps)

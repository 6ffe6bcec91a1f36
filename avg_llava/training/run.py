"""Train one stage: `python -m avg_llava.training.run CONFIG [--key.subkey value ...]`.

Reads as the run goes: configuration, what there is already, model, trainable parts, data, trainer, train, save. The
same command continues a run that was killed and leaves a finished one alone.
"""

import logging
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from avg_llava.common.settings import ConfigError
from avg_llava.common.watchdog import end_with_parent
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.processing import AvgLlavaProcessor
from avg_llava.training.assembly import build_collator, build_dataset, build_model, build_sampler
from avg_llava.training.checkpoint import (
    StageManifest,
    changed_keys,
    check_start,
    latest_checkpoint,
    read_manifest,
)
from avg_llava.training.compilation import check_compilation, compile_layers
from avg_llava.training.config import TrainConfig, load_config
from avg_llava.training.elastic import LOAD_UNIVERSAL, make_universal
from avg_llava.training.objectives import OBJECTIVES
from avg_llava.training.processes import (
    leave,
    prepare_deepspeed,
    rank,
    read_deepspeed_file,
    set_up_logging,
    uses_cpu,
    world_size,
)
from avg_llava.training.stages import STAGES, set_trainable
from avg_llava.training.trainer import StageTrainer, load_weights, training_arguments

logger = logging.getLogger(__name__)

USAGE = """\
usage: python -m avg_llava.training.run CONFIG [--key.subkey value ...] [--force-start] [--dry-run]

Train one stage as a YAML file says; options go over the file's values. With --dry-run, look for all that could go wrong
(configuration, weights, data, disk) and do not train.
example: python -m avg_llava.training.run configs/mini/stage1.yaml --optim.lr 1e-3 --output.dir runs/try
"""


def run_stage(config: TrainConfig) -> Path:
    """Train the stage that `config` describes, or continue, or leave alone what is finished.

    Returns:
        The folder with the stage's result.

    Raises:
        ConfigError: the configuration, the start or an earlier run in the output folder does not fit.
        ValueError: a sample or a checkpoint cannot be used; the message names it.
    """
    stage = STAGES[config.stage]
    output_dir = Path(config.output.dir)
    parent = describe_start(config)
    earlier = find_earlier_run(config, parent)
    if earlier is not None and earlier.finished:
        check_same_data(earlier.manifest, finished_fingerprint(config))
        logger.info("stage %d is already complete in %s; nothing to do", stage.number, output_dir)
        return output_dir

    use_cpu = uses_cpu(config)
    deepspeed = None
    if config.runtime.deepspeed is not None:
        deepspeed = read_deepspeed_file(config.runtime.deepspeed)
        prepare_deepspeed(use_cpu)
    if config.runtime.compile:
        check_compilation(deepspeed, use_cpu)
    set_seed(config.seed)

    model, processor = build_model(config)
    if deepspeed is not None and earlier is not None and earlier.manifest.world_size != world_size():
        make_universal(earlier.folder)
        deepspeed |= LOAD_UNIVERSAL
        # DeepSpeed itself gives the small parameters that ZeRO-3 keeps whole their values only after the next step.
        load_weights(model, earlier.folder)
    set_trainable(model, stage)
    if config.runtime.gradient_checkpointing and config.objective_name != "router":
        # Not the reentrant kind: it hands out a parameter's gradient once for every level, which ZeRO-2 refuses, and
        # ZeRO-3 takes and gets wrong.
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.runtime.compile:
        compile_layers(model)
    objective = OBJECTIVES[config.objective_name](model, config.objective)

    dataset = build_dataset(config, processor, model.config)
    manifest = StageManifest(
        stage=stage.number,
        finished=False,
        step=0,
        parent=parent,
        data_fingerprint=dataset.fingerprint(),
        config=config.to_dict(),
        world_size=world_size(),
    )
    if earlier is not None:
        check_same_data(earlier.manifest, manifest.data_fingerprint)

    trainer = StageTrainer(
        objective=objective,
        config=config,
        arguments=training_arguments(config, deepspeed, world_size(), use_cpu),
        dataset=dataset,
        collator=build_collator(config, processor, dataset),
        sampler=build_sampler(config, dataset),
        processor=processor,
        manifest=manifest,
    )
    if config.output.overwrite:
        trainer.discard_earlier_run()
    if earlier is not None:
        logger.info("continuing from step %d in %s", earlier.manifest.step, earlier.folder)
    trainer.train(resume_from_checkpoint=None if earlier is None else str(earlier.folder))
    trainer.save_stage()
    logger.info("stage %d is complete in %s", stage.number, output_dir)
    return output_dir


@dataclass(frozen=True)
class EarlierRun:
    """What an earlier run of the same stage left in the output folder."""

    folder: Path
    """The stage's result if finished, a checkpoint otherwise."""
    manifest: StageManifest

    @property
    def finished(self) -> bool:
        """Whether there is nothing left to train."""
        return self.manifest.finished


def describe_start(config: TrainConfig) -> dict[str, Any]:
    """Where the stage starts, for the manifest; refused if that is not its parent stage."""
    parent_stage = STAGES[config.stage].parent
    if parent_stage is None:
        return {"vision": config.model.vision, "language": config.model.language}
    assert config.model.start is not None, "checked by TrainConfig"
    return check_start(config.model.start, config.stage, parent_stage, config.model.force_start)


def find_earlier_run(config: TrainConfig, parent: dict[str, Any]) -> EarlierRun | None:
    """The finished result or the latest complete checkpoint in the output folder, if there is one.

    Raises:
        ConfigError: it comes from another configuration or another start.
    """
    if config.output.overwrite:
        return None
    output_dir = Path(config.output.dir)
    manifest, folder = read_manifest(output_dir), output_dir
    if manifest is None:
        checkpoint = latest_checkpoint(output_dir)
        if checkpoint is None:
            return None
        manifest, folder = read_manifest(checkpoint), checkpoint
    assert manifest is not None, "latest_checkpoint gives folders with a manifest"
    changes = changed_keys(manifest.config, config.to_dict())
    if manifest.parent != parent:
        changes.append(f"start: {manifest.parent} -> {parent}")
    if changes:
        raise ConfigError(
            f"{output_dir} holds a run with other settings ({'; '.join(changes)}). Choose another output.dir, restore "
            "the settings to continue it, or pass --output.overwrite to discard it"
        )
    return EarlierRun(folder, manifest)


def finished_fingerprint(config: TrainConfig) -> str:
    """Fingerprint of the data as they are now, read with the finished stage's processor."""
    model_config = AvgLlavaConfig.from_pretrained(config.output.dir)
    processor = AvgLlavaProcessor.from_checkpoint(config.output.dir, model_config)
    return build_dataset(config, processor, model_config).fingerprint()


def check_same_data(manifest: StageManifest, fingerprint: str) -> None:
    """Refuse to continue, or to call complete, a run whose data have changed."""
    if manifest.data_fingerprint != fingerprint:
        raise ConfigError(
            "the files of data.sources have changed since this run started; pass --output.overwrite to train on the "
            "new ones, or choose another output.dir"
        )


def message_of(error: Exception) -> str:
    """An error's message, without the traceback that torch puts before it where a loader's worker met the error."""
    kind = type(error)
    text = str(error)
    if text.startswith("Caught ") and "DataLoader worker process" in text:
        text = text.rsplit(f"{kind.__module__}.{kind.__qualname__}: ", 1)[-1].strip()
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line.

    Returns:
        Exit code: 0 fine, 1 failed, 2 wrong usage. Where processes were joined, it exits instead of returning.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0] in ("-h", "--help") or arguments[0].startswith("-"):
        is_help = bool(arguments) and arguments[0] in ("-h", "--help")
        (sys.stdout if is_help else sys.stderr).write(USAGE)
        return 0 if is_help else 2
    set_up_logging()
    if world_size() > 1:
        end_with_parent()
    if "--dry-run" in arguments:
        from avg_llava.planning import dry_run  # which imports this module

        return dry_run.main(arguments[0], [argument for argument in arguments[1:] if argument != "--dry-run"])
    code = 0
    try:
        run_stage(load_config(arguments[0], arguments[1:]))
    except ConfigError as error:
        code = 2
        if rank() == 0:
            sys.stderr.write(f"error: {error}\n")
    except (ValueError, OSError) as error:
        code = 1
        logger.debug("traceback", exc_info=True)
        sys.stderr.write(f"error (process {rank()}): {message_of(error)}\n")
    if torch.distributed.is_initialized():
        leave(code)
    return code


if __name__ == "__main__":
    sys.exit(main())

"""Trains the stage that a YAML file describes; options override values of the file.

usage: python -m avg_llava.training.run CONFIG [--key.subkey value | --force-start] ...
example: python -m avg_llava.training.run configs/mini/stage1.yaml --optim.lr 1e-3 --output.dir runs/try

The same command continues a run that was killed, and does nothing if the stage is complete. To check configuration,
weights, data and disk without training: python -m avg_llava.planning.dry_run CONFIG ...
"""

import logging
import shlex
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from transformers import set_seed

from avg_llava.common.settings import ConfigError
from avg_llava.common.workers import end_with_parent
from avg_llava.training.assembly import (
    build_collator,
    build_dataset,
    build_model,
    build_sampler,
    check_compilation,
    check_quantization,
    compile_layers,
    finished_dataset,
)
from avg_llava.training.checkpoint import (
    LOAD_UNIVERSAL,
    StageManifest,
    check_same_data,
    describe_start,
    find_earlier_run,
    make_universal,
)
from avg_llava.training.config import TrainConfig, load_config
from avg_llava.training.objectives import objective_class
from avg_llava.training.processes import (
    leave,
    prepare_deepspeed,
    rank,
    read_deepspeed_file,
    set_up_logging,
    uses_cpu,
    world_size,
)
from avg_llava.training.stages import STAGES, log_parts, set_trainable
from avg_llava.training.trainer import StageTrainer, load_weights, training_arguments

logger = logging.getLogger(__name__)


def run_stage(config: TrainConfig) -> Path:
    """Trains a stage from its start or from its latest checkpoint, unless it is complete.

    Returns:
        The folder with the stage's result, `output.dir`.

    Raises:
        ConfigError: The configuration, the start or an earlier run in the output folder does not fit.
        ValueError: A sample or a checkpoint cannot be used; the message names it.
    """
    # Start, and an earlier run of the same stage.
    stage = STAGES[config.stage]
    output_dir = Path(config.output.dir)
    parent = describe_start(config)
    earlier = find_earlier_run(config, parent)
    if earlier is not None and earlier.manifest.finished:
        check_same_data(earlier.manifest, finished_dataset(config).fingerprint())
        logger.info("stage %d is already complete in %s; nothing to do", stage.number, output_dir)
        return output_dir

    # Device and sharding.
    use_cpu = uses_cpu(config)
    deepspeed = None
    if config.runtime.deepspeed is not None:
        deepspeed = read_deepspeed_file(config.runtime.deepspeed)
    check_quantization(deepspeed, config)
    if deepspeed is not None:
        prepare_deepspeed(use_cpu)
    if config.runtime.compile:
        check_compilation(deepspeed, use_cpu)
    set_seed(config.seed)

    # Model, trainable parts and objective.
    model, processor = build_model(config)
    if deepspeed is not None and earlier is not None and earlier.manifest.world_size != world_size():
        make_universal(earlier.folder)
        deepspeed |= LOAD_UNIVERSAL
        # From a universal checkpoint, DeepSpeed updates small parameters that ZeRO-3 does not shard only after the
        # next step: load them here.
        load_weights(model, earlier.folder)
    log_parts(stage, set_trainable(model, stage))
    if config.runtime.gradient_checkpointing and config.passes.language_backward:
        # Reentrant checkpointing emits a parameter's gradient once per level: ZeRO-2 refuses it, ZeRO-3 miscounts it.
        model.activation_checkpointing_enable({"use_reentrant": False})
    if config.runtime.compile:
        compile_layers(model)
    objective = objective_class(config.objective_name)(model, config.objective)

    # Data.
    dataset = build_dataset(config, processor, model.config)
    config = replace(config, data=replace(config.data, template=dataset.template))
    manifest = StageManifest(
        stage=stage.number,
        finished=False,
        step=0,
        parent=parent,
        data_fingerprint=dataset.fingerprint(),
        config=config.to_dict(),
        world_size=world_size(),
        samples=dataset.samples_per_source(),
    )
    if earlier is not None:
        check_same_data(earlier.manifest, manifest.data_fingerprint)

    # Training and result.
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


def message_of(error: Exception) -> str:
    """The message of an error, without the traceback that torch prepends to errors of data-loader workers."""
    kind = type(error)
    text = str(error)
    if text.startswith("Caught ") and "DataLoader worker process" in text:
        text = text.rsplit(f"{kind.__module__}.{kind.__qualname__}: ", 1)[-1].strip()
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs from the command line.

    Returns:
        Exit code: 0 success, 1 failure, 2 wrong usage. With a process group, it exits the process instead.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if not arguments or arguments[0].startswith("-"):
        is_help = arguments[:1] in (["-h"], ["--help"])
        (sys.stdout if is_help else sys.stderr).write(str(__doc__))
        return 0 if is_help else 2
    if "--dry-run" in arguments:
        others = shlex.join(argument for argument in arguments if argument != "--dry-run")
        sys.stderr.write(
            f"error: this command trains; check the run with `python -m avg_llava.planning.dry_run {others}`\n"
        )
        return 2
    set_up_logging()
    if world_size() > 1:
        end_with_parent()
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

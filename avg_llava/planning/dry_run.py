"""The dry run: finds all problems of a training run at once, before it starts.

usage: python -m avg_llava.planning.dry_run CONFIG [--key.subkey value | --force-start] ...
example: python -m avg_llava.planning.dry_run configs/mini/stage1.yaml --output.dir runs/try

Reads the configuration, compares names and shapes of the start's weights with the model's on the meta device, decodes
some samples of every source, measures free disk space and writes a trial checkpoint. No weights are loaded, and nothing
is left behind but the data indices, which the run itself needs. Exit code 1 if anything is wrong.
"""

import random
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from avg_llava.checkpoints.checkpoint import ROUTER_KEYS
from avg_llava.checkpoints.loading import instantiate
from avg_llava.checkpoints.weight_files import list_tensors, weight_files
from avg_llava.data.collator import Collator
from avg_llava.data.dataset import ConversationDataset
from avg_llava.data.index import open_index
from avg_llava.data.records import DataError
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.images import load_image
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.processing import AvgLlavaProcessor
from avg_llava.planning.meta_model import find_model_config, meta_model
from avg_llava.training.assembly import (
    build_dataset,
    check_compilation,
    check_quantization,
    load_processor,
    start_checkpoint,
    weights_dtype,
)
from avg_llava.training.checkpoint import checkpoint_bytes, describe_start, find_earlier_run
from avg_llava.training.config import TrainConfig, load_config
from avg_llava.training.feedback_store import FeedbackStore
from avg_llava.training.processes import rank, read_deepspeed_file, set_up_logging, uses_cpu, world_size
from avg_llava.training.stages import STAGES
from avg_llava.training.trainer import CONFIG_NAME

NUM_FIRST, NUM_RANDOM = 4, 28  # samples decoded per source
MAX_NAMED = 10  # malformed records named per source
GIB = 2**30

Result = TypeVar("Result")


@dataclass
class Report:
    """Findings of a dry run: facts for standard output, problems for standard error."""

    facts: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def attempt(self, subject: str, check: Callable[[], Result]) -> Result | None:
        """The result of `check`; on an error, None and a problem of the subject."""
        with self.guard(subject):
            return check()
        return None

    @contextmanager
    def guard(self, subject: str) -> Iterator[None]:
        """Turns an error of the block into a problem of the subject."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.problems.append(f"{subject}: {error}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs from the command line: a summary on standard output, problems on standard error.

    `--dry-run` is ignored among the arguments, so that the launch script can pass on its own.

    Returns:
        Exit code: 0 no problem, 1 problems, 2 wrong usage. Only rank 0 checks.
    """
    given = sys.argv[1:] if arguments is None else arguments
    path, *overrides = [argument for argument in given if argument != "--dry-run"] or [""]
    if not path or path.startswith("-"):
        is_help = path in ("-h", "--help")
        (sys.stdout if is_help else sys.stderr).write(str(__doc__))
        return 0 if is_help else 2
    if rank() > 0:
        return 0
    set_up_logging()
    report = dry_run(path, overrides)
    sys.stdout.write("".join(f"{fact}\n" for fact in report.facts))
    sys.stderr.write("".join(f"problem: {problem}\n" for problem in report.problems))
    sys.stdout.write(f"dry run: {len(report.problems) or 'no'} problem{'s' * (len(report.problems) != 1)}\n")
    return 1 if report.problems else 0


def dry_run(path: str | Path, overrides: Sequence[str] = ()) -> Report:
    """Checks everything that a run needs, given the YAML file of a stage and `--key.subkey value` options."""
    report = Report()
    config = report.attempt("configuration", lambda: load_config(path, overrides))
    if config is None:
        return report
    processes = f"{world_size()} process{'es' * (world_size() > 1)}"
    report.facts.append(f"stage {config.stage} of {path}, {processes}, into {config.output.dir}")
    parent = report.attempt("start", lambda: describe_start(config))
    if parent is not None:
        earlier = report.attempt("earlier run", lambda: find_earlier_run(config, parent))
        if earlier is not None:
            state = "is finished" if earlier.manifest.finished else f"would continue from step {earlier.manifest.step}"
            report.facts.append(f"earlier run: {earlier.folder} {state}")
    accumulation = report.attempt("batch size", lambda: config.accumulation_steps(world_size()))
    deepspeed = None
    if config.runtime.deepspeed is not None:
        file = config.runtime.deepspeed
        deepspeed = report.attempt("DeepSpeed", lambda: read_deepspeed_file(file))
    report.attempt("quantization", lambda: check_quantization(deepspeed, config))
    if config.runtime.compile:
        report.attempt("compilation", lambda: check_compilation(deepspeed, uses_cpu(config)))
    found = report.attempt("model", lambda: load_processor(config))
    processor = None
    if found is not None:
        processor, model_config = found
        num_parameters = report.attempt("weights", lambda: check_weights(config, model_config))
        if num_parameters is not None:
            report.facts.append(f"weights: all of the {num_parameters:,} parameters' names and shapes fit")
            report.facts += [f"start: {note}" for note in start_checkpoint(config).notes]
        num_samples = _check_data(config, processor, model_config, report)
        if num_samples is not None and accumulation is not None:
            budget = config.optim.max_tokens_per_batch
            in_all, size = f"{config.optim.global_batch_size} per step", f"{config.optim.micro_batch_size}"
            if budget is not None:
                in_all, size = "as many per step as fit", f"up to {budget:,} tokens"
            report.facts.append(
                f"data: {num_samples:,} samples, {in_all} in {accumulation} micro-batches of {size} per process"
            )
    else:
        _check_files(config, report)
        described = report.attempt("model's shape", lambda: find_model_config(config, Path(path)))
        if described is None:
            return report
        model_config, assumptions = described
        report.facts += [f"assumed: {assumption}" for assumption in assumptions]
    with report.guard(f"output.dir {config.output.dir}"), scratch_folder(Path(config.output.dir)) as folder:
        _check_disk(folder, bytes_to_write(config, model_config), report)
        if processor is not None:
            num_bytes = trial_save(folder, config, processor, model_config)
            report.facts.append(f"trial save: {num_bytes / 2**20:.1f} MiB written, read and removed")
    return report


def check_weights(config: TrainConfig, model_config: AvgLlavaConfig) -> int:
    """Compares names and shapes of the tensors in the start's files with the model's, without reading the tensors.

    Returns:
        The number of parameters.

    Raises:
        CheckpointError: Files or keys are missing, unexpected or of the wrong shape; the message lists all.
    """
    settings = config.model
    replaces_router = settings.router is not None or settings.granularities is not None
    checkpoint = start_checkpoint(config)
    if replaces_router:
        checkpoint = replace(checkpoint, fresh=(*checkpoint.fresh, ROUTER_KEYS))

    def read(folder: Path) -> dict[str, Tensor]:
        return {
            name: torch.empty(tensor.shape, device="meta")
            for name, tensor in list_tensors(weight_files(folder)).items()
            if not (replaces_router and ".router." in name)
        }

    checkpoint = replace(checkpoint, config=model_config)
    model = instantiate(AvgLlavaForConditionalGeneration, checkpoint, torch.float32, read=read, device_map="meta")
    return sum(parameter.numel() for parameter in model.parameters())


def bytes_to_write(config: TrainConfig, model_config: AvgLlavaConfig) -> int:
    """Approximate peak of a run's disk usage: its checkpoints, one more while it is being written, and the result."""
    without_store = replace(config, objective=replace(config.objective, feedback_store=None))
    model = meta_model(without_store, model_config).to(weights_dtype(config))
    if "router" in STAGES[config.stage].trains:
        model.model.router.float()
    result = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    if not config.output.save_every:
        return result
    checkpoint = checkpoint_bytes(model, has_master_weights=config.runtime.deepspeed is not None)
    return result + (config.output.keep + 1) * checkpoint


def trial_save(folder: Path, config: TrainConfig, processor: AvgLlavaProcessor, model_config: AvgLlavaConfig) -> int:
    """Writes a checkpoint with zeros of the projector's size instead of all weights, reads it, returns its bytes."""
    processor.save_pretrained(folder)
    model_config.save_pretrained(folder)
    (folder / CONFIG_NAME).write_text(config.to_yaml(), encoding="utf-8")
    projector = meta_model(config, model_config).model.multi_modal_projector
    save_file({name: torch.zeros(tensor.shape) for name, tensor in projector.state_dict().items()}, folder / "trial")
    load_file(folder / "trial")
    AvgLlavaProcessor.from_checkpoint(folder, AvgLlavaConfig.from_pretrained(folder))
    load_config(folder / CONFIG_NAME)
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


@contextmanager
def scratch_folder(output_dir: Path) -> Iterator[Path]:
    """A temporary folder inside `output_dir`, removed at the end together with all parents created for it."""
    created = [folder for folder in (output_dir, *output_dir.parents) if not folder.exists()]
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".dry-run-", dir=output_dir) as folder:
            yield Path(folder)
    finally:
        for parent in created:  # deepest first
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()


def _check_disk(folder: Path, needed: int, report: Report) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        report.problems.append(
            f"disk: the run writes about {needed:,} bytes at a time, and {free:,} are free; make room, choose another "
            "output.dir, or lower output.keep"
        )
    report.facts.append(f"disk: about {needed / GIB:.2f} GiB to write, {free / GIB:.2f} GiB free")


def _check_files(config: TrainConfig, report: Report) -> None:
    """Checks the data without a tokenizer: the first records of every source, and their images."""
    data = config.data
    for source in data.sources:
        template = data.template or ("plain" if config.model.start is None else "vicuna_v1")
        index = report.attempt(f"data {source.path}", partial(open_index, source.path, template, data.index_dir))
        root = Path(source.path).parent if source.image_root is None else Path(source.image_root)
        if not root.is_dir():
            report.problems.append(f"data {source.path}: image root {root} is no folder; check data.sources")
        elif index is not None:
            for row in range(min(len(index.rows), NUM_FIRST + NUM_RANDOM)):
                with report.guard("data"):
                    for path in index.sample(row, root).images:
                        load_image(path)
            report.facts.append(f"{source.path}: {len(index.rows):,} records, of which the first were checked")


def _check_data(
    config: TrainConfig, processor: AvgLlavaProcessor, model_config: AvgLlavaConfig, report: Report
) -> int | None:
    """Checks all sources, and returns their number of samples; None if one of them cannot be used."""
    total = 0
    is_usable = True
    for source in config.data.sources:
        alone = replace(config, data=replace(config.data, sources=(source,), on_bad_sample="skip"))
        dataset = report.attempt(f"data {source.path}", partial(build_dataset, alone, processor, model_config))
        if dataset is None:
            is_usable = False
            continue
        total += len(dataset)
        bad = list(dataset.malformed.values())[:MAX_NAMED]
        if len(dataset.malformed) > MAX_NAMED:
            bad.append(f"{source.path}: {len(dataset.malformed) - MAX_NAMED} more malformed records")
        bad += _check_samples(dataset, config, report)
        if config.data.on_bad_sample == "error":
            report.problems += [f"data: {message}" for message in bad]
        elif bad:
            report.facts.append(f"{source.path}: {len(bad)} bad samples found, which the run would skip")
    if not is_usable:
        return None
    if config.objective.feedback_store is not None:
        with report.guard("feedback store"):
            store = FeedbackStore.open(config.objective.feedback_store)
            store.answers(build_dataset(config, processor, model_config))
    return total


def _check_samples(dataset: ConversationDataset, config: TrainConfig, report: Report) -> list[str]:
    """Errors of the first samples of a source and of a random selection."""
    path = dataset.files[0].path
    first, rest = range(len(dataset))[:NUM_FIRST], range(len(dataset))[NUM_FIRST:]
    indices = [*first, *sorted(random.Random(config.seed).sample(rest, min(NUM_RANDOM, len(rest))))]
    bad: list[str] = []
    usable: list[int] = []
    cut = masked = 0
    for index in indices:
        sample = dataset.sample(index)
        try:
            images = dataset.open_images(sample)
        except DataError as error:
            bad.append(f"{sample.name}: {error}")
            continue
        text = dataset.encode_text(sample, [(image.height, image.width) for image in images])
        cut += text.cut is not None
        masked += text.masked is not None
        usable.append(index)
    if usable and masked == len(usable):
        report.problems.append(
            f"data {path}: none of the checked samples has supervised tokens; check data.template "
            f"{dataset.template!r} and model.max_length"
        )
    if usable:
        Collator(pad_token_id=dataset.processor.tokenizer.pad_token_id)(
            [dataset[index] for index in usable[: config.optim.micro_batch_size]]
        )
    report.facts.append(
        f"{path}: {len(dataset):,} samples; of {len(indices)} checked {len(bad)} cannot be read, {cut} are truncated "
        f"at {dataset.max_length} tokens, {masked} have no supervised tokens"
    )
    return bad


if __name__ == "__main__":
    sys.exit(main())

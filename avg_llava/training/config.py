"""What a training run is told: one frozen dataclass per section of the YAML file.

`load_config("configs/mini/stage1.yaml", ["--optim.lr", "1e-3"])` reads a file, puts command-line overrides over it,
refuses what it does not know and returns a `TrainConfig`. Relative paths are relative to the working directory; the
scripts run from the root of the project.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from avg_llava.common.settings import ConfigError, apply_overrides, build, read_yaml, with_list_from_file
from avg_llava.training.stages import STAGES, ObjectiveName

RankingVariant = Literal["paper", "released"]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class RouterSettings:
    """Shape of the granularity router, where a new one is made: in stage 1, and in stage 4 if it is asked for there."""

    num_text_tokens: int = 32
    """Instruction tokens that the text filter keeps (k of the paper); 0: the router sees the image only."""
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    """Width of the fusion layer's feed-forward part; null: the language model's width."""
    dropout: float = 0.1


@dataclass(frozen=True)
class ModelSettings:
    """Where the weights come from. Stage 1 joins two backbones; every later stage starts from a checkpoint."""

    vision: str | None = None
    """Stage 1: CLIP vision tower, a folder or hub id."""
    language: str | None = None
    """Stage 1: language model and tokenizer, a folder or hub id."""
    start: str | None = None
    """Stages 2 to 4: checkpoint of the parent stage, a folder or hub id."""
    force_start: bool = False
    """Accept a start that is not a finished run of the parent stage (also: `--force-start`)."""
    granularities: tuple[int, ...] | None = None
    """Stage 1: visual tokens per crop, coarse to fine; null: five halvings. Stages 3 and 4: some of the start's levels,
    the finest among them, and a new router for them; null: the start's. Stage 2: the start's."""
    behavior: Literal["paper", "released"] | None = None
    """Stage 1: which meaning of the method (see the model's configuration); null: paper. Later: the start's."""
    image_grid_pinpoints: tuple[tuple[int, ...], ...] | None = None
    """Stage 1: (height, width) resolutions that an image may be tiled into; null: LLaVA-NeXT's, in crops."""
    router: RouterSettings | None = None
    """Stage 1: shape of the router; null: the defaults. Stage 4: a new router of this shape; null: the start's. Other
    stages: the start's."""
    max_length: int | None = None
    """Longest sequence once visual tokens are spliced in; null: the start's."""


@dataclass(frozen=True)
class SourceSettings:
    """One file of conversations in LLaVA's format: a JSON list, JSON lines (`.jsonl`) or Parquet (`.parquet`)."""

    path: str
    image_root: str | None = None
    """Folder that image paths are relative to and stay inside of; null: the file's own folder."""
    sampling: str | None = None
    """`all`, `first:N`, `end:N` or `random:N` (N records, or a share such as 10%); null: all."""
    weight: float = 1.0
    """Passes over these records per epoch; 2.3 is two, and a third over 30 % of them, drawn by `seed`."""
    follow_links: bool = False
    """Accept image paths that leave the root through symbolic links."""
    expected: dict[str, int] | None = None
    """How many records there should be before `weight`: `total`, and by the first folder of their images' paths, or
    `(text only)`. What `verify-data` compares with."""


@dataclass(frozen=True)
class DataSettings:
    """What is learnt from, and in which order."""

    sources: tuple[SourceSettings, ...]
    """In the YAML file also the path of another YAML file, a mixture, which holds this list for several stages."""
    template: Literal["plain", "vicuna_v1"]
    """`plain` for captions (stage 1), `vicuna_v1` for instructions."""
    group_by_modality_length: bool = False
    """Batches of similar length, image and text-only samples apart."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """An unreadable sample stops the run with its name, or is skipped and counted."""
    skip_list: str | None = None
    """File that `avg-llava verify-data` wrote: records to leave out."""
    index_dir: str | None = None
    """Folder for indices of the sources, a few MB each; null: `.avg-llava-index` beside each source."""
    num_workers: int = 4


@dataclass(frozen=True)
class ObjectiveSettings:
    """Stage 4 only: how the router learns from the language model."""

    method: Literal["rglf", "gumbel"] = "rglf"
    """`rglf`: from the feedback on every level, the paper's method. `gumbel`: from the instruction-tuning loss at a
    level drawn by a straight-through Gumbel-softmax; of the fields below it knows `temperature` only."""
    temperature: float = 1.0
    """Of the Gumbel-softmax: the lower, the closer its gradient is to that of the hard choice."""
    ranking: RankingVariant = "paper"
    rank_loss_weight: float = 1.0
    cross_entropy_weight: float = 0.1
    feedback: Reduction = "mean"
    """Log-probability of the answer: mean over its tokens, or their sum."""
    tie_tolerance: float = 0.0
    """Levels within this many nats of the best count as equally good; 0 is the paper."""
    feedback_store: str | None = None
    """Folder that `avg-llava feedback` wrote: read feedback from there, with no language model in memory. null: compute
    it while training."""


@dataclass(frozen=True)
class LoraSettings:
    """Stages 2 and 3: low-rank adapters in the language model, instead of training it whole. `{}`: the defaults."""

    rank: int = 128
    alpha: float = 256.0
    """The adapters' product is scaled by alpha / rank."""
    dropout: float = 0.05
    """Of the adapters' inputs."""
    target_modules: tuple[str, ...] | None = None
    """Linear layers of the language model by the last part of their names, as `q_proj`; null: all but its head."""
    vision: bool = False
    """Adapters in all linear layers of the vision tower too, instead of training it whole."""


@dataclass(frozen=True)
class OptimSettings:
    """AdamW with linear warm-up and decay."""

    lr: float
    global_batch_size: int
    """Samples per optimizer step, over all processes and accumulation steps; see `max_tokens_per_batch`."""
    micro_batch_size: int
    """Samples per process and forward pass; the number of accumulation steps follows."""
    max_tokens_per_batch: int | None = None
    """Fill micro-batches with samples up to this many tokens (text, and visual tokens at the finest level; padding is
    not counted) instead of with `micro_batch_size` samples; a longer sample is alone. An optimizer step then has
    `global_batch_size` / `micro_batch_size` micro-batches, of however many samples. null: by the number of samples."""
    vision_lr: float | None = None
    """Learning rate of the vision tower; null: `lr`."""
    projector_lr: float | None = None
    """Learning rate of the projector; null: `lr`."""
    lora_lr: float | None = None
    """Learning rate of LoRA's adapters, wherever they are; null: `lr`."""
    weight_decay: float = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_ratio: float = 0.03
    epochs: float = 1.0
    max_steps: int | None = None
    """Stop after this many optimizer steps; the schedule is laid out for them. null: `epochs` decides."""
    max_grad_norm: float = 0.0
    """Clip gradients to this norm; 0: do not clip, as in the released training."""


@dataclass(frozen=True)
class RuntimeSettings:
    """On what, and in which precision, the run computes."""

    deepspeed: str | None = None
    """DeepSpeed JSON file; null: plain PyTorch (one process, or data parallel)."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    tf32: bool = True
    device: Literal["auto", "cpu"] = "auto"
    gradient_checkpointing: bool = True
    """Recompute activations of tower and language model in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the layers of tower and language model; needs a compiler, and not ZeRO-3."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention kernel of the language model; null: what transformers picks."""


@dataclass(frozen=True)
class LoggingSettings:
    """What is recorded while training; `log_history.jsonl` in the output folder always is."""

    every: int = 1
    """Optimizer steps between two lines of the log."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    run_name: str | None = None
    peak_tflops: float | None = None
    """What one device could do in the run's precision, in 10^12 operations per second, for the MFU; null: what is
    published for the GPU, and no MFU where that is not known."""
    progress_bar: bool = True


@dataclass(frozen=True)
class OutputSettings:
    """Where the results go."""

    dir: str
    """Folder of the run: checkpoints while it trains, the stage's model at the end."""
    save_every: int = 0
    """Optimizer steps between two checkpoints that a killed run continues from; 0: none."""
    keep: int = 1
    """Checkpoints to keep while training."""
    overwrite: bool = False
    """Discard what the folder holds of an earlier run and train from the beginning."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a run of one stage is told."""

    stage: Literal[1, 2, 3, 4]
    model: ModelSettings
    data: DataSettings
    optim: OptimSettings
    output: OutputSettings
    lora: LoraSettings | None = None
    objective: ObjectiveSettings = field(default_factory=ObjectiveSettings)
    runtime: RuntimeSettings = field(default_factory=RuntimeSettings)
    logging: LoggingSettings = field(default_factory=LoggingSettings)
    seed: int = 42

    def __post_init__(self) -> None:
        _check_model(self)
        _check_lora(self)
        _check_numbers(self)

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per optimizer step and process, so that the global batch size is what the file says."""
        per_pass = self.optim.micro_batch_size * world_size
        steps, rest = divmod(self.optim.global_batch_size, per_pass)
        if rest or steps == 0:
            raise ConfigError(
                f"optim.global_batch_size {self.optim.global_batch_size} is not a multiple of "
                f"optim.micro_batch_size {self.optim.micro_batch_size} x {world_size} processes = {per_pass}; "
                "change one of the three"
            )
        return steps

    def architecture(self) -> dict[str, Any]:
        """Fields of the model's configuration that stage 1 decides; what is null keeps the model's default."""
        model = self.model
        fields = {
            "granularities": None if model.granularities is None else list(model.granularities),
            "behavior": model.behavior,
            "image_grid_pinpoints": model.image_grid_pinpoints and [list(pair) for pair in model.image_grid_pinpoints],
            "router_config": None if model.router is None else dataclasses.asdict(model.router),
            "max_sequence_length": model.max_length,
        }
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def objective_name(self) -> ObjectiveName:
        """The objective of the stage, or the one that `objective.method` asks for instead."""
        return "gumbel" if self.objective.method == "gumbel" else STAGES[self.stage].objective

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and scalars, as YAML and JSON hold them."""
        return _plain(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


# What stages after the first may decide anew: both make a new router.
DECIDED_LATER = {3: ("granularities",), 4: ("granularities", "router")}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Read a stage's YAML file and put `--key.subkey value` overrides over it.

    Raises:
        ConfigError: unreadable file, unknown key, value of the wrong type, or values that contradict one another.
    """
    spelled_out = ["--model.force_start" if argument == "--force-start" else argument for argument in overrides]
    return build(TrainConfig, with_list_from_file(apply_overrides(read_yaml(path), spelled_out), "data.sources"))


def _check_model(config: TrainConfig) -> None:
    model = config.model
    if config.stage == 1:
        if model.vision is None or model.language is None or model.start is not None:
            raise ConfigError("stage 1 starts from model.vision and model.language (and has no model.start)")
        return
    if model.start is None or model.vision is not None or model.language is not None:
        raise ConfigError(
            f"stage {config.stage} starts from model.start, the folder of stage {config.stage - 1} (and has neither "
            "model.vision nor model.language)"
        )
    for name in ("granularities", "behavior", "image_grid_pinpoints", "router"):
        if getattr(model, name) is not None and name not in DECIDED_LATER.get(config.stage, ()):
            raise ConfigError(f"model.{name} is decided in stage 1; stage {config.stage} takes it from model.start")


def _check_lora(config: TrainConfig) -> None:
    lora = config.lora
    if lora is None:
        if config.optim.lora_lr is not None:
            raise ConfigError("optim.lora_lr is for runs with a section lora")
        return
    if config.stage not in (2, 3):
        raise ConfigError(f"lora is for stages 2 and 3, which train the language model; stage {config.stage} does not")
    if lora.rank < 1 or not lora.alpha > 0 or not 0 <= lora.dropout < 1:
        raise ConfigError(
            "lora.rank must be at least 1, lora.alpha above 0 and lora.dropout at least 0 and below 1; got "
            f"{lora.rank}, {lora.alpha} and {lora.dropout}"
        )


def _check_numbers(config: TrainConfig) -> None:
    optim = config.optim
    positive = {
        "optim.lr": optim.lr,
        "optim.vision_lr": optim.vision_lr,
        "optim.projector_lr": optim.projector_lr,
        "optim.lora_lr": optim.lora_lr,
        "optim.global_batch_size": optim.global_batch_size,
        "optim.micro_batch_size": optim.micro_batch_size,
        "optim.max_tokens_per_batch": optim.max_tokens_per_batch,
        "optim.epochs": optim.epochs,
        "optim.max_steps": optim.max_steps,
        "objective.temperature": config.objective.temperature,
        "model.max_length": config.model.max_length,
        "logging.every": config.logging.every,
        "logging.peak_tflops": config.logging.peak_tflops,
        "output.keep": config.output.keep,
    }
    not_negative = {
        "optim.weight_decay": optim.weight_decay,
        "optim.warmup_ratio": optim.warmup_ratio,
        "optim.max_grad_norm": optim.max_grad_norm,
        "objective.tie_tolerance": config.objective.tie_tolerance,
        "objective.rank_loss_weight": config.objective.rank_loss_weight,
        "objective.cross_entropy_weight": config.objective.cross_entropy_weight,
        "data.num_workers": config.data.num_workers,
        "output.save_every": config.output.save_every,
    }
    for key, value in positive.items():
        if value is not None and not value > 0:
            raise ConfigError(f"{key} must be above 0, got {value}")
    for key, value in not_negative.items():
        if not value >= 0:
            raise ConfigError(f"{key} must be at least 0, got {value}")
    if optim.warmup_ratio >= 1:
        raise ConfigError(f"optim.warmup_ratio must be below 1, a share of all steps; got {optim.warmup_ratio}")
    if len(optim.betas) != 2:
        raise ConfigError(f"optim.betas must be a list of two numbers, got {list(optim.betas)}")
    if not config.data.sources:
        raise ConfigError("data.sources is empty: name at least one file")
    for index, source in enumerate(config.data.sources):
        if not source.weight > 0:
            raise ConfigError(f"data.sources.{index}.weight must be above 0, got {source.weight}")
    if config.objective.feedback_store is not None and config.stage != 4:
        raise ConfigError(
            f"objective.feedback_store is for stage 4, which trains the router; this is stage {config.stage}"
        )
    if config.objective.method != "rglf":
        if config.stage != 4:
            raise ConfigError(f"objective.method is for stage 4, which trains the router; this is stage {config.stage}")
        if config.objective.feedback_store is not None:
            raise ConfigError(
                f"objective.method {config.objective.method} learns from the language model itself, at a level drawn "
                "anew at every step, so there is nothing to store; set objective.feedback_store to null"
            )
    if any(len(pair) != 2 for pair in config.model.image_grid_pinpoints or ()):
        raise ConfigError("model.image_grid_pinpoints must be a list of [height, width]")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value

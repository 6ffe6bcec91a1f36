"""Configuration of a training run: one frozen dataclass per section of the YAML file.

`load_config("configs/mini/stage1.yaml", ["--optim.lr", "1e-3"])` reads a file, applies command-line overrides, refuses
unknown keys and returns a `TrainConfig`. Relative paths are relative to the working directory; the scripts run from the
root of the project. This module imports no torch, so that the command line can read it quickly.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from pydantic_core import to_jsonable_python

from avg_llava.common.registry import find_entry
from avg_llava.common.settings import ConfigError, apply_overrides, build, read_yaml, with_list_from_file
from avg_llava.model.templates import TEMPLATES
from avg_llava.training.stages import OBJECTIVES, STAGES, Passes

# The value of `objective.method` that selects the default objective of the stage.
DEFAULT_METHOD = "rglf"
RankingVariant = Literal["paper", "released"]
Reduction = Literal["mean", "sum"]


@dataclass(frozen=True)
class RouterSettings:
    """Shape of a new granularity router: in stage 1, and in stage 4 if the section is given there."""

    kind: str = "transformer"
    """A key of `ROUTERS` in `avg_llava/model/router.py`."""
    num_text_tokens: int = 32
    """Instruction tokens that the text filter keeps (k of the paper); 0: the router reads the image only."""
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    """Width of the fusion layer's feed-forward part; null: the language model's width."""
    dropout: float = 0.1


@dataclass(frozen=True)
class ModelSettings:
    """Start of the run: two backbones in stage 1, a checkpoint of the parent stage later."""

    vision: str | None = None
    """Stage 1: vision tower, a folder, hub id or `open_clip:...`; see docs/backbones.md."""
    language: str | None = None
    """Stage 1: language model and tokenizer, a folder or hub id."""
    start: str | None = None
    """Stages 2 to 4: checkpoint of the parent stage, a folder or hub id."""
    projector: str | None = None
    """Stages 1 to 3: a projector instead of a fresh one or the start's: `mm_projector.bin` of a stage 1 of the original
    code. With it, stage 2 may also start from `vision` and `language`."""
    force_start: bool = False
    """Accept a start that is not a finished run of the parent stage (also: `--force-start`)."""
    granularities: tuple[int, ...] | None = None
    """Stage 1: visual tokens per crop, coarse to fine; null: five halvings. Stages 3 and 4: some of the start's levels,
    the finest among them, and a new router for them; null: the start's. Stage 2: the start's."""
    pooling_ladder: str | None = None
    """Stage 1: a key of `LADDERS` in `avg_llava/model/scaler.py`, the levels that exist; null: the paper's. Later: the
    start's."""
    behavior: Literal["paper", "released"] | None = None
    """Stage 1: variant of the method (see the model's configuration); null: paper. Later stages: the start's."""
    image_grid_pinpoints: tuple[tuple[int, ...], ...] | None = None
    """Stage 1: (height, width) resolutions for tiling; null: LLaVA-NeXT's, scaled to the crop size."""
    router: RouterSettings | None = None
    """Stage 1: shape of the router; null: the defaults. Stage 4: a new router of this shape; null: the start's. Other
    stages: the start's."""
    max_length: PositiveInt | None = None
    """Maximal sequence length in tokens, visual tokens included; null: the start's."""


@dataclass(frozen=True)
class SourceSettings:
    """One file of conversations in LLaVA's format: a JSON list, JSON lines (`.jsonl`) or Parquet (`.parquet`)."""

    path: str
    image_root: str | None = None
    """Folder that image paths are relative to and stay inside of; null: the file's own folder."""
    sampling: str | None = None
    """`all`, `first:N`, `end:N` or `random:N` (N records, or a share such as 10%); null: all."""
    weight: PositiveFloat = 1.0
    """Passes over these records per epoch; 2.3: two, and a third over 30 % of them, sampled by `seed`."""
    follow_links: bool = False
    """Accept image paths that leave the root through symbolic links."""
    expected: dict[str, int] | None = None
    """Expected numbers of records before `weight`, which `verify-data` compares with: `total`, and per first folder of
    the images' paths, or `(text only)`."""
    license: str | None = None
    """Licence of the records and images, for the model card; null: unknown."""


@dataclass(frozen=True)
class DataSettings:
    """Training data and their order."""

    sources: tuple[SourceSettings, ...]
    """A list, or the path of a YAML file that holds it (a mixture shared by several stages)."""
    template: str | None = None
    """A key of `TEMPLATES` in `avg_llava/model/templates.py`: `plain` for captions (stage 1), `vicuna_v1` and others
    for instructions. null: `plain` in stage 1, later the start's, else that of its language model."""
    force_template: bool = False
    """Train with `template` although the start was trained with another."""
    group_by_modality_length: bool = False
    """Batch samples of similar length, with and without images separately."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """An unreadable sample stops the run with an error that names it, or is skipped and counted."""
    skip_list: str | None = None
    """File written by `avg-llava verify-data`: records to leave out."""
    index_dir: str | None = None
    """Folder for the sources' indices, a few MB each; null: `.avg-llava-index` beside each source."""
    num_workers: NonNegativeInt = 4


@dataclass(frozen=True)
class ObjectiveSettings:
    """The training objective. Without `method`, all fields are for stage 4."""

    method: str = DEFAULT_METHOD
    """`rglf`: the stage's default objective; in stage 4 the paper's, which learns from feedback at every level.
    `gumbel` (stage 4): the instruction-tuning loss at a level sampled by a straight-through Gumbel-softmax; of the
    fields below it uses `temperature` only. Or another entry of `training.stages.OBJECTIVES`."""
    temperature: PositiveFloat = 1.0
    """Temperature of the Gumbel-softmax; the lower, the closer its gradient to that of the argmax."""
    ranking: RankingVariant = "paper"
    rank_loss_weight: NonNegativeFloat = 1.0
    cross_entropy_weight: NonNegativeFloat = 0.1
    feedback: Reduction = "mean"
    """Log-probability of the answer: mean over its tokens, or their sum."""
    tie_tolerance: NonNegativeFloat = 0.0
    """Levels within this many nats of the best count as equally good; 0 is the paper."""
    feedback_store: str | None = None
    """Folder written by `avg-llava feedback`: read feedback from it, without a language model in memory. null: compute
    feedback while training."""


@dataclass(frozen=True)
class LoraSettings:
    """Stages 2 and 3: train low-rank adapters in the language model instead of its weights. `{}`: the defaults."""

    rank: int = 128
    alpha: float = 256.0
    """The adapters' product is scaled by alpha / rank."""
    dropout: float = 0.05
    """Dropout probability of the adapters' inputs."""
    target_modules: tuple[str, ...] | None = None
    """Linear layers of the language model by the last part of their names, such as `q_proj`; null: all but the head."""
    vision: bool = False
    """Also train adapters in all linear layers of the vision tower instead of its weights."""
    quantization: Literal["4bit"] | None = None
    """`4bit` (QLoRA): keep the frozen blocks of the language model in NF4. The adapters are trained on the dequantised
    weights, and merged into the start's own ones. Not under ZeRO-3; needs bitsandbytes. null: the start's weights."""


@dataclass(frozen=True)
class OptimSettings:
    """AdamW with linear warm-up and decay."""

    lr: PositiveFloat
    global_batch_size: PositiveInt
    """Samples per optimizer step, over all processes and accumulation steps; see `max_tokens_per_batch`."""
    micro_batch_size: PositiveInt
    """Samples per process and forward pass; the number of accumulation steps follows."""
    max_tokens_per_batch: PositiveInt | None = None
    """Fill micro-batches up to this many tokens (text, and visual tokens at the finest level, without padding) instead
    of `micro_batch_size` samples; a longer sample is a micro-batch by itself. An optimizer step has `global_batch_size`
    / `micro_batch_size` micro-batches, of any number of samples. null: `micro_batch_size` samples."""
    vision_lr: PositiveFloat | None = None
    """Learning rate of the vision tower; null: `lr`."""
    projector_lr: PositiveFloat | None = None
    """Learning rate of the projector; null: `lr`."""
    lora_lr: PositiveFloat | None = None
    """Learning rate of LoRA adapters in any part; null: `lr`."""
    weight_decay: NonNegativeFloat = 0.0
    betas: tuple[float, ...] = (0.9, 0.999)
    eps: float = 1e-8
    scheduler: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_ratio: NonNegativeFloat = 0.03
    epochs: PositiveFloat = 1.0
    max_steps: PositiveInt | None = None
    """Number of optimizer steps, which the schedule covers; null: `epochs` determines it."""
    max_grad_norm: NonNegativeFloat = 0.0
    """Clip gradients to this norm; 0: do not clip, as in the released training."""


@dataclass(frozen=True)
class RuntimeSettings:
    """Device, precision and sharding."""

    deepspeed: str | None = None
    """DeepSpeed JSON file; null: plain PyTorch (one process, or data parallel)."""
    precision: Literal["bf16", "fp16", "fp32"] = "bf16"
    tf32: bool = True
    device: Literal["auto", "cpu"] = "auto"
    gradient_checkpointing: bool = True
    """Recompute activations of vision tower and language model in the backward pass: less memory, more time."""
    compile: bool = False
    """Compile the layers of vision tower and language model; needs a compiler, not available under ZeRO-3."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] | None = None
    """Attention kernel of the language model; null: transformers' default."""


@dataclass(frozen=True)
class LoggingSettings:
    """Logging, in addition to `log_history.jsonl` in the output folder."""

    every: PositiveInt = 1
    """Optimizer steps between two lines of the log."""
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = ("tensorboard",)
    run_name: str | None = None
    peak_tflops: PositiveFloat | None = None
    """Peak of one device in the run's precision, in 10^12 operations per second, for the MFU; null: the published value
    of the GPU, or no MFU if it is not known."""
    progress_bar: bool = True


@dataclass(frozen=True)
class OutputSettings:
    """Output folder and checkpoints."""

    dir: str
    """Folder of the run: checkpoints while it trains, the stage's model at the end."""
    save_every: NonNegativeInt = 0
    """Optimizer steps between two checkpoints, from which a killed run continues; 0: no checkpoints."""
    keep: PositiveInt = 1
    """Checkpoints to keep while training."""
    overwrite: bool = False
    """Discard an earlier run in the folder and train from the beginning."""


@dataclass(frozen=True)
class TrainConfig:
    """Configuration of a run of one stage."""

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
        for section in fields(self):  # for configurations that are built in Python, not by `load_config`
            value = getattr(self, section.name)
            if is_dataclass(value):
                build(type(value), to_jsonable_python(value), section.name)
        if self.data.template is not None:
            find_entry(TEMPLATES, self.data.template, "data.template")
        _check_model(self)
        _check_lora(self)
        _check_objective(self)
        _check_ranges(self)

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per optimizer step and process that make up the global batch size."""
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
        """Fields of the model's configuration that stage 1 sets; those that are null keep the model's default."""
        model = to_jsonable_python(self.model)
        fields = {name: model[name] for name in ("granularities", "pooling_ladder", "behavior", "image_grid_pinpoints")}
        fields |= {"router_config": model["router"], "max_sequence_length": model["max_length"]}
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def objective_name(self) -> str:
        """The entry of `OBJECTIVES` that the run trains: `objective.method`, or the stage's default."""
        method = self.objective.method
        return STAGES[self.stage].objective if method == DEFAULT_METHOD else method

    @property
    def passes(self) -> Passes:
        """Passes of the run's objective; with stored feedback, without the language model."""
        passes = OBJECTIVES[self.objective_name].passes
        return passes if self.objective.feedback_store is None else passes.without_language_model()

    def to_dict(self) -> dict[str, Any]:
        """Dicts, lists and scalars, as in YAML and JSON."""
        return to_jsonable_python(self)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False)


# Architecture fields that later stages may change; both require a new router.
CHANGEABLE_LATER = {3: ("granularities",), 4: ("granularities", "router")}


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a stage's YAML file and applies `--key.subkey value` overrides.

    Raises:
        ConfigError: unreadable file, unknown key, value of the wrong type, or values that contradict one another.
    """
    overrides = ["--model.force_start" if argument == "--force-start" else argument for argument in overrides]
    return build(
        TrainConfig, with_list_from_file(apply_overrides(read_yaml(path), overrides, TrainConfig), "data.sources")
    )


def _check_model(config: TrainConfig) -> None:
    model = config.model
    if model.projector is not None and config.stage == 4:
        raise ConfigError("model.projector is for stages 1 to 3; stage 4 keeps the projector of model.start")
    if config.stage == 1:
        if model.vision is None or model.language is None or model.start is not None:
            raise ConfigError("stage 1 starts from model.vision and model.language (and has no model.start)")
        return
    if config.stage == 2 and None not in (model.projector, model.vision, model.language) and model.start is None:
        return
    if model.start is None or model.vision is not None or model.language is not None:
        raise ConfigError(
            f"stage {config.stage} starts from model.start, the folder of stage {config.stage - 1} (and has neither "
            "model.vision nor model.language; stage 2 may start from these with model.projector)"
        )
    for name in ("granularities", "pooling_ladder", "behavior", "image_grid_pinpoints", "router"):
        if getattr(model, name) is not None and name not in CHANGEABLE_LATER.get(config.stage, ()):
            raise ConfigError(f"model.{name} is decided in stage 1; stage {config.stage} takes it from model.start")


def _check_lora(config: TrainConfig) -> None:
    lora = config.lora
    if lora is None:
        if config.optim.lora_lr is not None:
            raise ConfigError("optim.lora_lr is for runs with a section lora")
        return
    if config.model.start is None and config.stage > 1:
        raise ConfigError("lora needs model.start; a stage 2 from model.vision and model.language is trained whole")
    if "llm" not in STAGES[config.stage].trains:
        raise ConfigError(f"lora is for stages 2 and 3, which train the language model; stage {config.stage} does not")
    if lora.rank < 1 or not lora.alpha > 0 or not 0 <= lora.dropout < 1:
        raise ConfigError(
            "lora.rank must be at least 1, lora.alpha above 0 and lora.dropout at least 0 and below 1; got "
            f"{lora.rank}, {lora.alpha} and {lora.dropout}"
        )


def _check_objective(config: TrainConfig) -> None:
    method = config.objective.method
    if method != DEFAULT_METHOD:
        methods = [DEFAULT_METHOD, *(name for name, spec in OBJECTIVES.items() if spec.stages)]
        find_entry(dict.fromkeys(methods), method, "objective.method")
        stages = OBJECTIVES[method].stages
        if config.stage not in stages:
            raise ConfigError(
                f"objective.method {method} is for stage {', '.join(map(str, stages))}; this is stage {config.stage}"
            )
    if config.objective.feedback_store is None or OBJECTIVES[config.objective_name].learns_from_feedback:
        return
    if method == DEFAULT_METHOD:
        raise ConfigError(
            f"objective.feedback_store is for stage 4, which trains the router; this is stage {config.stage}"
        )
    raise ConfigError(
        f"objective.method {method} does not learn from feedback, so there is nothing to store; set "
        "objective.feedback_store to null"
    )


def _check_ranges(config: TrainConfig) -> None:
    optim = config.optim
    if optim.warmup_ratio >= 1:
        raise ConfigError(f"optim.warmup_ratio must be below 1, a share of all steps; got {optim.warmup_ratio}")
    if len(optim.betas) != 2:
        raise ConfigError(f"optim.betas must be a list of two numbers, got {list(optim.betas)}")
    if not config.data.sources:
        raise ConfigError("data.sources is empty: name at least one file")
    if any(len(pair) != 2 for pair in config.model.image_grid_pinpoints or ()):
        raise ConfigError("model.image_grid_pinpoints must be a list of [height, width]")

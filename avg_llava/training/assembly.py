"""Builds the components of a run from its configuration: model, processor, data set, collator and sampler.

Feedback, estimates, `verify-data` and the dry run use the same functions.
"""

import importlib.util
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from avg_llava.checkpoints.backbones import config_from_backbones, join_backbones
from avg_llava.checkpoints.checkpoint import ROUTER_KEYS, Checkpoint
from avg_llava.checkpoints.formats import open_checkpoint
from avg_llava.checkpoints.loading import (
    build_from_backbones,
    load,
    load_model_config,
    open_processor,
    processor_of_backbones,
)
from avg_llava.checkpoints.parts import with_projector
from avg_llava.checkpoints.quantization import check_available, freeze_in_4bit
from avg_llava.checkpoints.routing_model import load_routing_model
from avg_llava.common.settings import ConfigError
from avg_llava.data.collator import Collator
from avg_llava.data.dataset import ConversationDataset, DataSource
from avg_llava.data.sampler import MicroBatches, ModalityBatches, ShuffledBatches
from avg_llava.data.skip_list import read_skip_list
from avg_llava.data.token_lengths import token_lengths
from avg_llava.model.configuration import AvgLlavaConfig, RouterConfig
from avg_llava.model.language import language_parts
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.processing import AvgLlavaProcessor
from avg_llava.model.router import find_router
from avg_llava.model.templates import TEMPLATES, template_of_text
from avg_llava.training.config import ModelSettings, TrainConfig
from avg_llava.training.feedback_store import FeedbackCollator, FeedbackStore, describe
from avg_llava.training.lora import add_adapters
from avg_llava.training.processes import device_of, rank, world_size
from avg_llava.training.stages import STAGES, set_trainable


def build_model(config: TrainConfig) -> tuple[AvgLlavaForConditionalGeneration, AvgLlavaProcessor]:
    """The model that the stage starts from, in the run's precision and with LoRA adapters, and its processor.

    A router that is trained is float32 in any precision. Every process loads the whole model into host memory, from
    where DeepSpeed takes its shard.
    """
    dtype, settings = weights_dtype(config), config.model
    if settings.start is not None:
        if config.objective.feedback_store is None:
            model, processor = load(settings.start, projector=settings.projector, dtype=dtype)
        else:
            model = load_routing_model(settings.start, dtype=dtype)
            processor = open_processor(settings.start, model.config)
        adapt(model.config, settings)
        is_new = settings.router is not None or settings.granularities is not None
        if is_new or ROUTER_KEYS in open_checkpoint(settings.start).fresh:
            set_seed(config.seed)  # the same router in any way of loading the model
            model.model.router = find_router(model.config)(model.config).to(model.dtype)
    else:
        assert settings.vision is not None, "checked by TrainConfig"
        assert settings.language is not None, "checked by TrainConfig"
        model = build_from_backbones(
            settings.vision, settings.language, projector=settings.projector, dtype=dtype, **config.architecture()
        )
        processor = processor_of_backbones(settings.vision, settings.language, model.config)
    if "router" in STAGES[config.stage].trains:
        model.model.router.float()
    if config.runtime.attention is not None:
        model.set_attn_implementation({"text_config": config.runtime.attention})
    if config.lora is not None:
        if config.lora.quantization is not None:
            freeze_in_4bit(model, dtype, device_of(config))
        add_adapters(model, config.lora, config.seed)
        if config.lora.quantization is not None and config.runtime.deepspeed is None:
            set_trainable(model, STAGES[config.stage])
            for parameter in filter(lambda parameter: parameter.requires_grad, model.parameters()):
                parameter.data = parameter.data.float()
    template = choose_template(config, processor, model.config)
    if not TEMPLATES[template].is_for_captions:  # saved with the model: prompts are as in training
        processor.use_template(template, model.config)
        processor.end_answers(model.generation_config)
    return model, processor


def choose_template(config: TrainConfig, processor: AvgLlavaProcessor, model_config: AvgLlavaConfig) -> str:
    """The entry of `TEMPLATES` that samples are rendered with: `data.template`, else the start's.

    Raises:
        ConfigError: The start was trained with another template, or none is given and none known.
    """
    wanted, trained = config.data.template, model_config.template
    if wanted is None:
        if STAGES[config.stage].parent is None:
            return "plain"
        if trained is not None:
            return trained
        if processor.chat_template is not None:
            return template_of_text(processor.chat_template)
        raise ConfigError(
            "data.template: model.start brings no chat template along, and the family of its language model is not "
            f"known; choose one of {', '.join(TEMPLATES)}"
        )
    if trained in (None, wanted) or TEMPLATES[wanted].is_for_captions or config.data.force_template:
        return wanted
    raise ConfigError(
        f"data.template is {wanted}, but model.start was trained with {trained}; leave data.template out to go on with "
        f"{trained}, or set data.force_template to teach it {wanted}"
    )


def start_checkpoint(config: TrainConfig) -> Checkpoint:
    """The checkpoint or the backbones that the run starts from, not read yet."""
    settings = config.model
    if settings.start is not None:
        checkpoint = open_checkpoint(settings.start)
    else:
        assert settings.vision is not None, "checked by TrainConfig"
        assert settings.language is not None, "checked by TrainConfig"
        checkpoint = join_backbones(settings.vision, settings.language, **config.architecture())
    return checkpoint if settings.projector is None else with_projector(checkpoint, settings.projector)


def weights_dtype(config: TrainConfig) -> torch.dtype:
    """Data type in which a run loads its start: its precision, or float32 where autocast needs it.

    DeepSpeed keeps float32 copies of what it trains. Without it the trained weights are float32 themselves; the others
    too, unless the stage trains only the router or a quantised model's adapters, which are widened after loading.
    """
    quantizes = config.lora is not None and config.lora.quantization is not None
    if config.runtime.deepspeed is None and STAGES[config.stage].trains != ("router",) and not quantizes:
        return torch.float32
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.runtime.precision]


def check_quantization(deepspeed: Mapping[str, Any] | None, config: TrainConfig) -> None:
    """Refuses `lora.quantization` under ZeRO-3 and without bitsandbytes; `deepspeed` is the parsed DeepSpeed file."""
    if config.lora is None or config.lora.quantization is None:
        return
    if deepspeed is not None and deepspeed.get("zero_optimization", {}).get("stage") == 3:
        raise ConfigError(
            f"lora.quantization: ZeRO-3 ({config.runtime.deepspeed}) cannot shard 4-bit weights; set runtime.deepspeed "
            "to null (one process) or to configs/deepspeed/zero2.json, or lora.quantization to null"
        )
    try:
        check_available(config.lora.quantization, device_of(config))
    except ValueError as error:
        raise ConfigError(f"lora.quantization: {error}") from error


def check_compilation(deepspeed: Mapping[str, Any] | None, use_cpu: bool) -> None:
    """Refuses `runtime.compile` under ZeRO-3 and without a compiler; `deepspeed` is the parsed DeepSpeed file."""
    if deepspeed is not None and deepspeed.get("zero_optimization", {}).get("stage") == 3:
        raise ConfigError(
            "runtime.compile: under ZeRO-3, where weights come and go, layers are compiled over and over; choose "
            "configs/deepspeed/zero2.json, or set it to false"
        )
    if use_cpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ConfigError(
            "runtime.compile needs a C++ compiler on a CPU (g++, or the one that CXX names); install one, or set it to "
            "false"
        )
    if not use_cpu and importlib.util.find_spec("triton") is None:
        raise ConfigError("runtime.compile needs triton on a GPU; install it, or set it to false")


def compile_layers(model: AvgLlavaForConditionalGeneration) -> None:
    """Compiles each layer of vision tower and language model in place, at its first call; parameter names stay.

    Layers are compiled one by one: those of a part are alike and share one compilation. Off by default: on a CPU,
    compilation takes half a minute and makes no step faster. Losses and gradients are equal up to rounding.
    """
    layers = language_parts(model.config.text_config).layers
    for layer in (
        *model.config.tower.layers(model.model.vision_tower),
        *model.model.language_model.get_submodule(layers),
    ):
        layer.compile()


def load_processor(config: TrainConfig) -> tuple[AvgLlavaProcessor, AvgLlavaConfig]:
    """Processor and configuration of the model that the stage starts from, without its weights."""
    settings = config.model
    if settings.start is None:
        assert settings.vision is not None, "checked by TrainConfig"
        assert settings.language is not None, "checked by TrainConfig"
        model_config = config_from_backbones(settings.vision, settings.language, **config.architecture())
        return processor_of_backbones(settings.vision, settings.language, model_config), model_config
    model_config = load_model_config(settings.start)
    adapt(model_config, settings)
    return open_processor(settings.start, model_config), model_config


def adapt(model_config: AvgLlavaConfig, settings: ModelSettings) -> None:
    """Applies settings to the configuration of a start, in place.

    Raises:
        ConfigError: the settings name levels that the start was not trained for.
    """
    if settings.max_length is not None:
        model_config.max_sequence_length = settings.max_length
    if settings.router is not None:
        model_config.router_config = RouterConfig(**asdict(settings.router))
    if settings.granularities is not None:
        known, wanted = model_config.granularities, list(settings.granularities)
        # Samples are truncated at the finest level, so without it the samples would change.
        if wanted != [level for level in known if level in wanted] or known[-1] not in wanted:
            raise ConfigError(
                f"model.granularities {wanted} must be some of the levels of model.start, {known}, in this order and "
                "with the finest among them"
            )
        model_config.granularities = wanted
    find_router(model_config).check_config(model_config)


def build_collator(
    config: TrainConfig, processor: AvgLlavaProcessor, dataset: ConversationDataset
) -> Collator | FeedbackCollator:
    """The collator, which adds stored feedback if the run has a store."""
    collator = Collator(pad_token_id=processor.tokenizer.pad_token_id)
    if config.objective.feedback_store is None:
        return collator
    store = FeedbackStore.open(config.objective.feedback_store)
    if rank() == 0:  # reads all weights
        assert config.model.start is not None, "checked by TrainConfig"
        store.check(describe(config.model.start, dataset, config.runtime.precision))
    return FeedbackCollator(collator, *store.answers(dataset))


def build_dataset(
    config: TrainConfig, processor: AvgLlavaProcessor, model_config: AvgLlavaConfig
) -> ConversationDataset:
    """The samples of `data.sources`."""
    sources = [
        DataSource(source.path, source.image_root, source.sampling, source.weight, source.follow_links)
        for source in config.data.sources
    ]
    return ConversationDataset(
        sources,
        processor,
        choose_template(config, processor, model_config),
        model_config,
        on_bad_sample=config.data.on_bad_sample,
        seed=config.seed,
        skip_list=None if config.data.skip_list is None else read_skip_list(config.data.skip_list),
        index_dir=config.data.index_dir,
    )


def finished_dataset(config: TrainConfig) -> ConversationDataset:
    """The samples of `data.sources` as they are now, read with the processor that a finished run saved."""
    model_config = AvgLlavaConfig.from_pretrained(config.output.dir)
    processor = AvgLlavaProcessor.from_checkpoint(config.output.dir, model_config)
    return build_dataset(config, processor, model_config)


def build_sampler(config: TrainConfig, dataset: ConversationDataset) -> MicroBatches:
    """The micro-batches in order. With a token budget, the lengths of all samples are measured once."""
    tokens = None
    if config.optim.max_tokens_per_batch is not None:
        tokens = token_lengths(dataset, Path(config.output.dir), rank(), config.data.num_workers)
    arguments: dict[str, Any] = {
        "capacity": config.optim.max_tokens_per_batch or config.optim.micro_batch_size,
        "world_size": world_size(),
        "accumulation_steps": config.accumulation_steps(world_size()),
        "seed": config.seed,
        "tokens": tokens,
    }
    if config.data.group_by_modality_length:
        return ModalityBatches(dataset.modality_lengths.tolist(), **arguments)
    return ShuffledBatches(len(dataset), **arguments)

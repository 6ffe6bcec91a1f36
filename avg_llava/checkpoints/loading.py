"""Loads models from checkpoints of all layouts, and builds them from backbones."""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import GENERATION_CONFIG_NAME, is_flash_attn_2_available

from avg_llava.checkpoints.backbones import join_backbones
from avg_llava.checkpoints.checkpoint import ROUTER_KEYS, Checkpoint
from avg_llava.checkpoints.fit import check_fit, empty_model, misfit, misfit_lines
from avg_llava.checkpoints.formats import open_checkpoint
from avg_llava.checkpoints.generation_config import read_generation_config
from avg_llava.checkpoints.parts import with_projector
from avg_llava.checkpoints.processors import check_processor
from avg_llava.checkpoints.quantization import Quantization, compute_in, quantization_arguments
from avg_llava.checkpoints.reading import read_weights
from avg_llava.checkpoints.stored_tensor import WEIGHT_DTYPES
from avg_llava.checkpoints.tokenizers import check_vocabulary, reading_tokenizer
from avg_llava.checkpoints.weight_files import CheckpointError, StoredTensor, resolve_folder
from avg_llava.model.configuration import AvgLlavaConfig, Behavior
from avg_llava.model.language import language_parts
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.processing import AvgLlavaProcessor

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT", bound=PreTrainedModel)


def load(
    path: str | Path, *, template: str | None = None, **kwargs: Any
) -> tuple[AvgLlavaForConditionalGeneration, AvgLlavaProcessor]:
    """Loads a model and its processor; further arguments as for :func:`load_model`.

    Args:
        template: A key of :data:`avg_llava.model.templates.TEMPLATES` for a model whose conversation template is not
            known. None takes the checkpoint's: its own chat template, else that of its family.

    Raises:
        ValueError: The model was trained with another template.
    """
    model = load_model(path, **kwargs)
    processor = open_processor(path, model.config)
    if template is not None:
        trained = model.config.template
        if trained not in (None, template) and processor.chat_template is not None:
            raise ValueError(f"{path} was trained with the template {trained!r}, not {template!r}")
        processor.use_template(template, model.config)
    processor.end_answers(model.generation_config)
    return model, processor


def open_processor(source: str | Path | Checkpoint, config: AvgLlavaConfig) -> AvgLlavaProcessor:
    """The processor of a checkpoint of any layout; `config` is that of its model.

    This package saves one. Other layouts have a tokenizer and the pixel statistics of the vision tower, perhaps in
    other folders than the weights; the rest is taken from `config`.
    """
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    assert checkpoint.tokenizer is not None, "set by every layout"
    with reading_tokenizer(checkpoint.tokenizer):
        if checkpoint.tokenizer == checkpoint.image_settings:
            processor = AvgLlavaProcessor.from_checkpoint(checkpoint.tokenizer, config)
        else:
            processor = AvgLlavaProcessor.from_backbones(checkpoint.image_settings, checkpoint.tokenizer, config)
    _fit_tokenizer(processor, config, checkpoint.tokenizer)
    check_processor(processor, config, checkpoint.image_settings or checkpoint.tokenizer)
    return processor


def processor_of_backbones(
    vision_path: str | Path, language_path: str | Path, config: AvgLlavaConfig
) -> AvgLlavaProcessor:
    """The processor of a model of two backbones; arguments as for `AvgLlavaProcessor.from_backbones`."""
    folder = resolve_folder(language_path)
    with reading_tokenizer(folder):
        processor = AvgLlavaProcessor.from_backbones(vision_path, folder, config)
    _fit_tokenizer(processor, config, folder)
    return processor


def _fit_tokenizer(processor: AvgLlavaProcessor, config: AvgLlavaConfig, folder: Path) -> None:
    """Tells a processor which tokens its model embeds, and checks that its tokenizer, from `folder`, gives these."""
    processor.num_embeddings = config.text_config.vocab_size
    check_vocabulary(processor.tokenizer, processor.num_embeddings, folder)


def load_model(
    path: str | Path,
    *,
    behavior: Behavior | None = None,
    projector: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    quantization: Quantization | None = None,
    static_cache: bool = False,
) -> AvgLlavaForConditionalGeneration:
    """Loads a model in evaluation mode from a folder or hub id; no tokenizer is needed.

    Takes folders of all layouts in `docs/checkpoints.md`; a router that they lack is initialised. Attention is
    FlashAttention on a GPU in half precision if flash-attn is installed, else SDPA.

    Args:
        path: Folder or hub id.
        behavior: "paper" or "released"; None takes the checkpoint's. Original-format files with a router were trained
            as "released"; all else defaults to "paper".
        projector: File of another projector, such as the `mm_projector.bin` of a stage 1 of the original code.
        dtype: Data type of the weights; None keeps the checkpoint's.
        device: None is the CPU.
        quantization: "8bit" or "4bit" for the language model's blocks; see :mod:`avg_llava.checkpoints.quantization`.
        static_cache: Generate with a key-value cache of fixed size, for which transformers compiles the decoding step
            on a GPU. Compilation takes minutes; answers are the same.

    Raises:
        CheckpointError: Keys are missing, unexpected or of the wrong shape; all are listed.
        ValueError: The folder is of no known layout, or the weights cannot be quantised here.
    """
    quantizing = {} if quantization is None else quantization_arguments(quantization, device)
    checkpoint = open_checkpoint(path, behavior)
    if projector is not None:
        checkpoint = with_projector(checkpoint, projector)
    model = instantiate(AvgLlavaForConditionalGeneration, checkpoint, dtype, **quantizing)
    if os.environ.get("RANK", "0") == "0":
        for note in checkpoint.notes:
            logger.warning("%s: %s", path, note)
        if ROUTER_KEYS in checkpoint.fresh:
            logger.warning(
                "model.router.* is not in %s: a new router is initialised; train it in stage 4, or force a level "
                "(granularity)",
                path,
            )
    if quantization is not None:
        compute_in(model, model.dtype)
    elif device is not None:
        model = model.to(device)
    attention = pick_attention(model.device, model.dtype, is_flash_attn_2_available())
    if attention != "sdpa":  # the default of transformers
        model.set_attn_implementation({"text_config": attention, "vision_config": attention})
    if static_cache:
        model.generation_config.cache_implementation = "static"
    return model


def pick_attention(device: torch.device, dtype: torch.dtype, flash_installed: bool) -> str:
    """Name of the fastest attention implementation available; FlashAttention needs a GPU and half precision."""
    half = dtype in (torch.bfloat16, torch.float16)
    return "flash_attention_2" if flash_installed and device.type == "cuda" and half else "sdpa"


def load_model_config(path: str | Path) -> AvgLlavaConfig:
    """The configuration of the model that :func:`load_model` loads, without its weights."""
    return open_checkpoint(path).config


def build_from_backbones(
    vision_path: str | Path,
    language_path: str | Path,
    *,
    projector: str | Path | None = None,
    dtype: torch.dtype | str | None = None,
    **config_fields: Any,
) -> AvgLlavaForConditionalGeneration:
    """Builds the start of stage 1: a vision tower and a causal LM, with fresh projector, newline and router.

    Args:
        vision_path: Folder or hub id of a tower or a model that has one, or `open_clip:...`; see `docs/backbones.md`.
        language_path: Folder or hub id of a causal language model.
        projector: File of a projector, as for :func:`load_model`; None: a fresh one.
        dtype: Data type of the weights; None keeps the language model's.
        **config_fields: Further fields of :class:`AvgLlavaConfig`, such as `granularities` or `behavior`.
    """
    checkpoint = join_backbones(vision_path, language_path, **config_fields)
    if projector is not None:
        checkpoint = with_projector(checkpoint, projector)
    return instantiate(AvgLlavaForConditionalGeneration, checkpoint, dtype)


def instantiate(
    model_class: type[ModelT],
    checkpoint: Checkpoint,
    dtype: torch.dtype | str | None = None,
    *,
    read: Callable[[Path], Mapping[str, Tensor]] | None = None,
    **kwargs: Any,
) -> ModelT:
    """Builds a model with the weights of a checkpoint, in evaluation mode.

    Args:
        model_class: The model, or a part of it that ignores other weights.
        checkpoint: Its weights and configuration.
        dtype: Data type of the weights; None keeps the checkpoint's.
        read: Gives the tensors of a folder; None reads its files.
        **kwargs: Passed on to `from_pretrained`.

    Raises:
        CheckpointError: Keys are missing, unexpected or of the wrong shape; all are listed.
    """
    wanted = _data_type(dtype)
    if read is not None:
        tensors = checkpoint.tensors(read)
        empty_model(model_class, checkpoint, len(tensors))
    else:
        stored = checkpoint.stored()
        empty = empty_model(model_class, checkpoint, len(stored))
        ignored = model_class._keys_to_ignore_on_load_unexpected or ()
        for name in [name for name in stored if any(re.search(pattern, name) for pattern in ignored)]:
            del stored[name]
        check_fit(empty, stored, checkpoint)
        wanted = wanted or _own_data_type(checkpoint, stored)
        # Quantisation and ZeRO-3 take whole tensors one by one, and cast what they keep.
        casts_itself = "quantization_config" in kwargs or is_deepspeed_zero3_enabled()
        tensors = read_weights(stored, checkpoint.name, None if casts_itself else wanted)
    with _without_load_report():
        model, info = model_class.from_pretrained(
            None,
            config=checkpoint.config,
            dtype=wanted or "auto",
            state_dict=tensors,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
    _check_loaded(info, checkpoint.name, checkpoint.fresh)
    if read is None and checkpoint.folder is not None and (checkpoint.folder / GENERATION_CONFIG_NAME).is_file():
        file = checkpoint.folder / GENERATION_CONFIG_NAME
        model.generation_config = read_generation_config(file, checkpoint.config.text_config.vocab_size)
    return model.eval()


def _own_data_type(checkpoint: Checkpoint, stored: Mapping[str, StoredTensor]) -> torch.dtype | None:
    """The data type in a checkpoint's configuration, else of its first weight; of backbones, of the language model."""
    try:
        written = _data_type(checkpoint.config.dtype)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.name}: config.json: {error}") from error
    if written is not None:
        return written
    if checkpoint.folder is None:  # of backbones
        embeddings = f"model.language_model.{language_parts(checkpoint.config.text_config).embeddings}.weight"
        return stored[embeddings].dtype if embeddings in stored else None
    found = list(dict.fromkeys(tensor.dtype for tensor in stored.values() if tensor.dtype in WEIGHT_DTYPES))
    if len(found) > 1:
        logger.warning(
            "%s: config.json names no dtype and the weights are of %s; all become %s, that of the first, as in "
            "transformers. Give a dtype for another",
            checkpoint.name,
            " and ".join(str(dtype) for dtype in found),
            found[0],
        )
    return found[0] if found else None


def _data_type(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A data type by its name in PyTorch; None, and "auto", stand for the checkpoint's."""
    if dtype in (None, "auto"):
        return None
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in WEIGHT_DTYPES:
        names = ", ".join(str(each).removeprefix("torch.") for each in WEIGHT_DTYPES)
        raise ValueError(f"dtype is one of {names}, or 'auto', not {dtype!r}")
    return found


def _check_loaded(info: Mapping[str, Any], source: str, fresh: tuple[str, ...]) -> None:
    """Raises one error that lists all problems of transformers' loading report; `fresh` prefixes may be missing."""
    missing = [key for key in info["missing_keys"] if not key.startswith(fresh)]
    if problems := misfit_lines(missing, info["unexpected_keys"], info["mismatched_keys"]):
        raise misfit(source, problems)


@contextlib.contextmanager
def _without_load_report() -> Iterator[None]:
    """Drops transformers' table of missing keys, which the error replaces, unless it explains an error."""

    def is_kept(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage() or "CONVERSION" in record.getMessage()

    reporter = logging.getLogger("transformers.modeling_utils")
    reporter.addFilter(is_kept)
    try:
        yield
    finally:
        reporter.removeFilter(is_kept)

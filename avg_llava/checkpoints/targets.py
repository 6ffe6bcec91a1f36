"""Layouts that a model can be written in: names of weights, vocabulary, configuration, tokenizer and processor files.

To add one, add a function that describes it as an :class:`OutputLayout` to :data:`TARGETS`.
"""

import copy
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AddedToken, GenerationConfig, LlavaNextConfig
from transformers.image_utils import OPENAI_CLIP_MEAN

from avg_llava.checkpoints.checkpoint import ROUTER_KEYS, Renaming, invert
from avg_llava.checkpoints.formats import TRANSFORMERS_KEYS
from avg_llava.checkpoints.original import KNOWN_TOWERS, ORIGINAL_KEYS, TEXT_NAMES, TEXT_TYPES
from avg_llava.common.files import write_bytes, write_json
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.language import language_parts
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration
from avg_llava.model.processing import AvgLlavaProcessor
from avg_llava.model.saving import CONFIG_NAME
from avg_llava.model.templates import IMAGE_PLACEHOLDER

Target = Literal["avg", "original", "llava-next"]

GENERATION_CONFIG = "generation_config.json"
IMAGE_SETTINGS = "preprocessor_config.json"
SENTENCEPIECE = "tokenizer.model"
TOWER_FOLDER = "vision_tower"
TOWER_KEYS = "model.vision_tower."
ROW_MULTIPLE = 64
"""A vocabulary that grows does so to a multiple of this many rows, as in the published checkpoints."""


@dataclass(frozen=True)
class Model:
    """A model to write, without its weights.

    Attributes:
        folder: Folder of its configuration.
        tokenizer: Folder of its tokenizer.
        config: Its configuration.
        processor: Its processor; None if the folder has no tokenizer.
        has_router: The folder has a router's weights.
    """

    folder: Path
    tokenizer: Path
    config: AvgLlavaConfig
    processor: AvgLlavaProcessor | None
    has_router: bool


@dataclass(frozen=True)
class OutputLayout:
    """A layout for one model.

    Attributes:
        keys: Renaming of this package's names to the layout's.
        vocabulary_size: Rows of the embeddings and of the head.
        write: Writes all files but the weights into a folder, for weights of a data type.
        dropped: Prefixes of this package's names that the layout does not hold, with the reasons.
        notes: Differences from the source that the user should know.
        tower_folder: Subfolder that gets the vision tower's weights once more, or None.
    """

    keys: Renaming
    vocabulary_size: int
    write: Callable[[Path, torch.dtype], None]
    dropped: Mapping[str, str]
    notes: tuple[str, ...] = ()
    tower_folder: str | None = None


def avg(model: Model) -> OutputLayout:
    """This package's own layout."""

    def write(folder: Path, dtype: torch.dtype) -> None:
        config = copy.deepcopy(model.config)
        config.dtype = dtype
        config.architectures = [AvgLlavaForConditionalGeneration.__name__]
        if model.processor is not None:
            model.processor.save_pretrained(folder)
            _copy(model.tokenizer / SENTENCEPIECE, folder)
        _write_generation_config(model, folder)
        config.save_pretrained(folder)
        if not model.has_router:
            fields = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
            write_json(folder / CONFIG_NAME, fields | {"router_config": None}, sort_keys=True)

    notes = () if model.has_router else ("the source has no router; loading the output initialises a new one",)
    return OutputLayout([], model.config.text_config.vocab_size, write, {}, notes)


def original(model: Model) -> OutputLayout:
    """The layout of the code that LLaVA-NeXT and AVG-LLaVA were published with."""
    config = model.config
    text, vision, router = config.text_config, config.vision_config, config.router_config
    _require(
        "original",
        {
            f"a language model of type {text.model_type!r}": text.model_type not in TEXT_TYPES.values(),
            f"a vision tower of type {vision.model_type!r}": vision.model_type != "clip_vision_model",
            f"the pooling ladder {config.pooling_ladder!r}": config.pooling_ladder != "width_first",
        },
    )
    keeps_router = model.has_router and config.behavior == "released"
    if keeps_router:
        sizes = (router.kind, router.num_attention_heads, router.intermediate_size or text.hidden_size)
        _require("original", {f"a router of this form: {sizes}": sizes != ("transformer", 8, text.hidden_size)})
    notes = []
    dropped = {}
    if not keeps_router:
        dropped[ROUTER_KEYS] = "the original code's router works differently (behavior: released)"
        if model.has_router:
            notes.append("the output is a LLaVA-NeXT without router: the original code only knows behavior 'released'")
    rows = min(config.image_token_id, text.vocab_size)
    if model.processor is not None:
        tokenizer = model.processor.tokenizer
        kept = {IMAGE_PLACEHOLDER, tokenizer.pad_token}
        if beyond := {token for token, index in tokenizer.get_vocab().items() if index >= rows} - kept:
            raise ValueError(
                f"--to original: the tokens {sorted(beyond)} come after the image placeholder {config.image_token_id}, "
                "from which on the vocabulary is cut; the original code has no placeholder in the vocabulary"
            )
    is_known = _known_tower(model) is not None
    if not is_known:
        notes.append(f"the original code finds the vision tower in {TOWER_FOLDER} if it runs in the output folder")

    def write(folder: Path, dtype: torch.dtype) -> None:
        if model.processor is not None:
            has_model_file = (model.tokenizer / SENTENCEPIECE).is_file()
            _save_tokenizer(model, folder, "LlamaTokenizer" if has_model_file else "PreTrainedTokenizerFast", rows)
            _copy(model.tokenizer / SENTENCEPIECE, folder)
        if not is_known:
            (folder / TOWER_FOLDER).mkdir(exist_ok=True)
            vision.save_pretrained(folder / TOWER_FOLDER)
            write_json(folder / TOWER_FOLDER / IMAGE_SETTINGS, _pixel_settings(model, "CLIPImageProcessor"))
        _write_generation_config(model, folder)
        write_json(folder / CONFIG_NAME, original_config(model, rows, dtype, keeps_router), sort_keys=True)

    return OutputLayout(
        invert(ORIGINAL_KEYS), rows, write, dropped, tuple(notes), tower_folder=None if is_known else TOWER_FOLDER
    )


def llava_next(model: Model) -> OutputLayout:
    """Transformers' LLaVA-NeXT, which uses the finest level, with the key names of the published folders."""
    config = model.config
    finest, parts = config.num_patches_per_side**2, language_parts(config.text_config)
    _require(
        "llava-next",
        {
            f"a vision tower of type {config.vision_config.model_type!r}": config.vision_config.model_type
            != "clip_vision_model",
            f"a language model of type {config.text_config.model_type!r}": (parts.base, parts.embeddings, parts.head)
            != ("model", "embed_tokens", "lm_head"),
            "a language model with a bias or a soft cap of its logits": parts.head_bias or parts.softcap is not None,
            f"the finest level {config.granularities[-1]}, as it always uses {finest} tokens per crop": (
                config.granularities[-1] != finest
            ),
        },
    )
    rows = config.text_config.vocab_size
    vocabulary: dict[str, int] = {} if model.processor is None else model.processor.tokenizer.get_vocab()
    image_id: Any = vocabulary.get(IMAGE_PLACEHOLDER, len(vocabulary) or config.image_token_id)
    if image_id >= rows:
        rows = -(-(image_id + 1) // ROW_MULTIPLE) * ROW_MULTIPLE
    notes = []
    if config.behavior == "released":
        notes.append(
            "transformers rounds the padding of an image otherwise than the released code: a few image sizes (1408x792 "
            "for one) keep up to two more rows or columns of tokens"
        )
    if model.processor is None:
        notes.append("the source has no tokenizer, so the output has neither tokenizer nor processor")

    def write(folder: Path, dtype: torch.dtype) -> None:
        if model.processor is not None:
            _save_llava_next_processor(model, folder, image_id)
        _write_generation_config(model, folder)
        write_json(folder / CONFIG_NAME, llava_next_config(model, rows, image_id, dtype), sort_keys=True)

    return OutputLayout(invert(TRANSFORMERS_KEYS), rows, write, {ROUTER_KEYS: "LLaVA-NeXT has no router"}, tuple(notes))


TARGETS: dict[Target, Callable[[Model], OutputLayout]] = {"avg": avg, "original": original, "llava-next": llava_next}
"""Layouts by name, the value of `avg-llava convert --to`."""


def original_config(model: Model, vocabulary_size: int, dtype: torch.dtype, has_router: bool) -> dict[str, Any]:
    """The flat `config.json` of the original code; its pinpoints are (width, height)."""
    config = model.config
    text_type = config.text_config.model_type
    (architecture,) = [name for name, known in TEXT_TYPES.items() if known == text_type]
    (text_name,) = [name for name, known in TEXT_NAMES.items() if known == text_type]
    fields = _fields(config, "text_config") | {
        "architectures": [architecture],
        "model_type": f"llava_{text_name}",
        "vocab_size": vocabulary_size,
        "torch_dtype": _name(dtype),
        "tie_word_embeddings": config.tie_word_embeddings,
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": [[width, height] for height, width in config.image_grid_pinpoints],
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_tower": _known_tower(model) or TOWER_FOLDER,
        "tokenizer_model_max_length": config.max_sequence_length,
        "tokenizer_padding_side": "right",
        "tune_mm_mlp_adapter": False,
        "unfreeze_mm_vision_tower": True,  # its weights are in the checkpoint
        "use_mm_proj": True,
    }
    if config.behavior == "released":
        fields |= {"vis_token_granularity": list(config.granularities), "router_select": has_router}
        fields |= {"filtered_text_num": config.router_config.num_text_tokens}
    return fields


def llava_next_config(model: Model, vocabulary_size: int, image_token_id: int, dtype: torch.dtype) -> dict[str, Any]:
    """The `config.json` of transformers' LLaVA-NeXT, readable by older versions too."""
    config = model.config
    known = LlavaNextConfig().to_dict()
    fields = {name: value for name, value in config.to_diff_dict().items() if name in known and name != "dtype"}
    return fields | {
        "architectures": ["LlavaNextForConditionalGeneration"],
        "model_type": LlavaNextConfig.model_type,
        "image_token_index": image_token_id,
        "text_config": _fields(config, "text_config") | {"vocab_size": vocabulary_size},
        "torch_dtype": _name(dtype),
        "use_image_newline_parameter": True,
        "vision_config": _fields(config, "vision_config"),
    }


def _require(target: Target, obstacles: Mapping[str, bool]) -> None:
    """Raises a ValueError that names the obstacles that are present."""
    present = [name for name, is_present in obstacles.items() if is_present]
    if present:
        raise ValueError(f"--to {target}: this layout cannot hold {' or '.join(present)}")


def _fields(config: AvgLlavaConfig, part: str) -> dict[str, Any]:
    """Fields of a backbone's configuration; the rotary embedding is described as before version 5 of transformers."""
    fields: dict[str, Any] = config.to_diff_dict()[part]
    for name in ("_name_or_path", "architectures", "dtype"):
        fields.pop(name, None)
    rope = dict(fields.pop("rope_parameters", None) or {})
    if "rope_theta" in rope:
        fields["rope_theta"] = rope.pop("rope_theta")
        fields["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return fields


def _known_tower(model: Model) -> str | None:
    """The hub id of a vision tower with the same architecture and pixel statistics, or None."""
    vision = model.config.vision_config.to_dict()
    is_clip = vision["hidden_act"] == "quick_gelu"
    if model.processor is not None:
        is_clip &= list(model.processor.image_processor.image_mean) == OPENAI_CLIP_MEAN
    return next((name for name, sizes in KNOWN_TOWERS.items() if is_clip and sizes.items() <= vision.items()), None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _copy(file: Path, folder: Path) -> None:
    if file.is_file():
        shutil.copyfile(file, folder / file.name)


def _write_generation_config(model: Model, folder: Path) -> None:
    if (model.folder / GENERATION_CONFIG).is_file():
        _copy(model.folder / GENERATION_CONFIG, folder)
    else:
        GenerationConfig.from_model_config(model.config).save_pretrained(folder)


def _pixel_settings(model: Model, processor_type: str) -> dict[str, Any]:
    """Fields of an image processor file, as transformers wrote them before version 5."""
    config = model.config
    crop = config.crop_size
    settings: dict[str, Any] = {"do_normalize": True, "do_rescale": True, "rescale_factor": 1 / 255}
    settings |= config.tower.pixel_statistics(config.vision_config)
    if model.processor is not None:
        settings = {name: getattr(model.processor.image_processor, name) for name in settings}
    return settings | {
        "crop_size": {"height": crop, "width": crop},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_resize": True,
        "image_processor_type": processor_type,
        "resample": int(settings["resample"]),
        "size": {"shortest_edge": crop},
    }


def _save_llava_next_processor(model: Model, folder: Path, image_token_id: int) -> None:
    """Writes tokenizer, image processor and chat template in the files of the published folders."""
    processor = model.processor
    assert processor is not None
    tokenizer = processor.tokenizer
    tokenizer.add_tokens([AddedToken(IMAGE_PLACEHOLDER, special=True, normalized=False)], special_tokens=True)
    assert tokenizer.convert_tokens_to_ids(IMAGE_PLACEHOLDER) == image_token_id
    _save_tokenizer(model, folder, "PreTrainedTokenizerFast")
    write_json(
        folder / IMAGE_SETTINGS,
        _pixel_settings(model, "LlavaNextImageProcessor")
        | {
            "do_pad": True,
            "image_grid_pinpoints": model.config.image_grid_pinpoints,
            "processor_class": "LlavaNextProcessor",
        },
    )
    write_json(
        folder / "processor_config.json",
        {
            "image_token": IMAGE_PLACEHOLDER,
            "num_additional_image_tokens": 1,  # the tower's class token
            "patch_size": model.config.vision_config.patch_size,
            "processor_class": "LlavaNextProcessor",
            "vision_feature_select_strategy": model.config.vision_feature_select_strategy,
        },
    )
    if processor.chat_template is not None:
        # Older versions of transformers read the first, newer ones prefer the second.
        write_json(folder / "chat_template.json", {"chat_template": processor.chat_template})
        write_bytes(folder / "chat_template.jinja", processor.chat_template.encode())


def _save_tokenizer(model: Model, folder: Path, tokenizer_class: str, size: int | None = None) -> None:
    """Writes a tokenizer so that older versions of transformers load it, without the tokens from id `size` on."""
    assert model.processor is not None
    tokenizer = model.processor.tokenizer
    tokenizer.save_pretrained(folder)
    settings_file, tokens_file = folder / "tokenizer_config.json", folder / "tokenizer.json"
    settings = json.loads(settings_file.read_text(encoding="utf-8"))
    for name in ("backend", "extra_special_tokens", "is_local", "local_files_only", "processor_class"):
        settings.pop(name, None)
    settings |= {"tokenizer_class": tokenizer_class, "model_input_names": ["input_ids", "attention_mask"]}
    if hasattr(tokenizer, "legacy"):  # transformers 5.23 does not save it
        settings["legacy"] = tokenizer.legacy
    if size is not None and tokenizer.pad_token_id >= size:
        settings["pad_token"] = tokenizer.unk_token or tokenizer.eos_token
    write_json(settings_file, settings, sort_keys=True)
    if size is not None:
        tokens = json.loads(tokens_file.read_text(encoding="utf-8"))
        tokens["added_tokens"] = [token for token in tokens["added_tokens"] if token["id"] < size]
        write_json(tokens_file, tokens, ensure_ascii=False)

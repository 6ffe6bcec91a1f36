"""Images and text into model inputs: anyres crops, and prompts that hold one placeholder id per image.

Shapes: N images, P crops of one image (overview first, then tiles row-major), S crop side, B prompts, L length.
"""

import json
import os
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jinja2 import TemplateError
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
    GenerationConfig,
    LlavaNextImageProcessorPil,
)
from transformers.image_utils import SizeDict, make_flat_list_of_images
from transformers.processing_utils import ProcessorMixin
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils import PROCESSOR_NAME

from avg_llava.common.registry import find_entry
from avg_llava.model.anyres import image_window, select_canvas
from avg_llava.model.chat_templates import RefusedPromptError, adapt, chat_format, default_template, read_chat_template
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.open_clip_tower import OpenClipVisionConfig
from avg_llava.model.resampling import resize
from avg_llava.model.saving import AUTO_MAP, remove_chat_templates, write_modelling_files
from avg_llava.model.templates import IMAGE_PLACEHOLDER, TEMPLATES, template_of_family, template_of_text


class TokenizedText(NamedTuple):
    """Token ids of a text, and the index of the first character of each token (0 for the leading BOS)."""

    input_ids: list[int]
    starts: list[int]


def tokenize_with_images(
    text: str, tokenizer: PreTrainedTokenizerBase, image_token_id: int, num_embeddings: int | None = None
) -> TokenizedText:
    """Tokenises `text`, with `image_token_id` for every `<image>`.

    The pieces between placeholders are tokenised separately, with a single BOS at the start if the tokenizer adds one.
    The ids are those of LLaVA's `tokenizer_image_token`, with a word-boundary token before a newline after an image.

    Raises:
        ValueError: The tokenizer has no character offsets, or the text has a token of id `image_token_id`, or one that
            is not below `num_embeddings`, if that is given.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} cannot tell which characters a token stands for; load a tokenizer backed by "
            "the tokenizers library (a folder with tokenizer.json or tokenizer.model)"
        )
    prefix = tokenizer("").input_ids  # [BOS] or empty; further tokens would end the text
    input_ids, starts, cursor = [], [], 0
    if prefix and prefix[0] == tokenizer.bos_token_id and not text.startswith(str(tokenizer.bos_token)):
        input_ids.append(prefix[0])
        starts.append(0)
    for index, piece in enumerate(text.split(IMAGE_PLACEHOLDER)):
        if index > 0:
            input_ids.append(image_token_id)
            starts.append(cursor)
            cursor += len(IMAGE_PLACEHOLDER)
        ids, piece_starts = _tokenize_piece(piece, tokenizer)
        if image_token_id in ids:
            raise ValueError(
                f"the text {piece!r} has a token of id {image_token_id}, which is image_token_id: the model's "
                "image_token_id must be one that its tokenizer never gives"
            )
        beyond = next((number for number in ids if num_embeddings is not None and number >= num_embeddings), None)
        if beyond is not None:
            raise ValueError(
                f"the text holds {tokenizer.convert_ids_to_tokens(beyond)!r}, a token of id {beyond}, but the model "
                f"embeds {num_embeddings} tokens; write it otherwise"
            )
        input_ids += ids
        starts += [cursor + start for start in piece_starts]
        cursor += len(piece)
    return TokenizedText(input_ids, starts)


def _tokenize_piece(piece: str, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids of a text without placeholders and BOS, and the index of the first character of each.

    Sentencepiece, with which models were trained, prepends a space to every text. The tokenizers library prepends one
    only if the text does not begin with a space, which loses a token; such a text gets a second space here.
    """
    swallowed = piece.startswith((" ", "\u2581")) and _ids(tokenizer, " x") == _ids(tokenizer, "x")
    encoding = tokenizer(
        f" {piece}" if swallowed else piece, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    return encoding.input_ids, [max(start - swallowed, 0) for start, _ in encoding.offset_mapping]


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


class AvgLlavaImageProcessor(LlavaNextImageProcessorPil):
    """Transformers' LLaVA-NeXT image processor on Pillow, with fewer passes over the pixels.

    Pixels equal the released code's bit for bit on every machine (torchvision's differ by up to 0.015). Of equally good
    canvases the first of `image_grid_pinpoints` is taken, so their order matters (see `AvgLlavaConfig`).
    Images are resized in 8 bits. Scale, mean and deviation are applied through a table of the 256 levels of a channel,
    from which the crops are filled.
    """

    def to_dict(self) -> dict[str, Any]:
        """The settings, and `auto_map` for saved models."""
        return super().to_dict() | {"auto_map": AUTO_MAP}

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> list[str]:
        """Saves the settings and the modelling files that they name; arguments as in transformers."""
        write_modelling_files(save_directory)
        return super().save_pretrained(save_directory, **kwargs)

    def process_image(self, image: Any, input_data_format: Any = None, **kwargs: Any) -> Any:
        """Converts a Pillow image of any mode, or an array of integers from 0 to 255, to an RGB Pillow image.

        Transparent pixels are blended with white, as in transformers.

        Raises:
            ValueError: An array has other values.
        """
        if isinstance(image, Image.Image) and image.mode == "RGB" and image.info.get("transparency") is None:
            return image
        given = super().process_image(image, do_convert_rgb=True, input_data_format=input_data_format)  # (3, H, W)
        pixels = given.astype(np.uint8)
        if not np.array_equal(pixels, given):
            raise ValueError("the pixels of an array must be whole numbers from 0 to 255")
        return Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)))

    def _preprocess(
        self,
        images: list[Any],
        size: SizeDict,
        crop_size: SizeDict,
        image_grid_pinpoints: list[list[int]],
        resample: Any,
        do_rescale: bool,
        rescale_factor: float,
        do_normalize: bool,
        image_mean: Any,
        image_std: Any,
        return_tensors: Any,
        **kwargs: Any,
    ) -> BatchFeature:
        """Crops of Pillow images. The switches for resizing, cropping and padding in `kwargs` are ignored."""
        side = crop_size.height
        if (size.shortest_edge or size.height) != side or crop_size.width != side:
            raise ValueError(f"overview and tiles must be equal squares, got size {size} and crop_size {crop_size}")
        levels = np.broadcast_to(np.arange(256, dtype=np.uint8)[:, None], (3, 256, 1))
        if do_rescale:
            levels = self.rescale(levels, rescale_factor)
        if do_normalize:
            levels = self.normalize(levels, image_mean, image_std)
        sizes = [(image.height, image.width) for image in images]
        canvases = [select_canvas(image_size, image_grid_pinpoints) for image_size in sizes]
        most = max(1 + height * width // side**2 for height, width in canvases)
        pixel_values = np.zeros((len(images), most, 3, side, side), levels.dtype)
        for image, canvas, crops in zip(images, canvases, pixel_values, strict=True):
            window = image_window((image.height, image.width), canvas)
            fitted_size = (window.bottom - window.top, window.right - window.left)
            overview, resized = resize(image, [(side, side), fitted_size], resample)
            fitted = np.zeros((*canvas, 3), np.uint8)
            fitted[window.top : window.bottom, window.left : window.right] = resized
            rows, columns = canvas[0] // side, canvas[1] // side
            tiles = fitted.reshape(rows, side, columns, side, 3).swapaxes(1, 2)  # (rows, columns, S, S, 3)
            cut = crops[1 : 1 + rows * columns].reshape(rows, columns, 3, side, side)
            for channel, table in enumerate(levels[..., 0]):
                crops[0, channel] = table.take(overview[..., channel])
                cut[:, :, channel] = table.take(tiles[..., channel])
        return BatchFeature({"pixel_values": pixel_values, "image_sizes": sizes}, tensor_type=return_tensors)


class AvgLlavaProcessor(ProcessorMixin):
    """Converts images and prompts to the inputs of `AvgLlavaForConditionalGeneration`.

    A prompt has one `<image>` per image, which becomes one `image_token_id`; the model replaces it by visual tokens.
    `apply_chat_template` renders messages as a prompt.

    Args:
        image_processor: An :class:`AvgLlavaImageProcessor`.
        tokenizer: Tokenizer of the language model, with character offsets.
        image_token_id: `config.image_token_id` of the model.
        chat_template: Jinja source, or several by name, of which `default` is taken; None: messages cannot be rendered.

    Attributes:
        num_embeddings: Tokens that the model embeds, if that is known: a text with others is refused.
    """

    chat_template: str | None

    def __init__(
        self,
        image_processor: AvgLlavaImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        image_token_id: int,
        chat_template: str | dict[str, str] | None = None,
    ) -> None:
        super().__init__(image_processor, tokenizer, chat_template=default_template(chat_template))
        self.image_token = IMAGE_PLACEHOLDER
        self.image_token_id = image_token_id
        self.num_embeddings: int | None = None
        if tokenizer.pad_token is None:
            # Vicuna has no padding token. As padding is masked, any token will do; LLaVA takes this one.
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        padding: bool = True,
        padding_side: str = "left",
        return_tensors: str = "pt",
        videos: None = None,
        audio: None = None,
        add_special_tokens: bool = True,
    ) -> BatchFeature:
        """Converts prompts and the images of their `<image>` placeholders, in order, to model inputs.

        Args:
            images: One image, a list of N, or a list of lists (one per prompt), as Pillow images or arrays.
            text: One prompt or a list of B.
            padding: Pad prompts to the longest; if False, they must have equal lengths.
            padding_side: "left" for generation, "right" for training.
            return_tensors: "pt".
            videos: None; transformers' `apply_chat_template` passes it, like `audio`.
            audio: None.
            add_special_tokens: Ignored: a BOS is added to a prompt that does not begin with one. It is False in
                transformers' `apply_chat_template` for prompts that do.

        Returns:
            `input_ids`, `attention_mask` (B, L) and, if there are images, `pixel_values` (N, P_max, 3, S, S) and
            `image_sizes` (N, 2) as (height, width).

        Raises:
            ValueError: Placeholders and images do not match, or an argument has another value.
        """
        if text is None:
            raise ValueError("text is missing: a prompt is needed, with one <image> for each image")
        if videos is not None or audio is not None:
            raise ValueError("AVG-LLaVA takes images and text, no videos and no audio")
        if return_tensors != "pt":
            raise ValueError(f"return_tensors must be 'pt', got {return_tensors!r}")
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side must be 'left' or 'right', got {padding_side!r}")
        prompts = [text] if isinstance(text, str) else list(text)
        flat_images = _matched_images(images, prompts)
        rows = [self.tokenize(prompt).input_ids for prompt in prompts]
        longest = max(map(len, rows))
        if not padding and any(len(row) != longest for row in rows):
            raise ValueError("prompts differ in length: pass padding=True, or one prompt at a time")
        input_ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for index, row in enumerate(rows):
            positions = slice(longest - len(row), longest) if padding_side == "left" else slice(len(row))
            input_ids[index, positions] = torch.tensor(row)
            attention_mask[index, positions] = 1
        data: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if flat_images:
            data.update(self.image_processor(flat_images, return_tensors="pt"))
        return BatchFeature(data)

    def tokenize(self, text: str) -> TokenizedText:
        """Token ids of a prompt, with one `image_token_id` for each `<image>`; see :func:`tokenize_with_images`."""
        return tokenize_with_images(text, self.tokenizer, self.image_token_id, self.num_embeddings)

    def apply_chat_template(self, conversation: Any, chat_template: str | None = None, **kwargs: Any) -> Any:
        """Renders messages as a prompt; arguments as in transformers.

        Raises:
            ValueError: There is no chat template.
            RefusedPromptError: It refuses the messages, or a question holds a text that marks turns.
        """
        if chat_template is None and self.chat_template is None:
            raise ValueError(
                "this model brings no usable chat template along, and none is known for its family; choose one of "
                f"{', '.join(TEMPLATES)} with --template, or with data.template for training"
            )
        if chat_template is None:
            self.refuse_markers(conversation)
        try:
            return super().apply_chat_template(conversation, chat_template, **kwargs)
        except TemplateError as error:
            raise RefusedPromptError(f"the chat template refuses these messages: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The settings, and `auto_map` for saved models."""
        return super().to_dict() | {"auto_map": AUTO_MAP}

    def refuse_markers(self, conversation: Any, in_answers: bool = False) -> None:
        """Raises RefusedPromptError if a message, other than an answer by default, holds a text that marks turns."""
        batch = conversation if conversation and isinstance(conversation[0], (list, tuple)) else [conversation]
        chat = chat_format(self.chat_template, self.tokenizer)
        for message in chain.from_iterable(batch):
            found = None
            if in_answers or message["role"] != "assistant":
                found = chat.find_marker(message["content"])
            if found is not None:
                raise RefusedPromptError(
                    f"the text of a message holds {found!r}, which marks turns; write it otherwise"
                )

    def use_template(self, name: str, config: AvgLlavaConfig) -> None:
        """Prompts with an entry of `TEMPLATES`, which the model's configuration names from now on.

        Raises:
            ValueError: No entry has this name, or the template is `tokenizer` and no chat template is at hand.
        """
        jinja = find_entry(TEMPLATES, name, "template").jinja
        if jinja is None and (self.chat_template is None or template_of_text(self.chat_template) != name):
            raise ValueError(
                f"template {name!r}: the model brings no usable chat template along; choose one of "
                f"{', '.join(other for other in TEMPLATES if other != name)}"
            )
        config.template = name
        self.chat_template = jinja or self.chat_template

    def end_answers(self, generation_config: GenerationConfig) -> None:
        """Adds the token that ends an answer in the chat template to those that end generation."""
        end = None if self.chat_template is None else chat_format(self.chat_template, self.tokenizer).end_token_id
        known = generation_config.eos_token_id
        known = known if isinstance(known, list) else [] if known is None else [known]
        if end is not None and end not in known:
            generation_config.eos_token_id = [*known, end]

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> list[str]:
        """Saves the processor and the modelling files that it names; arguments as in transformers.

        Chat templates of an earlier processor are removed from the folder. Its tokenizer is saved with the processor's.
        """
        if hasattr(self.tokenizer, "legacy"):
            # Transformers 5.23 does not save it, and without it a reloaded tokenizer has other ids after `</s>`.
            self.tokenizer.init_kwargs["legacy"] = self.tokenizer.legacy
        self.tokenizer.chat_template = self.chat_template
        write_modelling_files(save_directory)
        remove_chat_templates(save_directory)
        return super().save_pretrained(save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> "AvgLlavaProcessor":
        """Loads a saved processor. Code in a checkpoint is never run."""
        kwargs["trust_remote_code"] = False
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_backbones(
        cls, vision_path: str | Path | None, language_path: str | Path, config: AvgLlavaConfig
    ) -> "AvgLlavaProcessor":
        """The processor of a model that is built from a vision tower and a language model.

        Args:
            vision_path: Folder or hub id with the tower's `preprocessor_config.json`, from which mean, deviation,
                filter and scale are taken. None, or a local folder without that file: those of the tower's family.
            language_path: Folder or hub id of the tokenizer.
            config: Configuration of the model: crop size, pinpoints, placeholder id and conversation template. Without
                a template, the chat template is the tokenizer's own, else by the language model's family.
        """
        crop = config.crop_size
        image_processor = AvgLlavaImageProcessor(
            size={"shortest_edge": crop},
            crop_size={"height": crop, "width": crop},
            image_grid_pinpoints=[list(pinpoint) for pinpoint in config.image_grid_pinpoints],
            **_pixel_statistics(vision_path, config),
        )
        tokenizer = AutoTokenizer.from_pretrained(
            language_path,
            # Transformers takes the class of a tokenizer without tokenizer.json from the model's type, which is not the
            # language model's in folders of LLaVA; `llava` would lose the word boundary at the start of a text.
            config=None if (Path(language_path) / "tokenizer.json").is_file() else config.text_config,
            trust_remote_code=False,
        )
        chat_template = _chat_template(language_path, tokenizer, config)
        return cls(image_processor, tokenizer, config.image_token_id, chat_template)

    @classmethod
    def from_checkpoint(cls, path: str | Path, config: AvgLlavaConfig) -> "AvgLlavaProcessor":
        """The processor of a checkpoint folder: of AVG-LLaVA, of transformers' LLaVA-NeXT or in the original format.

        Folders of the last two have a tokenizer and at most the pixel statistics; the rest is taken from `config`.
        """
        saved = Path(path) / PROCESSOR_NAME
        if saved.is_file() and json.loads(saved.read_text("utf-8")).get("processor_class") == cls.__name__:
            return cls.from_pretrained(path)
        return cls.from_backbones(path, path, config)


def _matched_images(images: Any, prompts: Sequence[str]) -> list[Any]:
    """Images in the order of their placeholders. Raises ValueError if a prompt has more or fewer of them."""
    num_placeholders = [prompt.count(IMAGE_PLACEHOLDER) for prompt in prompts]
    if isinstance(images, (list, tuple)) and images and all(isinstance(group, (list, tuple)) for group in images):
        if [len(group) for group in images] != num_placeholders:
            raise ValueError(
                f"prompts hold {num_placeholders} {IMAGE_PLACEHOLDER} placeholders, but come with "
                f"{[len(group) for group in images]} images"
            )
        return [image for group in images for image in group]
    nothing = images is None or (isinstance(images, (list, tuple)) and not images)
    given = [] if nothing else make_flat_list_of_images(images)
    if len(given) != sum(num_placeholders):
        raise ValueError(
            f"text holds {sum(num_placeholders)} {IMAGE_PLACEHOLDER} placeholders, but {len(given)} images are given: "
            "write one placeholder per image"
        )
    return given


def _chat_template(path: str | Path, tokenizer: PreTrainedTokenizerBase, config: AvgLlavaConfig) -> str | None:
    """The chat template of a tokenizer's folder; None if it brings none along and its family is not known."""
    if config.template in (None, "tokenizer"):
        own = read_chat_template(path, tokenizer)
        if own is not None or config.template is not None:
            return None if own is None else adapt(own, tokenizer)
    name = config.template or template_of_family(
        config.text_config.model_type, tokenizer.added_tokens_encoder, of_llava=False
    )
    return None if name is None else TEMPLATES[name].jinja


def _pixel_statistics(vision_path: str | Path | None, config: AvgLlavaConfig) -> dict[str, Any]:
    """Fields of the tower's image processor that do not depend on anyres; an open_clip tower's are in `config`."""
    family = config.tower.pixel_statistics(config.vision_config)
    if vision_path is None or isinstance(config.vision_config, OpenClipVisionConfig):
        return family
    folder = Path(vision_path)
    if folder.is_dir() and not any((folder / name).is_file() for name in ("preprocessor_config.json", PROCESSOR_NAME)):
        return family
    stored, _ = AvgLlavaImageProcessor.get_image_processor_dict(vision_path)
    fields = ("image_mean", "image_std", "rescale_factor", "resample", "do_rescale", "do_normalize")
    return family | {name: stored[name] for name in fields if name in stored}


AutoImageProcessor.register(
    AvgLlavaConfig,
    # Both names map to the PIL class: pixels do not depend on whether torchvision is installed.
    image_processor_classes={"pil": AvgLlavaImageProcessor, "torchvision": AvgLlavaImageProcessor},
    exist_ok=True,
)
AutoProcessor.register(AvgLlavaConfig, AvgLlavaProcessor, exist_ok=True)

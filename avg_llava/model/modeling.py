"""AVG-LLaVA: encode -> pool -> route -> splice -> language model. Read this file first.

`AvgLlavaForConditionalGeneration.prepare` is the path of a batch: `encode_images` runs vision tower and projector,
`route` scores the levels (router.py) that are pooled from one encoding (scaler.py), and `splice` replaces each image
placeholder by the image's tokens at the chosen level (anyres.py for the layout of the tokens, splice.py for the batch).
Training packs spliced batches (packing.py) and takes the answers' log-probabilities from `token_log_probs`.

Shapes: B samples, L tokens of a prompt with one placeholder per image, L' tokens after splicing, N images in the batch
(sample after sample), C crops of all images (image after image, overview first), T finest tokens of a crop, G levels,
D language-model width, S crop size in pixels.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForImageTextToText, GenerationMixin
from transformers.cache_utils import Cache
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.modeling_outputs import ModelOutput
from transformers.models.llava_next.modeling_llava_next import LlavaNextMultiModalProjector, LlavaNextPreTrainedModel

from avg_llava.model.anyres import canvas_tiles, kept_window, num_crops
from avg_llava.model.configuration import AvgLlavaConfig
from avg_llava.model.language import language_parts
from avg_llava.model.packing import LanguageHead, PackedInputs
from avg_llava.model.router import Router, find_router, level_values
from avg_llava.model.saving import replaced_model
from avg_llava.model.splice import (
    IGNORE_INDEX,
    JoinGradients,
    PaddingSide,
    SplicedInputs,
    check_placeholders,
    splice_visual_tokens,
)

Granularity = int | Sequence[int] | Tensor
ImageSizes = Tensor | Sequence[Sequence[int]]


class PromptTooLongError(ValueError):
    """A prompt with its visual tokens is longer than `config.max_sequence_length`."""


@dataclass
class ImageFeatures:
    """Encoded images of a batch; every level is pooled from them.

    Attributes:
        crops: (C, T, D) finest tokens, after the projector.
        num_crops: Crops of each image; they add up to C. Empty for the blank crop of a batch without images.
        image_sizes: (height, width) of each image in pixels.
    """

    crops: Tensor
    num_crops: list[int]
    image_sizes: list[tuple[int, int]]

    @property
    def is_blank(self) -> bool:
        """True if the only crop is the blank one of a batch without images, which must get weight 0."""
        return not self.num_crops

    def of_images(self, indices: Sequence[int]) -> "ImageFeatures":
        """The features of the images at `indices`."""
        crops = self.crops.split(self.num_crops)
        return ImageFeatures(
            torch.cat([self.crops[:0], *(crops[index] for index in indices)]),
            [self.num_crops[index] for index in indices],
            [self.image_sizes[index] for index in indices],
        )


@dataclass
class AvgLlavaOutput(ModelOutput):
    """Output of :class:`AvgLlavaForConditionalGeneration`.

    Attributes:
        loss: Mean cross-entropy over supervised tokens, if labels were given.
        logits: (B, L', vocabulary).
        past_key_values: Cache of the language model.
        hidden_states: Those of the language model, if requested.
        attentions: Those of the language model, if requested.
        granularity: (N,) level of each image, in visual tokens per crop.
        router_logits: (N, G), levels coarse to fine; None if the level was forced.
        num_visual_tokens: (N,) visual tokens of each image, newlines included.
        labels: (B, L') labels of the spliced sequences, if labels were given.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    granularity: Tensor | None = None
    router_logits: Tensor | None = None
    num_visual_tokens: Tensor | None = None
    labels: Tensor | None = None


class AvgLlavaPreTrainedModel(LlavaNextPreTrainedModel):
    """Weight initialisation and loading shared by the classes below."""

    config_class = AvgLlavaConfig
    config: AvgLlavaConfig

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, Router):
            module.reset_parameters()
            return
        super()._init_weights(module)
        if isinstance(module, AvgLlavaModel):
            nn.init.normal_(module.image_newline, std=self.config.text_config.hidden_size**-0.5)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Saves the model and its modelling files in place of a model in the folder; arguments as in transformers."""
        if not is_main_process or self._hf_peft_config_loaded:  # writes nothing, or adapters alone
            super().save_pretrained(save_directory, is_main_process, push_to_hub=push_to_hub, **kwargs)
            return
        names = ("repo_id", "commit_message", "private", "token", "revision", "create_pr")
        hub = {name: kwargs.pop(name) for name in names if name in kwargs}
        if "max_shard_size" in kwargs:
            hub["max_shard_size"] = kwargs["max_shard_size"]
        with replaced_model(save_directory) as folder:
            super().save_pretrained(folder, **kwargs)
        if push_to_hub:
            self.push_to_hub(hub.pop("repo_id", Path(save_directory).name), **hub)


class AvgLlavaModel(AvgLlavaPreTrainedModel):
    """AVG-LLaVA without its language-model head; parameters are named as in transformers' LLaVA-NeXT."""

    def __init__(self, config: AvgLlavaConfig):
        super().__init__(config)
        width = config.text_config.hidden_size
        self.vision_tower = config.tower.build(config.vision_config)
        self.multi_modal_projector = LlavaNextMultiModalProjector(config)
        self.image_newline = nn.Parameter(torch.randn(width) * width**-0.5)
        self.language_model = AutoModel.from_config(config.text_config, trust_remote_code=False)
        self.router = find_router(config)(config)
        self.post_init()

    def encode_crops(self, pixels: Tensor) -> Tensor:
        """Vision tower, up to `vision_feature_layer`, and projector: (C, 3, S, S) pixels to (C, T, D) tokens."""
        hidden = self.config.tower.encode(self.vision_tower, pixels, self.config.num_vision_layers)
        return self.multi_modal_projector(hidden)


class AvgLlavaForConditionalGeneration(AvgLlavaPreTrainedModel, GenerationMixin):
    """LLaVA-NeXT that chooses the number of visual tokens of each image.

    A prompt has one `config.image_token_id` per image; the model replaces it by the image's visual tokens.
    """

    def __init__(self, config: AvgLlavaConfig):
        super().__init__(config)
        text, parts = config.text_config, language_parts(config.text_config)
        self.model = AvgLlavaModel(config)
        self.lm_head = LanguageHead(text.hidden_size, text.vocab_size, parts.head_bias, parts.softcap)
        self.post_init()

    @property
    def _tied_weights_keys(self) -> dict[str, str]:
        embeddings = language_parts(self.config.text_config).embeddings
        return {"lm_head.weight": f"model.language_model.{embeddings}.weight"}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        labels: Tensor | None = None,
        granularity: Granularity | None = None,
        token_cost: float | Tensor = 0.0,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> AvgLlavaOutput:
        """Computes next-token logits, and the loss if there are labels.

        Args:
            input_ids: (B, L) with one image placeholder per image.
            attention_mask: (B, L), 0 at padding on either side; None: no padding.
            pixel_values: (N, P, 3, S, S) crops, as from transformers' LLaVA-NeXT image processor.
            image_sizes: (N, 2) original (height, width).
            labels: (B, L), -100 where not supervised.
            granularity: Level in visual tokens per crop, for all images or one per image; None: the router chooses.
            token_cost: Price in nats per doubling of visual tokens when the router chooses; a number or one per image.
            inputs_embeds: (B, L', D) spliced embeddings, instead of `input_ids`.
            position_ids: (B, L') positions of `inputs_embeds`, or those of a decoding step.
            past_key_values: Cache of a decoding step.
            logits_to_keep: Compute the logits of this many last positions only; 0: of all (as in transformers).
            **kwargs: Passed to the language model.
        """
        routed: dict[str, Any] = {}
        if inputs_embeds is None and past_key_values is not None and past_key_values.get_seq_length() > 0:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        elif inputs_embeds is None:
            spliced, routed = self.prepare(
                input_ids, attention_mask, pixel_values, image_sizes, labels, granularity, token_cost
            )
            inputs_embeds, attention_mask = spliced.inputs_embeds, spliced.attention_mask
            position_ids, labels = spliced.position_ids, spliced.labels
        outputs = self.model.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.text_config.vocab_size)
        return AvgLlavaOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            labels=labels,
            **routed,
        )

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        granularity: Granularity | None = None,
        token_cost: float | Tensor = 0.0,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Generates answers; arguments as in :meth:`forward`, and those of transformers' `generate`.

        Returns:
            (B, new tokens) ids of the answers, without the prompt.
        """
        if inputs_embeds is None:
            spliced, _ = self.prepare(
                input_ids,
                attention_mask,
                pixel_values,
                image_sizes,
                granularity=granularity,
                token_cost=token_cost,
                padding_side="left",
            )
            inputs_embeds, attention_mask = spliced.inputs_embeds, spliced.attention_mask
        return super().generate(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)

    def prepare(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_sizes: Tensor | None = None,
        labels: Tensor | None = None,
        granularity: Granularity | None = None,
        token_cost: float | Tensor = 0.0,
        padding_side: PaddingSide | None = None,
    ) -> tuple[SplicedInputs, dict[str, Tensor]]:
        """Encodes, routes (unless `granularity` forces a level) and splices; arguments as in :meth:`forward`.

        With `padding_side` None the spliced batch is padded on the same side as the prompts.

        Returns:
            Inputs of the language model, and the routing fields of :class:`AvgLlavaOutput`.
        """
        if input_ids is None:
            raise ValueError("either input_ids or inputs_embeds must be given")
        attention_mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        if padding_side is None:
            padding_side = "left" if bool((attention_mask[:, 0] == 0).any()) else "right"
        features = None if pixel_values is None else self.encode_images(pixel_values, image_sizes)
        if features is None:
            spliced = self.splice(None, input_ids, attention_mask, labels, (), padding_side)
            return spliced, {}
        routed: dict[str, Tensor] = {}
        if granularity is None:
            routed["router_logits"] = self.route(features, input_ids, attention_mask, labels)
            granularity = self.choose_granularity(routed["router_logits"], token_cost)
        levels = self.levels_of(granularity, len(features.num_crops))
        spliced = self.splice(features, input_ids, attention_mask, labels, levels, padding_side)
        routed["granularity"] = torch.tensor(levels, device=input_ids.device)
        routed["num_visual_tokens"] = spliced.num_visual_tokens
        return spliced, routed

    def encode_images(self, pixel_values: Tensor, image_sizes: ImageSizes | None) -> ImageFeatures:
        """Runs vision tower and projector once over all crops of the images.

        Args:
            pixel_values: (N, P, 3, S, S); crops beyond those that an image has are padding and are not encoded.
            image_sizes: (N, 2) original (height, width).

        Raises:
            ValueError: The shapes do not match, or an image has more crops than `pixel_values`.
        """
        if image_sizes is None or pixel_values.dim() != 5 or len(image_sizes) != len(pixel_values):
            raise ValueError(
                "pixel_values must be (images, crops, 3, height, width) with one (height, width) row of image_sizes "
                f"for each image; got pixel_values {tuple(pixel_values.shape)} and {image_sizes=}"
            )
        rows = image_sizes.tolist() if isinstance(image_sizes, Tensor) else image_sizes
        sizes = [(int(height), int(width)) for height, width in rows]
        counts = [num_crops(size, self.config) for size in sizes]
        if max(counts) > pixel_values.shape[1]:
            raise ValueError(
                f"an image of {sizes[counts.index(max(counts))]} (height, width) has {max(counts)} crops under "
                f"image_grid_pinpoints, but pixel_values holds {pixel_values.shape[1]}; "
                "the image processor and the model disagree about the pinpoints"
            )
        pixels = torch.cat([crops[:count] for crops, count in zip(pixel_values, counts, strict=True)])
        return ImageFeatures(self.model.encode_crops(pixels.to(self.dtype)), counts, sizes)

    def encode_blank_image(self) -> ImageFeatures:
        """Encodes one black crop, for a micro-batch without images.

        Under ZeRO all processes must run the same modules at every step. The crop's tokens get weight 0 in the loss.
        """
        size = self.config.crop_size
        pixels = torch.zeros(1, self.config.vision_config.num_channels, size, size, device=self.device)
        return ImageFeatures(self.model.encode_crops(pixels.to(self.dtype)), [], [])

    def route(
        self, features: ImageFeatures, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> Tensor:
        """Scores the levels of each image from the image and the instruction of its sample.

        The instruction is the unsupervised part of the text if there are labels, and all of it otherwise.

        Returns:
            (N, G) logits, levels coarse to fine; for a blank image (1, G), to be weighted 0.
        """
        is_image, real = self._is_image(input_ids), attention_mask.bool()
        instruction = real & ~is_image if labels is None else real & ~is_image & (labels == IGNORE_INDEX)
        text = self._embed(input_ids).masked_fill(is_image[..., None], 0)
        # Placeholders last, as in the released code: of equally similar tokens, the text filter takes the first.
        order = is_image.long().argsort(dim=1, stable=True)
        instruction = instruction.gather(1, order)
        text = text.gather(1, order[..., None].expand_as(text))
        if features.is_blank:
            return self.model.router(features.crops, [len(features.crops)], text[:1], instruction[:1])
        placeholders = (is_image & real).cpu()
        check_placeholders(placeholders, len(features.num_crops))
        owners = torch.nonzero(placeholders)[:, 0].to(text.device)  # (N,) sample of each image
        text, instruction = text[owners], instruction[owners]
        if self.config.behavior == "released":
            # The released code indexes texts by image, so that all but a sample's first image are routed without text.
            further = F.pad(owners[1:] == owners[:-1], (1, 0))[:, None]
            text, instruction = text.masked_fill(further[..., None], 0), instruction & ~further
        return self.model.router(features.crops, features.num_crops, text, instruction)

    def choose_granularity(self, router_logits: Tensor, token_cost: float | Tensor = 0.0) -> Tensor:
        """Selects the level with the highest log-probability minus the price of its tokens.

        Args:
            router_logits: (N, G).
            token_cost: Nats per doubling of visual tokens; a number or (N,). 0: argmax, as in the paper.

        Returns:
            (N,) levels in visual tokens per crop.
        """
        values = level_values(router_logits, self.config.granularities, token_cost)
        return torch.tensor(self.config.granularities, device=values.device)[values.argmax(-1)]

    def levels_of(self, granularity: Granularity, num_images: int) -> list[int]:
        """One level per image. Raises ValueError if the number is wrong or the model has no such level."""
        if isinstance(granularity, Tensor):
            granularity = granularity.tolist()
        levels = [granularity] * num_images if isinstance(granularity, int) else list(granularity)
        if len(levels) != num_images:
            raise ValueError(f"granularity names {len(levels)} levels for {num_images} images")
        for level in levels:
            self.config.check_level(level)
        return levels

    def splice(
        self,
        features: ImageFeatures | None,
        input_ids: Tensor,
        attention_mask: Tensor,
        labels: Tensor | None = None,
        granularity: Granularity = (),
        padding_side: PaddingSide = "right",
    ) -> SplicedInputs:
        """Pools each image to its level and replaces its placeholder by the visual tokens.

        Arguments as in :meth:`forward`. With labels, sequences are truncated to `config.max_sequence_length`.

        Raises:
            ValueError: The numbers of placeholders and images differ.
            PromptTooLongError: A prompt without labels is longer than `config.max_sequence_length`.
        """
        text_embeds = self._embed(input_ids)
        visual_tokens: list[Tensor] = []
        if features is not None:
            # The blank crop too, although its tokens are not used: tower and projector then get gradients of zero.
            text_embeds, crops, newline = JoinGradients.apply(text_embeds, features.crops, self.model.image_newline)
            if not features.is_blank:
                levels = self.levels_of(granularity, len(features.num_crops))
                visual_tokens = self._visual_tokens(replace(features, crops=crops), newline, levels)
        max_length = self.config.max_sequence_length
        spliced = splice_visual_tokens(
            text_embeds,
            self._is_image(input_ids).cpu(),
            attention_mask.cpu(),
            visual_tokens,
            labels,
            padding_side,
            max_length=None if labels is None else max_length,
        )
        if spliced.inputs_embeds.shape[1] > max_length:
            raise PromptTooLongError(
                f"a prompt has {spliced.inputs_embeds.shape[1]} tokens with its visual tokens, more than "
                f"config.max_sequence_length {max_length}; shorten it, or use a coarser granularity"
            )
        return spliced

    def token_log_probs(self, packed: PackedInputs) -> Tensor:
        """(K,) float32 log-probabilities of the supervised tokens of packed sequences, in order."""
        outputs = self.model.language_model(**packed.language_inputs(), use_cache=False)
        supervised = packed.is_supervised
        return self.lm_head(outputs.last_hidden_state[0, supervised], packed.targets[supervised])

    def _visual_tokens(self, features: ImageFeatures, newline: Tensor, levels: list[int]) -> list[Tensor]:
        """Tokens of each image at its level: the overview, then the unpadded map of the tiles with newlines."""
        ladder, visual_tokens = self.config.ladder, []
        crops_of_images = features.crops.split(features.num_crops)
        for crops, size, level in zip(crops_of_images, features.image_sizes, levels, strict=True):
            overview, tiles = ladder.pool(crops, level).split([1, len(crops) - 1])
            tile_rows, tile_columns = canvas_tiles(size, self.config)
            rows, columns = ladder.grid(level)
            token_map = tiles.unflatten(0, (tile_rows, tile_columns)).unflatten(2, (rows, columns))
            token_map = token_map.transpose(1, 2).flatten(2, 3).flatten(0, 1)  # (map rows, map columns, D)
            window = kept_window(size, level, self.config)
            token_map = token_map[window.top : window.bottom, window.left : window.right]
            row_ends = newline.to(token_map).expand(len(token_map), 1, -1)
            visual_tokens.append(torch.cat([overview[0], torch.cat([token_map, row_ends], 1).flatten(0, 1)]))
        return visual_tokens

    def _is_image(self, input_ids: Tensor) -> Tensor:
        return input_ids == self.config.image_token_id

    def _embed(self, input_ids: Tensor) -> Tensor:
        """Input embeddings. Rows of placeholders, whose id may exceed the vocabulary, are overwritten by `splice`."""
        return self.get_input_embeddings()(input_ids.masked_fill(self._is_image(input_ids), 0))


for auto_class in (AutoModel, AutoModelForImageTextToText):
    auto_class.register(AvgLlavaConfig, AvgLlavaForConditionalGeneration, exist_ok=True)
# Checkpoints of transformers' LLaVA-NeXT use older key names. Transformers maps them for its own classes only.
register_checkpoint_conversion_mapping(
    AvgLlavaConfig.model_type, get_checkpoint_conversion_mapping("llava_next"), overwrite=True
)

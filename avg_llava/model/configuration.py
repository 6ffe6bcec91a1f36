"""Configuration of AVG-LLaVA: the fields of LLaVA-NeXT, and granularities, pooling ladder, router and behaviour."""

import os
from dataclasses import field
from typing import Any, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, LlavaNextConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec

from avg_llava.common.registry import find_entry
from avg_llava.model.router import ROUTERS, find_router
from avg_llava.model.saving import AUTO_MAP, write_modelling_files
from avg_llava.model.scaler import LADDERS, Ladder
from avg_llava.model.templates import TEMPLATES
from avg_llava.model.towers import Tower, find_tower

Behavior = Literal["paper", "released"]

MAX_TILES = 4096  # of an image, and pinpoints of a model: far more than any model has
NUM_GRANULARITIES = 5  # of the paper: the tower's grid and four halvings


@strict
class RouterConfig(PreTrainedConfig):
    """Configuration of the granularity router.

    The fields after `kind` are those of the paper's router; other routers read what they need of them.

    Attributes:
        kind: A key of :data:`avg_llava.model.router.ROUTERS`.
        num_text_tokens: Instruction tokens kept by the text filter (k of the paper). With 0 the router sees the image
            only.
        num_attention_heads: Heads of the Transformer layer; must divide the language model's width.
        intermediate_size: Width of the Transformer layer's feed-forward part; None: the language model's width.
        dropout: Dropout in the Transformer layer during training.
    """

    model_type = "avg_llava_router"

    kind: str = "transformer"
    num_text_tokens: int = 32
    num_attention_heads: int = 8
    intermediate_size: int | None = None
    dropout: float = 0.1

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        find_entry(ROUTERS, self.kind, "router_config.kind")
        if self.num_text_tokens < 0:
            raise ValueError(f"router_config.num_text_tokens must be at least 0, got {self.num_text_tokens}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"router_config.dropout must be in [0, 1), got {self.dropout}")


@strict
class AvgLlavaConfig(LlavaNextConfig):
    """Configuration of :class:`AvgLlavaForConditionalGeneration`.

    It has the fields of transformers' `LlavaNextConfig` (vision and text configurations, anyres pinpoints as (height,
    width)) and the following.

    Attributes:
        granularities: Visual tokens per crop at each level that the router can choose, coarse to fine. Empty: the five
            finest levels of the ladder.
        pooling_ladder: A key of :data:`avg_llava.model.scaler.LADDERS`: the levels that exist, and how tokens are
            pooled to them. The default is the paper's.
        behavior: "paper": the router attends over the tokens of a crop and masks absent text slots, and padding is
            removed in pixel geometry. "released": it attends across crops, absent text slots are zero, and padding is
            removed by the aspect ratio of the token map. Published weights need "released".
        vision_feature_select_strategy: "default" for a tower with a class token, which is dropped like its registers,
            "full" for one without, as in transformers' LLaVA-NeXT. None: the one that fits the tower.
        router_config: A :class:`RouterConfig` or its fields.
        max_sequence_length: Longest sequence in tokens, visual tokens included. Training sequences are truncated to
            it; a longer prompt at inference is refused.
        template: A key of :data:`avg_llava.model.templates.TEMPLATES`: the conversation template that the model was
            trained with. None: none so far, or not known.
    """

    model_type = "avg_llava"
    sub_configs_defaults = {
        **LlavaNextConfig.sub_configs_defaults,
        "router_config": SubConfigSpec(config_class=RouterConfig),
    }
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig, "router_config": RouterConfig}

    image_grid_pinpoints: Any = None
    vision_feature_select_strategy: Literal["default", "full"] | None = None
    granularities: list[int] = field(default_factory=list)
    pooling_ladder: str = "width_first"
    behavior: Behavior = "paper"
    router_config: Any = None
    max_sequence_length: int = 4096
    template: str | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        pinpoints = self.image_grid_pinpoints
        super().__post_init__(**kwargs)
        self._check_tower()
        crop = self.crop_size
        if self.vision_feature_select_strategy is None:
            self.vision_feature_select_strategy = "default" if self.num_prefix_tokens else "full"
        if pinpoints is None:
            # The canvases are the same in both orders, but of equally good ones the first is taken (images no larger
            # than a crop). The original code lists (width, height), so it prefers the transposed canvas.
            order = [(1, 2), (2, 1), (2, 2), (3, 1), (1, 3)]
            if self.behavior == "released":
                order = [(columns, rows) for rows, columns in order]
            self.image_grid_pinpoints = [[crop * rows, crop * columns] for rows, columns in order]
        self.image_grid_pinpoints = [list(pinpoint) for pinpoint in self.image_grid_pinpoints]
        self.image_seq_length = self.num_patches_per_side**2
        self.granularities = list(self.granularities) or self.ladder.granularities[-NUM_GRANULARITIES:]
        self._check_vision()
        self._check_granularities()
        if self.template is not None:
            find_entry(TEMPLATES, self.template, "template")
        find_router(self).check_config(self)

    @property
    def ladder(self) -> Ladder:
        """The pooling ladder for the crops of this model."""
        return find_entry(LADDERS, self.pooling_ladder, "pooling_ladder")(self.num_patches_per_side)

    def to_dict(self) -> dict[str, Any]:
        """The fields, and `auto_map` for saved models; without the backbones' paths on this machine."""
        fields = super().to_dict() | {"auto_map": AUTO_MAP}
        for part in ("vision_config", "text_config"):
            fields[part].pop("_name_or_path", None)
        return fields

    def save_pretrained(self, save_directory: str | os.PathLike[str], **kwargs: Any) -> None:
        """Saves `config.json` and the modelling files that it names; arguments as in transformers."""
        write_modelling_files(save_directory)
        super().save_pretrained(save_directory, **kwargs)

    def check_level(self, granularity: int) -> None:
        """Raises a ValueError that names the known levels, unless `granularity` is one of them."""
        if granularity not in self.granularities:
            known = ", ".join(map(str, self.granularities))
            raise ValueError(f"granularity {granularity} is not one of this model's levels: {known}")

    @property
    def tower(self) -> Tower:
        """The family of the vision tower."""
        return find_tower(self.vision_config)

    @property
    def crop_size(self) -> int:
        """Side of a crop in pixels."""
        return self.tower.crop_size(self.vision_config)

    @property
    def num_patches_per_side(self) -> int:
        """Tokens per side of a crop after the vision tower (24 for CLIP-L/14 at 336 px).

        Pixels at the right and at the bottom that fill no patch are not seen (27 for SigLIP-so400m/14 at 384 px).
        """
        return self.crop_size // self.vision_config.patch_size

    @property
    def num_prefix_tokens(self) -> int:
        """Class token and registers of a crop, which go through the vision tower's layers and are then dropped."""
        return self.tower.num_prefix_tokens(self.vision_config)

    @property
    def num_vision_layers(self) -> int:
        """Layers of the vision tower up to `vision_feature_layer`; later ones are not run."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer

    def _check_tower(self) -> None:
        crop, patch = self.crop_size, self.vision_config.patch_size
        if not isinstance(crop, int) or not isinstance(patch, int) or not 0 < patch <= crop:
            raise ValueError(
                f"the vision tower's crops and patches must be squares, got sides {crop!r} and {patch!r} px"
            )

    def _check_vision(self) -> None:
        crop = self.crop_size
        if not isinstance(self.vision_feature_layer, int) or self.num_vision_layers < 0:
            raise ValueError(
                f"vision_feature_layer must be one layer of the tower's {self.vision_config.num_hidden_layers}, got "
                f"{self.vision_feature_layer!r}"
            )
        strategy = "default" if self.num_prefix_tokens else "full"
        if self.vision_feature_select_strategy != strategy:
            raise ValueError(
                "AVG-LLaVA pools a square grid of patches, so vision_feature_select_strategy must be 'default' where "
                f"the tower has a class token, and 'full' where it has none: with {self.vision_config.model_type} "
                f"{strategy!r}, got {self.vision_feature_select_strategy!r}"
            )
        if not 0 < len(self.image_grid_pinpoints) <= MAX_TILES:
            raise ValueError(f"image_grid_pinpoints holds {len(self.image_grid_pinpoints)} pairs, not 1 to {MAX_TILES}")
        for pinpoint in self.image_grid_pinpoints:
            if len(pinpoint) != 2 or any(side < crop or side % crop for side in pinpoint):
                raise ValueError(f"image_grid_pinpoints: {pinpoint} is not a (height, width) in multiples of {crop} px")
            if pinpoint[0] * pinpoint[1] > MAX_TILES * crop**2:
                raise ValueError(f"image_grid_pinpoints: {pinpoint} has more than {MAX_TILES} tiles of {crop} px")
        if self.max_sequence_length < 1:
            raise ValueError(f"max_sequence_length must be at least 1, got {self.max_sequence_length}")

    def _check_granularities(self) -> None:
        if not self.granularities or sorted(set(self.granularities)) != self.granularities:
            raise ValueError(f"granularities must be distinct and go from coarse to fine, got {self.granularities}")
        for granularity in self.granularities:
            rows, columns = self.ladder.grid(granularity)
            if self.behavior == "released" and (
                self.num_patches_per_side % rows or self.num_patches_per_side % columns
            ):
                raise ValueError(
                    f"granularity {granularity} has cells of unequal size on {self.num_patches_per_side} patches per "
                    "side, for which the released behavior is not defined: set behavior to 'paper'"
                )


AutoConfig.register(AvgLlavaConfig.model_type, AvgLlavaConfig, exist_ok=True)

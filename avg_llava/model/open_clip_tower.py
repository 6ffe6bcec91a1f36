"""Vision transformers of the package open_clip, which is imported when a tower is built."""

import importlib
from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from PIL.Image import Resampling
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

_SIZES = ("image_size", "patch_size", "width", "layers", "head_width", "mlp_ratio")


def import_open_clip(submodule: str = "") -> Any:
    """The package, or a module of it. Raises ValueError that says how to install it."""
    try:
        return importlib.import_module(f"open_clip{submodule}")
    except ModuleNotFoundError as error:
        raise ValueError(f"an open_clip tower needs open_clip ({error}): pip install 'avg-llava[open_clip]'") from error


@strict
class OpenClipVisionConfig(PreTrainedConfig):
    """Configuration of an open_clip tower.

    Attributes:
        vision_cfg: All fields of open_clip's `CLIPVisionCfg`.
        embed_dim: Width of the image embedding, which open_clip's constructor asks for.
        quick_gelu: The layers' activation is QuickGELU, as in OpenAI's weights.
        image_mean: Of the pixels of each channel.
        image_std: As `image_mean`.
        resample: Pillow's number of the filter that images are resized with.
    """

    model_type = "open_clip_vision"
    base_config_key = "vision_config"

    vision_cfg: dict[str, Any] | None = None
    embed_dim: int = 512
    quick_gelu: bool = False
    image_mean: list[float] | tuple[float, ...] = ()
    image_std: list[float] | tuple[float, ...] = ()
    resample: int = int(Resampling.BICUBIC)

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.vision_cfg is None:  # transformers compares saved configurations with a default one
            return
        missing = [name for name in _SIZES if name not in self.vision_cfg]
        if missing:
            raise ValueError(f"vision_config.vision_cfg of an open_clip tower lacks {', '.join(missing)}")
        if self.vision_cfg.get("timm_model_name") is not None or not isinstance(self.vision_cfg["layers"], int):
            kind = self.vision_cfg.get("timm_model_name") or "a ResNet"
            raise ValueError(
                f"this open_clip model's tower is {kind}, not open_clip's own vision transformer: name another model, "
                "or the same one in transformers' format (SigLIP is google/siglip-so400m-patch14-384)"
            )

    def _size(self, name: str) -> Any:
        if self.vision_cfg is None:
            raise ValueError("vision_config.vision_cfg of an open_clip tower is missing")
        return self.vision_cfg[name]

    @property
    def image_size(self) -> int:
        """Side of a crop in pixels."""
        return self._size("image_size")

    @property
    def patch_size(self) -> int:
        """Side of a patch in pixels."""
        return self._size("patch_size")

    @property
    def num_channels(self) -> int:
        """Channels of the pixels."""
        return 3

    @property
    def hidden_size(self) -> int:
        """Width of the layers."""
        return self._size("width")

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return self._size("layers")

    @property
    def num_attention_heads(self) -> int:
        """Heads of a layer."""
        return self.hidden_size // self._size("head_width")

    @property
    def intermediate_size(self) -> int:
        """Width of a layer's feed-forward part."""
        return int(self.hidden_size * self._size("mlp_ratio"))


class OpenClipVisionModel(PreTrainedModel):
    """The layers of open_clip's `VisionTransformer`, without its pooling and projection."""

    config_class = OpenClipVisionConfig
    main_input_name = "pixel_values"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True  # PyTorch chooses the kernel, whatever transformers is told

    def __init__(self, config: OpenClipVisionConfig):
        super().__init__(config)
        build = import_open_clip(".model")._build_vision_tower
        whole = build(config.embed_dim, config.vision_cfg, config.quick_gelu)
        self.conv1, self.ln_pre, self.layers = whole.conv1, whole.ln_pre, whole.transformer.resblocks
        self.class_embedding, self.positional_embedding = whole.class_embedding, whole.positional_embedding
        self.gradient_checkpointing = False
        self.post_init()

    def forward(self, pixels: Tensor) -> Tensor:
        """(C, 3, S, S) pixels to the input (C, 1 + P, D) of the first layer."""
        patches = self.conv1(pixels).flatten(2).transpose(1, 2)
        class_token = self.class_embedding.to(patches).expand(len(patches), 1, -1)
        return self.ln_pre(torch.cat([class_token, patches], dim=1) + self.positional_embedding.to(patches))

    def run_layer(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states after a layer, recomputed in the backward pass under gradient checkpointing."""
        if self.gradient_checkpointing and self.training:
            return checkpoint(layer, hidden, use_reentrant=False)
        return layer(hidden)


AutoConfig.register(OpenClipVisionConfig.model_type, OpenClipVisionConfig, exist_ok=True)

"""Tiny random models and inputs that the model tests share. Sizes are (height, width)."""

import torch
from transformers import CLIPVisionConfig, LlamaConfig

from avg_llava import AvgLlavaConfig, AvgLlavaForConditionalGeneration
from avg_llava.model.anyres import num_crops

CROP = 32  # pixels; patches of 4 give an 8x8 grid
IMAGE_TOKEN = 64  # == vocabulary size: outside the embedding


def tiny_config(**fields) -> AvgLlavaConfig:
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, image_size=CROP, patch_size=4
    )
    text = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, eos_token_id=2
    )
    fields = {"router_config": {"num_text_tokens": 12}, "max_sequence_length": 2048, **fields}
    return AvgLlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, **fields)


def tiny_model(seed: int = 0, **fields) -> AvgLlavaForConditionalGeneration:
    """A random model whose parameters, norms and biases too, are far from their initial values."""
    torch.manual_seed(seed)
    model = AvgLlavaForConditionalGeneration(tiny_config(**fields)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def prompt(length: int, *image_places: int, seed: int = 0) -> torch.Tensor:
    """(length,) random ids with placeholders at `image_places`."""
    ids = torch.randint(3, 64, (length,), generator=torch.Generator().manual_seed(seed))
    ids[0] = 1
    for place in image_places:
        ids[place] = IMAGE_TOKEN
    return ids


def images(config: AvgLlavaConfig, *sizes: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """`pixel_values` padded along crops with noise (padding must not matter) and `image_sizes`."""
    generator = torch.Generator().manual_seed(seed)
    most = max(num_crops(size, config) for size in sizes)
    pixels = torch.stack(
        [torch.randn(most, 3, CROP, CROP, generator=torch.Generator().manual_seed(sum(size))) for size in sizes]
    )
    for row, size in zip(pixels, sizes, strict=True):
        count = num_crops(size, config)
        row[count:] = torch.randn(row[count:].shape, generator=generator)
    return {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}


def pad(prompts: list[torch.Tensor], side: str = "right", value: int = 0) -> torch.Tensor:
    return torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=value, padding_side=side)

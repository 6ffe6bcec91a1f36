"""transformers' LLaVA-NeXT with the weights of an AVG-LLaVA model: what the paper compares with."""

import torch
from torch import Tensor
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from avg_llava.model.anyres import num_visual_tokens
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration


def as_llava_next(model: AvgLlavaForConditionalGeneration) -> LlavaNextForConditionalGeneration:
    """The same weights in transformers' own model, all but the router's; tensors are shared where they can be.

    transformers embeds its placeholder, so the vocabulary grows by rows of zeros if the placeholder lies outside it.
    """
    fields = model.config.to_dict()
    names = ("vision_config", "text_config", "image_grid_pinpoints", "image_token_index", "vision_feature_layer")
    config = LlavaNextConfig(**{name: fields[name] for name in names})
    missing = max(0, model.config.image_token_id + 1 - config.text_config.vocab_size)
    config.text_config.vocab_size += missing
    with torch.device("meta"):
        baseline = LlavaNextForConditionalGeneration(config)
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".router." not in name}
    if missing:
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            rows = weights[name].new_zeros(missing, weights[name].shape[1])
            weights[name] = torch.cat([weights[name], rows])
    baseline.load_state_dict(weights, assign=True)
    _recompute_buffers(baseline, model)
    baseline.generation_config = model.generation_config
    return baseline.eval()


def _recompute_buffers(baseline: LlavaNextForConditionalGeneration, model: AvgLlavaForConditionalGeneration) -> None:
    """Buffers that no checkpoint holds (rotary frequencies, position numbers) are the model's own."""
    buffers = dict(model.named_buffers())
    for name, buffer in baseline.named_buffers():
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(baseline.get_submodule(owner), leaf, buffers[name])


def expand_placeholders(input_ids: Tensor, image_sizes: Tensor, model: AvgLlavaForConditionalGeneration) -> Tensor:
    """One prompt (L,) as transformers wants it: as many placeholders as each image has tokens at the finest level."""
    finest = (model.config.granularities or [0])[-1]
    sizes = iter(image_sizes.tolist())
    pieces = []
    for token in input_ids.tolist():
        is_image = token == model.config.image_token_id
        pieces += [token] * (num_visual_tokens(tuple(next(sizes)), finest, model.config) if is_image else 1)
    return input_ids.new_tensor(pieces)


__all__ = ["as_llava_next", "expand_placeholders"]

"""transformers' LLaVA-NeXT with the weights of an AVG-LLaVA model: the paper's baseline."""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

from avg_llava.inference.answers import Request
from avg_llava.inference.predictor import Predictor
from avg_llava.model.anyres import num_visual_tokens
from avg_llava.model.language import language_parts
from avg_llava.model.modeling import AvgLlavaForConditionalGeneration


def as_llava_next(model: AvgLlavaForConditionalGeneration) -> LlavaNextForConditionalGeneration:
    """Puts the weights, except the router's, into transformers' model; tensors are shared where possible.

    transformers embeds its placeholder, so rows of zeros extend a vocabulary that does not hold it.

    Raises:
        ValueError: The language model's head has a bias or a soft cap, which transformers' LLaVA-NeXT has not.
    """
    kind, parts = model.config.text_config.model_type, language_parts(model.config.text_config)
    if parts.head_bias or parts.softcap is not None:
        raise ValueError(f"transformers' LLaVA-NeXT has no bias and no soft cap of logits, which {kind} needs")
    fields = model.config.to_dict()
    names = ("vision_config", "text_config", "image_grid_pinpoints", "image_token_index")
    features = ("vision_feature_layer", "vision_feature_select_strategy")
    config = LlavaNextConfig(**{name: fields[name] for name in (*names, *features)})
    missing = max(0, model.config.image_token_id + 1 - config.text_config.vocab_size)
    config.text_config.vocab_size += missing
    with torch.device("meta"):
        baseline = LlavaNextForConditionalGeneration(config)
    weights = {name: tensor for name, tensor in model.state_dict().items() if ".router." not in name}
    if missing:
        for name in (f"model.language_model.{parts.embeddings}.weight", "lm_head.weight"):
            rows = weights[name].new_zeros(missing, weights[name].shape[1])
            weights[name] = torch.cat([weights[name], rows])
    baseline.load_state_dict(weights, assign=True)
    _copy_buffers(model, baseline)
    baseline.generation_config = model.generation_config
    return baseline.eval()


def _copy_buffers(model: AvgLlavaForConditionalGeneration, baseline: LlavaNextForConditionalGeneration) -> None:
    """Copies the buffers that are in no checkpoint (rotary frequencies, position indices)."""
    buffers = dict(model.named_buffers())
    for name, buffer in baseline.named_buffers():
        if buffer.is_meta:
            owner, _, leaf = name.rpartition(".")
            setattr(baseline.get_submodule(owner), leaf, buffers[name])


def expand_placeholders(input_ids: Tensor, image_sizes: Tensor, model: AvgLlavaForConditionalGeneration) -> Tensor:
    """Repeats each placeholder of a prompt as often as its image has tokens at the finest level: (L,) -> (L',)."""
    finest = (model.config.granularities or [0])[-1]
    sizes = iter(image_sizes.tolist())
    pieces = []
    for token in input_ids.tolist():
        is_image = token == model.config.image_token_id
        pieces += [token] * (num_visual_tokens(tuple(next(sizes)), finest, model.config) if is_image else 1)
    return input_ids.new_tensor(pieces)


def llava_next_answerer(predictor: Predictor, max_new_tokens: int) -> Callable[[Request], object]:
    """Returns a function that answers greedily with the baseline on the predictor's weights and preprocessing."""
    model, processor = predictor.model, predictor.processor
    baseline = as_llava_next(model)

    @torch.inference_mode()
    def answer(request: Request) -> object:
        inputs = predictor.inputs([request])
        ids = expand_placeholders(inputs["input_ids"][0], inputs["image_sizes"], model)[None].to(model.device)
        return baseline.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pixel_values=inputs["pixel_values"].to(model.device, model.dtype),
            image_sizes=inputs["image_sizes"].to(model.device),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            pad_token_id=processor.tokenizer.pad_token_id,
        )

    return answer

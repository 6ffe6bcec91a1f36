"""Language models of transformers: the parts of a causal LM, and the check that this package computes the same.

The model runs a causal LM's layers on embeddings, many sequences in a row in training, and a head of its own on their
result. This equals the causal LM if tokens see each other through attention only, and if nothing but the head, and
perhaps a soft cap, lies between layers and logits.
"""

import inspect
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig
from transformers.conversion_mapping import WeightRenaming, extract_weight_conversions_for_model
from transformers.modeling_outputs import MoeModelOutputWithPast

_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class LanguageParts:
    """The parts of a causal LM, by the names that transformers gives them.

    Attributes:
        base: The model without its head, and the prefix of its weights.
        embeddings: The input embeddings, below `base`.
        layers: The list of layers, below `base`.
        head: The head.
        head_keys: Patterns of the prefix of the head's weights in published checkpoints, of older versions too.
        unused: Patterns of the keys of published checkpoints that are no weights.
        head_bias: The head has a bias.
        softcap: Bound of the logits, which are softcap * tanh(logits / softcap); None: there is none.
        layer_weights: Elements of the weight matrices of all layers.
        attention_width: Elements of a token's queries.
        key_value_width: Elements of a token's keys and values.
    """

    base: str
    embeddings: str
    layers: str
    head: str
    head_keys: tuple[str, ...]
    unused: tuple[str, ...]
    head_bias: bool
    softcap: float | None
    layer_weights: int
    attention_width: int
    key_value_width: int


def cap_logits(logits: Tensor, softcap: float | None) -> Tensor:
    """Bounds logits by softcap * tanh(logits / softcap); None: as they are."""
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


def language_parts(config: PreTrainedConfig) -> LanguageParts:
    """The parts of the causal LM with a configuration.

    Raises:
        ValueError: transformers has no such causal LM, or it computes more than this package does.
    """
    return _language_parts(config.model_type, config.to_json_string(use_diff=False))


@lru_cache(maxsize=64)
def _language_parts(model_type: str, fields: str) -> LanguageParts:
    def refuse(reason: str) -> ValueError:
        return ValueError(f"text_config.model_type {model_type!r} is not supported as a language model: {reason}")

    config = CONFIG_MAPPING[model_type](**json.loads(fields))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING or set(config.sub_configs) & {"vision_config", "audio_config"}:
        raise refuse("transformers has no causal language model of text alone for it")
    given: dict[str, Any] = config.to_dict()
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    base, head = model.base_model, model.get_output_embeddings()
    if base is model or not isinstance(head, nn.Linear):
        raise refuse("its head is not one linear layer on top of the model")
    unknown = set(given.get("layer_types") or ()) - _LAYER_TYPES
    if model._is_stateful or unknown:
        raise refuse(f"tokens see each other not only through attention ({', '.join(sorted(unknown)) or 'states'})")
    if not model._supports_attention_backend:
        raise refuse("transformers does not let its attention be exchanged, which packed rows of sequences need")
    if "per_layer_inputs" in inspect.signature(base.forward).parameters:
        raise refuse("its layers read token ids, which visual tokens do not have")
    names = {id(module): name for name, module in model.named_modules()}
    within = f"{model.base_model_prefix}."
    stacks = [
        name
        for name, module in base.named_children()
        if isinstance(module, nn.ModuleList) and len(module) == config.num_hidden_layers
    ]
    embeddings = base.get_input_embeddings()
    if len(stacks) != 1 or embeddings.embedding_dim != config.hidden_size or head.in_features != config.hidden_size:
        raise refuse("it is not one stack of layers as wide as its embeddings")
    head_name = names[id(head)]
    renamings = [each for each in extract_weight_conversions_for_model(model) or () if isinstance(each, WeightRenaming)]
    older = [each.source_patterns[0] for each in renamings if each.target_patterns[0] == f"{head_name}."]
    # A pattern that fits weights of this model is meant for another size of its family.
    ignored, own = sorted(model._keys_to_ignore_on_load_unexpected), model.state_dict().keys()
    unused = [pattern for pattern in ignored if not any(re.search(pattern, key) for key in own)]
    softcap = given.get("final_logit_softcapping")
    if not _is_capped_head(model, head_name, softcap):
        raise refuse("it computes its logits otherwise than by a linear layer and a soft cap")
    heads = config.num_attention_heads
    head_width = given.get("head_dim") or config.hidden_size // heads
    layers = base.get_submodule(stacks[0])
    return LanguageParts(
        base=model.base_model_prefix,
        embeddings=names[id(embeddings)].removeprefix(within),
        layers=stacks[0],
        head=head_name,
        head_keys=(rf"^{head_name}\.", *older),
        unused=(r"rotary_emb\.inv_freq$", *unused),
        head_bias=head.bias is not None,
        softcap=softcap,
        layer_weights=sum(weight.numel() for weight in layers.parameters() if weight.dim() > 1),
        attention_width=heads * head_width,
        key_value_width=2 * (given.get("num_key_value_heads") or heads) * head_width,
    )


class _Echo(nn.Module):
    """Stands in for the layers: the last hidden states are the input embeddings."""

    def forward(self, *_: Any, inputs_embeds: Tensor, **__: Any) -> MoeModelOutputWithPast:
        return MoeModelOutputWithPast(last_hidden_state=inputs_embeds)


@torch.no_grad()
def _is_capped_head(model: Any, head_name: str, softcap: float | None, width: int = 64) -> bool:
    """Tries out a causal LM without its layers and with a small head: its logits are those of the head, capped.

    The layers are echoed, so `width` need not be the model's, which a configuration can make larger than memory.
    """
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 3, width, generator=generator, device="cpu", dtype=torch.float32)
    # Without initialisation, which would advance the random numbers of the caller.
    head = nn.utils.skip_init(nn.Linear, width, 4, bias=False, device="cpu", dtype=torch.float32)
    head.weight.copy_(torch.randn(4, width, generator=generator, device="cpu") * 30 / width**0.5)
    setattr(model, model.base_model_prefix, _Echo())
    model.set_submodule(head_name, head)
    try:
        logits = model(inputs_embeds=hidden, use_cache=False).logits
    except (AttributeError, TypeError, ValueError, RuntimeError):  # it uses parts that it no longer has
        return False
    return torch.allclose(logits, cap_logits(head(hidden), softcap), atol=1e-4)

"""Tiny checkpoints with random weights, for tests that need a whole model on disk."""

from pathlib import Path

import torch
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM

from avg_llava.checkpoints.loading import build_from_backbones
from avg_llava.mini.tokenizer import build_tokenizer
from avg_llava.model.configuration import RouterConfig
from avg_llava.model.processing import AvgLlavaProcessor


def make_checkpoint(folder: Path, seed: int = 0) -> Path:
    """Writes an AVG-LLaVA checkpoint with 16 patches per crop (levels 1, 2, 4, 8, 16) and the mini tokenizer."""
    torch.manual_seed(seed)
    tokenizer = build_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8
    )
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.5,  # answers that depend on the image, and levels that differ
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    CLIPVisionModel(vision).save_pretrained(folder / "vision")
    LlamaForCausalLM(language).save_pretrained(folder / "language")
    tokenizer.save_pretrained(folder / "language")
    router = RouterConfig(num_text_tokens=4, num_attention_heads=2)
    model = build_from_backbones(folder / "vision", folder / "language", router_config=router)
    processor = AvgLlavaProcessor.from_backbones(folder / "vision", folder / "language", model.config)
    model.save_pretrained(folder / "model")
    processor.save_pretrained(folder / "model")
    return folder / "model"

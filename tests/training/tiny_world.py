"""A world small enough to train in seconds: random backbones in transformers' formats, a few images and records."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from avg_llava.training import run
from avg_llava.training.config import TrainConfig

CROP, PATCH = 16, 2  # 8 x 8 patches: levels of 4, 8, 16, 32 and 64 tokens
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (30, 40, 220), "yellow": (230, 220, 40)}
SIZES = [(16, 16), (40, 24), (24, 40), (32, 32), (50, 20)]  # (width, height)


def write_backbones(folder: Path, seed: int = 0) -> dict[str, str]:
    """Write a CLIP tower, a Llama and its tokenizer; returns the values of model.vision and model.language."""
    torch.manual_seed(seed)
    vision, language = folder / "vision", folder / "language"
    tower = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=CROP,
        patch_size=PATCH,
    )
    CLIPVisionModel(tower).save_pretrained(vision)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(language)
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(text).save_pretrained(language)
    return {"vision": str(vision), "language": str(language)}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Llama's special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(["What colour is it? red green blue yellow", "USER: ASSISTANT: A chat"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>"
    )


def write_data(folder: Path, num_samples: int = 16, num_text_only: int = 4, two_images: bool = True) -> None:
    """Write images, `captions.json` (stage 1) and `instruct.json` (stages 2 to 4)."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    names = list(COLOURS)
    captions, instruct = [], []
    for index in range(num_samples):
        colour = names[index % len(names)]
        width, height = SIZES[index % len(SIZES)]
        noise = generator.integers(-20, 20, (height, width, 3))
        pixels = np.clip(np.array(COLOURS[colour]) + noise, 0, 255).astype(np.uint8)
        file = f"images/{index}.png"
        Image.fromarray(pixels).save(folder / file)
        captions.append(_record(f"caption-{index}", file, [("<image>\nDescribe.", f"a {colour} picture")]))
        turns = [("<image>\nWhat colour is it?", colour), ("Is it big?", "yes" if width > 30 else "no")]
        instruct.append(_record(f"image-{index}", file, turns[: 1 + index % 2]))
    if two_images:
        both = ["images/0.png", "images/1.png"]
        instruct[-1] = _record("two-images", both, [("<image>\n<image>\nWhat are the colours?", "red and green")])
    for index in range(num_text_only):
        instruct.append(_record(f"text-{index}", None, [("Say something short, please.", f"number {index}")]))
    (folder / "captions.json").write_text(json.dumps(captions))
    (folder / "instruct.json").write_text(json.dumps(instruct))


def _record(identity: str, image: str | list[str] | None, turns: list[tuple[str, str]]) -> dict[str, object]:
    conversations = []
    for question, answer in turns:
        conversations += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    record: dict[str, object] = {"id": identity, "conversations": conversations}
    return record if image is None else {**record, "image": image}


def stage_values(stage: int, root: Path, world: Path) -> dict[str, object]:
    """The values of a stage's YAML file for this world; `root` holds the runs, `world` backbones and data."""
    if stage == 1:
        model = {
            "vision": str(world / "vision"),
            "language": str(world / "language"),
            "router": {"num_text_tokens": 6, "num_attention_heads": 2},
        }
    else:
        model = {"start": str(root / f"stage{stage - 1}")}
    file = "captions.json" if stage == 1 else "instruct.json"
    return {
        "stage": stage,
        "seed": 7,
        "model": model,
        "data": {
            "sources": [{"path": str(world / file)}],
            "template": "plain" if stage == 1 else "vicuna_v1",
            "group_by_modality_length": stage > 1,
            "num_workers": 0,
        },
        "optim": {
            "lr": 1e-3,
            "vision_lr": 2e-3,
            "global_batch_size": 4,
            "micro_batch_size": 2,
            "max_steps": 4,
        },
        "runtime": {"deepspeed": None, "precision": "fp32", "device": "cpu", "gradient_checkpointing": False},
        "logging": {"progress_bar": False, "trackers": []},
        "output": {"dir": str(root / f"stage{stage}")},
    }


def interrupt_at(step: int, config: TrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a stage until `step` optimizer steps are taken, and there raises an error in its next one."""

    class Interrupted(Exception):
        pass

    def interrupt(trainer, *arguments, **settings):
        if trainer.state.global_step == step:
            raise Interrupted
        return compute_loss(trainer, *arguments, **settings)

    compute_loss = run.StageTrainer.compute_loss
    with monkeypatch.context() as patch:
        patch.setattr(run.StageTrainer, "compute_loss", interrupt)
        with pytest.raises(Interrupted):
            run.run_stage(config)

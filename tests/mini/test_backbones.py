"""The shipped backbones load with transformers, are small and recognise marks; short pretraining learns."""

import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionModel, LlamaForCausalLM, LlamaTokenizer

from avg_llava.checkpoints.loading import build_from_backbones
from avg_llava.mini.backbones import (
    SHIPPED,
    Recipe,
    VisionPhase,
    crop_labels,
    image_processor,
    language_batch,
    pretrain_language,
    pretrain_vision,
    vision_batch,
)
from avg_llava.mini.glyphs import COLOURS, LETTERS, SHAPES
from avg_llava.mini.scenes import KINDS, LABEL_FIELDS, draw_scene
from avg_llava.mini.tokenizer import build_tokenizer
from avg_llava.model.splice import IGNORE_INDEX
from avg_llava.model.templates import VICUNA_SYSTEM

FEATURE_LAYER = -2


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_weights_fit_into_eight_megabytes():
    sizes = {path: path.stat().st_size for path in SHIPPED.rglob("*.safetensors")}
    assert len(sizes) == 2
    assert sum(sizes.values()) <= 8_000_000, sizes


def test_transformers_loads_all_parts():
    tower = CLIPVisionModel.from_pretrained(SHIPPED / "vision", dtype=torch.float32)
    language = LlamaForCausalLM.from_pretrained(SHIPPED / "language", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(SHIPPED / "language", dtype=torch.float32)
    crop = CLIPImageProcessor.from_pretrained(SHIPPED / "vision", dtype=torch.float32).crop_size
    assert crop["height"] == crop["width"] == tower.config.image_size
    assert isinstance(tokenizer, LlamaTokenizer)
    assert len(tokenizer) == language.config.vocab_size


def test_model_starts_from_the_shipped_backbones():
    model = build_from_backbones(SHIPPED / "vision", SHIPPED / "language")
    assert model.config.granularities == [4, 8, 16, 32, 64]
    assert model.config.image_token_id == model.config.text_config.vocab_size


def test_shipped_tokenizer_is_the_one_the_recipe_builds():
    shipped, built = AutoTokenizer.from_pretrained(SHIPPED / "language", dtype=torch.float32), build_tokenizer()
    text = VICUNA_SYSTEM + " USER: Which digits follow the star? ASSISTANT: 4 7 1</s>USER: Why? über"
    assert shipped(text).input_ids == built(text).input_ids


def test_words_of_the_world_are_single_tokens():
    tokenizer = build_tokenizer()
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == tokenizer.unk_token_id
    for word in [*COLOURS, *SHAPES, *LETTERS, "curious", "intelligence", "ASSISTANT"]:
        assert len(tokenizer.tokenize(word)) == 1, word
    assert tokenizer.tokenize("the</s>USER: red") == ["▁the", "</s>", "USER", ":", "▁red"]
    odd = "über 12\n~"
    assert tokenizer.decode(tokenizer(odd).input_ids, skip_special_tokens=True) == odd


def test_labels_are_aligned_with_patches():
    """In the tower's crops, patches labelled as a ground without a mark have that ground's colour."""
    processor, rng = image_processor(), random.Random(1)
    for _ in range(10):
        crops, labels = vision_batch(rng, 1, processor)
        patches = crops.unfold(2, 8, 8).unfold(3, 8, 8).mean((-1, -2)).flatten(2).transpose(1, 2)[1:]
        plain = (labels[1:, :, 1] == 0) & (labels[1:, :, 0] >= 0)
        for ground in labels[1:, :, 0][plain].unique():
            colours = patches[plain & (labels[1:, :, 0] == ground)]
            # Resampling blurs a mark's edge into its neighbours, so a few patches may be off.
            assert (colours - colours.median(0).values).abs().mean() < 0.1


def test_padding_has_no_label():
    processor = image_processor()
    scene = draw_scene(random.Random(0), {(12, 16): 1})
    labels = crop_labels(scene, processor.image_grid_pinpoints)
    assert labels.shape == (5, 64, len(LABEL_FIELDS))
    assert (labels[1:] == IGNORE_INDEX).all(-1).sum() == 4 * 16


def test_shipped_tower_recognises_marks():
    """A linear probe on frozen features recognises the kind of a patch: 45 kinds, chance below 10%."""
    tower = CLIPVisionModel.from_pretrained(SHIPPED / "vision", dtype=torch.float32).eval()
    processor = image_processor()

    def features(seed: str, scenes: int):
        crops, labels = vision_batch(random.Random(seed), scenes, processor)
        with torch.no_grad():
            states = tower(pixel_values=crops, output_hidden_states=True).hidden_states[FEATURE_LAYER][:, 1:]
        kinds = labels[..., 1]
        marked = kinds > 1
        return states[marked], kinds[marked]

    train, kinds = features("probe", 80)
    test, expected = features("held out", 30)
    probe = torch.nn.Linear(train.shape[1], len(KINDS))
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=60)

    def closure():
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(probe(train), kinds) + 1e-5 * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    accuracy = (probe(test).argmax(-1) == expected).float().mean().item()
    assert accuracy > 0.7, accuracy


def test_a_short_run_of_the_vision_recipe_learns():
    torch.set_num_threads(2)
    _, losses = pretrain_vision(Recipe(vision=(VisionPhase(50, 1.5e-3, 1.0, num_scenes=6),)))
    chance = sum(np.log(size) for size in LABEL_FIELDS.values())
    assert losses[0] > 0.7 * chance
    assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:3])


def test_a_short_run_of_the_language_recipe_learns():
    torch.set_num_threads(2)
    phase = replace(Recipe().language[0], steps=50)
    model, tokenizer, losses = pretrain_language(Recipe(language=(phase,)))
    assert losses[0] > np.log(len(tokenizer)) - 1.0, "does not start at chance"
    assert np.mean(losses[-5:]) < 2.5
    assert model.config.vocab_size == len(tokenizer)


def test_the_recipe_is_seeded():
    short = replace(Recipe(), language=tuple(replace(phase, steps=2) for phase in Recipe().language))
    first, second = (pretrain_language(replace(short, seed=4))[2] for _ in range(2))
    other = pretrain_language(replace(short, seed=5))[2]
    assert first == second
    assert first != other


def test_conversations_have_one_picture_and_answers():
    tokenizer = build_tokenizer()
    _, ids, labels = language_batch(random.Random(0), Recipe().language[1], tokenizer)
    for sample, targets in zip(ids, labels, strict=True):
        assert sample.count(len(tokenizer)) == 1
        assert any(target != IGNORE_INDEX for target in targets)
        assert tokenizer.unk_token_id not in sample


def test_all_files_are_shipped():
    names = {str(path.relative_to(SHIPPED)) for path in SHIPPED.rglob("*") if path.is_file()}
    assert {
        "vision/config.json", "vision/model.safetensors", "vision/preprocessor_config.json",
        "language/config.json", "language/model.safetensors", "language/tokenizer.json",
        "language/tokenizer_config.json",
    } <= names  # fmt: skip
    assert isinstance(SHIPPED, Path)

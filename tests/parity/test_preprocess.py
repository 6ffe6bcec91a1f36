"""Preprocessing against golden/H: canvases, pixels, token ids, labels, batches, and counts of visual tokens."""

import hashlib

import pytest
import torch
from transformers import AutoTokenizer, CLIPVisionConfig, LlamaConfig

from avg_llava import AvgLlavaConfig, AvgLlavaProcessor
from avg_llava.data.collator import Collator
from avg_llava.data.encoding import encode_conversation
from avg_llava.data.records import Turn
from avg_llava.model.anyres import _padding as padding
from avg_llava.model.anyres import canvas_tiles, kept_window, num_crops, num_visual_tokens, select_canvas
from tests.parity.golden import GOLDEN, ORIGINAL_IMAGE_TOKEN, golden, golden_image

TENSORS, FACTS = golden("H_preprocess")
TOKENIZER = GOLDEN / "tokenizer_tiny"


def config_of(crop: int) -> AvgLlavaConfig:
    vision = CLIPVisionConfig(
        image_size=crop, patch_size=crop // 24, hidden_size=32, num_attention_heads=4, num_hidden_layers=3
    )
    text = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1, intermediate_size=64, vocab_size=512)
    return AvgLlavaConfig(vision_config=vision, text_config=text, behavior="released", image_token_index=512)


@pytest.fixture(scope="module")
def processors() -> dict[int, AvgLlavaProcessor]:
    tower = GOLDEN / "checkpoint" / "clip_tiny"
    return {crop: AvgLlavaProcessor.from_backbones(tower, TOKENIZER, config_of(crop)) for crop in (96, 336)}


@pytest.mark.parametrize("name", FACTS["images"])
def test_canvas_and_pixels(name, processors):
    expected = FACTS["images"][name]
    crop, size = name.split("/")
    width, height = map(int, size.split("x"))
    image = golden_image(width, height, expected["k"])
    assert hashlib.sha256(image.tobytes()).hexdigest() == expected["image_sha256"]

    processor, config = processors[int(crop)], config_of(int(crop))
    features = processor.image_processor([image], return_tensors="pt")
    pixels = features["pixel_values"][0]
    assert features["image_sizes"].tolist() == [[height, width]]
    canvas = select_canvas((height, width), config.image_grid_pinpoints)
    assert canvas == tuple(reversed(expected["best_resolution_wh"]))
    assert canvas_tiles((height, width), config) == tuple(reversed(expected["grid_wh"]))
    assert pixels.shape == (expected["crops"], 3, int(crop), int(crop))
    assert num_crops((height, width), config) == expected["crops"]
    sampled = pixels.flatten()[expected["flat_positions"]]
    assert torch.allclose(sampled, torch.tensor(expected["flat_values"]), rtol=0, atol=1e-6)
    # Stronger than the tolerance: every pixel, bit for bit.
    assert hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest() == expected["sha256_float32"]


CONVERSATIONS = {**FACTS["v1"], **FACTS["plain"]}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_ids_and_labels(name):
    case = CONVERSATIONS[name]
    section, legacy, _ = name.split("/")
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER, legacy=legacy == "legacy")
    turns = [Turn(turn["from"], turn["value"]) for turn in case["conversation"]]
    template = {"v1": "vicuna_v1", "plain": "plain"}[section]
    encoded = encode_conversation(turns, tokenizer, template, ORIGINAL_IMAGE_TOKEN)
    # The released tokenisation cuts text-only samples; here the data set does, and in the same place.
    end = None if case.get("has_image", True) else case["model_max_length"]
    assert encoded.input_ids[:end] == TENSORS[f"{name}/input_ids"].tolist()
    assert encoded.labels[:end] == TENSORS[f"{name}/labels"].tolist()
    # Where the released code masks everything, it prints a warning; here the reason is returned.
    assert (encoded.masked_because is not None) == bool(case.get("stdout"))


def test_generation_prompt(processors):
    facts = FACTS["generation_prompt"]
    processor = processors[96]
    question = facts["text"].split("<image>\n")[1].removesuffix(" ASSISTANT:")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    assert prompt == facts["text"]
    inputs = processor(images=golden_image(60, 40, 0), text=prompt)
    assert unnamed(inputs["input_ids"][0]) == TENSORS["prompt/input_ids"].tolist()
    assert inputs["input_ids"].shape[1] == FACTS["n_tokens_generation_prompt_tiny_tokenizer"]


def test_two_images_in_one_text(processors):
    image = golden_image(60, 40, 0)
    inputs = processors[96](images=[image, image], text=FACTS["two_images_text"])
    assert unnamed(inputs["input_ids"][0]) == TENSORS["two_images/input_ids"].tolist()
    assert inputs["pixel_values"].shape[0] == 2


def unnamed(ids: torch.Tensor) -> list[int]:
    """Ids with the original code's mark for images in place of ours."""
    return [ORIGINAL_IMAGE_TOKEN if token == 512 else token for token in ids.tolist()]


def test_collator():
    """The golden batch: its rows without their padding, put together again."""
    mask = TENSORS["collator/attention_mask"]
    rows = []
    for number in range(len(mask)):
        length = int(mask[number].sum())
        rows.append(
            {
                "input_ids": TENSORS["collator/input_ids"][number, :length],
                "labels": TENSORS["collator/labels"][number, :length],
                "pixel_values": [],
                "image_sizes": torch.zeros(0, 2, dtype=torch.long),
                "index": number,
            }
        )
    assert len({len(row["labels"]) for row in rows}) == len(rows)  # rows of different lengths, or nothing is tested
    batch = Collator(pad_token_id=0)(rows)
    assert torch.equal(batch["input_ids"], TENSORS["collator/input_ids"])
    assert torch.equal(batch["labels"], TENSORS["collator/labels"])
    assert torch.equal(batch["attention_mask"].bool(), mask)


@pytest.mark.parametrize("size", FACTS["real_size_token_counts"])
def test_visual_tokens_at_336_pixels(size):
    expected = FACTS["real_size_token_counts"][size]
    width, height = map(int, size.split("x"))
    config = config_of(336)
    assert canvas_tiles((height, width), config) == tuple(reversed(expected["grid_wh"]))
    for granularity in config.granularities:
        facts = expected[str(granularity)]
        window = kept_window((height, width), granularity, config)
        assert [window.bottom - window.top, window.right - window.left] == facts["kept_hw"]
        assert num_visual_tokens((height, width), granularity, config) == facts["visual_tokens"]


@pytest.mark.parametrize("case", FACTS["unpad_unit"], ids=lambda case: f"{case['image_wh']}-{case['canvas_hw']}")
def test_unpadding_of_a_token_map(case):
    (rows, columns), (width, height) = case["canvas_hw"], case["image_wh"]
    pad_rows, pad_columns = padding((height, width), rows, columns, ndigits=None)
    assert [rows - 2 * pad_rows, columns - 2 * pad_columns] == case["out_hw"]
    if case["first_row_col"] is not None:
        assert [pad_rows, pad_columns] == case["first_row_col"]

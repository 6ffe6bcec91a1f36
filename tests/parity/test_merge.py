"""Golden D: merged embeddings, labels and sequence lengths of every image at every level, and of batches."""

import pytest
import torch

from avg_llava import AvgLlavaProcessor
from tests.parity.golden import GOLDEN, SIZES, golden, golden_image

D, D_JSON = golden("D_merge")


def _splice(model, inputs, granularity, padding_side="right"):
    with torch.no_grad():
        features = None
        if "pixel_values" in inputs:
            features = model.encode_images(inputs["pixel_values"], inputs["image_sizes"])
        return model.splice(
            features, inputs["input_ids"], inputs["attention_mask"], inputs["labels"], granularity, padding_side
        )


def _assert_embeds(embeds, key):
    """Golden files keep every row of short sequences and every 11th or 37th of long ones."""
    stored = [name for name in D if name.startswith(f"{key}/inputs_embeds")]
    assert len(stored) == 1, stored
    stride = int(stored[0].partition("_every")[2] or 1)
    torch.testing.assert_close(embeds[..., ::stride, :], D[stored[0]], rtol=0, atol=1e-5)


@pytest.mark.parametrize("granularity", [36, 72, 144, 288, 576])
@pytest.mark.parametrize("image", SIZES)
def test_single_image(released_model, batch_inputs, image, granularity):
    about = D_JSON["cases"][image]["granularity"][str(granularity)]
    inputs = batch_inputs(D["in/input_ids"], [image], labels=D["in/labels"])
    spliced = _splice(released_model, inputs, granularity)
    assert spliced.inputs_embeds.shape[1] == about["seq_len"]
    assert spliced.num_visual_tokens.tolist() == [about["visual_tokens"]]
    key = f"{image}/{granularity}"
    assert torch.equal(spliced.labels[0], D[f"{key}/labels"])
    _assert_embeds(spliced.inputs_embeds[0], key)


@pytest.mark.parametrize(
    ("case", "granularity", "side"),
    [
        ("batch2", 36, "right"),
        ("batch2", 144, "right"),
        ("batch2_left", 36, "left"),
        ("mixed_textonly", 36, "right"),
        ("all_textonly", 36, "right"),
    ],
)
def test_batch(released_model, batch_inputs, case, granularity, side):
    """Batches padded on either side, with samples without images."""
    names = {(width, height): name for name, (width, height) in SIZES.items()}
    sizes = D_JSON["cases"][f"{case}/{granularity}"]["sizes"]
    images = [names[tuple(size)] for size in sizes if tuple(size) in names]
    ids = D[f"{case}/input_ids"]
    labels = D[f"{case}/labels"] if case == "batch2" else D[f"{case}/labels_in"]
    inputs = batch_inputs(ids, images, attention_mask=ids != 0, labels=labels)
    spliced = _splice(released_model, inputs, granularity, side)
    assert spliced.attention_mask.sum(1).tolist() == D_JSON["cases"][f"{case}/{granularity}"]["valid"]
    assert torch.equal(spliced.labels, D[f"{case}/{granularity}/labels"])
    _assert_embeds(spliced.inputs_embeds, f"{case}/{granularity}")


def test_batch_cut_to_longest_sequence(released_model, batch_inputs, monkeypatch):
    monkeypatch.setattr(released_model.config, "max_sequence_length", 180)
    ids = D["batch2/input_ids"]
    inputs = batch_inputs(ids, ["w400x120", "w300x200"], attention_mask=ids != 0, labels=D["batch2/labels"])
    spliced = _splice(released_model, inputs, 36)
    assert torch.equal(spliced.labels, D["batch2_maxlen180/36/labels"])
    _assert_embeds(spliced.inputs_embeds, "batch2_maxlen180/36")


def test_two_images_in_one_sample(released_model, batch_inputs):
    """Routed as the released code does it: the first image by the prompt, the second without text."""
    processor = AvgLlavaProcessor.from_backbones(
        GOLDEN / "checkpoint" / "clip_tiny", GOLDEN / "tokenizer_tiny", released_model.config
    )
    images = [golden_image(192, 96, 6), golden_image(100, 60, 5)]
    inputs = batch_inputs(D["two_images/input_ids"], []) | processor.image_processor(images, return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"][0], D["two_images/pixel0"], rtol=0, atol=1e-6)
    with torch.no_grad():
        output = released_model(**inputs)
        without_text = released_model.route(
            released_model.encode_images(inputs["pixel_values"], inputs["image_sizes"]),
            inputs["input_ids"],
            torch.where(inputs["input_ids"] == released_model.config.image_token_id, 1, 0),
        )
    assert output.logits.shape[1] == D_JSON["two_images"]["seq_len"]
    torch.testing.assert_close(output.router_logits[1], without_text[1])

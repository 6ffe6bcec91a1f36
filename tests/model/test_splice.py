"""Splicing against a loop that appends tokens one by one."""

import pytest
import torch

from avg_llava.model.splice import IGNORE_INDEX, splice_visual_tokens


def _by_hand(embeds, is_image, mask, visual, labels, side, max_length):
    rows, row_labels, images = [], [], iter(visual)
    for sample in range(len(embeds)):
        row, row_label = [], []
        for place in range(embeds.shape[1]):
            if not mask[sample, place]:
                continue
            new = list(next(images)) if is_image[sample, place] else [embeds[sample, place]]
            row += new
            row_label += [IGNORE_INDEX] * len(new) if is_image[sample, place] else [int(labels[sample, place])]
        rows.append(row[:max_length])
        row_labels.append(row_label[:max_length])
    longest = max(map(len, rows))
    out = torch.zeros(len(rows), longest, embeds.shape[-1])
    out_mask = torch.zeros(len(rows), longest, dtype=torch.long)
    out_labels = torch.full((len(rows), longest), IGNORE_INDEX)
    for sample, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        for step, vector in enumerate(row):
            out[sample, start + step] = vector
            out_mask[sample, start + step] = 1
            out_labels[sample, start + step] = row_labels[sample][step]
    return out, out_mask, out_labels


def _batch(seed, input_side):
    torch.manual_seed(seed)
    embeds = torch.randn(4, 9, 5)
    labels = torch.randint(0, 50, (4, 9))
    is_image = torch.zeros(4, 9, dtype=torch.bool)
    mask = torch.ones(4, 9, dtype=torch.long)
    lengths = [9, 5, 7, 8]
    for sample, length in enumerate(lengths):
        if input_side == "left":
            mask[sample, : 9 - length] = 0
        else:
            mask[sample, length:] = 0
    for sample, place in [(0, 1), (0, 6), (1, 4), (3, 5)]:  # two images, one, none, one
        is_image[sample, place] = True
    visual = [torch.randn(count, 5) for count in (3, 7, 1, 4)]
    return embeds, is_image, mask, visual, labels


@pytest.mark.parametrize("max_length", [None, 6])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("input_side", ["left", "right"])
def test_splice_equals_appending_one_by_one(input_side, side, max_length):
    embeds, is_image, mask, visual, labels = _batch(0, input_side)
    spliced = splice_visual_tokens(embeds, is_image, mask, visual, labels, side, max_length)
    out, out_mask, out_labels = _by_hand(embeds, is_image, mask, visual, labels, side, max_length)
    assert torch.equal(spliced.inputs_embeds, out)
    assert torch.equal(spliced.attention_mask, out_mask)
    assert torch.equal(spliced.labels, out_labels)
    assert spliced.num_visual_tokens.tolist() == [3, 7, 1, 4]
    for positions, kept in zip(spliced.position_ids, out_mask.bool(), strict=True):
        assert positions[kept].tolist() == list(range(int(kept.sum())))


def test_gradients_reach_text_and_visual_tokens():
    embeds, is_image, mask, visual, _ = _batch(1, "right")
    leaves = [embeds.requires_grad_(), *(tokens.requires_grad_() for tokens in visual)]
    splice_visual_tokens(embeds, is_image, mask, visual).inputs_embeds.sum().backward()
    used = mask.bool() & ~is_image
    assert torch.equal(leaves[0].grad[..., 0], used.float())
    assert all(bool((leaf.grad == 1).all()) for leaf in leaves[1:])


def test_wrong_number_of_images_is_refused():
    embeds, is_image, mask, visual, _ = _batch(0, "right")
    with pytest.raises(ValueError, match=r"3 images but its samples hold \[2, 1, 0, 1\] image placeholders"):
        splice_visual_tokens(embeds, is_image, mask, visual[:3])

import torch

from avg_llava.data.collator import Collator


def item(length: int, *crops: int, index: int = 0) -> dict:
    return {
        "input_ids": torch.arange(length) + 10,
        "labels": torch.arange(length) + 10,
        "pixel_values": [torch.full((count, 3, 4, 4), float(count)) for count in crops],
        "image_sizes": torch.tensor([[count, 7] for count in crops], dtype=torch.long).reshape(-1, 2),
        "index": index,
        "id": "a",
        "source": "b",
    }


def test_padding():
    batch = Collator(pad_token_id=5)([item(3, 2, index=4), item(5, index=1), item(1, 4, 3, index=9)])
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "index", "pixel_values", "image_sizes"}
    assert batch["input_ids"].tolist() == [[10, 11, 12, 5, 5], [10, 11, 12, 13, 14], [10, 5, 5, 5, 5]]
    assert batch["labels"].tolist()[0] == [10, 11, 12, -100, -100]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5, 1]
    assert batch["index"].tolist() == [4, 1, 9]
    assert batch["pixel_values"].shape == (3, 4, 3, 4, 4)
    for image, count in zip(batch["pixel_values"], (2, 4, 3), strict=True):
        assert bool((image[:count] == count).all())
        assert bool((image[count:] == 0).all())
    assert batch["image_sizes"].tolist() == [[2, 7], [4, 7], [3, 7]]


def test_no_images():
    batch = Collator(pad_token_id=0)([item(3), item(2)])
    assert batch.keys() == {"input_ids", "attention_mask", "labels", "index"}


def test_an_id_equal_to_padding_stays_visible():
    batch = Collator(pad_token_id=11)([item(3), item(4)])
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]

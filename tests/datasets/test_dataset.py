import json
import logging

import pytest
import torch
from torch.utils.data import DataLoader

from avg_llava.data import Collator, ConversationDataset, DataError, DataSource
from avg_llava.model.anyres import num_crops, num_visual_tokens
from tests.tiny import record, write_records

WIDE, TALL, TEXT, CUT = (f"images/{name}.png" for name in ("wide", "tall", "text", "cut"))


@pytest.fixture
def make(processor, config):
    def dataset(*sources, template="vicuna_v1", **options) -> ConversationDataset:
        sources = [source if isinstance(source, DataSource) else DataSource(source) for source in sources]
        return ConversationDataset(sources, processor, template, config, **options)

    return dataset


def test_items(folder, make, config, processor):
    path = write_records(
        folder,
        record("one", "<image>\nWhat?", "A car.", WIDE),
        record(2, "Hi", "Yes"),
        record(3, "<image> or <image>?", "Both.", TALL, WIDE),
    )
    dataset = make(path)
    one, text, two = (dataset[index] for index in range(3))
    assert [one["id"], text["id"], two["id"]] == ["one", "2", "3"]
    assert one["source"] == f"{path}, record 0"
    assert [image.shape[0] for image in one["pixel_values"]] == [num_crops((60, 90), config)]
    assert one["image_sizes"].tolist() == [[60, 90]]
    assert text["pixel_values"] == []
    assert text["image_sizes"].shape == (0, 2)
    assert two["image_sizes"].tolist() == [[60, 20], [60, 90]]
    assert [image.shape[0] for image in two["pixel_values"]] == [
        num_crops(size, config) for size in [(60, 20), (60, 90)]
    ]
    for item, images in ((one, 1), (text, 0), (two, 2)):
        assert item["input_ids"].shape == item["labels"].shape
        assert int((item["input_ids"] == processor.image_token_id).sum()) == images
        assert bool((item["labels"] != -100).any())


def test_batches_through_loader_workers(folder, make, processor):
    records = [record(n, "<image>\nWhat?", "A car.", WIDE if n % 2 else TALL) for n in range(6)]
    dataset = make(write_records(folder, *records, record("text", "Hi", "Yes"), record("more", "Hi", "No")))
    loader = DataLoader(dataset, 2, collate_fn=Collator(processor.tokenizer.pad_token_id), num_workers=2)
    batches = list(loader)
    assert torch.cat([batch["index"] for batch in batches]).tolist() == list(range(8))
    assert all(batch["pixel_values"].shape[0] == 2 for batch in batches[:3])
    assert "pixel_values" not in batches[3]


def test_several_files_with_roots_and_sampling(folder, make):
    (folder / "lists").mkdir()
    records = [record(n, "<image>\nWhat?", "A car.", "wide.png") for n in range(10)]
    path = write_records(folder / "lists", *records)
    root = folder / "images"

    def ids(*samplings, seed=0, weight=1.0):
        dataset = make(*(DataSource(path, root, sampling, weight) for sampling in samplings), seed=seed)
        assert dataset[0]["image_sizes"].tolist() == [[60, 90]]
        return [int(dataset.sample(index).id) for index in range(len(dataset))]

    assert ids(None) == ids("all") == list(range(10))
    assert ids("first:3", "end:20%") == [0, 1, 2, 8, 9]
    assert ids(None, weight=2) == [*range(10), *range(10)]
    weighted = ids("first:5", weight=2.4)
    assert weighted[:10] == [*range(5), *range(5)]
    assert weighted[10:] == sorted(set(weighted[10:]))
    assert len(weighted[10:]) == 2
    assert weighted == ids("first:5", weight=2.4)
    assert any(weighted != ids("first:5", weight=2.4, seed=seed) for seed in (1, 2, 3))
    assert len(ids(None, weight=0.5)) == 5
    selected = ids("random:40%")
    assert len(selected) == 4
    assert selected == sorted(set(selected))
    assert selected == ids("random:4")
    assert any(selected != ids("random:4", seed=seed) for seed in (1, 2))


@pytest.mark.parametrize("sampling", ["some", "first:", "first:-1", "first:11", "random:110%", "repeat:2", "first:2.5"])
def test_bad_sampling(folder, make, sampling):
    path = write_records(folder, *[record(n, "Hi", "Yes") for n in range(10)])
    with pytest.raises(DataError, match=r"sampling .*data\.json"):
        make(DataSource(path, None, sampling))


def test_malformed_records_are_errors_or_left_out(folder, make, caplog):
    path = write_records(
        folder,
        record("good", "Hi", "Yes"),
        record("a", "<image>", "Yes"),
        "text",
        record("b", "Hi", 3),
        record("also good", "Hi", "No"),
    )
    with pytest.raises(DataError) as caught:
        make(path)
    for part in ("3 malformed records", "sample 'a'", "record 2", "sample 'b'", "on_bad_sample"):
        assert part in str(caught.value)
    with caplog.at_level(logging.WARNING):
        dataset = make(path, on_bad_sample="skip")
    assert [dataset.sample(index).id for index in range(len(dataset))] == ["good", "also good"]
    assert dataset.problem_counts["malformed record left out"] == 3
    assert "sample 'a'" in caplog.text


def test_conversations_that_the_template_cannot_hold_are_malformed(folder, make):
    path = write_records(folder, record("caption", "<image>", "A car.", WIDE), record("chat", "Hi", "Yes"))
    with pytest.raises(DataError, match=r"sample 'chat' .*template 'plain' is for captions"):
        make(path, template="plain")
    assert len(make(path, template="plain", on_bad_sample="skip")) == 1


@pytest.mark.parametrize("image", [TEXT, CUT, "images/nowhere.png"])
def test_unreadable_images_are_errors_or_masked(folder, make, caplog, image, processor):
    path = write_records(folder, record("bad", "<image>\nWhat?", "A car.", image), record("good", "Hi", "Yes"))
    with pytest.raises(DataError, match=rf"sample 'bad' .*{image}.*on_bad_sample"):
        make(path)[0]
    dataset = make(path, on_bad_sample="skip")
    with caplog.at_level(logging.WARNING):
        item = dataset[0]
    assert "sample 'bad'" in caplog.text
    assert image in caplog.text
    assert len(dataset) == 2  # the order keeps it, so that ranks take the same steps
    assert dataset.problem_counts == {"unreadable sample masked": 1}
    batch = Collator(processor.tokenizer.pad_token_id)([item, item])
    assert "pixel_values" not in batch
    assert batch["index"].tolist() == [0, 0]
    assert set(batch["labels"].flatten().tolist()) == {-100}
    assert bool(batch["attention_mask"].any(1).all())  # no empty row


def test_one_unreadable_image_of_two_masks_the_sample(folder, make):
    path = write_records(folder, record("bad", "<image><image>\nWhat?", "A car.", WIDE, TEXT))
    item = make(path, on_bad_sample="skip")[0]
    assert item["pixel_values"] == []
    assert item["labels"].tolist() == [-100]


def test_links_out_of_the_root_are_refused(folder, make, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    (folder / WIDE).rename(outside / "wide.png")
    (folder / "images" / "link.png").symlink_to(outside / "wide.png")
    (folder / "linked").symlink_to(outside)
    (folder / "inside.png").symlink_to(folder / TALL)
    for image in ("images/link.png", "linked/wide.png"):
        path = write_records(folder, record("link", "<image>", "A car.", image))
        with pytest.raises(DataError, match=r"sample 'link' .*leads out of the image root .*follow_links"):
            make(path)[0]
        assert make(DataSource(path, follow_links=True))[0]["image_sizes"].tolist() == [[60, 90]]
    assert make(write_records(folder, record("in", "<image>", "A car.", "inside.png")))[0]["image_sizes"].tolist() == [
        [60, 20]
    ]


def test_large_images_are_unreadable(folder, make):
    path = write_records(folder, record("big", "<image>", "A car.", WIDE))
    with pytest.raises(DataError, match=r"sample 'big' .*90x60 pixels is above the limit of 5399"):
        make(path, max_image_pixels=5399)[0]
    assert len(make(path, max_image_pixels=5400)[0]["pixel_values"]) == 1


class TestLongSamples:
    """Every image is counted at the finest level, and samples are truncated at the end."""

    def whole(self, make, path, config) -> tuple[dict, int]:
        item = make(path)[0]
        visual = sum(num_visual_tokens(size, 16, config) for size in item["image_sizes"].tolist())
        return item, len(item["input_ids"]) - len(item["pixel_values"]) + visual

    def test_text_is_truncated_at_its_end(self, folder, make, config, caplog):
        path = write_records(folder, record("long", "<image>\nWhat?", "A car and a dog.", WIDE))
        item, length = self.whole(make, path, config)
        assert make(path, max_length=length)[0]["input_ids"].equal(item["input_ids"])
        assert not caplog.records
        cut = make(path, max_length=length - 3)[0]
        assert cut["input_ids"].equal(item["input_ids"][:-3])
        assert cut["labels"].equal(item["labels"][:-3])
        assert "sample 'long'" in caplog.text

    def test_images_beyond_the_end_are_dropped_with_their_placeholders(self, folder, make, config, processor):
        path = write_records(folder, record("long", "<image> or <image>?", "Both.", TALL, WIDE))
        item = make(path)[0]
        second = (item["input_ids"] == processor.image_token_id).nonzero().flatten().tolist()[1]
        before = second - 1 + num_visual_tokens((60, 20), 16, config)
        cut = make(path, max_length=before + 5)[0]
        assert cut["input_ids"].equal(item["input_ids"][:second])
        assert cut["image_sizes"].tolist() == [[60, 20]]
        assert len(cut["pixel_values"]) == 1

    def test_samples_that_lose_their_answers_are_logged(self, folder, make, caplog):
        path = write_records(folder, record("lost", "Why? " * 50, "Because."))
        item = make(path, max_length=120)[0]
        assert len(item["input_ids"]) == 120
        assert set(item["labels"].tolist()) == {-100}
        assert "sample without supervised tokens: sample 'lost'" in caplog.text

    def test_the_models_limit_is_the_default(self, folder, make, config):
        assert make(write_records(folder, record("a", "Hi", "Yes"))).max_length == config.max_sequence_length


def test_masked_conversations_are_logged_with_the_reason(folder, make, caplog):
    make(write_records(folder, record("odd", "What does ASSISTANT: mean?", "Me.")))[0]
    assert "sample 'odd'" in caplog.text
    assert "mark turns" in caplog.text


def test_problems_are_logged_at_first_and_then_counted(folder, make, caplog):
    path = write_records(folder, *[record(n, "Hi", 3) for n in range(30)], record("good", "Hi", "Yes"))
    with caplog.at_level(logging.WARNING):
        dataset = make(path, on_bad_sample="skip")
    assert dataset.problem_counts["malformed record left out"] == 30
    assert len(caplog.records) == 10


def test_modality_lengths(folder, make):
    path = write_records(
        folder,
        record("a", "<image>\nWhat is it?", "A red car.", WIDE),
        record("b", "What is  it?", "A\ncar."),
        record("c", "", ""),
    )
    assert make(path).modality_lengths.tolist() == [7, -5, -1]


def test_fingerprint(folder, make, tmp_path_factory):
    records = [record(n, "Hi", "Yes") for n in range(4)]
    first = make(write_records(folder, *records)).fingerprint()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert make(write_records(elsewhere, *records)).fingerprint() == first  # the path does not matter
    assert make(folder / "data.json").fingerprint() == first
    assert make(folder / "data.json", seed=1).fingerprint() == first  # nothing is selected at random
    others = [
        make(folder / "data.json", max_length=100),
        make(DataSource(folder / "data.json", sampling="first:2")),
        make(DataSource(folder / "data.json", sampling="random:2")),
        make(DataSource(folder / "data.json", sampling="random:2"), seed=1),
        make(folder / "data.json", folder / "data.json"),
        make(write_records(folder, *records, name="again.json")),
        make(write_records(folder, *records[:3], record(3, "Hi", "No"))),
    ]
    prints = [dataset.fingerprint() for dataset in others]
    assert prints[5] == first
    assert len({first, *prints[:5], prints[6]}) == 7


def test_refusals(folder, make):
    path = write_records(folder, record("a", "Hi", "Yes"))
    with pytest.raises(ValueError, match=r"template must be one of plain, vicuna_v1, .*; got 'v1'"):
        make(path, template="v1")
    with pytest.raises(ValueError, match="on_bad_sample"):
        make(path, on_bad_sample="ignore")
    with pytest.raises(DataError, match=r"image root .*nowhere"):
        make(DataSource(path, folder / "nowhere"))
    with pytest.raises(DataError, match="no usable record"):
        make(write_records(folder, name="empty.json"))
    with pytest.raises(DataError, match="no usable record in no sources"):
        make()


def test_ten_thousand_records_open_no_image(folder, make):
    """Only requested samples open their images."""
    path = folder / "many.jsonl"
    lines = (json.dumps(record(n, "<image>\nWhat?", "A car.", f"images/{n}.png")) for n in range(10_000))
    path.write_text("\n".join(lines))
    dataset = make(path)
    assert len(dataset) == len(dataset.modality_lengths) == 10_000

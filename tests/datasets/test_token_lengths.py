import numpy as np
import pytest

from avg_llava.data import ConversationDataset, DataSource
from avg_llava.data.token_lengths import SampleLengths, token_lengths
from avg_llava.model.anyres import num_visual_tokens
from avg_llava.model.configuration import AvgLlavaConfig
from tests.tiny import record, write_records

WIDE, TALL, TEXT, CUT = (f"images/{name}.png" for name in ("wide", "tall", "text", "cut"))


@pytest.fixture
def dataset(folder, processor, config):
    path = write_records(
        folder,
        record(0, "<image>\nWhat is it, and why is it where it is?", "A car.", WIDE),
        record(1, "Hi", "Yes, hello, how are you?"),
        record(2, "<image> or <image>?", "Both.", TALL, WIDE),
        record(3, "<image>\nCut?", "No image", TEXT),
        record(4, "<image>\nCut?", "An image that ends too early", CUT),
        record(5, "<image>\nWhat?", "A car. " * 100, WIDE),
    )
    return ConversationDataset([DataSource(path)], processor, "vicuna_v1", config, max_length=300, on_bad_sample="skip")


def expected_length(item, config) -> int:
    finest = config.granularities[-1]
    visual = sum(num_visual_tokens(size, finest, config) for size in item["image_sizes"].tolist())
    return len(item["input_ids"]) - len(item["image_sizes"]) + visual


def test_counts_equal_the_lengths_of_items(dataset, config):
    lengths = [SampleLengths(dataset)[index] for index in range(6)]
    expected = [expected_length(dataset[index], config) for index in range(6)]
    assert [expected[index] for index in (3, 4)] == [1, 1]  # the masked token of an unreadable sample
    assert lengths[:4] + lengths[5:] == expected[:4] + expected[5:]
    assert 1 < lengths[4] <= 300  # its header can be read: an upper bound
    assert lengths[5] == 300
    assert min(lengths[0], lengths[2]) > lengths[1] + config.granularities[-1]


def test_counted_once(dataset, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    first = token_lengths(dataset, folder, rank=0, num_workers=2)
    assert first.tolist() == [SampleLengths(dataset)[index] for index in range(6)]
    assert [file.name for file in folder.iterdir()] == [next(folder.glob("lengths-*.npy")).name]

    def never(self, index):
        raise AssertionError("counted again")

    monkeypatch.setattr(SampleLengths, "__getitem__", never)
    for rank in (0, 1):
        assert np.array_equal(token_lengths(dataset, folder, rank, num_workers=0), first)


def test_other_data_or_settings_are_counted_again(dataset, folder, processor, config, tmp_path):
    shorter = ConversationDataset(
        [DataSource(folder / "data.json")], processor, "vicuna_v1", config, max_length=50, on_bad_sample="skip"
    )
    other = AvgLlavaConfig(**{**config.to_dict(), "image_grid_pinpoints": [[32, 32]]})
    fewer = ConversationDataset(
        [DataSource(folder / "data.json")], processor, "vicuna_v1", other, max_length=300, on_bad_sample="skip"
    )
    found = [token_lengths(each, tmp_path / "run", 0, 0) for each in (dataset, shorter, fewer)]
    assert len(list((tmp_path / "run").iterdir())) == 3
    assert found[1].max() <= 50
    assert found[2][0] < found[0][0]

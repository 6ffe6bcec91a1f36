"""Tokens of every sample, counted once and kept in a file: what micro-batches with a token budget are filled by."""

import time
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from avg_llava.common.files import atomic_write, hash_json
from avg_llava.data.dataset import ConversationDataset
from avg_llava.model.anyres import num_visual_tokens
from avg_llava.model.images import DataError, read_image_size

BATCH_SIZE = 64  # samples that a process measures before it reports
_POLL_SECONDS = 0.2


class SampleLengths(Dataset[int]):
    """Tokens of each sample: text and, at the finest level, visual tokens, cut to the longest sequence.

    Of images only the headers are read. A sample whose images cannot be opened counts one token, the one that stands
    for it where bad samples are skipped.
    """

    def __init__(self, dataset: ConversationDataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> int:
        dataset, sample = self.dataset, self.dataset.sample(index)
        try:
            sizes = [read_image_size(path, dataset.max_image_pixels) for path in sample.images]
        except DataError:
            return 1
        text = dataset.encode_text(sample, sizes)
        finest = dataset.config.granularities[-1]
        visual = [num_visual_tokens(size, finest, dataset.config) for size in sizes[: text.num_images]]
        return len(text.input_ids) - text.num_images + sum(visual)


def token_lengths(dataset: ConversationDataset, folder: Path, rank: int, num_workers: int) -> np.ndarray:
    """Tokens of each sample (samples,), from a file in `folder`, which the first process writes if there is none.

    Args:
        dataset: The samples.
        folder: Where the file is or will be; all processes must see it.
        rank: Number of this process. All but the first wait.
        num_workers: Processes that count.
    """
    path = folder / f"lengths-{_identity(dataset)[:16]}.npy"
    if rank == 0 and not path.is_file():
        loader = DataLoader(SampleLengths(dataset), BATCH_SIZE, collate_fn=list, num_workers=num_workers)
        with tqdm(total=len(dataset), desc="counting tokens", unit="sample", disable=None) as bar:
            lengths: list[int] = []
            for batch in loader:
                lengths += batch
                bar.update(len(batch))
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.array(lengths, dtype=np.int32))
    while not path.is_file():  # should the first process fail, the launcher ends this one
        time.sleep(_POLL_SECONDS)
    return np.load(path)


def _identity(dataset: ConversationDataset) -> str:
    """What lengths depend on. Images are taken to stay as they are."""
    processor, config = dataset.processor, dataset.config
    parts = [
        dataset.fingerprint(),
        [file.image_root for file in dataset.files],
        dataset.max_image_pixels,
        processor.tokenizer.backend_tokenizer.to_str(),
        [config.image_grid_pinpoints, config.granularities[-1], config.behavior, config.vision_config.image_size],
    ]
    return hash_json(parts)


__all__ = ["SampleLengths", "token_lengths"]

"""Token counts of all samples, computed once and stored, for micro-batches with a token budget."""

import time
from pathlib import Path

import numpy as np
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from avg_llava.common.files import atomic_write, hash_json
from avg_llava.data.dataset import ConversationDataset
from avg_llava.model.anyres import num_visual_tokens
from avg_llava.model.images import DataError, read_image_size

BATCH_SIZE = 64  # samples that a worker counts before it reports
_POLL_SECONDS = 0.2


class SampleLengths(Dataset[int]):
    """Token count of each sample: text and, at the finest level, visual tokens, truncated to the maximal length.

    Only the headers of images are read. A sample whose images cannot be opened counts one token, the masked token that
    replaces it if bad samples are skipped.
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
    """Loads the token counts (samples,) from a file in `folder`, which all ranks see.

    If it is missing, rank 0 computes it with this number of loader processes, and the other ranks wait.
    """
    path = folder / f"lengths-{_identity(dataset)[:16]}.npy"
    if rank == 0 and not path.is_file():
        loader = DataLoader(SampleLengths(dataset), BATCH_SIZE, collate_fn=list, num_workers=num_workers)
        lengths: list[int] = []
        with tqdm(total=len(dataset), desc="counting tokens", unit="sample", disable=None) as bar:
            for batch in loader:
                lengths += batch
                bar.update(len(batch))
        folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as temporary, temporary.open("wb") as file:
            np.save(file, np.array(lengths, dtype=np.int32))
    while not path.is_file():  # if rank 0 fails, the launcher ends this process
        time.sleep(_POLL_SECONDS)
    return np.load(path)


def _identity(dataset: ConversationDataset) -> str:
    """Hash of everything that the counts depend on, except for the bytes of images."""
    processor, config = dataset.processor, dataset.config
    parts = [
        dataset.fingerprint(),
        [file.image_root for file in dataset.files],
        dataset.max_image_pixels,
        processor.tokenizer.backend_tokenizer.to_str(),
        [config.image_grid_pinpoints, config.granularities[-1], config.behavior, config.crop_size],
    ]
    return hash_json(parts)

"""A tensor in a file: mapped into memory, or streamed through a small buffer."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

_CHUNK = 16 * 1024 * 1024  # bytes read at a time
WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
NUM_READERS = 4  # threads: more do not read faster


class CheckpointError(ValueError):
    """Files or weights of a checkpoint are missing, unexpected or damaged; the message lists all problems."""


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a file whose header was checked, or one that is computed from such.

    Attributes:
        start: Position of the tensor's bytes in the file; None if they do not lie there in order.
        read: Maps the tensor from the file: it takes memory of its own only where it is written to.
        name: Its name in the file; empty if it is computed.
        crc: CRC-32 of its bytes according to the file; None if that has none.
        parts: The tensors in files that it is computed from.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int | None
    read: Callable[[], Tensor]
    name: str = ""
    crc: int | None = None
    parts: tuple["StoredTensor", ...] = ()

    @property
    def num_bytes(self) -> int:
        """Size of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def chunks(self) -> Iterator[Tensor]:
        """The tensor's elements in order, as vectors; a vector is valid until the next one is asked for.

        Raises:
            CheckpointError: The file became shorter, or the bytes have another CRC, which is known after the last one.
        """
        if self.start is None:
            yield from split(self.read())
            return
        remaining, crc = self.num_bytes, 0
        buffer = memoryview(bytearray(min(remaining, _CHUNK)))
        with self.file.open("rb", buffering=0) as stream:
            stream.seek(self.start)
            while remaining:
                part = buffer[: min(remaining, _CHUNK)]
                filled = 0
                while filled < len(part):
                    count = stream.readinto(part[filled:])
                    if not count:
                        raise CheckpointError(f"{self.file} became shorter while it was read")
                    filled += count
                remaining -= len(part)
                crc = 0 if self.crc is None else zlib.crc32(part, crc)
                yield torch.frombuffer(part, dtype=self.dtype)
        if self.crc not in (None, crc):
            raise CheckpointError(f"{self.file}: tensor {self.name} differs from its checksum in the archive")


def split(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor's elements in order, as vectors."""
    yield from tensor.reshape(-1).split(_CHUNK // tensor.itemsize)

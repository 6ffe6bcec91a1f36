import itertools
import random

import pytest
from accelerate.data_loader import BatchSamplerShard
from torch.utils.data import BatchSampler

from avg_llava.data.sampler import ModalityLengthSampler


def lengths_of(with_image: int, text_only: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    lengths = [generator.randint(1, 300) for _ in range(with_image)]
    lengths += [-generator.randint(1, 300) for _ in range(text_only)]
    generator.shuffle(lengths)
    return lengths


CASES = [(0, 40), (40, 0), (64, 64), (61, 35), (3, 200), (5, 2), (1, 0), (128, 17)]


@pytest.mark.parametrize(("with_image", "text_only"), CASES)
@pytest.mark.parametrize(("batch_size", "world_size", "accumulation"), [(1, 1, 1), (2, 2, 1), (4, 2, 2), (3, 1, 4)])
def test_order(with_image, text_only, batch_size, world_size, accumulation):
    lengths = lengths_of(with_image, text_only)
    sampler = ModalityLengthSampler(lengths, batch_size, world_size, accumulation, seed=3)
    order = list(sampler)
    assert len(sampler) == len(order)
    assert sorted(order) == list(range(len(lengths)))  # every sample once

    step = batch_size * world_size * accumulation
    num_full = with_image // step + text_only // step
    for start in range(0, num_full * step, step):
        megabatch = order[start : start + step]
        assert len({lengths[index] > 0 for index in megabatch}) == 1  # one modality per optimizer step
        chunks = [megabatch[place : place + batch_size] for place in range(0, step, batch_size)]
        check_balance(chunks, lengths)
    tail = order[num_full * step :]
    assert tail == sorted(tail)
    assert len(tail) == with_image % step + text_only % step


def check_balance(chunks: list[list[int]], lengths: list[int]) -> None:
    """Chunks descend in length, and are what dealing the megabatch greedily gives."""
    weights = [[abs(lengths[index]) for index in chunk] for chunk in chunks]
    assert all(chunk == sorted(chunk, reverse=True) for chunk in weights)
    dealt: list[list[int]] = [[] for _ in chunks]
    for weight in sorted((weight for chunk in weights for weight in chunk), reverse=True):
        lightest = min((chunk for chunk in dealt if len(chunk) < len(chunks[0])), key=sum)
        lightest.append(weight)
    assert sorted(map(tuple, dealt)) == sorted(map(tuple, weights))


def test_ranks_see_one_modality_per_optimizer_step():
    """Micro-batches as accelerate deals them to two processes that accumulate three of them."""
    lengths = lengths_of(50, 60)
    batches = [
        list(
            BatchSamplerShard(
                BatchSampler(ModalityLengthSampler(lengths, 2, 2, 3, seed=1), 2, drop_last=False),
                num_processes=2,
                process_index=rank,
            )
        )
        for rank in (0, 1)
    ]
    assert len(batches[0]) == len(batches[1])
    for step in range((50 // 12) + (60 // 12)):
        seen = [index for rank in batches for batch in rank[3 * step : 3 * step + 3] for index in batch]
        assert len(seen) == len(set(seen)) == 12
        assert len({lengths[index] > 0 for index in seen}) == 1


def test_balance_beats_chance():
    lengths = lengths_of(512, 0)
    step, size = 32, 4
    order = list(ModalityLengthSampler(lengths, size, 8, seed=0))
    shuffled = random.Random(0).sample(order, len(order))

    def spread(order):
        sums = [sum(lengths[index] for index in order[start : start + size]) for start in range(0, len(order), size)]
        per_step = step // size
        return sum(
            max(sums[at : at + per_step]) - min(sums[at : at + per_step]) for at in range(0, len(sums), per_step)
        )

    assert spread(order) < spread(shuffled) / 3


def test_order_is_a_function_of_seed_and_epoch():
    lengths = lengths_of(64, 64)

    def order(seed: int, epoch: int) -> list[int]:
        sampler = ModalityLengthSampler(lengths, 4, 2, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    sampler = ModalityLengthSampler(lengths, 4, 2, seed=0)
    assert list(sampler) == list(sampler) == order(0, 0)  # iterating twice does not move on
    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(seed, epoch)) for seed, epoch in [(0, 0), (0, 1), (5, 0), (5, 1)]}) == 4


def test_both_modalities_are_mixed_over_the_epoch():
    lengths = lengths_of(400, 400)
    order = list(ModalityLengthSampler(lengths, 4, 2, seed=0))
    firsts = [lengths[order[start]] > 0 for start in range(0, 800, 8)]
    changes = sum(a != b for a, b in itertools.pairwise(firsts))
    assert 30 < changes < 70


def test_refusals():
    with pytest.raises(ValueError, match="sample 1 has length 0"):
        ModalityLengthSampler([3, 0, -2], 1, 1)
    with pytest.raises(ValueError, match="at least 1"):
        ModalityLengthSampler([3], 0, 1)

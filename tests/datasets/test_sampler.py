import itertools
import random

import pytest
from accelerate.data_loader import BatchSamplerShard, SkipBatchSampler

from avg_llava.data.sampler import ModalityBatches, ShuffledBatches, fill


def lengths_of(with_image: int, text_only: int, seed: int = 0) -> list[int]:
    generator = random.Random(seed)
    lengths = [generator.randint(1, 300) for _ in range(with_image)]
    lengths += [-generator.randint(1, 300) for _ in range(text_only)]
    generator.shuffle(lengths)
    return lengths


def tokens_of(lengths: list[int]) -> list[int]:
    """Token counts of text and images; a few samples are far longer than the rest."""
    generator = random.Random(1)
    images = [300 * generator.randint(1, 4) * (length > 0) for length in lengths]
    return [
        abs(length) + image + 5000 * (generator.random() < 0.02) for length, image in zip(lengths, images, strict=True)
    ]


def flat(batches) -> list[int]:
    return [index for batch in batches for index in batch]


CASES = [(0, 40), (40, 0), (64, 64), (61, 35), (3, 200), (5, 2), (1, 0), (128, 17)]
SHAPES = [(1, 1, 1), (2, 2, 1), (4, 2, 2), (3, 1, 4)]


@pytest.mark.parametrize(("with_image", "text_only"), CASES)
@pytest.mark.parametrize(("batch_size", "world_size", "accumulation"), SHAPES)
def test_order(with_image, text_only, batch_size, world_size, accumulation):
    lengths = lengths_of(with_image, text_only)
    sampler = ModalityBatches(lengths, batch_size, world_size, accumulation, seed=3)
    batches = list(sampler)
    order = flat(batches)
    assert len(sampler) == len(batches)
    assert {len(batch) for batch in batches[:-1]} <= {batch_size}
    assert sorted(order) == list(range(len(lengths)))  # every sample once

    step = batch_size * world_size * accumulation
    num_full = with_image // step + text_only // step
    for start in range(0, num_full * step, step):
        megabatch = order[start : start + step]
        assert len({lengths[index] > 0 for index in megabatch}) == 1  # one modality per optimizer step
        chunks = [megabatch[start : start + batch_size] for start in range(0, step, batch_size)]
        check_balance(chunks, lengths)
    tail = order[num_full * step :]
    assert tail == sorted(tail)
    assert len(tail) == with_image % step + text_only % step


def check_balance(chunks: list[list[int]], lengths: list[int]) -> None:
    """Checks that chunks descend in length and equal the greedy distribution of the megabatch."""
    weights = [[abs(lengths[index]) for index in chunk] for chunk in chunks]
    assert all(chunk == sorted(chunk, reverse=True) for chunk in weights)
    distributed: list[list[int]] = [[] for _ in chunks]
    for weight in sorted((weight for chunk in weights for weight in chunk), reverse=True):
        lightest = min((chunk for chunk in distributed if len(chunk) < len(chunks[0])), key=sum)
        lightest.append(weight)
    assert sorted(map(tuple, distributed)) == sorted(map(tuple, weights))


def test_ranks_see_one_modality_per_optimizer_step():
    """Micro-batches as accelerate distributes them to two processes with three accumulation steps."""
    lengths = lengths_of(50, 60)
    batches = ranks(ModalityBatches(lengths, 2, 2, 3, seed=1), 2)
    assert len(batches[0]) == len(batches[1])
    for step in range((50 // 12) + (60 // 12)):
        seen = [index for rank in batches for batch in rank[3 * step : 3 * step + 3] for index in batch]
        assert len(seen) == len(set(seen)) == 12
        assert len({lengths[index] > 0 for index in seen}) == 1


def ranks(sampler, world_size: int) -> list[list[list[int]]]:
    return [
        list(BatchSamplerShard(sampler, num_processes=world_size, process_index=rank)) for rank in range(world_size)
    ]


def test_balance_beats_chance():
    lengths = lengths_of(512, 0)
    step, size = 32, 4
    order = flat(ModalityBatches(lengths, size, 8, seed=0))
    shuffled = random.Random(0).sample(order, len(order))

    def spread(order):
        sums = [sum(lengths[index] for index in order[start : start + size]) for start in range(0, len(order), size)]
        per_step = step // size
        return sum(
            max(sums[at : at + per_step]) - min(sums[at : at + per_step]) for at in range(0, len(sums), per_step)
        )

    assert spread(order) < spread(shuffled) / 3


def make(kind, lengths, *arguments, **settings):
    return kind(lengths if kind is ModalityBatches else len(lengths), *arguments, **settings)


@pytest.mark.parametrize("kind", [ShuffledBatches, ModalityBatches])
@pytest.mark.parametrize("budget", [None, 2000])
def test_order_is_a_function_of_seed_and_epoch(kind, budget):
    lengths = lengths_of(64, 64)
    tokens = None if budget is None else tokens_of(lengths)

    def batches(seed: int, epoch: int) -> list[list[int]]:
        sampler = make(kind, lengths, budget or 4, 2, seed=seed, tokens=tokens)
        sampler.set_epoch(epoch)
        assert len(list(sampler)) == len(sampler)
        return list(sampler)

    sampler = make(kind, lengths, budget or 4, 2, seed=0, tokens=tokens)
    assert list(sampler) == list(sampler) == batches(0, 0)  # iteration does not change the sampler
    assert batches(0, 1) == batches(0, 1)
    orders = [flat(batches(seed, epoch)) for seed, epoch in [(0, 0), (0, 1), (5, 0), (5, 1)]]
    assert len(set(map(tuple, orders))) == 4
    assert all(sorted(order) == list(range(128)) for order in orders)
    assert len(batches(0, 0)) == len(batches(0, 1))  # every epoch needs the same number of steps


def test_both_modalities_are_mixed_over_the_epoch():
    lengths = lengths_of(400, 400)
    order = flat(ModalityBatches(lengths, 4, 2, seed=0))
    firsts = [lengths[order[start]] > 0 for start in range(0, 800, 8)]
    changes = sum(a != b for a, b in itertools.pairwise(firsts))
    assert 30 < changes < 70


class TestTokenBudget:
    BUDGET = 2000

    @pytest.mark.parametrize("kind", [ShuffledBatches, ModalityBatches])
    @pytest.mark.parametrize(("with_image", "text_only"), CASES)
    @pytest.mark.parametrize(("world_size", "accumulation"), [(1, 1), (2, 1), (2, 3), (3, 4)])
    def test_every_sample_once_within_the_budget(self, kind, with_image, text_only, world_size, accumulation):
        lengths = lengths_of(with_image, text_only)
        tokens = tokens_of(lengths)
        sampler = make(kind, lengths, self.BUDGET, world_size, accumulation, seed=3, tokens=tokens)
        batches = list(sampler)
        assert len(sampler) == len(batches)
        assert sorted(flat(batches)) == list(range(len(lengths)))
        for batch in batches:
            assert len(batch) == 1 or sum(tokens[index] for index in batch) <= self.BUDGET
        shares = ranks(sampler, world_size)
        assert len({len(share) for share in shares}) == 1  # otherwise ZeRO-3 waits for ever
        if len(lengths) > 5:  # fewer cannot be distributed without repetition
            assert sorted(index for share in shares for index in flat(share)) == list(range(len(lengths)))

    def test_budgets_are_nearly_filled(self):
        lengths = lengths_of(400, 300)
        tokens = tokens_of(lengths)
        for kind in (ShuffledBatches, ModalityBatches):
            batches = list(make(kind, lengths, self.BUDGET, 2, 4, tokens=tokens))
            fair = [min(sum(tokens[index] for index in batch), self.BUDGET) for batch in batches]
            assert sum(fair) / len(fair) > 0.7 * self.BUDGET

    def test_one_modality_per_step_and_even_micro_batches(self):
        lengths = lengths_of(200, 200)
        tokens = tokens_of(lengths)
        batches = list(ModalityBatches(lengths, self.BUDGET, 2, 2, seed=1, tokens=tokens))
        shuffled = list(ShuffledBatches(len(lengths), self.BUDGET, 2, 2, seed=1, tokens=tokens))

        def spread(batches):
            sums = [min(sum(tokens[index] for index in batch), self.BUDGET) for batch in batches]
            return sum(max(sums[at : at + 4]) - min(sums[at : at + 4]) for at in range(0, len(sums) // 4 * 4, 4))

        steps = [flat(batches[at : at + 4]) for at in range(0, len(batches), 4)]
        mixed = [step for step in steps if len({lengths[index] > 0 for index in step}) == 2]
        assert len(steps) > 30
        assert len(mixed) <= 2  # the remaining samples at the end
        assert mixed == steps[len(steps) - len(mixed) :]
        assert spread(batches) / len(batches) < spread(shuffled) / len(shuffled)

    @pytest.mark.parametrize("count", range(100, 110))
    def test_optimizer_steps_do_not_depend_on_processes(self, count):
        """A step of eight micro-batches on one, two or four processes."""
        lengths = lengths_of(150, count)
        tokens = tokens_of(lengths)
        runs = [
            list(ModalityBatches(lengths, self.BUDGET, world, 8 // world, seed=1, tokens=tokens)) for world in (1, 2, 4)
        ]
        assert len({-(-len(run) // 8) for run in runs}) == 1  # optimizer steps of an epoch
        full = min(len(run) for run in runs) // 8 * 8 - 16
        assert full > 40
        assert runs[0][:full] == runs[1][:full] == runs[2][:full]

    def test_accelerate_skips_the_first_batches(self):
        lengths = lengths_of(50, 60)
        sampler = ModalityBatches(lengths, self.BUDGET, 2, 2, tokens=tokens_of(lengths))
        shard = BatchSamplerShard(sampler, num_processes=2, process_index=1)
        assert list(SkipBatchSampler(shard, 3)) == list(shard)[3:]

    def test_fill(self):
        costs = [3, 4, 9, 20, 1, 1, 8]
        assert fill(range(7), costs, 10) == [[0, 1], [2], [3], [4, 5, 6]]
        assert fill([6, 4, 5, 0], costs, 10) == [[6, 4, 5], [0]]
        assert fill(range(5), None, 2) == [[0, 1], [2, 3], [4]]
        assert fill([], costs, 10) == fill([], None, 2) == []


def test_refusals():
    with pytest.raises(ValueError, match="sample 1 has length 0"):
        ModalityBatches([3, 0, -2], 1, 1)
    with pytest.raises(ValueError, match="at least 1"):
        ModalityBatches([3], 0, 1)

"""Memory for kernels' results: given out again, never more than was in use at once, whole under threads."""

from __future__ import annotations

import random
import threading

import pytest
import torch

from fourbit.kernels.pool import Pool


def filled(pool: Pool, size: int, value: int) -> torch.Tensor:
    return pool.empty((size,), torch.uint8).fill_(value)


def test_tensors_are_ordinary() -> None:
    pool = Pool()
    x = pool.empty((300, 7, 50), torch.bfloat16)
    assert (x.shape, x.dtype, x.is_contiguous()) == ((300, 7, 50), torch.bfloat16, True)
    assert x.data_ptr() % 64 == 0
    y = torch.randn(200, 300, 5).permute(2, 0, 1)
    like = pool.empty_like(y)
    assert (like.shape, like.stride()) == (y.shape, torch.empty_like(y).stride())
    like.copy_(y)
    assert torch.equal(like, y)


def test_small_ones_are_torchs_own() -> None:
    pool = Pool()
    assert pool.empty((1000,), torch.uint8).numel() == 1000
    assert pool.mapped == 0


def test_what_is_dropped_is_used_again() -> None:
    pool = Pool()
    place = filled(pool, 1 << 20, 1).data_ptr()
    mapped = pool.mapped
    assert filled(pool, (1 << 20) - 5, 2).data_ptr() == place
    assert filled(pool, 1 << 19, 3).data_ptr() == place  # a shorter batch
    assert pool.mapped == mapped


def test_a_view_keeps_its_memory() -> None:
    pool = Pool()
    view = filled(pool, 1 << 20, 1)[5:9]
    other = filled(pool, 1 << 20, 2)
    assert view.tolist() == [1] * 4
    assert other[5:9].tolist() == [2] * 4


def test_other_sizes_take_the_place_of_free_ones() -> None:
    pool = Pool()
    for exponent in (20, 21, 22, 23, 24, 16):
        filled(pool, 1 << exponent, 1)
        assert pool.mapped == 1 << exponent
    pool.release()
    assert pool.mapped == 0


def test_blocks_of_several_sizes_stay_up_to_what_was_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Larger results and then smaller ones that stay, again and again: as layers are recomputed."""
    pool, sizes = Pool(), []
    take = Pool._map
    monkeypatch.setattr(Pool, "_map", lambda self, size: sizes.append(size) or take(self, size))

    def results(count: int, size: int) -> list[torch.Tensor]:
        return [pool.empty((size,), torch.uint8, stays=True) for _ in range(count)]

    results(20, 5 << 19)  # 50 MB, dropped at once
    for _ in range(6):
        results(4, 6 << 20)
        results(10, 5 << 19)
    assert sum(sizes) == 20 * (5 << 19) + 4 * (6 << 20)  # each once, of 344 MB that were asked for
    assert pool.mapped <= 50 << 20


def test_mapped_is_no_more_than_was_in_use_by_much() -> None:
    pool, source, live, most = Pool(), random.Random(0), [], 0
    for step in range(3000):
        if live and source.random() < 0.5:
            live.pop(source.randrange(len(live)))
        else:
            live.append(filled(pool, source.randrange(1 << 16, 1 << 21), step % 251))
        most = max(most, sum(x.numel() for x in live))
        # A block is up to a quarter larger than asked for, or serves what is up to four times smaller.
        assert pool.mapped <= 2 * most + (1 << 22)
    live.clear()
    pool.release()
    assert pool.mapped == 0


def test_no_memory_is_told() -> None:
    pool = Pool()
    with pytest.raises(MemoryError, match=r"no memory for a result of [0-9,]+ bytes"):
        pool.empty((1 << 60,), torch.uint8)
    assert pool.mapped == 0
    assert filled(pool, 1 << 20, 1).numel() == 1 << 20


def test_threads_never_share_a_block() -> None:
    pool, wrong = Pool(), []

    def work(value: int) -> None:
        source = random.Random(value)
        for _ in range(300):
            mine = [filled(pool, source.randrange(1 << 16, 1 << 18), value) for _ in range(3)]
            wrong.extend(x for x in mine if not bool((x == value).all()))

    workers = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong
    pool.release()
    assert pool.mapped == 0

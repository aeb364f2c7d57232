"""AdamW in pages: the reference's bytes, torch's numbers, and the same wherever pages lie."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fourbit import reference
from fourbit.codebooks import dynamic_map
from fourbit.errors import ConfigError, TrainingError
from fourbit.kernels import native
from fourbit.kernels import optimizer as native_optimizer
from fourbit.optim import PagedAdamW, adamw, pages

SHAPES = ((3, 100), (257,), (1,), (40, 50), (255,), (1000, 7), (16,))
BITS = (32, 8)


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adamw, "PAGE_WEIGHTS", 1024)


def parameters(seed: int = 0) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape)) for shape in SHAPES]


def set_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for number, param in enumerate(params):
        scale = 10.0 ** torch.randint(-6, 3, param.shape, generator=generator)
        # Each parameter goes without a gradient now and then, as experts do.
        absent = (step + number) % 7 == 3
        param.grad = None if absent else torch.randn(param.shape, generator=generator) * scale


def flat(params: list[nn.Parameter]) -> Tensor:
    return torch.cat([param.detach().view(-1) for param in params])


def states(optimizer: PagedAdamW) -> list[tuple[str, bytes]]:
    return [(name, value.numpy().tobytes()) for _, name, value in optimizer.read_states()]


def random_case(count: int, bits: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    weight, grad = torch.randn(2, count, generator=generator)
    grad *= 10.0 ** torch.randint(-8, 3, (count,), generator=generator)
    if bits == 32:
        return [weight, grad, torch.zeros(count), torch.zeros(count)]
    blocks = -(-count // 256)
    codes = [torch.zeros(count, dtype=torch.uint8) for _ in range(2)]
    return [weight, grad, codes[0], torch.zeros(blocks), codes[1], torch.zeros(blocks)]


@pytest.mark.skipif(not native.available(), reason="no native library")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("count", [1, 255, 256, 257, 16_384, 40_001])
@pytest.mark.parametrize("bits", BITS)
def test_native_code_gives_the_reference_s_bytes(bits, count, threads):
    ours, theirs = random_case(count, bits), random_case(count, bits)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for step in range(1, 6):
            group = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
            coefficients = adamw._coefficients(group, step)
            (native_optimizer.adamw if bits == 32 else native_optimizer.adamw_8bit)(*ours, coefficients)
            (reference.adamw if bits == 32 else reference.adamw_8bit)(*theirs, coefficients)
            for one, other in zip(ours, theirs, strict=True):
                assert one.numpy().tobytes() == other.numpy().tobytes()
            ours[1].neg_()
            theirs[1].neg_()
    finally:
        torch.set_num_threads(before)


def test_the_unsigned_map_is_bitsandbytes_own():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert dynamic_map(signed=False).tolist() == functional.create_dynamic_map(signed=False).tolist()


def test_32_bits_follow_torch():
    mine, theirs = parameters(), parameters()
    options = {"lr": 3e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.05}
    optimizers = PagedAdamW(mine, **options), torch.optim.AdamW(theirs, **options, foreach=False)
    for step in range(50):
        for params, optimizer in zip((mine, theirs), optimizers, strict=True):
            set_gradients(params, step)
            optimizer.step()
    torch.testing.assert_close(flat(mine), flat(theirs), rtol=1e-5, atol=1e-6)


def test_16_bit_parameters_have_32_bit_states():
    """Each step is the fp32 one, rounded to the parameter's dtype."""
    low = [nn.Parameter(param.detach().bfloat16()) for param in parameters()]
    high = [nn.Parameter(param.detach().float()) for param in low]
    optimizers = PagedAdamW(low), PagedAdamW(high)
    for step in range(3):
        set_gradients(high, step)
        for one, other in zip(low, high, strict=True):
            one.grad = None if other.grad is None else other.grad.bfloat16()
            other.grad = None if one.grad is None else one.grad.float()
        for optimizer in optimizers:
            optimizer.step()
        assert [param.tolist() for param in low] == [param.detach().bfloat16().tolist() for param in high]
        for one, other in zip(low, high, strict=True):
            other.data.copy_(one)
    assert states(optimizers[0]) == states(optimizers[1])


@pytest.mark.parametrize("bits", BITS)
def test_pages_that_are_there_take_one_launch(bits, small_pages, tmp_path, monkeypatch):
    launches = []
    name = "adamw" if bits == 32 else "adamw_8bit"
    real = getattr(adamw.ops, name)
    monkeypatch.setattr(adamw.ops, name, lambda pieces: (launches.append(len(pieces)), real(pieces)))

    def launched(params: list[nn.Parameter], memory: int | None) -> int:
        optimizer = PagedAdamW(params, bits=bits, memory=memory, folder=tmp_path)
        for param in params:
            param.grad = torch.ones_like(param)
        launches.clear()
        optimizer.step()
        assert sum(launches) == sum(len(page) for page in optimizer._layout)
        optimizer.close()
        return len(launches)

    count = len(adamw._lay_out(parameters()))
    assert count > 3
    one = 1024 // adamw.BLOCK * adamw._BLOCK_BYTES[bits]
    assert launched(parameters(), None) == 1
    assert launched(parameters(), 3 * one) == 1 + count - 3
    assert launched(parameters(), 0) == count
    # Copies of 16-bit weights in fp32 are of a page at a time.
    assert launched([nn.Parameter(param.detach().bfloat16()) for param in parameters()], None) == count


def test_8_bits_learn_like_32():
    def loss_after(bits: int) -> float:
        torch.manual_seed(0)
        x = torch.randn(512, 64)
        target = torch.tanh(x @ torch.randn(64, 8))
        net = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 8))
        optimizer = PagedAdamW(net.parameters(), 1e-2, bits=bits)
        for _ in range(200):
            optimizer.zero_grad()
            loss = (net(x) - target).square().mean()
            loss.backward()
            optimizer.step()
        return loss.item()

    losses = [loss_after(bits) for bits in BITS]
    assert max(losses) < 0.01
    assert losses[1] < 1.5 * losses[0]


def test_8_bits_never_divide_by_eps_alone():
    """A gradient of 1e-5 of its block's largest has a square of 1e-10 of it, below half the smallest code."""
    weight = nn.Parameter(torch.zeros(256))
    optimizer = PagedAdamW([weight], 1e-3, bits=8, eps=1e-30)
    for _ in range(20):
        weight.grad = torch.full((256,), 1e-5)
        weight.grad[0] = 1.0
        before = weight.detach().clone()
        optimizer.step()
        assert (weight - before).abs().max() < 1e-2
    # Rounded to zero it would take steps of 30 rates and more.


@pytest.mark.parametrize("bits", BITS)
def test_torture(bits, small_pages, tmp_path):
    """200 steps under budgets that change at random, now and then saved, loaded, and begun anew."""
    plain, paged = parameters(), parameters()
    draw = random.Random(bits)
    whole = PagedAdamW(plain, 1e-2, weight_decay=0.1, bits=bits)
    moved = PagedAdamW(paged, 1e-2, weight_decay=0.1, bits=bits, memory=0, folder=tmp_path)
    total = sum(moved.pages.sizes)
    assert len(moved.pages.sizes) > 8
    for step in range(200):
        for params, optimizer in ((plain, whole), (paged, moved)):
            set_gradients(params, step)
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (1 + step)
            optimizer.step()
        if draw.random() < 0.5:
            budget = draw.choice([None, 0, draw.randrange(total), draw.randrange(total)])
            moved.set_memory(budget)
            assert moved.pages.resident_bytes <= (total if budget is None else budget)
        if draw.random() < 0.1:
            saved = moved.state_dict()
            moved.close()
            budget = draw.choice([None, draw.randrange(total)])
            moved = PagedAdamW(paged, 5.0, bits=bits, memory=budget, folder=tmp_path)
            moved.load_state_dict(saved)
        assert flat(paged).numpy().tobytes() == flat(plain).numpy().tobytes(), step
    assert states(moved) == states(whole)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def open_files() -> Iterator[None]:
    """No file is open afterwards that was not before."""
    if not Path("/proc/self/fd").exists():
        pytest.skip("no list of open files here")
    before = sorted(os.readlink(f"/proc/self/fd/{name}") for name in _open())
    yield
    after = sorted(os.readlink(f"/proc/self/fd/{name}") for name in _open())
    assert [name for name in after if "deleted" in name] == [name for name in before if "deleted" in name]


def _open() -> list[str]:
    return [name for name in os.listdir("/proc/self/fd") if os.path.lexists(f"/proc/self/fd/{name}")]


@pytest.mark.usefixtures("open_files", "small_pages")
@pytest.mark.parametrize("closed", [True, False])
def test_nothing_is_left(closed, tmp_path):
    params = parameters()
    optimizer = PagedAdamW(params, memory=0, folder=tmp_path)
    set_gradients(params, 0)
    optimizer.step()
    assert list(tmp_path.iterdir()) == []  # the file has no name even while it is used
    if closed:
        optimizer.close()
    del optimizer


@pytest.mark.usefixtures("small_pages")
class TestAFailingDisk:
    def test_no_room(self, tmp_path, monkeypatch):
        def full(*args):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "posix_fallocate", full)
        with pytest.raises(TrainingError, match=r"no room for 0 MB of optimizer states \(No space left"):
            PagedAdamW(parameters(), memory=0, folder=tmp_path)
        optimizer = PagedAdamW(parameters(), folder=tmp_path)
        before = states(optimizer)
        with pytest.raises(TrainingError, match=r"train\.optimizer_memory"):
            optimizer.set_memory(0)
        assert states(optimizer) == before
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("name", ["preadv", "pwritev"])
    def test_an_error_within_a_step(self, name, tmp_path, monkeypatch):
        params = parameters()
        optimizer = PagedAdamW(params, memory=0, folder=tmp_path)
        set_gradients(params, 0)
        optimizer.step()

        def broken(*args):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        monkeypatch.setattr(os, name, broken)
        set_gradients(params, 1)
        with pytest.raises(TrainingError, match=r"cannot be read or written \(Input/output error\)"):
            optimizer.step()

    def test_pieces_of_a_read(self, tmp_path, monkeypatch):
        """The system may move fewer bytes than asked."""
        read = os.preadv
        monkeypatch.setattr(os, "preadv", lambda file, views, at: read(file, [views[0][:777]], at))
        plain, paged = parameters(), parameters()
        optimizers = PagedAdamW(plain), PagedAdamW(paged, memory=0, folder=tmp_path)
        for step in range(3):
            for params, optimizer in zip((plain, paged), optimizers, strict=True):
                set_gradients(params, step)
                optimizer.step()
        assert flat(paged).tolist() == flat(plain).tolist()


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("bits", BITS)
def test_pages_in_host_memory(bits, monkeypatch):
    """What a GPU does, on tensors of a CPU."""
    monkeypatch.setattr(pages.Pages, "_open_below", lambda self: pages._Host(self.sizes))
    plain, paged = parameters(), parameters()
    optimizers = PagedAdamW(plain, bits=bits), PagedAdamW(paged, bits=bits, memory=20_000)
    for step in range(5):
        for params, optimizer in zip((plain, paged), optimizers, strict=True):
            set_gradients(params, step)
            optimizer.step()
    assert flat(paged).tolist() == flat(plain).tolist()
    assert states(optimizers[0]) == states(optimizers[1])


def test_groups_keep_their_settings():
    first, second = parameters(), parameters(1)
    groups = [{"params": first, "lr": 0.0}, {"params": second, "weight_decay": 1.0}]
    optimizer = PagedAdamW(groups, 1e-2)
    before = flat(first)
    for params in (first, second):
        set_gradients(params, 0)
    optimizer.step()
    assert flat(first).tolist() == before.tolist()
    saved = optimizer.state_dict()
    assert [group["params"] for group in saved["param_groups"]] == [list(range(7)), list(range(7, 14))]
    other = PagedAdamW([{"params": parameters()}, {"params": parameters(1)}])
    other.load_state_dict(saved)
    assert [group["lr"] for group in other.param_groups] == [0.0, 1e-2]


class TestWrongUse:
    @pytest.mark.parametrize("bits", [16, 4, 0])
    def test_bits(self, bits):
        with pytest.raises(ConfigError, match="32 or 8"):
            PagedAdamW(parameters(), bits=bits)

    def test_parameters_that_are_no_floats(self):
        with pytest.raises(ConfigError, match=r"in 16 or 32 bits, not torch\.float64"):
            PagedAdamW([nn.Parameter(torch.zeros(3, dtype=torch.float64))])

    def test_more_parameters_later(self):
        optimizer = PagedAdamW(parameters())
        with pytest.raises(ConfigError, match="cannot be added"):
            optimizer.add_param_group({"params": parameters()})

    def test_states_of_another_kind(self):
        params = parameters()
        eight, plain = PagedAdamW(params, bits=8), PagedAdamW(params)
        set_gradients(params, 0)
        eight.step()
        with pytest.raises(TrainingError, match=r"exp_avg: is torch\.uint8 .* must be torch\.float32"):
            plain.load_state_dict(eight.state_dict())

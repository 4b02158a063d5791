import random

import pytest
import torch

from kvpaged.errors import ConfigError, IntegrityError, UsageError
from kvpaged.tiers import arena as arenas
from kvpaged.tiers.arena import ALIGN, Arena, rounded


def test_the_memory_is_exactly_as_large_as_asked_for():
    arena = Arena(10_001, pin=False)
    assert arena.bytes == arena.memory.numel() == 10_001
    assert arena.memory.dtype == torch.uint8
    assert arena.memory.device.type == "cpu"
    assert not arena.memory.any()
    assert arena.free_bytes() == 10_001 // ALIGN * ALIGN
    assert not arena.pinned


def test_pieces_are_aligned_first_fit_and_holes_join():
    arena = Arena(8 * ALIGN, pin=False)
    assert [arena.alloc(size) for size in (1, 256, 257, 900)] == [0, 256, 512, 1024]
    assert arena.alloc(1) is None
    arena.free(256, 256)
    arena.free(512, 257)
    assert arena.alloc(3 * ALIGN) == 256, "two holes beside each other are one"
    arena.free(256, 3 * ALIGN)
    arena.free(0, 1)
    arena.free(1024, 900)
    assert arena.alloc(8 * ALIGN) == 0
    arena.check_integrity([(0, 8 * ALIGN)])


def test_a_part_of_a_piece_can_be_given_back():
    arena = Arena(4 * ALIGN, pin=False)
    assert arena.alloc(4 * ALIGN) == 0
    arena.free(ALIGN, ALIGN)
    arena.check_integrity([(0, ALIGN), (2 * ALIGN, 2 * ALIGN)])
    assert arena.alloc(5) == ALIGN


@pytest.mark.parametrize("seed", range(5))
def test_any_history_keeps_the_books(seed):
    rng = random.Random(seed)
    arena = Arena(200 * ALIGN + 77, pin=False)
    held: dict[int, int] = {}
    for _ in range(400):
        if held and rng.random() < 0.45:
            offset = rng.choice(list(held))
            arena.free(offset, held.pop(offset))
        else:
            size = rng.randrange(1, 20 * ALIGN)
            found = arena.alloc(size)
            if found is not None:
                held[found] = size
        arena.check_integrity(list(held.items()))
        assert arena.free_bytes() == 200 * ALIGN - sum(map(rounded, held.values()))


def test_books_that_are_off_are_named():
    arena = Arena(4 * ALIGN, pin=False)
    assert arena.alloc(ALIGN) == 0
    with pytest.raises(IntegrityError, match="from 0 to 256 are held twice, or by nobody"):
        arena.check_integrity([])
    with pytest.raises(AssertionError, match="taken back twice"):
        arena.free(512, 1)
    with pytest.raises(IntegrityError, match="from 512 to 256"):
        arena.check_integrity([(0, 512)])


def test_more_than_there_is_is_refused_with_how_much_there_is(monkeypatch):
    monkeypatch.setattr(arenas, "available_bytes", lambda device: 3 << 30)
    with pytest.raises(ConfigError, match=r"4\.0 GiB of host memory .* has 3\.0 GiB left"):
        Arena(4 << 30, pin=False)
    with pytest.raises(ConfigError, match="more than 0 bytes"):
        Arena(0, pin=False)


def test_closed_twice_is_nothing_and_views_outlive_it():
    arena = Arena(1 << 20, pin=False)
    view = arena.memory[:100].fill_(7)
    arena.close()
    arena.close()
    assert view.eq(7).all()
    with pytest.raises(UsageError, match="closed"):
        arena.check_open()


class Runtime:
    """CUDA's, as far as it is asked."""

    def __init__(self, code: int):
        self.code = code
        self.registered: list[tuple[int, int]] = []

    def cudaHostRegister(self, start: int, size: int, flags: int) -> int:
        if not self.code:
            self.registered.append((start, size))
        return self.code

    def cudaHostUnregister(self, start: int) -> int:
        self.registered = [one for one in self.registered if one[0] != start]
        return 0


@pytest.fixture(params=[0, 2])
def runtime(request, monkeypatch):
    made = Runtime(request.param)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(arenas, "TOUCH_BYTES", 4096)
    return made


def test_it_is_pinned_whole_in_the_background_and_unpinned_at_the_end(runtime, caplog):
    arena = Arena(50_000, pin=True)
    arena.memory[::1000] = 9  # in use meanwhile
    start = arena.memory.data_ptr()
    assert arena._pinner is not None
    arena._pinner._thread.join()
    assert arena.memory[::1000].eq(9).all(), "making pages changes nothing in them"
    assert arena.pinned == (runtime.code == 0)
    assert runtime.registered == ([(start, 50_000)] if arena.pinned else [])
    assert [record.levelname for record in caplog.records] == ([] if arena.pinned else ["WARNING"])
    arena.close()
    assert runtime.registered == []
    assert not arena.pinned

import gc
import threading

import pytest
import torch

from kvpaged.errors import ConfigError, IntegrityError, UsageError
from kvpaged.testing.tiers import record_of
from kvpaged.tiers.arena import ALIGN
from kvpaged.tiers.base import KEPT, Record
from kvpaged.tiers.host import HostTier


def tier_of(bytes: int) -> HostTier:
    return HostTier(bytes, pin=False)


def body(number: int, size: int = ALIGN) -> torch.Tensor:
    return torch.full((size,), number, dtype=torch.uint8)


def records(*numbers: int, size: int = ALIGN) -> list[Record]:
    return [Record(b"p%d" % number, b"", body(number, size)) for number in numbers]


def keys(tier: HostTier) -> list[bytes]:
    return [one.key for one in tier.scan()]


def test_sizes_are_numbers_or_text_and_are_checked():
    assert tier_of(4096).usage().capacity == 4096
    assert HostTier("64KiB", pin=False).usage().capacity == 65536
    with pytest.raises(ConfigError, match="not a size"):
        HostTier("much")


def test_a_batch_lies_in_one_piece_and_is_read_without_copying():
    tier = tier_of(1 << 20)
    rows = torch.arange(4 * ALIGN).to(torch.uint8).view(4, ALIGN)
    tier.put([Record(b"p%d" % n, b"", rows[n]) for n in range(4)])
    start = tier.arena.memory.data_ptr()
    with tier.read([b"p0", b"p1", b"p2", b"p3"], []) as found:
        places = [one.body.data_ptr() - start for one in found if one is not None]
        assert places == [0, ALIGN, 2 * ALIGN, 3 * ALIGN]
        assert all(torch.equal(one.body, row) for one, row in zip(found, rows, strict=True) if one)
        assert len([one for one in found if one]) == 4


def test_a_batch_that_no_hole_takes_whole_is_laid_into_several():
    tier = tier_of(8 * ALIGN)
    tier.put(records(*range(8)))
    tier.delete([b"p0", b"p1", b"p4", b"p5"])
    assert tier.put(records(10, 11, 12, 13)) == [True] * 4
    assert not tier.gone, "there were bytes enough"
    tier.check_integrity()


def test_where_bytes_suffice_and_no_hole_does_more_is_given_up():
    tier = tier_of(8 * ALIGN)
    tier.put(records(*range(8)))
    tier.delete([b"p1", b"p3", b"p5"])
    assert tier.put(records(20, size=3 * ALIGN)) == [True]
    assert list(tier.gone) == [b"p0", b"p2"]
    tier.check_integrity()


def test_the_least_recently_used_go_first():
    tier = tier_of(4 * ALIGN)
    tier.put(records(0, 1, 2, 3))
    with tier.read([b"p0"], []):
        pass
    tier.put(records(1))
    tier.put(records(4, 5))
    assert list(tier.gone) == [b"p2", b"p3"]
    assert keys(tier) == [b"p0", b"p1", b"p4", b"p5"]


def test_heads_count():
    tier = tier_of(4 * ALIGN)
    assert tier.put([Record(b"p", bytes(ALIGN), body(1, 3 * ALIGN))]) == [True]
    assert tier.usage() == (1, 4 * ALIGN, 4 * ALIGN)
    assert tier.put([Record(b"q", b"h", body(1, 4 * ALIGN))]) == [False]
    assert tier.put([Record(b"q", b"h", body(1, 0))]) == [True]
    assert list(tier.gone) == [b"p"]


def test_a_batch_larger_than_the_tier_keeps_what_comes_first():
    tier = tier_of(4 * ALIGN)
    tier.put(records(90, 91))
    assert tier.put(records(0, 1, 2, 3, 4, 5)) == [True] * 4 + [False] * 2
    assert list(tier.gone) == [b"p90", b"p91"]


def test_what_does_not_fit_beside_what_is_kept_or_read_costs_nobody_their_place():
    tier = tier_of(8 * ALIGN)
    tier.put([Record(KEPT + b"1", b"", body(1, 4 * ALIGN))])
    tier.put(records(0, 1, 2))
    assert tier.put(records(9, size=5 * ALIGN)) == [False]
    with tier.read([b"p0", b"p1"], []) as found:
        assert all(found)
        assert tier.put(records(9, size=3 * ALIGN)) == [False]
        assert tier.put(records(9, size=2 * ALIGN)) == [True]
        assert list(tier.gone) == [b"p2"]
    tier.check_integrity()


def test_what_is_deleted_while_it_is_read_keeps_its_bytes_until_then():
    tier = tier_of(2 * ALIGN)
    tier.put(records(0, 1))
    with tier.read([b"p0"], []) as (outer,), tier.read([b"p0"], []) as (inner,):
        tier.delete([b"p0"])
        assert tier.usage() == (1, ALIGN, 2 * ALIGN)
        assert tier.put(records(5, size=2 * ALIGN)) == [False]
        assert outer is not None
        assert inner is not None
        assert outer.body.eq(0).all()
        tier.check_integrity()
    assert tier.put(records(5, size=2 * ALIGN)) == [True]
    tier.check_integrity()


def test_a_put_that_is_interrupted_leaves_nothing(monkeypatch):
    tier = tier_of(1 << 16)
    tier.put(records(0))

    def fails(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("kvpaged.tiers.host.ctypes.memmove", fails)
        with pytest.raises(KeyboardInterrupt):
            tier.put(records(0, 1))
    tier.check_integrity()
    assert keys(tier) == [b"p0"]
    assert tier.put(records(1)) == [True]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (Record(b"", b"", body(1)), "1 to 255 bytes, not 0"),
        (Record(bytes(256), b"", body(1)), "not 256"),
        (Record(b"p", bytes(65_537), body(1)), "up to 65,536 bytes, not 65,537"),
        (Record(b"p", b"", torch.zeros(4)), r"not torch.float32 \(4,\)"),
        (Record(b"p", b"", torch.zeros(4, 4, dtype=torch.uint8)), r"\(4, 4\)"),
        (Record(b"p", b"", torch.zeros(4, dtype=torch.uint8, device="meta")), "on meta"),
    ],
)
def test_what_is_no_record_is_refused_by_name(record, message):
    tier = tier_of(1 << 16)
    with pytest.raises(ConfigError, match=message):
        tier.put([record_of(b"q", 10), record])
    assert tier.usage().records == 0


def test_integrity_names_what_is_off():
    tier = tier_of(1 << 16)
    tier.put(records(0))
    tier._bytes += 1
    with pytest.raises(IntegrityError, match="257 bytes of records and 256 taken are counted"):
        tier.check_integrity()


def test_closed_it_says_so_and_views_live_on():
    tier = tier_of(1 << 16)
    tier.put(records(3))
    with tier.read([b"p3"], []) as (found,):
        assert found is not None
        view = found.body
    tier.close()
    tier.close()
    gc.collect()
    assert view.eq(3).all()
    for call in (lambda: tier.put(records(1)), lambda: tier.delete([b"p"]), tier.scan):
        with pytest.raises(UsageError, match="closed"):
            call()


def test_threads_put_read_and_delete_at_once():
    tier = tier_of(64 * ALIGN)
    failed: list[BaseException] = []

    def work(mine: int) -> None:
        try:
            for turn in range(150):
                number = (7 * turn + 3 * mine) % 40
                record = record_of(b"p%d" % number, number * 50)
                tier.put([record, record_of(b"q%d" % turn, 500)])
                with tier.read([record.key], []) as (found,):
                    assert found is None or torch.equal(found.body, record.body)
                    if turn % 5 == 0:
                        tier.delete([record.key])
                    assert found is None or torch.equal(found.body, record.body)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    tier.check_integrity()

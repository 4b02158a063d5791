"""Bytes on disk: what was written once can be read for ever, by others as well."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpaged.errors import IntegrityError
from kvpaged.lsm import filters, layout
from kvpaged.lsm.groups import GROUP_BYTES, pack_group, unpack_group
from kvpaged.lsm.index import (
    FOOTER_BYTES,
    Footer,
    IndexHeader,
    pack_footer,
    pack_index_header,
    unpack_footer,
    unpack_index_header,
)
from kvpaged.lsm.layout import Entry, Form, Part, pack_entry, unpack_entry
from kvpaged.lsm.manifest import Manifest, SegmentRecord, pack, unpack
from kvpaged.lsm.store import TensorStore
from tests.lsm.small import options

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "read_segment.py"

ENTRY = Entry(
    layout.VALUE, True, b"key", b"parent", b'{"a":1}',
    (Form("x", torch.bfloat16, (2, 3), 12),), (Part(12, 0x1122334455667788, 0),),
    7, 4096, 99, 12,
)  # fmt: skip


def test_ids_stay_what_they_are():
    assert [layout.DTYPES[n] for n in (1, 7, 8, 12, 13, 21)] == [
        torch.uint8, torch.bfloat16, torch.float32, torch.bool, torch.float8_e4m3fn,
        torch.float8_e8m0fnu,
    ]  # fmt: skip
    assert (layout.VALUE, layout.DELETE, layout.VOID, layout.VERSION) == (1, 2, 3, 1)


def test_an_entry_is_these_bytes():
    packed = pack_entry(ENTRY)
    assert packed.hex() == (
        "7800000001010300060001001500000007000000000000000700000000000000001000000000000063000000"
        "000000000c000000000000000c00000000000000887766554433221100000000000000006b6579706172656e"
        "747b2261223a317d070201000200000000000000030000000000000078000000"
    )
    assert unpack_entry(packed, 0, "here") == (ENTRY, len(packed))


def test_headers_are_these_bytes():
    index = IndexHeader(1, 2, 3, 4, 5, 4096)
    assert pack_index_header(index).hex() == (
        "4b56493101000000010000000000000002000000000000000300000000000000040000000000000005000000"
        "000000000010000000000000"
    )
    assert unpack_index_header(pack_index_header(index), "here") == index
    footer = pack_footer(Footer(5, 1, 8192, 100, 6))
    assert footer[:48].hex() == (
        "4b56534547454e4401000000010000000500000000000000002000000000000064000000000000000600000000"
        "000000"
    )
    assert len(footer) == FOOTER_BYTES
    assert unpack_footer(footer, "here") == Footer(5, 1, 8192, 100, 6)
    record = SegmentRecord(3, 4096, 1, 12, np.array([True, False, True]))
    manifest = pack(Manifest(2, 9, 11, [record], [4, 5]))
    assert manifest[:48].hex() == (
        "4b564d414e49464501000000010000000200000000000000020000000000000009000000000000000b000000"
        "00000000"
    )
    assert manifest[64:].hex() == (
        "030000000000000000100000000000000300000000000000"
        "0c000000000000000100000000000000"
        "0400000000000000050000000000000005"
    )
    found = unpack(manifest, "here")
    assert (found.generation, found.next_id, found.logs) == (2, 9, (4, 5))
    assert found.segments[0].live.tolist() == [True, False, True]


def test_a_group_says_which_of_its_fields_is_wrong():
    packed = pack_entry(ENTRY)
    good = pack_group(
        [packed], header=4096, size=8192, sequence=7, atomic=True, segment=3, settled=0
    )
    raw = good.ljust(8192, b"\0")
    group = unpack_group(raw, 0, len(raw), 3, "here")
    assert (group.entries, group.atomic, group.sequence) == ((ENTRY,), True, 7)
    assert len(good) == 4096 > GROUP_BYTES
    for wrong, named in (
        (b"KVGX" + raw[4:], "no group"),
        (raw[:60] + b"\xff" + raw[61:], "checksum"),
        (raw[:4] + b"\1" + raw[5:], "header of"),
    ):
        with pytest.raises(IntegrityError, match=named):
            unpack_group(wrong, 0, len(wrong), 3, "here")
    with pytest.raises(IntegrityError, match="of file 3, this is 4"):
        unpack_group(raw, 0, len(raw), 4, "here")


@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=300, unique=True))
def test_filters_find_every_key_and_hardly_any_other(keys):
    bits = filters.bits_for(len(keys))
    found = filters.Filters[str]()
    found.add([("mine", filters.make(keys, bits)), ("other", filters.make([b"?" * 30], bits))])
    assert all("mine" in found.owners(key) for key in keys)
    strangers = [b"%d is not one of them, surely" % n for n in range(300)]
    assert sum("mine" in found.owners(key) for key in strangers) <= 6
    found.remove("mine")
    assert not any("mine" in found.owners(key) for key in keys)


def test_filters_stay_right_as_segments_come_and_go():
    found = filters.Filters[int]()
    for turn in range(300):
        found.add([(turn, filters.make([b"%d" % turn], filters.SMALL))])
        if turn >= 5:
            found.remove(turn - 5)
        for near in range(max(0, turn - 4), turn + 1):
            assert near in found.owners(b"%d" % near)
        assert turn - 5 not in found.owners(b"%d" % (turn - 5))


def test_a_segment_is_read_with_numpy_alone(tmp_path):
    with TensorStore(tmp_path, options=options(codec="lossless")) as store:
        store.put(b"page-1", torch.arange(6, dtype=torch.int32).reshape(2, 3))
        store.put(b"page-2", {"k": torch.randn(9000).bfloat16(), "v": torch.full((3,), 2.5)},
                  parent=b"page-1")  # fmt: skip
        with store.batch() as batch:
            batch.put(b"half", torch.tensor([1.5, -2.0]).bfloat16())
    (segment,) = tmp_path.glob("*.seg")
    done = subprocess.run(
        [sys.executable, EXAMPLE, segment], check=True, capture_output=True, text=True
    )
    for line in (
        "3 values",
        "b'half' after nothing",
        "tensor bf16 [2] raw: [ 1.5 -2. ]",
        "tensor i4 [2, 3] raw: [0 1 2 3]",
        "b'page-2' after b'page-1'",
        "k bf16 [9000] lossless:",
        "v f4 [3] raw: [2.5 2.5 2.5]",
    ):
        assert line in done.stdout
    lines = [line for line in EXAMPLE.read_text().splitlines() if line.strip()]
    assert len(lines) <= 60

"""Which launch configuration a decode gets: the table's, or the nearest one's, made to fit."""

import itertools
import json

import pytest

from kvpaged_kernels.gpu import decode_configs
from kvpaged_kernels.gpu.decode_configs import DecodeConfig, Entry, decode_config, shared_bytes

LARGE = 227 * 1024


def entry(arch="sm_90", element=2, head_dim=128, rows=16, page_size=64, block_n=64, warps=4):
    return Entry(arch, element, head_dim, rows, page_size, block_n, warps, 3, 2, "compiled")


@pytest.fixture
def entries(monkeypatch):
    """Puts a table in the place of the real one."""

    def put(*rows):
        monkeypatch.setattr(decode_configs, "table", lambda: rows)
        decode_configs._nearest.cache_clear()

    yield put
    decode_configs._nearest.cache_clear()


def chosen(arch="sm_90", shared=LARGE, element=2, k_dim=128, v_dim=128, rows=4, page_size=64):
    return decode_config(
        arch, shared, element=element, k_dim=k_dim, v_dim=v_dim, rows=rows, page_size=page_size
    )


def test_an_exact_entry_is_taken_as_it_is(entries):
    entries(entry(), entry(page_size=16, block_n=32), entry(head_dim=64, block_n=128))
    assert chosen() == DecodeConfig(16, 64, 4, 3, 2)
    assert chosen(page_size=16).block_n == 32
    assert chosen(k_dim=64, v_dim=64).block_n == 128


@pytest.mark.parametrize(
    ("arch", "expected"),
    [("sm_89", 32), ("sm_90", 64), ("sm_100", 64), ("sm_70", 32), ("gfx942", 16), ("gfx950", 16)],
)
def test_the_same_maker_and_no_newer_than_the_device(entries, arch, expected):
    entries(entry("sm_80", block_n=32), entry("sm_90"), entry("gfx942", block_n=16))
    assert chosen(arch).block_n == expected


def test_without_an_entry_of_the_maker_another_one_serves(entries):
    entries(entry("sm_90"))
    assert chosen("gfx942", 64 * 1024).num_warps == 4


def test_head_dimension_before_rows_before_page_size(entries):
    near = entry(head_dim=128, rows=64, page_size=256, block_n=32)
    far = entry(head_dim=256, rows=16, page_size=16, block_n=16)
    entries(near, far)
    assert chosen(k_dim=128, v_dim=80, rows=3, page_size=16).block_n == 32
    entries(entry(rows=16, page_size=256, block_n=32), entry(rows=64, page_size=16))
    assert chosen(rows=3, page_size=16).block_n == 32
    # On a tie the larger one: 128 lies as far from 64 as from 256.
    entries(entry(head_dim=64, block_n=128), entry(head_dim=256, block_n=32))
    assert chosen().block_n == 32


def test_elements_must_agree(entries):
    entries(entry(element=4, block_n=16), entry(element=2))
    assert chosen(element=4).block_n == 16
    with pytest.raises(ValueError, match="no entry for elements of 8 bytes"):
        chosen(element=8)


@pytest.mark.parametrize("arch", ["h100", "sm90", "gfx"])
def test_an_architecture_has_a_form(arch):
    with pytest.raises(ValueError, match="an architecture is"):
        chosen(arch)


def test_what_does_not_fit_is_made_to_fit(entries):
    entries(entry(block_n=128))
    dims = 256
    for shared in (227, 163, 99, 64, 48, 32):
        config = chosen(shared=shared * 1024)
        each = shared_bytes(config.block_n, config.num_stages, 16, dims, 2)
        assert each <= shared * 1024
        assert config.programs_per_sm == min(2, shared * 1024 // each)
    # Stages go before tokens of a tile do.
    assert chosen(shared=100 * 1024)[1:4] == (128, 4, 2)


def test_the_real_table_serves_every_decode_there_can_be():
    devices = {"sm_80": 163, "sm_86": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
    shapes = itertools.product(
        devices.items(), (1, 2, 4), (8, 64, 80, 128, 256), (1, 4, 16, 71, 256), (16, 64, 256)
    )
    for (arch, kib), element, dim, rows, page_size in shapes:
        config = decode_config(
            arch, kib * 1024, element=element, k_dim=dim, v_dim=dim, rows=rows, page_size=page_size
        )
        most = {1: 32, 2: 32 if dim > 128 else 64, 4: 16}[element]
        assert config.block_m == min(most, max(16, 1 << (rows - 1).bit_length()))
        assert config.block_n & (config.block_n - 1) == 0
        assert config.block_n >= 16
        assert config.programs_per_sm >= 1


def test_the_table_is_written_as_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(decode_configs, "TABLE", tmp_path / "table.json")
    rows = [entry(rows=32), entry()]
    decode_configs.write_table(rows)
    assert [Entry(**each) for each in json.loads((tmp_path / "table.json").read_text())] == [
        entry(), entry(rows=32),
    ]  # fmt: skip
    assert decode_configs.table() == (entry(), entry(rows=32))
    monkeypatch.undo()
    decode_configs.table.cache_clear()

"""Options and sizes."""

import pytest

from kvpaged.config import CacheConfig, format_bytes, parse_bytes
from kvpaged.errors import ConfigError, KVPagedError


@pytest.mark.parametrize(
    ("size", "count"),
    [
        (1, 1), (4096, 4096), ("4GiB", 4 << 30), ("4G", 4 << 30), ("4GB", 4 * 10**9),
        (" 1.5 MiB ", 3 << 19), ("7", 7), ("7B", 7), ("2tib", 2 << 40),
    ],
)  # fmt: skip
def test_sizes(size, count):
    assert parse_bytes(size) == count


@pytest.mark.parametrize("size", ["", "GiB", "4 XB", "-4GiB", "4GiB extra", 0, -1, 1.5, None, True])
def test_what_is_no_size_is_named(size):
    with pytest.raises(ConfigError):
        parse_bytes(size)


def test_sizes_are_shown_in_the_unit_that_fits():
    assert [format_bytes(n) for n in (5, 1536, 5 << 20, 3 << 30, 9 << 40)] == [
        "5 B", "1.5 KiB", "5.0 MiB", "3.0 GiB", "9.0 TiB",
    ]  # fmt: skip


def test_defaults_follow_the_device():
    config = CacheConfig(memory=1)
    assert (config.layout_on("cpu"), config.backend_on("cpu")) == ("layer-major", "cpu")
    assert (config.layout_on("cuda"), config.backend_on("cuda")) == ("page-major", "triton")
    with pytest.raises(KVPagedError, match="backend 'cpu' cannot serve pages on a 'cuda' device"):
        CacheConfig(memory=1, backend="cpu").backend_on("cuda")


def test_unknown_names_raise():
    with pytest.raises(TypeError):
        CacheConfig(memory=1, pagesize=64)  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match="page_size"):
        CacheConfig(memory=1, page_size=20)

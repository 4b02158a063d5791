"""How bytes are coded inside a storage tier; nothing here can be read by an attention kernel.

A codec is chosen for each value where it is written, by name, and found again by its id, which is
stored with the value. Ids are never renumbered: 0 raw, 1 zstd, 2 lossless; 3 to 127 are kept for
this library and 128 to 255 for others (`register`).
"""

from kvpaged.codecs.base import Bytes, Codec, Raw
from kvpaged.codecs.lossless import Lossless
from kvpaged.codecs.zstd import Zstd
from kvpaged.errors import ConfigError, IntegrityError

__all__ = [
    "Bytes",
    "Codec",
    "Lossless",
    "Raw",
    "Zstd",
    "codec",
    "codec_by_id",
    "names",
    "register",
]

_FIRST_FOREIGN = 128
_BY_ID: dict[int, Codec] = {}
_BY_NAME: dict[str, Codec] = {}


def _add(added: Codec) -> None:
    _BY_ID[added.id] = _BY_NAME[added.name] = added


for _codec in (Raw(), Zstd(), Lossless()):
    _add(_codec)


def register(added: Codec) -> None:
    """Make a codec of one's own known, under an id of 128 to 255 and a name nobody has.

    Every process that reads what it wrote has to register it, too.

    Raises:
        ConfigError: the id is out of range, or id or name is taken.
    """
    if not _FIRST_FOREIGN <= added.id <= 255:
        raise ConfigError(
            f"codec {added.name!r} has id {added.id}; ids of one's own are {_FIRST_FOREIGN} to 255"
        )
    if added.id in _BY_ID or added.name in _BY_NAME:
        taken = _BY_ID.get(added.id) or _BY_NAME[added.name]
        raise ConfigError(
            f"codec {added.name!r} with id {added.id}: {taken.name!r} with id {taken.id} is there"
        )
    _add(added)


def names() -> list[str]:
    """Of all codecs."""
    return sorted(_BY_NAME)


def codec(name: str) -> Codec:
    """The codec of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in _BY_NAME:
        raise ConfigError(f"no codec {name!r}; there are {', '.join(names())}")
    return _BY_NAME[name]


def codec_by_id(number: int) -> Codec:
    """The codec that stored bytes name.

    Raises:
        IntegrityError: there is none.
    """
    if number not in _BY_ID:
        raise IntegrityError(f"no codec has id {number}; known are {sorted(_BY_ID)}")
    return _BY_ID[number]

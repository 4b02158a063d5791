"""Tensors as bytes: what is put becomes parts with codecs and checksums, and comes back."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from kvpaged.codecs import Codec, codec_by_id
from kvpaged.errors import ConfigError
from kvpaged.lsm.files import Bytes, aligned
from kvpaged.lsm.layout import (
    BLOCK,
    DELETE,
    DTYPE_IDS,
    MOST_KEY,
    MOST_PARTS,
    VALUE,
    Entry,
    Form,
    Part,
    checksum,
    pack_entry,
    part_offsets,
    payload_bytes,
)
from kvpaged.lsm.log import Coming

Tensors: TypeAlias = Tensor | Mapping[str, Tensor]
"""A value: a tensor, or named ones."""

RAW = 0
MOST_NAME = 65_535


def check_key(key: bytes, what: str = "key") -> None:
    """Raises `ConfigError` unless it is 1 to 65,535 bytes."""
    if not isinstance(key, bytes):
        raise ConfigError(f"a {what} is bytes, not {type(key).__name__}")
    if not 0 < len(key) <= MOST_KEY:
        raise ConfigError(f"a {what} has 1 to {MOST_KEY:,} bytes, not {len(key):,}")


def tensor_bytes(tensor: Tensor) -> Bytes:
    """A tensor's elements in row-major order, uint8 [bytes]; the tensor's own where they lie so."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy()


def _is_text(name: str) -> bool:
    try:
        return len(name.encode()) <= MOST_NAME
    except UnicodeEncodeError:
        return False


def forms_of(value: Tensors) -> tuple[tuple[Form, ...], list[Tensor], bool]:
    """What a value is, its tensors, and whether it is a lone one.

    Raises:
        ConfigError: it is neither a tensor nor a dict of them, or of a dtype without an id.
    """
    single = isinstance(value, Tensor)
    named = {"": value} if isinstance(value, Tensor) else value
    if not isinstance(named, Mapping) or len(named) > MOST_PARTS:
        raise ConfigError(f"a value is a tensor or a dict of up to {MOST_PARTS:,}, not {value!r}")
    forms = []
    for name, tensor in named.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise ConfigError(f"{name!r} is {type(tensor).__name__}, not a tensor by name")
        if not _is_text(name):
            raise ConfigError(f"a name is text of up to {MOST_NAME:,} bytes, not {name[:32]!r}")
        if tensor.layout != torch.strided or tensor.is_nested or tensor.is_meta:
            what = "nested" if tensor.is_nested else "meta" if tensor.is_meta else tensor.layout
            raise ConfigError(f"only strided tensors with data are stored, not {what} ones")
        if tensor.dtype not in DTYPE_IDS:
            raise ConfigError(f"{name or 'the tensor'} is {tensor.dtype}, which is not stored")
        forms.append(
            Form(name, tensor.dtype, tuple(tensor.shape), tensor.numel() * tensor.itemsize)
        )
    return tuple(forms), list(named.values()), single


def coming_value(
    key: bytes,
    value: Tensors,
    codec: Codec,
    *,
    metadata: Mapping[str, Any] | None = None,
    parent: bytes = b"",
    expires: int = 0,
    own: bool = False,
) -> Coming:
    """A value made ready to be placed: encoded part by part, each as it is where that gains
    nothing; `own`: copied then, so the tensors may change before it is placed.
    """
    check_key(key)
    if parent:
        check_key(parent, "parent")
    forms, tensors, single = forms_of(value)
    parts, pieces = [], []
    for form, tensor in zip(forms, tensors, strict=True):
        piece, used = tensor_bytes(tensor), RAW
        if codec.id != RAW and len(piece):
            coded = codec.encode(piece, form.dtype)
            if coded is not None:
                piece, used = coded, codec.id
        if own and used == RAW and piece.ctypes.data == tensor.data_ptr():
            piece = piece.copy()
        parts.append(Part(len(piece), checksum(piece), used))
        pieces.append(piece)
    raw = _metadata_bytes(key, metadata) if metadata else b""
    return coming(VALUE, key, parent, raw, forms, tuple(parts), single, expires, pieces)


def _metadata_bytes(key: bytes, metadata: Mapping[str, Any]) -> bytes:
    if not isinstance(metadata, Mapping):
        raise ConfigError(f"metadata is a dict, not {type(metadata).__name__}")
    try:
        return json.dumps(dict(metadata), separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"metadata of {key[:32].hex()} is not JSON: {error}") from error


def coming(
    kind: int, key: bytes, parent: bytes, metadata: bytes, forms: tuple[Form, ...],
    parts: tuple[Part, ...], single: bool, expires: int, pieces: Sequence[Bytes],
) -> Coming:  # fmt: skip
    """An entry without a place, and its parts' bytes."""
    entry = Entry(
        kind, single, key, parent, metadata, forms, parts, 0, 0, expires, payload_bytes(parts)
    )
    return Coming(entry, pack_entry(entry), pieces)


def coming_delete(key: bytes) -> Coming:
    """That a key is not there any more."""
    check_key(key)
    return coming(DELETE, key, b"", b"", (), (), False, 0, ())


def recoded(entry: Entry, payload: Bytes, codec: Codec) -> Coming:
    """A stored value in another codec; parts that gain nothing by it stay as they are."""
    parts, pieces = [], []
    for form, part, at in zip(entry.forms, entry.parts, part_offsets(entry.parts), strict=True):
        piece = payload[at : at + part.stored]
        if part.codec != codec.id and form.nbytes:
            plain = np.empty(form.nbytes, np.uint8)
            codec_by_id(part.codec).decode_into(piece, plain, form.dtype)
            coded = codec.encode(plain, form.dtype)
            if coded is not None and len(coded) < part.stored:
                part, piece = Part(len(coded), checksum(coded), codec.id), coded
        parts.append(part)
        pieces.append(piece)
    changed = entry._replace(parts=tuple(parts), stored=payload_bytes(parts))
    return Coming(changed, pack_entry(changed), pieces)


def fill(memory: Bytes, one: Coming) -> None:
    """Copy a value's parts to their place, with zeros between them."""
    at = 0
    for part, piece, start in zip(
        one.entry.parts, one.pieces, part_offsets(one.entry.parts), strict=True
    ):
        memory[at:start] = 0
        at = start + part.stored
        memory[start:at] = piece


# -- and back --------------------------------------------------------------------------------------


def as_tensor(raw: Bytes, form: Form) -> Tensor:
    """The tensor whose bytes these are; not copied."""
    flat = torch.from_numpy(raw) if len(raw) else torch.empty(0, dtype=torch.uint8)
    return flat.view(form.dtype).reshape(form.shape)


def chosen(entry: Entry, names: Sequence[str] | None) -> list[int]:
    """Numbers of the named parts, of all for `None`.

    Raises:
        ConfigError: the value has no part of a name.
    """
    if names is None:
        return list(range(len(entry.forms)))
    known = {form.name: number for number, form in enumerate(entry.forms)}
    names = list(dict.fromkeys(names))
    for name in names:
        if name not in known:
            raise ConfigError(
                f"value {entry.key[:32].hex()} has no part {name!r}; it has {sorted(known)}"
            )
    return [known[name] for name in names]


def decode_part(entry: Entry, number: int, stored: Bytes, out: Bytes) -> None:
    """A part's bytes, uint8 [bytes], from what is stored of it; in place if that is `out` already.

    Raises:
        IntegrityError: bytes that their codec cannot have written, or a codec nobody knows.
    """
    form, part = entry.forms[number], entry.parts[number]
    if stored is out or not form.nbytes:
        return
    codec_by_id(part.codec).decode_into(stored, out, form.dtype)


def lying(entry: Entry, payload: Bytes, numbers: Sequence[int]) -> dict[str, Tensor] | Tensor:
    """Tensors in the payload's own memory where it is raw, else decoded."""
    if entry.single and entry.parts[0].codec == RAW:
        return as_tensor(payload, entry.forms[0])
    offsets = list(part_offsets(entry.parts))
    made = {}
    for number in numbers:
        form, part = entry.forms[number], entry.parts[number]
        stored = payload[offsets[number] : offsets[number] + part.stored]
        if part.codec == RAW:
            made[form.name] = as_tensor(stored, form)
        else:
            raw = new_bytes(form.nbytes)
            codec_by_id(part.codec).decode_into(stored, raw, form.dtype)
            made[form.name] = as_tensor(raw, form)
    return made[""] if entry.single else made


def new_bytes(size: int) -> Bytes:
    """Memory for a tensor; a large one's address is a multiple of `BLOCK`."""
    return aligned(size) if size >= BLOCK else np.empty(size, np.uint8)


def destination(out: Tensor | Mapping[str, Tensor], entry: Entry) -> dict[int, Bytes]:
    """The bytes of tensors to be read into, by part.

    Raises:
        ConfigError: one is not of the part's dtype and shape, not contiguous or not on the CPU, or
            the value has no such part.
    """
    named = {"": out} if isinstance(out, Tensor) else dict(out)
    numbers = chosen(entry, list(named))
    places = {}
    for number, tensor in zip(numbers, named.values(), strict=True):
        form = entry.forms[number]
        if tensor.dtype != form.dtype or tuple(tensor.shape) != form.shape:
            raise ConfigError(
                f"value {entry.key[:32].hex()} is {form.dtype} {form.shape}, "
                f"the destination {tensor.dtype} {tuple(tensor.shape)}"
            )
        if not tensor.is_contiguous() or tensor.device.type != "cpu":
            raise ConfigError("a destination is contiguous and on the CPU")
        places[number] = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return places

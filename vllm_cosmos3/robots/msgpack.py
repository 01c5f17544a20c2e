"""Messages of the OpenPI protocol: msgpack maps whose arrays are maps with markers.

An array leaves as ``{b"__ndarray__": True, b"data", b"dtype", b"shape"}`` and a numpy scalar as
``{b"__npgeneric__": True, b"data", b"dtype"}``, which is what openpi-client reads. Both are read
too, with keys of either type, and so are the maps of the msgpack-numpy package (``nd``, ``type``,
``kind``, ``shape``, ``data``). A message is taken apart a map at a time, so a hostile one costs no
more memory than a small multiple of its bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NoReturn

import msgspec
import numpy as np

from vllm_cosmos3.errors import InvalidRequest

MAX_ENTRIES = 64  # of one map
MAX_DEPTH = 3  # of maps in maps
MAX_PLAIN = 2**16  # bytes of a value that is neither a map nor an array
MAX_AXES = 8
_SHAPE_BYTES = 128  # more than MAX_AXES numbers need
_DTYPE = re.compile(r"[<>|=]?(b1|[iu][1248]|f[248])")
_EMPTY = 0x80  # header of a map without entries; 15 of them fit into this byte
_MAP16, _MAP32 = 0xDE, 0xDF
_NAMED = msgspec.msgpack.Decoder(dict[str, msgspec.Raw])
_MARKED = msgspec.msgpack.Decoder(dict[bytes, msgspec.Raw])
_SHAPE = msgspec.msgpack.Decoder(list[int])
_BYTES = msgspec.msgpack.Decoder(memoryview)
_PLAIN = msgspec.msgpack.Decoder()
_WHOLE = msgspec.msgpack.Decoder(msgspec.Raw)
_MALFORMED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def pack(value: Any) -> bytes:
    """One message. ``value`` is made of maps, lists, numbers, strings, bytes and numpy arrays.

    Raises:
        ValueError: an array of complex numbers, objects or records.
    """
    return msgspec.msgpack.encode(value, enc_hook=_marked)


def unpack(message: bytes) -> dict[str, Any]:
    """The map of one message, with its arrays. They are read-only views of the message.

    Raises:
        InvalidRequest: not a msgpack map, or one of its values is malformed, too large or of a type
            that observations do not have; its field is the key.
    """
    try:
        _WHOLE.decode(message)
    except _MALFORMED as error:
        raise InvalidRequest("message", _shown(message), f"one msgpack map ({error})") from None
    if not _is_map(message):
        raise InvalidRequest("message", _shown(message), "a msgpack map", "invalid_type")
    return {key: _value(raw, key, 1) for key, raw in _entries(message, "message").items()}


def _marked(value: Any) -> dict[bytes, Any]:
    if not isinstance(value, (np.ndarray, np.generic)):
        raise ValueError(f"{type(value).__name__} cannot be sent")
    if not _DTYPE.fullmatch(value.dtype.str):
        raise ValueError(f"{value.dtype} cannot be sent")
    if isinstance(value, np.generic):
        return {b"__npgeneric__": True, b"data": value.item(), b"dtype": value.dtype.str}
    return {
        b"__ndarray__": True,
        b"data": value.tobytes(),
        b"dtype": value.dtype.str,
        b"shape": value.shape,
    }


def _value(raw: msgspec.Raw, key: str, depth: int) -> Any:
    data = memoryview(raw)
    if not _is_map(data):
        if len(data) > MAX_PLAIN:
            _refuse(key, f"{len(data)} bytes", f"an array, or at most {MAX_PLAIN} bytes")
        return _plain(raw, key)
    entries = _entries(data, key)
    if "__ndarray__" in entries:
        return _array(entries, key, dtype="dtype")
    if "__npgeneric__" in entries:
        return _scalar(entries, key)
    if "nd" in entries:
        array = _array({"shape": b"\x90", **entries}, key, dtype="type")
        return array if _plain(entries["nd"], f"{key}.nd") else array[()]
    if depth == MAX_DEPTH:
        _refuse(key, "a map", f"no deeper than {MAX_DEPTH} maps")
    return {name: _value(entry, f"{key}.{name}", depth + 1) for name, entry in entries.items()}


def _is_map(data: bytes | memoryview) -> bool:
    return _EMPTY <= data[0] < _EMPTY + 16 or data[0] in (_MAP16, _MAP32)


def _entries(data: bytes | memoryview, key: str) -> dict[str, Any]:
    """The entries of one map, still packed. Keys are text, or all of them bytes."""
    count = int.from_bytes(data[1:3]) if data[0] == _MAP16 else data[0] - _EMPTY
    if data[0] == _MAP32 or count > MAX_ENTRIES:
        _refuse(key, "a larger map", f"a map of at most {MAX_ENTRIES} entries")
    try:
        return dict(_NAMED.decode(data))
    except UnicodeDecodeError:
        _refuse(key, "a map with broken keys", "a map whose keys are UTF-8")
    except msgspec.ValidationError:
        pass  # not text
    try:
        return {name.decode(): raw for name, raw in _MARKED.decode(data).items()}
    except (msgspec.ValidationError, UnicodeDecodeError):
        _refuse(key, "a map with other keys", "a map whose keys are all text, or all bytes")


def _plain(raw: Any, key: str) -> Any:
    try:
        return _PLAIN.decode(raw)
    except (*_MALFORMED, ValueError, TypeError) as error:
        _refuse(key, "malformed", f"text, a number, a list or an array ({error})")


def _array(entries: Mapping[str, Any], key: str, *, dtype: str) -> np.ndarray:
    kind = _kind(entries, key, dtype)
    shape = _shape(entries, key)
    try:
        data = _BYTES.decode(entries["data"])
    except (KeyError, msgspec.ValidationError):
        _refuse(f"{key}.data", "missing", "the bytes of the array")
    expected = math.prod(shape) * kind.itemsize
    if expected != data.nbytes:
        _refuse(f"{key}.data", f"{data.nbytes} bytes", f"{expected} bytes, as its shape is {shape}")
    return np.ndarray(shape, kind, data)


def _scalar(entries: Mapping[str, Any], key: str) -> np.generic:
    kind = _kind(entries, key, "dtype")
    data = entries.get("data", b"\xc0")
    number = _plain(data, f"{key}.data") if len(memoryview(data)) <= 9 else None
    if not isinstance(number, (bool, int, float)):
        _refuse(f"{key}.data", number, "a number")
    try:
        with np.errstate(over="ignore"):
            scalar: np.generic = kind.type(number)
    except (OverflowError, ValueError):
        _refuse(f"{key}.data", number, f"a number that {kind} can hold")
    return scalar


def _kind(entries: Mapping[str, Any], key: str, name: str) -> np.dtype[Any]:
    raw = entries.get(name, b"\xc0")
    text = _plain(raw, f"{key}.{name}") if len(memoryview(raw)) <= _SHAPE_BYTES else None
    text = text.decode(errors="replace") if isinstance(text, bytes) else text
    if not isinstance(text, str) or not _DTYPE.fullmatch(text):
        possible = "that of booleans, integers or floats, such as '|u1' or '<f4'"
        _refuse(f"{key}.{name}", text, possible)
    return np.dtype(text)


def _shape(entries: Mapping[str, Any], key: str) -> tuple[int, ...]:
    raw = entries.get("shape", b"\xc0")
    try:
        shape = tuple(_SHAPE.decode(raw)) if len(memoryview(raw)) <= _SHAPE_BYTES else None
    except (msgspec.DecodeError, UnicodeDecodeError):
        shape = None
    if shape is None or len(shape) > MAX_AXES or not all(0 <= side < 2**31 for side in shape):
        possible = f"a list of at most {MAX_AXES} lengths, none of them negative"
        _refuse(f"{key}.shape", shape, possible)
    return shape


def _refuse(key: str, value: object, possible: str) -> NoReturn:
    raise InvalidRequest(key, value, possible)


def _shown(message: bytes) -> str:
    return f"{len(message)} bytes starting with {message[:8].hex()}" if message else "empty"

"""Messages with arrays: what is packed comes back, and what is hostile is refused cheaply."""

from __future__ import annotations

import struct
import tracemalloc
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from vllm_cosmos3.errors import InvalidRequest
from vllm_cosmos3.robots.msgpack import MAX_DEPTH, MAX_ENTRIES, MAX_PLAIN, pack, unpack

WIDE = ("i2", "i4", "i8", "u2", "u4", "u8", "f2", "f4", "f8")
DTYPES = ["|b1", "|i1", "|u1", *(order + kind for order in "<>" for kind in WIDE)]
KEYS = st.text(max_size=8).filter(lambda key: key not in ("nd", "__ndarray__", "__npgeneric__"))
ARRAYS = arrays.arrays(
    st.sampled_from(DTYPES), arrays.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)
)
SCALARS = st.sampled_from(DTYPES).flatmap(
    lambda dtype: arrays.arrays(dtype, ()).map(lambda x: x[()])
)
PLAIN = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=20)
    | st.lists(st.floats(allow_nan=False), max_size=5)
)


def same(left: Any, right: Any) -> bool:
    if isinstance(left, (np.ndarray, np.generic)):
        equal = np.array_equal(left, right, equal_nan=left.dtype.kind == "f")
        return equal and left.dtype == right.dtype and left.shape == right.shape
    return bool(left == right)


@given(st.dictionaries(KEYS, ARRAYS | SCALARS | PLAIN, max_size=6))
@settings(deadline=None)
def test_what_is_packed_comes_back(message: dict[str, Any]) -> None:
    found = unpack(pack(message))
    assert found.keys() == message.keys()
    for key, value in message.items():
        assert same(value, found[key]), key


@given(ARRAYS)
@settings(deadline=None)
def test_the_maps_of_msgpack_numpy_are_read(array: np.ndarray) -> None:
    data, shape = array.tobytes(), array.shape
    as_bytes = {b"nd": True, b"type": array.dtype.str, b"kind": b"", b"shape": shape, b"data": data}
    as_text = {key.decode(): value for key, value in as_bytes.items()}
    for marked in (as_bytes, as_text | {"type": array.dtype.str.encode()}):
        packed = msgspec.msgpack.encode({"x": marked})
        assert same(array, unpack(packed)["x"])


def test_a_scalar_of_msgpack_numpy() -> None:
    marked = {b"nd": False, b"type": "<f4", b"data": np.float32(1.5).tobytes()}
    found = unpack(msgspec.msgpack.encode({"x": marked}))["x"]
    assert found == 1.5
    assert found.dtype == np.float32


@pytest.mark.parametrize("dtype", ["c8", "O", "V4", "M8[s]", "S3", "i4,f4"])
def test_other_arrays_are_not_sent(dtype: str) -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        pack({"x": np.zeros(2, dtype)})


def marked(**changes: Any) -> dict[bytes, Any]:
    whole = {"__ndarray__": True, "dtype": "<f4", "shape": [2], "data": bytes(8)} | changes
    return {key.encode(): value for key, value in whole.items() if value is not None}


def nested(depth: int) -> Any:
    return {"a": nested(depth - 1)} if depth else 1


HOSTILE = {
    "empty": (b"", "message"),
    "not msgpack": (b"\xc1", "message"),
    "cut": (pack({"x": np.zeros(100)})[:-1], "message"),
    "two messages": (pack({}) * 2, "message"),
    "a list": (pack([1]), "message"),
    "a map of 4 billion": (b"\xdf\xff\xff\xff\xff", "message"),
    "a list of 4 billion": (b"\x81\xa1x\xdd\xff\xff\xff\xff", "message"),
    "bytes of 4 GiB": (b"\x81\xa1x\xc6\xff\xff\xff\xff", "message"),
    "deep lists": (b"\x81\xa1x" + b"\x91" * 100_000 + b"\xc0", "message"),
    "deep maps": (b"\x81\xa1x" * 100_000 + b"\xc0", "message"),
    "maps in maps": (pack(nested(MAX_DEPTH + 1)), "a.a.a"),
    "many keys": (pack({str(n): 1 for n in range(MAX_ENTRIES + 1)}), "message"),
    "numbers as keys": (pack({1: 2}), "message"),
    "keys of two types": (pack({"a": 1, b"b": 2}), "message"),
    "a broken key": (b"\x81\xa1\xff\xc0", "message"),
    "a broken text": (b"\x81\xa1x\xa1\xff", "x"),
    "a long text": (pack({"x": "a" * (MAX_PLAIN + 1)}), "x"),
    "many numbers": (pack({"x": [0] * (MAX_PLAIN + 1)}), "x"),
    "objects": (pack({"x": marked(dtype="|O")}), "x.dtype"),
    "records": (pack({"x": marked(dtype="i4,i4")}), "x.dtype"),
    "arrays of arrays": (pack({"x": marked(dtype="(1000000,)f8")}), "x.dtype"),
    "no dtype": (pack({"x": marked(dtype=None)}), "x.dtype"),
    "a long dtype": (pack({"x": marked(dtype="f" * 10_000)}), "x.dtype"),
    "a huge shape": (pack({"x": marked(shape=[2**31 - 1] * 8)}), "x.data"),
    "an empty huge shape": (pack({"x": marked(shape=[0, 2**62], data=b"")}), "x.shape"),
    "a negative shape": (pack({"x": marked(shape=[-1])}), "x.shape"),
    "many axes": (pack({"x": marked(shape=[1] * 40)}), "x.shape"),
    "a text as shape": (pack({"x": marked(shape="2")}), "x.shape"),
    "no shape": (pack({"x": marked(shape=None)}), "x.shape"),
    "short data": (pack({"x": marked(data=bytes(7))}), "x.data"),
    "no data": (pack({"x": marked(data=None)}), "x.data"),
    "text as data": (pack({"x": marked(data="aaaaaaaa")}), "x.data"),
    "a scalar of text": (pack({"x": {"__npgeneric__": True, "dtype": "<f4", "data": "1"}}), "x.data"),
    "a scalar too large": (pack({"x": {"__npgeneric__": True, "dtype": "|u1", "data": 256}}), "x.data"),
    "not a number": (pack({"x": {"__npgeneric__": True, "dtype": "<i4", "data": float("nan")}}), "x.data"),
    "an array in a map": (pack({"a": {"b": marked(dtype="|V8")}}), "a.b.dtype"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_messages_are_refused_by_the_name_of_their_key(name: str) -> None:
    message, key = HOSTILE[name]
    with pytest.raises(InvalidRequest) as refused:
        unpack(message)
    assert refused.value.field == key
    assert len(str(refused.value)) < 300


def maps(count: int, entry: bytes) -> bytes:
    return (
        b"\xde" + struct.pack(">H", count) + b"".join(b"\xa2%02d" % n + entry for n in range(count))
    )


BLOATED = [
    b"\x81\xa1x\xdd" + struct.pack(">I", 2**20) + b"\x80" * 2**20,  # a list of empty maps
    b"\x81\xa1x\xdd" + struct.pack(">I", 2**20) + b"\x90" * 2**20,  # of empty lists
    b"\x81\xdd" + struct.pack(">I", 2**20) + b"\x00" * 2**20 + b"\x00",  # a list as a key
    maps(64, maps(64, maps(64, b"\x00"))),  # everything that is allowed
]


@pytest.mark.parametrize("message", BLOATED)
def test_small_messages_do_not_fill_the_memory(message: bytes) -> None:
    tracemalloc.start()
    try:
        unpack(message)
    except InvalidRequest:
        pass
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 40 * len(message)


def refused_or_map(message: bytes) -> bool:
    """Whether a message is taken as a map, or refused with a field; other errors are raised."""
    try:
        return isinstance(unpack(message), dict)
    except InvalidRequest as error:
        return bool(error.field)


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_noise_is_refused_or_a_map(message: bytes) -> None:
    assert refused_or_map(message)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_damaged_messages_are_refused_or_a_map(data: st.DataObject) -> None:
    message = bytearray(pack({"prompt": "go", "x": np.arange(3), "y": {"z": np.float32(1)}}))
    for _ in range(data.draw(st.integers(1, 3))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    assert refused_or_map(bytes(message))

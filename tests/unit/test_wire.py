"""Messages: what fits the schema goes through unchanged, and everything else is refused with a WireError."""

from __future__ import annotations

from typing import Any

import msgpack
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from lightning_stale.transport import wire
from lightning_stale.transport.wire import SCHEMA, WireError, decode_message, encode_message

moderate = settings(max_examples=150)

integers = st.integers(-(2**63), 2**63 - 1)
plain = st.one_of(st.none(), st.booleans(), integers, st.floats(allow_nan=False), st.text(max_size=8))
lists = st.lists(st.one_of(plain, st.dictionaries(st.text(max_size=4), plain, max_size=3)), max_size=4)
VALUES: dict[type, st.SearchStrategy[Any]] = {
    int: integers,
    bool: st.booleans(),
    float: st.floats(allow_nan=False),
    str: st.text(max_size=20),
    bytes: st.binary(max_size=20),
    list: lists,
    dict: st.dictionaries(st.text(max_size=4), plain, max_size=3),
    type(None): st.none(),
}


def types_of(expected: type | tuple[type, ...]) -> tuple[type, ...]:
    return expected if isinstance(expected, tuple) else (expected,)


@st.composite
def messages(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(sorted(SCHEMA)))
    fields = {name: draw(st.one_of(*(VALUES[t] for t in types_of(ts)))) for name, ts in SCHEMA[kind].items()}
    return {"type": kind, **fields}


@moderate
@given(messages())
def test_messages_round_trip(message: dict[str, Any]) -> None:
    fields = {name: value for name, value in message.items() if name != "type"}
    assert decode_message(encode_message(message["type"], **fields)) == message


@moderate
@given(messages(), st.data())
def test_a_field_of_another_type_is_refused(message: dict[str, Any], data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(message)))
    allowed = types_of(SCHEMA[message["type"]][name]) if name != "type" else (str,)
    wrong = data.draw(st.one_of(*VALUES.values()).filter(lambda value: not isinstance(value, allowed)))
    with pytest.raises(WireError):
        decode_message(msgpack.packb({**message, name: wrong}))


@moderate
@given(messages(), st.data())
def test_a_missing_field_is_refused(message: dict[str, Any], data: st.DataObject) -> None:
    missing = data.draw(st.sampled_from(sorted(message)))
    with pytest.raises(WireError):
        decode_message(msgpack.packb({name: value for name, value in message.items() if name != missing}))


@moderate
@given(messages(), st.one_of(st.text(max_size=8), st.binary(max_size=8)), plain)
def test_a_further_field_is_refused(message: dict[str, Any], name: str | bytes, value: Any) -> None:
    assume(name not in message)
    with pytest.raises(WireError):
        decode_message(msgpack.packb({**message, name: value}))


@pytest.mark.parametrize(
    "value",
    [
        *([], {}, 7, "hello", None, [{"type": "bye"}]),
        *({"type": kind} for kind in ("attack", ["bye"], {}, None, b"bye")),
        *({"type": "bye", b"more": 1}, {b"more": 1, "type": "bye", "and": 2}),
    ],
    ids=repr,
)
def test_a_value_that_is_no_message_is_refused(value: Any) -> None:
    with pytest.raises(WireError):
        decode_message(msgpack.packb(value))


GARBAGE = [
    b"",
    b"\xc1",
    b"\x91" * 100_000,  # nested too deeply
    b"\xdd\xff\xff\xff\xff",  # a list of 2**32 - 1 items
    b"\xdf\xff\xff\xff\xff",
    b"\xa4\xff\xff\xff\xff",  # not UTF-8
    b"\xc7\x0c\xff" + b"\xff" * 12,  # an impossible timestamp
    b"\x81\x90\x01",  # a list as a key
    b"\x81\xa4type\xa3bye\x00",  # a message, and more
    b"GET / HTTP/1.1\r\n\r\n",
]


@settings(moderate, max_examples=400)
@given(st.binary(max_size=40))
def test_garbage_is_refused(frame: bytes) -> None:
    with pytest.raises(WireError):
        decode_message(frame)


@pytest.mark.parametrize("frame", GARBAGE, ids=lambda frame: repr(frame[:12]))
def test_chosen_garbage_is_refused(frame: bytes) -> None:
    with pytest.raises(WireError):
        decode_message(frame)


@settings(moderate, max_examples=400)
@given(messages(), st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3))
@example({"type": "bye"}, [(6, 0x93)])  # the type becomes a list
def test_a_damaged_message_is_a_message_or_refused(message: dict[str, Any], damage: list[tuple[int, int]]) -> None:
    frame = bytearray(encode_message(message["type"], **{n: v for n, v in message.items() if n != "type"}))
    for position, byte in damage:
        frame[position % len(frame)] = byte
    try:
        damaged = decode_message(bytes(frame))
    except WireError:
        return
    assert damaged.keys() == {"type", *SCHEMA[damaged["type"]]}


def test_a_header_has_a_largest_size() -> None:
    fixed = len(encode_message("abort", kind="error", text=" " * 70_000)) - 70_000
    longest = " " * (wire.HEADER_BYTES - fixed)
    assert decode_message(encode_message("abort", kind="error", text=longest))["text"] == longest
    with pytest.raises(WireError, match=f"a header of {wire.HEADER_BYTES + 1} bytes; the limit is {wire.HEADER_BYTES}"):
        decode_message(encode_message("abort", kind="error", text=longest + " "))


@given(st.integers(0, 3 * wire.CHUNK_BYTES), st.integers(0, 3 * wire.CHUNK_BYTES))
@example(0, wire.CHUNK_BYTES)
@example(5, wire.CHUNK_BYTES + 6)
@example(7, 7)
def test_chunks_make_up_the_range(start: int, length: int) -> None:
    chunks = list(wire.chunks(start, start + length))
    assert all(0 < end - begin <= wire.CHUNK_BYTES for begin, end in chunks)
    edges = [start, *(end for _, end in chunks)]
    assert [begin for begin, _ in chunks] == edges[:-1]
    assert edges[-1] == start + length


def test_a_chunk_fits_a_frame() -> None:
    assert wire.CHUNK_BYTES < wire.MAX_FRAME_BYTES
    assert wire.HEADER_BYTES < wire.MAX_FRAME_BYTES

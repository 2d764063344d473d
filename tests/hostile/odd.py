"""Messages that are strange and still valid: they must be taken, and change nothing that they say already."""

from __future__ import annotations

import json
import random

import pyarrow as pa

from gpuledger.agents.messages import Message
from tests.hostile.wire import RawRecord

__all__ = ["odd"]


def odd(rng: random.Random, message: Message) -> RawRecord:
    """The message with a key of a wrong kind, headers of nobody, and fields or columns that nobody knows yet."""
    # A compacted topic takes no message without a key.
    keys: list[bytes | None] = [b"", b"\xff\xfe\x00", b"\x1b[31m", b"k" * 3_000, message.key.encode()]
    key = rng.choice(keys if message.topic == "inventory" else [None, *keys])
    headers: list[tuple[bytes, bytes | None]] = [(name.encode(), value) for name, value in message.headers]
    strange: list[tuple[bytes, bytes | None]] = [
        *((b"\xff\xfe", b"x"), (b"trace", None), (b"", b""), (b"large", bytes(200_000)), (b"gpuledger-tick", b"1"))
    ]
    headers[0:0] = rng.sample(strange, rng.randrange(3))
    if message.topic == "telemetry":
        return RawRecord(key, _more_columns(rng, message.value), headers)
    event = json.loads(message.value)
    event["of_a_later_version"] = rng.choice([None, 1e300, [[[]]], {"a": {"b": []}}, "\u202e", -(1 << 70)])
    return RawRecord(key, json.dumps(event).encode(), headers)


def _more_columns(rng: random.Random, value: bytes) -> bytes:
    batch = pa.ipc.open_stream(value).read_next_batch()
    rows = batch.num_rows
    column = rng.choice(
        [
            pa.array([1.5] * rows),
            pa.array([[n] for n in range(rows)], type=pa.list_(pa.int64())),
            pa.array([{"a": n} for n in range(rows)], type=pa.struct([("a", pa.int64())])),
            pa.nulls(rows, pa.string()),
            pa.array(["x" * 100] * rows, type=pa.string()),
        ]
    )
    batch = batch.append_column("of_a_later_version", column)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()

"""The answer to what clickhouse-go, the driver inside Grafana's plugin, asks first.

It asks in the newest Native encoding and then uses the revision that the answer gives: revision 0 keeps it to the plain
encoding, which is the one that the engine writes.
"""

import re

__all__ = ["HELLO_SQL", "hello_block", "is_hello"]

_HELLO = re.compile(
    r"\s*SELECT\s+displayName\(\)\s*,\s*version\(\)\s*,\s*revision\(\)\s*,\s*timezone\(\)\s*;?\s*", re.IGNORECASE
)

# For clients that ask in another format.
HELLO_SQL = "SELECT 'gpuledger' AS `displayName()`, version(), toUInt32(0) AS `revision()`, timezone() AS `timezone()`"

# From these protocol versions on a Native block begins with its info, and each column says how it is serialised.
_BLOCK_INFO_SINCE = 51903
_SERIALIZATION_SINCE = 54454
# is_overflows = 0, bucket_num = -1.
_BLOCK_INFO = b"\x01\x00\x02\xff\xff\xff\xff\x00"


def is_hello(sql: str) -> bool:
    return _HELLO.fullmatch(sql) is not None


def hello_block(name: str, version: str, protocol_version: int) -> bytes:
    """The answer's one row as a Native block of `protocol_version`: (name, version, revision 0, UTC)."""
    columns = (
        ("displayName()", "String", _string(name)),
        ("version()", "String", _string(version)),
        ("revision()", "UInt32", bytes(4)),
        ("timezone()", "String", _string("UTC")),
    )
    serialization = b"\x00" if protocol_version >= _SERIALIZATION_SINCE else b""
    block = _BLOCK_INFO if protocol_version >= _BLOCK_INFO_SINCE else b""
    block += bytes((len(columns), 1))
    for column, kind, value in columns:
        block += _string(column) + _string(kind) + serialization + value
    return block


def _string(text: str) -> bytes:
    data = text.encode()
    if len(data) > 127:
        raise ValueError(f"{text!r} is longer than the one byte of its length can say")
    return bytes((len(data),)) + data

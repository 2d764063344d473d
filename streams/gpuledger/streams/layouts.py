"""Record batches of a known layout, read many at once and without Arrow.

Reading one batch costs Arrow about 20 µs, most of it for the description of 42 columns that is the same bytes in nearly
every message. Arrow reads the first two messages that begin with a description; where their columns lie then holds for
every message that begins with the same bytes and is as long.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

__all__ = ["Layout", "Layouts", "layout_of", "read"]

#: Messages that are copied together; so many fit a processor's cache.
_AT_ONCE = 32
_MOST_LAYOUTS, _MOST_MET = 64, 4_096

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a column's values lie: bytes [start, end) of a message. `bitmap` is where its validity begins, None where
    every value is known or, with `is_unknown`, none is."""

    name: str
    type: pa.DataType
    start: int
    end: int
    bitmap: int | None
    is_unknown: bool


@dataclass(frozen=True, slots=True)
class Layout:
    """What all messages share that begin with `prefix` and have `length` bytes.

    `bits` are the places of the validity bitmaps' bytes, cut at `bitmaps`; `masks` takes the bits beyond the rows out
    of them, and so many as `known` must be left. `rest` is what follows the record batch.
    """

    prefix: bytes
    length: int
    rows: int
    places: tuple[_Place, ...]
    bits: NDArray[np.int64]
    bitmaps: NDArray[np.int64]
    masks: Bytes
    known: NDArray[np.int64]
    rest: bytes


class Layouts:
    """The layouts seen last: bounded, since anybody who may send can make up new ones."""

    def __init__(self) -> None:
        self._by_length: dict[int, list[Layout]] = {}
        self._count = 0
        self._met: set[int] = set()

    def find(self, value: bytes) -> Layout | None:
        """The layout of a message, None where it is not known."""
        for layout in self._by_length.get(len(value), ()):
            if value.startswith(layout.prefix):
                return layout
        return None

    def is_wanted(self, value: bytes, body: int) -> bool:
        """Whether to find out the layout of a message whose description ends at `body`: it is not known, and not met
        for the first time. Finding out takes longer than reading a batch, and some descriptions never come again."""
        if self.find(value) is not None:
            return False
        description = hash((len(value), value[:body]))
        if description in self._met:
            return True
        if len(self._met) >= _MOST_MET:
            self._met.clear()
        self._met.add(description)
        return False

    def add(self, layout: Layout) -> None:
        """Remembers it; when there are too many, all others are forgotten."""
        if self._count >= _MOST_LAYOUTS:
            self._by_length, self._count = {}, 0
        self._by_length.setdefault(layout.length, []).append(layout)
        self._count += 1


def layout_of(value: bytes, body: int, rest: bytes, batch: pa.RecordBatch, names: Sequence[str]) -> Layout | None:
    """The layout of a message whose record batch Arrow has read, and found valid, as `batch`.

    The description ends at byte `body`; `rest` follows the batch; `names` are the columns that `read` shall give. Every
    column has values of a fixed width. None for a batch that has no rows, or does not lie in `value`.
    """
    rows = batch.num_rows
    whole = pa.py_buffer(value)
    places: list[_Place] = []
    bits: list[int] = []
    bitmaps: list[int] = []
    known: list[int] = []
    bitmap_bytes = (rows + 7) // 8
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        validity, data = column.buffers()
        width = rows * column.type.bit_width // 8
        starts = [None if buffer is None else buffer.address - whole.address for buffer in (validity, data)]
        bitmap, start = starts
        inside = start is not None and body <= start <= len(value) - width
        inside = inside and (bitmap is None or body <= bitmap <= len(value) - bitmap_bytes)
        if rows == 0 or start is None or not inside:
            return None
        if bitmap is not None:
            bitmaps.append(len(bits))
            bits += range(bitmap, bitmap + bitmap_bytes)
            known.append(rows - column.null_count)
        if name in names:
            is_unknown = column.null_count == rows
            places.append(_Place(name, column.type, start, start + width, bitmap, is_unknown))
    masks = np.full(len(bits), 0xFF, dtype=np.uint8)
    if rows % 8:
        masks[bitmap_bytes - 1 :: bitmap_bytes] = (1 << rows % 8) - 1
    return Layout(
        prefix=value[:body],
        length=len(value),
        rows=rows,
        places=tuple(places),
        bits=np.array(bits, dtype=np.int64),
        bitmaps=np.array(bitmaps, dtype=np.int64),
        masks=masks,
        known=np.array(known, dtype=np.int64),
        rest=rest,
    )


def read(layout: Layout, values: Sequence[bytes]) -> tuple[pa.Table, NDArray[np.bool_]]:
    """The rows of messages of this layout one after another, and which of the messages are as the layout says.

    Where one is not (another number of unknown values, other bytes at its end), it is for Arrow to say what it is, and
    its rows here mean nothing.
    """
    count = len(values)
    as_told = np.ones(count, dtype=bool)
    cells = {place.name: np.empty((count, place.end - place.start), dtype=np.uint8) for place in layout.places}
    mixed = [place for place in layout.places if place.bitmap is not None and not place.is_unknown]
    valid = {place.name: np.empty((count, layout.rows), dtype=bool) for place in mixed}
    for first, messages in _together(layout.length, values):
        here = slice(first, first + len(messages))
        as_told[here] = _as_told(layout, messages)
        for place in layout.places:
            cells[place.name][here] = messages[:, place.start : place.end]
        for place in mixed:
            assert place.bitmap is not None
            bits = messages[:, place.bitmap : place.bitmap + (layout.rows + 7) // 8]
            valid[place.name][here] = np.unpackbits(bits, axis=1, count=layout.rows, bitorder="little")
    arrays: list[pa.Array] = []
    for place in layout.places:
        if place.is_unknown:
            arrays.append(pa.nulls(count * layout.rows, place.type))
            continue
        found = cells[place.name].ravel().view(place.type.to_pandas_dtype())
        mask = ~valid[place.name].ravel() if place.name in valid else None
        arrays.append(pa.array(found, type=place.type, mask=mask))
    return pa.table(arrays, names=[place.name for place in layout.places]), as_told


def _together(length: int, values: Sequence[bytes]) -> Iterator[tuple[int, Bytes]]:
    """(index of the first, its bytes as a row and the following ones' below it)."""
    for first in range(0, len(values), _AT_ONCE):
        joined = b"".join(values[first : first + _AT_ONCE])
        yield first, np.frombuffer(joined, dtype=np.uint8).reshape(-1, length)


def _as_told(layout: Layout, messages: Bytes) -> NDArray[np.bool_]:
    rest = np.frombuffer(layout.rest, dtype=np.uint8)
    right = (messages[:, layout.length - len(rest) :] == rest).all(axis=1)
    if len(layout.bits):
        ones = np.bitwise_count(messages[:, layout.bits] & layout.masks)
        right &= (np.add.reduceat(ones, layout.bitmaps, axis=1, dtype=np.int64) == layout.known).all(axis=1)
    return right

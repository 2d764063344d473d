"""Which pools a GPU is marked in, remembered for as long as no placement has been stored.

Naming thousands of GPUs in a query, for every block of telemetry, cost more than computing its fragments. The answer
may be no older than the fragments it is for, so the table is asked each time whether it is still the same.
"""

from __future__ import annotations

from collections.abc import Collection

from gpuledger.streams.store import Store

__all__ = ["PoolMap"]

_MOST_GPUS = 1_000_000


class PoolMap:
    """`Store.pools_of` for the same GPUs again and again. Belongs to the store's thread."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._parts: tuple[str, ...] | None = None
        self._pools: dict[str, frozenset[str]] = {}

    def of(self, gpus: Collection[str]) -> dict[str, frozenset[str]]:
        """The pools of each GPU by the placements stored when this is called, or later."""
        # Every insert and every merge gives the table parts of other names.
        ((names,),) = self._store.rows("SELECT arraySort(groupUniqArray(_part)) FROM placements")
        parts = tuple(names)
        if parts != self._parts or len(self._pools) > _MOST_GPUS:
            self._parts, self._pools = parts, {}
        missing = set(gpus).difference(self._pools)
        if missing:
            found = self._store.pools_of(missing)
            self._pools |= {gpu: frozenset(found.get(gpu, ())) for gpu in missing}
        return {gpu: self._pools[gpu] for gpu in gpus}

"""Orders to a process under test: where it must kill or stop itself. One file holds at most one order.

Several processes may watch one file: renaming it is atomic, so exactly one of them obeys, and its number is in the new
name. Whoever gave the order learns from that name who it was.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import msgspec

__all__ = ["Order", "Orders"]


class Order(msgspec.Struct, frozen=True):
    """`agent` comes to `point` with data of `pool` (empty: any) and `minute_ms` (0: any) in hand: then `action`."""

    agent: str
    point: str
    action: Literal["kill", "stop"] = "kill"
    pool: str = ""
    minute_ms: int = 0


class Orders:
    """The file of orders, from both sides."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def give(self, order: Order) -> None:
        """Puts the order there; one that nobody took is replaced."""
        part = self.path.with_name(f"{self.path.name}.part")
        part.write_bytes(msgspec.json.encode(order))
        part.replace(self.path)

    def look(self) -> Order | None:
        """The order that waits, if any."""
        try:
            return msgspec.json.decode(self.path.read_bytes(), type=Order)
        except FileNotFoundError:
            return None

    def take(self) -> bool:
        """Whether this process is the one that obeys."""
        try:
            self.path.rename(self.path.with_name(f"{self.path.name}.taken-{os.getpid()}"))
        except FileNotFoundError:
            return False
        return True

    def taken_by(self) -> int | None:
        """The process that took the last order; None while it waits. Asked once per order: it is forgotten then."""
        for path in self.path.parent.glob(f"{self.path.name}.taken-*"):
            path.unlink()
            return int(path.name.rpartition("-")[2])
        return None

    def withdraw(self) -> None:
        self.path.unlink(missing_ok=True)

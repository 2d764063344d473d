"""The dashboards that ship with GPULedger."""

from __future__ import annotations

from gpuledger.dashboards.boards.live import LIVE
from gpuledger.dashboards.panels import Board

__all__ = ["BOARDS", "LIVE"]

BOARDS: dict[str, Board] = {board.id: board for board in (LIVE,)}

"""The errors of the dashboards.

GPULedgerError
└── DashboardError
    ├── PanelError             a definition that breaks the rules of panels.py, or a macro nobody knows
    ├── AssetMissing           a file that the page serves is not where it was said to be
    └── SourceError            reading the database failed
        ├── SourceUnavailable  it cannot be reached or is too busy: try again
        └── QueryFailed        it answered with an error: `code` is ClickHouse's
"""

from __future__ import annotations

from gpuledger.schemas.exceptions import GPULedgerError

__all__ = ["AssetMissing", "DashboardError", "PanelError", "QueryFailed", "SourceError", "SourceUnavailable"]


class DashboardError(GPULedgerError):
    """Root of the dashboards' errors."""


class PanelError(DashboardError):
    """A panel, board or macro is not well formed; the text starts with its id."""


class AssetMissing(DashboardError):
    """A file to serve is missing; the text names it and the setting that says where it is."""


class SourceError(DashboardError):
    """Reading the database failed."""


class SourceUnavailable(SourceError):
    """The database cannot be reached, timed out or refuses work for now."""


class QueryFailed(SourceError):
    """The database refused the query. `code` is ClickHouse's error code, None where it gave none."""

    def __init__(self, text: str, code: int | None) -> None:
        super().__init__(text)
        self.code = code

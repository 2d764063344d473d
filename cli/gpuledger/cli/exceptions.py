"""The errors of the command line.

GPULedgerError
└── CommandError           a command cannot do what it was asked
    ├── MissingExtra       it needs packages that are not installed
    └── DatabaseError      ClickHouse cannot be reached, or refused a statement
"""

from __future__ import annotations

from gpuledger.schemas.exceptions import GPULedgerError

__all__ = ["CommandError", "DatabaseError", "MissingExtra"]


class CommandError(GPULedgerError):
    """A command cannot do what it was asked; the text is fit to be shown."""


class MissingExtra(CommandError):
    """The packages of the extra `extra` are needed for `command` and `module` of them is absent."""

    def __init__(self, command: str, extra: str, module: str) -> None:
        self.extra = extra
        super().__init__(
            f"gpuledger {command}: the Python module {module} is not installed; run: pip install 'gpuledger[{extra}]'"
        )


class DatabaseError(CommandError):
    """ClickHouse cannot be reached, or refused a statement."""

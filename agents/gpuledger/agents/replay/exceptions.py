"""What can go wrong in a replay.

AgentError
└── ReplayError
    ├── TraceError      a row, a header or a file of a trace is wrong: file, line, field, value and the fix
    └── LedgerTimeout   the ledger did not catch up with what was sent in the time given
"""

from __future__ import annotations

from gpuledger.agents.exceptions import AgentError

__all__ = ["LedgerTimeout", "ReplayError", "TraceError"]


class ReplayError(AgentError):
    """Root of what a replay raises; its text is fit to be shown to a user."""


class TraceError(ReplayError):
    """`field` of line `line` of `file` is wrong; line 0 means the whole file, field "" the whole row."""

    def __init__(self, file: str, line: int, field: str, value: str, problem: str) -> None:
        self.file = file
        self.line = line
        self.field = field
        self.value = value
        self.problem = problem
        where = f"{file}:{line}" if line else file
        named = f"{where}: {field}" if field else where
        super().__init__(f"{named}: {problem}")


class LedgerTimeout(ReplayError):
    """What was sent is not yet in the ledger; the text says how far each topic is."""

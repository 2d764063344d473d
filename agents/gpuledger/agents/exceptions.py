"""The errors of what runs on a node.

GPULedgerError
└── AgentError
    ├── BatchError            rows that are no valid telemetry batch
    ├── ScenarioError         a scenario file (its text starts with file and path)
    ├── PublishError          something did not reach the broker
    │   ├── BrokerUnavailable the broker cannot be reached, or refuses us
    │   └── MessageRejected   the broker will never take this message
    └── SpoolError            the spool on disk
        └── SpoolChanged      the spool was replaced: numbers start afresh, so a new run must begin
"""

from __future__ import annotations

from gpuledger.schemas.exceptions import GPULedgerError

__all__ = [
    "AgentError",
    "BatchError",
    "BrokerUnavailable",
    "MessageRejected",
    "PublishError",
    "ScenarioError",
    "SpoolChanged",
    "SpoolError",
]


class AgentError(GPULedgerError):
    """Root of what the agents raise; its text is fit to be shown to a user."""


class BatchError(AgentError):
    """The rows given are no telemetry batch; the text names the column, the value and what was expected."""


class ScenarioError(AgentError):
    """A scenario cannot be simulated; the text starts with the file and the path of the wrong field."""


class PublishError(AgentError):
    """Messages did not reach the broker."""


class BrokerUnavailable(PublishError):
    """The broker cannot be reached or refuses this client; trying again later may help."""


class MessageRejected(PublishError):
    """The broker will never take this message (too large, not allowed, not valid)."""


class SpoolError(AgentError):
    """The spool cannot do what was asked."""


class SpoolChanged(SpoolError):
    """The spool was replaced (`reason`): its numbers are gone, so the caller begins a new run and seals again."""

    def __init__(self, reason: str) -> None:
        self.reason = reason
        super().__init__(f"spool: {reason}; a new run begins")

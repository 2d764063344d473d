"""What can go wrong with the embedded services.

LocalError               a GPULedgerError
├── DirectoryInUse      another process holds the data directory
├── PortTaken           a configured port is not free
├── AssetError          a jar or a browser asset could not be had
│   └── AssetMismatch   a file is not the one that the lock names
└── ServiceFailed       a service did not start, or ended by itself
"""

from pathlib import Path

from gpuledger.schemas.exceptions import GPULedgerError

__all__ = [
    "AssetError",
    "AssetMismatch",
    "DirectoryInUse",
    "LocalError",
    "PortTaken",
    "ServiceFailed",
    "StartCancelled",
]


class LocalError(GPULedgerError):
    """Root of what the embedded services raise; its text is fit to be shown to a user."""


class DirectoryInUse(LocalError):
    """Another process holds `path`; `pid` is that process, None where it left no readable pid."""

    def __init__(self, path: Path, what: str, pid: int | None) -> None:
        self.path = path
        self.what = what
        self.pid = pid
        holder = f"process {pid}" if pid is not None else "another process (its pid is not recorded)"
        super().__init__(f"{what}: {path} is in use by {holder}; stop that process or choose another directory")


class PortTaken(LocalError):
    """`port` on `host` cannot be listened on."""

    def __init__(self, host: str, port: int, what: str, reason: str = "it is in use by another process") -> None:
        self.host = host
        self.port = port
        self.what = what
        super().__init__(f"{what}: cannot listen on {host}:{port}: {reason}; choose another port, or 0 for a free one")


class AssetError(LocalError):
    """A jar or a browser asset could not be resolved, read or stored."""


class AssetMismatch(AssetError):
    """A file is missing from, added to or different from what the committed lock names."""


class ServiceFailed(LocalError):
    """The service `what` did not become ready or ended by itself; `log_tail` holds its last lines."""

    def __init__(self, what: str, reason: str, log_file: Path | None = None, log_tail: str = "") -> None:
        self.what = what
        self.reason = reason
        self.log_file = log_file
        self.log_tail = log_tail
        text = f"{what}: {reason}"
        if log_file is not None:
            text += f"; its log is {log_file}"
        if log_tail:
            text += f" and ends with:\n{log_tail}"
        super().__init__(text)


class StartCancelled(LocalError):
    """The start of the service `what` was given up, on request."""

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(f"{what}: start cancelled")

"""What can go wrong while consuming, as one small tree.

StreamsError
├── DataError             a record that can never be stored; it goes to the dead-letter topic
├── IntakeSetupError      the Faust app is put together in a way that could lose records
├── NotMigrated           the database lacks tables that this version needs
└── UnsupportedFaustError the installed Faust is not the one the block consumer was written for
"""

from gpuledger.schemas.exceptions import GPULedgerError

__all__ = ["DataError", "IntakeSetupError", "NotMigrated", "StreamsError", "UnsupportedFaustError"]


class StreamsError(GPULedgerError):
    """Base of the errors raised by `gpuledger.streams`."""


class DataError(StreamsError):
    """A record cannot be read or kept, whatever is tried; its text is the reason in the dead-letter topic."""


class IntakeSetupError(StreamsError):
    """The app misses a setting or a topic declaration that safe consuming depends on."""


class NotMigrated(StreamsError):
    """The database lacks tables that this version needs; the text names the command that makes them."""


class UnsupportedFaustError(StreamsError, ImportError):
    """Another version of faust-streaming is installed than the pinned one."""

"""What can go wrong while consuming, as one small tree.

StreamsError
├── AccountsError         a scheduler's accounts (sacct) cannot be read
├── DataError             a record that can never be stored; it goes to the dead-letter topic
├── IntakeSetupError      the Faust app is put together in a way that could lose records
├── NotMigrated           the database lacks tables that this version needs
├── UnsupportedClientError the installed aiokafka is not the one whose fetches are bounded
└── UnsupportedFaustError the installed Faust is not the one the block consumer was written for
"""

from gpuledger.schemas.exceptions import GPULedgerError

__all__ = ["AccountsError", "DataError", "IntakeSetupError", "NotMigrated", "StreamsError", "UnsupportedClientError"]
__all__ += ["UnsupportedFaustError"]


class StreamsError(GPULedgerError):
    """Base of the errors raised by `gpuledger.streams`."""


class AccountsError(StreamsError):
    """A file of a scheduler's accounts cannot be read; the text names line, column, value and fix."""


class DataError(StreamsError):
    """A record cannot be read or kept, whatever is tried; its text is the reason in the dead-letter topic."""


class IntakeSetupError(StreamsError):
    """The app misses a setting or a topic declaration that safe consuming depends on."""


class NotMigrated(StreamsError):
    """The database lacks tables that this version needs; the text names the command that makes them."""


class UnsupportedClientError(StreamsError, ImportError):
    """Another version of aiokafka is installed than the one whose fetches are bounded."""


class UnsupportedFaustError(StreamsError, ImportError):
    """Another version of faust-streaming is installed than the pinned one."""

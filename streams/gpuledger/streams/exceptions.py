"""What can go wrong while consuming, as one small tree.

StreamsError
├── DataError             a record that can never be stored; it goes to the dead-letter topic
├── IntakeSetupError      the Faust app is put together in a way that could lose records
└── UnsupportedFaustError the installed Faust is not the one the block consumer was written for
"""

__all__ = ["DataError", "IntakeSetupError", "StreamsError", "UnsupportedFaustError"]


class StreamsError(Exception):
    """Base of the errors raised by `gpuledger.streams`."""


class DataError(StreamsError):
    """A record cannot be read or kept, whatever is tried; its text is the reason in the dead-letter topic."""


class IntakeSetupError(StreamsError):
    """The app misses a setting or a topic declaration that safe consuming depends on."""


class UnsupportedFaustError(StreamsError, ImportError):
    """Another version of faust-streaming is installed than the pinned one."""

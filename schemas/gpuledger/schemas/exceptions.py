"""The errors of the contract.

GPULedgerError
└── SchemaError            a message, file or setting does not follow the contract
    ├── MessageError       one Kafka message (goes to the dead-letter topic with this text)
    ├── ConfigError        the configuration file or a GPULEDGER_ variable
    └── DocumentError      a rates, capacity or tenants file
"""

from __future__ import annotations

__all__ = ["ConfigError", "DocumentError", "GPULedgerError", "MessageError", "SchemaError"]


class GPULedgerError(Exception):
    """Root of every error that a user of GPULedger may have to read: its text names what is wrong and what to do."""


class SchemaError(GPULedgerError):
    """Something does not follow the contract; the text names the field, the value and the fix."""


class MessageError(SchemaError):
    """One message cannot be read. Raised by pure decoding functions, never retried."""


class ConfigError(SchemaError):
    """A setting is missing or wrong; the text starts with its path."""


class DocumentError(SchemaError):
    """A file that a person applied (rates, capacity, tenants) is wrong; the text starts with file and path."""

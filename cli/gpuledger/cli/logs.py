"""Logs: one JSON object per line on standard error, or text for people, from the standard library's logging alone.

Secrets cannot leak through here: they are `Secret` objects, which turn into ``***`` wherever they are formatted.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Literal

__all__ = ["JsonFormatter", "set_up_logs"]

#: What a record has by itself; everything else came in as `extra`.
_OWN_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}

#: Libraries that tell their life story at level info, and each retry as a warning: they are kept one level quieter.
_TALKATIVE = ("aiokafka", "faust", "mode", "kafka", "urllib3", "clickhouse_connect", "uvicorn.access", "jgo", "cjdk")


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return f"{moment:%Y-%m-%dT%H:%M:%S}.{moment.microsecond // 1000:03d}Z"


class JsonFormatter(logging.Formatter):
    """`time` (UTC, milliseconds), `level`, `logger`, `message`, the record's extra fields, and `error` with the
    traceback. An extra field never replaces one of these: it gets a trailing ``_``."""

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in vars(record).items():
            if name not in _OWN_FIELDS:
                line[f"{name}_" if name in line or name == "error" else name] = value
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False)


class _TextFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        extra = [f"{name}={value}" for name, value in vars(record).items() if name not in _OWN_FIELDS]
        text = f"{_time(record)} {record.levelname.lower():7} {record.name}: {record.getMessage()}"
        if extra:
            text += f" ({', '.join(extra)})"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _LibrariesQuieter(logging.Filter):
    """On the handler, not on the libraries' loggers: some set their own level when they are imported."""

    def __init__(self, level: str) -> None:
        super().__init__()
        self._least = {"debug": logging.INFO, "info": logging.WARNING}.get(level, logging.ERROR)

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= self._least or not record.name.startswith(_TALKATIVE)


def set_up_logs(level: str, layout: Literal["json", "text"]) -> None:
    """Send the logs of this process to standard error; may be called again, the last call counts."""
    handler = logging.StreamHandler(sys.stderr)
    handler.addFilter(_LibrariesQuieter(level))
    handler.setFormatter(JsonFormatter() if layout == "json" else _TextFormatter())
    root = logging.getLogger()
    for old in root.handlers[:]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())

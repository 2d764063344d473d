"""Logs are JSON lines with UTC time and extra fields, and never hold a secret."""

import json
import logging
import re
import subprocess
import sys

from gpuledger.cli.logs import JsonFormatter
from gpuledger.schemas.settings import Secret


def line_of(**fields: object) -> dict[str, object]:
    record = logging.makeLogRecord(
        {"name": "gpuledger.x", "levelname": "INFO", "msg": "stored %d", "args": (3,)} | fields
    )
    return json.loads(JsonFormatter().format(record))


def test_a_line_has_time_level_logger_message_and_extra_fields() -> None:
    line = line_of(pool="h100", created=1_700_000_000.25)
    assert line == {
        "time": "2023-11-14T22:13:20.250Z",
        "level": "info",
        "logger": "gpuledger.x",
        "message": "stored 3",
        "pool": "h100",
    }


def test_an_extra_field_replaces_nothing() -> None:
    line = line_of(time="noon", level="deep")
    assert (line["time_"], line["level"], line["level_"]) == ("noon", "info", "deep")


def test_a_secret_is_masked_wherever_it_goes() -> None:
    secret = Secret("hush-hush")
    text = json.dumps(line_of(password=secret, args=(3,), connection={"password": secret}))
    assert "hush" not in text
    assert "***" in text


def test_an_exception_stays_on_one_line() -> None:
    code = (
        "import logging; from gpuledger.cli.logs import set_up_logs\n"
        "set_up_logs('info', 'json')\n"
        "log = logging.getLogger('gpuledger.x')\n"
        "log.debug('unseen')\n"
        "try: 1 / 0\n"
        "except ZeroDivisionError: log.exception('it failed', extra={'pool': 'h100'})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    (line,) = result.stderr.splitlines()
    assert "ZeroDivisionError" in json.loads(line)["error"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", json.loads(line)["time"])
    assert result.stdout == ""

"""Rows: aligned for people, exact and with stable keys for scripts."""

import csv
import io
import json
import os
import pty
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pytest

from gpuledger.cli.output import Column, Format, write_rows

COLUMNS = (
    Column("tenant", "Tenant"),
    Column("held_gpu_us", "GPU-hours", exact=True, show=lambda us: f"{Decimal(us) / 3_600_000_000:.2f}"),
    Column("cost", "Cost"),
    Column("gpus", "GPUs"),
    Column("hour", "Hour"),
)
ROWS = [
    {
        "tenant": "aurora",
        "held_gpu_us": 2**60 + 1,
        "cost": Decimal("12345678901234567890.123456789"),
        "gpus": 12,
        "hour": datetime(2026, 11, 24, 8, tzinfo=UTC),
    },
    {"tenant": "nimbus, inc", "held_gpu_us": 0, "cost": None, "gpus": None},
]


def written(layout: Format, rows: Sequence[Mapping[str, Any]] = ROWS, columns: Sequence[Column] = COLUMNS) -> str:
    out = io.StringIO()
    write_rows(columns, rows, layout, out=out)
    return out.getvalue()


def test_json_is_exact_and_has_every_key() -> None:
    assert json.loads(written("json")) == [
        {
            "tenant": "aurora",
            "held_gpu_us": "1152921504606846977",
            "cost": "12345678901234567890.123456789",
            "gpus": 12,
            "hour": "2026-11-24T08:00:00Z",
        },
        {"tenant": "nimbus, inc", "held_gpu_us": "0", "cost": None, "gpus": None, "hour": None},
    ]


def test_json_of_no_rows_is_an_empty_list() -> None:
    assert json.loads(written("json", [])) == []


def test_csv_has_keys_and_plain_values() -> None:
    rows = list(csv.DictReader(io.StringIO(written("csv"))))
    assert rows[0]["held_gpu_us"] == "1152921504606846977"
    assert rows[0]["cost"] == "12345678901234567890.123456789"
    assert rows[1] == {"tenant": "nimbus, inc", "held_gpu_us": "0", "cost": "", "gpus": "", "hour": ""}


def test_a_small_decimal_is_never_written_with_an_exponent() -> None:
    assert json.loads(written("json", [{"cost": Decimal("0.000000001")}]))[0]["cost"] == "0.000000001"


def test_a_pipe_gets_aligned_text() -> None:
    lines = written("table").splitlines()
    assert lines[0].split() == ["Tenant", "GPU-hours", "Cost", "GPUs", "Hour"]
    assert [line.index("GPU-hours") + len("GPU-hours") for line in lines[:1]] == [lines[2].index("0.00") + 4]
    assert lines[2].split() == ["nimbus,", "inc", "0.00", "–", "–", "–"]


def test_an_integer_beyond_2_53_needs_an_exact_column() -> None:
    with pytest.raises(ValueError, match=r"^gpus: 9007199254740993 is beyond 2\^53"):
        written("json", [{"gpus": 2**53 + 1}])


def test_a_key_without_a_column_is_not_dropped() -> None:
    with pytest.raises(KeyError, match="colour: no column has this key"):
        written("csv", [{"colour": "red"}])


def test_a_terminal_gets_a_table_and_markup_in_names_is_text() -> None:
    code = (
        "from gpuledger.cli.output import Column, write_rows\n"
        "write_rows([Column('job_id'), Column('gpus')], [{'job_id': '[red]x', 'gpus': 8}], 'table', title='Jobs')\n"
    )
    master, slave = pty.openpty()
    try:
        subprocess.run([sys.executable, "-c", code], stdout=slave, timeout=60, check=True)
        shown = os.read(master, 65536).decode()
    finally:
        os.close(slave)
        os.close(master)
    assert "[red]x" in shown
    assert "┃" in shown

"""Slurm's own accounts as `sacct` prints them: which job had how many GPUs, from when to when. Pure.

The outside truth to compare a ledger with: it shares nothing with the path from a prolog to an allocation. Reads
`sacct -P -o JobIDRaw,Account,User,State,Start,End,AllocTRES,NodeList,ElapsedRaw`, or the same columns as CSV.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from typing import TypeVar

from gpuledger.streams.exceptions import AccountsError

__all__ = ["COLUMNS", "JobRun", "expand_nodes", "gpus_of", "read_sacct"]

COLUMNS = ("JobIDRaw", "Account", "User", "State", "Start", "End", "AllocTRES", "NodeList", "ElapsedRaw")
#: Without these there is nothing to compare.
_REQUIRED = ("Account", "Start", "End", "AllocTRES")
#: What sacct writes for a time that there is not (yet).
_NO_TIME = ("", "Unknown", "None", "N/A", "NONE", "UNLIMITED")
#: The longest node list that is expanded: a typing mistake must not fill the memory.
_MOST_NODES = 100_000

T = TypeVar("T")

_JOB_ID = re.compile(r"\d+(_(\d+|\[[^\]]*\]))?(\+\d+)?", re.ASCII)
_GRES = re.compile(r"gres/gpu(?::([^=]+))?", re.ASCII)
_EPOCH_SECONDS = re.compile(r"\d{9,11}", re.ASCII)
_RANGES = re.compile(r"(\d+)(?:-(\d+))?", re.ASCII)


@dataclass(frozen=True, slots=True)
class JobRun:
    """One run of a job: `gpus` GPUs over [start_ms, end_ms), UTC; `end_ms` None while it runs.

    `elapsed_s` is Slurm's own (without the time a job was suspended), None where it was not printed. `line` is where
    in the file it stands.
    """

    line: int
    job_id: str
    account: str
    user: str
    state: str
    start_ms: int
    end_ms: int | None
    gpus: int
    nodes: tuple[str, ...]
    elapsed_s: int | None


def read_sacct(lines: Iterable[str], zone: tzinfo | None = None) -> Iterator[JobRun]:
    """Runs of jobs, in the file's order. Left out: job steps, jobs that never started, jobs without a GPU that have
    nothing to compare (0 GPUs are kept: the ledger may think otherwise).

    `zone` is that of times without one; None is this machine's, which is what sacct prints on the same machine. In the
    hour that clocks repeat, ElapsedRaw decides which of the two is meant.

    Raises AccountsError, which names line, column, value and fix.
    """
    rows = _rows(lines)
    for line, row in rows:
        name = row.get("JobIDRaw") or row.get("JobID", "")
        if "." in name:  # a step of a job that has a line of its own
            continue
        if not _JOB_ID.fullmatch(name):
            raise AccountsError(f'line {line}: JobIDRaw: expected a job id such as 1234, got "{name}"')
        elapsed = row.get("ElapsedRaw", "")
        if elapsed and not elapsed.isdecimal():
            raise AccountsError(f'line {line}: ElapsedRaw: expected whole seconds, got "{elapsed}"')
        elapsed_s = int(elapsed) if elapsed else None
        span = _span(line, row, zone, elapsed_s)
        if span is None:
            continue
        yield JobRun(
            line=line,
            job_id=name,
            account=row["Account"],
            user=row.get("User", ""),
            # "CANCELLED by 1000" says who; that is no other state.
            state=row.get("State", "").split(" ")[0],
            start_ms=span[0],
            end_ms=span[1],
            gpus=_at(line, "AllocTRES", gpus_of, row["AllocTRES"]),
            nodes=tuple(_at(line, "NodeList", expand_nodes, row.get("NodeList", ""))),
            elapsed_s=elapsed_s,
        )


def _at(line: int, column: str, read: Callable[[str], T], text: str) -> T:
    try:
        return read(text)
    except ValueError as error:
        raise AccountsError(f"line {line}: {column}: {error}") from None


def _rows(lines: Iterable[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, column: value) of every line after the header, whose separator is | or a comma."""
    source = iter(lines)
    header = next((line for line in source), "").lstrip("\ufeff").rstrip("\r\n")
    separator = "|" if "|" in header else ","
    names = [name.strip() for name in header.split(separator)]
    missing = [name for name in _REQUIRED if name not in names]
    if "JobIDRaw" not in names and "JobID" not in names:
        missing.insert(0, "JobIDRaw")
    if missing:
        raise AccountsError(
            f"line 1: the header lacks {', '.join(missing)}; write the file with sacct -P -o {','.join(COLUMNS)}"
        )
    # With -P a value is never quoted; in a CSV the TRES list, which has commas, must be.
    quoting = csv.QUOTE_NONE if separator == "|" else csv.QUOTE_MINIMAL
    reader = csv.reader(source, delimiter=separator, quoting=quoting)
    for cells in reader:
        line = reader.line_num + 1
        if not any(cell.strip() for cell in cells):
            continue
        # `sacct -p` ends every line with a separator.
        if len(cells) == len(names) + 1 and not cells[-1]:
            cells = cells[:-1]
        if len(cells) != len(names):
            hint = "; quote values that have commas" if separator == "," else ""
            raise AccountsError(f"line {line}: has {len(cells)} values, the header has {len(names)} columns{hint}")
        yield line, {name: cell.strip() for name, cell in zip(names, cells, strict=True)}


# ------------------------------------------------------------------------------------------------- times


def _span(line: int, row: dict[str, str], zone: tzinfo | None, elapsed_s: int | None) -> tuple[int, int | None] | None:
    """(start, end) of a run; None for a job that never started."""
    starts, ends = (_moments(line, name, row[name], zone) for name in ("Start", "End"))
    if not starts:
        return None
    if not ends:
        return starts[0], None
    pairs = [(start, end) for start in starts for end in ends if start <= end]
    if not pairs:
        raise AccountsError(f'line {line}: End: "{row["End"]}" is before Start "{row["Start"]}"')
    exact = [pair for pair in pairs if elapsed_s is not None and pair[1] - pair[0] == elapsed_s * 1000]
    return (exact or pairs)[0]


def _moments(line: int, column: str, text: str, zone: tzinfo | None) -> Sequence[int]:
    """The UTC milliseconds that a time can mean: none, one, or two in the hour that clocks repeat."""
    if text in _NO_TIME:
        return ()
    if _EPOCH_SECONDS.fullmatch(text):
        return (int(text) * 1000,)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise AccountsError(
            f'line {line}: {column}: expected a time such as 2026-11-20T08:00:00 or Unknown, got "{text}"'
        ) from None
    if moment.tzinfo is not None:
        return (_ms(moment),)
    if zone is not None:
        moment = moment.replace(tzinfo=zone)
    # A naive time is this machine's, by the system's own tables.
    return tuple(dict.fromkeys(_ms(moment.replace(fold=fold).astimezone(UTC)) for fold in (0, 1)))


def _ms(moment: datetime) -> int:
    return int(moment.timestamp()) * 1000


# ------------------------------------------------------------------------------------------------- GPUs and nodes


def gpus_of(tres: str) -> int:
    """GPUs of an AllocTRES: gres/gpu=N where it is there (the sum of all types), else the types' sum.

    Raises ValueError where a count is no number.
    """
    total: int | None = None
    typed = 0
    for part in filter(None, tres.split(",")):
        name, _, value = part.partition("=")
        match = _GRES.fullmatch(name.strip())
        if match is None:
            continue
        if not value.isdecimal():
            raise ValueError(f'expected {name}=NUMBER, got "{part}"')
        if match[1] is None:
            total = int(value)
        else:
            typed += int(value)
    return typed if total is None else total


def expand_nodes(text: str) -> list[str]:
    """The names of a Slurm node list: "gpu[001-003,7],login1" is gpu001, gpu002, gpu003, gpu7 and login1.

    Raises ValueError where it is none.
    """
    if text in ("", "None assigned", "None", "(null)"):
        return []
    out: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        names = [""]
        for literal, ranges in re.findall(r"([^\[\]]+)|\[([^\]]*)\]", item):
            choices = [literal] if literal else _numbers(ranges)
            if len(names) * len(choices) + len(out) > _MOST_NODES:
                raise ValueError(f'"{text[:80]}" names more than {_MOST_NODES} nodes')
            names = [name + choice for name in names for choice in choices]
        out += names
    return out


def _numbers(text: str) -> list[str]:
    out: list[str] = []
    for part in text.split(","):
        match = _RANGES.fullmatch(part)
        if match is None:
            raise ValueError(f'expected a node list such as gpu[01-04,7], got "[{text}]"')
        first, last = match[1], match[2] or match[1]
        if not int(first) <= int(last) < int(first) + _MOST_NODES:
            raise ValueError(f'"[{text}]" is not a range of nodes')
        out += [str(n).zfill(len(first)) for n in range(int(first), int(last) + 1)]
    return out

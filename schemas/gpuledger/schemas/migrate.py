"""Applies the numbered migrations once, in order, and the views every time; knows SQL text, never a driver.

The caller passes two functions (run a statement, read rows), so that the contract stays free of I/O libraries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Protocol

from gpuledger.schemas.exceptions import SchemaError

__all__ = ["Migration", "migrate", "migrations", "pending", "statements", "views"]

Query = Callable[[str], Sequence[Sequence[object]]]


class Execute(Protocol):
    """Runs one statement with bound parameters (`{name:Type}` in the text)."""

    def __call__(self, sql: str, parameters: dict[str, object] | None = None, /) -> object: ...


_JOURNAL = (
    "CREATE TABLE IF NOT EXISTS migrations "
    "(number UInt32, name String, sha256 String, applied_at DateTime64(3, 'UTC')) ENGINE = MergeTree ORDER BY number"
)


@dataclass(frozen=True, slots=True)
class Migration:
    """One file of migrations/: its number, its name and its text."""

    number: int
    name: str
    sql: str

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def _read(folder: str) -> list[tuple[str, str]]:
    found = [entry for entry in files("gpuledger.schemas").joinpath(folder).iterdir() if entry.name.endswith(".sql")]
    return sorted((entry.name, entry.read_text(encoding="utf-8")) for entry in found)


def migrations() -> list[Migration]:
    """All migrations, by number. Raises SchemaError where numbers do not run 1, 2, 3, …"""
    found = [Migration(int(name[:4]), name.removesuffix(".sql"), sql) for name, sql in _read("migrations")]
    for expected, migration in enumerate(found, start=1):
        if migration.number != expected:
            raise SchemaError(
                f"migrations/{migration.name}.sql: expected number {expected:04d}; numbers run without holes"
            )
    return found


def views() -> list[tuple[str, str]]:
    """(file name, text) of every file of views/: each statement may be run again at any time."""
    return _read("views")


def statements(sql: str) -> list[str]:
    """The statements of a file, split at semicolons that end a line; lines that are comments are dropped."""
    lines = [line for line in sql.splitlines() if not line.lstrip().startswith("--")]
    parts = [part.strip().rstrip(";") for part in "\n".join(lines).split(";\n")]
    return [part for part in parts if part]


def pending(query: Query, execute: Execute) -> list[Migration]:
    """Migrations not applied yet. Raises SchemaError when an applied one has been changed since."""
    execute(_JOURNAL)
    applied = {int(str(number)): str(sha) for number, sha in query("SELECT number, sha256 FROM migrations")}
    for migration in migrations():
        if applied.get(migration.number, migration.sha256) != migration.sha256:
            raise SchemaError(
                f"migrations/{migration.name}.sql: differs from what was applied; write a new one instead"
            )
    return [migration for migration in migrations() if migration.number not in applied]


def migrate(query: Query, execute: Execute) -> list[Migration]:
    """Brings a database up to date and returns what was applied. Tables are created IF NOT EXISTS, so a migration that
    was killed half-way is repeated safely."""
    todo = pending(query, execute)
    for migration in todo:
        for statement in statements(migration.sql):
            execute(statement.replace("CREATE TABLE ", "CREATE TABLE IF NOT EXISTS ", 1))
        execute(
            "INSERT INTO migrations (number, name, sha256, applied_at) "
            "SELECT {number:UInt32}, {name:String}, {sha256:String}, now64(3)",
            {"number": migration.number, "name": migration.name, "sha256": migration.sha256},
        )
    for _, sql in views():
        for statement in statements(sql):
            execute(statement)
    return todo

"""From a request and its body to the one statement it asks for, and the rules about what the front refuses."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain

from gpuledger.local.clickhouse.body import Body
from gpuledger.local.clickhouse.compression import decode
from gpuledger.local.clickhouse.engine import Engine, Limits, StatementClass
from gpuledger.local.clickhouse.errors import EngineError
from gpuledger.local.clickhouse.hello import HELLO_SQL, is_hello
from gpuledger.local.clickhouse.request import ExternalTable, Request, parse_multipart
from gpuledger.local.clickhouse.sql import Statement, parse

__all__ = ["Prepared", "prepare"]

# What the statement must be found in; data may follow.
_HEAD_BYTES = 256 * 1024

# Functions that reach outside the engine and that its grants do not cover.
_REFUSED_CALLS = frozenset({"PYTHON", "FILE", "EXECUTABLE", "DISK"})
_DICTIONARY_SOURCES = frozenset({"CLICKHOUSE", "NULL"})


@dataclass(slots=True)
class Prepared:
    """One statement, judged and ready to run. `data` are an INSERT's inline data, None for every other statement."""

    statement: Statement
    kind: StatementClass
    sql: str
    data: Iterator[bytes] | None
    external: list[ExternalTable]

    @property
    def verb(self) -> str:
        return self.statement.verb

    @property
    def is_hello(self) -> bool:
        return self.sql == HELLO_SQL

    @property
    def runs_as_read(self) -> bool:
        # What the engine cannot parse is only run for its error message.
        return self.data is None and (self.kind.reads or self.kind.kind == "UNKNOWN" or self.verb in ("SET", "USE"))


def prepare(engine: Engine, request: Request, body: Body, limits: Limits) -> Prepared:
    """Decompresses as much of the body as needed, finds the statement and checks it. Blocks.

    Raises EngineError for what is refused to everyone: several statements, INTO OUTFILE, FROM INFILE, functions and
    dictionary sources that reach outside.
    """
    chunks = decode(body.chunks(), request.headers.get("content-encoding"), limits.max_body_bytes)
    external: list[ExternalTable] = []
    if request.headers.get("content-type", "").startswith("multipart/form-data"):
        external = parse_multipart(request, _join(chunks, b"", limits.max_sql_bytes * 4))
        chunks = iter(())
    text = request.query.encode("utf-8", "surrogateescape")
    if text:
        text += b"\n"
    for chunk in chunks:
        text += chunk
        if len(text) >= _HEAD_BYTES:
            break
    statement = parse(text)
    data: Iterator[bytes] | None = None
    if statement.data_start is None:
        rest = _join(chunks, text, limits.max_sql_bytes)
        if len(rest) != len(text):
            statement = parse(rest)
    if statement.data_start is not None:
        data = chain([text[statement.data_start :]], chunks)
    sql = HELLO_SQL if is_hello(statement.sql) else statement.sql
    if not _is_unicode(sql):
        raise EngineError.of("SYNTAX_ERROR", "Syntax error: the statement is not valid UTF-8")
    judged = f"{sql} FORMAT {statement.format}" if data is not None else sql
    kind = engine.classify(judged)
    _check(statement, kind)
    return Prepared(statement, kind, sql, data, external)


def _check(statement: Statement, kind: StatementClass) -> None:
    if not statement.verb:
        raise EngineError.of("SYNTAX_ERROR", "Syntax error: failed at position 1 (end of query): Empty query")
    if kind.statements > 1:
        raise EngineError.of("SYNTAX_ERROR", "Syntax error (Multi-statements are not allowed)")
    if "OUTFILE" in statement.words and kind.kind == "CONTROL":
        raise EngineError.of("INTO_OUTFILE_NOT_ALLOWED", "INTO OUTFILE is not allowed")
    if "INFILE" in statement.words and statement.is_insert:
        raise EngineError.of("ACCESS_DENIED", "FROM INFILE is not allowed")
    if statement.is_query and kind.kind not in ("READ_ONLY", "UNKNOWN"):
        raise EngineError.of("ACCESS_DENIED", f"{statement.verb} with side effects is not allowed")
    refused = statement.calls & _REFUSED_CALLS
    if refused:
        raise EngineError.of("ACCESS_DENIED", f"The function {min(refused).lower()} is not allowed")
    if "DICTIONARY" in statement.words and statement.sources - _DICTIONARY_SOURCES:
        source = min(statement.sources - _DICTIONARY_SOURCES)
        raise EngineError.of("ACCESS_DENIED", f"The dictionary source {source} is not allowed")


def _is_unicode(text: str) -> bool:
    # Bytes that are not UTF-8 came through decoding as lone surrogates.
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _join(chunks: Iterator[bytes], start: bytes, limit: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    for chunk in chain([start], chunks):
        size += len(chunk)
        if size > limit:
            raise EngineError.of("QUERY_IS_TOO_LARGE", f"The statement is larger than {limit} bytes")
        pieces.append(chunk)
    return b"".join(pieces)

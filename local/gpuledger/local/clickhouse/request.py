"""One HTTP request as ClickHouse's port understands it: credentials, parameters, settings, multipart parts."""

import base64
import binascii
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qsl

from gpuledger.local.clickhouse.errors import EngineError
from gpuledger.local.clickhouse.sessions import DEFAULT_TIMEOUT_S, MAX_TIMEOUT_S

__all__ = ["Credentials", "ExternalTable", "Request", "parse_multipart", "parse_request"]

_MAX_URL_BYTES = 1024 * 1024

# Parameters of the protocol; everything else in the URL is a setting of the query.
_PROTOCOL = frozenset(
    {
        "query",
        "database",
        "default_format",
        "user",
        "password",
        "quota_key",
        "query_id",
        "session_id",
        "session_timeout",
        "session_check",
        "compress",
        "decompress",
        "wait_end_of_query",
        "buffer_size",
        "client_protocol_version",
        "role",
        "stacktrace",
        "close_session",
        # Settings of the server's HTTP layer, which is us.
        "enable_http_compression",
        "http_zlib_compression_level",
        "send_progress_in_http_headers",
        "http_headers_progress_interval_ms",
        "cancel_http_readonly_queries_on_client_close",
        "add_http_cors_header",
        "http_write_exception_in_output_format",
        "http_wait_end_of_query",
        "http_response_buffer_size",
        # Every insert is on disk before it is acknowledged; these could only weaken that.
        "async_insert",
        "wait_for_async_insert",
        "fsync_metadata",
        # Ours: it carries the query id.
        "log_comment",
    }
)
_EXTERNAL = re.compile(r"(.+)_(format|structure|types)")
_DISPOSITION = re.compile(r'(name|filename)="((?:[^"\\]|\\.)*)"')


@dataclass(frozen=True, slots=True)
class Credentials:
    user: str
    password: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class ExternalTable:
    """A table sent along with a query: `structure` such as `a Int64, b String`."""

    name: str
    structure: str
    format: str
    data: bytes


@dataclass(slots=True)
class Request:
    """What the URL and the headers ask for. `params` are bound parameters, still escaped as the protocol has them."""

    method: str
    path: str
    headers: Mapping[str, str]
    credentials: Credentials
    query: str
    query_id: str
    database: str | None
    session_id: str | None
    session_timeout_s: float
    session_check: bool
    default_format: str
    wait_end_of_query: bool
    protocol_version: int
    accept_encoding: str
    settings: dict[str, str]
    params: dict[str, str]
    external: dict[str, str]

    @property
    def is_get(self) -> bool:
        return self.method in ("GET", "HEAD")


def parse_request(scope: Mapping[str, Any]) -> Request:
    """From an ASGI scope. Raises EngineError for what the protocol does not allow or we do not have."""
    raw_query: bytes = scope["query_string"]
    if len(raw_query) > _MAX_URL_BYTES:
        raise EngineError.of("QUERY_IS_TOO_LARGE", f"The URL is longer than {_MAX_URL_BYTES} bytes; send a body")
    headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
    values = dict(parse_qsl(raw_query.decode("ascii", "replace"), keep_blank_values=True, errors="surrogateescape"))
    for name in ("compress", "decompress"):
        if _flag(values.get(name)):
            raise EngineError.of(
                "NOT_IMPLEMENTED",
                f"{name}=1, ClickHouse's own block framing, is not supported; use "
                "enable_http_compression=1 with Accept-Encoding, and Content-Encoding for bodies: lz4, zstd or gzip",
            )
    request = Request(
        method=scope["method"],
        path=scope["path"],
        headers=headers,
        credentials=_credentials(headers, values),
        query=values.get("query", ""),
        query_id=values.get("query_id") or str(uuid.uuid4()),
        database=values.get("database") or headers.get("x-clickhouse-database"),
        session_id=values.get("session_id") or None,
        session_timeout_s=_timeout(values.get("session_timeout")),
        session_check=_flag(values.get("session_check")),
        default_format=values.get("default_format") or headers.get("x-clickhouse-format") or "TabSeparated",
        protocol_version=_number(values.get("client_protocol_version")),
        wait_end_of_query=_flag(values.get("wait_end_of_query")),
        accept_encoding=headers.get("accept-encoding", "") if _flag(values.get("enable_http_compression", "1")) else "",
        settings={},
        params={},
        external={},
    )
    multipart = headers.get("content-type", "").startswith("multipart/form-data")
    for name, value in values.items():
        _sort_in(request, name, value, multipart)
    return request


def _sort_in(request: Request, name: str, value: str, multipart: bool) -> None:
    if name.startswith("param_"):
        request.params[name.removeprefix("param_")] = value
    elif name in _PROTOCOL:
        pass
    elif multipart and _EXTERNAL.fullmatch(name):
        request.external[name] = value
    else:
        request.settings[name] = value


def parse_multipart(request: Request, body: bytes) -> list[ExternalTable]:
    """Reads a multipart/form-data body: fields go into `request`, files become external tables.

    Raises EngineError 36 for a body that is not well-formed or a table whose structure is not given.
    """
    found = re.search(r'boundary="?([^";]+)"?', request.headers.get("content-type", ""))
    if found is None:
        raise _bad("the multipart body has no boundary")
    parts = (b"\r\n" + body).split(b"\r\n--" + found.group(1).encode("latin-1"))
    if len(parts) < 2 or not parts[-1].startswith(b"--"):
        raise _bad("the multipart body is cut off")
    files: dict[str, bytes] = {}
    for part in parts[1:-1]:
        head, separator, content = part.partition(b"\r\n\r\n")
        if not separator:
            raise _bad("a part of the multipart body has no content")
        names = dict(_DISPOSITION.findall(head.decode("utf-8", "surrogateescape")))
        name = names.get("name", "")
        if "filename" in names:
            files[name] = content
        elif name == "query":
            request.query += content.decode("utf-8", "surrogateescape")
        else:
            _sort_in(request, name, content.decode("utf-8", "surrogateescape"), multipart=True)
    return [_external(request, name, data) for name, data in files.items()]


def _external(request: Request, name: str, data: bytes) -> ExternalTable:
    structure = request.external.get(f"{name}_structure")
    types = request.external.get(f"{name}_types")
    if structure is None and types is not None:
        structure = ", ".join(f"_{index} {kind}" for index, kind in enumerate(types.split(","), 1))
    if structure is None:
        raise _bad(f"the external table {name} needs {name}_structure or {name}_types")
    return ExternalTable(name, structure, request.external.get(f"{name}_format", "TabSeparated"), data)


def _credentials(headers: Mapping[str, str], values: Mapping[str, str]) -> Credentials:
    authorization = headers.get("authorization")
    named = "x-clickhouse-user" in headers or "x-clickhouse-key" in headers
    if authorization is not None:
        if named:
            raise _auth("use either X-ClickHouse headers or the Authorization header, not both")
        kind, _, token = authorization.partition(" ")
        if kind.lower() != "basic":
            raise _auth(f"the authentication scheme {kind!r} is not supported; use Basic")
        try:
            user, _, password = base64.b64decode(token, validate=True).decode().partition(":")
        except (binascii.Error, ValueError):
            raise _auth("the Authorization header is not valid Basic authentication") from None
        return Credentials(user or "default", password)
    if named:
        return Credentials(headers.get("x-clickhouse-user") or "default", headers.get("x-clickhouse-key", ""))
    return Credentials(values.get("user") or "default", values.get("password", ""))


def _timeout(text: str | None) -> float:
    if text is None:
        return DEFAULT_TIMEOUT_S
    if not text.isdigit():
        raise EngineError.of("INVALID_SESSION_TIMEOUT", f"Invalid session timeout: {text!r}")
    if int(text) > MAX_TIMEOUT_S:
        raise EngineError.of(
            "INVALID_SESSION_TIMEOUT", f"Session timeout {text!r} is larger than {MAX_TIMEOUT_S:.0f} seconds"
        )
    return float(text)


def _number(text: str | None) -> int:
    return int(text) if text is not None and text.isascii() and text.isdigit() else 0


def _flag(text: str | None) -> bool:
    return text is not None and text.lower() in ("1", "true", "yes", "on")


def _auth(message: str) -> EngineError:
    return EngineError.of("AUTHENTICATION_FAILED", f"Invalid authentication: {message}")


def _bad(message: str) -> EngineError:
    return EngineError.of("BAD_ARGUMENTS", message)

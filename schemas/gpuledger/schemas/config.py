"""The configuration: one YAML file, overlaid with ``GPULEDGER_…`` variables, validated before anything starts.

Each section below validates itself; `deploy/gpuledger.example.yaml` has every field with its default. Sections are
frozen: what a process was started with is what it runs with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from gpuledger.schemas.exceptions import ConfigError, SchemaError
from gpuledger.schemas.settings import Secret, read_settings
from gpuledger.schemas.yaml_text import parse_yaml

__all__ = [
    "ENVIRONMENT_PREFIX",
    "Agent",
    "Alerts",
    "ClickHouse",
    "Config",
    "Kafka",
    "KafkaSecurity",
    "Ledger",
    "Log",
    "Page",
    "ReservedUnused",
    "Webhook",
    "Worker",
    "load_config",
    "parse_config",
    "parse_listen",
]

ENVIRONMENT_PREFIX = "GPULEDGER_"
#: Variables with the prefix that are no settings: where the file is, and where jars are kept.
_OTHER_VARIABLES = frozenset({"GPULEDGER_CONFIG", "GPULEDGER_CACHE_DIR"})

_HOST_PORT = re.compile(r"(?P<host>\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):(?P<port>\d{1,5})")


def _is_host_port(text: str) -> bool:
    match = _HOST_PORT.fullmatch(text)
    return match is not None and int(match["port"]) <= 65535


def _check_listen(text: str) -> str | None:
    return None if _is_host_port(text) else "expected host:port"


def _check_bootstrap(text: str) -> str | None:
    ok = text and all(_is_host_port(part.strip()) for part in text.split(","))
    return None if ok else "expected host:port, several with commas between them"


def _check_url(text: str) -> str | None:
    try:
        parts = urlsplit(text)
        ok = parts.scheme in ("http", "https") and parts.hostname and parts.port and parts.path in ("", "/")
    except ValueError:
        return "expected http(s)://host:port"
    if parts.username is not None:
        return "expected http(s)://host:port without a user; use clickhouse.user and clickhouse.password_file"
    return None if ok else "expected http(s)://host:port"


def _check_webhook_url(text: str) -> str | None:
    try:
        parts = urlsplit(text)
    except ValueError:
        return "expected http(s)://host/path"
    if parts.username is not None:
        return "expected a URL without a user; use secret_file"
    return None if parts.scheme in ("http", "https") and parts.hostname else "expected http(s)://host/path"


def _check_topic_prefix(text: str) -> str | None:
    return None if re.fullmatch(r"[A-Za-z0-9._-]{0,200}", text) else "expected letters, digits, '.', '_' and '-' only"


def _check_identifier(text: str) -> str | None:
    return None if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", text) else "expected letters, digits and '_' only"


def _check_divides_day(minutes: int) -> str | None:
    return None if 1440 % minutes == 0 else "expected a number of minutes that divides a day"


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections."""


def _default_partitions() -> dict[str, int]:
    return {
        "telemetry": 4,
        "allocations": 2,
        "inventory": 2,
        "jobs": 1,
        "capacity": 1,
        "rates": 1,
        "dirty": 2,
        "alerts": 1,
        "deadletter": 1,
    }


class KafkaSecurity(_Section, frozen=True):
    """How to talk to the brokers. The default is for loopback only."""

    protocol: Annotated[
        Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"],
        Meta(description="As Kafka's security.protocol.", examples=["SASL_SSL"]),
    ] = "PLAINTEXT"
    ca_file: Annotated[
        str | None, Meta(description="PEM file of the authority that signed the brokers' certificates; null: system's.")
    ] = None
    cert_file: Annotated[str | None, Meta(description="PEM file of the client certificate.")] = None
    key_file: Annotated[str | None, Meta(description="PEM file of the client certificate's key.")] = None
    sasl_mechanism: Annotated[
        Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"], Meta(description="Used with SASL_… protocols.")
    ] = "SCRAM-SHA-512"
    username: Annotated[str | None, Meta(description="Used with SASL_… protocols.")] = None
    password: Annotated[Secret | None, Meta(description="Only from GPULEDGER_KAFKA__SECURITY__PASSWORD.")] = None
    password_file: Annotated[str | None, Meta(description="File with the password, read at start.")] = None

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.protocol.startswith("SASL") and not self.username:
            yield "username", f"is missing, and protocol {self.protocol} needs it; write the user's name"
        if self.protocol.startswith("SASL") and self.password is None and self.password_file is None:
            yield "password_file", f"is missing, and protocol {self.protocol} needs it; write the path of a file"
        if (self.cert_file is None) != (self.key_file is None):
            missing = "cert_file" if self.cert_file is None else "key_file"
            yield missing, "is missing; cert_file and key_file are set together"


class Kafka(_Section, frozen=True):
    """Where the brokers are and how our topics are made."""

    bootstrap: Annotated[
        str,
        Meta(
            description="Brokers as host:port, with commas between them.",
            examples=["127.0.0.1:9092"],
            extra={"check": _check_bootstrap},
        ),
    ] = "127.0.0.1:9092"
    topic_prefix: Annotated[
        str,
        Meta(
            description="Put before every topic's name, for clusters shared with others.",
            examples=["gpuledger."],
            extra={"check": _check_topic_prefix},
        ),
    ] = ""
    partitions: Annotated[
        dict[str, Annotated[int, Meta(ge=1, le=10_000)]],
        Meta(description="Partitions of each topic when it is made; workers scale by those of telemetry and dirty."),
    ] = msgspec.field(default_factory=_default_partitions)
    replication_factor: Annotated[int, Meta(ge=1, le=10, description="Copies of each topic; 3 in production.")] = 1
    security: KafkaSecurity = KafkaSecurity()


class ClickHouse(_Section, frozen=True):
    """Where the database is."""

    url: Annotated[
        str,
        Meta(
            description="HTTP interface of ClickHouse.",
            examples=["http://127.0.0.1:8123"],
            extra={"check": _check_url},
        ),
    ] = "http://127.0.0.1:8123"
    database: Annotated[str, Meta(description="Made by `db migrate`.", extra={"check": _check_identifier})] = (
        "gpuledger"
    )
    user: Annotated[str, Meta(min_length=1, description="Needs to read and write the database.")] = "default"
    password: Annotated[Secret | None, Meta(description="Only from GPULEDGER_CLICKHOUSE__PASSWORD.")] = None
    password_file: Annotated[str | None, Meta(description="File with the password, read at start.")] = None
    ca_file: Annotated[
        str | None, Meta(description="PEM file of the authority that signed the server's certificate.")
    ] = None
    connect_timeout_s: Annotated[int, Meta(ge=1, le=600, description="To open a connection.")] = 10
    query_timeout_s: Annotated[int, Meta(ge=1, le=86_400, description="To wait for an answer.")] = 300

    def client_arguments(self) -> dict[str, Any]:
        """Keyword arguments of ``clickhouse_connect.get_client`` (and of its async twin) for this server."""
        parts = urlsplit(self.url)
        arguments: dict[str, Any] = {
            "host": parts.hostname,
            "port": parts.port,
            "interface": parts.scheme,
            "username": self.user,
            "password": self.password.reveal() if self.password is not None else "",
            "database": self.database,
            "connect_timeout": self.connect_timeout_s,
            "send_receive_timeout": self.query_timeout_s,
        }
        if self.ca_file is not None:
            arguments["ca_cert"] = self.ca_file
        return arguments


class Agent(_Section, frozen=True):
    """What runs on a node: what it is called, how often it looks, and what it keeps while Kafka is away."""

    node: Annotated[str, Meta(description="Name of this node; empty: the machine's host name.")] = ""
    site: Annotated[str, Meta(description="Site (country, price area) of this node's GPUs.")] = ""
    pool: Annotated[str, Meta(description="Pool of this node's GPUs; empty: named after their model.")] = ""
    period_ms: Annotated[int, Meta(ge=100, le=60_000, description="One sample of each GPU per period.")] = 1000
    flush_ms: Annotated[int, Meta(ge=100, le=60_000, description="One message per flush; not under period_ms.")] = 5000
    active_threshold: Annotated[
        float, Meta(gt=0, le=1, description="Share of SM activity from which a GPU counts as active.")
    ] = 0.01
    spool_dir: Annotated[str, Meta(min_length=1, description="Directory of batches not sent yet.")] = (
        "/var/lib/gpuledger/spool"
    )
    spool_max_bytes: Annotated[
        int, Meta(ge=1_048_576, description="Above it the oldest batches are dropped, with a gap record.")
    ] = 1_073_741_824
    spool_max_age_hours: Annotated[int, Meta(ge=1, le=8760, description="Older batches are dropped likewise.")] = 48
    collectors: Annotated[
        tuple[Literal["nvml", "host", "processes"], ...],
        Meta(description="What the agent reads; one that this machine lacks is reported and skipped."),
    ] = ("nvml", "host", "processes")
    listen: Annotated[
        str, Meta(description="Address of /healthz, /readyz and /metrics.", extra={"check": _check_listen})
    ] = "127.0.0.1:9464"

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.flush_ms < self.period_ms:
            yield "flush_ms", f"expected at least period_ms, got {self.flush_ms}; write {self.period_ms} or more"


class Worker(_Section, frozen=True):
    """The Faust worker: how it batches and how it shares its time."""

    listen: Annotated[
        str, Meta(description="Address of /healthz, /readyz and /metrics.", extra={"check": _check_listen})
    ] = "127.0.0.1:9465"
    group: Annotated[
        str, Meta(min_length=1, description="Consumer group; workers of one ledger share it, two ledgers never do.")
    ] = "gpuledger"
    batch_max_records: Annotated[int, Meta(ge=1, le=1_000_000, description="Messages of one stored block, most.")] = (
        2000
    )
    batch_linger_ms: Annotated[int, Meta(ge=0, le=60_000, description="Wait for a fuller block, at most.")] = 200
    slice_ms: Annotated[
        int, Meta(ge=10, le=10_000, description="Time for old minutes before the newest are looked at again.")
    ] = 500
    live_every_ms: Annotated[
        int, Meta(ge=100, le=60_000, description="How often the open minute of each pool is computed.")
    ] = 1000


class Ledger(_Section, frozen=True):
    """When a minute is complete, and how finely money is cut. All processes of one ledger share these."""

    grace_s: Annotated[
        int, Meta(ge=0, le=86_400, description="A minute waits this long after its end for late batches.")
    ] = 60
    confirm_window_s: Annotated[
        int, Meta(ge=1, le=86_400, description="A batch confirms the allocations it names for so long.")
    ] = 600
    price_interval_minutes: Annotated[
        int,
        Meta(
            ge=1,
            le=1440,
            description="Money is apportioned once per pool and interval; divides a day.",
            examples=[15],
            extra={"check": _check_divides_day},
        ),
    ] = 15
    max_clock_ahead_s: Annotated[
        int, Meta(ge=1, le=86_400, description="Batches further ahead of the broker's clock are quarantined.")
    ] = 120


class Page(_Section, frozen=True):
    """The built-in page."""

    host: Annotated[str, Meta(min_length=1, description="Address to listen on; it has no login, keep it private.")] = (
        "127.0.0.1"
    )
    port: Annotated[int, Meta(ge=0, le=65535, description="0: a free one, which the start message names.")] = 8470
    refresh_ms: Annotated[int, Meta(ge=200, le=60_000, description="How often the page is sent new figures.")] = 1000
    title: Annotated[str, Meta(min_length=1, description="Shown at the top and in the browser's tab.")] = "GPULedger"


class ReservedUnused(_Section, frozen=True):
    """Fires when a tenant's reserved GPUs stand unused."""

    enabled: Annotated[bool, Meta(description="false: never fires.")] = True
    for_minutes: Annotated[int, Meta(ge=1, le=10_080, description="Unused without a break for so long.")] = 5
    min_gpus: Annotated[int, Meta(ge=1, le=10_000_000, description="Fewer unused GPUs are no alert.")] = 1
    min_money_per_hour: Annotated[
        Decimal | None, Meta(description="Less than this per hour is no alert; null: any amount.", examples=["2.50"])
    ] = None


class Webhook(_Section, frozen=True):
    """Where alerts are sent as JSON by POST."""

    url: Annotated[
        str,
        Meta(
            description="Where to send.",
            examples=["https://alerts.example/hooks/gpuledger"],
            extra={"check": _check_webhook_url},
        ),
    ]
    secret: Annotated[Secret | None, Meta(description="Filled from secret_file.")] = None
    secret_file: Annotated[
        str | None, Meta(description="File with the key that signs each request; null: not signed.")
    ] = None
    timeout_s: Annotated[int, Meta(ge=1, le=60, description="To wait for the answer; then it is tried again.")] = 5


class Alerts(_Section, frozen=True):
    """Which alerts fire, and who is told besides the topic and the page."""

    reserved_unused: ReservedUnused = ReservedUnused()
    webhooks: Annotated[tuple[Webhook, ...], Meta(description="Receivers of every alert, firing and resolved.")] = ()


class Log(_Section, frozen=True):
    """What is written to standard error."""

    level: Annotated[Literal["debug", "info", "warning", "error"], Meta(description="Least level written.")] = "info"
    format: Annotated[Literal["json", "text"], Meta(description="One JSON object per line, or text.")] = "json"


class Config(_Section, frozen=True):
    """Everything that can be configured; a process reads the sections it needs."""

    kafka: Kafka = Kafka()
    clickhouse: ClickHouse = ClickHouse()
    agent: Agent = Agent()
    worker: Worker = Worker()
    ledger: Ledger = Ledger()
    page: Page = Page()
    alerts: Alerts = Alerts()
    log: Log = Log()


def parse_listen(listen: str) -> tuple[str, int]:
    """(host, port) of a checked ``host:port``; brackets of IPv6 are taken off."""
    host, _, port = listen.rpartition(":")
    return host.strip("[]"), int(port)


def parse_config(text: str, environ: Mapping[str, str], name: str = "configuration") -> Config:
    """The configuration from the text of a file and the variables of `environ`. Pure: secret files are not read.

    Raises:
        ConfigError: one line per wrong setting, each starting with its path; `name` names the file in YAML errors.
    """
    try:
        tree = parse_yaml(text, name)
    except SchemaError as error:
        raise ConfigError(str(error)) from error
    return read_settings(Config, tree, environ, ENVIRONMENT_PREFIX, _OTHER_VARIABLES)


def load_config(path: Path | None, environ: Mapping[str, str]) -> Config:
    """The configuration of this process: `path` (None: defaults only), variables, and the secrets from their files.

    Raises:
        ConfigError: the file or a secret's file cannot be read, or a setting is wrong.
    """
    text = "" if path is None else _read(path, "--config")
    config = parse_config(text, environ, str(path or "configuration"))
    security = config.kafka.security
    replace = msgspec.structs.replace
    return replace(
        config,
        kafka=replace(
            config.kafka,
            security=replace(
                security, password=_secret(security.password, security.password_file, "kafka.security.password_file")
            ),
        ),
        clickhouse=replace(
            config.clickhouse,
            password=_secret(config.clickhouse.password, config.clickhouse.password_file, "clickhouse.password_file"),
        ),
        alerts=replace(
            config.alerts,
            webhooks=tuple(
                replace(hook, secret=_secret(hook.secret, hook.secret_file, f"alerts.webhooks[{n}].secret_file"))
                for n, hook in enumerate(config.alerts.webhooks)
            ),
        ),
    )


def _secret(given: Secret | None, file: str | None, setting: str) -> Secret | None:
    """A secret from the environment wins over its file."""
    if given is not None or file is None:
        return given
    text = _read(Path(file), setting).rstrip("\r\n")
    if not text:
        raise ConfigError(f"{setting}: expected a file with the secret on its first line, {file} is empty")
    return Secret(text)


def _read(path: Path, setting: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            f'{setting}: cannot read "{path}": {error.strerror}; write the path of a file that this user may read'
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigError(f'{setting}: "{path}" is not UTF-8 text; write the path of a text file') from error

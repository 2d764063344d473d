"""`gpuledger deadletter`: what could not be read and why, and sending it again once the cause is gone."""

from __future__ import annotations

import asyncio
import base64
import json
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from gpuledger.cli.broker_messages import BrokerMessages, RawMessage
from gpuledger.cli.broker_offsets import BrokerAway
from gpuledger.cli.database import data_option, database, read_running
from gpuledger.cli.dead_letters import (
    Content,
    Filters,
    Letter,
    Place,
    Replayed,
    by_reason,
    find,
    full_letter,
    full_topic,
    note_replays,
    parse_place,
)
from gpuledger.cli.durations import parse_duration_ms
from gpuledger.cli.exceptions import CommandError
from gpuledger.cli.output import Column, Format, format_option, write_rows
from gpuledger.cli.session import Session, pass_session
from gpuledger.schemas.config import Kafka
from gpuledger.schemas.texts import escaped

if TYPE_CHECKING:
    from clickhouse_connect.driver.client import Client

__all__ = ["deadletter"]

F = TypeVar("F", bound=Callable[..., Any])

#: Characters of a key and a reason in a table; `show` and JSON have all.
_KEY, _REASON = 24, 100
_PREVIEW_BYTES = 2_048
_HEX_BYTES = 256
#: Replays are written down after so many, in case the rest fails.
_NOTED_AT_ONCE = 100


class _Since(click.ParamType):
    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        from gpuledger.cli.moments import MOMENT_MS

        if re.match(r"\d{4}-", str(value)):
            return MOMENT_MS.convert(value, param, ctx)
        try:
            return time.time_ns() // 1_000_000 - parse_duration_ms(str(value))
        except ValueError as error:
            self.fail(f"{error}; or a time such as 2026-11-24T10:00Z", param, ctx)


def _filters(command: F) -> F:
    """``--topic``, ``--since`` and ``--reason``."""
    for option in (
        click.option("--reason", default="", metavar="TEXT", help="Only letters whose reason contains this."),
        click.option(
            "--since", type=_Since(), default=0, metavar="TIME", help="Only newer ones: 2h, or 2026-11-24T10:00Z."
        ),
        click.option("--topic", "topics", multiple=True, metavar="TOPIC", help="Only this topic; may be repeated."),
    ):
        command = option(command)
    return command


def _chosen(session: Session, topics: Sequence[str], since: int, reason: str) -> Filters:
    prefix = session.config.kafka.topic_prefix
    return Filters(tuple(full_topic(topic, prefix) for topic in topics), since, reason)


@click.group()
def deadletter() -> None:
    """Look at messages that could not be read, and send them again once the cause is gone.

    A letter has the place of its message (topic/partition/offset), the reason, and the message itself.
    """


# -- list and show --------------------------------------------------------------------------------------------------


@deadletter.command("list")
@_filters
@click.option("--by-reason", "counts", is_flag=True, help="How many there are for each reason (numbers in it are #).")
@click.option("--limit", type=click.IntRange(1), default=50, show_default=True, help="Rows, at most; the newest.")
@format_option
@data_option
@pass_session
def list_(
    session: Session,
    topics: tuple[str, ...],
    since: int,
    reason: str,
    counts: bool,
    limit: int,
    layout: Format,
    data: Path | None,
) -> None:
    """List dead letters, or count them by reason."""
    filters = _chosen(session, topics, since, reason)
    with database(session, data) as client:
        if counts:
            names = ("letters", "topics", "first", "last", "newest")
            columns = [*(Column(name) for name in names), Column("reason")]
            write_rows(columns, [_plain(row) for row in by_reason(client, filters, limit)], layout)
            return
        write_rows(_LIST, [_listed(letter) for letter in find(client, filters, limit)], layout)


_LIST = [
    *(Column("appended"), Column("topic"), Column("partition"), Column("offset", exact=True)),
    *(Column("records", exact=True), Column("bytes", exact=True), Column("replayed")),
    Column("key", show=lambda text: _cut(text, _KEY)),
    Column("reason", show=lambda text: _cut(text, _REASON)),
]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    return {key: escaped(value) if isinstance(value, str) else value for key, value in row.items()}


def _listed(letter: Letter) -> dict[str, Any]:
    return _plain(
        {
            "appended": letter.appended_at,
            "topic": letter.topic,
            "partition": letter.partition,
            "offset": letter.offset,
            "records": letter.records,
            "bytes": letter.value_bytes,
            "replayed": letter.replayed_at,
            "key": letter.key,
            "reason": letter.reason,
        }
    )


@deadletter.command()
@click.argument("place", metavar="TOPIC/PARTITION/OFFSET")
@format_option
@data_option
@pass_session
def show(session: Session, place: str, layout: Format, data: Path | None) -> None:
    """Show one letter: reason, key, headers, and what its message holds.

    Control characters are shown as escapes. JSON has the bytes in base64.
    """
    at = parse_place(place, session.config.kafka.topic_prefix)
    with database(session, data) as client:
        content = full_letter(client, at)
    if layout == "table":
        _print(content)
    else:
        row = _shown(content)
        if layout == "csv":
            row |= {name: json.dumps(row[name]) for name in ("headers", "replays")}
        exact = ("offset", "last_offset", "bytes")
        write_rows([Column(name, exact=name in exact) for name in row], [row], layout)


def _shown(content: Content) -> dict[str, Any]:
    letter = content.letter
    return {
        **_listed(letter),
        "last_offset": letter.last_offset,
        "complete": letter.complete,
        "key_base64": _base64(content.key),
        "value_base64": _base64(content.value),
        "value_kept": len(content.value or b""),
        "headers": [{"name": escaped(name), "value_base64": _base64(value)} for name, value in content.headers],
        "replays": [
            {"replayed": moment.isoformat(), "partition": partition, "offset": str(offset)}
            for moment, partition, offset in content.replays
        ],
    }


def _base64(data: bytes | None) -> str | None:
    return None if data is None else base64.b64encode(data).decode()


def _print(content: Content) -> None:
    letter = content.letter
    click.echo(f"{letter.topic}/{letter.partition}/{letter.offset}, received {_iso(letter.appended_at)}")
    if letter.records > 1:
        click.echo(f"stands for {letter.records:,} messages, to offset {letter.last_offset}")
    click.echo(f"reason: {escaped(letter.reason)}")
    click.echo(f"key: {_text(content.key)}")
    for name, value in content.headers:
        click.echo(f"header {escaped(name)}: {_text(value)}")
    kept = len(content.value or b"")
    rest = "" if kept == letter.value_bytes else f", of which the letter has the first {kept:,}"
    click.echo(f"value: {letter.value_bytes:,} bytes{rest}")
    for line in _preview(content.value or b""):
        click.echo(f"  {line}")
    if not letter.complete:
        click.echo("not complete here: a replay fetches the message from the broker")
    for moment, partition, offset in content.replays:
        click.echo(f"sent again {_iso(moment)}: now {letter.topic}/{partition}/{offset}")


def _iso(moment: datetime) -> str:
    return moment.replace(tzinfo=UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _text(data: bytes | None) -> str:
    if data is None:
        return "none"
    shown = escaped(data[:_PREVIEW_BYTES].decode(errors="backslashreplace"))
    return shown if len(data) <= _PREVIEW_BYTES else f"{shown} … ({len(data):,} bytes)"


def _preview(value: bytes) -> Iterable[str]:
    """JSON in lines; other text as it is; else bytes in hexadecimal beside their characters."""
    try:
        text = value.decode()
    except UnicodeDecodeError:
        text = None
    if text is not None and "\x00" not in text:
        try:
            text = msgspec.json.format(value, indent=2).decode()
        except (msgspec.DecodeError, RecursionError):
            pass
        lines = text[:_PREVIEW_BYTES].splitlines()
        yield from (escaped(line) for line in lines)
        if len(text) > _PREVIEW_BYTES:
            yield f"… ({len(text) - _PREVIEW_BYTES:,} more characters)"
        return
    for at in range(0, min(len(value), _HEX_BYTES), 16):
        part = value[at : at + 16]
        letters = "".join(chr(byte) if 0x20 <= byte < 0x7F else "." for byte in part)
        yield f"{at:04x}  {part.hex(' '):<47}  {letters}"
    if len(value) > _HEX_BYTES:
        yield f"… ({len(value) - _HEX_BYTES:,} more bytes)"


# -- replay ---------------------------------------------------------------------------------------------------------


@deadletter.command()
@click.argument("places", nargs=-1, metavar="[TOPIC/PARTITION/OFFSET]…")
@_filters
@click.option(
    "--limit", type=click.IntRange(1), default=1000, show_default=True, help="Letters found by filters, at most."
)
@click.option("--again", is_flag=True, help="Also those that were sent again before.")
@click.option("--quarantined", is_flag=True, help="Also those whose node's clock was ahead: their times are wrong.")
@click.option("--dry-run", is_flag=True, help="Say what would be sent, and send nothing.")
@format_option
@data_option
@pass_session
def replay(
    session: Session,
    places: tuple[str, ...],
    topics: tuple[str, ...],
    since: int,
    reason: str,
    limit: int,
    again: bool,
    quarantined: bool,
    dry_run: bool,
    layout: Format,
    data: Path | None,
) -> None:
    """Send the messages of letters again, to their topic and partition, with their keys and headers.

    For letters whose cause is gone, for instance after an upgrade of the workers. Name places, or choose by filters.
    What a letter holds only a part of is fetched from the broker. A message that still cannot be read becomes a new
    letter. Exit status 1 where one could not be sent.
    """
    if not (places or topics or since or reason):
        raise CommandError("replay: name places, or choose letters with --topic, --since or --reason")
    kafka = _kafka(session, data)
    prefix = session.config.kafka.topic_prefix
    wanted = [parse_place(place, prefix) for place in places]
    with database(session, data) as client:
        letters = [full_letter(client, place).letter for place in wanted]
        if topics or since or reason:
            letters += find(client, _chosen(session, topics, since, reason), limit)
        letters = sorted({letter.place: letter for letter in letters}.values(), key=lambda letter: letter.place)
        passed = {letter.place: _passed_over(letter, again, quarantined) for letter in letters}
        rows = asyncio.run(_replay(client, kafka, prefix, letters, passed, dry_run))
    names = ("topic", "partition", "action", "note")
    exact = [Column("offset", exact=True), Column("to_offset", exact=True)]
    write_rows([*(Column(name) for name in names[:2]), *exact, *(Column(name) for name in names[2:])], rows, layout)
    if any(row["action"] == "failed" for row in rows):
        raise SystemExit(1)


def _kafka(session: Session, data: Path | None) -> Kafka:
    if data is None:
        return session.config.kafka
    running = read_running(data)
    if running is None:
        raise CommandError(f"--data: nothing runs on {data}, so there is no broker to send to; start `gpuledger up`")
    return msgspec.structs.replace(session.config.kafka, bootstrap=running.kafka_bootstrap)


async def _replay(
    client: Client,
    kafka: Kafka,
    prefix: str,
    letters: Sequence[Letter],
    passed_over: Mapping[Place, str | None],
    dry_run: bool,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    sent: list[Replayed] = []
    with _noted(client, sent):
        async with BrokerMessages.connected(kafka) as broker:
            for letter in letters:
                row: dict[str, Any] = dict(zip(("topic", "partition", "offset"), letter.place, strict=True))
                rows.append(row)
                why_not = passed_over[letter.place]
                if why_not is not None:
                    row |= {"action": "skipped", "note": why_not}
                    continue
                try:
                    message = await _original(client, broker, prefix, letter)
                    row |= {"action": "would send", "note": f"{len(message.value or b'')} bytes"}
                    if dry_run:
                        continue
                    partition, offset = await broker.send(letter.topic, letter.partition, message)
                except BrokerAway:
                    raise
                except CommandError as error:
                    row |= {"action": "failed", "note": escaped(str(error))}
                    continue
                row |= {"action": "sent", "to_offset": offset}
                sent.append(Replayed(letter.place, partition, offset))
                if len(sent) >= _NOTED_AT_ONCE:
                    _note(client, sent)
    return rows


@contextmanager
def _noted(client: Client, sent: list[Replayed]) -> Any:
    """What has been sent is written down however it ends."""
    try:
        yield
    finally:
        _note(client, sent)


def _note(client: Client, sent: list[Replayed]) -> None:
    note_replays(client, sent, datetime.now(UTC))
    sent.clear()


def _passed_over(letter: Letter, again: bool, quarantined: bool) -> str | None:
    """Why it is not sent unasked."""
    if letter.replayed_at is not None and not again:
        return f"was sent again {_iso(letter.replayed_at)}; --again sends it once more"
    if letter.reason.startswith("quarantine:") and not quarantined:
        # The broker's time has caught up with it: today it would be taken, with its wrong times.
        return "the clock was ahead, so its times are wrong; --quarantined sends it all the same"
    return None


async def _original(client: Client, broker: BrokerMessages, prefix: str, letter: Letter) -> RawMessage:
    """The whole message: of the letter, or of the broker where the letter has a part. Raises CommandError."""
    at: Place = letter.place
    if not letter.topic.startswith(prefix):
        raise CommandError(f"{letter.topic}: not a topic of this installation (kafka.topic_prefix is {prefix!r})")
    if letter.records > 1:
        raise CommandError(f"stands for {letter.records} messages of a batch that cannot be unpacked; {letter.reason}")
    if not letter.complete:
        return await broker.read(*at)
    content = full_letter(client, at)
    return RawMessage(content.key, content.value, content.headers)

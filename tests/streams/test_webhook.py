"""Alerts reach a real HTTP server: signed, again after failures, bounded, without holding up whoever offers them."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import pytest
from aiohttp import web

from gpuledger.schemas.config import Webhook
from gpuledger.schemas.events import Alert, decode_event
from gpuledger.schemas.settings import Secret
from gpuledger.streams.webhook import SIGNATURE_HEADER, TIMESTAMP_HEADER, WebhookSender

T0 = 1_767_225_600_000


def alert(name: str = "a", status: str = "firing", revision: int = T0) -> Alert:
    return Alert(
        id=name,
        revision=revision,
        claimed_at_ms=T0,
        rule="reserved_unused",
        status="firing" if status == "firing" else "resolved",
        started_at_ms=T0,
    )


@dataclass
class Receiver:
    """Answers with the given statuses in turn, then 200; 0 closes the connection without an answer."""

    answers: list[int]
    url: str = ""
    bodies: list[bytes] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    arrived: asyncio.Event = field(default_factory=asyncio.Event)
    hold: asyncio.Event | None = None

    async def handle(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.read())
        self.headers.append(dict(request.headers))
        self.arrived.set()
        if self.hold is not None:
            await self.hold.wait()
        status = self.answers.pop(0) if self.answers else 200
        if status == 0:
            assert request.transport is not None
            request.transport.close()
        headers = {"Location": "http://127.0.0.1:1/"} if status == 302 else {}
        return web.Response(status=status or 200, headers=headers)

    def alerts(self) -> list[tuple[str, str]]:
        decoded = [decode_event(body) for body in self.bodies]
        return [(each.id, each.status) for each in decoded if isinstance(each, Alert)]


@asynccontextmanager
async def receiver(answers: Sequence[int] = ()) -> AsyncGenerator[Receiver]:
    """A server on a free port of loopback."""
    receiver = Receiver(list(answers))
    application = web.Application()
    application.router.add_post("/hook/token", receiver.handle)
    runner = web.AppRunner(application, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    receiver.url = f"http://127.0.0.1:{runner.addresses[0][1]}/hook/token"
    try:
        yield receiver
    finally:
        await runner.cleanup()


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(30):
            await scenario()

    asyncio.run(bounded())


def test_an_alert_arrives_signed() -> None:
    async def scenario() -> None:
        async with receiver() as there:
            hook = Webhook(url=there.url, secret=Secret("s3cret"))
            async with WebhookSender(hook, now_s=lambda: 1_700_000_000.9) as sender:
                sender.offer(alert())
            assert (sender.sent, there.alerts()) == (1, [("a", "firing")])
            (headers,) = there.headers
            assert headers[TIMESTAMP_HEADER] == "1700000000"
            expected = hmac.new(b"s3cret", b"1700000000." + there.bodies[0], hashlib.sha256).hexdigest()
            assert headers[SIGNATURE_HEADER] == f"sha256={expected}"
            assert headers["Content-Type"] == "application/json"

    run(scenario)


def test_without_a_secret_nothing_is_signed() -> None:
    async def scenario() -> None:
        async with receiver() as there:
            async with WebhookSender(Webhook(url=there.url)) as sender:
                sender.offer(alert())
            assert SIGNATURE_HEADER not in there.headers[0]

    run(scenario)


def test_failures_that_pass_are_tried_again() -> None:
    async def scenario() -> None:
        async with receiver([500, 429, 0]) as there:
            async with WebhookSender(Webhook(url=there.url), first_pause_s=0.01) as sender:
                sender.offer(alert())
            assert len(there.bodies) == 4
            assert (sender.sent, sender.failed) == (1, 0)

    run(scenario)


@pytest.mark.parametrize("status", [400, 404, 302])
def test_a_refusal_is_final_and_the_next_alert_goes_out(status: int) -> None:
    async def scenario() -> None:
        async with receiver([status]) as there:
            async with WebhookSender(Webhook(url=there.url), first_pause_s=0.01) as sender:
                sender.offer(alert("a"))
                sender.offer(alert("b"))
            assert there.alerts() == [("a", "firing"), ("b", "firing")]
            assert (sender.sent, sender.failed) == (1, 1)

    run(scenario)


def test_tries_are_bounded_and_logs_do_not_tell_the_path(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with receiver([503] * 9) as there:
            hook = Webhook(url=there.url, secret=Secret("s3cret"))
            async with WebhookSender(hook, first_pause_s=0.01, max_attempts=3) as sender:
                sender.offer(alert())
            assert (len(there.bodies), sender.sent, sender.failed) == (3, 0, 1)

    with caplog.at_level(logging.DEBUG, "gpuledger"):
        run(scenario)
    assert "answers 503" in caplog.text
    assert "token" not in caplog.text and "s3cret" not in caplog.text


def test_a_receiver_that_hangs_holds_up_nobody_and_the_newest_state_counts() -> None:
    async def scenario() -> None:
        async with receiver() as there:
            there.hold = asyncio.Event()
            async with WebhookSender(Webhook(url=there.url), max_waiting=3) as sender:
                sender.offer(alert("a"))
                await there.arrived.wait()
                # "a" is on its way; it changes meanwhile, and then more come than may wait.
                sender.offer(alert("a", "resolved", T0 + 1))
                for name in "bcd":
                    sender.offer(alert(name))
                assert sender.dropped == 1
                there.hold.set()
            assert there.alerts() == [("a", "firing"), ("b", "firing"), ("c", "firing"), ("d", "firing")]

    run(scenario)


def test_a_newer_state_that_comes_while_the_older_is_sent_follows_it() -> None:
    async def scenario() -> None:
        async with receiver() as there:
            there.hold = asyncio.Event()
            async with WebhookSender(Webhook(url=there.url)) as sender:
                sender.offer(alert())
                await there.arrived.wait()
                sender.offer(alert(status="resolved", revision=T0 + 1))
                there.hold.set()
            assert there.alerts() == [("a", "firing"), ("a", "resolved")]

    run(scenario)


def test_closing_does_not_wait_for_an_absent_receiver(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario() -> None:
        async with receiver() as there:
            url = there.url
        sender = WebhookSender(Webhook(url=url))  # nobody listens there any more
        sender.start()
        sender.offer(alert())
        await sender.close(timeout_s=0.2)
        assert sender.sent == 0

    with caplog.at_level(logging.WARNING, "gpuledger"):
        run(scenario)
    assert "stopped with 1 alerts not sent" in caplog.text

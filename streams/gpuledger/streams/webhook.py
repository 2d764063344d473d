"""Sends alerts to a webhook: signed, tried again with growing pauses, and never in the way of the stream.

What waits is bounded and holds one state per alert, the newest: a receiver that was away learns how things are, not
every step. The topic `alerts` and the table have them all.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import hmac
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from urllib.parse import urlsplit

import aiohttp

from gpuledger.schemas.config import Webhook
from gpuledger.schemas.events import Alert, encode_event

__all__ = ["SIGNATURE_HEADER", "TIMESTAMP_HEADER", "WebhookSender", "signature"]

log = logging.getLogger(__name__)

SIGNATURE_HEADER = "X-GPULedger-Signature"
TIMESTAMP_HEADER = "X-GPULedger-Timestamp"

#: More alerts than this waiting for one receiver: the oldest are given up, with a message.
_MAX_WAITING = 1000
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 60.0
#: About half an hour of an absent receiver.
_MAX_ATTEMPTS = 36
#: Answers by which the receiver asks to be tried again; every other 4xx and a redirect are final.
_TRY_AGAIN = frozenset({408, 425, 429})


def signature(secret: str, timestamp: str, body: bytes) -> str:
    """What the receiver computes as well: HMAC-SHA256 of ``timestamp.body``; the timestamp makes replays visible."""
    signed = timestamp.encode() + b"." + body
    return "sha256=" + hmac.new(secret.encode(), signed, hashlib.sha256).hexdigest()


class WebhookSender:
    """Sends to one receiver. Use as an async context manager, or call `start` and `close`.

    `sent`, `failed` and `dropped` count alerts: delivered, given up, pushed out by newer ones.
    """

    def __init__(
        self,
        webhook: Webhook,
        *,
        first_pause_s: float = _FIRST_PAUSE_S,
        max_attempts: int = _MAX_ATTEMPTS,
        max_waiting: int = _MAX_WAITING,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._webhook = webhook
        # The path of a webhook is often its password: logs name the host only.
        self._host = urlsplit(webhook.url).hostname or "?"
        self._first_pause_s = first_pause_s
        self._max_attempts = max_attempts
        self._max_waiting = max_waiting
        self._now_s = now_s
        self._waiting: OrderedDict[str, Alert] = OrderedDict()
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._task: asyncio.Task[None] | None = None
        self.sent = 0
        self.failed = 0
        self.dropped = 0

    async def __aenter__(self) -> WebhookSender:
        self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    def start(self) -> None:
        if self._task is None:
            self._task = asyncio.create_task(self._run(), name="webhook")

    def offer(self, alert: Alert) -> None:
        """Takes the alert and returns at once. An older state of the same alert that still waits is replaced."""
        self._waiting.pop(alert.id, None)
        self._waiting[alert.id] = alert
        while len(self._waiting) > self._max_waiting:
            name, _ = self._waiting.popitem(last=False)
            self.dropped += 1
            log.error("webhook %s: %s given up, %d newer ones wait", self._host, name, self._max_waiting)
        self._idle.clear()
        self._wake.set()

    async def close(self, timeout_s: float = 5.0) -> None:
        """Waits until everything is sent, at most `timeout_s`, then gives up what is left (logged)."""
        task, self._task = self._task, None
        if task is None:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        if self._waiting:
            log.warning("webhook %s: stopped with %d alerts not sent", self._host, len(self._waiting))

    async def _run(self) -> None:
        timeout = aiohttp.ClientTimeout(total=self._webhook.timeout_s)
        async with aiohttp.ClientSession(timeout=timeout) as session:
            while True:
                await self._wake.wait()
                while self._waiting:
                    await self._deliver(session, next(iter(self._waiting)))
                self._wake.clear()
                self._idle.set()

    async def _deliver(self, session: aiohttp.ClientSession, name: str) -> None:
        """Sends the newest state of one alert until it is taken, refused, or tried too often."""
        pause = self._first_pause_s
        for attempt in range(1, self._max_attempts + 1):
            alert = self._waiting.get(name)
            if alert is None:  # pushed out while it waited
                return
            error, final = await self._post(session, alert)
            if error is None:
                self.sent += 1
                self._settle(alert)
                return
            if final or attempt == self._max_attempts:
                self.failed += 1
                log.error("webhook %s: %s given up: %s", self._host, name, error)
                self._settle(alert)
                return
            log.warning("webhook %s: %s: %s; again in %.1f s", self._host, name, error, pause)
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE_S)

    def _settle(self, alert: Alert) -> None:
        """Forgets this state; a newer one that came meanwhile stays and is sent next."""
        if self._waiting.get(alert.id) is alert:
            del self._waiting[alert.id]

    async def _post(self, session: aiohttp.ClientSession, alert: Alert) -> tuple[str | None, bool]:
        """(what went wrong or None, whether trying again is pointless)."""
        body = encode_event(alert)
        headers = {"Content-Type": "application/json", TIMESTAMP_HEADER: str(int(self._now_s()))}
        if self._webhook.secret is not None:
            headers[SIGNATURE_HEADER] = signature(self._webhook.secret.reveal(), headers[TIMESTAMP_HEADER], body)
        try:
            # A redirect would carry the alert to an address that nobody configured.
            async with session.post(self._webhook.url, data=body, headers=headers, allow_redirects=False) as answer:
                if 200 <= answer.status < 300:
                    return None, False
                return f"answers {answer.status}", answer.status < 500 and answer.status not in _TRY_AGAIN
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            if isinstance(error, aiohttp.InvalidURL):
                return "the URL is not valid", True
            return f"{type(error).__name__}: {error}", False

"""HTTP sessions: what `USE` and `SET` did in a session holds for its later requests.

A session is a record replayed on the fresh handle of each request; only one that makes a temporary table keeps a
handle of its own, as such a table lives in its handle.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from gpuledger.local.clickhouse.engine import Handle
from gpuledger.local.clickhouse.errors import EngineError

__all__ = ["DEFAULT_TIMEOUT_S", "MAX_TIMEOUT_S", "Lease", "Session", "Sessions"]

DEFAULT_TIMEOUT_S = 60.0
MAX_TIMEOUT_S = 3600.0
# Beyond this a client that never repeats itself would fill the memory of a session.
_MAX_STATEMENTS = 256


@dataclass(slots=True)
class Session:
    """The state of one session of one user."""

    database: str
    statements: tuple[str, ...] = ()
    handle: Handle | None = None
    busy: bool = False
    expires_s: float = 0.0
    timeout_s: float = field(default=DEFAULT_TIMEOUT_S)

    def remember(self, statement: str) -> None:
        """Keeps a SET statement; a repeated one moves to the end. Raises EngineError 396 for too many."""
        kept = (*(known for known in self.statements if known != statement), statement)
        if len(kept) > _MAX_STATEMENTS:
            raise EngineError.of(
                "TOO_MANY_ROWS_OR_BYTES", f"A session keeps at most {_MAX_STATEMENTS} different SET statements"
            )
        self.statements = kept


class Lease:
    """One request's hold on a session."""

    def __init__(self, session: Session, clock: Callable[[], float]) -> None:
        self.session = session
        self._clock = clock
        self._held = True

    def release(self) -> None:
        """Lets the next request in; again, it does nothing, as the session may be that of the next by then."""
        if self._held:
            self._held = False
            self.session.busy = False
            self.session.expires_s = self._clock() + self.session.timeout_s


class Sessions:
    """All open sessions; `clock` gives monotonic seconds."""

    def __init__(self, max_sessions: int = 10_000, clock: Callable[[], float] = time.monotonic) -> None:
        self._open: dict[tuple[str, str], Session] = {}
        self._max = max_sessions
        self._clock = clock

    def acquire(self, user: str, session_id: str, *, database: str, timeout_s: float, must_exist: bool) -> Lease:
        """Locks the session for one request; release the lease.

        Raises EngineError 372 where it must exist and does not, 373 where another request holds it, 202 (503) where
        too many are open.
        """
        self.expire()
        session = self._open.get((user, session_id))
        if session is None:
            if must_exist:
                raise EngineError.of("SESSION_NOT_FOUND", f"Session {session_id!r} not found")
            if len(self._open) >= self._max:
                raise EngineError.of("TOO_MANY_SIMULTANEOUS_QUERIES", "Too many open sessions", 503)
            session = self._open[user, session_id] = Session(database)
        if session.busy:
            raise EngineError.of("SESSION_IS_LOCKED", f"Session {session_id!r} is locked by a concurrent client")
        session.busy = True
        session.timeout_s = timeout_s
        return Lease(session, self._clock)

    def expire(self) -> None:
        """Forgets idle sessions whose time is over."""
        now = self._clock()
        for key in [key for key, session in self._open.items() if not session.busy and session.expires_s <= now]:
            session = self._open.pop(key)
            if session.handle is not None:
                session.handle.close()

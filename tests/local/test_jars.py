"""What is fetched is exactly what the lock names, and is fetched once."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gpuledger.local import jars
from gpuledger.local.exceptions import AssetError, AssetMismatch


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any download goes to a port that nobody listens on."""
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setattr(jars.time, "sleep", lambda seconds: None)


@pytest.fixture
def echarts_cache(tmp_path: Path) -> Path:
    """A cache of this test alone that holds the real WebJar."""
    (jar,) = jars.resolve(jars.ECHARTS)
    copy = tmp_path / "jars" / jars.read_lock()[jars.ECHARTS][0].relative_path
    copy.parent.mkdir(parents=True)
    shutil.copy(jar, copy)
    return tmp_path


def test_the_lock_names_kafka_its_log_binding_and_the_charts() -> None:
    lock = jars.read_lock()
    kafka = {":".join(jar.parts[:2]): jar.parts[2] for jar in lock[jars.KAFKA]}
    assert len(lock[jars.KAFKA]) == 46
    assert kafka["org.apache.kafka:kafka_2.13"] == kafka["org.apache.kafka:kafka-clients"] == "4.3.1"
    assert kafka["org.apache.logging.log4j:log4j-slf4j-impl"] == kafka["org.apache.logging.log4j:log4j-core"]
    # log4j-slf4j-impl binds SLF4J 1.7; 2.x would need log4j-slf4j2-impl.
    assert kafka["org.slf4j:slf4j-api"].startswith("1.7.")
    assert [jar.coordinate for jar in lock[jars.ECHARTS]] == ["org.webjars:echarts:5.5.0"]
    assert "://" not in jars.LOCK_FILE.read_text()


def test_every_kafka_jar_has_its_locked_sum() -> None:
    paths = jars.kafka_jars()
    sums = [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]
    assert sums == [jar.sha256 for jar in jars.read_lock()[jars.KAFKA]]


@pytest.mark.usefixtures("unreachable")
def test_a_filled_cache_needs_no_network(echarts_cache: Path) -> None:
    script = jars.echarts_file(cache=echarts_cache)
    assert script.name == "echarts.esm.min.js"
    assert b"Apache Software Foundation" in script.read_bytes()[:200]
    assert "Apache License" in (script.parent / "LICENSE").read_text()
    assert "Apache ECharts" in (script.parent / "NOTICE").read_text()


@pytest.mark.usefixtures("unreachable")
def test_without_network_and_cache_the_error_names_the_jar(tmp_path: Path) -> None:
    with pytest.raises(AssetError, match=r"org\.webjars:echarts:5\.5\.0: could not be downloaded"):
        jars.resolve(jars.ECHARTS, cache=tmp_path)
    assert not list(tmp_path.rglob("*.jar"))


@pytest.mark.usefixtures("unreachable")
def test_a_tampered_jar_is_refused(echarts_cache: Path) -> None:
    (jar,) = echarts_cache.rglob("*.jar")
    with jar.open("ab") as file:
        file.write(b"x")
    with pytest.raises(AssetMismatch, match=r"org\.webjars:echarts:5\.5\.0: .* has SHA-256 .* the lock names"):
        jars.echarts_file(cache=echarts_cache)


def test_a_tampered_script_is_taken_from_the_jar_again(echarts_cache: Path) -> None:
    script = jars.echarts_file(cache=echarts_cache)
    good = script.read_bytes()
    script.write_bytes(b"alert(1)")
    assert jars.echarts_file(cache=echarts_cache).read_bytes() == good


def test_a_download_with_another_sum_is_refused_and_not_kept(tmp_path: Path) -> None:
    lock = tmp_path / "other.lock.toml"
    lock.write_text(f'[[echarts]]\ncoordinate = "org.webjars:echarts:5.5.0"\nsha256 = "{"0" * 64}"\n')
    with pytest.raises(AssetMismatch, match="the download was refused"):
        jars.resolve(jars.ECHARTS, cache=tmp_path, lock=lock)
    assert not list(tmp_path.rglob("*.jar"))


def test_two_processes_fill_one_cache(tmp_path: Path) -> None:
    code = (
        "import json; from gpuledger.local import jars; seen = []\n"
        "path = jars.echarts_file(progress=lambda ready, total, name: seen.append((ready, total, name)))\n"
        "print(json.dumps([str(path), seen]))"
    )
    environment = {**os.environ, "GPULEDGER_CACHE_DIR": str(tmp_path)}
    # A third one was killed while it fetched.
    (tmp_path / "jars" / ".fetch-torn" / "1").mkdir(parents=True)
    rivals = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    answers = [json.loads(rival.communicate()[0]) for rival in rivals]
    assert answers[0][0] == answers[1][0]
    # The one that came second found it done.
    assert sorted(len(seen) for _, seen in answers) == [0, 1]
    assert sorted(path.name for path in (tmp_path / "jars").iterdir()) == [".lock", "org"]


@pytest.mark.parametrize(
    ("own", "shared", "expected"),
    [
        ("/a/cache", "/xdg", "/a/cache"),
        ("", "/xdg", "/xdg/gpuledger"),
        ("", "", "/home/someone/.cache/gpuledger"),
    ],
)
def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, own: str, shared: str, expected: str) -> None:
    monkeypatch.setenv("GPULEDGER_CACHE_DIR", own)
    monkeypatch.setenv("XDG_CACHE_HOME", shared)
    monkeypatch.setenv("HOME", "/home/someone")
    assert jars.cache_directory() == Path(expected)


@pytest.mark.parametrize("text", ["[[kafka]]\ncoordinate = 'a:b:1'\n", "not toml", "kafka = 3\n"])
def test_a_broken_lock_is_named(tmp_path: Path, text: str) -> None:
    lock = tmp_path / "jars.lock.toml"
    lock.write_text(text)
    with pytest.raises(AssetError, match=r"jars\.lock\.toml: not a readable lock"):
        jars.resolve(jars.KAFKA, cache=tmp_path, lock=lock)

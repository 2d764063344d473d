"""What the documents promise exists: every command line they quote is one, every link leads somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from gpuledger.cli.cost_rows import KEYS, total_rows
from gpuledger.schemas.config import Config
from gpuledger.schemas.settings import describe
from gpuledger.schemas.topics import TOPICS
from tests.deploy.conftest import check_command_line

ROOT = Path(__file__).parents[2]
DOCUMENTS = sorted({*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *(ROOT / "docs").rglob("*.md")})
IDS = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


def shell_lines(text: str) -> list[str]:
    """The lines of all sh blocks, without comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line.split(" #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith("#")]


def commands(text: str) -> set[str]:
    """Every `gpuledger …` in a sh block, and in code between backticks that has an option or argument."""
    quoted = re.findall(r"`((?:[\w/.]*/)?gpuledger [a-z-][^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))
    return {line for line in [*shell_lines(text), *quoted] if re.match(r"(?:\S*/)?gpuledger ", line)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_quoted_command_is_one(path: Path) -> None:
    for line in sorted(commands(path.read_text(encoding="utf-8"))):
        # An ellipsis and an ampersand are for the reader.
        words = [word for word in shlex.split(line)[1:] if word not in ("&", "…")]
        if any(word.isupper() and word.startswith("--") for word in words):
            continue
        known = ["2026-01-01" if word == "…" else word for word in words]
        check_command_line(known)


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if target == "docs/images/page.png":  # a picture of a running page, made with a release
            continue
        if not re.match(r"[a-z]+:", target):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=IDS)
def test_every_script_and_benchmark_named_is_there(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    for name in set(re.findall(r"\b(?:benchmarks|scripts|deploy/systemd|docs/examples)/[\w.-]+", text)):
        assert (ROOT / name.rstrip(".")).exists(), f"{path.name}: {name}"


def test_settings_that_the_guides_name_are_settings() -> None:
    known = {setting.path for setting in describe(Config)}
    sections = {path.split(".")[0] for path in known}
    for path in DOCUMENTS:
        for name in set(re.findall(r"`((?:\w+\.)+\w+)`", path.read_text(encoding="utf-8"))):
            if name.split(".")[0] in sections and not name.endswith((".py", ".sql", ".md", ".yaml", ".txt")):
                assert name in known or any(one.startswith(f"{name}.") for one in known), f"{path.name}: {name}"


def test_the_operator_guide_has_every_topic() -> None:
    text = (ROOT / "docs" / "operator-guide.md").read_text(encoding="utf-8")
    for topic in TOPICS.values():
        row = re.search(rf"^\| `{topic.name}` \|(.*)$", text, re.MULTILINE)
        assert row is not None, topic.name
        assert ("yes" in row[1]) is topic.gates, topic.name
        assert ("for ever" in row[1] or "compacted" in row[1]) is (topic.retention_ms is None), topic.name


def test_the_user_guide_has_every_key_of_cost() -> None:
    text = (ROOT / "docs" / "user-guide.md").read_text(encoding="utf-8")
    keys = {name for names in KEYS.values() for name in names} | total_rows([], "tenant")[0].keys()
    assert {"held_gpu_us", "asset_cost"} < keys
    for key in keys:
        assert f"`{key}`" in text, key


def test_the_operator_guide_has_every_metric_and_no_other() -> None:
    def source(path: str) -> str:
        return (ROOT / path).read_text(encoding="utf-8")

    worker = re.findall(r'add\(f?"([\w{}]+)", "(?:counter|gauge)"', source("streams/gpuledger/streams/worker.py"))
    agent = re.findall(r'\("(\w+)", "(?:counter|gauge)"', source("agents/gpuledger/agents/agent.py"))
    page = re.findall(r'"gpuledger_page_(\w+)"', source("dashboards/gpuledger/dashboards/page/metrics.py"))
    real = {f"gpuledger_worker_{name.replace('{topic}', 'TOPIC')}" for name in worker}
    real |= {f"gpuledger_agent_{name}" for name in agent} | {f"gpuledger_page_{name}" for name in page}

    told: set[str] = set()
    table = re.search(r"^\| metric \|.*?\n\n", source("docs/operator-guide.md"), re.MULTILINE | re.DOTALL)
    assert table is not None
    for line in table[0].splitlines():
        # "`gpuledger_agent_devices`, `…_devices_down`": the ellipsis stands for what the line's first name begins with.
        names = re.findall(r"`(gpuledger_\w+|…_\w+)`", line)
        prefixes = {f"{prefix}_" for prefix in re.findall(r"gpuledger_(?:worker_TOPIC|worker|agent|page)", line)}
        told |= {name if "…" not in name else prefixes.copy().pop() + name[2:] for name in names}
    assert told == real

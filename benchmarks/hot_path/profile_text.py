"""Where the time of a profiled process went: py-spy's collapsed stacks as a short text."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

__all__ = ["shown"]


#: On every stack of a thread, so they tell nothing.
_FILES = ("threading.py", "asyncio/base_events.py", "asyncio/events.py", "mode/threads.py")


def _threads(lines: list[str]) -> dict[str, list[tuple[list[str], int]]]:
    found: dict[str, list[tuple[list[str], int]]] = {}
    for line in lines:
        stack, _, count = line.rpartition(" ")
        thread, *frames = stack.split(";")
        found.setdefault(thread.rpartition("): ")[2], []).append((frames, int(count)))
    return found


def _name(frame: str) -> str:
    """function (file), without the line."""
    function, _, place = frame.rpartition(" (")
    path, _, _ = place.rstrip(")").partition(":")
    return f"{function} ({'/'.join(path.split('/')[-2:])})"


def shown(profile: Path, least_share: float) -> str:
    """Per thread its share of all samples, and functions by the share in which they were on the stack or its top.

    A function counts once per stack. Imports are left out, and py-spy leaves out threads that sleep: shares are of the
    time spent working.
    """
    lines = profile.read_text(encoding="utf-8").splitlines()
    threads = _threads([line for line in lines if "importlib._bootstrap" not in line])
    everything = sum(count for stacks in threads.values() for _, count in stacks) or 1
    out: list[str] = []
    for thread, stacks in sorted(threads.items(), key=lambda item: -sum(count for _, count in item[1])):
        within, top = Counter[str](), Counter[str]()
        for frames, count in stacks:
            names = [_name(frame) for frame in frames if not any(file in frame for file in _FILES)]
            for name in set(names):
                within[name] += count
            if names:
                top[names[-1]] += count
        mine = sum(count for _, count in stacks)
        if mine / everything < least_share:
            continue
        out.append(f"{thread}: {mine / everything:.1%}")
        for name, count in within.most_common():
            if count / everything < least_share:
                break
            out.append(f"  {count / everything:6.1%} in it, {top[name] / everything:6.1%} itself  {name}")
    return "\n".join(out)

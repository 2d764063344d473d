"""`scripts/mutants`: how many mutants of the modules that every number goes through do the tests notice?"""

from __future__ import annotations

import argparse
import random
import sys
import time
import tomllib
from collections import Counter
from pathlib import Path

from tests.mutation.run import TARGETS, BaselineError, Candidate, Outcome, candidates, run

EQUIVALENTS = Path(__file__).with_name("equivalents.toml")


def equivalents(found: list[Candidate]) -> tuple[dict[Candidate, str], list[str]]:
    """(mutants that nothing can notice, each with its reason; entries of the file that name no mutant)."""
    entries = tomllib.loads(EQUIVALENTS.read_text(encoding="utf-8"))
    names: dict[tuple[str, str, str], list[Candidate]] = {}
    for one in found:
        names.setdefault((one.target.name, one.was, one.becomes), []).append(one)
    known: dict[Candidate, str] = {}
    stale: list[str] = []
    for module, listed in entries.items():
        for entry in listed:
            named = names.get((module, entry["was"], entry["becomes"]), [])
            known.update((one, str(entry["reason"])) for one in named)
            if not named and any(one.target.name == module for one in found):
                stale.append(f"{module}: {entry['becomes']}")
    return known, stale


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="scripts/mutants", description=__doc__)
    names = [target.name for target in TARGETS]
    parser.add_argument("--module", action="append", choices=names, help="only this one; may be repeated")
    parser.add_argument("--sample", type=int, metavar="N", help="N mutants instead of all, without the equivalent ones")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="which sample (default: 0)")
    parser.add_argument("--line", type=int, action="append", metavar="L", help="only mutants of this line")
    parser.add_argument("--processes", type=int, default=2, metavar="P", help="at a time (default: 2)")
    parser.add_argument("--least", type=float, default=90.0, metavar="PERCENT", help="fail under this (default: 90)")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--kills", action="store_true", help="print, for each mutant killed, the test that noticed it")
    return parser.parse_args()


def _show(outcome: Outcome, reason: str, kills: bool) -> None:
    one = outcome.candidate
    if outcome.killed_by and kills:
        print(f"killed    {one.target.path}:{one.mutant.line}: {one.becomes}\n          by {outcome.killed_by}")
    elif not outcome.killed_by:
        word = "equivalent" if reason else "survived"
        print(f"{word} {one.target.path}:{one.mutant.line} ({one.mutant.kind})\n  - {one.was}\n  + {one.becomes}")
        if reason:
            print(f"  because {reason}")
    sys.stdout.flush()


def main() -> int:
    arguments = _arguments()
    targets = [target for target in TARGETS if not arguments.module or target.name in arguments.module]
    found = candidates(targets)
    known, stale = equivalents(found)
    if arguments.line:
        found = [one for one in found if one.mutant.line in arguments.line]
    if arguments.sample is not None:
        found = [one for one in found if one not in known]
        found = random.Random(arguments.seed).sample(found, min(arguments.sample, len(found)))
        found.sort(key=lambda one: (TARGETS.index(one.target), one.mutant.start))
    if arguments.list:
        for one in found:
            print(f"{one.target.path}:{one.mutant.line} ({one.mutant.kind})\n  - {one.was}\n  + {one.becomes}")
        print(f"{len(found)} mutants")
        return 0
    began = time.monotonic()
    killed: Counter[str] = Counter()
    equivalent: Counter[str] = Counter()
    wrongly_listed: list[str] = []

    def tell(outcome: Outcome) -> None:
        reason = known.get(outcome.candidate, "")
        _show(outcome, reason, arguments.kills)
        name = outcome.candidate.target.name
        killed[name] += bool(outcome.killed_by)
        equivalent[name] += bool(reason and not outcome.killed_by)
        if reason and outcome.killed_by:
            wrongly_listed.append(f"{name}: {outcome.candidate.becomes} (by {outcome.killed_by})")

    try:
        run(found, arguments.processes, tell)
    except BaselineError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    total = Counter(one.target.name for one in found)
    print("\nmodule       mutants  killed  equivalent  survived   killed, %")
    for name in [*total, "all"]:
        count, dead, same = (sum(c.values()) if name == "all" else c[name] for c in (total, killed, equivalent))
        print(f"{name:<11} {count:8} {dead:7} {same:11} {count - dead - same:9} {100 * dead / max(count, 1):11.1f}")
    print(f"{time.monotonic() - began:.0f} s, {arguments.processes} at a time")
    for line in stale:
        print(f"note: equivalents.toml names a mutant that is no more: {line}")
    for line in wrongly_listed:
        print(f"error: equivalents.toml calls equivalent what a test notices: {line}", file=sys.stderr)
    scores = {name: 100 * killed[name] / total[name] for name in total}
    low = min(scores.values(), default=100.0) if arguments.sample is None else 100 * sum(killed.values()) / len(found)
    if low < arguments.least:
        print(f"error: {low:.1f} % killed, expected at least {arguments.least:g} %", file=sys.stderr)
    return 1 if low < arguments.least or wrongly_listed else 0


if __name__ == "__main__":
    sys.exit(main())

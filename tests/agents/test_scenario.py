"""A scenario that cannot be simulated is refused with the path, the value and the fix."""

from __future__ import annotations

from pathlib import Path

import pytest

from gpuledger.agents.exceptions import ScenarioError
from gpuledger.agents.simulator.scenario import demo_scenario_path, load_scenario, parse_scenario

GOOD = """
name: small
sites: [{name: oslo, country: "NO", pue: 1.1}]
pools: [{name: h100, site: oslo, model: H100, nodes: 2, gpus_per_node: 4}]
tenants:
  - id: a
    accounts: [a-one]
    demand: [{pool: h100, share_pct: 50}]
    jobs: {sizes: [{gpus: 1}], duties: [{name: train}]}
  - id: b
    accounts: [b-one]
    demand: [{pool: h100, gpus: 2}]
    jobs: {sizes: [{gpus: 1/4}], duties: [{name: train}]}
commitments: [{pool: h100, tenant: a, gpus: 6}]
transfers: [{pool: h100, gpus: 2, from_tenant: a, to_tenant: b, at_s: 10}]
"""


def test_the_demo_is_a_thousand_gpus_in_norway_of_which_half_changes_hands() -> None:
    demo = load_scenario(demo_scenario_path())
    assert demo.gpus == 1000
    assert [site.country for site in demo.sites] == ["NO"]
    assert [(move.gpus, move.at_s) for move in demo.transfers] == [(500, 100)]


def test_a_good_one_is_read() -> None:
    assert parse_scenario(GOOD, "f.yaml").pool("h100").gpus == 8


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        ("nodes: 2", "nodes: 0", r"pools\[0\].nodes: .*>= 1"),
        ("nodes: 2", "nodes: two", r"pools\[0\].nodes: .*`int`, got `str`"),
        ("nodes: 2", "nodes: 2, rack: 7", r"pools\[0\]: .*unknown field `rack`"),
        (
            "site: oslo, model",
            "site: bergen, model",
            r"pools\[0\].site: there is no site 'bergen'; expected one of oslo",
        ),
        ("pue: 1.1", "pue: 0.9", r"sites\[0\].pue: expected 1 or more, got 0.9"),
        ("share_pct: 50", "share_pct: 50, gpus: 3", r"tenants\[0\].demand\[0\]: expected either share_pct or gpus"),
        ("gpus: 1/4", "gpus: 3/4", r"tenants\[1\].jobs.sizes\[0\].gpus: .*got '3/4'"),
        ("tenant: a, gpus: 6", "tenant: c, gpus: 6", r"commitments\[0\].tenant: there is no tenant 'c'"),
        ("gpus: 2, from_tenant", "gpus: 7, from_tenant", r"transfers\[0\].gpus: a has 6 GPUs of h100 at 10 s, got 7"),
        ("to_tenant: b", "to_tenant: a", r"transfers\[0\].to_tenant: is from_tenant"),
        ("name: small", "name: small\nname: twice", r"f.yaml:3:1: the key 'name' is written twice"),
        ("name: small", "name: small\nflush_ms: 1500", r"flush_ms: expected a multiple of period_ms 1000, got 1500"),
        (
            "name: small",
            "name: small\nfailures: [{kind: gpu_lost, pool: h100, node: 3, at_s: 1, for_s: 1}]",
            r"failures\[0\].node: pool h100 has 2 nodes, got 3",
        ),
        (
            "name: small",
            "name: small\nrate_cards: [{pool: h100, currency: EUR, per_gpu_hour: '1,5'}]",
            r"rate_cards\[0\].per_gpu_hour",
        ),
    ],
)
def test_what_is_wrong_is_named_with_its_path(old: str, new: str, text: str) -> None:
    assert GOOD.count(old) >= 1
    with pytest.raises(ScenarioError, match=text) as caught:
        parse_scenario(GOOD.replace(old, new, 1), "f.yaml")
    assert str(caught.value).startswith("f.yaml")


def test_all_wrong_references_are_told_at_once() -> None:
    with pytest.raises(ScenarioError) as caught:
        parse_scenario(GOOD.replace("pool: h100", "pool: h200"), "f.yaml")
    assert len(str(caught.value).splitlines()) >= 4


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"none\.yaml: cannot be read"):
        load_scenario(tmp_path / "none.yaml")

"""The load of the soak: a fleet with everything that a worker could keep too much of.

Jobs come and go all the time, batches come late and twice, and one node, which jobs hold as well, never says a word.
"""

from __future__ import annotations

import json

__all__ = ["GPUS_PER_NODE", "SILENT_NODE", "site_yaml"]

GPUS_PER_NODE = 8
#: Its agent is away from before the first sample until long after the end.
SILENT_NODE = 3
_FOR_EVER_S = 31_000_000


def site_yaml(gpus: int, flush_ms: int) -> str:
    """A scenario of `gpus` GPUs (whole nodes), each sampled once a second: two pools, three tenants, money."""
    nodes = gpus // GPUS_PER_NODE
    if nodes < 2 * SILENT_NODE or nodes * GPUS_PER_NODE != gpus:
        least = 2 * SILENT_NODE * GPUS_PER_NODE
        raise ValueError(f"gpus: expected a multiple of {GPUS_PER_NODE}, at least {least}, got {gpus}")
    pools = {"left": nodes // 2, "right": nodes - nodes // 2}
    tenants = ["anna", "berit", "carl"]
    third = nodes // 2 * GPUS_PER_NODE // 3
    demand = [{"pool": pool, "gpus": third * 9 // 10, "swing_pct": 15, "swing_period_s": 240} for pool in pools]
    jobs = {
        "sizes": [{"gpus": 8, "weight": 2}, {"gpus": 2, "weight": 3}, {"gpus": "1/2", "weight": 1}],
        "shortest_s": 60,
        "longest_s": 600,
        "duties": [
            {"name": "training", "weight": 3, "active_s": 40, "idle_s": 5},
            {"name": "notebook", "weight": 1, "active_s": 5, "idle_s": 20, "level_pct": 30},
        ],
    }
    money = {"currency": "EUR", "period_cost": third * 2100, "period_days": 30, "tariff": "spot"}
    scenario = {
        "name": "soak",
        "seed": 11,
        "period_ms": 1000,
        "flush_ms": flush_ms,
        "sites": [{"name": "narvik", "country": "NO"}],
        "pools": [{"name": pool, "site": "narvik", "model": "H100", "nodes": n} for pool, n in pools.items()],
        "tenants": [{"id": name, "accounts": [name], "demand": demand, "jobs": jobs} for name in tenants],
        "commitments": [{"pool": pool, "tenant": name, "gpus": third} for pool in pools for name in tenants],
        "failures": [{"kind": "agent_gap", "pool": "left", "node": SILENT_NODE, "at_s": 0, "for_s": _FOR_EVER_S}],
        "delivery": {"late_permille": 20, "late_by_s": 90, "duplicate_permille": 20},
        "tariffs": [{"name": "spot", "currency": "EUR", "per_kwh": 0.05}],
        "asset_costs": [{"pool": pool, "node_energy_factor": 1.3, **money} for pool in pools],
        "rate_cards": [{"pool": pool, "currency": "EUR", "per_gpu_hour": 2} for pool in pools],
    }
    return json.dumps(scenario)  # JSON is YAML

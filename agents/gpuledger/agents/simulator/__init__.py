"""A simulated fleet that publishes through the same code as real agents: a scenario, a seed, the same bytes.

Start reading at `world` (what happens in a tick); `scenario` is what one writes, `runner` what one runs.
"""

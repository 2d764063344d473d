"""What an agent can look at. A collector is one file and one line in `open_gpu_collectors` of `gpuledger.agents.agent`.

`interface` says what a collector gives; `nvml` reads NVIDIA GPUs, `host` the node, `processes` who uses the GPUs.
"""

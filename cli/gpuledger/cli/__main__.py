"""`python -m gpuledger.cli` is the command `gpuledger`."""

from gpuledger.cli.main import main

main()

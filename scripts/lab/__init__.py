"""The fabric lab: a rail-optimized fabric with real TCP packets, in network namespaces of one Linux machine.

`plan` describes the lab (pure data), `kernel` makes and removes it, `faults` injects and heals faults, `execute` runs
commands in it, and `relay` delays packets. `scripts/fabric_lab.py` is the command.
"""

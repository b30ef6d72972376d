"""The fabric lab: a rail-optimised fabric with real TCP packets, in network namespaces of one Linux machine.

`plan` says what there is (pure data), `kernel` makes and removes it, `faults` breaks and heals it, `execute` runs
commands in it, and `relay` holds packets back where a delay is asked for. `scripts/fabric_lab.py` is the command.
"""

"""``python -m ncclbench``: the same program as the ``ncclbench`` command."""

from ncclbench.cli import main

if __name__ == "__main__":
    main()

"""The checks, one file per check: a docstring and ``check(subject)``, which yields results; see docs/acceptance.md."""

"""One file a check. Its module has a docstring and ``check(subject)``, which yields results; see docs/acceptance.md."""

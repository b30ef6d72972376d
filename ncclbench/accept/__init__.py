"""Judging what was measured: profiles, checks, verdicts, and the bundle. Reads the store, never a transport."""

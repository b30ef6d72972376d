"""Judge a run: profiles, checks, verdicts and the bundle. This package reads the store and never a transport."""

"""Code that several importers share, and the writing of an imported run."""

"""The run directory: manifest, records, samples and events, written so that nothing finished is ever lost."""

"""Launcher detection, ranks that are started here or by a launcher, and the watchdog that lets none of them hang."""

"""Plug-in look-up and what is shared by all readers of configuration."""

"""Plug-in look-up, and what all readers of configuration files share."""

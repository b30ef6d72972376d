"""Plans and modes: TOML files or command-line options become cases."""

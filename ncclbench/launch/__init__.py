"""Who started us, ranks started here, and the watchdog that lets none of them hang."""

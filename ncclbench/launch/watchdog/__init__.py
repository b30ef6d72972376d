"""The watchdog: heartbeats between ranks, and the attribution of a fault to ranks."""

"""Expert parallelism: who sends which rows, in which phases, and what every buffer must hold."""

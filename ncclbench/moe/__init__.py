"""Expert-parallel layers: routing, rows, schedules, and what every rank must hold afterwards."""

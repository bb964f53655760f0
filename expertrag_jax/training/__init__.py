"""Training: state, step, optimizers, phases, checkpoints, telemetry, and the loop that joins them."""

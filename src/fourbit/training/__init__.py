"""The training loop and what it writes: metrics, checkpoints, the run folder."""

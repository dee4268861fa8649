"""What makes a run durable: checkpoints, signals, bad steps, lost processes."""

"""What the loop in train.py is told with: config, checkpoints, schedules, trackers, probes."""

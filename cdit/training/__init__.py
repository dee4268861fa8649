"""What train.py is built from: config, set-up, schedules, tracking, validation, probes."""

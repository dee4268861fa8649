"""What training, sampling and planning cost here, and against what else: `python -m cdit.benchmark`."""

"""Speed of training, sampling and planning, relative to peers: `python -m cdit.benchmark`."""

"""One thread for every process of the tests: on tensors this small, more threads only wait for each other."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

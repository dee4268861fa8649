"""Planning with a world model: candidates, costs, optimisers; benchmarks in open and closed loop."""

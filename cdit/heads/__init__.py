"""Recording attention maps, per-head measures and their figures."""

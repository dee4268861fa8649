"""Trajectories on disk (the GNM / NWM layout), windows over them, safe readers."""

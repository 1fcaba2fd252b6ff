"""Grids of runs, and tables with intervals: ``python -m utils.sweep SWEEP.yaml``."""

"""The life of one run: its folder and log, checkpoints, resuming, provenance and summary."""

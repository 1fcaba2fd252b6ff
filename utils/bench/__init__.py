"""Speed on this machine: ``python -m utils.bench``."""

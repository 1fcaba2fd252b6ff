"""One HTML page for one run or many: ``python -m utils.compare RUN ...``."""

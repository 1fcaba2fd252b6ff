"""Looking at a run: figures, and the classifier compared with others on the same features."""

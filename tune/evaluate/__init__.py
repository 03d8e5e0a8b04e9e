"""`unshot eval`: a run's answers, scored on held-out rows."""

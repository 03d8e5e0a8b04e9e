"""`unshot deploy retrain`: from corrections in the log to a proposal; it promotes nothing."""

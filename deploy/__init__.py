"""`unshot deploy`: A/B, drift, retraining and rollback."""

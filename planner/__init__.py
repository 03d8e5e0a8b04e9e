"""`unshot plan`: what the long prompt costs, and from which request rate on tuning pays back."""

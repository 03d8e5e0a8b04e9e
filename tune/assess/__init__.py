"""What a run must show beside its score: what the model forgot, whether it knows the task or its format."""

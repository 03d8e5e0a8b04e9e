"""`unshot tune`: fine-tuning with honest held-out evaluation."""

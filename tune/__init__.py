"""`unshot tune`: LoRA fine-tuning with honest held-out evaluation."""

"""What users bring: rows, prompts, personal data."""

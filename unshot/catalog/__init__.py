"""Figures the tool ships: models, GPUs, API rules, tokenizers; each with its source and date."""

"""unshot: move a long few-shot prompt into the weights of a small model, and prove whether that paid."""

__version__ = "0.1.0"

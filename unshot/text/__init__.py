"""From messages to token ids: chat templates, tokenizers, GGUF vocabulary."""

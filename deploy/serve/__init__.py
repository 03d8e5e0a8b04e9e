"""The gateway: one OpenAI-compatible address in front of the old prompt and the tuned model."""

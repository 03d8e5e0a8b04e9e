"""`unshot export`: merge the adapter and write deployment files that are proven equal to the tuned model."""

"""`unshot bench`: compare two systems on the same task in speed, cost and quality, and check the claim."""

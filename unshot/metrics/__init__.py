"""Scores of answers, and the intervals and tests that go with them."""

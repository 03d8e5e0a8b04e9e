"""`unshot deploy ab`: two arms compared by a test that may be looked at after every request."""

"""What reports are made of: the page, charts, short figures."""

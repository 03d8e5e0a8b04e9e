"""`unshot data`: what is wrong with a data set, and how to split it without fooling oneself."""

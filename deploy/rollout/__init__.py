"""`unshot deploy rollout`: a version on its way to all users, step by step, and back by itself where it is worse."""

"""`unshot demo`: the whole way on the embedded model, with a task written for this project."""

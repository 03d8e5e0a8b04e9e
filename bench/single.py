"""One server under one load, or under a rising one: `unshot bench load` and `unshot bench sweep`."""

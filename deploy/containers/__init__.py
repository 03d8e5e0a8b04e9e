"""Files to run the gateway and a model server in containers."""

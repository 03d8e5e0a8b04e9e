"""`unshot plan`: what the long prompt costs, and from which request rate on tuning pays back.

Records here are msgspec structs: `plan` is a short process, and to define a dataclass costs forty times as much.
"""

"""The operations, one folder each: `api.py` checks and chooses, `schema.py` registers, `autograd.py` differentiates."""

"""The definition of right: every operation in plain PyTorch, on any device, in fp32 or fp64 arithmetic."""

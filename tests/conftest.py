"""One thread: the tests' tensors are small, and threads of a loaded machine wait for each other longer than they
work."""

import torch

torch.set_num_threads(1)

"""One thread for every test of the model: the sums are small, and its processes share the cores."""

import torch

torch.set_num_threads(1)

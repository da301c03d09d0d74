"""One thread: the tensors are tiny, and waiting threads of several test runs on the same cores cost eightfold."""

import torch

torch.set_num_threads(1)

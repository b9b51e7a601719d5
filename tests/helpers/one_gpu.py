"""The command line on a machine that seems to have one GPU, for what is decided before the GPU is used."""

import sys

import torch

if __name__ == "__main__":
    torch.cuda.is_available = lambda: True
    torch.cuda.device_count = lambda: 1
    from sparse_adv.__main__ import main

    sys.exit(main())

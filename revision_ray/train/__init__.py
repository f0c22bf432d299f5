"""Both stages of training, and the miniature's models."""

import os

import torch

# DeepSpeed reads it when it is first imported, by whatever module; without it, it says on every CPU machine
# that no accelerator was found.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

"""Train: stage 1, stage 2, and models from scratch."""

import os

import lazy_loader
import torch

# DeepSpeed reads it when it is first imported, by whatever module; without it, it says on every CPU machine
# that no accelerator was found.
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")

# The public names are those of the stub beside this file; each is imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""The mathematics of every figure about the modality gap; NumPy alone."""

import lazy_loader

# The public names are those of the stub beside this file; each is imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Experiments on the modality gap and on what closes it, one file a study."""

import lazy_loader

# The public names are those of the stub beside this file; each is imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

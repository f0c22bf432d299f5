"""The procedural world of the demo, and its models."""

import lazy_loader

# The public names are those of the stub beside this file; each is imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

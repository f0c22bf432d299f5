"""Measure the geometry of a modality gap, and write the report: figures, claims, verdict, page."""

import lazy_loader

# The public names are those of the stub beside this file; each is imported when it is first used.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Where images come from, how they are batched and shared out, and files that survive a kill."""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)

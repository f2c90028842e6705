"""flatreg: training-time control of flatness and curvature for adversarial robustness.

The public names stand in `__init__.pyi`. A name, or a room such as `flatreg.attacks`, is imported
when it is first used, so that `import flatreg` costs no time.
"""

from lazy_loader import attach_stub

__getattr__, __dir__, __all__ = attach_stub(__name__, __file__)

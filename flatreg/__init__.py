"""flatreg: training-time control of flatness and curvature for adversarial robustness.

The public names stand in `__init__.pyi`. A name, or a room such as `flatreg.attacks`, is imported
when it is first used, so that `import flatreg` costs no time.
"""

from lazy_loader import attach_stub as _attach_stub

_imported, __dir__, __all__ = _attach_stub(__name__, __file__)


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version(__name__)
    if name not in __all__:
        from flatreg.data.text import did_you_mean

        hint = "" if name.startswith("_") else did_you_mean(name, __all__)
        raise AttributeError(f"module 'flatreg' has no attribute {name!r}{hint}")
    return _imported(name)

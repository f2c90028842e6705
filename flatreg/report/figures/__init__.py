"""Figures: a function of a record each, which returns a figure; `style.save` writes it.

matplotlib is imported here alone, and `flatreg.report` imports none of these files: what draws
imports them.
"""

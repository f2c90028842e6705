"""`python -m flatreg`, and so `accelerate launch -m flatreg run RECIPE`."""

from flatreg.run.cli import program

raise SystemExit(program())

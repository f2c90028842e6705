"""`python -m flatreg`, and so `accelerate launch -m flatreg run RECIPE`."""

from flatreg.run.cli import main

raise SystemExit(main())

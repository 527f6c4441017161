"""`python -m slipstream` is the `slipstream` command."""

from .cli import main

raise SystemExit(main())

"""`python -m jaxvae` is `jaxvae`."""

import sys

from jaxvae.cli.commands import main

sys.exit(main())

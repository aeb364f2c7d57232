"""`python -m fourbit` is the `fourbit` command."""

import sys

from fourbit.cli.main import main

sys.exit(main())

"""Print the version of the installed torch; exit 1 where there is none or it is too old.

The Makefile asks this before it installs the pinned torch, so that a build for one's card is kept.
"""

from __future__ import annotations

import re
import sys
from importlib.metadata import PackageNotFoundError, version

OLDEST = (2, 11)

try:
    found = version("torch")
except PackageNotFoundError:
    sys.exit(1)
major, minor = map(int, re.findall(r"\d+", found)[:2])
if (major, minor) < OLDEST:
    sys.exit(1)
print(found)

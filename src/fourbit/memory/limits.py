"""How much memory this process may use: what is installed, and the limits of its control groups.

Nothing heavy is imported.
"""

from __future__ import annotations

import os
from pathlib import Path

#: cgroup v1 writes "no limit" as a huge number of bytes.
_NO_LIMIT = 1 << 60


def memory_limit() -> tuple[int, str] | None:
    """The bytes beyond which the system ends this process and what sets them; None where it does not say."""
    installed, _ = physical_memory()
    group = cgroup_limit()
    if group is not None and (not installed or group < installed):
        return group, "the limit of this process's control group"
    return (installed, "the memory installed") if installed else None


def physical_memory() -> tuple[int, int | None]:
    """Bytes of memory installed, and bytes available to new work (None where the system does not say)."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
            return 0, None
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), None
    sizes = {key: int(rest.split()[0]) * 1024 for key, _, rest in (line.partition(":") for line in lines)}
    return sizes["MemTotal"], sizes.get("MemAvailable")


def cgroup_limit(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int | None:
    """The smallest memory limit among the control groups that hold this process, in bytes, or None.

    Reads cgroup v2 (`memory.max`) and v1 (`memory.limit_in_bytes`), the process's own group and every
    group above it, since any of them may be the one that ends a process.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return None
    limits = []
    for line in lines:
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            top, file = root, "memory.max"
        elif "memory" in controllers.split(","):
            top, file = root / "memory", "memory.limit_in_bytes"
        else:
            continue
        folder = top / group.lstrip("/")
        for level in (folder, *folder.parents):
            limits.append(_limit(level / file))
            if level == top:
                break
    return min((limit for limit in limits if limit is not None), default=None)


def _limit(file: Path) -> int | None:
    try:
        text = file.read_text().strip()
    except OSError:
        return None
    return None if text == "max" or int(text) >= _NO_LIMIT else int(text)

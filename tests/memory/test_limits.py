"""What limits this process's memory."""

from __future__ import annotations

import pytest

from fourbit.memory import limits


@pytest.mark.parametrize(
    ("files", "membership", "limit"),
    [
        ({"memory.max": "max"}, "0::/", None),
        ({"memory.max": "4096"}, "0::/", 4096),
        ({"a/memory.max": "8192", "a/b/memory.max": "max"}, "0::/a/b", 8192),
        ({"memory/j/memory.limit_in_bytes": "1024"}, "4:cpu,memory:/j\n0::/", 1024),
        ({"memory/memory.limit_in_bytes": "9223372036854771712"}, "4:memory:/", None),
        ({}, "4:cpu:/", None),
    ],
)
def test_memory_limit_of_control_groups(tmp_path, files, membership, limit):
    for name, text in files.items():
        file = tmp_path / "cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")
    groups = tmp_path / "membership"
    groups.write_text(membership + "\n")
    assert limits.cgroup_limit(tmp_path / "cgroup", groups) == limit


def test_the_smaller_of_group_and_machine_is_the_limit(monkeypatch):
    monkeypatch.setattr(limits, "physical_memory", lambda: (8_000, None))
    monkeypatch.setattr(limits, "cgroup_limit", lambda: 3_000)
    assert limits.memory_limit() == (3_000, "the limit of this process's control group")
    monkeypatch.setattr(limits, "cgroup_limit", lambda: 9_000)
    assert limits.memory_limit() == (8_000, "the memory installed")
    monkeypatch.setattr(limits, "physical_memory", lambda: (0, None))
    monkeypatch.setattr(limits, "cgroup_limit", lambda: None)
    assert limits.memory_limit() is None

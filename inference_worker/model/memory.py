"""How much memory is free, as this process may use it."""

from __future__ import annotations

import os
from pathlib import Path

import torch

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_MEMINFO = Path("/proc/meminfo")


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated on a device; on a CPU within the control group's limit too."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch keeps for itself would count as taken
        free, _total = torch.cuda.mem_get_info(device)
        return free
    free = _system_free_bytes(_MEMINFO)
    limited = _cgroup_free_bytes(_CGROUP_ROOT)
    return free if limited is None else min(free, limited)


def _system_free_bytes(meminfo: Path) -> int:
    try:
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    # no Linux: take half of what is built in, since nothing tells what others use
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def _cgroup_free_bytes(root: Path) -> int | None:
    """What a container's limit leaves, by either version of control groups; None without a limit."""
    v1 = root / "memory"
    for limit, used, stat, field in (
        (root / "memory.max", root / "memory.current", root / "memory.stat", "inactive_file"),
        (
            v1 / "memory.limit_in_bytes",
            v1 / "memory.usage_in_bytes",
            v1 / "memory.stat",
            "total_inactive_file",
        ),
    ):
        try:
            most, current = int(limit.read_text()), int(used.read_text())
            # cached file pages count as used but give way to an allocation
            reclaimable = _stat_field(stat.read_text(), field)
        except (OSError, ValueError):  # absent, or "max"
            continue
        return max(0, most - current + reclaimable)
    return None


def _stat_field(stat: str, field: str) -> int:
    for line in stat.splitlines():
        name, _, value = line.partition(" ")
        if name == field:
            return int(value)
    return 0

"""Counts, bytes and durations as a person reads them; the one place that says how."""

from __future__ import annotations

import math


def format_count(number: float) -> str:
    """Three digits and a factor: 27.1M, 8.03B."""
    for factor, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.{_decimals(number / factor)}f}{letter}"
    return f"{number:.0f}"


def format_bytes(num_bytes: float) -> str:
    """Three digits and a power of 1000, as memory and disks are sold: 1.25 GB."""
    for factor, unit in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.{_decimals(num_bytes / factor)}f} {unit}"
    return f"{num_bytes:.0f} B"


def format_duration(seconds: float) -> str:
    """The two largest units: 3d 4h, 2h 05m, 12m 30s, 45s."""
    if not math.isfinite(seconds):
        return "unknown"
    total = round(seconds)
    days, hours, minutes = total // 86400, total // 3600 % 24, total // 60 % 60
    if days:
        return f"{days}d {hours}h"
    if hours:
        return f"{hours}h {minutes:02d}m"
    return f"{minutes}m {total % 60:02d}s" if minutes else f"{total}s"


def _decimals(scaled: float) -> int:
    return 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0

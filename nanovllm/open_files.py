"""The limit on the files and connections that a process may have open."""

from __future__ import annotations


def allow(num: int) -> int:
    """Raise this process's limit to `num`, or as far as the system allows. Returns the limit."""
    try:
        import resource
    except ImportError:  # on Windows
        return num
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= num:
        return num
    most = num if hard == resource.RLIM_INFINITY else max(soft, min(num, hard))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):  # macOS has another limit
        return soft
    return most

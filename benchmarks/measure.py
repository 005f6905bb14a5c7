"""What the benchmarks share: the allocator's setting, and the common part of a printed line."""

import ctypes
import importlib.metadata
import os
import platform
import resource
import sys

MALLOC = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold=1000000000000"


def keep_freed_memory() -> None:
    """Starts the process again with glibc told to keep freed memory and to use large pages, unless that is set already.

    A step then spends no time on page faults. GLIBC_TUNABLES= turns it off; the line says what was in force.
    """
    if "GLIBC_TUNABLES" not in os.environ and platform.libc_ver()[0] == "glibc" and "-h" not in sys.argv[1:]:
        os.environ["GLIBC_TUNABLES"] = MALLOC  # read when a process starts
        os.execv(sys.executable, [sys.executable, *sys.argv])


def return_freed_memory() -> None:
    """Gives memory that was freed back to the system: the compiler's, before the state is made."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def machine() -> dict:
    """Peak memory (of the process on CPU, of the device elsewhere), device, allocator setting, versions."""
    import jax

    device = jax.devices()[0]
    peak = (
        device.memory_stats()["peak_bytes_in_use"] / 2**20
        if device.platform != "cpu"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    )
    return {
        "peak_mib": round(peak),
        "device": f"{device.device_kind} x {jax.device_count()}",
        "malloc": os.environ.get("GLIBC_TUNABLES", ""),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")},
    }

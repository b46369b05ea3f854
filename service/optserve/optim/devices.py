"""Where torch computes: devices, threads, warm-up."""

from __future__ import annotations

import platform
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from optserve_client.errors import Invalid

DTYPES = ("float32", "float64", "bfloat16")


def resolve(device: str) -> str:
    """Return ``cpu``, ``cuda`` or ``cuda:i`` for a requested device; Invalid if it is not here."""
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        return device
    kind, _, index = device.partition(":")
    if kind != "cuda" or (index and not index.isdecimal()) or device.endswith(":"):
        raise Invalid(f"device must be auto, cpu, cuda or cuda:<index>, got {device!r}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(index or 0) >= count:
        raise Invalid(f"device {device!r}: this server has {count} CUDA devices")
    return device


def use_threads(count: int) -> None:
    """Let the calling thread's torch operations use ``count`` threads (a setting per thread)."""
    torch.set_num_threads(count)


def thread_count() -> int:
    """Return torch's default number of threads."""
    return torch.get_num_threads()


def warm() -> None:
    """Pay for torch's lazy imports: the first optimizer constructor takes more than a second."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    torch.optim.Adam([parameter]).step()


def version() -> str:
    return str(torch.__version__)


@cache
def _vendor() -> str:
    """Return whose processor this is: BLAS has other code for each, with other last bits."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("vendor_id", "CPU implementer"):
                return value.strip()
    return platform.processor() or platform.machine()


def fingerprint(device: str, dtype: str, impl: str) -> dict[str, Any]:
    """Return what the last bits of an update by the calling thread depend on."""
    cuda = device.startswith("cuda")
    return {
        "torch": version(),
        "processor": torch.cuda.get_device_name(device)
        if cuda
        else f"{torch.backends.cpu.get_cpu_capability()} {_vendor()}",
        "threads": torch.get_num_threads(),
        "dtype": dtype,
        "impl": impl,
    }

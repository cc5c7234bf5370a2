"""What a bug report needs: versions, the compiled core, back ends, CPU, memory and GPUs."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import import_module, metadata
from typing import Any

import torch

from pymcip.files import read_system_file
from pymcip.ops.dispatch import backends, ops

PACKAGES = (
    "pymcip", "torch", "torchvision", "open_clip_torch", "numpy", "triton", "faiss-cpu",
    "faiss-gpu", "pillow", "pyarrow", "safetensors",
)  # fmt: skip
CPU_FLAGS = (  # /proc/cpuinfo's names, x86-64 then AArch64
    "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "amx_int8", "amx_bf16",
    "asimddp", "i8mm", "bf16", "sve",
)  # fmt: skip


def environment_report() -> dict[str, Any]:
    """Plain JSON values, by section. What is missing is None; what failed is its error's text."""
    return {
        "versions": {
            "python": platform.python_version(),
            **{package: package_version(package) for package in PACKAGES},
        },
        "core": _core(),
        "back ends": _back_ends(),
        "cpu": _cpu(),
        "gpu": _gpu(),
        "system": {
            "platform": platform.platform(),
            "executable": sys.executable,
            **{
                name: value
                for name, value in sorted(os.environ.items())
                if name.startswith(
                    ("PYMCIP_", "OMP_", "MKL_", "CUDA_VISIBLE", "HF_HOME", "HF_HUB_OFF")
                )
            },
        },
    }


def format_report(report: dict[str, Any]) -> str:
    """The report as aligned text."""
    lines: list[str] = []
    for section, values in report.items():
        lines.append(section)
        for name, value in values.items():
            if isinstance(value, dict):
                lines.append(f"  {name}")
                width = max(map(len, value), default=0)
                lines += [f"    {key:<{width}}  {_plain(item)}" for key, item in value.items()]
            elif isinstance(value, list) and value and isinstance(value[0], dict):
                lines.append(f"  {name}")
                lines += [
                    "    " + ", ".join(f"{key} {_plain(item)}" for key, item in row.items())
                    for row in value
                ]
            else:
                lines.append(f"  {name:<20}{_plain(value)}")
    return "\n".join(lines)


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def package_version(package: str) -> str | None:
    """The version of an installed package; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _core() -> dict[str, Any]:
    try:
        core: Any = import_module("pymcip._core")
    except ImportError as error:
        return {"error": str(error)}
    return {"file": core.__file__, **core.build_info(), "topk kernels": core.topk_kernels()}


def _back_ends() -> dict[str, dict[str, str]]:
    return {
        op: {
            row.name: row.unavailable() or f"available ({' or '.join(row.devices)} device)"
            for row in backends(op)
        }
        for op in ops()
    }


def usable_cores() -> int:
    """Return how many processor cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _cpu() -> dict[str, Any]:
    info = read_system_file("/proc/cpuinfo")
    model = re.search(r"^model name\s*:\s*(.+)$", info, re.MULTILINE)
    flags_line = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", info, re.MULTILINE)
    flags = set(flags_line.group(1).split()) if flags_line else set()
    memory = re.search(r"^MemTotal:\s*(\d+) kB$", read_system_file("/proc/meminfo"), re.MULTILINE)
    return {
        "model": model.group(1) if model else platform.processor() or platform.machine(),
        "features": [flag for flag in CPU_FLAGS if flag in flags],
        "cores usable": usable_cores(),
        "torch threads": torch.get_num_threads(),
        "memory GiB": round(int(memory.group(1)) / 2**20, 1) if memory else None,
    }


def _gpu() -> dict[str, Any]:
    """CUDA as torch sees it, and as the compiled core's own runtime does."""
    available = torch.cuda.is_available()
    section: dict[str, Any] = {"torch CUDA": torch.version.cuda, "available to torch": available}
    try:
        core: Any = import_module("pymcip._core")
    except ImportError as error:
        section["core"] = str(error)
    else:
        info = core.cuda_info()
        if info is None:
            section["core"] = "built without CUDA"
        else:
            section["core runtime"] = info["runtime"]
            section["driver CUDA"] = info["driver"]
            section["core"] = info["error"] or f"sees {len(info['devices'])} device(s)"
    properties = map(
        torch.cuda.get_device_properties, range(torch.cuda.device_count() if available else 0)
    )
    section["devices"] = [
        {
            "name": device.name,
            "capability": f"{device.major}.{device.minor}",
            "multiprocessors": device.multi_processor_count,
            "memory GiB": round(device.total_memory / 2**30, 1),
        }
        for device in properties
    ]
    return section

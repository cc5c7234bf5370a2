"""The environment of `gpu_check.py`: what it needs, what a bare machine lacks, and how it is made.

Run as a program it makes a virtual environment without pip that sees the packages of the Python it
runs under, and installs a folder's wheels into it; nothing is fetched:

    python bench/gpu_environment.py .venv-gpu gpu-wheels
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import site
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

# By module, what pip calls the package. Without these nothing can be measured:
NEEDED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "triton": "triton",
    "numpy": "numpy",
    "PIL": "pillow",
    "pyarrow": "pyarrow",
    "safetensors": "safetensors",
    "tqdm": "tqdm",
    "open_clip": "open_clip_torch",
    "ftfy": "ftfy",
    "wcwidth": "wcwidth",
    "regex": "regex",
    "timm": "timm",
    "huggingface_hub": "huggingface_hub",
    "scikit_build_core": "scikit-build-core>=1.0",
    "pathspec": "pathspec",
    "packaging": "packaging",
    "pybind11": "pybind11",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
    "pip": "pip",
}
# Without these some of it is left out:
WANTED = {
    "xdist": "pytest-xdist",
    "pytest_timeout": "pytest-timeout",
    "webdataset": "webdataset",
    "braceexpand": "braceexpand",
    "pandas": "pandas",
    "cut_cross_entropy": "cut-cross-entropy",
    "liger_kernel": "liger-kernel",
    "siglip_kernel": "siglip-kernel",
    "quack": "quack-kernels",
}
TOOLS = ("nvcc", "cmake", "ninja", "ncu", "compute-sanitizer")


def is_there(module: str, wheels: Path) -> bool:
    """Installed, or to be installed from the folder."""
    package, _, least = {**NEEDED, **WANTED}[module].partition(">=")
    plain = re.sub(r"[-_.]+", "_", package).lower()
    if any(path.name.split("-")[0].lower() == plain for path in wheels.glob("*.whl")):
        return True
    return importlib.util.find_spec(module) is not None and _version(package) >= _numbers(least)


def missing(wheels: Path) -> tuple[list[str], list[str]]:
    """Packages and tools without which nothing can be measured, and those that cost a part."""
    needed, wanted = (
        [pip for module, pip in names.items() if not is_there(module, wheels)]
        for names in (NEEDED, WANTED)
    )
    return needed, wanted + [tool for tool in TOOLS if shutil.which(tool) is None]


def gpus() -> int:
    """CUDA devices that the driver shows; asked of the driver, as torch may not be there."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value


def make(folder: Path, wheels: Path) -> None:
    venv.create(folder, clear=True, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import site; print(site.getsitepackages()[0])"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout.strip()
    # This Python may be a virtual environment itself, which the new one would not show.
    lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
    (Path(own) / "parent.pth").write_text("".join(lines), encoding="utf-8")
    if found := sorted(wheels.glob("*.whl")):
        subprocess.run(pip_install(python, *found), check=True)


def pip_install(python: Path, *words: str | Path) -> list[str | Path]:
    """A command: this Python's pip installs into the other's environment, and fetches nothing."""
    options = ["--no-index", "--no-deps", "--force-reinstall", "--disable-pip-version-check"]
    return [sys.executable, "-m", "pip", "--python", python, "install", *options, *words]


def _version(package: str) -> list[int]:
    try:
        return _numbers(metadata.version(package))
    except metadata.PackageNotFoundError:  # a module without a package around it
        return []


def _numbers(version: str) -> list[int]:
    return [int(part) for part in re.findall(r"\d+", version)[:2]]


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))

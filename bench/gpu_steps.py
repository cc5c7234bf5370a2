"""The steps of `gpu_check.py`, by value: what is wanted most is measured first.

A build beside torch's own ceilings; the tests beside compilation of what the benches need; from then
on one process at a time has the GPU to itself: ours in the cases of the goals, profiles of the big
kernels, rivals (each in a process of its own, so that one costs the others nothing), and a memory
checker. A rehearsal has the same steps with tiny cases on the CPU; what needs a GPU is replaced.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gpu_environment import is_there, pip_install
from gpu_runner import ROWS, Step, Words

ROOT = Path(__file__).resolve().parents[1]
GOAL = "--rows 4096 --columns 1000320 --dims 768"
TINY = "--rows 8 --columns 256 --dims 16"
MODES = ("forward", "mc", "mc filtered", "arc", "arc kept", "arc filtered")
RIVALS = ("torch.compile", "cce", "siglip", "quack", "liger")
NCU = (  # the clocks stay as they are
    "ncu --profile-from-start off --clock-control none"
    " --kernel-name regex:screen|exponentials|rows_kernel|columns_kernel"
    " --section SpeedOfLight --section WarpStateStats --section Occupancy"
    " --section MemoryWorkloadAnalysis --section LaunchStats"
)
MACHINE = """
date -u; uname -a; nproc; free -g
nvidia-smi; nvidia-smi -q -d CLOCK,POWER; nvcc --version
for tool in ncu compute-sanitizer cmake ninja g++ git; do command -v $tool || echo "no $tool"; done
"$0" --version; "$0" -m pip list; true
"""
MEMCHECK = "from pymcip.ops.topk_cuda import probe_cuda as p; r = p(); assert not r, r"


@dataclass(frozen=True)
class Places:
    """python: what tests and benches run under. venv: the environment that is made, with caches."""

    python: Path
    venv: Path
    wheels: Path
    out: Path

    def bench(self, name: str, words: str, *more: str) -> Words:
        return [self.python, f"bench/bench_{name}.py", "--store", *words.split(), *more]


def steps(places: Places, *, rehearse: bool) -> list[Step]:
    environment = {
        "CMAKE_BUILD_PARALLEL_LEVEL": str(max(1, (os.cpu_count() or 1) - 4)),
        "PYMCIP_BENCH_ROWS": str(places.out / ROWS),
        "PYMCIP_CACHE": str(places.venv / "cache"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
        "PYTHONUNBUFFERED": "1",
        "TRITON_CACHE_DIR": str(places.venv / "cache" / "triton"),
    }
    parts: Sequence[Callable[[Places], list[Step]]] = (
        preparation, tests, compilation, ours, profiles, rivals, checker,
    )  # fmt: skip
    planned = [step for part in parts for step in part(places)]
    if rehearse:
        planned = [rehearsal(step) for step in planned]
    return [
        replace(step, folder=step.folder or ROOT, environment={**environment, **step.environment})
        for step in planned
    ]


def rehearsal(step: Step) -> Step:
    if step.rehearsal:
        return replace(step, command=step.rehearsal)
    words = " ".join(map(str, step.command))
    return replace(step, command=["echo", f"not in a rehearsal: {words}"], purpose="a stand-in")


def preparation(places: Places) -> list[Step]:
    machine = ["sh", "-c", MACHINE, sys.executable]
    make: Words = [
        sys.executable,
        ROOT / "bench" / "gpu_environment.py",
        places.venv,
        places.wheels,
    ]
    build = pip_install(places.python, "--verbose", "--no-build-isolation", ".")
    env: Words = [places.python.parent / "pymcip", "env"]
    return [
        Step("machine", "what it is", machine, machine, limit=30, into="machine.txt"),
        Step("environment", "wheels", make, make, limit=40, beside=True, needed="pass"),
        Step("build", "pymcip with CUDA", build, limit=90, needed="pass"),
        Step(
            "ceilings",
            "copies and products by torch alone",
            places.bench("ceilings", "--device cuda"),
            places.bench("ceilings", "--smoke --repetitions 1"),
            limit=40,
            beside=True,
            environment={"PYTHONPATH": str(ROOT)},  # nothing is built yet
        ),
        Step("env", "back ends", env, env, limit=25, into="machine.txt"),
    ]


def tests(places: Places) -> list[Step]:
    # Not from the root: "python -m pytest" would import the source folder instead.
    pytest: list[str | Path] = [places.python, "-m", "pytest", "-c", ROOT / "pyproject.toml"]
    pytest += ["--rootdir", ROOT, "-v", "-p", "no:cacheprovider"]
    left = [
        file
        for file in sorted((ROOT / "tests").glob("test_*.py"))
        if "mark.gpu" in file.read_text(encoding="utf-8")
    ]
    found: list[Step] = []
    timed, spread = is_there("pytest_timeout", places.wheels), is_there("xdist", places.wheels)
    for name, start, processes, seconds in (  # seconds of a test; Triton's compile, too
        ("CUDA top-k", "test_topk_cuda", 1, 25),
        ("margin softmax", "test_margin_softmax", 3, 60),
        ("other", "", 4, 60),
    ):
        files = [file for file in left if file.name.startswith(start)]
        left = [file for file in left if file not in files]
        # A test that hangs ends its process, and with xdist another takes its place.
        limits = ["-p", "pytest_timeout", "--timeout-method=thread", f"--timeout={seconds}"]
        several = ["-p", "xdist.plugin", "-n", str(processes)]
        plugins = [*(limits if timed else ()), *(several if spread else ())]
        few = [*pytest, "-k", "wide_rows or no_rows", ROOT / "tests" / "test_topk_triton.py"]
        found.append(
            Step(
                f"{name} tests",
                "correctness",
                [*pytest, *plugins, "-m", "gpu", *files],
                few if name == "other" else (),
                limit=130,
                beside=bool(found),
                needed="pass",
                folder=places.venv,
                # Timing tile sizes would compile each kernel several times; the benches do that.
                environment={"PYMCIP_TUNE": "0"},
            )
        )
    return found


def compilation(places: Places) -> list[Step]:
    """Fills Triton's cache while the tests run; what is tuned and timed meanwhile is thrown away."""
    nowhere = {"PYMCIP_CACHE": str(places.venv / "junk"), "PYMCIP_BENCH_ROWS": os.devnull}
    words = "--device cuda --rows 4096 --columns 200448 --dims 768 --repetitions 1 --rivals pymcip"
    return [
        Step(
            f"compile {mode}",
            "Triton's cache",
            places.bench("margin_softmax", words, "--modes", mode),
            limit=110,
            beside=True,
            environment=nowhere,
        )
        for mode in MODES
    ]


def goal_case(places: Places, words: str, *more: str) -> Words:
    return places.bench("margin_softmax", f"--device cuda {GOAL} {words}", *more)


def ours(places: Places) -> list[Step]:
    little = f"--rivals pymcip --seconds 28 --scratch {1 << 28} --modes mc arc"
    topk = "--device cuda --k 10 --no-threshold "
    metrics = "--cases gpr1200 --rivals pymcip torch"  # NumPy's take a minute
    return [
        Step(
            "margin",
            "the goals, all modes",
            goal_case(places, "--rivals pymcip --seconds 60"),
            places.bench(
                "margin_softmax",
                f"{TINY} --cluster 64 --repetitions 1 --modes mc arc --rivals",
                "pymcip torch",
            ),
            limit=70,
        ),
        Step("margin, 256 MiB", "what less scratch costs", goal_case(places, little), limit=35),
        Step(
            "top-k bf16",
            "the goals, half precision",
            places.bench(
                "topk",
                topk + "--dtype bfloat16 --bank 4000000 --queries 8192 2048 --rivals pymcip"
                " --seconds 38",
            ),
            places.bench(
                "topk",
                "--bank 300 --dims 16 --k 5 --queries 9 --no-threshold --rivals portable"
                " --repetitions 1",
            ),
            limit=45,
        ),
        Step(
            "top-k fp32",
            "beside torch and faiss",
            places.bench(
                "topk",
                topk + "--bank 2000000 --queries 2048 64 --seconds 24 --rivals pymcip faiss-gpu",
                "torch bf16",
            ),
            limit=30,
        ),
        Step(
            "metrics",
            "GPR1200's mAP",
            places.bench("metrics", f"{metrics} --device cuda --repetitions 2"),
            places.bench("metrics", f"{metrics} --smoke --repetitions 1"),
            limit=40,
        ),
        Step(
            "train",
            "images per second, beside open_clip",
            places.bench("train", "--device cuda --repetitions 1 --steps 4"),
            limit=45,
        ),
    ]


def profiles(places: Places) -> list[Step]:
    profile: Words = [places.python, "bench/gpu_profile.py"]
    tiny: Words = [*profile, "margin", "--device", "cpu", *TINY.split()]
    ncu, into = NCU.split(), "profiles.txt"
    return [
        Step("profile topk", "ncu", [*ncu, *profile, "topk"], limit=45, into=into),
        Step("profile margin", "ncu", [*ncu, *profile, "margin"], tiny, limit=55, into=into),
    ]


def rivals(places: Places) -> list[Step]:
    words = "--seconds 18 --modes mc arc --rivals"
    return [
        Step(f"rival {name}", "the goals", goal_case(places, words, name), limit=27)
        for name in RIVALS
    ]


def checker(places: Places) -> list[Step]:
    """The CUDA top-k checks its own results; each allocation is one of the device's."""
    command = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "3"]
    return [
        Step(
            "memcheck",
            "compute-sanitizer",
            [*command, places.python, "-c", MEMCHECK],
            limit=60,
            needed="not fail",
            folder=places.venv,
            environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        )
    ]

"""One extension for every processor: newer instructions stay in the kernels that are chosen for them.

On processors that this machine is not, by QEMU's user mode (Debian: apt install qemu-user, and
g++-aarch64-linux-gnu for AArch64); what is not installed is skipped.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import subprocess
import sys
from bisect import bisect_right
from pathlib import Path
from typing import Any

import pytest

from pymcip import _core

HERE = Path(__file__).parent
SOURCES = HERE.parent / "csrc"
ON_X86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="of x86-64's instruction sets")

# Source files of the kernels, and what their functions may use: 256-bit vectors, 512-bit ones, tiles.
ALLOWED = {
    "topk_avx2.cpp": {"vex", "ymm"},
    "topk_avx512_vnni.cpp": {"vex", "ymm", "zmm"},
    "topk_amx.cpp": {"vex", "ymm", "zmm", "tile"},
}


def output(*command: Any) -> str:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def need(tool: str) -> str:
    path = shutil.which(tool)
    if path is None:
        pytest.skip(f"needs {tool}")
    return path


def owners(library: Path) -> list[tuple[int, str, str]]:
    """Start, name and source file ("" if it is not local) of every function, in order."""
    found, file = [], ""
    for line in output(need("objdump"), "--syms", "--wide", library).splitlines():
        match = re.match(r"([0-9a-f]{16}) (.{7}) (\S+)\s+[0-9a-f]{16}\s*(.*)", line)
        if match is None:
            continue
        address, flags, section, name = match.groups()
        if "f" in flags:
            file = name
        elif "F" in flags and section.startswith(".text"):
            found.append((int(address, 16), name, file if flags.startswith("l") else ""))
    return sorted(found)


def needs(mnemonic: str, operands: str) -> set[str]:
    """What an instruction needs beyond SSE2."""
    found = set()
    if mnemonic.startswith("v") and not mnemonic.startswith(("verr", "verw")):
        found.add("vex")
    for register in ("ymm", "zmm"):
        if f"%{register}" in operands:
            found.add(register)
    if "tmm" in operands or "tile" in mnemonic or re.search(r"%k[0-7]\b", operands):
        found.add("tile" if "tmm" in operands or "tile" in mnemonic else "zmm")
    return found


@ON_X86
def test_newer_instructions_stay_in_their_kernels() -> None:
    """In functions local to the kernels' files: no shared inline function, and nothing at loading."""
    functions = owners(Path(_core.__file__))
    if not functions:
        pytest.skip("the extension was stripped of its symbols")
    starts = [start for start, _, _ in functions]
    used: dict[str, set[str]] = {}
    for line in output("objdump", "-d", "-w", "--no-show-raw-insn", _core.__file__).splitlines():
        match = re.match(r"\s+([0-9a-f]+):\s+(\S+)\s*(.*)", line)
        if match is None:
            continue
        address, mnemonic, operands = match.groups()
        wanted = needs(mnemonic, operands)
        if not wanted:
            continue
        place = bisect_right(starts, int(address, 16)) - 1
        assert place >= 0, line
        _, name, file = functions[place]
        assert wanted <= ALLOWED.get(file, set()), f"{name} of {file or 'no single file'}: {line}"
        assert not re.search("usable|kernel_|_GLOBAL__sub_I", name), (
            f"run on any processor: {name}: {line}"
        )
        used.setdefault(file, set()).update(wanted)
    assert used == {file: ALLOWED[file] for file in used}
    assert len(used) >= len(set(_core.topk_kernels()) & {"amx", "avx512_vnni", "avx2"})


# ids, and for whom QEMU's -cpu stands. QEMU emulates neither AVX-512 nor AMX.
@ON_X86
@pytest.mark.parametrize(
    ("processor", "kernels"),
    [
        ("Nehalem", ["portable"]),  # 2008: SSE4.2
        ("SandyBridge", ["portable"]),  # AVX, but not AVX2
        ("Haswell", ["avx2", "portable"]),
        ("Skylake-Server", ["avx2", "portable"]),
    ],
)
def test_the_extension_runs_on_older_processors(processor: str, kernels: list[str]) -> None:
    qemu = need("qemu-x86_64")
    command = [sys.executable, "-I", "-S", HERE / "core_alone.py", _core.__file__]
    found = json.loads(output(qemu, "-cpu", processor, *command))
    assert [name for name in found if name != "avx2"] == ["portable"]
    if "avx2" in _core.topk_kernels():  # else the compiler may not have known it
        assert list(found) == kernels
    here = json.loads(output(*command))
    for kernel in found:
        assert found[kernel] == here[kernel] == here["portable"]


def test_kernels_of_this_machine_answer_alike_without_the_package() -> None:
    found = json.loads(output(sys.executable, "-I", "-S", HERE / "core_alone.py", _core.__file__))
    assert {*found, "amx_bf16"} >= set(_core.topk_kernels())
    assert all(answer == found["portable"] for answer in found.values())


def test_an_arm_processor_gives_the_same_answers(tmp_path: Path) -> None:
    """AArch64 has the portable kernel alone; the others' files compile to nothing."""
    cross, qemu, native = (need(tool) for tool in ("aarch64-linux-gnu-g++", "qemu-aarch64", "g++"))
    files = [HERE / "topk_program.cpp", *sorted(SOURCES.glob("topk_*.cpp"))]
    files = [file for file in files if "cuda" not in file.name]
    flags = ["-std=c++17", "-O2", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    flags += ["-Wno-psabi", "-static", "-pthread"]
    lines = {}
    for name, compiler, emulator in (("arm", cross, [qemu]), ("native", native, [])):
        output(compiler, *flags, *files, "-o", tmp_path / name)
        done = subprocess.run(
            [*emulator, tmp_path / name], capture_output=True, text=True, check=True
        )
        assert done.stderr == "portable\n"
        lines[name] = done.stdout
    assert lines["arm"].count("\n") == 10
    assert lines["arm"] == lines["native"]

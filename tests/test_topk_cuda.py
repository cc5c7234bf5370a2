"""The CUDA back end of topk against the canonical ranking: equal ids, and scores of equal bits.

The same cases run on the CPU emulation of CUDA in tests/cuda_emulator (kernels and driver as they are,
compiled by g++) and, where there is one, on a GPU; nvcc's view of the kernels is checked where nvcc is.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from pymcip import _core
from pymcip.errors import ConfigError, DataError
from pymcip.ops import PackedBank, topk
from pymcip.ops.canonical import canonical_matrix, canonical_topk
from pymcip.ops.topk_cuda import probe_cuda, topk_cuda
from tests.beside import ARCHITECTURES, BESIDE, Finished

SCREENS = ("bf16", "int8")
PATHS = ("hopper", "mma", "mma128")


def load_emulator() -> ModuleType:
    path = Path(__file__).resolve().parent / "cuda_emulator" / "emulator.py"
    spec = importlib.util.spec_from_file_location("cuda_emulator", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


emulator = load_emulator()


def gaussian(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def ramp() -> tuple[np.ndarray, np.ndarray]:
    """Every chunk beats what came before: cuts never help."""
    direction = gaussian(1, 1, 16)
    return direction.repeat(3, 0), np.linspace(-1, 1, 2000, dtype=np.float32)[:, None] * direction


def magnitudes() -> tuple[np.ndarray, np.ndarray]:
    """Norms from 1e-30 to 1e15, and a zero, side by side."""
    bank = gaussian(2, 900, 24)
    bank[5:9] *= np.float32([[1e15], [1e-15], [0], [1e-30]])
    return gaussian(3, 6, 24), bank


def twins() -> tuple[np.ndarray, np.ndarray]:
    bank = gaussian(4, 1300, 33)
    bank[::7] = bank[3]
    return np.concatenate([bank[3:4], gaussian(5, 3, 33)]), bank


def crowd() -> tuple[np.ndarray, np.ndarray]:
    """Scores within what no screen can tell apart, least of all for every other 128 rows."""
    queries = gaussian(6, 2, 40)
    bank = queries[0] + 1e-3 * gaussian(7, 900, 40)
    aside = gaussian(26, 900, 40)
    aside -= np.outer(aside @ queries[0] / (queries[0] @ queries[0]), queries[0])
    odd = np.arange(900) // 128 % 2 == 1
    bank[odd] += 60 * aside[odd]
    return queries, bank


def brink() -> tuple[np.ndarray, np.ndarray]:
    """Finite scores whose bf16 factors have infinite products, all of them negative."""
    most = np.float32(2.0**63) * (1 - 2.0**-10)  # 4 most^2 < 2^128, but bf16 makes 2^63 of it
    nearly = 1 - 1e-5 * (np.arange(700, dtype=np.float32) * 31 % 97)
    return np.full((2, 4), most, np.float32), -np.outer(nearly, np.full(4, most)).astype(np.float32)


def apart() -> tuple[np.ndarray, np.ndarray]:
    """Every row further from the next than any screen is off; a single chunk."""
    direction = gaussian(27, 1, 64)
    powers = np.random.default_rng(28).permutation(250)[:, None]
    return direction, (np.float32(1.07) ** powers * direction).astype(np.float32)


def small_crowd() -> tuple[torch.Tensor, np.ndarray]:
    """The squares of what rounding does to the bank underflow, and the queries lose nothing."""
    queries, bank = crowd()
    return torch.from_numpy(queries).to(torch.bfloat16), np.float32(1e-22) * bank


def shuffled() -> tuple[torch.Tensor, torch.Tensor]:
    """Equal sums without rounding of the factors: only what a tensor core cuts off tells rows apart."""
    values = bf16(24, 1024).abs()
    orders = [
        torch.from_numpy(np.random.default_rng(seed).permutation(1024)) for seed in range(400)
    ]
    queries = torch.full((2, 1024), 255 / 128).bfloat16()  # products with 16 bits
    return queries, torch.stack([values[order] for order in orders])


def bf16(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(gaussian(seed, *shape)).to(torch.bfloat16)


def pair(rows: int, bank_rows: int, columns: int, scale: float = 1.0) -> Any:
    factor = np.float32(scale)
    return lambda: (
        factor * gaussian(8, rows, columns),
        factor * gaussian(9, bank_rows, columns),
    )


@dataclass(frozen=True)
class Case:
    make: Callable[[], tuple[Any, Any]]
    k: int
    threshold: float = -np.inf
    options: dict[str, Any] = field(default_factory=dict)  # the emulator's
    everywhere: bool = False  # on all paths, not just on two of the six
    exact: bool = True


# With room for 256 candidates per query, so that they overflow soon, unless told otherwise.
CASES = {
    "ragged": Case(pair(130, 700, 70), 7, everywhere=True),
    "one of each": Case(pair(1, 1, 1), 1),
    "no queries": Case(pair(0, 5, 3), 2),
    "no bank": Case(pair(5, 0, 3), 2),
    "no bank in main memory": Case(pair(5, 0, 3), 2, options={"on_host": True}),
    "k above M": Case(pair(3, 20, 8), 30),
    "most k": Case(pair(3, 2500, 8), 2048, options={"capacity": 0}),
    "most k, overflowing": Case(pair(2, 2500, 8), 2048, options={"capacity": 256}),
    "most D": Case(pair(2, 257, 4096), 5),
    "several blocks in D": Case(pair(4, 300, 1152), 5),
    "threshold admits none": Case(pair(9, 600, 40), 5, 1e9),
    "threshold admits nothing ever": Case(pair(2, 300, 4), 5, np.inf),
    "threshold admits all": Case(pair(9, 600, 40), 5, -1e9),
    "threshold admits some": Case(pair(9, 600, 40), 50, 5.0),
    "all equal": Case(lambda: (np.ones((3, 5), np.float32), np.ones((1500, 5), np.float32)), 7),
    "all equal, long": Case(lambda: (np.ones((129, 5), np.float32),) * 2, 300),
    "all zero": Case(lambda: (np.zeros((3, 5), np.float32), np.zeros((600, 5), np.float32)), 7),
    "ramp": Case(ramp, 5, everywhere=True),
    "twins": Case(twins, 20),
    "crowd": Case(crowd, 10, everywhere=True),
    "apart": Case(apart, 40),
    "shuffled": Case(shuffled, 10, everywhere=True),
    "magnitudes": Case(magnitudes, 9),
    "magnitudes, all of them": Case(magnitudes, 900),
    "tiny": Case(pair(3, 300, 8, 1e-20), 5),
    "vanishing": Case(pair(3, 600, 8, 3e-38), 5),
    "huge": Case(pair(3, 700, 8, 1e18), 5),
    "on the brink": Case(brink, 9),
    "a small crowd": Case(small_crowd, 10),
    "float16": Case(lambda: (bf16(10, 4, 100).half(), bf16(11, 500, 100).half()), 5),
    "bank screened in place": Case(lambda: (gaussian(10, 4, 72), bf16(11, 700, 72)), 5),
    "bank misaligned": Case(lambda: (bf16(10, 4, 71), bf16(11, 700, 72)[:, 1:]), 5),
    "strides": Case(
        lambda: (gaussian(12, 6, 60)[::2, ::-3], gaussian(13, 900, 120)[::-2, ::-6]), 5
    ),
    "from main memory": Case(
        pair(20, 1500, 31),
        5,
        options={"on_host": True, "raw_bytes": 1 << 16, "staging_bytes": 1 << 12},
    ),
    "in place from main memory": Case(
        lambda: (gaussian(10, 4, 70), bf16(11, 1500, 70)),
        5,
        options={"on_host": True, "raw_bytes": 1 << 16},
    ),
    "strides in main memory": Case(
        lambda: (gaussian(12, 6, 60)[::2, ::-3], gaussian(13, 900, 120)[::-2, ::-6]),
        5,
        options={"on_host": True},
    ),
    "queries in turns": Case(  # of two blocks, for each chunk of 256 rows
        pair(260, 600, 31),
        5,
        options={"query_bytes": 256 * 128, "candidate_bytes": 128 * 256 * 8, "packed_bytes": 0},
    ),
    "small chunks": Case(pair(4, 1500, 31), 5, options={"packed_bytes": 1 << 15}),
}
# Also with the bank packed ahead.
AHEAD = {
    *("ragged", "no bank", "several blocks in D", "ramp", "crowd", "shuffled", "magnitudes"),
    *("float16", "bank screened in place", "bank misaligned", "strides", "queries in turns"),
}
COMBINATIONS = [
    pytest.param(name, screen, path, id=f"{name}-{screen}-{path}")
    for index, (name, case) in enumerate(CASES.items())
    for number, (screen, path) in enumerate([(s, p) for s in SCREENS for p in PATHS])
    if case.everywhere or number in (index % 3, 3 + (index + 1) % 3)
]


def assert_same(result: tuple[Any, Any], wanted: tuple[np.ndarray, np.ndarray]) -> None:
    ids, scores = (part.cpu().numpy() if hasattr(part, "cpu") else part for part in result)
    np.testing.assert_array_equal(ids, wanted[0])
    np.testing.assert_array_equal(scores.view(np.int32), wanted[1].view(np.int32))


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if emulator.COMPILER is None:
        pytest.skip("there is no g++ to compile the emulation with")
    return emulator.build(tmp_path_factory.mktemp("cuda"))


@pytest.mark.parametrize(("name", "screen", "path"), COMBINATIONS)
def test_emulated_ranking_is_canonical(
    emulated: ctypes.CDLL, name: str, screen: str, path: str
) -> None:
    case = CASES[name]
    queries, bank = case.make()
    wanted = canonical_topk(queries, bank, case.k, case.threshold)
    for ahead in (False, True) if name in AHEAD else (False,):
        result = emulator.topk(
            *(emulated, queries, bank, case.k, case.threshold),
            **{"screen": screen, "path": path, "packed_ahead": ahead, **case.options},
            eager=screen == "int8",
        )
        assert_same(result, wanted)


LAYOUTS = ("transposed", "sliced", "offset by one", "every other", "expanded")


def laid_out(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same matrix, NaN all around it; of "expanded", the first row over and over."""
    rows, columns = x.shape
    if layout == "transposed":
        return x.T.contiguous().T
    if layout == "expanded":
        return x[:1].expand(rows, columns)
    nan = x.new_full((2 * rows, 2 * columns), torch.nan)
    view = {
        "sliced": nan[1 : 1 + rows, 8 : 8 + columns],  # at multiples of 16 bytes
        "offset by one": nan.view(-1)[1 : 1 + rows * columns].view(rows, columns),
        "every other": nan[::2, ::2],
    }[layout]
    return view.copy_(x)


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_emulated_layouts(emulated: ctypes.CDLL, layout: str, screen: str) -> None:
    for number, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16)):
        queries, bank = (laid_out(bf16(30, rows, 72).to(dtype), layout) for rows in (3, 300))
        wanted = canonical_topk(queries, bank, 6)
        options = {"screen": screen, "path": PATHS[number]}
        for ahead in (False, True):
            result = emulator.topk(emulated, queries, bank, 6, packed_ahead=ahead, **options)
            assert_same(result, wanted)


def test_emulated_pinned_bank(emulated: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYMCIP_EMULATE_PINNED", "1")
    queries, bank = gaussian(14, 5, 37), gaussian(15, 900, 80)[:, :37]
    result = emulator.topk(emulated, queries, bank, 6, screen="int8", path="mma", on_host=True)
    assert_same(result, canonical_topk(queries, bank, 6))


@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("path", PATHS)
def test_emulated_screens_own_scores(emulated: ctypes.CDLL, screen: str, path: str) -> None:
    queries, bank = gaussian(16, 9, 100), gaussian(17, 1000, 100)
    ids, scores = emulator.topk(
        emulated, queries, bank, 12, 3.0, screen=screen, path=path, exact=False
    )
    check_rough(ids, scores, queries, bank, 3.0)
    # Small integers are bf16 numbers and their sums are exact.
    queries, bank = np.rint(queries), np.rint(bank)
    if screen == "bf16":
        result = emulator.topk(emulated, queries, bank, 12, screen=screen, path=path, exact=False)
        assert_same(result, canonical_topk(queries, bank, 12))


def check_rough(
    ids: np.ndarray, scores: np.ndarray, queries: Any, bank: Any, threshold: float
) -> None:
    """Sorted, without doubles, and no further from the canonical ones than rounding both factors.

    |<q',c'> - <q,c>| <= (2 r + r^2) |q| |c| where rounding is off by r: at most 2^-8 for bf16; for
    INT8 half a step of amax / 127, hence sqrt(D) amax / 254 < 0.02 for rotated rows of 128 places
    whose largest is below 0.45.
    """
    exact = canonical_matrix(queries, bank)
    off = 0.0404 * np.outer(np.linalg.norm(queries, axis=1), np.linalg.norm(bank, axis=1))
    for row, (line, values) in enumerate(zip(ids, scores, strict=True)):
        found = line[line >= 0]
        assert len(set(found.tolist())) == len(found) > 0
        assert (values[: len(found)] >= threshold).all()
        order = list(zip((-values[: len(found)]).tolist(), found.tolist(), strict=True))
        assert order == sorted(order)
        assert (np.abs(values[: len(found)] - exact[row, found]) <= off[row, found]).all()
        if len(found) == len(line):  # nothing left out is better by more than that
            others = np.setdiff1d(np.arange(len(bank)), found)
            assert (exact[row, others] - off[row, others] <= values[-1]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("screen", SCREENS)
def test_emulated_search_names_bad_rows(emulated: ctypes.CDLL, screen: str, value: float) -> None:
    queries, bank = gaussian(18, 9, 16), gaussian(19, 600, 16)
    bank[[501, 400], 3] = value
    for exact in (False, True):
        options = {"screen": screen, "path": "mma", "exact": exact, "eager": exact}
        for given in (bank, torch.from_numpy(bank).bfloat16()):  # packed, and in place
            for ahead in (False, True):
                with pytest.raises(ValueError, match="row 400 of bank"):
                    emulator.topk(emulated, queries, given, 3, packed_ahead=ahead, **options)
    wrong = gaussian(18, 131, 16)
    wrong[[130, 129], 5] = value
    with pytest.raises(ValueError, match="row 129 of queries"):
        emulator.topk(emulated, wrong, bank, 3, **options)
    with pytest.raises(ValueError, match="row 129 of queries"):  # in turns of 128
        emulator.topk(emulated, wrong, bank[:20], 3, query_bytes=128 * 128, **options)


def test_emulated_search_can_be_stopped(emulated: ctypes.CDLL) -> None:
    queries, bank = gaussian(18, 4, 20), gaussian(19, 2000, 20)
    for on_host in (False, True):
        with pytest.raises(emulator.StoppedError):
            emulator.topk(
                emulated, queries, bank, 3, screen="bf16", path="mma", on_host=on_host, stop_after=2
            )


def test_unknown_names_are_refused(emulated: ctypes.CDLL) -> None:
    queries, bank = gaussian(18, 4, 20), gaussian(19, 20, 20)
    with pytest.raises(ValueError, match="screen 'fp8' is not one of"):
        emulator.topk(emulated, queries, bank, 3, screen="fp8", path="mma")
    with pytest.raises(ValueError, match="no top-k path called 'tcgen05'"):
        emulator.topk(emulated, queries, bank, 3, screen="bf16", path="tcgen05")


# --------------------------------------------------------------------------------------------------
# What nvcc makes of it


@pytest.fixture(scope="module")
def cubins() -> dict[str, Finished]:
    """What nvcc said of each architecture."""
    return dict(zip(ARCHITECTURES, BESIDE.wait("cubins"), strict=True))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="there is no nvcc")
def test_kernels_fit_their_registers(cubins: dict[str, Finished]) -> None:
    """No spills, no local memory; on sm_90a wgmma and the tensor memory accelerator are used."""
    listed = ["nvcc", "--list-gpu-code"]
    known = subprocess.run(listed, check=True, capture_output=True, text=True).stdout.split()
    for architecture, (status, _, log) in cubins.items():
        if "sm_" + architecture.removesuffix("a") not in known:
            continue
        assert status == 0, log
        # "Potential Performance Loss: wgmma.mma_async instructions are serialized"
        assert "Performance Loss" not in log
        kernels = re.findall(
            r"Function properties for (\S+)\s+(\d+) bytes stack frame, (\d+) bytes spill stores.*?"
            r"Used (\d+) registers(.*?)$",
            log,
            re.DOTALL | re.MULTILINE,
        )
        assert len(kernels) == 13
        for name, stack, spilled, registers, rest in kernels:
            print(architecture, name, registers, "registers", rest)
            assert (stack, spilled) == ("0", "0"), name
    objdump = find_cuobjdump()
    if objdump is None:
        pytest.skip("there is no cuobjdump")
    code = subprocess.run(
        [objdump, "-sass", str(BESIDE.folder / "90a.cubin")],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    for instruction in ("HGMMA.64x256x16.F32.BF16", "IGMMA.64x256x32.S8.S8", "UTMALDG.2D"):
        assert instruction in code
    assert "STL" not in code


def find_cuobjdump() -> str | None:
    """In the PATH, or the one in Triton's wheel."""
    found = shutil.which("cuobjdump")
    triton = importlib.util.find_spec("triton")
    if found is None and triton is not None and triton.origin is not None:
        bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        return str(bundled) if bundled.exists() else None
    return found


# --------------------------------------------------------------------------------------------------
# The Python side


def test_limits_are_told() -> None:
    with pytest.raises(ConfigError, match="k <= 2048 and D <= 4096, not k=2049 and D=3"):
        topk_cuda(torch.zeros(2, 3), torch.zeros(2, 3), 2049, 0.0)
    with pytest.raises(ConfigError, match="not k=1 and D=4097"):
        topk_cuda(torch.zeros(2, 4097), torch.zeros(2, 4097), 1, 0.0)
    with pytest.raises(ConfigError, match="screen='fp8' is not known; allowed: int8, bf16"):
        topk_cuda(torch.zeros(2, 3), torch.zeros(2, 3), 1, 0.0, screen="fp8")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_the_probe_tells_what_is_missing() -> None:
    assert probe_cuda() in (
        "pymcip was built without a CUDA compiler; build it where nvcc works",
        "torch sees no CUDA device",
    )


# --------------------------------------------------------------------------------------------------
# On a GPU

MISSING = probe_cuda() if torch.cuda.is_available() else "torch sees no CUDA device"
ON_GPU = pytest.mark.skipif(
    not torch.cuda.is_available() or not hasattr(_core, "topk_cuda"), reason=str(MISSING)
)


def on_gpu(
    queries: Any, bank: Any, k: int, threshold: float = -np.inf, **options: Any
) -> tuple[Any, Any]:
    """With the bank on the GPU too, unless on_host; keeps torch's strides, NumPy's are copied."""
    path = options.get("path")
    if path is not None and path not in _core.topk_cuda_paths(0):
        pytest.skip(f"this GPU has no path called {path}")
    host, ahead = options.pop("on_host", False), options.pop("packed_ahead", False)
    queries = torch.as_tensor(np.array(queries)) if isinstance(queries, np.ndarray) else queries
    if not host:
        bank = torch.as_tensor(np.array(bank)) if isinstance(bank, np.ndarray) else bank
        bank = bank.cuda()
    if ahead:
        precision = "bfloat16" if options["screen"] == "bf16" else "int8"
        bank = PackedBank.pack(bank, precision=precision)
    return topk_cuda(queries.cuda(), bank, k, threshold, **options)


@pytest.mark.gpu
@ON_GPU
def test_the_self_check_passes() -> None:
    assert probe_cuda() is None


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("name", CASES)
def test_ranking_is_canonical(name: str, screen: str, path: str) -> None:
    case = CASES[name]
    queries, bank = case.make()
    limits = {"capacity": 256, **case.options}
    host = limits.pop("on_host", False)
    wanted = canonical_topk(queries, bank, case.k, case.threshold)
    for ahead in (False, True) if name in AHEAD else (False,):
        result = on_gpu(
            queries, bank, case.k, case.threshold, screen=screen, path=path,
            on_host=host, packed_ahead=ahead, limits=limits,
        )  # fmt: skip
        assert_same(result, wanted)


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, screen: str) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        queries, bank = (
            laid_out(bf16(30, rows, 72).to("cuda", dtype), layout) for rows in (130, 3000)
        )
        wanted = canonical_topk(queries, bank, 6)
        for ahead in (False, True):
            assert_same(on_gpu(queries, bank, 6, screen=screen, packed_ahead=ahead), wanted)


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("precision", ["int8", "bfloat16"])
def test_a_bank_packed_on_the_gpu(precision: str, tmp_path: Path) -> None:
    rows = gaussian(29, 3000, 200)
    bank = torch.from_numpy(rows).cuda()
    packed = PackedBank.pack(bank, precision=precision)
    assert packed.rows is bank
    assert packed.to("cuda") is packed.to(bank.device) is packed
    assert (packed.precision, packed.device, len(packed)) == (precision, bank.device, 3000)
    assert 0 < packed.nbytes - 3000 * (16 + {"int8": 256, "bfloat16": 512}[precision]) < 2048
    again = PackedBank.load(packed.save(tmp_path / "bank"))
    assert again.device.type == packed.to("cpu").device.type == "cpu"
    parts = [packed, PackedBank.pack(rows[:50]), bank[:50], again.to("cuda", precision=precision)]
    whole = np.concatenate([rows, rows[:50], rows[:50], rows])
    for given, ranked in ((packed, rows), (parts, whole)):
        for backend in ("auto", "torch"):
            result = topk(bank[:9], given, 7, backend=backend)
            assert_same(result, canonical_topk(rows[:9], ranked, 7))
    with pytest.raises(ConfigError, match="the bank is on cuda:0 and the queries are on cpu"):
        topk(rows[:9], packed, 7)


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("screen", SCREENS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_problems(screen: str, path: str, dtype: torch.dtype) -> None:
    """Clustered rows, every chunk and tile seam; torch ranks in fp64, the first rows canonically."""
    generator = torch.Generator(device="cuda").manual_seed(0)
    centres = torch.randn(2000, 512, generator=generator, device="cuda")
    bank = centres.repeat(101, 1)[:201_001]
    bank = (bank + 0.7 * torch.randn(bank.shape, generator=generator, device="cuda")).to(dtype)
    queries = bank[::401] + 0.3 * centres[: len(bank[::401])].to(dtype)
    ids, scores = on_gpu(queries, bank, 64, screen=screen, path=path)
    exact = queries.double() @ bank.double().T
    best = exact.topk(65, dim=1)
    # Where neighbours are apart by more than fp32 rounding of either, the order is certain.
    rounding = 2.0**-23 * best.values.abs()
    apart = (best.values[:, :-1] - best.values[:, 1:]) > rounding[:, :-1]
    certain = apart[:, :64].clone()
    certain[:, 1:] &= apart[:, :63]
    assert certain.float().mean() > 0.99
    assert torch.equal(ids[certain], best.indices[:, :64][certain])
    assert ((scores.double() - exact.gather(1, ids)).abs() <= rounding[:, :64]).all()
    assert_same((ids[:20], scores[:20]), canonical_topk(queries[:20], bank, 64))


@pytest.mark.gpu
@ON_GPU
def test_all_paths_and_kinds_of_bank_agree(tmp_path: Path) -> None:
    queries, bank = gaussian(20, 700, 300), gaussian(21, 60_000, 300)
    np.save(tmp_path / "bank.npy", bank)
    banks = {
        "device": torch.from_numpy(bank).cuda(),
        "NumPy": bank,
        "memory map": np.load(tmp_path / "bank.npy", mmap_mode="r"),
        "pinned": torch.from_numpy(bank).pin_memory(),
        "columns first": torch.from_numpy(np.ascontiguousarray(bank.T)).cuda().T,
    }
    wanted = on_gpu(queries, bank, 20, 20.0, screen="bf16", path="mma128")
    for kind, given in banks.items():
        for screen in SCREENS:
            for path in _core.topk_cuda_paths(0):
                found = on_gpu(
                    queries, given, 20, 20.0, screen=screen, path=path, on_host=True, threads=4,
                    limits={"packed_bytes": 8 << 20, "raw_bytes": 8 << 20},
                )  # fmt: skip
                assert torch.equal(found[0], wanted[0]), (kind, screen, path)
                assert torch.equal(found[1], wanted[1]), (kind, screen, path)


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("screen", SCREENS)
def test_screens_own_scores(screen: str) -> None:
    queries, bank = gaussian(16, 90, 100), gaussian(17, 5000, 100)
    for path in _core.topk_cuda_paths(0):
        ids, scores = on_gpu(queries, bank, 12, 3.0, screen=screen, path=path, exact=False)
        check_rough(ids.cpu().numpy(), scores.cpu().numpy(), queries, bank, 3.0)


@pytest.mark.gpu
@ON_GPU
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
@pytest.mark.parametrize("screen", SCREENS)
def test_bad_rows_are_named(screen: str, value: float) -> None:
    queries, bank = gaussian(18, 140, 20), gaussian(19, 30_000, 20)
    bank[[20_801, 20_700], 3] = value
    for ahead in (False, True):
        with pytest.raises(DataError, match="row 20700 of bank"):
            on_gpu(queries, bank, 3, screen=screen, packed_ahead=ahead)
    queries[[139, 130], 5] = value
    with pytest.raises(DataError, match="row 130 of queries"):
        on_gpu(queries, bank, 3, screen=screen)


@pytest.mark.gpu
@ON_GPU
def test_it_runs_in_torchs_stream() -> None:
    queries, bank = gaussian(22, 200, 64), gaussian(23, 20_000, 64)
    wanted = on_gpu(queries, bank, 5)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)  # what is queued before must be over first
        late = torch.zeros(20_000, 64, device="cuda")
        late += torch.from_numpy(bank).cuda()
        found = topk_cuda(torch.from_numpy(queries).cuda(), late, 5, -np.inf)
        torch.cuda._sleep(50_000_000)
        later = late.clone()
        packed = PackedBank.pack(later)
    again = topk_cuda(torch.from_numpy(queries).cuda(), packed, 5, -np.inf)
    assert torch.equal(found[0], wanted[0])
    assert torch.equal(again[0], wanted[0])


@pytest.mark.gpu
@ON_GPU
def test_memory_is_bounded() -> None:
    queries = torch.randn(10_000, 768, device="cuda")
    bank = torch.randn(400_000, 768).half()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    reports: list[tuple[int, int]] = []
    topk_cuda(queries, bank, 10, -np.inf, threads=4, progress=lambda *r: reports.append(r))
    assert torch.cuda.max_memory_allocated() - before < 1.2 * 2**30
    assert all(0 <= done <= total == 10_000 * 400_000 for done, total in reports)


class StopSearchError(Exception):
    pass


@pytest.mark.gpu
@ON_GPU
def test_progress_can_stop_the_search() -> None:
    queries, bank = torch.randn(20_000, 512, device="cuda"), torch.randn(100_000, 512)
    bank = bank.repeat(16, 1)  # the copies alone take longer than the first report

    def stop(done: int, total: int) -> None:
        raise StopSearchError

    with pytest.raises(StopSearchError):
        topk_cuda(queries, bank, 10, -np.inf, progress=stop)
    assert_same(
        on_gpu(queries[:9], bank[:999], 3), canonical_topk(queries[:9].cpu(), bank[:999], 3)
    )

"""The CUDA path without a GPU: the kernels compiled for each, and run on the CPU under tests/gpu/emulation."""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import math
import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from predictor.checkpoints.load import load_gpt2
from predictor.engine.params import SamplingParams
from predictor.engine.philox import uniform
from predictor.engine.sampler import sample
from predictor.model.cuda import build, library
from predictor.model.cuda.graphs import DecodeRow, DecodeSteps, bucket_sizes
from predictor.model.cuda.library import Kernels, load_kernels
from predictor.model.cuda.sampling import MOST_CANDIDATES, Draw, Method, choose
from predictor.model.gpt2 import GPT2, Rows, Span
from predictor.model.kernels import DEVICE_ROWS, DeviceLinear, activate
from tests.conftest import ROOT, left_out
from tests.test_sampler import Row

CPU = torch.device("cpu")
HALVES = [torch.float16, torch.bfloat16]


# ------------------------------------------------------------------------------------------------ compiled

# Each source, and the kernels in it that a host would ask for.
KERNELS = {
    "decode_attention.cu": [
        f"decode_attention_kernel<{number}, {width}>" for number in ("float", "__half", "Bfloat16") for width in (0, 64)
    ],
    "add_norm.cu": [f"add_norm_kernel<{number}>" for number in ("float", "__half", "Bfloat16")],
    "uniform.cu": ["uniform_kernel"],
}


def nvidia_folder(package: str) -> Path:
    """Where a wheel of NVIDIA's lies."""
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / package).is_dir():
            return Path(folder) / package
    left_out(f"{package} of CUDA 12.6 is not installed: the kernels are not compiled for V100")
    raise AssertionError


def compiled(source: str, architecture: int) -> bytes:
    """The machine code of a source by NVRTC, CUDA's compiler as a library; 12.6 is the last with V100 (sm_70)."""
    headers = nvidia_folder("cuda_runtime") / "include"
    folder = nvidia_folder("cuda_nvrtc") / "lib"
    ctypes.CDLL(str(next(folder.glob("libnvrtc-builtins.so.*"))), mode=ctypes.RTLD_GLOBAL)
    nvrtc = ctypes.CDLL(str(folder / "libnvrtc.so.12"))
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    text = (build.FOLDER / source).read_bytes()
    assert not nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.encode(), 0, None, None)
    for name in KERNELS[source]:
        assert not nvrtc.nvrtcAddNameExpression(program, name.encode())
    options = [f"--gpu-architecture=sm_{architecture}", "--std=c++17", f"-I{build.FOLDER}", f"-I{headers}"]
    status = nvrtc.nvrtcCompileProgram(
        program, len(options), (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    )
    nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetProgramLog(program, log)
    assert status == 0, log.value.decode()
    assert log.value == b"", "a warning"
    nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetCUBIN(program, code)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw


@pytest.mark.parametrize("architecture", build.ARCHITECTURES)
@pytest.mark.parametrize("source", KERNELS)
def test_kernels_compile_for_each_gpu(source: str, architecture: int) -> None:
    code = compiled(source, architecture)
    assert code.startswith(b"\x7fELF")
    for name in KERNELS[source]:
        assert name.split("<")[0].encode() in code


def test_no_source_is_forgotten() -> None:
    assert [path.name for path in build.sources()] == sorted(KERNELS)


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own for what is built."""
    for path in [*build.sources(), build.FOLDER / "common.cuh", build.FOLDER / "build.py"]:
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    return tmp_path


def test_the_librarys_name_follows_the_sources(copied: Path) -> None:
    names = {build.library_path()}
    for path in [*build.sources(), copied / "common.cuh", copied / "build.py"]:
        path.write_text(path.read_text() + "\n")
        names.add(build.library_path())
    assert len(names) == 3 + len(build.sources())


def test_build_gives_nvcc_every_architecture_and_removes_what_is_stale(copied: Path) -> None:
    nvcc = copied / "nvcc"
    nvcc.write_text('#!/bin/sh\nfor last; do :; done\necho "$@" > "$last"\n')
    nvcc.chmod(0o755)
    (copied / "build").mkdir()
    stale = copied / "build" / "kernels-0.so"
    stale.write_text("old")
    path = build.build(str(nvcc), [90, 70])
    assert path == build.library_path()
    arguments = path.read_text()
    for expected in ("compute_70,code=sm_70", "compute_90,code=sm_90", "compute_90,code=compute_90", *KERNELS):
        assert expected in arguments
    assert build.libraries() == [path]


def test_without_the_library_a_line_says_what_to_do(copied: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    assert load_kernels(CPU, 64, 768) is None
    assert "not built; run python -m predictor.model.cuda.build" in caplog.text
    (copied / "build").mkdir()
    (copied / "build" / "kernels-0.so").write_text("old")
    assert load_kernels(CPU, 64, 768) is None
    assert "kernels-0.so was built from other sources" in caplog.text
    build.library_path().write_text("no library")
    assert load_kernels(CPU, 64, 768) is None
    assert "invalid ELF header" in caplog.text or "file too short" in caplog.text


# ------------------------------------------------------------------------------------------------ emulated


@pytest.fixture(scope="session")
def emulated_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same sources compiled for the CPU, with CUDA's words from tests/gpu/emulation."""
    if not shutil.which("c++"):
        left_out("no C++ compiler: the CUDA kernels are not run on the CPU")
    path = tmp_path_factory.mktemp("emulated") / "kernels.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", f"-I{ROOT / 'tests/gpu/emulation'}"]
    command = ["c++", *flags, "-x", "c++", *map(str, build.sources()), "-o", str(path)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return path


@pytest.fixture(params=["forwards", "backwards"])
def kernels(request: pytest.FixtureRequest, emulated_library: Path) -> Iterator[Kernels]:
    """Threads and blocks in both orders: a result that depends on it lacks a barrier."""
    emulation = ctypes.CDLL(str(emulated_library))
    emulation.emulate_backwards(request.param == "backwards")
    yield Kernels(emulated_library)
    emulation.emulate_backwards(0)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def reference(query: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One query [H, D] over keys and values [T, H, D], in fp64."""
    scores = torch.einsum("hd,thd->ht", query.double(), keys.double()) * scale
    return torch.einsum("ht,thd->hd", scores.softmax(-1), values.double())


CONTEXTS = [1, 2, 5, 31, 127, 128, 129, 256, 300]


class Memory:
    """Sequences of given lengths in a KV memory that is NaN wherever no kernel may read."""

    def __init__(self, contexts: list[int], H: int, D: int, dtype: torch.dtype) -> None:
        self.contexts, self.H, self.D = contexts, H, D
        self.qkv = randn(len(contexts) + 3, 3, H, D, seed=1, dtype=dtype)
        self.qkv[len(contexts) :] = math.nan
        slots = sum(contexts) + 2 * len(contexts)
        self.keys, self.values = torch.full((2, slots, H, D), math.nan, dtype=dtype)
        self.first_slots, place = [], 1
        for number, context in enumerate(contexts):
            self.first_slots.append(place)
            live = slice(place, place + context - 1)  # the new token's slot is still unwritten
            self.keys[live] = randn(context - 1, H, D, seed=2 * number + 10, dtype=dtype)
            self.values[live] = randn(context - 1, H, D, seed=2 * number + 11, dtype=dtype)
            place += context + 2

    def attend(self, kernels: Kernels, scale: float, rows: slice = slice(None)) -> Tensor:
        contexts, first_slots = self.contexts[rows], self.first_slots[rows]
        qkv = self.qkv[: len(self.contexts)][rows].contiguous()
        workspace = kernels.workspace(len(contexts), self.H, self.D, max(contexts) + 200, CPU)
        workspace.partials.fill_(math.nan)
        out = torch.full((len(contexts) + 2, self.H, self.D), math.inf, dtype=self.qkv.dtype)
        positions = torch.tensor(contexts) - 1
        kernels.decode_attention(
            qkv, self.keys, self.values, torch.tensor(first_slots), positions, out, workspace, scale
        )
        assert not workspace.arrived.any(), "the counters must be ready for the next launch"
        assert out[len(contexts) :].isinf().all(), "nothing is written past the rows"
        return out[: len(contexts)]


@pytest.mark.parametrize("D", [64, 16, 24, 256])
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_decode_attention_is_the_formula(kernels: Kernels, dtype: torch.dtype, D: int) -> None:
    contexts = CONTEXTS if D == 64 else [1, 5, 128, 150]
    memory = Memory(contexts, 2, D, dtype)
    before = memory.keys.clone(), memory.values.clone()
    attended = memory.attend(kernels, 0.3)
    for row, (first, context) in enumerate(zip(memory.first_slots, contexts, strict=True)):
        query, new_key, new_value = memory.qkv[row]
        seen = slice(first, first + context)
        assert torch.equal(memory.keys[seen][-1], new_key)
        assert torch.equal(memory.values[seen][-1], new_value)
        wanted = reference(query, memory.keys[seen], memory.values[seen], 0.3)
        error = (attended[row].double() - wanted).abs().max()
        assert error <= {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype], f"context {context}"
        for now, then in zip((memory.keys, memory.values), before, strict=True):
            now[first + context - 1] = then[first + context - 1]
    for now, then in zip((memory.keys, memory.values), before, strict=True):
        assert torch.equal(now.nan_to_num(7), then.nan_to_num(7)), "only the new token's slot is written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_rows_attention_has_the_same_bits_in_any_company_and_order(
    emulated_library: Path, dtype: torch.dtype
) -> None:
    emulation, kernels = ctypes.CDLL(str(emulated_library)), Kernels(emulated_library)
    together = Memory(CONTEXTS, 2, 64, dtype).attend(kernels, 0.125)
    for backwards in (1, 0):
        emulation.emulate_backwards(backwards)
        for row in range(len(CONTEXTS)):
            alone = Memory(CONTEXTS, 2, 64, dtype).attend(kernels, 0.125, slice(row, row + 1))
            assert torch.equal(alone[0], together[row])


def test_attention_survives_large_scores_and_does_not_hide_nan(kernels: Kernels) -> None:
    memory = Memory([200, 200, 200], 1, 64, torch.float32)
    memory.qkv[0, 0] *= 1e4
    memory.keys[memory.first_slots[1] + 150] = math.nan
    attended = memory.attend(kernels, 1.0)
    assert attended[0].isfinite().all()
    assert attended[1].isnan().all()
    assert attended[2].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
@pytest.mark.parametrize("width", [1, 64, 768, 1600])
def test_add_norm_is_addition_and_layer_norm(kernels: Kernels, dtype: torch.dtype, width: int) -> None:
    weight, bias, y = randn(width, seed=1), randn(width, seed=2), randn(3, width, seed=3, dtype=dtype)
    x = randn(3, width, seed=4) * torch.tensor([[1.0], [100.0], [1.0]]) + torch.tensor([[0.0], [50.0], [1e-3]])
    for term in (y, None):
        given, out = x.clone(), torch.empty(3, width, dtype=dtype)
        kernels.add_norm(given, term, weight, bias, 1e-5, out)
        sum_of_both = x if term is None else x + term.float()
        assert torch.equal(given, sum_of_both)
        wanted = F.layer_norm(sum_of_both, (width,), weight, bias, 1e-5)
        tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
        torch.testing.assert_close(out.float(), wanted, rtol=tolerance, atol=tolerance)


def test_narrow_numbers_are_rounded_as_torch_rounds_them(kernels: Kernels) -> None:
    """Through add_norm of a single number, whose norm is its bias: ties, subnormals, overflow, infinities and NaN."""
    special = [
        0.0,
        -0.0,
        65504.0,
        65519.9,
        65520.0,
        1e-8,
        5.96e-8,
        2.98e-8,
        2.99e-8,
        6.1e-5,
        1 + 2**-11,
        1 + 3 * 2**-11,
    ]
    values = torch.cat([torch.tensor([*special, math.inf, -math.inf, math.nan, 3.4e38, 1.00390625]), randn(500) * 1e-3])
    for dtype in HALVES:
        for bias in values.split(100):
            out = torch.empty(1, len(bias), dtype=dtype)
            kernels.add_norm(torch.zeros(1, len(bias)), None, torch.zeros(len(bias)), bias, 1e-5, out)
            torch.testing.assert_close(out[0], bias.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_uniform_numbers_are_the_engines_bit_for_bit(kernels: Kernels) -> None:
    seeds = [0, 1, 2**32 - 1, 2**32, 2**63, 2**64 - 1, *range(1000, 1300)]
    counts = [0, 7, 2**31, 2**40, 1, 5, *range(300)]
    signed = torch.tensor([seed - 2**64 if seed >= 2**63 else seed for seed in seeds])
    drawn = kernels.uniform(signed, torch.tensor(counts))
    assert drawn.tolist() == uniform(seeds, counts).tolist()


def test_wide_models_are_refused_by_name(kernels: Kernels) -> None:
    assert kernels.refuses(64, 1600) is None
    assert "257" in (kernels.refuses(257, 1600) or "")
    assert "8193" in (kernels.refuses(64, 8193) or "")


def test_a_model_that_the_kernels_refuse_is_served_without_them(
    emulated_library: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "library_path", lambda: emulated_library)
    assert load_kernels(CPU, 64, 1600) is not None
    assert load_kernels(CPU, 512, 1024) is None
    assert "heads of 512 numbers are wider" in caplog.text


# ------------------------------------------------------------------------------------------------ sampling

V = 97


def device_tokens(logits: Tensor, params: list[SamplingParams], rows: list[Row]) -> list[int]:
    """As graphs.py does it: every method over all rows, each row keeps its own."""
    draws = [
        Draw(row.seed, len(row.output_ids), p.temperature, p.top_k, p.top_p)
        for p, row in zip(params, rows, strict=True)
    ]
    u = torch.tensor(uniform([draw.seed for draw in draws], [draw.count for draw in draws]).tolist()).double()
    top_k = torch.tensor([draw.top_k for draw in draws])
    temperature, top_p = (
        torch.tensor([getattr(draw, name) for draw in draws], dtype=torch.float64) for name in ("temperature", "top_p")
    )
    methods = [draw.method(logits.shape[-1]) for draw in draws]
    chosen = {method: choose(method, logits, u, top_k, temperature, top_p).tolist() for method in set(methods)}
    return [chosen[method][row] for row, method in enumerate(methods)]


@pytest.mark.parametrize("vocabulary", [3, V, 1000])
def test_device_sampler_draws_what_the_engine_draws(vocabulary: int) -> None:
    params = [
        SamplingParams(max_new_tokens=9, temperature=temperature, top_k=top_k, top_p=top_p)
        for temperature in (0.0, 0.7, 3.0, 1e-320)
        for top_k in (0, 1, 2, 50, MOST_CANDIDATES, MOST_CANDIDATES + 1, 96, 5000)
        for top_p in (1.0, 0.9, 0.3, 1e-9)
    ]
    rows = [Row(p, seed=i * 2**57 + i, output_ids=[1] * (i % 5)) for i, p in enumerate(params)]
    for seed in range(3):
        logits = randn(len(rows), vocabulary, seed=seed) * 3
        wanted = [drawn.token_id for drawn in sample(logits.clone(), rows)]
        assert device_tokens(logits, params, rows) == wanted


def test_every_method_is_used_where_it_belongs() -> None:
    def method(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, elsewhere: bool = False) -> Method:
        return Draw(0, 0, temperature, top_k, top_p, elsewhere).method(V)

    assert method(elsewhere=True) is Method.ELSEWHERE
    assert method(temperature=0, top_p=0.5) is Method.GREEDY
    assert method(top_k=MOST_CANDIDATES, top_p=0.5) is Method.CANDIDATES
    assert method(top_k=MOST_CANDIDATES + 1) is Method.SORTED
    assert method(top_p=0.5) is method(top_p=0.5, top_k=V) is Method.SORTED
    assert method() is method(top_k=V) is Method.VOCABULARY


# ------------------------------------------------------------------------------------------------ steps


@pytest.mark.parametrize(("most", "sizes"), [(1, [1]), (3, [1, 2, 3]), (64, [1, 2, 4, 8, 16, 24, 32, 48, 64])])
def test_bucket_sizes(most: int, sizes: list[int]) -> None:
    assert bucket_sizes(most) == sizes


def test_large_buckets_waste_at_most_a_third() -> None:
    assert bucket_sizes(300)[-5:] == [96, 128, 192, 256, 300]
    sizes = bucket_sizes(4096)
    assert sizes[-1] == 4096
    assert all(b <= 1.5 * a for a, b in pairwise(sizes[4:]))


def prefill(model: GPT2, kv: Tensor, ids: list[int], first_slot: int) -> Tensor:
    """Compute a prompt eagerly; the logits of its last token [V]."""
    rows = Rows(ids, [Span(0, len(ids), first_slot, len(ids))], [len(ids) - 1])
    return model.forward(rows, kv)[0]


def prompts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, 200, (3 + 7 * i,), generator=generator).tolist() for i in range(count)]


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> GPT2:
    return load_gpt2(checkpoint, torch.float32, CPU)


def test_a_decode_step_gives_the_logits_of_the_eager_forward(kernels: Kernels, model: GPT2) -> None:
    asked = prompts(3)
    kv, twin = model.new_kv(200), model.new_kv(200)
    steps = DecodeSteps(model, kernels, kv, most_rows=4, scratch_slot=199)
    rows = []
    for number, ids in enumerate(asked):
        for memory in (kv, twin):
            prefill(model, memory, ids, 40 * number)
        rows.append(DecodeRow(11 + number, len(ids), 40 * number, Draw()))
    launched = steps.launch(rows)  # three rows in the bucket of four
    for row, number in zip(rows, range(3), strict=True):
        wanted = model.forward(Rows([row.token_id], [Span(0, 1, row.first_slot, row.position + 1)], [0]), twin)
        torch.testing.assert_close(launched.logits[number], wanted[0], rtol=0, atol=1e-4)
    assert launched.result() == launched.logits.argmax(-1).tolist()
    for number, ids in enumerate(asked):
        seen = slice(40 * number, 40 * number + len(ids) + 1)
        torch.testing.assert_close(kv[:, :, seen], twin[:, :, seen], rtol=0, atol=1e-5)


def test_steps_chained_on_the_device_are_the_steps_taken_one_by_one(emulated_library: Path, model: GPT2) -> None:
    """Each step is launched before the one before it is read; one sequence ends on the way, and the rows move up."""
    kernels, asked, count = Kernels(emulated_library), prompts(3), 6
    draws = [Draw(), Draw(seed=3, temperature=0.8, top_k=20), Draw(seed=2**64 - 1, temperature=1.5, top_p=0.9)]

    def draw_at(number: int, i: int) -> Draw:
        draw = draws[number]
        return Draw(draw.seed, i, draw.temperature, draw.top_k, draw.top_p)

    def run(chained: bool) -> list[list[int]]:
        kv = model.new_kv(200)
        steps = DecodeSteps(model, kernels, kv, most_rows=4, scratch_slot=199)
        logits = torch.stack([prefill(model, kv, ids, 40 * number) for number, ids in enumerate(asked)])
        before, alive = steps.draw(logits, [draw_at(number, 0) for number in range(3)]), [0, 1, 2]
        tokens: list[list[int]] = [[], [], []]

        def read(launched_for: list[int]) -> None:
            for number, token in zip(launched_for, before.result(), strict=True):
                tokens[number].append(token)

        for i in range(1, count):
            if not chained:
                read(alive)
            next_alive = [number for number in alive if not (number == 1 and i >= 3)]
            rows = [
                DecodeRow(
                    0 if chained else tokens[number][-1],
                    len(asked[number]) + i - 1,
                    40 * number,
                    draw_at(number, i),
                    alive.index(number) if chained else None,
                )
                for number in next_alive
            ]
            launched = steps.launch(rows)
            if chained:
                read(alive)
            before, alive = launched, next_alive
        read(alive)
        return tokens

    one_by_one = run(chained=False)
    assert [len(each) for each in one_by_one] == [count, 3, count]
    assert run(chained=True) == one_by_one


def test_rows_drawn_elsewhere_are_left_alone_and_nan_is_told(emulated_library: Path, model: GPT2) -> None:
    steps = DecodeSteps(model, Kernels(emulated_library), model.new_kv(8), most_rows=4, scratch_slot=7)
    logits = randn(3, model.config.vocabulary)
    logits[1] = math.nan
    first = steps.draw(logits, [Draw(), Draw(), Draw(elsewhere=True)]).result()
    assert first[:2] == [int(logits[0].argmax()), -1]
    ids = steps.token_ids(torch.tensor([5, 6, 7]), torch.tensor([0, -1, 1]))
    assert ids.tolist() == [first[0], 6, 0], "a sample that is no token becomes one that can be computed"


@pytest.mark.parametrize("rows", [DEVICE_ROWS, 3 * DEVICE_ROWS])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", [None, "gelu_tanh", "relu"])
def test_products_in_parts_are_the_product(rows: int, bias: bool, activation: str | None) -> None:
    weight, x = randn(24, 48), randn(rows, 48, seed=1)
    given = randn(24, seed=2) if bias else None
    wanted = activate(F.linear(x, weight, given), activation)
    torch.testing.assert_close(DeviceLinear(weight, given, activation)(x), wanted, rtol=0, atol=1e-5)

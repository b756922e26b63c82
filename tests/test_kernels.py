import importlib.util
import itertools
import math
import shutil
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import library

from tests.common import HERE, assert_close, randn

NEEDS_GXX = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="emulation needs g++")


@pytest.fixture(scope="session")
def kernels() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("_dinov2_attention", HERE / "kernels/attention.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def qkv_and_grad(tokens: int, heads: int = 1, head_dim: int = 64, dtype=torch.bfloat16) -> list[torch.Tensor]:
    return [x.to(dtype) for x in randn(tokens, (tokens, 3, heads, head_dim), (tokens, heads, head_dim))]


def check_kernel(kernels, heads: int, runs, head_dim: int = 64, device: str = "cpu") -> None:
    for dtype in (torch.bfloat16, torch.float16):
        ours = kernels.compare(runs, heads, head_dim, dtype, device)[0]
        for what, pair in zip(("out", "dq", "dk", "dv"), ours):
            assert all(a <= b for a, b in zip(pair, kernels.tolerances(dtype, runs))), (what, pair, dtype)


def test_kernels_are_sources_only(kernels):
    """No Python package, no line over 120 columns, the same limit of runs on both sides."""
    files = {p.name: p.read_text() for p in (HERE / "kernels").iterdir() if p.is_file()}
    assert files.keys() == {"attention.cu", "attention.py", "hardware.h", "emulate.h"}
    assert [line for text in files.values() for line in text.splitlines() if len(line) > 120] == []
    assert f"MAX_RUNS = {kernels.MAX_RUNS};" in files["attention.cu"]


@NEEDS_GXX
@pytest.mark.parametrize("heads, runs, order", [
    (2, ([1, 2], [1, 2]), 0), (3, ([2, 1, 2], [7, 16, 37]), 1), (2, ([1, 0, 1], [50, 9, 33]), 2),
    (1, ([1, 1, 1], [63, 64, 65]), 0), (1, ([1, 2], [197, 37]), 1), (1, ([1], [257]), 2), (1, ([1], [290]), 0),
    pytest.param(1, ([1], [1370]), 2, marks=pytest.mark.slow)])
def test_kernels_emulated_equal_float64(kernels, heads, runs, order):
    """Forward and all gradients; the emulator reports races, wrong addresses and barriers besides, see emulate.h."""
    kernels.build_emulator()(order, 0)
    check_kernel(kernels, heads, runs)


@NEEDS_GXX
@pytest.mark.parametrize("head_dim", [32, pytest.param(128, marks=pytest.mark.slow)])
def test_kernels_emulated_other_head_widths(kernels, head_dim):
    kernels.build_emulator(head_dim)(2, 1)
    check_kernel(kernels, 2, ([1, 1, 1], [145, 37, 5]), head_dim)


@NEEDS_GXX
def test_kernels_emulated_lse_is_exact(kernels):
    """float32, so that not one key too many or too few hides behind the rounding of the output."""
    kernels.build_emulator()(0, 0)
    runs = ([1, 1, 1], [131, 37, 3])
    qkv = 3 * qkv_and_grad(171, 2)[0]
    lse = torch.ops.dinov2.attention(qkv, *runs, 0.125)[1]
    for part, x in zip(lse.split(runs[1], 1), qkv.double().split(runs[1])):
        scores = torch.einsum("nhd,mhd->hnm", x[:, 0], x[:, 1]) * 0.125
        assert_close(part, scores.logsumexp(-1), 1e-5)


@NEEDS_GXX
@pytest.mark.parametrize("runs", [([1, 2], [70, 21]), pytest.param(([1], [330]), marks=pytest.mark.slow)])
def test_kernels_emulated_same_bits_in_any_order_of_threads(kernels, runs):
    set_order, outs = kernels.build_emulator(), []
    for order, seed in ((0, 0), (1, 0), (2, 0), (2, 1)):
        set_order(order, seed)
        tokens = sum(b * n for b, n in zip(*runs))
        outs.append(kernels.output_and_gradients(kernels.attend, *qkv_and_grad(tokens, 2), runs))
    assert all(torch.equal(a, b) for other in outs[1:] for a, b in zip(outs[0], other))


@NEEDS_GXX
def test_kernels_extreme_values(kernels):
    """A softmax of scores in the hundreds, and NaN stays within its image."""
    kernels.build_emulator()(0, 0)
    qkv = torch.cat([40 * qkv_and_grad(33)[0], qkv_and_grad(33)[0]])
    exact = kernels.pytorch_attention(qkv.double(), [2], [33], 0.125)
    assert_close(kernels.attend(qkv, [2], [33], 0.125), exact, 0.01 * exact.abs().max().item())
    qkv[40] = math.nan
    out = kernels.attend(qkv, [2], [33], 0.125)
    assert out[:33].isfinite().all() and out[33:].isnan().all()


@NEEDS_GXX
@pytest.mark.slow
@pytest.mark.parametrize("before, after, symptom", [
    ("if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= valid)", "if (i / 4 * 8 + lane % 4 * 2 + i % 2 > valid)", "differs"),
    ("if (g * 16 < valid) {", "if (g * 16 + 16 < valid) {", "differs"),
    ("if (valid < TILE)", "if (valid < 0)", "differs"),
    ("int swizzle(int row) { return", "int swizzle(int row) { return 0 *", "bank conflict"),
    ("        sync_block();  // the step's keys", "        // the step's keys", "shared memory"),
    ("            sync_block();  // dS is complete", "            // dS is complete", "never written"),
    ("        copy_wait();\n        sync_block();", "        sync_block();", "before its copy was waited for"),
    ("step % 2 * TILE;\n        const Bits", "step * 0 * TILE;\n        const Bits", "before its copy"),
    ("row < valid ? row * stride + chunk * 8 : 0), row < valid", "row * stride + chunk * 8), true", "outside"),
    ("    sync_warp();  // all lanes have their queries", "    // all lanes have their queries", "race"),
    ("(tokens * heads + 3) / 4 * 4", "tokens * heads", "misaligned"),
    ("if (!first)", "if (false)", "differs"),
    ("ds[i / 4][n][i % 4] = p[i / 4][n][i % 4] * (ds", "ds[i / 4][n][i % 4] = p[i / 4][n][0] * (ds", "differs")])
def test_kernels_tests_see_mistakes(kernels, before, after, symptom, tmp_path, monkeypatch):
    """Each of these mistakes in attention.cu is found, by the numbers or by the emulator."""
    for name in ("attention.cu", "hardware.h", "emulate.h"):
        shutil.copy(HERE / "kernels" / name, tmp_path)
    text = (tmp_path / "attention.cu").read_text()
    assert text.count(before) >= 1
    (tmp_path / "attention.cu").write_text(text.replace(before, after))
    monkeypatch.setattr(kernels, "HERE", tmp_path)
    monkeypatch.setattr(kernels, "libraries", {})
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    kernels.build_emulator()(1, 0)
    found = ""
    for runs in (([1, 1], [37, 19]), ([1], [131]), ([1], [289])):
        try:
            check_kernel(kernels, 1, runs)
        except AssertionError:
            found += "differs "
        except RuntimeError as error:
            found += f"{error} "
    assert symptom in found


@NEEDS_GXX
def test_kernels_operators_are_known_to_pytorch(kernels):
    """opcheck: schema, fake, autograd; torch.compile without a break, with the same gradient."""
    kernels.build_emulator()(0, 0)
    qkv, grad = qkv_and_grad(7 + 2 * 3)
    runs = ([1, 2], [7, 3], 0.125)
    library.opcheck(torch.ops.dinov2.attention.default, (qkv.clone().requires_grad_(), *runs))
    out, lse = torch.ops.dinov2.attention(qkv, *runs)
    library.opcheck(torch.ops.dinov2.attention_backward.default, (grad, qkv, out, lse, *runs))
    whole = lambda x: kernels.attend(2 * x, *runs).sin()  # noqa: E731
    gradients = []
    for function in (whole, torch.compile(whole, fullgraph=True, backend="aot_eager")):
        leaf = qkv.clone().requires_grad_()
        function(leaf).backward(grad)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_kernels_operators_on_meta(kernels):
    qkv = torch.empty(43, 3, 2, 64, dtype=torch.float16, device="meta", requires_grad=True)
    out, lse = torch.ops.dinov2.attention(qkv, [1, 2], [37, 3], 0.125)
    assert out.shape == (43, 2, 64) and out.dtype == torch.float16 and not lse.requires_grad
    assert lse.shape == (2, 43) and lse.dtype == torch.float32
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("change, message", [
    (dict(qkv=torch.zeros(4, 3, 1, 64)), "takes bfloat16 or float16, not float32"),
    (dict(qkv=torch.zeros(4, 192).half()), r"qkv of shape \(T, 3, H, D\), not \(4, 192\)"),
    (dict(qkv=torch.zeros(4, 3, 1, 48).half()), "heads of width 32, 64, 128, not 48"),
    (dict(batches=[2, 1]), "takes 1 to 16 runs of images, not"),
    (dict(batches=[1] * 17, lengths=[1] * 17), "takes 1 to 16 runs"),
    (dict(batches=[], lengths=[]), "takes 1 to 16 runs"),
    (dict(batches=[4], lengths=[0]), "not batches .4. and lengths .0."),
    (dict(lengths=[3]), r"batches \[2\] of lengths \[3\] are 6 tokens, qkv has 4"),
    (dict(scale=0.0), "a scale above 0, not 0.0")])
def test_kernels_refuse(kernels, change, message):
    arguments = dict(qkv=torch.zeros(4, 3, 1, 64).half(), batches=[2], lengths=[2], scale=0.125) | change
    with pytest.raises(ValueError, match=message):
        kernels.attend(*arguments.values())


def test_kernels_build_says_what_lacks(kernels, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(kernels, "libraries", {})
    wanted = r"no attention kernel yet for heads of width 64 on cpu: call build_emulator\(64\)"
    with pytest.raises(ValueError, match=wanted):
        kernels.attend(torch.zeros(4, 3, 1, 64).half(), [2], [2], 0.125)
    with pytest.raises(ValueError, match="heads of width 32, 64, 128, not 80"):
        kernels.build_kernels(80)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, and PyTorch sees none"):
        kernels.build_kernels()
    assert kernels.main([]) == 2 and capsys.readouterr().err.count("\n") == 1
    gpu = types.SimpleNamespace(name="Tesla V100", major=7, minor=0, shared_memory_per_block_optin=98304)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    with pytest.raises(ValueError, match=r"needs compute capability 8.0 \(A100\) or more, Tesla V100 has 7.0"):
        kernels.build_kernels()
    gpu.name, gpu.major, gpu.minor = "RTX", 8, 9
    with pytest.raises(ValueError, match="need 160 KB of shared memory per block, RTX has less"):
        kernels.build_kernels(128)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="needs nvcc"):
        kernels.build_kernels()
    with pytest.raises(ValueError, match="needs g\\+\\+"):
        kernels.build_emulator()
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho In file included from x; echo 'a.cu(1): error: no' >&2; exit 1\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"does not compile for sm_89: a.cu\(1\): error: no$"):
        kernels.build_kernels()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "nvcc"))
    with pytest.raises(ValueError, match="cannot be built in .*nvcc/dinov2_kernels: .*Not a directory"):
        kernels.build_kernels()


@pytest.mark.skipif(not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()), reason="needs nvcc")
@pytest.mark.slow
def test_kernels_compile_without_spills(kernels):
    """For A100 and H100: what does not fit the registers would go to memory. 163 KB is a block's share on the A100."""
    rows = kernels.resources()
    assert {(r["kernel"], r["dtype"], r["architecture"]) for r in rows} == set(itertools.product(
        ("forward", "backward, N > 64", "backward, N <= 64"), ("bfloat16", "float16"), ("sm_80", "sm_90")))
    assert [r for r in rows if r["spills"] or r["shared"] > 163 * 1024] == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu_equal_float64(kernels):
    kernels.build_kernels()
    for count, *runs in kernels.CASES + kernels.LARGE_CASES:
        check_kernel(kernels, count, runs, device="cuda")
    qkv = qkv_and_grad(3 * 37, 2)[0].cuda().requires_grad_()
    graph = torch.compile(lambda x: kernels.attend(x, [3], [37], 0.125), fullgraph=True)
    assert torch.equal(graph(qkv), kernels.attend(qkv, [3], [37], 0.125))

"""CUDA kernels for self-attention on packed crops (attention.cu). Optional: used only with `train.py --kernels`.

    python kernels/attention.py                  # on a GPU: build, compare with float64; `bench.py attention` times it
    python kernels/attention.py --emulate        # on any CPU: run the kernels thread by thread, compare with float64
    python kernels/attention.py --compile-only   # needs nvcc but no GPU: registers, spills, shared memory

    attend = build_kernels()                            # compiles once, within a minute; raises ValueError naming what
                                                        # is missing
    out = attend(qkv, [128, 512], [197, 37], scale)     # (T, 3, H, 64) -> (T, H, 64), T = 128 * 197 + 512 * 37

One call handles the crops of all sizes. In qkv, the output of the qkv layer as it is, images of the same length follow
each other; `batches` and `lengths` list these runs. The operator is torch.ops.dinov2.attention; it supports
torch.compile and autograd. bfloat16 and float16. Speed on a GPU: not yet measured. Apache License 2.0.
"""
import argparse
import ctypes
import fcntl
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, library
from tqdm import tqdm

HERE = Path(__file__).parent
HEAD_DIMS = (32, 64, 128)
MAX_RUNS = 16  # as in attention.cu
libraries = {}  # (device type, head dimension) -> library, filled by build_kernels() and build_emulator()

# ----------------------------------------------------------------------------------------------------------------------
# Building


def nvcc() -> str:
    """The path of the CUDA compiler. Raises ValueError if there is none."""
    candidates = [shutil.which("nvcc"), Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc")]
    found = [str(p) for p in candidates if p and Path(p).exists()]
    if not found:
        raise ValueError("the attention kernel needs nvcc, the compiler of the CUDA toolkit, which was not found: "
                         "install the toolkit or set CUDA_HOME")
    return found[0]


def compile_library(command: list[str], target: str) -> tuple[ctypes.CDLL, str]:
    """Compiles attention.cu with `command`. Returns the library and the compiler's output; both are cached in
    torch.hub's folder under a hash of sources and command. Raises ValueError with the compiler's first error."""
    source = HERE / "attention.cu"
    version = subprocess.run([command[0], "--version"], capture_output=True, text=True).stdout
    files = [source, HERE / "hardware.h", HERE / "emulate.h"]
    content = b"".join(f.read_bytes() for f in files) + repr((command, version)).encode()
    path = Path(torch.hub.get_dir(), "dinov2_kernels", f"attention_{hashlib.sha256(content).hexdigest()[:16]}.so")
    log, partial = path.with_suffix(".log"), path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # one process compiles, the others wait
            if not path.exists():
                with tqdm(total=1, desc=f"compiling for {target}", disable=not sys.stderr.isatty()) as bar:
                    done = subprocess.run([*command, "-o", str(partial), str(source)], capture_output=True, text=True)
                    bar.update()
                output = done.stdout + done.stderr
                if done.returncode:
                    lines = output.strip().splitlines() or ["no reason given"]
                    first = next((line for line in lines if "error" in line.lower()), lines[0])
                    raise ValueError(f"the attention kernel does not compile for {target}: {first.strip()}")
                log.write_text(output)
                partial.replace(path)
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise ValueError(f"the attention kernel cannot be built in {path.parent}: {error}") from None
    library.attention_error.restype = ctypes.c_char_p
    library.attention_scratch.restype = ctypes.c_int64
    return library, log.read_text()


def nvcc_command(architectures: list[str], head_dim: int, long_warps: int = 8) -> list[str]:
    codes = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in architectures]
    return [nvcc(), "-std=c++17", "-O3", *codes, "-Xptxas=-v", "-Xcompiler=-fPIC", "-shared",
            f"-DHEAD_DIM={head_dim}", f"-DLONG_WARPS={long_warps}"]


def build_kernels(head_dim: int = 64):
    """Compiles the kernels for the current GPU, if necessary, and returns attend(). Raises ValueError, in one line, if
    GPU, toolkit or head dimension do not allow it."""
    check_head_dim(head_dim)
    if not torch.cuda.is_available():
        raise ValueError("the attention kernel needs an NVIDIA GPU, and PyTorch sees none")
    if torch.version.hip:
        raise ValueError("the attention kernel is for NVIDIA GPUs, not AMD's")
    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    if gpu.major < 8:
        raise ValueError(f"the attention kernel needs compute capability 8.0 (A100) or more, {gpu.name} has "
                         f"{gpu.major}.{gpu.minor}")
    large = gpu.shared_memory_per_block_optin >= 160 * 1024
    if head_dim == 128 and not large:
        raise ValueError(f"heads of width 128 need 160 KB of shared memory per block, {gpu.name} has less")
    if ("cuda", head_dim) not in libraries:
        architecture = f"sm_{gpu.major}{gpu.minor}"
        command = nvcc_command([architecture], head_dim, 8 if large else 4)
        libraries["cuda", head_dim] = compile_library(command, architecture)[0]
    return attend


def build_emulator(head_dim: int = 64):
    """Likewise for tensors on the CPU: very slow, to check the kernels without a GPU. Returns the function
    emulate_order(order, seed), which sets the order of the threads: 0 forward, 1 reversed, 2 random. Raises ValueError
    if there is no C++ compiler."""
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise ValueError("the emulator needs g++, which was not found")
    command = [compiler, "-std=c++17", "-O1", "-U_FORTIFY_SOURCE", "-fPIC", "-shared", "-w", "-x", "c++"]
    libraries["cpu", head_dim], _ = compile_library([*command, f"-DHEAD_DIM={head_dim}"], "the emulator")
    return libraries["cpu", head_dim].emulate_order


# ----------------------------------------------------------------------------------------------------------------------
# The operators


def check_head_dim(head_dim: int) -> None:
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"the attention kernel takes heads of width {', '.join(map(str, HEAD_DIMS))}, not {head_dim}")


def check_arguments(qkv: Tensor, batches: list[int], lengths: list[int], scale: float) -> None:
    """Raises ValueError for arguments that the kernels do not support."""
    if qkv.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"the attention kernel takes bfloat16 or float16, not {str(qkv.dtype)[6:]}")
    if qkv.ndim != 4 or qkv.shape[1] != 3:
        raise ValueError(f"the attention kernel takes qkv of shape (T, 3, H, D), not {tuple(qkv.shape)}")
    check_head_dim(qkv.shape[3])
    if len(batches) != len(lengths) or not 1 <= len(lengths) <= MAX_RUNS or min(lengths) < 1 or min(batches) < 0:
        raise ValueError(f"the attention kernel takes 1 to {MAX_RUNS} runs of images, not batches {list(batches)} and "
                         f"lengths {list(lengths)}")
    tokens = sum(b * n for b, n in zip(batches, lengths))
    if tokens != qkv.shape[0]:
        raise ValueError(f"batches {list(batches)} of lengths {list(lengths)} are {tokens} tokens, qkv has "
                         f"{qkv.shape[0]}")
    if not scale > 0:
        raise ValueError(f"the attention kernel takes a scale above 0, not {scale}")
    if tokens >= 2**31 or max(lengths) * math.prod(qkv.shape[1:]) >= 2**31:  # indices are 32-bit
        raise ValueError(f"{tokens} tokens in images of up to {max(lengths)} are too many for the attention kernel")


def launch(name: str, tensors: list[Tensor], batches: list[int], lengths: list[int], scale: float) -> None:
    """Launches the kernels on the current stream of the tensors' device. The first tensor of 4 dimensions is qkv."""
    qkv = next(t for t in tensors if t.ndim == 4)
    heads, head_dim = qkv.shape[2:]
    library = libraries.get((qkv.device.type, head_dim))
    if library is None:
        raise ValueError(f"there is no attention kernel yet for heads of width {head_dim} on {qkv.device.type}: call "
                         f"{'build_emulator' if qkv.device.type == 'cpu' else 'build_kernels'}({head_dim}) first")
    runs = [(ctypes.c_int * len(lengths))(*numbers) for numbers in (batches, lengths)]
    pointers = [ctypes.c_void_p(t.data_ptr()) for t in tensors]
    arguments = [*pointers, *runs, len(lengths), heads, ctypes.c_float(scale), int(qkv.dtype == torch.bfloat16)]
    if qkv.device.type == "cpu":
        library.emulate_tensor(None, ctypes.c_int64(0))
        for pointer, t in zip(pointers, tensors):
            library.emulate_tensor(pointer, ctypes.c_int64(t.nbytes))
        error = getattr(library, name)(*arguments, None)
    else:
        with torch.cuda.device(qkv.device):
            error = getattr(library, name)(*arguments, ctypes.c_void_p(torch.cuda.current_stream().cuda_stream))
    if error:
        raise RuntimeError(f"{name}: {library.attention_error(error).decode()}")


@library.custom_op("dinov2::attention", mutates_args=())
def attention(qkv: Tensor, batches: list[int], lengths: list[int], scale: float) -> tuple[Tensor, Tensor]:
    """qkv (T, 3, H, D) -> out (T, H, D) and the log-sum-exp of the scores (H, T), float32."""
    check_arguments(qkv, batches, lengths, scale)
    qkv = qkv.contiguous()
    out, lse = empty_outputs(qkv)
    launch("attention_forward", [qkv, out, lse], batches, lengths, scale)
    return out, lse


@library.custom_op("dinov2::attention_backward", mutates_args=())
def attention_backward(grad_out: Tensor, qkv: Tensor, out: Tensor, lse: Tensor, batches: list[int], lengths: list[int],
                       scale: float) -> Tensor:
    """The gradient with respect to qkv (T, 3, H, D), given that with respect to out (T, H, D)."""
    check_arguments(qkv, batches, lengths, scale)
    tensors = [t.contiguous() for t in (grad_out, qkv, out, lse)]
    tokens, _, heads, head_dim = qkv.shape
    runs = [(ctypes.c_int * len(lengths))(*numbers) for numbers in (batches, lengths)]
    library = libraries.get((qkv.device.type, head_dim))
    size = library.attention_scratch(*runs, len(lengths), heads) if library else 0  # without one, launch() raises
    scratch = qkv.new_empty(size, dtype=torch.float32)
    dqkv = torch.empty_like(tensors[1])
    launch("attention_backward", [*tensors, scratch, dqkv], batches, lengths, scale)
    return dqkv


def empty_outputs(qkv: Tensor) -> tuple[Tensor, Tensor]:
    tokens, _, heads, head_dim = qkv.shape
    return qkv.new_empty(tokens, heads, head_dim), qkv.new_empty(heads, tokens, dtype=torch.float32)


@attention.register_fake
def fake_attention(qkv, batches, lengths, scale):
    check_arguments(qkv, batches, lengths, scale)
    return empty_outputs(qkv)


@attention_backward.register_fake
def fake_attention_backward(grad_out, qkv, out, lse, batches, lengths, scale):
    return qkv.new_empty(qkv.shape)


def save_for_backward(ctx, inputs, output) -> None:
    qkv, ctx.batches, ctx.lengths, ctx.scale = inputs
    ctx.save_for_backward(qkv, *output)
    ctx.mark_non_differentiable(output[1])


def differentiate(ctx, grad_out, grad_lse):
    dqkv = torch.ops.dinov2.attention_backward(grad_out, *ctx.saved_tensors, ctx.batches, ctx.lengths, ctx.scale)
    return dqkv, None, None, None


attention.register_autograd(differentiate, setup_context=save_for_backward)


def attend(qkv: Tensor, batches: list[int], lengths: list[int], scale: float) -> Tensor:
    """Self-attention within each image: (T, 3, H, D) -> (T, H, D), for runs of `batches` images of `lengths` tokens.
    Raises ValueError for arguments that the kernels do not support, or if build_kernels() was not called."""
    return torch.ops.dinov2.attention(qkv, batches, lengths, scale)[0]


# ----------------------------------------------------------------------------------------------------------------------
# Comparison with float64


def pytorch_attention(qkv: Tensor, batches: list[int], lengths: list[int], scale: float) -> Tensor:
    """What attend() replaces: PyTorch's attention, run by run."""
    outs = []
    for run, b, n in zip(qkv.split([b * n for b, n in zip(batches, lengths)]), batches, lengths):
        q, k, v = run.unflatten(0, (b, n)).permute(2, 0, 3, 1, 4)  # each (B, H, N, D)
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        outs.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(outs) if len(outs) > 1 else outs[0]


def output_and_gradients(function, qkv: Tensor, grad: Tensor, runs) -> list[Tensor]:
    """[out, dq, dk, dv], each (T, H, D)."""
    qkv = qkv.detach().requires_grad_()
    out = function(qkv, *runs, qkv.shape[3] ** -0.5)
    out.backward(grad.to(out.dtype))
    return [out.detach(), *qkv.grad.unbind(1)]


def errors(actual: list[Tensor], exact: list[Tensor], runs) -> list[tuple[float, float]]:
    """For out, dq, dk and dv: (largest error, root mean square error), relative to the largest value and the root mean
    square of the exact tensor, of the worst run. NaN counts as infinite."""
    worst = []
    for a, e in zip(actual, exact):
        sizes = [b * n for b, n in zip(*runs) if b]
        pairs = []
        for x, y, dv in zip(a.double().split(sizes), e.split(sizes), exact[-1].split(sizes)):
            difference = (x - y).nan_to_num(nan=math.inf)
            floor = dv.abs().max() / 64  # images of one token have dq = dk = 0; dv gives the scale
            pairs.append((difference.abs().max() / torch.maximum(y.abs().max(), floor),
                          difference.square().mean().sqrt() / torch.maximum(y.square().mean().sqrt(), floor / 2)))
        worst.append((max(float(p[0]) for p in pairs), max(float(p[1]) for p in pairs)))
    return worst


def compare(runs, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> tuple[list, list]:
    """errors() of the kernels, and of PyTorch's attention in the same dtype, on random numbers."""
    generator = torch.Generator().manual_seed(sum(runs[1]))
    tokens = sum(b * n for b, n in zip(*runs))
    qkv = torch.randn(tokens, 3, heads, head_dim, generator=generator).to(device, dtype)
    grad = torch.randn(tokens, heads, head_dim, generator=generator).to(device, dtype)
    exact = output_and_gradients(pytorch_attention, qkv.double(), grad.double(), runs)
    return [errors(output_and_gradients(f, qkv, grad, runs), exact, runs) for f in (attend, pytorch_attention)]


def tolerances(dtype: torch.dtype, runs) -> tuple[float, float]:
    """How large errors() may be. Inputs, probabilities and outputs are each rounded by up to half an eps of the dtype,
    which mostly averages out in sums over many keys, but not over two or three."""
    eps = torch.finfo(dtype).eps
    return (eps, 0.5 * eps) if min(runs[1]) > 3 else (1.5 * eps, eps)


CASES = [(1, [1], [1]), (5, [3], [2]), (3, [2, 1, 2], [7, 16, 37]), (3, [1, 0, 1], [50, 9, 17]), (1, [1, 2], [64, 65]),
         (1, [1, 2], [197, 37]), (2, [1, 1], [33, 257]), (1, [1], [272]), (1, [1, 1], [273, 128])]  # heads and runs
LARGE_CASES = [(16, [64, 128], [197, 37]), (6, [4], [1370]), (1, [2], [4097]), (24, list(range(1, 17)), [37, 50] * 8)]


def compare_all(device: str, cases, set_order=None) -> bool:
    """Prints the largest and the root mean square error for each case and dtype, with those of PyTorch's attention in
    parentheses. Returns whether all are within tolerances()."""
    good = True
    for i, ((heads, *runs), dtype) in enumerate(tqdm([(c, d) for c in cases for d in (torch.bfloat16, torch.float16)],
                                                     desc="comparing", disable=None)):
        if set_order:
            set_order(i % 3, i)
        ours, theirs = compare(runs, heads, 64, dtype, device)
        fine = all(a <= b for pair in ours for a, b in zip(pair, tolerances(dtype, runs)))
        numbers = "  ".join(f"{n} {a[0]:.1e} {a[1]:.1e} ({b[0]:.1e} {b[1]:.1e})"
                            for n, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs))
        images = " + ".join(f"{b} x {n}" for b, n in list(zip(*runs))[:3])
        tqdm.write(f"{'ok   ' if fine else 'WRONG'} {str(dtype)[6:]:8} {heads:2} heads  {images:23} {numbers}")
        good &= fine
    return good


# ----------------------------------------------------------------------------------------------------------------------
# Registers, spills, shared memory


def resources(head_dim: int = 64, architectures=("sm_80", "sm_90")) -> list[dict]:
    """What each kernel needs according to ptxas: registers, spills, shared memory. Needs nvcc but no GPU."""
    library, output = compile_library(nvcc_command(list(architectures), head_dim), " and ".join(architectures))
    pattern = (r"Compiling entry function '(\S+)' for '(\w+)'.*?(\d+) bytes spill stores, (\d+) bytes spill loads.*?"
               r"Used (\d+) registers")
    rows = []
    for name, architecture, stores, loads, registers in re.findall(pattern, output, re.DOTALL):
        kernel = "forward" if "forward" in name else "backward, N > 64" if "ELi32E" in name else "backward, N <= 64"
        kind = ("forward", "backward, N > 64", "backward, N <= 64").index(kernel)
        rows.append(dict(kernel=kernel, dtype="bfloat16" if "BFloat16" in name else "float16",
                         architecture=architecture, threads=128 if kind == 2 else 256, registers=int(registers),
                         spills=int(stores) + int(loads), shared=library.attention_shared(kind)))
    return sorted(rows, key=lambda r: (r["architecture"], r["kernel"], r["dtype"]))


def print_table(rows: list[dict]) -> None:
    lines = [list(rows[0])] + [[str(v) for v in row.values()] for row in rows]
    widths = [max(map(len, column)) for column in zip(*lines)]
    print("\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines))


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--emulate", action="store_true", help="check the kernels on the CPU")
    parser.add_argument("--compile-only", action="store_true", help="print the registers and memory that they need")
    args = parser.parse_args(argv)
    try:
        if args.compile_only:
            for head_dim in HEAD_DIMS:
                print(f"heads of width {head_dim}; spills and shared memory in bytes per block")
                print_table(resources(head_dim))
            return 0
        if args.emulate:
            return 1 - compare_all("cpu", CASES, build_emulator())
        build_kernels()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 - compare_all("cuda", CASES + LARGE_CASES)


if __name__ == "__main__":
    sys.exit(main())

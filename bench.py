"""Benchmarks. Every performance figure in the README and docs/ names one of these commands, hardware and versions.

    python bench.py data          # images per second and core: each stage, a data-loading worker, the pipeline, and
                                  # torchvision's augmentations in the official order; --data: your own images
    python bench.py train         # training steps of ViT-S/16: images per second, FLOP/s relative to a matrix product,
                                  # memory, where the time goes; --profile trace.json: also a trace and slow operators
    python bench.py build         # main memory and seconds to build a new run, by each process under torchrun
    python bench.py heads         # only heads and losses, in chunks against all logits at once
    python bench.py attention     # attention on both crop sizes, by each backend of PyTorch and by kernels/attention.py
    python bench.py gpu           # all benchmarks for one GPU, in ten minutes; --list shows which
    python bench.py save          # the cost of saving and guarding a run of ViT-S/16, or of another --preset
    python bench.py scale         # ViT-S, B, L and g on 8, 32 and 256 GPUs: communication, time and memory, calculated;
                                  # --preset vitl14: one of them; --check: the memory against real steps on this CPU
    python bench.py knn           # exact k-NN against the matrix product alone, the official code's way, scikit-learn
    python bench.py logreg        # 45 values of C at once, against scikit-learn; --every 4: against every 4th of them
    python bench.py linear        # a step of the grid of 52 classifiers, against 52 modules and autograd
    python bench.py hub           # loading a file as large as ViT-g's, against reading its bytes; imports
    python bench.py dense         # a linear depth head: convolution before or after upsampling
    python bench.py m2f           # Mask2Former on ViT-g, 896x896 pixels: minutes on a CPU, 11 GB

`train`, `build`, `heads` and `attention` take all flags of train.py (--preset, --batch-size, --compile, ...); --json
prints the table as JSON. The alternatives of a table take turns, several times over, so that ratios hold on a noisy
machine too: compare those. `data` uses one core. GPU figures appear where there is a GPU. Apache License 2.0.
"""
import contextlib
import ctypes
import io
import itertools
import json
import math
import multiprocessing
import os
import platform
import random
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from argparse import Namespace
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms as T
from tqdm import tqdm

import data
import eval_knn
import eval_linear
import eval_logreg
import heads
import hub
import losses
import mask2former
import model
import train
import support.cli
import support.evaluation
import support.log
import support.parallel
import support.run
import support.saves
import support.sources


def measure(functions: dict, repeats: int, least: float = 0.5) -> dict[str, list[float]]:
    """{name: function} -> {name: seconds per call, `repeats` times}. The functions take turns; a turn lasts at least
    `least` seconds and starts with an untimed warm-up call, functions that take longer than that only in the first."""
    seconds = {name: [] for name in functions}
    for _, (name, function) in tqdm(itertools.product(range(repeats), functions.items()), disable=None,
                                    total=repeats * len(functions), desc="measuring", leave=False):
        if not seconds[name] or seconds[name][-1] < least:
            function()
        calls, start = 0, time.perf_counter()
        while not calls or time.perf_counter() - start < least:
            function()
            calls += 1
        seconds[name].append((time.perf_counter() - start) / calls)
    return seconds


def ratios(seconds: dict[str, list[float]], ratio: str = "times_ours", unit: str = "ms") -> list[dict]:
    """Rows of {way, unit, ratio}: median times, and medians of the ratios to the first way within each turn."""
    first, scale = next(iter(seconds.values())), dict(s=1, ms=1e3)[unit]
    return [{"way": name, unit: scale * statistics.median(times),
             ratio: statistics.median(t / f for t, f in zip(times, first))} for name, times in seconds.items()]


def synchronized(function, device: torch.device):
    """`function`, but returning only when the device has finished."""
    return function if device.type != "cuda" else lambda: (function(), torch.cuda.synchronize())[0]


def in_new_process(function, *args):
    """function(*args), called in a new process, so that its peak memory counts from zero. Raises ValueError if that
    process dies."""
    context = multiprocessing.get_context("forkserver")  # autograd, once used, does not survive a fork
    results = context.SimpleQueue()
    process = context.Process(target=send_result, args=(results, function, args))
    process.start()
    process.join()
    if process.exitcode:
        raise ValueError(f"the measured process ended with exit code {process.exitcode}; was there enough memory?")
    return results.get()


def send_result(results, function, args) -> None:
    results.put(function(*args))


def peak_memory(device: torch.device) -> float:
    """Peak memory in GB: of the tensors on a GPU, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    if sys.platform == "linux":  # ru_maxrss would include the peak of the parent process
        return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes on macOS


def reset_peak(device: torch.device) -> float:
    """Makes peak_memory() count from now on, on GPUs and on Linux, and returns it: the GB in use."""
    if device.type == "cuda":
        torch.cuda.init()
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # memory that is free but not returned would hide what is allocated next
        with contextlib.suppress(OSError):  # where /proc is read-only
            Path("/proc/self/clear_refs").write_text("5")
    return peak_memory(device)


def keep_memory(cfg: train.Config | None = None) -> None:
    """The allocator's settings of train.py, or without `cfg` those of its data-loading workers."""
    data.keep_memory(4 if cfg and cfg.activation_checkpointing != "none" else None)


def versions(device: torch.device) -> dict[str, str]:
    gpu = dict(gpu=torch.cuda.get_device_name(device)) if device.type == "cuda" else {}
    cpu = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
           if line.startswith("model name")] if sys.platform == "linux" else []
    return dict(torch=torch.__version__, torchvision=torchvision.__version__, python=platform.python_version(),
                cpu=(cpu or [platform.machine()])[0], cores=str(support.parallel.usable_cores())) | gpu


def show(rows: list[dict]) -> None:
    """Prints Markdown tables, one for each run of rows with the same columns."""
    for names, table in itertools.groupby(rows, key=tuple):
        print("| " + " | ".join(names) + " |\n|" + "---|" * len(names))
        for row in table:
            cells = [v if isinstance(v, str) else f"{v:,.{0 if abs(v) >= 10 else 2}f}" for v in row.values()]
            print("| " + " | ".join(cells) + " |")
        print()


def write_photos(folder: Path) -> None:
    """scikit-learn's two photographs as JPEG of 500 x 375 pixels, ImageNet's typical size."""
    from sklearn.datasets import load_sample_images

    for i, pixels in enumerate(load_sample_images().images):
        Image.fromarray(pixels).resize((500, 375), Image.Resampling.LANCZOS).save(folder / f"{i}.jpg", quality=90)


def one_device_config(preset: str, folder: Path, images: int) -> train.Config:
    """A preset with a batch for one device, on photographs written to `folder`; small data sets stay as they are."""
    cfg = train.Config(**train.PRESETS[preset])
    if preset in SMALL:
        return cfg
    write_photos(folder)
    return replace(cfg, batch_size=images, group_size=images, data=str(folder))


# ----------------------------------------------------------------------------------------------------------------------
# data


def official_pipeline() -> list:
    """torchvision transforms on Pillow images for the 2 + 8 crops of an image, in the official order and with the
    official code's effective probabilities."""
    def crop(size, scale, blur, solarize=0.0):
        return T.Compose([
            T.RandomResizedCrop(size, scale=scale, interpolation=T.InterpolationMode.BICUBIC), T.RandomHorizontalFlip(),
            T.RandomApply([T.ColorJitter(*data.JITTER)], p=0.8), T.RandomGrayscale(p=0.2),
            T.RandomApply([T.GaussianBlur(9, (0.1, 2.0))], p=blur), T.RandomSolarize(128, p=solarize), T.ToTensor(),
            T.Normalize(data.MEAN, data.STD)])

    return [crop(224, (0.32, 1.0), 0.0), crop(224, (0.32, 1.0), 0.9, 0.2)] + [crop(96, (0.05, 0.32), 0.5)] * 8


def bench_data(args, device: torch.device) -> list[dict]:
    """Rows of {stage, ms, images_per_s, times_official}, per image."""
    n, cfg = 64, train.Config(batch_size=64, group_size=64)
    with tempfile.TemporaryDirectory() as folder:
        if not args.data:
            write_photos(Path(folder))
        source = support.sources.open_source(args.data or folder)
        if isinstance(source, support.sources.InMemory):
            raise ValueError(f"--data {args.data} has no image files to decode; name a folder")
        batches = train.training_batches(cfg, source, 0, 1)
        steps, numbers, rng = itertools.count(), itertools.count(), random.Random(0)
        images = [source.image(source.pick(s, 0)) for s in range(n)]
        crops, official = batches[0], official_pipeline()

        def by_torchvision():
            with Image.open(io.BytesIO(source.encoded(source.pick(next(numbers), 0)))) as file:
                image = file.convert("RGB")
            return [transform(image) for transform in official]

        def cut(sizes):
            return [data.cut_crop(rng, image, size, scale) for image in images for size, scale in sizes]

        torch.set_num_threads(1)
        stages = {  # name: (function, images per call)
            "read and decode": (lambda: source.image(source.pick(next(numbers), 0)), 1),
            "2 global crops": (partial(cut, batches.crops[:2]), n),
            "8 local crops": (partial(cut, batches.crops[2:]), n),
            "worker: all of the above, masks, batch": (lambda: batches[next(steps)], n),
            "color, on the CPU": (lambda: data.prepare(crops, torch.device("cpu")), n),
            "worker and color, all on the CPU": (
                lambda: data.prepare(batches[next(steps)], torch.device("cpu")), n),
            "torchvision, official order": (by_torchvision, 1)}
        if device.type == "cuda":
            on_gpu = crops._replace(global_crops=crops.global_crops.to(device),
                                    local_crops=crops.local_crops.to(device))
            for name, augment in (("", data.augment), (", compiled",
                                                       torch.compile(data.augment_at_once))):
                def on_device(augment=augment):
                    data.prepare(on_gpu, device, augment=augment)
                    torch.cuda.synchronize()
                stages[f"color, on the GPU{name}"] = (on_device, n)
        seconds = measure({name: function for name, (function, _) in stages.items()}, args.repeats)
    seconds = {name: [t / stages[name][1] for t in times] for name, times in seconds.items()}
    official = seconds["torchvision, official order"]
    return [dict(stage=name, ms=1e3 * statistics.median(times), images_per_s=1 / statistics.median(times),
                 times_official=statistics.median(o / t for o, t in zip(official, times)))
            for name, times in seconds.items()]


# ----------------------------------------------------------------------------------------------------------------------
# save


def bench_save(args, device: torch.device) -> list[dict]:
    """Rows of {part, ms, % of 500 steps}: the cost of reliability, per step and per save. A save costs the wait until
    the state is copied, and the slowdown of the steps during which it is written."""
    preset = args.preset or "vits16_short"
    with tempfile.TemporaryDirectory() as folder:
        cfg = one_device_config(preset, Path(folder), 64 if device.type == "cuda" else 8)
        cfg = replace(cfg, out=f"{folder}/out", keep=1)
        training = TimedTraining(cfg, support.sources.open_source(args.data or cfg.data, cfg.in_chans), device)
        state, batches, lock = training.state, training.batches, support.run.OutputLock(Path(cfg.out))
        log = support.log.Log(Path(cfg.out) / "metrics.jsonl", 0, 0, {})
        make_checkpoint = partial(train.teacher_checkpoint, state.teacher, cfg, preset)
        saver = support.saves.Saver(cfg, state, make_checkpoint, lock, 0, [], lambda text: None)
        guard, flags = support.log.NonFinite(cfg, log, batches, saver), support.parallel.SharedFlags()
        batch = [training.prepare(batches[0])]

        def step() -> tuple[float, float]:
            """Seconds of a bare step, and of the checks that follow it."""
            begin = training.clock.now()
            metrics, finite = training.step(batch)
            middle = training.clock.now()
            guard.watch(0, finite, metrics)
            flags.share(False, saver.due(), bool(saver.hopeless()))
            return middle - begin, time.perf_counter() - middle

        bare, guards, stalls, extra, written = [], [], [], [], []
        for turn in tqdm(range(args.repeats + 1), disable=None, desc="measuring", leave=False):
            alone = [step() for _ in range(3)]
            saver.start(turn + 1, log.counters, [])
            beside = [step()]
            while saver.thread is not None:  # collected by saver.due() in a step
                beside.append(step())
            if turn:  # the first is warm-up
                bare += [t for t, _ in alone]
                guards += [t for _, t in alone]
                stalls.append(saver.stall)
                written.append(saver.seconds)
                extra.append(sum(t for t, _ in beside) - len(beside) * statistics.median(t for t, _ in alone))
        size = sum(f.stat().st_size for f in Path(cfg.out).rglob("*") if f.is_file())
        lock.release()
        train.dist.destroy_process_group()
    bare, guards, stalls, extra, written = (
        1e3 * statistics.median(times) for times in (bare, guards, stalls, extra, written))
    total = 500 * guards + stalls + max(extra, 0.0)
    return [{"part": name, "ms": ms, "% of 500 steps": 100 * cost / (500 * bare)} for name, ms, cost in (
        (f"a step of {preset}, batch {cfg.batch_size}", bare, bare),
        ("checks after a step: signals, non-finite numbers, shared flags", guards, 500 * guards),
        ("a save: wait until the state is copied", stalls, stalls),
        ("a save: slowdown of the steps while it is written", extra, max(extra, 0.0)),
        ("total, at --save-every 500", total, total),
        (f"for comparison: writing {size / 2**20:,.0f} MB in the background took", written, written))]


# ----------------------------------------------------------------------------------------------------------------------
# scale: the cost of training on many GPUs, calculated. These are all assumptions about the hardware.

PEAK, UTILIZATION = 989e12, 0.4  # bfloat16 FLOP/s of an H100, and the share of it that we aim at
NVLINK, NETWORK = 450e9, 50e9  # bytes per second and direction of one GPU, within and between machines
NVLINK_HOP, NETWORK_HOP = 2e-6, 4e-6  # latency in seconds from one GPU to the next
MACHINE = 8  # GPUs


def head_rows(cfg: train.Config, crops: int) -> dict[str, float]:
    """Rows per image in the forward pass of each head: CLS tokens of `crops` crops, masked patches of two."""
    patches = 2 * (cfg.global_crops_size // cfg.patch_size) ** 2
    masked = cfg.mask_sample_probability * patches * sum(cfg.mask_ratio_min_max) / 2 * (cfg.ibot_loss_weight > 0)
    return dict(dino_head=crops, ibot_head=masked) if cfg.ibot_separate_head else dict(dino_head=crops + masked)


@cache
def pass_flops(cfg: train.Config) -> tuple[float, float]:
    """FLOPs per image of a forward pass of the teacher and of the student: matrix products and attention, counting a
    multiply-add as two, as if there were no stochastic depth."""
    with torch.device("meta"):
        network = train.build_network(cfg).eval()

    def flops(module: nn.Module, *shape: int) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            module(torch.empty(shape, device="meta"))
        return counter.get_total_flops()

    n, sides = cfg.local_crops_number, (cfg.global_crops_size, cfg.local_crops_size)
    globals_, locals_ = (flops(network["backbone"], 1, cfg.in_chans, side, side) for side in sides)
    per_row = {name: flops(head, 1, network["backbone"].embed_dim) for name, head in network.items()
               if name != "backbone"}
    teacher, student = (sum(rows[name] * per_row[name] for name in rows.keys() & per_row.keys())
                        for rows in (head_rows(cfg, 2), head_rows(cfg, 2 + n)))
    return teacher + 2 * globals_, student + 2 * globals_ + n * locals_


def train_flops(cfg: train.Config) -> float:
    """Nominal FLOPs per image of a training step: the forward passes of teacher and student, and the student's backward
    pass as twice its forward pass. Recomputation for activation checkpointing does not count."""
    teacher, student = pass_flops(cfg)
    return teacher + 3 * student


class StorageTracker(TorchDispatchMode):
    """Records the storages that are allocated while it is active. `bytes()` counts those still alive, such as what
    autograd has saved for the backward pass."""

    def __init__(self):
        super().__init__()
        self.storages = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and (key := t.untyped_storage()._cdata) not in given:  # views are not new
                self.storages[key] = StorageWeakRef(t.untyped_storage()), t.untyped_storage().nbytes()
        return result

    def bytes(self) -> int:
        return sum(size for storage, size in self.storages.values() if not storage.expired())


def saved_bytes(function) -> int:
    """Bytes that the result of function() keeps alive: its own, and what autograd saved for the backward pass."""
    with StorageTracker() as tracker:
        result = function()
        size = tracker.bytes()
    del result
    return size


def attention_on_meta(q, k, v, scale: float):
    """Saves what the fused kernels save; the meta device would otherwise pick an implementation that saves more."""
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)[0]


@cache
def block_bytes(cfg: train.Config, images: int, dtype: torch.dtype) -> dict[str, int]:
    """{--activation-checkpointing: bytes that one block of the student saves for the backward pass}, found on the meta
    device."""
    saved, sides = {}, [(2, cfg.global_crops_size), (cfg.local_crops_number, cfg.local_crops_size)]
    shapes = [(n * images, 1 + cfg.num_register_tokens + (side // cfg.patch_size) ** 2) for n, side in sides]
    for checkpointing in support.parallel.CHECKPOINTING:
        with torch.device("meta"):
            network = train.build_network(cfg, cfg.drop_path_rate).to(dtype).train()
            x = torch.empty(1, sum(b * n for b, n in shapes), network["backbone"].embed_dim, dtype=dtype)
        block = network["backbone"].block_list()[-1]
        if checkpointing != "none":
            block.forward = support.parallel.checkpointed(block.forward, checkpointing)
        with mock.patch.object(F, "scaled_dot_product_attention", attention_on_meta):
            saved[checkpointing] = saved_bytes(partial(block, x.requires_grad_(), shapes))
    return saved


def activation_bytes(cfg: train.Config, images: int, dtype: torch.dtype, checkpointing: str) -> float:
    """Bytes that all blocks save, and what the backward pass recomputes for one block at a time."""
    saved, depth = block_bytes(cfg, images, dtype), train.ARCHS[cfg.arch]["depth"]
    return depth * saved[checkpointing] + saved["none"] - saved[checkpointing]


@cache
def other_bytes(cfg: train.Config, images: int) -> float:
    """Bytes other than blocks and weights while the losses are computed: what the heads save, five float32 tables of
    logits for a chunk of rows, with Sinkhorn-Knopp one more for all masked patches, prototypes and their gradient, and
    the crops of this step and the next."""
    total, rows = 0.0, head_rows(cfg, 2 + cfg.local_crops_number)
    stored = head_rows(cfg, 0) if cfg.centering == "sinkhorn_knopp" else {}
    with torch.device("meta"):
        network = train.build_network(cfg)
        for name in rows.keys() & network.keys():
            head, n = network[name], max(round(rows[name] * images), 1)
            features = torch.empty(n, network["backbone"].embed_dim)
            total += saved_bytes(lambda: F.normalize(head.mlp(features), dim=-1))  # noqa: B023 called at once
            n_prototypes, prototypes = len(head.last_layer.weight_v), head.last_layer.weight_v.numel()
            total += 5 * 4 * min(n * n_prototypes, losses.CHUNK_ELEMENTS["cuda"]) + 2 * 4 * prototypes
            total += 4 * n_prototypes * images * stored.get(name, 0)
    pixels = 2 * cfg.global_crops_size**2 + cfg.local_crops_number * cfg.local_crops_size**2
    return total + 2 * 4 * cfg.in_chans * images * pixels


@cache
def parameter_counts(cfg: train.Config) -> dict[str, list[int]]:
    """Of each module that is gathered as a unit: the blocks, the rest of the backbone, the heads."""
    with torch.device("meta"):
        network = train.build_network(cfg)
    size = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    blocks = [size(block) for block in network["backbone"].block_list()]
    rest = size(network["backbone"]) - sum(blocks)
    return dict(blocks=blocks, rest=[rest], heads=[size(m) for name, m in network.items() if name != "backbone"])


def ring(size: float, gpus: int) -> np.ndarray:
    """(bytes a GPU sends by NVLink, bytes by network, seconds) of an all-gather or a reduce-scatter of `size` bytes. A
    ring through all machines uses the network links of all GPUs of a machine at once."""
    machines, sent = -(-gpus // MACHINE), size * (gpus - 1) / gpus
    outside = sent / MACHINE if machines > 1 else 0.0
    hops = (gpus - machines) * NVLINK_HOP + (machines > 1) * machines * NETWORK_HOP
    return np.array([sent, outside, max(sent / NVLINK, outside / NETWORK) + hops])


def all_reduce(size: float, machines: int) -> np.ndarray:
    """Likewise of a tree all-reduce of `size` bytes over one GPU of each machine."""
    sent = 2 * size * (machines - 1) / machines
    return np.array([0.0, sent, sent / NETWORK + 2 * math.ceil(math.log2(machines)) * NETWORK_HOP])


def traffic(cfg: train.Config, sharding: str, gpus: int) -> np.ndarray:
    """(3, 3): bytes by NVLink, bytes by network and seconds of the teacher's forward pass, the student's, and the
    backward pass. The backbone is gathered in bfloat16, heads in float32; gradients are reduced in float32."""
    counts = parameter_counts(cfg)
    backbone, heads = counts["blocks"] + counts["rest"], counts["heads"]
    near = min(gpus, MACHINE) if sharding in ("hsdp", "ddp") else gpus  # DDP reduces within a machine first
    gather = lambda sizes, n_bytes: sum((ring(n_bytes * n, near) for n in sizes), np.zeros(3))  # noqa: E731
    forward = gather(backbone, 2) + gather(heads, 4) if sharding != "ddp" else np.zeros(3)
    backward = gather(backbone + heads, 4) + (sharding == "zero3") * gather(backbone, 2)
    backward += (sharding == "ddp") * gather(backbone + heads, 4)  # an all-reduce also gathers the sum
    if near < gpus:
        backward += sum(all_reduce(4 * n / near, gpus // near) for n in backbone + heads)
    return np.stack([forward, forward, backward])


def memory(cfg: train.Config, sharding: str, gpus: int, images: int, checkpointing: str,
           half: bool = True) -> dict[str, float]:
    """Bytes on one GPU at its peak, the start of the backward pass, when all activations are there and no gradients yet
    (--gradient-accumulation-steps adds 4 bytes per parameter and shard). `half`: in bfloat16, else in float32."""
    counts, n_shards = parameter_counts(cfg), dict(ddp=1, hsdp=min(gpus, MACHINE)).get(sharding, gpus)
    blocks, rest, heads = map(sum, counts.values())
    ahead = support.parallel.PREFETCHED_BLOCKS
    gathered = (blocks if sharding != "zero3" else (1 + ahead) * max(counts["blocks"])) + rest
    alone = gpus == 1 and not half  # nothing to gather
    return dict(
        state=16 * (blocks + rest + heads) / n_shards,  # student, two moments, teacher: float32
        gathered=0.0 if alone else (2 if half else 4) * gathered + 4 * heads,
        gradients=4 * heads / n_shards + (0 if alone else 8 * heads),  # of the heads, which come first; and buffers
        blocks=activation_bytes(cfg, images, torch.bfloat16 if half else torch.float32, checkpointing),
        others=other_bytes(cfg, images))


def check_memory(preset: str) -> list[dict]:
    """Rows of {part, GB estimated, GB measured} for two steps on the CPU, for each --activation-checkpointing."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        cfg = replace(one_device_config(preset, Path(folder), 8), device="cpu", dtype="fp32")
        for checkpointing in support.parallel.CHECKPOINTING:
            measured = in_new_process(measure_steps, replace(cfg, activation_checkpointing=checkpointing))
            saved = train.ARCHS[cfg.arch]["depth"] * block_bytes(cfg, cfg.batch_size, torch.float32)[checkpointing]
            peak = sum(memory(cfg, "zero2", 1, cfg.batch_size, checkpointing, half=False).values())
            rows += [{"part": f"{part}, --activation-checkpointing {checkpointing}", "GB estimated": estimate / 1e9,
                      "GB measured": size / 1e9} for part, estimate, size in zip(
                          ("saved by the student's backbone", "peak"), (saved, peak), measured)]
    return rows


def measure_steps(cfg: train.Config) -> tuple[float, float]:
    """Bytes that the student's forward pass saves, and the peak of two steps beyond what the process had before."""
    keep_memory(cfg)
    cpu = torch.device("cpu")
    before = reset_peak(cpu)
    training = TimedTraining(cfg, support.sources.open_source(cfg.data, cfg.in_chans), cpu)
    batch, backbone = training.prepare(training.batches[0]), training.state.student["backbone"]
    orders = None if batch.global_orders is None else [batch.global_orders, batch.local_orders]
    saved = saved_bytes(lambda: backbone([batch.global_crops, batch.local_crops], [batch.masks, None],
                                         is_training=True, drop_orders=orders))
    for _ in range(2):
        training.step([batch])
    train.dist.destroy_process_group()
    return saved, 1e9 * (peak_memory(cpu) - before)


def bench_scale(args, device: torch.device) -> list[dict]:
    """Rows of networks: work, parameters, activations. Then rows of networks and --sharding: for each number of GPUs
    the GB that each sends per step (by network, if there are several machines), the ms that takes, the ms that
    computation cannot hide, and the GB of memory that each needs."""
    if args.check:
        return check_memory(args.preset or "vits16_short")
    presets = [args.preset] if args.preset else ["vits16_short", "vitb16_short", "vitl16_short", "vitl14", "vitg14"]
    networks, shardings = [], []
    for preset in presets:
        cfg = train.Config(**train.PRESETS[preset])
        images, (teacher, student) = cfg.group_size, pass_flops(cfg)
        compute = images / PEAK / UTILIZATION * np.array([teacher, student, 2 * student])
        counts = parameter_counts(cfg)
        sizes = dict(backbone=sum(counts["blocks"] + counts["rest"]), heads=sum(counts["heads"]))
        networks.append({"preset": preset, "images per GPU": images, "TFLOP per image": train_flops(cfg) / 1e12,
                         "compute ms": 1e3 * compute.sum()}
                        | {f"{name}, M": size / 1e6 for name, size in sizes.items()}
                        | {f"GB, checkpointing {c}": activation_bytes(cfg, images, torch.bfloat16, c) / 1e9
                           for c in support.parallel.CHECKPOINTING})
        for sharding in support.parallel.SHARDINGS:
            row = dict(preset=preset, sharding=sharding)
            for gpus in (8, 32, 256):
                passes = traffic(cfg, sharding, gpus)
                row[f"{gpus}: GB"] = passes[:, int(gpus > MACHINE)].sum() / 1e9
                row[f"{gpus}: ms"] = 1e3 * passes[:, 2].sum()
                row[f"{gpus}: not hidden"] = 1e3 * (passes[:, 2] - compute).clip(0).sum()
            shardings.append(row | {f"{gpus}: memory": sum(memory(cfg, sharding, gpus, images, "none").values()) / 1e9
                                    for gpus in (8, 256)})
    return networks + shardings


# ----------------------------------------------------------------------------------------------------------------------
# knn, logreg, linear: evaluations, on random numbers


def bench_knn(args, device: torch.device) -> list[dict]:
    """Rows of {way, s, times_product, GB}: classifying --queries images by their 10, 20, 100 and 200 nearest neighbors
    among --images, --dim wide, 1000 classes. times_product: relative to the bare matrix product in the same chunks."""
    n, n_queries, chunk = args.images, args.queries, max(1, min(256, args.queries, 2**26 // args.images))
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.empty(m, args.dim).normal_(generator=generator) for m in (n, n_queries))
    bank, queries = (support.evaluation.normalize_rows_(table).to(device) for table in (bank, queries))
    labels, answers = (torch.randint(1000, (m,), generator=generator).to(device) for m in (n, n_queries))

    @support.evaluation.full_float32()
    def product():
        buffer = torch.empty(chunk, n, device=device)
        for part in queries.split(chunk):
            torch.mm(part, bank.T, out=buffer[: len(part)])

    @support.evaluation.full_float32()
    def officially():
        hits = 0
        for part, right in zip(queries.split(chunk), answers.split(chunk)):
            similarity, index = (part @ bank.T).topk(200, sorted=True)
            votes = F.one_hot(labels[index], 1000) * F.softmax(similarity / 0.07, 1)[:, :, None]  # (Q, 200, C)
            for k in eval_knn.KS:
                hits += (votes[:, :k].sum(1).topk(5).indices == right[:, None]).sum()

    def by_sklearn():
        from sklearn.neighbors import KNeighborsClassifier

        model = KNeighborsClassifier(200, algorithm="brute", weights=lambda d: np.exp((1 - d * d / 2) / 0.07))
        model.fit(bank.cpu().numpy(), labels.cpu().numpy()).predict(queries.cpu().numpy())

    ways = {"matrix product alone": product,
            "eval_knn.py": lambda: eval_knn.knn_accuracy(bank, labels, queries, answers)}
    if not args.ours_only:
        ways |= {"topk and one-hot votes, as officially": officially, "scikit-learn, k = 200 only": by_sklearn}
    peak = {}

    def call(name: str) -> None:
        synchronized(ways[name], device)()
        peak.setdefault(name, peak_memory(device))  # including the ways before this one

    seconds = measure({name: partial(call, name) for name in ways}, args.repeats, least=0)
    return [row | dict(GB=peak[row["way"]]) for row in ratios(seconds, "times_product", "s")]


def bench_logreg(args, device: torch.device) -> list[dict]:
    """Rows of {way, fits, s, times_ours, excess}: all values of C on 20,000 x 384 features and 100 classes, and every
    --every-th of them by scikit-learn, with the official protocol's settings and with its default tolerance. excess: by
    how many percent the loss is above ours, for the worst C. scikit-learn's time is extrapolated to 45 fits."""
    n, dim, n_classes = args.images // 5, args.dim, 100
    generator = torch.Generator().manual_seed(0)
    scales = torch.arange(1, dim + 1) ** -0.5  # a spectrum like that of features
    labels = torch.arange(n) % n_classes
    centers, noise = (torch.randn(m, dim, generator=generator) for m in (n_classes, n))
    axes = torch.linalg.qr(torch.randn(dim, dim, generator=generator)).Q
    x = 3 * ((0.6 * centers[labels] + 1.5 * noise) * scales) @ axes + 1
    cs, places = eval_logreg.CS[:: args.every], range(0, len(eval_logreg.CS), args.every)

    def losses(models) -> list[float]:
        values = []
        for weight, bias, c in zip(models.weight.cpu().double(), models.bias.cpu().double(), cs):
            cross_entropy = F.cross_entropy(x.double() @ weight.T + bias, labels)
            values.append((cross_entropy + weight.square().sum() / (2 * c * n)).item())
        return values

    def ours():
        features = eval_logreg.PrincipalAxes(x.to(device, copy=True))
        models = eval_logreg.fit(features, labels.to(device), eval_logreg.CS, progress=True)
        return models._replace(weight=models.weight[places], bias=models.bias[places])

    def theirs(name: str, **options):
        return f"scikit-learn, {name}", partial(eval_logreg.fit_with_sklearn, x, labels, cs, progress=True, **options)

    ways = {"eval_logreg.py": ours}
    if not args.ours_only:
        ways |= dict([theirs("float64, tol 1e-12, 1000 iterations", tol=1e-12),
                      theirs("float32, tol 1e-4", tol=1e-4, dtype=torch.float32)])
    rows = []
    for name, way in ways.items():
        seconds = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            models = way()
            seconds.append(time.perf_counter() - start)
        share = len(eval_logreg.CS) / len(models.converged)
        found, s = losses(models), statistics.median(seconds) * share
        best, first = (rows[0]["losses"], rows[0]["s"]) if rows else (found, s)
        rows.append(dict(way=name, fits=f"{len(models.converged)}", s=s, times_ours=s / first, losses=found,
                         excess=100 * max(f / b - 1 for f, b in zip(found, best))))
    return [{k: v for k, v in row.items() if k != "losses"} for row in rows]


def bench_linear(args, device: torch.device) -> list[dict]:
    """Rows of {way, ms, times_ours}: an SGD step of the 52 classifiers on embeddings --dim wide, 1000 classes, batch
    256, against 52 nn.Linear, autograd and torch.optim.SGD."""
    batch, dim = 256, args.dim
    x, labels = torch.randn(batch, 5 * dim, device=device), torch.randint(1000, (batch,), device=device)
    grid = eval_linear.Grid(dim, 4, 1000, eval_linear.RATES, device=device)
    inputs = [columns for columns in grid.inputs for _ in grid.rates]
    modules = [torch.nn.Linear(c.stop - c.start, 1000, device=device) for c in inputs]
    groups = [dict(params=m.parameters(), lr=rate) for m, rate in zip(modules, grid.rates * len(grid.kinds))]
    optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0)

    def loop():
        losses = [F.cross_entropy(module(x[:, c]), labels) for module, c in zip(modules, inputs)]
        optimizer.zero_grad()
        torch.stack(losses).sum().backward()
        optimizer.step()

    ways = {"eval_linear.Grid": lambda: grid.step(x, labels, batch, 1e-3), "52 modules and autograd": loop}
    return ratios(measure({name: synchronized(way, device) for name, way in ways.items()}, args.repeats))


def bench_hub(args, device: torch.device) -> list[dict]:
    """Rows of {way, s, times_first}: hub.load of random weights in a file as large as that of the released --name,
    against reading its bytes; and starting Python with torch and hub, against torch alone."""
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in hub.backbone(args.name, pretrained=False).state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "weights.pth")
        torch.save({key: torch.rand(shape) for key, shape in shapes.items()}, path)
        loads = measure({"read the bytes": path.read_bytes, "hub.load": lambda: hub.load(path)}, args.repeats)

    def imports(names: str):
        return lambda: subprocess.run([sys.executable, "-c", f"import {names}"], cwd=Path(__file__).parent, check=True)

    starts = measure({"import torch": imports("torch"), "import torch, hub": imports("torch, hub")}, args.repeats)
    return ratios(loads, "times_first", "s") + ratios(starts, "times_first", "s")


# ----------------------------------------------------------------------------------------------------------------------
# dense, m2f: each in a new process


def upsampled_first(head: heads.LinearDepthHead, features: list) -> torch.Tensor:
    """LinearDepthHead.forward in the official order: all channels are upsampled, then convolved."""
    x = torch.cat([t for patches, cls in features for t in (patches, heads.expand(cls, patches))], 1)
    x = F.relu(head.conv_depth(heads.bilinear(x, [4 * n for n in x.shape[-2:]]))) + 0.1
    depths = torch.linspace(*head.depth_range, x.shape[1], device=x.device)
    return (x * depths[:, None, None]).sum(1, keepdim=True) / x.sum(1, keepdim=True)


def linear_depth(way: str, args, device: torch.device):
    """A function that predicts depth from the features of a 480x640 photograph, padded to 35x46 patches."""
    head, dim = heads.LinearDepthHead(args.dim).to(device).requires_grad_(False), args.dim
    features = [(torch.randn(1, dim, 35, 46, device=device), torch.randn(1, dim, device=device)) for _ in range(4)]
    return partial(head if way == DENSE_WAYS[0] else partial(upsampled_first, head), features)


def whole_mask2former(way: str, args, device: torch.device):
    """A function that runs Mask2Former with random weights, drawn here since its own initialization takes a minute."""
    with torch.device("meta"):
        network = mask2former.Mask2Former()
    network.to_empty(device=device)
    for name, value in network.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5) if value.ndim < 2 and not name.endswith("bias") else value.normal_(std=0.02)
        else:
            value.zero_()
    return partial(network.eval().requires_grad_(False), torch.randn(1, 3, 896, 896, device=device))


def measure_alone(make, way: str, args, device: torch.device) -> dict:
    """{way, s, GB_before, GB_most} of make(way, args, device)(), and its result if that is a number. If it is called
    several times, the first call is warm-up."""
    data.keep_memory()
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32, as in training
    torch.manual_seed(0)
    call = synchronized(make(way, args, device), device)
    before, seconds = reset_peak(device), []
    for _ in range(args.repeats):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    row = dict(way=way, s=statistics.median(seconds[1:] or seconds), GB_before=before, GB_most=peak_memory(device))
    return row | (dict(result=result) if isinstance(result, float) else {})


def bench_memory(make, ways: tuple[str, ...], args, device: torch.device) -> list[dict]:
    """Rows of measure_alone, each from a new process."""
    return [in_new_process(measure_alone, make, way, args, device)
            for way in tqdm(ways, disable=None, desc="measuring", leave=False)]


# ----------------------------------------------------------------------------------------------------------------------
# train: real training steps, of args.cfg, which the flags of train.py gave


def matrix_rate(dtype: torch.dtype, device: torch.device) -> float:
    """FLOP/s of the product of two square matrices that are large enough to keep the device busy."""
    n, seconds = 256, 0.0
    while seconds < 0.05 and n < 8192:
        n *= 2
        a, b = torch.randn(2, n, n, device=device).to(dtype)
        product = synchronized(partial(torch.mm, a, b, out=torch.empty_like(a)), device)
        product()
        start = time.perf_counter()
        product()
        seconds = time.perf_counter() - start
    rounds = max(1, min(10, int(0.1 / seconds)))
    start = time.perf_counter()
    for _ in range(rounds):
        product()
    return 2 * n**3 * rounds / (time.perf_counter() - start)


class Clock:
    """A replacement for record_function that adds up the seconds under each name, without those under names nested in
    it. It synchronizes at both ends, so that a GPU's time counts where it is spent, not where it is queued."""

    def __init__(self, device: torch.device):
        self.device, self.seconds, self.inside = device, {}, [0.0]

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    @contextlib.contextmanager
    def __call__(self, name: str):
        start = self.now()
        self.inside.append(0.0)
        yield
        took = self.now() - start
        self.seconds[name] = self.seconds.get(name, 0.0) + took - self.inside.pop()
        self.inside[-1] += took


class TimedTraining:
    """The training of train.py, one step at a time, each on its own batch."""

    def __init__(self, cfg: train.Config, source, device: torch.device):
        self.cfg, self.device, self.clock = cfg, device, Clock(device)
        arch, dtype = model.ARCHS[cfg.arch], train.compute_dtype(cfg, device)
        kernel = support.parallel.load_kernel(arch, dtype, device) if cfg.kernels else None
        self.state = train.TrainState(cfg, support.parallel.start_processes(device, cfg.sharding), device, kernel)
        self.batches = train.training_batches(cfg, source, train.dist.get_rank(), train.dist.get_world_size())
        self.schedule = {name: float(values[cfg.steps // 2]) for name, values in train.schedules(cfg).items()}
        on_gpu = cfg.compile and device.type == "cuda"
        color = torch.compile(data.augment_at_once, dynamic=False) if on_gpu else data.augment
        self.prepare = partial(data.prepare, device=device, mean=cfg.mean, std=cfg.std, augment=color)
        self.done = 0

    def next_batches(self) -> list[data.Batch]:
        """The batches of the next step, one per gradient accumulation step, not yet prepared."""
        first = self.done * self.cfg.gradient_accumulation_steps
        self.done += 1
        return [self.batches[i] for i in range(first, first + self.cfg.gradient_accumulation_steps)]

    def step(self, batches: list[data.Batch]):
        """train_step on prepared batches."""
        state = self.state
        return train.train_step(state.student, state.teacher, state.optimizers, batches, self.cfg, self.schedule,
                                state.centers)

    def seconds(self) -> float:
        """Seconds of a step on prepared batches."""
        batches = list(map(self.prepare, self.next_batches()))
        start = self.clock.now()
        self.step(batches)
        return self.clock.now() - start

    def seconds_by_part(self) -> dict[str, float]:
        """{part: seconds} of a step, by train.py's names for its parts."""
        clock, batches = Clock(self.device), self.next_batches()
        with clock("color of the crops"):
            batches = list(map(self.prepare, batches))
        with mock.patch.object(train, "record_function", clock), clock("the rest"):
            self.step(batches)
        return clock.seconds

    def seconds_with_loader(self, n: int) -> tuple[float, float]:
        """Seconds per step, and of these the seconds waiting for data, of n steps fed by data-loading workers."""
        first, self.done = self.done, self.done + n + 1
        loader = data.train_loader(self.batches, first, self.done, train.local_workers(self.cfg),
                                   self.device.type == "cuda")
        loader = data.Prefetcher(loader, self.prepare, self.device)
        batches = iter(loader)
        for i in range(n + 1):  # the workers start during the first
            self.step(list(itertools.islice(batches, self.cfg.gradient_accumulation_steps)))
            if i == 0:
                start, waited = self.clock.now(), loader.waited
        return (self.clock.now() - start) / n, (loader.waited - waited) / n

    def profile(self, path: str) -> list[dict]:
        """Writes a trace of one step. Returns rows of {operator, calls, ms, percent}, the ten slowest operators."""
        kinds = torch.profiler.ProfilerActivity
        kinds = [kinds.CPU, kinds.CUDA] if self.device.type == "cuda" else [kinds.CPU]
        batches = list(map(self.prepare, self.next_batches()))
        with torch.profiler.profile(activities=kinds) as profiler:
            self.step(batches)
            self.clock.now()
        profiler.export_chrome_trace(path)
        cost = (lambda e: e.self_device_time_total) if self.device.type == "cuda" else (
            lambda e: e.self_cpu_time_total)  # microseconds
        events = sorted((e for e in profiler.key_averages() if not e.is_user_annotation), key=cost, reverse=True)
        total = sum(map(cost, events))
        return [dict(operator=e.key[:70], calls=str(e.count), ms=cost(e) / 1e3, percent=100 * cost(e) / total)
                for e in events[:10]]


def bench_train(args, device: torch.device) -> list[dict]:
    """Rows of {figure, value}, then of {part, ms, percent} of a step, then with --profile of operators."""
    cfg, before = args.cfg, reset_peak(device)
    train.check_shared_memory(cfg, train_processes())
    counters = torch._dynamo.utils.counters if cfg.compile else {}
    counters.clear()
    with tempfile.TemporaryDirectory() as folder:
        if not args.data and cfg.data != "digits":  # photographs, whatever the preset trains on
            write_photos(Path(folder))
            cfg = replace(cfg, data=folder)
        training = TimedTraining(cfg, support.sources.open_source(cfg.data, cfg.in_chans), device)
        took = [training.seconds() for _ in range(3)][-1]  # warm-up and compilation
        compiled, dtype = n_graphs(counters), train.compute_dtype(cfg, device)
        calls = max(support.parallel.on_all_ranks(lambda: max(1, min(4, math.ceil(0.5 / took)))))
        seconds, rates, parts = [], [], []
        for _ in tqdm(range(args.repeats), disable=None, desc="measuring", leave=False):
            rates.append(matrix_rate(dtype, device))
            seconds.append(statistics.mean(training.seconds() for _ in range(calls)))
            parts.append(training.seconds_by_part())
        fed, waited = training.seconds_with_loader(max(2, calls * args.repeats))
        memory = peak_memory(device)
        operators = training.profile(args.profile) if args.profile else []
        train.dist.destroy_process_group()

    s, images, flops = statistics.median(seconds), cfg.batch_size, train_flops(cfg)
    share = statistics.median(flops * images / train_processes() / t / rate for t, rate in zip(seconds, rates))
    figures = {f"seconds per step of {images} images": s, "images per second": images / s,
               "images per second, fed by the loader": images / fed, "GFLOP per image, nominal": flops / 1e9,
               f"GFLOP/s of a matrix product, {str(dtype)[6:]}": statistics.median(rates) / 1e9}
    if device.type == "cpu" and dtype != torch.float32:  # a CPU without bfloat16 units is slower in it
        figures["GFLOP/s of a matrix product, float32"] = matrix_rate(torch.float32, device) / 1e9
    figures |= {"share of that rate": share, "GB at most": memory, "GB beyond the imports": memory - before}
    if cfg.compile:
        figures |= {"graphs compiled": n_graphs(counters), "of these after step 3": n_graphs(counters) - compiled,
                    "graph breaks": sum(counters["graph_break"].values())}
    by_part = {"wait for the loader": waited} | {
        name: statistics.median(part[name] for part in parts) for name in parts[0]}
    return ([dict(figure=name, value=float(value)) for name, value in figures.items()]
            + [dict(part=name, ms=1e3 * t, percent=100 * t / sum(by_part.values())) for name, t in by_part.items()]
            + operators)


def n_graphs(counters: dict) -> int:
    return counters["stats"]["unique_graphs"] if counters else 0


def bench_build(args, device: torch.device) -> list[dict]:
    """Rows of {process, GB of shards, GB at the peak, s}: main memory beyond the program itself while the networks get
    their first values. On a GPU the shards are not part of it."""
    mesh, cpu = support.parallel.start_processes(device, args.cfg.sharding), torch.device("cpu")
    train.TrainState(train.Config(**train.PRESETS["digits"]), mesh, device)  # loads PyTorch's code
    before, start = reset_peak(cpu), time.perf_counter()
    state = train.TrainState(args.cfg, mesh, device)
    seconds, peak = time.perf_counter() - start, peak_memory(cpu) - before
    shards = sum(t.nbytes for network in (state.student, state.teacher)
                 for t in support.parallel.local_shards(network.parameters())) / 1e9
    rows = support.parallel.on_all_ranks(lambda: {
        "process": str(train.dist.get_rank()), "GB of shards": shards, "GB at the peak": peak, "s": seconds})
    train.dist.destroy_process_group()
    return rows


def train_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


# ----------------------------------------------------------------------------------------------------------------------
# heads: heads and losses alone


HEAD_WAYS = ("train.py: losses.py in chunks", "losses.py on all logits", "F.linear_cross_entropy")


class Features(nn.Module):
    """Stands in for the backbone: returns the same features whatever the crops, and takes their gradients."""

    def __init__(self, cfg: train.Config):
        super().__init__()
        n, dim, patches = cfg.batch_size, model.ARCHS[cfg.arch]["embed_dim"], (
            cfg.global_crops_size // cfg.patch_size) ** 2
        self.cls, self.local_cls, self.patches = (nn.Parameter(torch.randn(*shape, dim)) for shape in (
            (2 * n,), (cfg.local_crops_number * n,), (2 * n, patches)))

    def forward(self, x, masks=None, is_training=True, drop_orders=None):
        out = dict(x_norm_clstoken=self.cls, x_norm_patchtokens=self.patches)
        return [out, dict(x_norm_clstoken=self.local_cls)] if isinstance(x, list) else out


def heads_alone(cfg: train.Config) -> nn.ModuleDict:
    """A network of train.py with Features as its backbone."""
    dim, network = model.ARCHS[cfg.arch]["embed_dim"], nn.ModuleDict(dict(backbone=Features(cfg)))
    network["dino_head"] = model.DINOHead(dim, cfg.head_n_prototypes, nlayers=cfg.head_nlayers,
                                          hidden_dim=cfg.head_hidden_dim, bottleneck_dim=cfg.head_bottleneck_dim)
    if cfg.ibot_separate_head:
        network["ibot_head"] = model.DINOHead(
            dim, cfg.ibot_head_n_prototypes, nlayers=cfg.ibot_head_nlayers, hidden_dim=cfg.ibot_head_hidden_dim,
            bottleneck_dim=cfg.ibot_head_bottleneck_dim)
    return network


def masked_batch(cfg: train.Config, device: torch.device) -> data.Batch:
    """A batch with the masks of step 0 and crops without pixels."""
    cfg = replace(cfg, gradient_accumulation_steps=1)
    images = Namespace(image=lambda i: torch.empty(cfg.in_chans, 1, 1))  # none is read
    batches = train.training_batches(cfg, images, 0, 1)
    masks = torch.from_numpy(batches.masks_of(0, range(cfg.batch_size // cfg.group_size)))
    index, weight = data.mask_weights(masks)
    crops = [torch.empty(n * cfg.batch_size, 0) for n in (2, cfg.local_crops_number)]
    return data.Batch(*crops, *crops, masks, index.to(device), weight.to(device), torch.arange(cfg.batch_size), [])


def loss_by_definition(student, teacher, batch: data.Batch, cfg: train.Config, centers: dict, whole: bool = True):
    """The loss of step_losses() on whole tables of logits and targets. Unless `whole`, F.linear_cross_entropy takes the
    place of the student's logits and of the losses on them."""
    temp, n = cfg.teacher_temp, cfg.batch_size
    names = "dino_head", "ibot_head" if "ibot_head" in student else "dino_head"
    target = (lambda x, center: losses.softmax_center(x, center, temp)) if cfg.centering == "centering" else (
        lambda x, center: losses.sinkhorn_knopp(x, temp))
    with torch.no_grad():
        rows = teacher["backbone"].cls, teacher["backbone"].patches.flatten(0, 1)[batch.mask_index]
        logits = [teacher[name](x) for name, x in zip(names, rows)]
        targets = [target(x, center) for x, center in zip(logits, centers.values())]
        del logits
        targets[0] = targets[0].unflatten(0, (2, n))  # (2, B, K)
    features, n_pairs = student["backbone"], 2 * cfg.local_crops_number + 2
    rows = torch.cat([features.local_cls, features.cls]), features.patches.flatten(0, 1)[batch.mask_index]
    koleo = cfg.koleo_loss_weight * sum(losses.koleo_loss(crop, cfg.group_size) for crop in features.cls.chunk(2))
    if whole:
        cls, patches = (student[name](x) for name, x in zip(names, rows))
        local, both = cls.unflatten(0, (-1, n)).split([cfg.local_crops_number, 2])  # (L, B, K), (2, B, K)
        dino = losses.dino_loss(local, targets[0]) + losses.cross_entropy(both, targets[0].flip(0)).mean(-1).sum()
        ibot = losses.ibot_loss(patches, targets[1], batch.mask_weight, 2 * n)
        return cfg.dino_loss_weight * dino / n_pairs + cfg.ibot_loss_weight * ibot + koleo
    weights = cfg.dino_loss_weight / (n_pairs * n), cfg.ibot_loss_weight / (2 * n) * batch.mask_weight[:, None]
    targets[0] = torch.cat([targets[0].sum(0).repeat(cfg.local_crops_number, 1), targets[0].flip(0).flatten(0, 1)])
    for name, x, target, weight in zip(names, rows, targets, weights):
        tokens, prototypes = student[name](x, factored=True)
        koleo = koleo + F.linear_cross_entropy(tokens / losses.STUDENT_TEMP, prototypes, target.mul_(weight),
                                               reduction="sum", options=nn.LinearCrossEntropyOptions())
    return koleo


def heads_and_losses(way: str, args, device: torch.device):
    """A function that computes the loss from features, and its gradients in the student's heads and features."""
    cfg = args.cfg
    student, teacher = heads_alone(cfg).to(device), heads_alone(cfg).to(device).requires_grad_(False)
    batch, centers = masked_batch(cfg, device), train.build_centers(cfg, device)

    def ours() -> torch.Tensor:
        targets, _ = train.teacher_targets(teacher, [batch], cfg, cfg.teacher_temp, centers)
        return train.step_losses(student, batch, targets.pop(), cfg)[0]

    by_definition = partial(loss_by_definition, student, teacher, batch, cfg, centers, whole=way == HEAD_WAYS[1])

    def call() -> float:
        student.zero_grad(set_to_none=True)
        loss = ours() if way == HEAD_WAYS[0] else by_definition()
        loss.backward()
        return loss.item()

    return call


def bench_heads(args, device: torch.device) -> list[dict]:
    """Rows of {way, s, times_ours, GB, times_ours_GB, loss}. The ways take turns, each in a new process, whose second
    call is timed. GB: peak beyond weights and features."""
    ways = HEAD_WAYS if hasattr(F, "linear_cross_entropy") else HEAD_WAYS[:2]  # from torch 2.13 on
    ways, twice = ways[: 1 if args.ours_only else None], Namespace(**vars(args) | dict(repeats=2))
    turns = [bench_memory(heads_and_losses, ways, twice, device) for _ in range(args.repeats)]
    seconds = [[row["s"] for row in turn] for turn in turns]
    used = [max(row["GB_most"] - row["GB_before"] for row in rows) for rows in zip(*turns)]
    return [dict(way=way, s=statistics.median(s[i] for s in seconds), times_ours=statistics.median(
        s[i] / s[0] for s in seconds), GB=used[i], times_ours_GB=used[i] / used[0], loss=turns[0][i]["result"])
        for i, way in enumerate(ways)]


# ----------------------------------------------------------------------------------------------------------------------
# attention


BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION,
            "cudnn": SDPBackend.CUDNN_ATTENTION, "math": SDPBackend.MATH}


def with_copies(attention: model.Attention, x: torch.Tensor, shapes: list[tuple[int, int]]) -> torch.Tensor:
    """Attention.forward, but with contiguous copies of query, key and value."""
    outs = []
    for qkv in model.unpack(attention.qkv(x), shapes):
        qkv = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4).contiguous()
        outs.append(F.scaled_dot_product_attention(*qkv, scale=attention.scale).transpose(1, 2).flatten(2))
    return attention.proj(model.pack(outs))


def by_sdpa(qkv: torch.Tensor, batches: list[int], lengths: list[int], scale: float) -> torch.Tensor:
    """Attention on packed crops, qkv (T, 3, H, d) -> (T, H, d), as in model.Attention."""
    outs = []
    for crops, b, n in zip(qkv.split([b * n for b, n in zip(batches, lengths)]), batches, lengths):
        q, k, v = crops.unflatten(0, (b, n)).permute(2, 0, 3, 1, 4)  # each (b, H, n, d)
        outs.append(F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(0, 1))
    return torch.cat(outs)


def forward_and_backward(function, x: list[torch.Tensor], device: torch.device, backend: str = ""):
    """A function that runs `function` on the tensors x, forward and backward, with a backend of PyTorch's attention."""
    x = [t.detach().requires_grad_() for t in x]

    def call() -> None:
        with sdpa_kernel(BACKENDS[backend]) if backend else contextlib.nullcontext():
            outs = function(*x)
            torch.autograd.grad(outs, x, [torch.ones_like(out) for out in outs])

    return synchronized(call, device)


def supported(calls: dict) -> dict:
    """Those of the calls that run here: not every backend supports every device and dtype."""
    def runs(call) -> bool:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PyTorch explains at length why not
                call()
        except RuntimeError:
            return False
        return True

    return {name: call for name, call in calls.items() if runs(call)}


def bench_attention(args, device: torch.device) -> list[dict]:
    """Rows of {way, backend, ms, times_ours}: forward and backward pass of model.Attention on the crops of a batch.
    Then rows of {tokens, images, attention alone by, ms, times_best}: without the two projections, relative to the best
    of PyTorch's backends."""
    cfg, dtype = args.cfg, train.compute_dtype(args.cfg, device)
    arch, sides = model.ARCHS[cfg.arch], (cfg.global_crops_size, cfg.local_crops_size)
    dim, n_heads = arch["embed_dim"], arch["num_heads"]
    lengths = [1 + cfg.num_register_tokens + (side // cfg.patch_size) ** 2 for side in sides]
    batches = [2 * cfg.batch_size, cfg.local_crops_number * cfg.batch_size]
    shapes, attention = list(zip(batches, lengths)), model.Attention(dim, n_heads).to(device, dtype)
    crops = [torch.randn(b, n, dim, device=device, dtype=dtype) for b, n in shapes]
    packed = [model.pack(crops)]
    ways = {"model.Attention: packed, no copies": (lambda x: [attention(x, shapes)], packed),
            "one call per resolution": (lambda *xs: list(map(attention, xs)), crops),
            "packed, query, key, value copied": (lambda x: [with_copies(attention, x, shapes)], packed)}
    calls = supported({(way, backend): forward_and_backward(function, x, device, backend)
                       for backend in BACKENDS for way, (function, x) in ways.items()})
    seconds = measure(calls, args.repeats, least=0.1)
    first = next(iter(ways))  # which a backend may not support
    rows = [dict(way=way, backend=backend, ms=1e3 * statistics.median(times), times_ours=statistics.median(
        t / o for t, o in zip(times, seconds[first, backend])) if (first, backend) in seconds else "")
        for (way, backend), times in seconds.items()]

    tokens = sum(b * n for b, n in shapes)
    tables = [(batches, lengths)] + [([max(tokens // n, 1)], [n]) for n in (37, 50, 197, 257, 1370)
                                     if device.type == "cuda"]
    for batches, lengths in tables:
        rows += attention_alone(args, batches, lengths, n_heads, dim // n_heads, dtype, device)
    return rows


def attention_alone(args, batches, lengths, n_heads: int, dim: int, dtype, device: torch.device) -> list[dict]:
    tokens = sum(b * n for b, n in zip(batches, lengths))
    qkv = [torch.randn(tokens, 3, n_heads, dim, device=device, dtype=dtype)]
    run = lambda function: lambda x: [function(x, batches, lengths, dim**-0.5)]  # noqa: E731
    calls = supported({backend: forward_and_backward(run(by_sdpa), qkv, device, backend) for backend in BACKENDS})
    refused = ""
    if device.type == "cuda":
        try:
            kernel = support.parallel.load_kernel(model.ARCHS[args.cfg.arch], dtype, device)
            call = forward_and_backward(run(kernel), qkv, device)
            call()
            calls["kernels/attention.py"] = call
        except ValueError as error:
            refused = str(error)
    seconds = {name: statistics.median(times) for name, times in measure(calls, args.repeats, least=0.1).items()}
    best, names = min(seconds[name] for name in seconds if name in BACKENDS), ("tokens", "images", "attention alone by")
    place = [" and ".join(map(str, numbers)) for numbers in (lengths, batches)]
    rows = [dict(zip(names, (*place, name))) | dict(ms=1e3 * t, times_best=t / best) for name, t in seconds.items()]
    return rows + [dict(zip(names, (*place, f"kernels/attention.py: {refused}"))) | dict(ms="", times_best="")
                   ] * bool(refused)


# ----------------------------------------------------------------------------------------------------------------------
# gpu: all benchmarks that need a GPU, one after the other


SWITCHES = ("", "--compile", "--compile --kernels", "--compile --activation-checkpointing selective")
GPU_COMMANDS = (
    "-m pytest -q -p no:cacheprovider test_all.py -k cuda",
    "kernels/attention.py",
    "bench.py attention --preset vitl16_short --batch-size 64 --repeats 5 --json",
    *(f"bench.py heads --batch-size 64 --head-n-prototypes 131072 --centering {centering} --repeats 3 --json"
      for centering in ("centering", "sinkhorn_knopp")),
    *(f"bench.py train --preset {preset} --batch-size 64 --repeats 5 --json {switch}".rstrip()
      for preset in ("vits16_short", "vitl16_short") for switch in SWITCHES),
    "bench.py data --repeats 3 --json",
    *(f"train.py --preset digits --steps 300 --device cuda --out TEMPORARY {switch}".rstrip()
      for switch in ("", "--compile")))


def bench_gpu(args, device: torch.device) -> list[dict]:
    """Rows of {command, result, s}. Writes into --out: log.txt with the output of all commands, results.json with the
    tables of bench.py, tables.md with the same as Markdown. A command that fails does not stop the others; a command
    still running when --minutes are over is stopped."""
    if args.list:
        return print("\n".join(f"python {command}" for command in GPU_COMMANDS)) or []
    if device.type != "cuda":
        raise ValueError("PyTorch finds no CUDA GPU here; `python bench.py gpu --list` shows what would run on one")
    out, rows, found, end = Path(args.out), [], [], time.monotonic() + 60 * args.minutes
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "log.txt", "w") as log, open(out / "tables.md", "w") as tables:
        for command in (bar := tqdm(GPU_COMMANDS, disable=None, desc="commands")):
            bar.set_postfix_str(command[:60])
            result, text, seconds = run_command(command, max(end - time.monotonic(), 0), log)
            rows.append(dict(command=f"python {command}", result=result, s=seconds))
            if result == "done" and "--json" in command:
                found.append(json.loads(text[text.index("{"):]))  # libraries may print something first
                with contextlib.redirect_stdout(tables):
                    print(f"python {command}\n")
                    show(found[-1]["rows"])
            (out / "results.json").write_text(json.dumps(dict(commands=rows, found=found), indent=1))
        with contextlib.redirect_stdout(tables):
            show(rows)
    return rows


def run_command(command: str, seconds: float, log) -> tuple[str, str, float]:
    """Runs `python command` with a timeout. Returns how it ended, what it printed, and the seconds it took."""
    start, here = time.perf_counter(), Path(__file__).parent
    with tempfile.TemporaryDirectory() as folder:
        argv = [sys.executable, *shlex.split(command.replace("TEMPORARY", f"{folder}/out"))]
        try:
            done = subprocess.run(argv, cwd=here, capture_output=True, text=True, timeout=seconds)
        except subprocess.TimeoutExpired as error:
            output = [(text or b"").decode(errors="replace") for text in (error.stdout, error.stderr)]
            done = subprocess.CompletedProcess(argv, None, *output)
    print(f"$ python {command}\n{done.stdout}\n{done.stderr}", file=log, flush=True)
    last = (done.stderr.strip() or done.stdout.strip() or " ").splitlines()[-1]
    result = {None: "stopped: out of time", 0: "done"}.get(done.returncode, f"failed ({done.returncode}): {last[:100]}")
    return result, done.stdout, time.perf_counter() - start


# ----------------------------------------------------------------------------------------------------------------------


SMALL = ("digits", "fashion")  # presets that train on small data sets, in large batches
DENSE_WAYS = ("heads.LinearDepthHead", "upsampled first, as officially")
BENCHES = {"data": bench_data, "train": bench_train, "build": bench_build, "heads": bench_heads,
           "attention": bench_attention, "gpu": bench_gpu, "save": bench_save, "scale": bench_scale, "knn": bench_knn,
           "logreg": bench_logreg, "linear": bench_linear, "hub": bench_hub,
           "dense": partial(bench_memory, linear_depth, DENSE_WAYS),
           "m2f": partial(bench_memory, whole_mask2former, ("Mask2Former on ViT-g, 896x896",))}
TRAINING = ("train", "build", "heads", "attention")  # take all flags of train.py
FLAGS = {  # flag: (commands that take it, default, help)
    "data": (("data", "save", "train", "build"), "", "images, as for train.py's --data"),
    "preset": (("save", "scale", *TRAINING), "", "of train.py; default: vits16_short, and five of them for `scale`"),
    "check": (("scale",), False, "compare the calculated memory with that of real steps"),
    "profile": (("train",), "", "file for a trace"),
    "out": (("gpu",), "gpu", "folder for its three files"),
    "minutes": (("gpu",), 10.0, "time limit"),
    "list": (("gpu",), False, "only show the commands"),
    "images": (("knn", "logreg"), 100_000, "training images; `logreg` takes a fifth of them"),
    "queries": (("knn",), 5_000, "images to classify"),
    "dim": (("knn", "logreg", "linear", "dense"), 384, "width of the features"),
    "every": (("logreg",), 1, "scikit-learn fits only every such value of C"),
    "name": (("hub",), "dinov2_vitg14", "a released model"),
    "ours-only": (("knn", "logreg", "heads"), False, "skip the alternatives")}


def parse(argv: list[str] | None):
    parser = support.cli.Parser(__doc__)
    parser.add_argument("what", choices=tuple(BENCHES), help="what to measure")
    for flag, (users, default, text) in FLAGS.items():
        kind = dict(action="store_true") if default is False else dict(type=type(default), default=default)
        parser.add_argument(f"--{flag}", help=f"{', '.join(users)}: {text}", **kind)
    parser.add_argument("--repeats", type=int, default=7, help="number of measurements; tables show their medians")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args, flags = parser.parse_known_args(argv)
    if args.what not in TRAINING:
        parser.parse_args(argv)  # raises for all other flags
    for flag, (users, default, _) in FLAGS.items():
        if getattr(args, flag.replace("-", "_")) != default and args.what not in users:
            raise ValueError(f"--{flag} has no effect on `bench.py {args.what}`; it is for {', '.join(users)}")
    if not 0 < args.minutes < 1e6:
        raise ValueError("--minutes must be more than 0")
    if min(args.repeats, args.images, args.queries, args.dim, args.every) < 1:
        raise ValueError("--repeats, --images, --queries, --dim and --every must be 1 or more")
    if args.preset not in ("", *train.PRESETS):
        raise ValueError(f"unknown preset {args.preset!r}{support.cli.nearest(args.preset, train.PRESETS)}")
    if args.name not in hub.RELEASED:
        raise ValueError(f"unknown model {args.name!r}{support.cli.nearest(args.name, hub.RELEASED)}")
    if args.what in TRAINING:
        args.cfg = training_config(args, flags)
    return args


def training_config(args, flags: list[str]) -> train.Config:
    """The settings that train.py would have with these flags, but with a batch for one device unless it is given."""
    given, n_ranks = {flag.partition("=")[0] for flag in flags}, train_processes()
    args.preset = args.preset or "vits16_short"
    cfg = train.parse(["--preset", args.preset, *flags, *(["--data", args.data] if args.data else [])])[0]
    if cfg.gradient_accumulation_steps < 1:
        raise ValueError(f"--gradient-accumulation-steps must be 1 or more, got {cfg.gradient_accumulation_steps}")
    forward_passes = cfg.gradient_accumulation_steps * n_ranks
    if "--batch-size" not in given and args.preset not in SMALL:
        images = 64 if support.parallel.pick_device(cfg.device).type == "cuda" else 8
        cfg = replace(cfg, batch_size=images * forward_passes)
    if "--group-size" not in given:
        cfg = replace(cfg, group_size=math.gcd(cfg.group_size, cfg.batch_size // forward_passes or 1))
    train.check(cfg, n_ranks)
    return cfg


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = support.parallel.pick_device(args.cfg.device if args.what in TRAINING else "auto")
    keep_memory(args.cfg if args.what in TRAINING else None)
    rows = BENCHES[args.what](args, device)
    if int(os.environ.get("RANK", 0)) or args.what == "gpu" and args.list:
        return
    about = dict(command=" ".join(["python bench.py", *(sys.argv[1:] if argv is None else argv)]), **versions(device))
    if args.json:
        print(json.dumps(dict(about=about, rows=rows), indent=1))
    else:
        print(", ".join(f"{k} {v}" for k, v in about.items()) + "\n")
        show(rows)


if __name__ == "__main__":
    support.cli.run(main)

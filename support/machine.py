"""What a machine cannot do: its failures in one line, and what can be foreseen of them. Apache License 2.0."""
import errno
import math
import os
import re
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from support.parallel import CHECKPOINTING


# ----------------------------------------------------------------------------------------------------------------------
# Failures


ALLOCATION = re.compile(r"out of memory|can(?:'|no)t allocate memory|not enough memory|bad_alloc|ALLOC_FAILED|"
                        r"unable to allocate", re.I)
WORKER = re.compile(r"DataLoader worker \(pid.*?\) (?:is killed by signal: ([\w ]+)|exited unexpectedly)")
ENDS = {"Killed": "there is too little memory; lower --num-workers",
        "Bus error": "shared memory, /dev/shm, is full; lower --num-workers"}  # by the signal
GPU = re.compile("CUDA|CUBLAS|CUDNN|MPS")


def known_failure(error: BaseException, less_memory: str = "") -> str:
    """What happened and what to do, in one line, if memory ran out (`less_memory` says how to need less) or a
    data-loading worker was killed; "" for other errors, which deserve a traceback."""
    text = str(error)
    if worker := WORKER.search(text):
        how = worker[1] or "Killed"
        return f"a data-loading worker was killed: {ENDS.get(how, f'{how}; --num-workers 0 shows where')}"
    no_memory = isinstance(error, MemoryError) or isinstance(error, OSError) and error.errno == errno.ENOMEM
    if no_memory or isinstance(error, RuntimeError) and ALLOCATION.search(text):
        tried = re.search(r"allocate (\d+(?:\.\d+)?) ?([KMGTPE]iB|bytes)", text)
        size = f" ({as_gigabytes(float(tried[1]), tried[2])} more were needed)" if tried else ""
        return f"out of {'GPU ' * bool(GPU.search(text))}memory{size}" + f"; {less_memory}" * bool(less_memory)
    return ""


def as_gigabytes(number: float, unit: str) -> str:
    """"2", "GiB" -> "2.1 GB"."""
    return f"{number * 2 ** (10 * 'bKMGTPE'.index(unit[0])) / 1e9:.2g} GB"


def less_memory(cfg, factor: int = 2) -> str:
    """Advice on how a training run can use less memory; `factor` times as many gradient accumulation steps if the
    batch divides into so many."""
    flags = []
    if divides(cfg, factor):
        flags.append(f"--gradient-accumulation-steps {factor * cfg.gradient_accumulation_steps}")
    if (stronger := CHECKPOINTING.index(cfg.activation_checkpointing) + 1) < len(CHECKPOINTING):
        flags.append(f"--activation-checkpointing {CHECKPOINTING[stronger]}")
    same = f"{' or '.join(flags)} needs less, for the same result; " if flags else ""
    return f"{same}so does a smaller --batch-size, but that is a different experiment"


def divides(cfg, factor: int) -> bool:
    """Whether the batch divides into `factor` times as many gradient accumulation steps."""
    unit = cfg.group_size * int(os.environ.get("WORLD_SIZE", 1)) * cfg.gradient_accumulation_steps
    return cfg.batch_size % (unit * factor) == 0


# ----------------------------------------------------------------------------------------------------------------------
# Estimates


def free_memory(device: torch.device, groups: str = "/sys/fs/cgroup") -> float:
    """Free bytes of a GPU, or of the machine or the container this process is in; infinity where that is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = math.inf
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and (found := re.search(r"MemAvailable: +(\d+)", meminfo.read_text())):
        free = 1024 * int(found[1])
    for folder, limit, used in (("", "memory.max", "memory.current"),  # control groups, version 2 and 1
                                ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes")):
        group = Path(groups, folder)
        if (group / limit).exists() and (text := (group / limit).read_text().strip()).isdecimal():
            stat = (group / "memory.stat").read_text() if (group / "memory.stat").exists() else ""
            cached = sum(map(int, re.findall(r"^inactive_file (\d+)", stat, re.M)))  # files, dropped when needed
            free = min(free, int(text) - int((group / used).read_text()) + cached)
    if sys.platform == "linux":
        import resource  # Windows has none

        if (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) != resource.RLIM_INFINITY:  # `ulimit -v`
            free = min(free, limit - resource.getpagesize() * int(Path("/proc/self/statm").read_text().split()[0]))
    return free


def training_estimate(cfg, arch: dict, images: int, n_shards: int, itemsize: int) -> tuple[float, float]:
    """(floating-point operations, bytes at the peak) of a process that computes the gradients of `images` images, with
    activations of `itemsize` bytes per number. A rough estimate: `bench.py scale` builds the network and counts."""
    width, depth = arch["embed_dim"], arch["depth"]
    lengths = [1 + (side // cfg.patch_size) ** 2 for side in (cfg.global_crops_size, cfg.local_crops_size)]  # tokens
    blocks, n_crops = 12 * depth * width**2, (2, cfg.local_crops_number)  # parameters; crops per image
    passes = [n * t * (2 * blocks + 4 * depth * width * t) for n, t in zip(n_crops, lengths)]
    head = head_parameters(width, cfg.head_nlayers, cfg.head_hidden_dim, cfg.head_bottleneck_dim, cfg.head_n_prototypes)
    patch_head = head if not cfg.ibot_separate_head else head_parameters(
        width, cfg.ibot_head_nlayers, cfg.ibot_head_hidden_dim, cfg.ibot_head_bottleneck_dim,
        cfg.ibot_head_n_prototypes)
    masked = lengths[0] * cfg.mask_sample_probability * sum(cfg.mask_ratio_min_max)  # patches of both global crops
    teacher, student = (passes[0] + 4 * head + 2 * masked * patch_head,
                        sum(passes) + 2 * sum(n_crops) * head + 2 * masked * patch_head)

    kept = dict(none=19, selective=11, full=1)[cfg.activation_checkpointing]  # numbers per token, block and width
    kept = kept * (1 - 0.6 * cfg.drop_path_rate) if cfg.activation_checkpointing != "full" else kept
    activations = itemsize * images * width * (depth * kept + 19) * sum(n * t for n, t in zip(n_crops, lengths))
    parameters = blocks + head + patch_head * cfg.ibot_separate_head
    return images * (teacher + 3 * student), activations + 16 * parameters / n_shards  # weights, two moments, teacher


def head_parameters(width: int, layers: int, hidden: int, bottleneck: int, prototypes: int) -> int:
    return width * hidden + max(layers - 2, 0) * hidden**2 + hidden * bottleneck + bottleneck * prototypes


def operations_per_second() -> float:
    """The speed of a matrix product on this CPU with PyTorch's threads, the best of three."""
    x, weight = torch.ones(1024, 384), torch.ones(1536, 384)

    def measure() -> float:
        began = time.perf_counter()
        F.linear(x, weight)
        return time.perf_counter() - began

    return 2 * x.numel() * len(weight) / min(measure() for _ in range(3))


def foreseen(cfg, arch: dict, device: torch.device, n_shards: int) -> str:
    """What this machine lacks for a training run, and what to do, in one line; "" if nothing can be foreseen."""
    on_gpu, n_ranks = device.type == "cuda", int(os.environ.get("WORLD_SIZE", 1))
    images = cfg.batch_size // (n_ranks * cfg.gradient_accumulation_steps)
    itemsize = 2 if cfg.dtype == "bf16" or cfg.dtype == "auto" and on_gpu else 4
    here = 1 if on_gpu else int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes that share the memory

    def needs(factor: int) -> float:
        return here * training_estimate(cfg, arch, images // factor, n_shards, itemsize)[1]

    operations = training_estimate(cfg, arch, images, n_shards, itemsize)[0] * cfg.gradient_accumulation_steps
    found = []
    if not on_gpu and operations > 1e12 and (step := operations / operations_per_second()) > 60:
        found.append(f"a step takes about {duration(step)} on this CPU, the run {duration(cfg.steps * step)}; smaller "
                     "networks: docs/pictures.md")
    if needs(1) > (free := free_memory(device)):
        factors = [n for n in range(2, images + 1) if divides(cfg, n)]
        factor = next((n for n in factors if needs(n) < free), factors[-1] if factors else 2)
        found.append(f"{needs(1) / 1e9:.0f} GB of {'GPU ' * on_gpu}memory needed, {free / 1e9:.0f} GB free; "
                     f"{less_memory(cfg, factor)}")
    return ". ".join(found)


def many_patches(vit, shape: torch.Size, name: str) -> str:
    """A note if a ViT needs more than a minute, or more memory than is free, for a batch of images of this shape,
    (B, C, H, W); else "". The time of attention grows with the square of the number of patches."""
    device, (n, _, height, width) = next(vit.parameters()).device, shape
    patches, depth, dim = height * width // vit.patch_size**2, vit.n_blocks, vit.embed_dim
    operations = n * patches * depth * (24 * dim**2 + 4 * dim * patches)
    slow = device.type == "cpu" and operations > 1e12 and (seconds := operations / operations_per_second()) > 60
    needed = 12 * 4 * n * patches * dim  # float32: about twelve vectors per patch at once
    if not slow and needed < free_memory(device):
        return ""
    takes = ([f"about {duration(seconds)}"] if slow else []) + [f"{needed / 1e9:.2g} GB of memory"]
    return (f"{name} has {patches:,} patches at {height} x {width} pixels, which take {' and '.join(takes)}; a smaller "
            f"--size, such as {min(vit.patch_embed.img_size)}, is faster")


def duration(seconds: float) -> str:
    for unit, name in ((31_557_600, "years"), (86_400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:,.0f} {name}"
    return f"{seconds:.0f} seconds"

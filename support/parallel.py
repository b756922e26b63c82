"""Device, processes, sharding. Apache License 2.0."""
import datetime
import importlib.util
import os
import sys
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from support.images import reason


def pick_device(name: str) -> torch.device:
    """"auto" is CUDA if there is a GPU, else the CPU; under torchrun each process gets the GPU of its local rank.
    Raises ValueError if the device asked for is absent."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name!r} is no device; use auto, cpu, cuda or mps")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"--device {name}: PyTorch finds no CUDA GPU here; use --device cpu")
        if device.index is not None and "LOCAL_RANK" in os.environ:
            raise ValueError(f"--device {name}: torchrun gives each process a GPU of its own; use --device cuda")
        device = torch.device("cuda", device.index or int(os.environ.get("LOCAL_RANK", 0)))
        if device.index >= torch.cuda.device_count():
            raise ValueError(f"{device} does not exist, PyTorch finds {torch.cuda.device_count()} GPU(s) here")
        torch.set_float32_matmul_precision("high")  # TF32
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise ValueError(f"--device {name}: PyTorch finds no Apple GPU here; use --device cpu")
    return device


def usable_cores(proc: str = "/proc/self/cgroup", mounts: str = "/sys/fs/cgroup") -> int:
    """CPU cores this process may use: those it is bound to, or its control group's share of their time."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    for line in Path(proc).read_text().splitlines() if os.path.exists(proc) else ():
        _, kinds, group = line.split(":", 2)  # "0::/path" of version 2, "4:cpu,cpuacct:/path" of version 1
        top = Path(mounts) / ("cpu" if kinds else "")
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if kinds else ("cpu.max",)
        inside = top / group.strip("/")  # a container may see its own group as the top, or as what it is outside
        for folder in {top, inside, *inside.parents} if not kinds or "cpu" in kinds.split(",") else ():
            if all((folder / name).is_file() for name in names):
                quota, period = " ".join((folder / name).read_text() for name in names).split()
                if quota not in ("max", "-1"):
                    cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def worker_count(wanted: int, processes_here: int = 1) -> int:
    """`wanted`, or if that is negative as many as there are cores for, but one for the process itself; at most 16."""
    return wanted if wanted >= 0 else max(1, min(16, usable_cores() // processes_here - 1))


def be_deterministic(wanted: bool) -> None:
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # nothing here reads what it has not written


# ----------------------------------------------------------------------------------------------------------------------
# Processes


LONG = timedelta(hours=2)  # that processes wait for each other, as when one lists a folder or writes a large file


def start_processes(device: torch.device, mode: str = "zero2") -> DeviceMesh:
    """The process group of torchrun, or a group of one: both are the same code from here on. Returns who shares weights
    with whom, see share_mesh()."""
    # Features leave the backbone as views of one tensor; nothing here changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    alone = {} if "WORLD_SIZE" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=LONG,
                            device_id=device if device.type == "cuda" else None, **alone)
    return share_mesh(device.type, mode)

SHARDINGS = ("ddp", "zero2", "zero3", "hsdp")


def share_mesh(device_type: str, mode: str) -> DeviceMesh:
    """The mesh for --sharding `mode`: (processes,), or (replicas, shards of one) where there are several:
    for "hsdp" one copy on each machine, for "ddp" one on each process. Raises ValueError on all processes if the
    machines differ in their number of processes."""
    n, rank, here = dist.get_world_size(), dist.get_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if mode == "hsdp":
        places = together(lambda: (here, rank - int(os.environ.get("LOCAL_RANK", 0))))  # and where a machine begins
        if any(size != here or first % here for size, first in places):
            raise ValueError("--sharding hsdp wants as many processes on each machine, numbered machine by machine, but "
                             f"there are {' '.join(str(size) for size, _ in places)} beside the {n} processes; give "
                             "torchrun one --nproc-per-node, or take --sharding zero2")
    n_shards = dict(ddp=1, hsdp=here).get(mode, n)
    if n_shards == n:
        return init_device_mesh(device_type, (n,))
    return init_device_mesh(device_type, (n // n_shards, n_shards), mesh_dim_names=("replicate", "shard"))


def together(work, group=None) -> list:
    """The results of work() on all processes. If it raises on any, raises Failed on all."""
    try:
        mine = work(), ""
    except Exception as error:
        mine = None, why(error)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine, group=group)
    if reasons := [text for _, text in gathered if text]:
        raise Failed(reasons[0])
    return [result for result, _ in gathered]


class Failed(RuntimeError):
    """Something went wrong on one of the processes, which all know now."""


def why(error: BaseException) -> str:
    """In a few words, what the system said: PyTorch hides "No space left on device" behind errors of its own."""
    while isinstance(error, CheckpointException) and error.failures:  # of one process each
        error = next(iter(error.failures.values()))[0]
    cause = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror + (f": {cause.filename}" if cause.filename else "")
        cause = cause.__cause__ or cause.__context__
    return reason(error)


class Agreement:
    """What one process noticed during a step, all know at the end of the next one; so nobody waits for an answer."""

    def __init__(self):
        self.group, self.work, self.flags = dist.new_group(backend="gloo", timeout=LONG), None, torch.zeros(0)

    def tell(self, *noticed: bool) -> list[bool]:
        """Tells the others. Returns what at least one process told at the call before."""
        heard = self.heard() or [False] * len(noticed)
        self.flags = torch.tensor(noticed, dtype=torch.uint8)
        self.work = dist.all_reduce(self.flags, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return heard

    def heard(self) -> list[bool]:
        if self.work is not None:
            self.work.wait()
        return self.flags.bool().tolist()


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join_processes(device: torch.device) -> None:
    """The process group of torchrun, where that has started this process."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" in os.environ:  # some processes may take much longer than others, as reading goes
        dist.init_process_group(device_id=device if device.type == "cuda" else None,
                                timeout=datetime.timedelta(hours=2))


def leave_processes(in_peace: bool) -> None:
    if dist.is_initialized():
        if in_peace:
            dist.barrier()
        dist.destroy_process_group()


def mean_over_processes(metrics: dict[str, Tensor], n_ranks: int) -> dict[str, float]:
    values = torch.stack(list(metrics.values())) / n_ranks
    dist.all_reduce(values)
    return dict(zip(metrics, values.tolist()))


# ----------------------------------------------------------------------------------------------------------------------
# Sharding and activation checkpointing


def local_shards(params) -> list[Tensor]:
    """The part of each parameter (or gradient) that lies on this process, sharing its memory."""
    return [p.to_local() if isinstance(p, DTensor) else p for p in params]


def n_replicas(module: nn.Module) -> int:
    """How many copies of a module's weights the processes hold together."""
    p = next(module.parameters())
    return p.device_mesh.size(0) if isinstance(p, DTensor) and p.device_mesh.ndim == 2 else 1


def all_reduce_in_backward(student: nn.ModuleDict, wanted: bool) -> None:
    """Whether the next backward pass adds up the gradients of several copies of the weights: that of the last part of a
    step does, for all parts."""
    for module in student.values():
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(wanted)


def load_kernel(arch: dict, dtype: torch.dtype, device: torch.device):
    """The attention of kernels/attention.py, see model.Attention. Raises ValueError with the reason if it can't be."""
    if device.type != "cuda":
        raise ValueError(f"--kernels needs an NVIDIA GPU, and this runs on {device.type}; leave it out")
    if dtype != torch.bfloat16:
        raise ValueError("--kernels computes in bf16; leave --dtype fp32 out, or --kernels")
    torch.cuda.set_device(device)
    name = "_dinov2_attention"
    if (module := sys.modules.get(name)) is None:
        spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / "kernels/attention.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)  # where torch.compile looks for it
        spec.loader.exec_module(module)
    try:
        return module.build_kernels(arch["embed_dim"] // arch["num_heads"])
    except ValueError as error:
        raise ValueError(f"--kernels: {error}; leave it out") from None


AHEAD = 2  # blocks whose weights are gathered while one computes; one hides all but a hitch in the network


def shard(network: nn.ModuleDict, mesh: DeviceMesh, dtype: torch.dtype, checkpointing: str = "none",
          compile_blocks: bool = False, with_backward: bool = True, mode: str = "zero2") -> None:
    """Applies, from outside and in this order, recomputation, torch.compile and FSDP2, to each block and each head.

    Master weights and gradient reduction stay float32; the backbone computes in `dtype`. Heads compute in float32
    (TF32 on a GPU): bfloat16 logits divided by a temperature of 0.04 would be off by 0.1. The student keeps its
    gathered weights until the backward pass, with `mode` "zero3" only those of the heads, with which that begins; the
    teacher, which has none, must give them up after each forward: FSDP2 would keep those of the root, and
    update_teacher() would change copies. What computes in float32 on a process alone has nothing to share or to cast:
    it needs no FSDP2, which would copy its weights and gradients.
    """
    backbone, blocks = network["backbone"], network["backbone"].block_list()
    if compile_blocks:  # with rates of stochastic depth that rise from block to block, each has a graph of its own
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 8 + 2 * len(blocks))
    for block in blocks:
        if checkpointing != "none":
            block.forward = checkpointed(block.forward, checkpointing)
        if compile_blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)  # one for all blocks
    alone = mesh.size() == 1
    if alone and dtype == torch.float32:
        return
    policy = dict(mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32))
    for module in [*blocks, backbone]:
        fully_shard(module, **policy, reshard_after_forward=mode == "zero3" or not with_backward)
    heads = [module for name, module in network.items() if name != "backbone" and not alone]
    policy["mp_policy"] = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    for head in heads:
        fully_shard(head, **policy, reshard_after_forward=not with_backward)
    prefetch(backbone, blocks, heads)


def prefetch(backbone: nn.Module, blocks: list[nn.Module], heads: list[nn.Module]) -> None:
    """Has the weights of the next blocks gathered while one computes, in both directions, and those of the heads, the
    largest, while the backbone does: FSDP2 sees roots of their own in them, which would wait for its end."""
    def gather_heads(*_):
        for head in heads:
            head.unshard(async_op=True)  # every head is called after the backbone, and waits for this

    backbone.set_modules_to_forward_prefetch(blocks[:AHEAD])
    for i, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + AHEAD])
        block.set_modules_to_backward_prefetch(blocks[max(i - AHEAD, 0) : i][::-1])
    backbone.register_forward_pre_hook(gather_heads)

CHECKPOINTING = ("none", "selective", "full")

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}

ATTENTION = ("aten::_scaled_dot_product_", "dinov2::attention")  # has a name per device; and ours


def checkpointed(forward, way: str):
    """`forward`, which keeps for its backward pass only its input, or with "selective" also the results of matrix
    products and attention, which take nearly all of the time. A function, since torch.compile passes over a partial."""
    contexts = dict(context_fn=partial(create_selective_checkpoint_contexts, keep_products))

    def forward_and_forget(*arguments):
        return checkpoint(forward, *arguments, use_reentrant=False, **contexts if way == "selective" else {})

    return forward_and_forget


def keep_products(context, op, *args, **kwargs) -> CheckpointPolicy:
    kept = op in PRODUCTS or op.name().startswith(ATTENTION)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

"""Device, processes, sharding, activation checkpointing. Apache License 2.0."""
import contextlib
import importlib.util
import ipaddress
import math
import os
import re
import socket
import struct
import sys
import time
import uuid
import warnings
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts


# ----------------------------------------------------------------------------------------------------------------------
# Device


def pick_device(name: str) -> torch.device:
    """`name` is auto (a GPU if there is one), cpu, cuda, cuda:N or mps; under torchrun each process gets the GPU of its
    local rank. Raises ValueError if there is no such device."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise ValueError(f"--device {name!r} is not a device; use auto, cpu, cuda or mps")
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
    if device.type == "cpu" and (note := busy_note()):
        print(f"note: {note}", file=sys.stderr, flush=True)
    return device


def usable_cores(proc: str = "/proc/self/cgroup", mounts: str = "/sys/fs/cgroup") -> int:
    """The number of CPU cores this process may use: its affinity mask, or the quota of its control group if lower."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    for line in Path(proc).read_text().splitlines() if os.path.exists(proc) else ():
        _, kinds, group = line.split(":", 2)  # "0::/path" in version 2, "4:cpu,cpuacct:/path" in version 1
        top = Path(mounts) / ("cpu" if kinds else "")
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if kinds else ("cpu.max",)
        inside = top / group.strip("/")  # a container may see its own group at the top, or under its path outside
        for folder in {top, inside, *inside.parents} if not kinds or "cpu" in kinds.split(",") else ():
            if all((folder / name).is_file() for name in names):
                quota, period = " ".join((folder / name).read_text() for name in names).split()
                if quota not in ("max", "-1"):
                    cores = min(cores, max(1, int(quota) // int(period)))
    return cores


def busy_note() -> str:
    """What to say if PyTorch has more threads than there are free cores, since all threads wait for the slowest; else
    "". Silent if OMP_NUM_THREADS is set."""
    threads, cores = torch.get_num_threads(), usable_cores()
    if "OMP_NUM_THREADS" in os.environ or threads == 1:
        return ""
    load = os.getloadavg()[0] if sys.platform != "win32" else 0.0
    free = max(1, min(cores, round((os.cpu_count() or 1) - load)))
    if threads <= free:
        return ""
    why = f"a load of {load:.1f} on {os.cpu_count()} cores" if free < cores else f"{cores} cores are available"
    return f"{why}, and PyTorch has {threads} threads; it may be faster with OMP_NUM_THREADS={free}"


def worker_count(wanted: int, processes_here: int = 1) -> int:
    """`wanted`, or if that is negative, one worker per core, leaving one core for the process itself; at most 16."""
    return wanted if wanted >= 0 else max(1, min(16, usable_cores() // processes_here - 1))


def be_deterministic(wanted: bool) -> None:
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the GPU is first used
    torch.use_deterministic_algorithms(wanted)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs time, and nothing here reads such memory


# ----------------------------------------------------------------------------------------------------------------------
# Processes


TIMEOUT = timedelta(minutes=15)  # of collectives that all processes reach at about the same time, as in a step
LONG_TIMEOUT = timedelta(hours=2)  # of those where one process may list a large folder or read a large file first

LOCAL_ADDR = "between machines, give each torchrun --local-addr and the address of its machine"

patient_group = None  # the group of on_all_ranks(), with LONG_TIMEOUT


def start_processes(device: torch.device, sharding: str = "zero2") -> DeviceMesh:
    """Joins torchrun's process group, or makes a group of one, so that no other code needs to tell them apart. Returns
    make_mesh()'s mesh. Raises ValueError as join_processes() does."""
    # The backbone returns views of one tensor; nothing here changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    join_processes(device)
    if not dist.is_initialized():
        connect(device, dist.HashStore(), 0, 1)
    return make_mesh(device.type, sharding)


def join_processes(device: torch.device) -> None:
    """Joins torchrun's process group, if torchrun started this process. Raises ValueError if the others cannot be
    reached."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "WORLD_SIZE" not in os.environ:
        return
    there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun has started the store already
    try:
        store, rank, n = next(dist.rendezvous("env://", timeout=timedelta(minutes=1) if there else TIMEOUT))
        store.set_timeout(TIMEOUT)
        store = store_of_this_start(store, rank, n)
    except dist.DistError as error:
        raise ValueError(f"the processes did not meet at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']} "
                         f"({root_cause(error).rstrip('.')}); {LOCAL_ADDR}") from None
    choose_interface(store, rank, n)
    connect(device, store, rank, n)


def connect(device: torch.device, store: dist.Store, rank: int, n: int) -> None:
    """Makes the default process group and that of on_all_ranks()."""
    global patient_group
    on_gpu = device.type == "cuda"
    dist.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=n, timeout=TIMEOUT,
                            device_id=device if on_gpu else None)
    patient_group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)


def leave_processes(wait_for_others: bool) -> None:
    """Destroys the process group, if there is one; with `wait_for_others`, after a barrier."""
    global patient_group
    if dist.is_initialized():
        if wait_for_others:
            dist.barrier()
        dist.destroy_process_group()
    patient_group = None


def store_of_this_start(store: dist.Store, rank: int, n: int) -> dist.Store:
    """A part of the store that holds no keys from before a restart.

    After a failure torchrun gives the new processes the store of the old ones, in which they would find the addresses
    of dead processes and wait for them. TORCHELASTIC_RESTART_COUNT does not identify a start, since each machine counts
    its own. So rank 0 makes up a name for the part and tells it to all who ask, dead or alive; the others ask under a
    new random name each time, so that they never take an old answer for theirs.
    """
    if rank:
        me = uuid.uuid4().hex
        store.set(f"rank {rank}", me)
        name = store.get(f"answer to {me}").decode()
        store.add(f"{name} joined by", 1)
        return dist.PrefixStore(name, store)
    name, answered, end = uuid.uuid4().hex, set(), time.monotonic() + TIMEOUT.total_seconds()
    while (joined := store.add(f"{name} joined by", 0)) < n - 1:
        for other in {store.get(f"rank {r}").decode() for r in range(1, n)} - answered:
            store.set(f"answer to {other}", name)
            answered.add(other)
        if time.monotonic() > end:
            raise dist.DistStoreError(f"only {joined + 1} of {n} processes arrived")
        time.sleep(0.01)
    return dist.PrefixStore(name, store)


def choose_interface(store: dist.Store, rank: int, n: int) -> None:
    """Between machines, has gloo use the network interface that leads to MASTER_ADDR, unless GLOO_SOCKET_IFNAME names
    one. By default gloo uses the address that this machine's hostname resolves to: 127.0.0.1 in many clouds."""
    if n == int(os.environ.get("LOCAL_WORLD_SIZE", 1)) or sys.platform != "linux":
        return
    address = address_towards(os.environ["MASTER_ADDR"])
    store.set(f"address of {rank}", address)
    if ipaddress.ip_address(address).is_loopback:  # MASTER_ADDR is this machine; the last rank runs on another
        address = address_towards(store.get(f"address of {n - 1}").decode())
    if "GLOO_SOCKET_IFNAME" not in os.environ:
        if name := interface_of(address):
            os.environ["GLOO_SOCKET_IFNAME"] = name
        else:
            print(f"note: no network interface has {address} as its first address; if the processes cannot reach each "
                  "other, name one in GLOO_SOCKET_IFNAME", file=sys.stderr, flush=True)


def address_towards(host: str) -> str:
    """This machine's address on the route to a host. Raises ValueError if there is none."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as s:
            s.connect(target)  # UDP: nothing is sent
            return s.getsockname()[0]
    except OSError as error:
        raise ValueError(f"no network leads to {host} ({error.strerror}); {LOCAL_ADDR}") from None


def interface_of(address: str) -> str:
    """The name of the network interface whose first IPv4 address, or any IPv6 address, this is; "" if there is none."""
    import fcntl  # Linux

    wanted, found = ipaddress.ip_address(address).packed, {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # it has no IPv4 address
                found[fcntl.ioctl(s, 0x8915, struct.pack("256s", name.encode()))[20:24]] = name  # SIOCGIFADDR
    if (table := Path("/proc/net/if_inet6")).exists():
        rows = map(str.split, table.read_text().splitlines())
        found |= {bytes.fromhex(digits): name for digits, *_, name in rows}
    return found.get(wanted, "")


def world() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Communication


class Failed(RuntimeError):
    """Something failed on at least one process, and every process knows."""


class Lost(Failed):
    """Another process is gone."""


LOSS = re.compile("remote (?:process|peer)|network error|aborted|tim(?:ed ?|e)out|connection", re.I)  # NCCL's words


@contextlib.contextmanager
def noticing_losses():
    """Raises Lost where communication fails because another process has ended or has not answered in time."""
    try:
        yield
    except RuntimeError as error:  # from gloo; from a store; from NCCL, which says the same of its other failures
        if not ("gloo/transport" in str(error) or isinstance(error, (dist.DistNetworkError, dist.DistStoreError))
                or isinstance(error, dist.DistBackendError) and LOSS.search(str(error))):
            raise
        reason = root_cause(error).rpartition("] ")[2].partition(". ")[0]  # without gloo's source file and its advice
        restarts = [int(os.environ.get(f"TORCHELASTIC_{name}", 0)) for name in ("RESTART_COUNT", "MAX_RESTARTS")]
        what = "torchrun starts all again" if restarts[0] < restarts[1] else "run the same command again"
        raise Lost(f"contact with another process was lost ({reason}); {what}") from None


def on_all_ranks(work, group=None) -> list:
    """Calls work() on every rank and returns all results, by rank. If it raises on any, raises Failed on all. Ranks
    wait up to LONG_TIMEOUT for the slowest."""
    cause = None
    try:
        mine = work(), ""
    except Exception as error:
        mine, cause = (None, root_cause(error)), error
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, mine, group=group or patient_group)
    if failures := [text for _, text in gathered if text]:
        raise Failed(failures[0]) from cause
    return [result for result, _ in gathered]


def in_turns(work):
    """Calls work() on every rank and returns this rank's result. Rank 0 goes first, then one process of each other
    machine, then the rest, which find what the first ones cached. If it raises on any, raises ValueError on all."""
    rank, n_ranks = world()
    if n_ranks == 1:
        return work()
    mine, turn = [], 0 if rank == 0 else 1 if os.environ.get("LOCAL_RANK", "0") == "0" else 2
    try:
        for now in range(3):
            on_all_ranks(lambda: mine.append(work()) if now == turn else None)
    except Failed as error:
        raise ValueError(str(error)) from None
    return mine[0]


def from_rank_0(work):
    """Returns the result of work() on rank 0 to all ranks. If it raises there, raises ValueError on all."""
    rank, n_ranks = world()
    if n_ranks == 1:
        return work()
    try:
        return on_all_ranks(lambda: work() if rank == 0 else None)[0]
    except Failed as error:
        raise ValueError(str(error)) from None


def root_cause(error: BaseException) -> str:
    """What the operating system said, in one line, if it is to blame: PyTorch wraps "No space left on device" in errors
    of its own. Otherwise the first line of the error. images.short_reason does the same for damaged images,
    cli.last_line for errors that data-loading workers send."""
    from torch.distributed.checkpoint.api import CheckpointException  # slow to import

    while isinstance(error, CheckpointException) and error.failures:  # {rank: (error, traceback)}
        error = next(iter(error.failures.values()))[0]
    cause = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror + (f": {cause.filename}" if cause.filename else "")
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return str(error).strip().partition("\n")[0] or type(error).__name__


class SharedFlags:
    """Shares flags between processes without blocking, one step late: each call starts the exchange that the next one
    collects, so that training never waits for an answer."""

    def __init__(self):
        # If a process is lost, this reports it in one line, shortly before NCCL's watchdog would in many.
        self.group = dist.new_group(backend="gloo", timeout=0.9 * TIMEOUT)
        self.work, self.flags = None, torch.zeros(0)

    def share(self, *flags: bool) -> list[bool]:
        """Starts sharing these flags. Returns, for each, whether any process had set it in the call before."""
        before = self.wait() or [False] * len(flags)
        self.flags = torch.tensor(flags, dtype=torch.uint8)
        self.work = dist.all_reduce(self.flags, dist.ReduceOp.MAX, group=self.group, async_op=True)
        return before

    def wait(self) -> list[bool]:
        """The flags of the last call, once all processes have made it."""
        if self.work is not None:
            self.work.wait()
        return self.flags.bool().tolist()


def mean_over_processes(metrics: dict[str, Tensor], n_ranks: int) -> dict[str, float]:
    values = torch.stack(list(metrics.values())) / n_ranks
    dist.all_reduce(values)
    return dict(zip(metrics, values.tolist()))


# ----------------------------------------------------------------------------------------------------------------------
# Sharding


SHARDINGS = ("ddp", "zero2", "zero3", "hsdp")

PREFETCHED_BLOCKS = 2  # gathered while one block computes; one is enough unless the network stalls


def make_mesh(device_type: str, sharding: str) -> DeviceMesh:
    """The mesh (shards,), or (replicas, shards) if the processes hold several replicas of the weights: one per machine
    with "hsdp", one per process with "ddp". Raises ValueError on all processes if "hsdp" finds machines with different
    numbers of processes."""
    n, rank, here = dist.get_world_size(), dist.get_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    if sharding == "hsdp":
        machines = on_all_ranks(lambda: (here, rank - int(os.environ.get("LOCAL_RANK", 0))))  # (size, first rank)
        if any(size != here or first % here for size, first in machines):
            found = ", ".join(f"{size} from rank {first}" for size, first in sorted({*machines}, key=lambda m: m[1]))
            raise ValueError("--sharding hsdp needs the same number of processes on every machine, with consecutive "
                             f"ranks; found {found}. Use the same --nproc-per-node everywhere, or --sharding zero2")
    n_shards = dict(ddp=1, hsdp=here).get(sharding, n)
    if n_shards == n:
        return init_device_mesh(device_type, (n,))
    return init_device_mesh(device_type, (n // n_shards, n_shards), mesh_dim_names=("replicate", "shard"))


def shard(network: nn.ModuleDict, mesh: DeviceMesh, dtype: torch.dtype, checkpointing: str = "none",
          compile_blocks: bool = False, with_backward: bool = True, mode: str = "zero2") -> None:
    """Applies activation checkpointing, torch.compile and FSDP2, in this order, to each block and each head.

    Master weights and gradient reduction are float32; the backbone computes in `dtype`. Heads compute in float32 (TF32
    on a GPU): bfloat16 logits divided by a temperature of 0.04 would be off by 0.1. The student keeps its gathered
    weights until the backward pass; with `mode` "zero3" it keeps only those of the heads, which the backward pass needs
    first. The teacher has no backward pass and must free them after each forward: FSDP2 would keep those of the root
    module, and update_teacher() would then update copies. A single process computing in float32 has nothing to shard or
    to cast and goes without FSDP2, which would copy its weights and gradients.
    """
    backbone, blocks = network["backbone"], network["backbone"].block_list()
    if compile_blocks:  # blocks with different rates of stochastic depth have different graphs
        config = importlib.import_module("torch._dynamo").config  # slow to import
        config.recompile_limit = max(config.recompile_limit, 8 + 2 * len(blocks))
    for block in blocks:
        if checkpointing != "none":
            block.forward = checkpointed(block.forward, checkpointing)
        if compile_blocks:
            block.forward = torch.compile(block.forward, fullgraph=True, dynamic=False)  # one graph for all blocks
    alone = mesh.size() == 1
    if alone and dtype == torch.float32:
        return
    heads = [module for name, module in network.items() if name != "backbone" and not alone]
    apply_fsdp([*blocks, backbone], mesh, dtype, reshard_after_forward=mode == "zero3" or not with_backward)
    apply_fsdp(heads, mesh, torch.float32, reshard_after_forward=not with_backward)
    prefetch(backbone, blocks, heads)


def apply_fsdp(modules: list[nn.Module], mesh: DeviceMesh, dtype: torch.dtype, reshard_after_forward: bool) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard  # slow to import

    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for module in modules:
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward)


def prefetch(backbone: nn.Module, blocks: list[nn.Module], heads: list[nn.Module]) -> None:
    """Gathers the weights of the next blocks while one block computes, in both directions, and those of the heads, the
    largest, while the backbone does: FSDP2 treats each head as a separate root and would wait for the backbone."""
    def gather_heads(*_):
        for head in heads:
            head.unshard(async_op=True)  # each head waits for this when it is called, after the backbone

    n = PREFETCHED_BLOCKS
    backbone.set_modules_to_forward_prefetch(blocks[:n])
    for i, block in enumerate(blocks):
        block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + n])
        block.set_modules_to_backward_prefetch(blocks[max(i - n, 0) : i][::-1])
    backbone.register_forward_pre_hook(gather_heads)


def local_shards(tensors) -> list[Tensor]:
    """This process's shard of each tensor, sharing its memory; the tensor itself if it is not sharded."""
    from torch.distributed.tensor import DTensor  # slow to import

    return [t.to_local() if isinstance(t, DTensor) else t for t in tensors]


def materialize(network: nn.Module, device: torch.device, initialize) -> None:
    """Gives a network on the meta device memory and initial values. `initialize` fills the parameters that a module
    holds itself: full ones on the CPU, one module at a time, of which this process then keeps its shards. So the values
    do not depend on the number of processes, and no process ever holds the whole network."""
    network.to_empty(device=device)
    for module in network.modules():
        held = dict(module.named_parameters(recurse=False))
        module._parameters.update({name: nn.Parameter(torch.full(p.shape, math.nan)) for name, p in held.items()})
        initialize(module)
        whole = {name: module._parameters[name] for name in held}
        module._parameters.update(held)
        unset = [name for name, p in whole.items() if p.isnan().any()]
        assert not unset, f"{unset[0]} of {type(module).__name__} has no initial value: see model.init_parameters()"
        load_whole(held, whole)


@torch.no_grad()
def load_whole(parameters: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copies full tensors, which every process holds, into parameters that may be sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor  # slow to import

    for name, p in parameters.items():
        value = values[name]
        if isinstance(p, DTensor):
            value = distribute_tensor(value, p.device_mesh, p.placements, src_data_rank=None)
        local_shards([p])[0].copy_(local_shards([value])[0])


def n_replicas(module: nn.Module) -> int:
    """How many replicas of a module's weights the processes hold between them."""
    from torch.distributed.tensor import DTensor  # slow to import

    p = next(module.parameters())
    return p.device_mesh.size(0) if isinstance(p, DTensor) and p.device_mesh.ndim == 2 else 1


def full_weights(module: nn.Module, cpu_offload: bool = False) -> dict[str, Tensor]:
    """The unsharded weights of a module. Call it on all ranks; with `cpu_offload` only rank 0 gets them, on the CPU."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict  # slow to import

    return get_model_state_dict(module, options=StateDictOptions(full_state_dict=True, cpu_offload=cpu_offload))


def is_sharded(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor  # slow to import

    return isinstance(tensor, DTensor)


def all_reduce_in_backward(student: nn.ModuleDict, wanted: bool) -> None:
    """Whether the next backward pass sums the gradients over the replicas of the weights. With gradient accumulation
    only the last one of a step does, for all of them."""
    from torch.distributed.fsdp import FSDPModule  # slow to import

    for module in student.values():
        if isinstance(module, FSDPModule):
            module.set_requires_all_reduce(wanted)


# ----------------------------------------------------------------------------------------------------------------------
# Activation checkpointing, and our attention kernel


CHECKPOINTING = ("none", "selective", "full")

MATMULS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default}

ATTENTION = ("aten::_scaled_dot_product_", "dinov2::attention")  # PyTorch's, one name per backend; ours


def checkpointed(forward, how: str):
    """`forward` with activation checkpointing, "full" or "selective": the latter also keeps the results of matrix
    products and attention, which take nearly all of the time to compute. Returns a function since torch.compile does
    not trace functools.partial."""
    contexts = dict(context_fn=partial(create_selective_checkpoint_contexts, keep_costly)) if how == "selective" else {}

    def forward_with_checkpointing(*arguments):
        return checkpoint(forward, *arguments, use_reentrant=False, **contexts)

    return forward_with_checkpointing


def keep_costly(context, op, *args, **kwargs) -> CheckpointPolicy:
    costly = op in MATMULS or op.name().startswith(ATTENTION)
    return CheckpointPolicy.MUST_SAVE if costly else CheckpointPolicy.PREFER_RECOMPUTE


def load_kernel(arch: dict, dtype: torch.dtype, device: torch.device):
    """The attention function of kernels/attention.py, see model.Attention. Raises ValueError if it cannot be used here.
    """
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

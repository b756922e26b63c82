"""What protects a run: its folder and lock, saves, signals and log. Apache License 2.0.

A save, out/resume/step_N, holds tensors as torch.distributed.checkpoint writes them (*.distcp, .metadata), and the file
`complete`: the step, the counters and the SHA-256 of the other files.
"""
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import sys
import threading
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from tqdm import tqdm

from support.parallel import TIMEOUT, Failed, local_shards, on_all_ranks, root_cause


# ----------------------------------------------------------------------------------------------------------------------
# Files


@contextlib.contextmanager
def replacing(path: Path, durable: bool = False):
    """Yields a temporary path, where the caller writes a file or a folder, and then renames it to `path`: readers
    never see a partial file, with `durable` not even after a power cut, and a failure leaves nothing behind."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        yield temporary
        if durable:
            make_durable(temporary)
        os.replace(temporary, path)
        if durable:
            make_durable(path.parent)
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(temporary) if temporary.is_dir() else temporary.unlink()


def make_durable(path: Path) -> None:
    """Waits until a file, or the list of names in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, write) -> None:
    """Calls write(file), then renames the finished file to `path`. Raises ValueError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            write(file)
    except (OSError, RuntimeError) as error:  # PyTorch raises RuntimeError on a full disk
        raise ValueError(f"{path} could not be written ({getattr(error, 'strerror', None) or error})") from None


def write_json(path: Path, content: dict) -> None:
    with replacing(path, durable=True) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def sha256(path: Path, show_progress: bool = False) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file, tqdm(total=path.stat().st_size, desc=f"verifying {path.name}", unit="B", delay=1,
                                        unit_scale=True, leave=False, disable=None if show_progress else True) as bar:
        while piece := file.read(1 << 22):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------------------
# The output folder


OUTPUTS = (  # besides config.json, which marks a run
    "ckpt.pth", "metrics.jsonl", "resume", "eval", "bad_samples.txt", "first_batch.png", "nonfinite")

PARTIAL = (  # what a killed run may leave half-written; not all of .*.partial, since evaluations also write there
    ".config.json", ".ckpt.pth", ".metrics.jsonl", ".bad_samples.txt", "eval/*/.teacher_checkpoint.pth", "nonfinite/.*")


def check_output(cfg, resume: bool, overwrite: bool, changeable: set[str]) -> None:
    """Raises ValueError if --out holds anything but this run, unless the flags allow that. Writes nothing."""
    out = Path(cfg.out)
    if resume and overwrite:
        raise ValueError("--resume continues the run in --out, --overwrite deletes it; give one of the two")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if not (out / "config.json").exists():
        if resume:
            raise ValueError(f"--resume: {out} holds no run; omit the flag to start one")
        if foreign := [name for name in OUTPUTS if (out / name).exists()]:
            raise ValueError(f"--out {out} holds {foreign[0]} but no config.json, so it is not a training run; "
                             "choose another --out")
    elif not (resume or overwrite):
        try:
            theirs = json.loads((out / "config.json").read_text())
        except ValueError:
            raise ValueError(f"{out}/config.json is damaged; --resume continues the run with these settings") from None
        mine, defaults = (json.loads(json.dumps(dataclasses.asdict(c))) for c in (cfg, type(cfg)()))
        theirs = defaults | theirs  # older versions had fewer fields
        changed = [f"{k} {theirs[k]} -> {v}" for k, v in mine.items() if theirs[k] != v and k not in changeable]
        if changed:
            some = ", ".join(changed[:12]) + " …" * (len(changed) > 12)
            raise ValueError(f"--out {out} holds a different run ({some}); choose another --out, or --overwrite it, or "
                             "--resume it with the new values")


def restarted() -> bool:
    """Whether torchrun has restarted this command because a process failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def claim_output(cfg, overwrite: bool) -> None:
    """Makes --out this run's folder: removes what killed runs left half-written and, with `overwrite`, their run."""
    out = Path(cfg.out)
    for path in [out / name for name in OUTPUTS if (out / name).exists()] if overwrite else []:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for path in itertools.chain.from_iterable(out.glob(f"{name}.*.partial") for name in PARTIAL):
        path.unlink(missing_ok=True)
    write_json(out / "config.json", dataclasses.asdict(cfg))


class OutputLock:
    """Keeps other runs away from --out: rank 0 holds an operating-system lock on the file `lock` in it.

    The system frees it when the process ends, however it ends, so it is never stale. On NFS it also works between Linux
    machines; the locks of one that vanishes are freed after a minute or two. Raises ValueError if another process has
    the lock, or if the folder cannot be written.
    """

    LEASE = 120  # seconds to wait for an owner on another machine, which may have vanished

    def __init__(self, out: Path):
        self.path, self.lost, self.descriptor = out / "lock", False, None
        self.guard = threading.Lock()  # training and the thread that saves both call check()
        try:
            self.take()
            self.devices = os.stat(out.parent).st_dev, os.stat(out).st_dev
        except OSError as error:
            self.release()
            raise ValueError(f"--out {out} cannot be written ({root_cause(error)}); choose another folder") from None
        if os.name == "posix":  # data-loading workers would share the lock, and keep it if they outlived this process
            os.register_at_fork(after_in_child=self.close)

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.release()

    def take(self, wait: bool = True) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        here, waited = f" on {socket.gethostname()}", 0
        while not self.is_ours():  # the last owner may remove the file just before we lock it
            self.close()
            self.descriptor = lock_file(self.path)
            if self.descriptor is None:
                owner = "another process"
                with contextlib.suppress(OSError):  # removed, or on SMB, where nobody else may read a locked file
                    owner = self.path.read_text() or owner
                if not wait or owner.endswith(here) or waited >= self.LEASE:
                    raise ValueError(f"--out {self.path.parent} is in use by {owner}; wait for it, or choose another "
                                     "--out")
                if not waited:
                    print(f"note: {self.path} is locked by {owner}; waiting up to {self.LEASE} s in case that machine "
                          "is gone", file=sys.stderr, flush=True)
                time.sleep(1)
                waited += 1
        with contextlib.suppress(PermissionError):  # on SMB a locked file can only be written through its descriptor
            self.path.write_text(f"process {os.getpid()}{here}")

    def is_ours(self) -> bool:
        """Whether the file we have locked is still there under its name."""
        try:
            return self.descriptor is not None and os.path.samestat(os.fstat(self.descriptor), os.stat(self.path))
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ESTALE):  # ESTALE: deleted on another machine
                raise
            return False

    def check(self, take_back: bool = True) -> None:
        """Call it before writing. If --out was deleted, takes the lock again, or raises OSError without `take_back`.
        Also raises OSError if the file system is gone, or if another run has started in --out: then `lost` is set."""
        with self.guard:
            if not self.is_ours():
                self.recover(take_back)

    def recover(self, take_back: bool) -> None:
        out = self.path.parent
        if os.stat(out.parent).st_dev != self.devices[0] or out.exists() and os.stat(out).st_dev != self.devices[1]:
            raise OSError(errno.ENODEV, "its file system is gone", str(out))  # but may be mounted again
        if not self.lost and not (out / "config.json").exists():  # otherwise another run has used the folder since
            if not take_back:
                raise OSError(errno.ENOENT, "it was deleted", str(out))
            with contextlib.suppress(ValueError):
                return self.take(wait=False)
        self.lost = True
        raise OSError(errno.EBUSY, "another run has taken over", str(out))

    def release(self) -> None:
        with contextlib.suppress(OSError):
            if self.is_ours():
                self.path.unlink()
        self.close()

    def close(self) -> None:
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def lock_file(path: Path) -> int | None:
    """Locks a file. Returns its descriptor, or None if another process has the lock. Where there are no locks, says so
    and continues without one."""
    # NFS locks need a file open for writing; elsewhere that would keep the disk from being remounted read-only.
    for mode in (os.O_RDONLY, os.O_RDWR):
        descriptor = os.open(path, mode | os.O_CREAT, 0o666)
        try:
            import fcntl  # Windows has none

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the latter on CIFS
            os.close(descriptor)
            return None
        except (OSError, ImportError) as error:
            if isinstance(error, OSError) and error.errno == errno.EBADF and mode == os.O_RDONLY:
                os.close(descriptor)
                continue
            print(f"note: --out cannot be locked here ({root_cause(error)}); make sure that no other run uses it",
                  file=sys.stderr, flush=True)
        return descriptor


def take_output(cfg) -> OutputLock | None:
    """The lock on --out for rank 0, None on the others. Raises ValueError on all if rank 0 cannot have it."""
    lock = None

    def take() -> None:  # a lock cannot be sent to other ranks, so it is not returned
        nonlocal lock
        if dist.get_rank() == 0:
            lock = OutputLock(Path(cfg.out))

    try:
        on_all_ranks(take)
    except Failed as error:
        raise ValueError(str(error)) from None
    return lock


# ----------------------------------------------------------------------------------------------------------------------
# Reading saves


def read_complete(save: Path) -> dict | str:
    """The content of the file `complete` of a save; or what is wrong with it, in words."""
    try:
        complete = json.loads((save / "complete").read_text())
        files, _ = dict(complete["files"]), (int(complete["step"]), dict(complete["counters"]))
    except FileNotFoundError:
        return "complete: missing"
    except (ValueError, TypeError, KeyError):
        return "complete: not readable"
    missing = files.keys() - {path.name for path in save.iterdir()}
    return f"{min(missing)}: missing" if missing else complete


def verify(save: Path) -> dict | str:
    """The content of `complete` if all files of a save are as it says; or what is wrong, in words. To be called on all
    ranks, each of which checks a share of the files. Raises Failed on all if one cannot read its share."""
    def check_share() -> str:
        share = sorted(complete["files"])[dist.get_rank() :: dist.get_world_size()]
        wait_for_files(save, share)
        wrong = (n for n in share if sha256(save / n, show_progress=True) != complete["files"][n])
        return next((f"{name}: its SHA-256 differs" for name in wrong), "")

    complete = on_all_ranks(lambda: read_complete(save) if dist.get_rank() == 0 else None)[0]
    return complete if isinstance(complete, str) else next(filter(None, on_all_ranks(check_share)), complete)


def wait_for_files(folder: Path, names, seconds: int = 60) -> set[str]:
    """Waits until this machine sees files that others have written: a network file system may take a while. Returns
    the names of those still missing."""
    for _ in range(seconds):
        if not (missing := {*names} - {*(os.listdir(folder) if folder.exists() else ())}):
            break
        time.sleep(1)
    return missing


class MetadataOnly(pickle.Unpickler):
    """Reads the table of contents of a save, which PyTorch writes as a pickle, and refuses anything else in it."""

    def find_class(self, module: str, name: str):
        known = {"torch.distributed.checkpoint.metadata": (
            "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
            "StorageMeta", "_MEM_FORMAT_ENCODING"), "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
            "torch": ("Size", "float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8",
                      "bool"), "torch.serialization": ("_get_layout",),
            "pathlib": ("PosixPath", "WindowsPath"), "pathlib._local": ("PosixPath", "WindowsPath")}
        if name in known.get(module, ()):  # exact names: a dotted one would reach through the module to others
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds code, {module}.{name}; nothing in it was run")


def check_metadata(path: Path) -> None:
    """Call it before PyTorch's own reader, which would run code in the pickle or in any entry that is not a tensor.
    Raises UnpicklingError if there is any."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata  # slow to import

    with open(path, "rb") as file:
        metadata = MetadataOnly(file).load()
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise pickle.UnpicklingError(f"its entry {name} is not a tensor; nothing in it was run")


def networks_of(state) -> dict[str, dict[str, Tensor]]:
    """{part: {name: tensor}} of everything a run needs to continue, except the optimizers' state. No copies."""
    return dict(student=dict(state.student.named_parameters()), teacher=dict(state.teacher.named_parameters()),
                centers=state.centers)


def optimizer_state_of(state) -> dict[str, dict]:
    """{parameter: its state}, for the parameters that have had a gradient."""
    states = [optimizer.state for optimizer in state.optimizers]
    return {name: entries[p] for name, p in state.student.named_parameters() for entries in states if p in entries}


def optimizer_tensors_of(state) -> dict[str, dict[str, Tensor]]:
    """{entry of the state, such as exp_avg: {parameter: tensor}}. Numbers become tensors; None is left out. Raises
    ValueError for anything else."""
    tensors: dict[str, dict[str, Tensor]] = {}
    for name, entries in optimizer_state_of(state).items():
        for key, value in entries.items():
            if value is not None:
                if not isinstance(value, (Tensor, int, float)):
                    raise ValueError(f"the optimizer's {key!r} of {name} is a {type(value).__name__}; only tensors and "
                                     "numbers can be saved")
                value = value if torch.is_tensor(value) else torch.tensor(value, dtype=torch.float64)
                tensors.setdefault(key, {})[name] = value
    return tensors


def tensors_of(state) -> dict[str, dict[str, Tensor]]:
    """{part: {name: tensor}} of the networks, centers and optimizers of a run, no copies: what a save holds. Only
    tensors are saved, so nothing else needs to be read."""
    return networks_of(state) | optimizer_tensors_of(state)


def create_optimizer_state(state) -> None:
    """Has each optimizer create its own state for all parameters, in a step with zero gradients and lr 0."""
    for optimizer in state.optimizers:
        for group in optimizer.param_groups:
            group["lr"] = 0.0
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def load_save(state, save: Path) -> None:
    """Fills networks, centers and optimizers from a save. Raises ValueError if other optimizers wrote it."""
    import torch.distributed.checkpoint as dcp  # slow to import

    create_optimizer_state(state)
    tensors = networks_of(state)
    saved = dcp.FileSystemReader(save).read_metadata().state_dict_metadata.keys()
    saved = {name for name in saved if name.partition(".")[0] not in tensors}
    created = [(key, name, t) for key, named in optimizer_tensors_of(state).items() for name, t in named.items()]
    with_state = {name for key, name, _ in created if f"{key}.{name}" in saved}
    created = {f"{key}.{name}": (key, name, t) for key, name, t in created if name in with_state}
    if saved != created.keys():
        raise ValueError(f"another optimizer wrote it: {min(saved ^ created.keys())}")
    for key, name, tensor in created.values():
        tensors.setdefault(key, {})[name] = tensor
    dcp.load(tensors, checkpoint_id=str(save))
    for name, entries in optimizer_state_of(state).items():
        entries.update({key: type(value)(tensors[key][name].item()) for key, value in entries.items()
                        if isinstance(value, (int, float)) and name in with_state})
    for optimizer in state.optimizers:  # a parameter that had no gradient yet starts without state
        for name, p in state.student.named_parameters():
            if name not in with_state:
                optimizer.state.pop(p, None)


def load_newest(state, folder: Path) -> tuple[dict, list[str]]:
    """Loads the newest intact save in `folder`, written by any number of processes. Returns the content of its file
    `complete`, or {} if there is no save, and the names of newer saves that are damaged. Raises ValueError if all are
    damaged, or if it does not fit or holds anything but tensors."""
    names = [sorted((path.name for path in folder.glob("step_*")), reverse=True)]
    dist.broadcast_object_list(names)  # only one looks: on a slow network file system others may see less
    damaged = []
    for name in names[0]:
        try:
            complete = verify(folder / name)
        except Failed as error:
            raise ValueError(f"{folder / name} cannot be read ({error}); try again") from None
        if isinstance(complete, str):
            damaged.append(name)
            if dist.get_rank() == 0:
                print(f"note: {folder / name} is damaged ({complete}) and skipped", file=sys.stderr, flush=True)
            continue
        try:
            check_metadata(folder / name / ".metadata")
            load_save(state, folder / name)
        except BaseException as error:  # PyTorch's CheckpointException is no Exception
            if isinstance(error, KeyboardInterrupt):
                raise
            raise ValueError(f"{folder / name} is intact but does not fit this run ({root_cause(error)}); if settings "
                             f"have changed, go back to those in {folder.parent}/config.json") from None
        return complete, damaged
    if damaged:
        raise ValueError(f"no save in {folder} is intact; copy {folder.parent}/ckpt.pth, the teacher, elsewhere if you "
                         "need it, then start over with --overwrite")
    return {}, []


# ----------------------------------------------------------------------------------------------------------------------
# Writing saves, while training goes on


class Saver:
    """Saves the run to resume/step_N, and the teacher to ckpt.pth, in a thread of each process.

    Training waits only while the state is copied to host memory. The thread writes the tensors under a temporary name,
    then the file `complete`, and renames the save when all is on the disk. A save that fails is tried again later, from
    the step reached by then. All methods must be called on all ranks; rank 0 decides.
    """

    RETRY = 30.0  # seconds after which a failed save is tried again

    def __init__(self, cfg, state, make_checkpoint, lock: OutputLock | None, start: int, damaged: list[str], say):
        from torch.distributed import checkpoint  # slow: better not in the thread

        self.dcp = checkpoint
        self.cfg, self.state, self.lock, self.damaged, self.say = cfg, state, lock, damaged, say
        self.make_checkpoint = make_checkpoint  # (step) -> the content of ckpt.pth
        self.folder, self.main = Path(cfg.out) / "resume", dist.get_rank() == 0
        self.group = dist.new_group(backend="gloo", timeout=TIMEOUT)  # for the threads, while training uses its own
        saves = dist.get_rank() < state.n_shards  # the first replica is saved
        self.mesh = DeviceMesh("cpu", range(state.n_shards), _init_backend=False) if saves else None
        self.copies: dict[str, dict[str, Tensor]] = {}  # in host memory
        self.owed: dict[Path, dict] = {}  # teacher checkpoints yet to be written
        self.thread, self.step, self.good = None, start, start  # of the last attempt, of the last success
        self.error, self.failing_since, self.last = "", None, time.monotonic()  # of the last attempt
        self.asked, self.stall, self.seconds = False, 0.0, 0.0
        self.reason = ""  # what hopeless() found last

    def __enter__(self):
        return self

    def __exit__(self, kind, *error) -> None:
        """Waits for a save under way; after a crash only for a minute, since other processes may be gone."""
        if self.thread is not None:
            self.thread.join(None if kind in (None, Failed) else 60)

    def due(self) -> bool:
        """Whether it is time for an extra save: by --save-minutes, or since the last one failed. True only once, since
        the other ranks hear of it a step later."""
        if not self.main:
            return False
        self.collect(wait=False)
        if self.thread is not None or self.asked:
            return False
        age, minutes = time.monotonic() - self.last, self.cfg.save_minutes
        self.asked = age > self.RETRY if self.failing_since is not None else 0 < 60 * minutes < age
        return self.asked

    def hopeless(self) -> str:
        """Why saving cannot succeed any more, on rank 0; otherwise nothing. `reason` keeps it for when all ranks know,
        a step later."""
        since, found = self.failing_since, ""
        if self.main and self.lock.lost:
            found = f"another run has taken over --out {self.cfg.out}; this one stops without touching it"
        elif self.main and since is not None and self.thread is None and (
                time.monotonic() - since > 60 * self.cfg.save_patience):
            found = (f"saving has failed for {self.cfg.save_patience:g} minutes ({self.error}). The last good save is "
                     f"that of step {self.good}; free disk space or repair the disk, and run the same command again")
        self.reason = found or self.reason
        return found

    def start(self, step: int, counters: dict, exports: list[Path]) -> None:
        """Starts to save the state after `step` steps, once the previous save is done. The teacher also goes to
        `exports`. Raises Failed on all ranks if the optimizers' state cannot be saved."""
        began = time.perf_counter()
        self.collect()
        self.error, self.step, self.last, self.asked = "", step, time.monotonic(), False
        ckpt = self.make_checkpoint(step)
        if self.main:
            self.owed |= {path: ckpt for path in [Path(self.cfg.out) / "ckpt.pth", *exports]}
        self.thread = threading.Thread(target=self.write, args=(step, dict(counters), self.copy_to_host()), daemon=True)
        self.thread.start()
        self.stall = time.perf_counter() - began

    def copy_to_host(self) -> dict[str, dict[str, Tensor]]:
        """The state as it is now, in the same (pinned) host memory each time; nothing except on the first replica.
        Raises Failed on all ranks if the optimizers' state cannot be saved."""
        from torch.distributed.tensor import DTensor  # slow to import

        def empty_copy(tensor: Tensor) -> Tensor:
            local = local_shards([tensor])[0]
            copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            return DTensor.from_local(copy, self.mesh, tensor.placements[-1:], run_check=False, shape=tensor.shape,
                                      stride=tensor.stride()) if isinstance(tensor, DTensor) else copy

        try:
            state = tensors_of(self.state)
        except ValueError as error:
            raise Failed(str(error)) from None
        if self.mesh is None:
            return {}
        if [[*named] for named in self.copies.values()] != [[*named] for named in state.values()]:
            # the first save; or an optimizer has created its state since the last one
            self.copies = {part: {k: empty_copy(t.detach()) for k, t in named.items()} for part, named in state.items()}
        to, source = ([t for named in tree.values() for t in local_shards(named.values())]
                      for tree in (self.copies, state))
        with torch.no_grad():
            torch._foreach_copy_(to, source, non_blocking=True)
        if source[0].is_cuda:
            torch.cuda.synchronize()
        return self.copies

    def write(self, step: int, counters: dict, copies: dict) -> None:
        """The thread. If writing fails on any rank, leaves the reason in self.error on all."""
        began, device, folder = time.perf_counter(), next(self.state.student.parameters()).device, None
        if device.type == "cuda":
            torch.cuda.set_device(device)  # threads start with the first GPU
        try:
            folder = on_all_ranks(lambda: self.make_folder() if self.main else None, self.group)[0]
            self.dcp.save(copies, checkpoint_id=str(folder), process_group=self.group)
            shards = f"__{dist.get_rank()}_*"  # that this process has written
            digests = on_all_ranks(lambda: {path.name: sha256(path) for path in folder.glob(shards)}, self.group)
            files = {name: digest for written in digests for name, digest in written.items()}
            on_all_ranks(lambda: self.publish(folder, step, counters, files) if self.main else None, self.group)
        except BaseException as error:  # PyTorch's CheckpointException is no Exception
            self.error = root_cause(error)
            if self.main and folder is not None and folder.exists():
                try:
                    (folder / "probe").write_bytes(bytes(1 << 16))
                except OSError as refusal:  # on a full disk PyTorch only says "unexpected pos"
                    self.error = root_cause(refusal)
                shutil.rmtree(folder, ignore_errors=True)  # frees disk space
        self.seconds = time.perf_counter() - began

    def make_folder(self) -> Path:
        """An empty folder for the save. Creates --out again if it has disappeared."""
        self.lock.check()
        out = Path(self.cfg.out)
        if not (out / "config.json").exists():
            claim_output(self.cfg, overwrite=False)
            self.say(f"note: {out} had disappeared and was created again; the saves that were in it are lost")
        for path in self.folder.glob("partial*"):  # left by a run that was killed
            shutil.rmtree(path, ignore_errors=True)
        folder = self.folder / f"partial_{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        return folder

    def publish(self, folder: Path, step: int, counters: dict, files: dict[str, str]) -> None:
        """Writes ckpt.pth, completes the save, gives it its name, and deletes all but the newest `keep`."""
        if unseen := wait_for_files(folder, files):
            raise OSError(errno.ENOENT, "written by another machine but not visible here; --out must be a folder that "
                          "all machines share", str(folder / min(unseen)))
        self.lock.check()
        for path, ckpt in list(self.owed.items()):
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path, durable=True) as temporary:
                torch.save(ckpt, temporary)
            del self.owed[path]
        for path in (Path(self.cfg.out) / "metrics.jsonl", Path(self.cfg.out) / "bad_samples.txt"):
            if path.exists():
                make_durable(path)  # a save must not survive a power cut without them
        check_metadata(folder / ".metadata")  # or this save could never be read
        write_json(folder / "complete", dict(
            step=step, counters=counters, files=files | {".metadata": sha256(folder / ".metadata")},
            processes=dist.get_world_size(), torch=str(torch.__version__), config=dataclasses.asdict(self.cfg)))
        self.lock.check()
        final = self.folder / f"step_{step:09d}"
        for name in self.damaged:  # set aside for inspection
            os.replace(self.folder / name, self.folder / f"damaged_{name}_{uuid.uuid4().hex[:8]}")
        self.damaged = []
        shutil.rmtree(final, ignore_errors=True)
        folder.rename(final)
        make_durable(self.folder)
        for old in sorted(self.folder.glob("step_*"))[: -self.cfg.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def collect(self, wait: bool = True) -> None:
        """Reports how the last save ended; waits for one under way unless told not to."""
        if self.thread is None or self.thread.is_alive() and not wait:
            return
        self.thread.join()
        self.thread = None
        if not self.error:
            self.good, self.failing_since = self.step, None
            self.say(f"saved step {self.step}: training waited {self.stall:.2f} s, writing took {self.seconds:.1f} s")
            return
        self.last = time.monotonic()
        self.failing_since = self.failing_since or self.last
        self.say(f"note: step {self.step} could not be saved ({self.error}); the last good save is that of step "
                 f"{self.good}. Trying again every {self.RETRY:g} s, for {self.cfg.save_patience:g} minutes")

    def finish(self, step: int, counters: dict) -> None:
        """Waits until the state after `step` steps is saved. Raises Failed if saving cannot succeed any more."""
        while True:
            self.collect()
            if self.good == step and not self.error:
                return
            if hopeless := on_all_ranks(self.hopeless, self.group)[0]:
                raise Failed(hopeless)
            if self.error:
                time.sleep(self.RETRY)
            self.start(step, counters, [])


# ----------------------------------------------------------------------------------------------------------------------
# Signals


class StopSignals:
    """While in use, SIGTERM, SIGUSR1 and a first SIGINT (Ctrl-C) request an orderly stop: `name` says which. A second
    SIGINT ends the program at once, unless it comes so soon that it is torchrun passing on the first."""

    ECHO = 0.5  # seconds
    NAMES = "SIGTERM", "SIGUSR1", "SIGINT"  # Windows has no SIGUSR1

    def __init__(self, lock: OutputLock | None):
        self.name, self.interrupted, self.lock = "", math.inf, lock

    def __enter__(self):
        self.before = {n: signal.signal(n, self.receive) for n in signal.Signals if n.name in self.NAMES}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        if not self.name and self.lock:  # rank 0 only; not by print(), which the signal may have interrupted
            os.write(2, b"\nfinishing the step, then saving; Ctrl-C (again) ends at once\n")
        self.name = self.name or signal.Signals(number).name
        if number != signal.SIGINT:
            return
        now = time.monotonic()
        if now - self.interrupted > self.ECHO:
            if self.lock:
                self.lock.release()
            os.write(2, b"\nstopped at once; the same command continues from the last save, if there is one\n")
            os._exit(130)
        self.interrupted = min(self.interrupted, now)


def same_command() -> str:
    """What to type to continue this run."""
    words = [word for word in sys.argv[1:] if word != "--overwrite"]
    nodes, here = int(os.environ.get("GROUP_WORLD_SIZE", 1)), os.environ.get("LOCAL_WORLD_SIZE", "1")
    launcher = ["python"]
    if nodes > 1:
        launcher = ["torchrun", "--nnodes", str(nodes), "--nproc-per-node", here, "--rdzv-backend", "c10d",
                    "--rdzv-endpoint", f"{os.environ.get('MASTER_ADDR', 'HOST')}:29500"]
    elif "WORLD_SIZE" in os.environ:
        launcher = ["torchrun", "--standalone", "--nproc-per-node", here]
    return shlex.join([*launcher, sys.argv[0], *words])


# ----------------------------------------------------------------------------------------------------------------------
# The log


class TooManyBad(Exception):
    """More images than allowed cannot be read. Raised on all ranks, after saving."""


class Log:
    """metrics.jsonl and the progress bar, on rank 0 only. A resumed run drops the lines that it will write again. With
    `lock`, writes nothing unless --out is still this run's."""

    def __init__(self, path: Path, start: int, steps: int, counters: dict[str, int], lock: OutputLock | None = None):
        self.main, self.lock = dist.get_rank() == 0, lock
        self.path, self.records, self.behind = path, [], False
        if self.main:
            for line in path.read_text().splitlines() if path.exists() else ():
                with contextlib.suppress(ValueError):  # a killed run may leave half a line
                    self.records.append(json.loads(line))
            # k-NN lines count the steps done, the others name the step itself, from 0
            self.records = [r for r in self.records if r["step"] < start + ("knn" in r and start > 0)]
            self.rewrite()
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=None if self.main else True, smoothing=0.05)
        self.steps, self.printed = steps, time.monotonic() - 50  # without a terminal: after 10 s, then every minute
        self.bad_path, self.new_bad = path.with_name("bad_samples.txt"), []  # (name, reason) since the last line
        self.counters = dict(bad_samples=0, skipped_steps=0, skipped_in_a_row=0) | counters
        self.bad_before = self.counters["bad_samples"]
        listed = self.bad_path.read_text("utf-8", "surrogateescape") if self.bad_path.exists() else ""
        self.bad_files = dict(line.partition("\t")[::2] for line in listed.split("\n") if line)  # name -> reason
        self.n_listed = len(self.bad_files)

    def rewrite(self) -> None:
        with replacing(self.path, durable=True) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))

    def check_lock(self) -> None:
        """Raises OSError if --out was deleted or belongs to another run. Only a save creates it again."""
        if self.lock is not None:
            self.lock.check(take_back=False)

    def write(self, record: dict) -> None:
        """Adds a line, with null for numbers that are not finite. If that fails, it is written with a later one."""
        if not self.main:
            return
        self.records.append({k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()})
        try:
            self.check_lock()
            if self.behind or not self.path.exists():
                self.rewrite()
            else:
                with open(self.path, "a") as file:
                    file.write(json.dumps(self.records[-1]) + "\n")
            self.behind = False
        except OSError as error:
            if not self.behind:
                self.say(f"note: {self.path} cannot be written ({root_cause(error)}); its lines are kept in memory")
            self.behind = True

    def knn(self, step: int, key: str = "knn") -> dict | None:
        return next((r[key] for r in self.records if r["step"] == step and key in r), None)

    def start_clock(self, done: int, waited: float) -> None:
        """From here on speed is measured: after `done` steps, with `waited` seconds spent waiting for images so far."""
        self.since = time.perf_counter(), done, waited

    def step(self, step: int, now: dict[str, float], means: dict[str, float], batch_size: int, waited: float) -> None:
        """Writes a line: `now` holds the scheduled values, `means` the losses, averaged over processes, and gradient
        norms. images_per_s, and data_wait, the share of the time spent waiting for images, count since start_clock().
        """
        began, done, waited_before = self.since
        seconds = time.perf_counter() - began
        images_per_s, data_wait = batch_size * (step + 1 - done) / seconds, (waited - waited_before) / seconds
        loss = sum(v for k, v in means.items() if not k.startswith("grad_norm"))
        self.write(dict(step=step, loss=loss, **means, **now, images_per_s=images_per_s, data_wait=data_wait,
                        bad_samples=self.counters["bad_samples"], skipped_steps=self.counters["skipped_steps"]))
        text = f"loss {loss:.3f}, {images_per_s:.0f} images/s, data wait {data_wait:.0%}"
        self.bar.set_postfix_str(text)
        if self.main and self.bar.disable and time.monotonic() - self.printed > 60:  # no terminal: a line a minute
            print(f"step {step + 1} of {self.steps}: {text}", flush=True)
            self.printed = time.monotonic()

    def count_bad(self, n_samples: int) -> float:
        """Counts the images that any process could not read since the last call, and lists each file once, with the
        reason, in bad_samples.txt. Returns their share of all images that this command has read for `n_samples`."""
        new = [item for bad in on_all_ranks(lambda: self.new_bad) for item in bad]
        self.new_bad = []
        self.counters["bad_samples"] += len(new)
        for name, reason in new:
            self.bad_files.setdefault(re.sub(r"\s", " ", name), reason)  # one line each, even if a name has line breaks
        if self.main and len(self.bad_files) > self.n_listed:
            lines = "".join(f"{name}\t{reason}\n" for name, reason in self.bad_files.items())
            with contextlib.suppress(OSError):  # then they are listed with the next ones
                self.check_lock()
                with replacing(self.bad_path) as temporary:
                    temporary.write_text(lines, "utf-8", "surrogateescape")
                self.n_listed = len(self.bad_files)
        bad = self.counters["bad_samples"] - self.bad_before
        return bad / (bad + n_samples)

    def evaluation(self, knn, teacher: nn.ModuleDict, done: int) -> None:
        pixels = dict(knn_raw_pixels=knn.raw_pixels()) if done == 0 else {}
        self.write(dict(step=done, knn=knn.teacher(teacher)) | pixels)
        if 0 < done < self.steps:  # the last one ends the run's output
            self.say(f"step {done}: {summary(self, done)}")

    def say(self, text: str) -> None:
        if self.main:
            self.bar.write(text, file=sys.stdout)


def summary(log: Log, steps: int) -> str:
    """k-NN accuracy after `steps` steps, beside that of the untrained network and of raw pixels."""
    named = (("trained teacher", log.knn(steps)), ("untrained network", log.knn(0)),
             ("raw pixels", log.knn(0, "knn_raw_pixels")))
    return "k-NN top-1 (k=20): " + " | ".join(f"{name} {knn['top1_k20']:.1f} %" for name, knn in named if knn)


class NonFinite:
    """Counts steps that were skipped because a loss or gradient was not finite, and writes their losses and samples to
    out/nonfinite/. Looks at each step one step later, by when the GPU has finished it."""

    def __init__(self, cfg, log: Log, batches, saver: Saver):
        self.cfg, self.log, self.batches, self.saver, self.pending = cfg, log, batches, saver, None

    def watch(self, step: int, finite: Tensor, terms: dict[str, Tensor]) -> None:
        self.settle()
        on_host = torch.empty((), dtype=torch.bool, pin_memory=finite.is_cuda).copy_(finite, non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if finite.is_cuda else None
        self.pending = step, on_host, copied, terms

    def settle(self) -> None:
        """Counts the step watched last. Raises Failed after --max-nonfinite in a row."""
        if self.pending is None:
            return
        (step, finite, copied, terms), self.pending, counters = self.pending, None, self.log.counters
        if copied:
            copied.synchronize()
        if finite:
            counters["skipped_in_a_row"] = 0
            return
        counters["skipped_steps"] += 1
        counters["skipped_in_a_row"] += 1
        folder = self.log.path.with_name("nonfinite")
        self.report(step, terms, folder)
        if counters["skipped_in_a_row"] >= self.cfg.max_nonfinite:
            self.saver.collect()
            raise Failed(f"loss or gradients were not finite in {counters['skipped_in_a_row']} steps in a row, the "
                         f"last {step}; see {folder}. The last good save is that of step {self.saver.good}: lower --lr "
                         "and continue from it with --resume")

    def report(self, step: int, terms: dict[str, Tensor], folder: Path) -> None:
        source, seed = self.batches.source, self.batches.seed
        processes = on_all_ranks(lambda: dict(
            rank=dist.get_rank(), terms={k: str(v.item()) for k, v in terms.items()},
            samples={s: str(source.describe(source.pick(s, seed))) for s in self.batches.samples_of(step)}))
        if self.log.main:
            self.log.say(f"note: loss or gradients of step {step} are not finite; the step is skipped, its samples are "
                         f"listed in {folder}")
            with contextlib.suppress(OSError):
                self.log.check_lock()
                folder.mkdir(exist_ok=True)
                write_json(folder / f"step_{step:09d}.json", dict(step=step, processes=processes))


def weights_sha256(ckpt: Path) -> str:
    """SHA-256 of the teacher's weights in a checkpoint."""
    digest = hashlib.sha256()
    for name, tensor in sorted(torch.load(ckpt, map_location="cpu", weights_only=True)["teacher"].items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()

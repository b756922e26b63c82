"""What keeps a run: its folder, lock, saves, signals and log. Apache License 2.0."""
import contextlib
import dataclasses
import errno
import hashlib
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
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from tqdm import tqdm

from support.parallel import LONG, Failed, local_shards, together, why


# ----------------------------------------------------------------------------------------------------------------------
# The output folder


OUTPUTS = (  # and config.json, which marks a run
    "ckpt.pth", "metrics.jsonl", "resume", "eval", "bad_samples.txt", "first_batch.png", "nonfinite")


def check_output(cfg, resume: bool, overwrite: bool, changeable: set[str]) -> None:
    """Raises ValueError if --out holds another run and neither flag allows to touch it. Writes nothing."""
    out = Path(cfg.out)
    if resume and overwrite:
        raise ValueError("--resume continues the run in --out, --overwrite deletes it; give one of the two")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    if not (out / "config.json").exists():
        if resume:
            raise ValueError(f"--resume: {out} holds no run; leave the flag out to start one")
        if foreign := [name for name in OUTPUTS if (out / name).exists()]:
            raise ValueError(f"--out {out} holds {foreign[0]} but no config.json, so it is no run of this program; "
                             "choose another --out")
    elif not (resume or overwrite):
        try:
            theirs = json.loads((out / "config.json").read_text())
        except ValueError:
            raise ValueError(f"{out}/config.json is damaged; --resume continues the run with these settings") from None
        mine, defaults = (json.loads(json.dumps(dataclasses.asdict(c))) for c in (cfg, type(cfg)()))
        theirs = defaults | theirs  # a run of an older version did not know all fields
        changed = [f"{k} {theirs[k]} -> {v}" for k, v in mine.items() if theirs[k] != v and k not in changeable]
        if changed:
            some = ", ".join(changed[:12]) + " …" * (len(changed) > 12)
            raise ValueError(f"--out {out} holds a different run ({some}); choose another --out, or --overwrite it, or "
                             "--resume it with the new values")


def restarted() -> bool:
    """Whether torchrun has started this command anew because a process of this machine failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def claim_output(cfg, overwrite: bool) -> None:
    """Makes --out this run's folder, emptied of the run before if `overwrite`."""
    out = Path(cfg.out)
    for path in [out / name for name in OUTPUTS if (out / name).exists()] if overwrite else []:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    text = json.dumps(dataclasses.asdict(cfg), indent=1) + "\n"
    write_atomically(out / "config.json", lambda file: file.write(text.encode()))


def write_atomically(path: Path, write) -> None:
    """write(file) under a neighboring name, then rename: `path` is never half-written, not even by a power cut."""
    partial_path = path.with_name(path.name + ".partial")
    try:
        with open(partial_path, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial_path, path)
    except BaseException:
        partial_path.unlink(missing_ok=True)  # on a full disk, every byte counts
        raise
    make_durable(path.parent)


def make_durable(path: Path) -> None:
    """Waits until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_file(path: Path, write) -> None:
    """Has write(file) fill a file that appears under its name only when it is whole. Raises ValueError, naming why not.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            write(file)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path} could not be written ({getattr(error, 'strerror', None) or error})") from None
    finally:
        with contextlib.suppress(OSError):  # the folder may be none
            partial.unlink()


class OutputLock:
    """The file `lock` in --out: while it is there, and its owner lives, no other run may write there.

    It names machine, process and moment of start, and is touched every few seconds. An owner on this machine is looked
    up; of one elsewhere is waited for a sign of life. A dead owner's lock is taken over. Raises ValueError if the owner
    lives, OSError if the folder cannot be written. To be used by one process of a run.
    """

    BEAT, DEATH = 10.0, 60.0  # seconds between signs of life; without one until it counts as dead

    def __init__(self, out: Path):
        self.new = not out.exists()
        out.mkdir(parents=True, exist_ok=True)
        self.path, self.device, self.above = out / "lock", os.stat(out).st_dev, os.stat(out.parent).st_dev
        self.key = uuid.uuid4().hex
        self.mine = json.dumps(dict(zip(("host", "boot", "space"), machine()), pid=os.getpid(), start=born(os.getpid()),
                                    key=self.key))
        self.lost, self.stop = False, threading.Event()
        while not self.create():
            self.take_over_from_dead()
        self.thread = threading.Thread(target=self.beat, daemon=True)
        self.thread.start()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.release()

    def create(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, self.mine.encode())
        except OSError:
            self.path.unlink()
            raise
        finally:
            os.close(descriptor)
        return True

    def take_over_from_dead(self) -> None:
        """Removes the lock of a dead owner; raises ValueError if the owner lives."""
        try:
            text = self.path.read_text()
        except FileNotFoundError:
            return  # released just now
        try:
            owner = json.loads(text)
            named = f"process {owner['pid']} on {owner['host']}"
        except (ValueError, TypeError, KeyError):
            owner, named = {}, "an unknown process"
        if machine() == tuple(owner.get(key) for key in ("host", "boot", "space")):
            alive = born(owner["pid"]) in (owner["start"], "unknown")
        else:
            alive = self.moves(named)
        if alive:
            raise ValueError(f"--out {self.path.parent} is in use by {named}; wait for it, or choose another --out")
        aside = self.path.with_name(f"lock.{self.key}")
        with contextlib.suppress(FileNotFoundError):  # somebody else may be as quick
            os.rename(self.path, aside)
            if aside.read_text() == text:
                aside.unlink()
            else:  # somebody has taken over in between: put it back
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self.path)
                aside.unlink()

    def moves(self, named: str) -> bool:
        """Whether the lock is touched, or removed by its owner, while we watch. Opened each time: a network file system
        then asks its server. Clocks of different machines are not compared."""
        def touched() -> float:
            with open(self.path, "rb") as file:
                return os.fstat(file.fileno()).st_mtime

        with contextlib.suppress(FileNotFoundError):
            before = touched()
            for _ in tqdm(range(int(self.DEATH)), desc=f"is {named} alive", unit="s", disable=None, leave=False):
                time.sleep(1)
                if touched() != before:
                    return True
        return False

    def beat(self) -> None:
        while not self.stop.wait(self.BEAT):
            with contextlib.suppress(OSError):  # check() will say
                self.check()
                os.utime(self.path)

    def check(self) -> None:
        """Raises OSError if the folder is gone or another process has taken over, as it may after this one was frozen.
        Makes the lock again where it vanished together with the folder."""
        out = self.path.parent
        if self.path.exists():
            self.lost = self.path.read_text() != self.mine
        elif os.stat(out.parent).st_dev != self.above or out.exists() and os.stat(out).st_dev != self.device:
            raise OSError(errno.ENODEV, "its file system is gone", str(out))  # and what is mounted may come back
        elif (out / "config.json").exists():
            self.lost = True  # the other one has already ended
        else:
            out.mkdir(exist_ok=True)
            self.create()
        if self.lost:
            raise OSError(errno.EBUSY, "another process has taken over", str(out))

    def release(self) -> None:
        self.stop.set()
        with contextlib.suppress(OSError):
            if self.path.read_text() == self.mine:
                self.path.unlink()
            if self.new:
                self.path.parent.rmdir()  # if nothing was written


def take_output(cfg) -> OutputLock | None:
    """The lock on --out, for rank 0. Raises ValueError on all processes if it is another's or cannot be written."""
    def take():
        try:
            return "", OutputLock(Path(cfg.out)) if dist.get_rank() == 0 else None
        except ValueError as error:
            return str(error), None
        except OSError as error:
            return f"--out {cfg.out} cannot be written ({why(error)}); choose another folder", None

    error, lock = take()
    if error := next(filter(None, together(lambda: error)), ""):
        raise ValueError(error)
    return lock


def machine() -> tuple[str, str, str]:
    """Name, number of the current boot and process name space: where these are the same, process numbers compare."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return socket.gethostname(), boot, os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        return socket.gethostname(), "", ""


def born(pid: int) -> str:
    """When a process of this machine started, as the system counts, "" if there is none: numbers are used again."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else fields[19]  # Z: dead, but its parent has not asked
    except OSError:
        try:
            os.kill(pid, 0)
        except PermissionError:
            return "unknown"  # another user's, which the system may hide
        except OSError:
            return ""
        return "unknown"


# ----------------------------------------------------------------------------------------------------------------------
# Saves: written while training goes on, verified when read


def verify(save: Path) -> dict | str:
    """What the file `complete` of a save says, if the other files are as it says, else what is wrong with them. All
    processes must call, each reads a share of the files. Raises Failed on all if one cannot read them now."""
    def contents() -> dict | str:
        try:
            complete = json.loads((save / "complete").read_text())
            files, _ = dict(complete["files"]), (int(complete["step"]), dict(complete["counters"]))
        except FileNotFoundError:
            return "complete: missing"
        except (ValueError, TypeError, KeyError):
            return "complete: not readable"
        missing = files.keys() - {path.name for path in save.iterdir()}
        return f"{min(missing)}: missing" if missing else complete

    def check_share() -> str:
        for name in sorted(complete["files"])[dist.get_rank() :: dist.get_world_size()]:
            for _ in range(60):  # seconds for which other machines may not yet see what one has renamed
                if (save / name).exists():
                    break
                time.sleep(1)
            if sha256(save / name) != complete["files"][name]:
                return f"{name}: its SHA-256 differs"
        return ""

    complete = together(lambda: contents() if dist.get_rank() == 0 else None)[0]
    return complete if isinstance(complete, str) else next(filter(None, together(check_share)), complete)


def sha256(path: Path) -> str:
    digest, size = hashlib.sha256(), path.stat().st_size
    with open(path, "rb") as file, tqdm(total=size, unit="B", unit_scale=True, desc=f"verifying {path.name}", delay=1,
                                        disable=None, leave=False) as bar:
        while piece := file.read(1 << 22):
            digest.update(piece)
            bar.update(len(piece))
    return digest.hexdigest()


class MetadataOnly(pickle.Unpickler):
    """Reads the table of contents of a save, which PyTorch writes as a pickle, and refuses whatever else it holds."""

    def find_class(self, module: str, name: str):
        known = {"torch.distributed.checkpoint.metadata": (
            "Metadata", "TensorStorageMetadata", "ChunkStorageMetadata", "TensorProperties", "MetadataIndex",
            "StorageMeta", "_MEM_FORMAT_ENCODING"), "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
            "torch": ("Size", "float32", "float64"), "torch.serialization": ("_get_layout",),
            "pathlib": ("PosixPath", "WindowsPath"), "pathlib._local": ("PosixPath", "WindowsPath")}
        if name in known.get(module, ()):  # exact names: a dotted one would reach through the module to others
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it holds code, {module}.{name}; nothing in it was run")


def check_metadata(path: Path) -> None:
    """To be called before PyTorch's own reader, which would execute what a pickle says, there or in any entry that is
    no tensor. Raises UnpicklingError."""
    with open(path, "rb") as file:
        metadata = MetadataOnly(file).load()
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise pickle.UnpicklingError(f"its entry {name} is no tensor; nothing in it was run")


class Saver:
    """Saves a run to resume/step_N, and the teacher to ckpt.pth, by a thread of each process.

    The trainer waits only while tensors are copied to the host. A save is written under another name: the shards by
    PyTorch's distributed checkpoint, and last the file `complete`, with the step and the SHA-256 of all others; then
    all is made durable, and renamed. A save that fails is tried again later, from the step reached by then. All methods
    are called by all processes; rank 0 decides.
    """

    RETRY = 30.0  # seconds after which a failed save is tried again

    def __init__(self, cfg, state, make_checkpoint, lock: OutputLock | None, start: int, damaged: list[str], say):
        self.cfg, self.state, self.lock, self.damaged, self.say = cfg, state, lock, damaged, say
        self.make_checkpoint = make_checkpoint  # of the step: what ckpt.pth holds
        self.folder, self.main = Path(cfg.out) / "resume", dist.get_rank() == 0
        self.group = dist.new_group(backend="gloo", timeout=LONG)  # of the threads' own: the trainers talk meanwhile
        holds = dist.get_rank() < state.n_shards  # a share of the copy that is saved; they need not talk to each other
        self.mesh = DeviceMesh("cpu", range(state.n_shards), _init_backend=False) if holds else None
        self.key, self.attempt = together(lambda: lock.key if lock else "", self.group)[0], 0
        self.copies: dict[str, dict[str, Tensor]] = {}  # on the host
        self.owed: dict[Path, dict] = {}  # checkpoints of the teacher that are not written yet
        self.thread, self.step, self.good = None, start, start  # of the last attempt, and of the last success
        self.error, self.trouble = "", ""  # of the last attempt, and of the last failure
        self.last, self.failing_since, self.stall, self.seconds = time.monotonic(), None, 0.0, 0.0
        self.asked = False  # for a save, which the others hear a step later

    def __enter__(self):
        return self

    def __exit__(self, kind, *error) -> None:
        """A save under way is completed whatever happens, unless processes it needs no longer answer."""
        if self.thread is not None:
            self.thread.join(None if kind in (None, Failed) else 60)

    def due(self) -> bool:
        """Whether the time has come for a save between the regular ones."""
        if not self.main:
            return False
        self.collect(wait=False)
        age = time.monotonic() - self.last
        if self.thread is not None or self.asked:
            return False
        self.asked = age > self.RETRY if self.failing_since is not None else 0 < 60 * self.cfg.save_minutes < age
        return self.asked

    def hopeless(self) -> str:
        """Why saving has no future, or nothing."""
        since = self.failing_since
        if not self.main:
            return ""
        if self.lock.lost:
            return f"another process has taken over --out {self.cfg.out}; this one stops without touching it"
        if since is not None and self.thread is None and time.monotonic() - since > 60 * self.cfg.save_patience:
            return (f"saving has failed for {self.cfg.save_patience:g} minutes ({self.trouble}). The last good save is "
                    f"that of step {self.good}; make room or mend the disk, and run the same command again")
        return ""

    def start(self, step: int, counters: dict, exports: list[Path]) -> None:
        """Begins to save the state after `step` steps, after waiting for the save before."""
        began = time.perf_counter()
        self.collect()
        self.error, self.step, self.last, self.asked = "", step, time.monotonic(), False
        self.attempt += 1  # a name of its own: other machines may remember a name for a while, and what it once meant
        self.partial = self.folder / f"partial_{self.key}_{self.attempt}"
        ckpt = self.make_checkpoint(step)
        if self.main:
            self.owed |= {path: ckpt for path in [Path(self.cfg.out) / "ckpt.pth", *exports]}
        self.thread = threading.Thread(target=self.write, args=(step, dict(counters), self.copy()), daemon=True)
        self.thread.start()
        self.stall = time.perf_counter() - began

    def copy(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of the run as they are now, on the host, in the same memory each time; those of one copy of the
        weights, nothing on the processes that hold others."""
        def empty_copy(tensor: Tensor) -> Tensor:
            local = local_shards([tensor])[0]
            copy = torch.empty(local.shape, dtype=local.dtype, pin_memory=local.is_cuda)
            return DTensor.from_local(copy, self.mesh, tensor.placements[-1:], run_check=False, shape=tensor.shape,
                                      stride=tensor.stride()) if isinstance(tensor, DTensor) else copy

        if self.mesh is None:
            return {}
        state = self.state.tensors()
        if not self.copies:
            self.copies = {part: {k: empty_copy(t.detach()) for k, t in named.items()} for part, named in state.items()}
        flat = [[t for named in tree.values() for t in local_shards(named.values())] for tree in (self.copies, state)]
        with torch.no_grad():
            torch._foreach_copy_(*flat, non_blocking=True)
        if flat[1][0].is_cuda:
            torch.cuda.synchronize()
        return self.copies

    def write(self, step: int, counters: dict, copies: dict) -> None:
        """The thread. Leaves the reason in self.error, on all processes, if it fails on any."""
        rank, began, device = dist.get_rank(), time.perf_counter(), next(self.state.student.parameters()).device
        if device.type == "cuda":
            torch.cuda.set_device(device)  # which threads do not inherit
        try:
            together(lambda: self.make_folder() if self.main else None, self.group)
            dcp.save(copies, checkpoint_id=str(self.partial), process_group=self.group)
            files = together(lambda: {p.name: sha256(p) for p in self.partial.glob(f"__{rank}_*")}, self.group)
            together(lambda: self.publish(step, counters, files) if self.main else None, self.group)
        except (Exception, CheckpointException) as error:  # also what PyTorch makes of a full disk
            self.error = why(error)
            if self.main and self.partial.exists():
                self.error = self.refusal(self.partial / "probe") or self.error
                shutil.rmtree(self.partial, ignore_errors=True)  # it takes room
        self.seconds = time.perf_counter() - began

    def refusal(self, path: Path) -> str:
        """What the system says to a small file, if it refuses that; where PyTorch says "unexpected pos"."""
        try:
            path.write_bytes(bytes(1 << 16))
        except OSError as error:
            return why(error)
        return ""

    def make_folder(self) -> None:
        """An empty folder for the save, in an --out that may have to be made again."""
        self.lock.check()
        if not (Path(self.cfg.out) / "config.json").exists():
            claim_output(self.cfg, overwrite=False)
            self.say(f"note: {self.cfg.out} had vanished and is made again; the saves that were in it are lost")
        for path in self.folder.glob("partial*"):  # what a killed run may have left
            shutil.rmtree(path, ignore_errors=True)
        self.partial.mkdir(parents=True)

    def publish(self, step: int, counters: dict, digests: list[dict[str, str]]) -> None:
        """Writes ckpt.pth, completes the save, gives it its name, and deletes those beyond the newest `keep`."""
        files = {name: digest for part in digests for name, digest in part.items()}
        for _ in range(60):  # seconds in which files of other machines become visible here
            if not (unseen := files.keys() - {path.name for path in self.partial.iterdir()}):
                break
            time.sleep(1)
        else:
            raise OSError(errno.ENOENT, "written by another machine, not to be seen here; --out must be a folder that "
                          "all machines share", str(self.partial / min(unseen)))
        self.lock.check()
        for path, ckpt in list(self.owed.items()):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, partial(torch.save, ckpt))
            del self.owed[path]
        files[".metadata"] = sha256(self.partial / ".metadata")
        for path in (Path(self.cfg.out) / "metrics.jsonl", Path(self.cfg.out) / "bad_samples.txt"):
            if path.exists():
                make_durable(path)  # a save must not survive a power cut without them
        complete = dict(step=step, counters=counters, files=files, processes=dist.get_world_size(),
                        torch=str(torch.__version__), config=dataclasses.asdict(self.cfg))
        write_atomically(self.partial / "complete", lambda file: file.write(json.dumps(complete, indent=1).encode()))
        self.lock.check()
        final = self.folder / f"step_{step:09d}"
        for name in self.damaged:  # out of the way, for whoever may want to look
            os.replace(self.folder / name, self.folder / f"damaged_{name}_{self.key[:8]}")
        self.damaged = []
        shutil.rmtree(final, ignore_errors=True)
        self.partial.rename(final)
        make_durable(self.folder)
        for old in sorted(self.folder.glob("step_*"))[: -self.cfg.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def collect(self, wait: bool = True) -> None:
        """Takes note of how a save ended; waits for one under way unless told not to."""
        if self.thread is None or self.thread.is_alive() and not wait:
            return
        self.thread.join()
        self.thread, now = None, time.monotonic()
        if not self.error:
            self.good, self.failing_since = self.step, None
            self.say(f"saved step {self.step}: training waited {self.stall:.2f} s, writing took {self.seconds:.1f} s")
            return
        self.last, self.failing_since, self.trouble = now, self.failing_since or now, self.error
        self.say(f"note: step {self.step} could not be saved ({self.error}); the last good save is that of step "
                 f"{self.good}. Trying again every {self.RETRY:g} s, for {self.cfg.save_patience:g} minutes")

    def finish(self, step: int, counters: dict) -> None:
        """Waits until the state after `step` steps is saved. Raises Failed when that has become hopeless."""
        while True:
            self.collect()
            if self.good == step and not self.error:
                return
            hopeless = together(self.hopeless, self.group)[0]
            if hopeless:
                raise Failed(hopeless)
            if self.error:
                time.sleep(self.RETRY)
            self.start(step, counters, [])


# ----------------------------------------------------------------------------------------------------------------------
# Signals


class StopSignals:
    """While in use, SIGTERM, SIGUSR1 and a first SIGINT (Ctrl-C) ask for an orderly stop: `name` tells. A second
    SIGINT, which is not the echo of the first by torchrun, ends the program at once."""

    ECHO = 0.5  # seconds

    def __init__(self, lock: OutputLock | None):
        self.name, self.interrupted, self.lock = "", math.inf, lock

    def __enter__(self):
        self.before = {n: signal.signal(n, self.receive) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def receive(self, number: int, frame) -> None:
        if not self.name and self.lock:  # of rank 0; no print(), which the signal may have interrupted
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


class Log:
    """metrics.jsonl and the progress bar, both on rank 0 only. A resumed run drops the lines it is going to repeat."""

    def __init__(self, path: Path, start: int, steps: int, counters: dict[str, int]):
        self.main = dist.get_rank() == 0
        self.path, self.records, self.behind = path, [], False
        if self.main:
            lines = path.read_text().splitlines() if path.exists() else []
            records = []
            for line in lines:
                with contextlib.suppress(ValueError):  # a killed run may leave half a line
                    records.append(json.loads(line))
            self.records = [r for r in records if r["step"] < start + ("knn" in r and start > 0)]
            self.rewrite()
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=None if self.main else True, smoothing=0.05)
        self.steps, self.told = steps, time.monotonic()
        self.bad_path, self.new_bad, self.unlisted = path.with_name("bad_samples.txt"), [], {}
        self.counters = dict(bad_samples=0, skipped_steps=0, skipped_in_a_row=0) | counters
        self.bad_before = self.counters["bad_samples"]
        listed = self.bad_path.read_text("utf-8", "surrogateescape") if self.bad_path.exists() else ""
        self.listed = {line.partition("\t")[0] for line in listed.split("\n")}

    def rewrite(self) -> None:
        write_atomically(self.path, lambda file: file.writelines(json.dumps(r).encode() + b"\n" for r in self.records))

    def write(self, record: dict) -> None:
        """Adds a line. On a disk that refuses, it is kept in memory and written with a later one."""
        if not self.main:
            return
        self.records.append({k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()})
        try:
            if self.behind or not self.path.exists():
                self.rewrite()
            else:
                with open(self.path, "a") as file:
                    file.write(json.dumps(self.records[-1]) + "\n")
            self.behind = False
        except OSError as error:
            if not self.behind:
                self.say(f"note: {self.path} cannot be written ({why(error)}); its lines wait in memory")
            self.behind = True

    def knn(self, step: int, key: str = "knn") -> dict | None:
        return next((r[key] for r in self.records if r["step"] == step and key in r), None)

    def step(self, step: int, now: dict[str, float], means: dict[str, float], images_per_s: float,
             data_wait: float) -> None:
        """One line for this step: `now` the schedules, `means` the losses over all processes and the gradient norms;
        `images_per_s` and `data_wait`, the share of the time spent waiting for images, since the last line. A number
        that is not finite becomes null."""
        loss = sum(v for k, v in means.items() if not k.startswith("grad_norm"))
        self.write(dict(step=step, loss=loss, **means, **now, images_per_s=images_per_s, data_wait=data_wait,
                        bad_samples=self.counters["bad_samples"], skipped_steps=self.counters["skipped_steps"]))
        text = f"loss {loss:.3f}, {images_per_s:.0f} images/s, data wait {data_wait:.0%}"
        self.bar.set_postfix_str(text)
        if self.main and self.bar.disable and time.monotonic() - self.told > 60:  # no terminal: a line a minute
            print(f"step {step + 1} of {self.steps}: {text}", flush=True)
            self.told = time.monotonic()

    def count_bad(self, n_samples: int) -> float:
        """Adds up what all processes could not read since the last line, and lists each file once, with the reason, in
        bad_samples.txt. Returns the share of bad ones among all that this command read for its `n_samples` samples."""
        gathered = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self.new_bad)
        new = [item for bad in gathered for item in bad]
        self.new_bad = []
        self.counters["bad_samples"] += len(new)
        for name, text in new:
            plain = re.sub(r"\s", " ", name)  # a line each, whatever is in a name
            if plain not in self.listed:
                self.unlisted[plain] = text
        if self.main and self.unlisted:
            with contextlib.suppress(OSError):  # then with the next ones
                with open(self.bad_path, "a", encoding="utf-8", errors="surrogateescape") as file:
                    file.writelines(f"{name}\t{self.unlisted[name]}\n" for name in sorted(self.unlisted))
                self.listed.update(self.unlisted)
                self.unlisted = {}
        bad = self.counters["bad_samples"] - self.bad_before
        return bad / (bad + n_samples)

    def evaluation(self, knn, teacher: nn.ModuleDict, done: int) -> None:
        self.write(dict(step=done, knn=knn.teacher(teacher)) | (
            dict(knn_raw_pixels=knn.raw_pixels()) if done == 0 else {}))
        if done:
            self.say(f"step {done}: {summary(self, done)}")

    def say(self, text: str) -> None:
        if self.main:
            self.bar.write(text, file=sys.stdout)


class NonFinite:
    """Counts the steps that were skipped because a loss or a gradient was not finite, and writes to out/nonfinite/ what
    they were. It looks at a step one step later, when the GPU has long finished it."""

    def __init__(self, cfg, log: Log, batches, saver: Saver):
        self.cfg, self.log, self.batches, self.saver, self.pending = cfg, log, batches, saver, None

    def watch(self, step: int, finite: Tensor, terms: dict[str, Tensor]) -> None:
        self.settle()
        seen = torch.empty((), dtype=torch.bool, pin_memory=finite.is_cuda).copy_(finite, non_blocking=True)
        copied = torch.cuda.current_stream().record_event() if finite.is_cuda else None
        self.pending = step, seen, copied, terms

    def settle(self) -> None:
        """Counts the step watched last. Raises Failed after --max-nonfinite in a row."""
        if self.pending is None:
            return
        (step, seen, copied, terms), self.pending, counters = self.pending, None, self.log.counters
        if copied:
            copied.synchronize()
        if seen:
            counters["skipped_in_a_row"] = 0
            return
        counters["skipped_steps"] += 1
        counters["skipped_in_a_row"] += 1
        source, seed = self.batches.source, self.batches.seed
        mine = dict(rank=dist.get_rank(), terms={k: str(v.item()) for k, v in terms.items()},
                    samples={s: str(source.describe(source.pick(s, seed))) for s in self.batches.samples_of(step)})
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        folder = self.log.path.with_name("nonfinite")
        if self.log.main:
            self.log.say(f"note: loss or gradients of step {step} are not finite; the step is skipped, its samples are "
                         f"listed in {folder}")
            with contextlib.suppress(OSError):
                folder.mkdir(exist_ok=True)
                text = json.dumps(dict(step=step, processes=everyone), indent=1)
                write_atomically(folder / f"step_{step:09d}.json", lambda file: file.write(text.encode()))
        if counters["skipped_in_a_row"] >= self.cfg.max_nonfinite:
            self.saver.collect()
            raise Failed(f"loss or gradients were not finite in {counters['skipped_in_a_row']} steps in a row, the "
                         f"last {step}; see {folder}. The last good save is that of step {self.saver.good}: lower --lr "
                         "and continue from it with --resume")


class TooManyBad(Exception):
    """More images than allowed cannot be read; all processes know and have saved."""


def summary(log: Log, steps: int) -> str:
    """The last line of a run: where it ended, where it began, what the pixels alone are worth."""
    named = (("trained teacher", log.knn(steps)), ("untrained network", log.knn(0)),
             ("raw pixels", log.knn(0, "knn_raw_pixels")))
    return "k-NN top-1 (k=20): " + " | ".join(f"{name} {knn['top1_k20']:.1f} %" for name, knn in named if knn)

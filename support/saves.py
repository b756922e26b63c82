"""The saves of a run: written while training goes on, verified before they are read. Apache License 2.0.

A save, out/resume/step_N, holds tensors as torch.distributed.checkpoint writes them (*.distcp, .metadata), and the file
`complete`: the step, the counters and the SHA-256 of the other files.
"""
import dataclasses
import errno
import json
import os
import pickle
import re
import shutil
import sys
import threading
import time
import uuid
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from support.files import make_durable, replacing, sha256, write_json
from support import parallel
from support.parallel import LONG_TIMEOUT, Failed, local_shards, on_all_ranks, root_cause
from support.run import OutputLock, claim_output


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
    dcp.load(tensors, checkpoint_id=str(save), process_group=parallel.patient_group)
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
        self.group = dist.new_group(backend="gloo", timeout=LONG_TIMEOUT)  # for the threads, beside training
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
            torch._foreach_copy_(to, source, non_blocking=source[0].is_cuda)
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

"""The saves of a run: written while training continues, verified before they are read. Apache License 2.0.

A save, out/resume/step_N, holds tensors as torch.distributed.checkpoint writes them (*.distcp, .metadata), and the file
`complete`: the step, the counters and the SHA-256 of the other files.
"""
import contextlib
import dataclasses
import errno
import math
import os
import pickle
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
from support.parallel import LONG_TIMEOUT, Failed, Lost, local_shards, noticing_losses, on_all_ranks, root_cause
from support.run import (
    OutputLock, claim_output, complete_of, make_way, read_complete, save_name, saves_in, set_aside, step_of)


# ----------------------------------------------------------------------------------------------------------------------
# Reading saves


def verify(save: Path) -> dict | str:
    """The content of `complete` if all files of a save are as it says; or what is wrong, in words. Call it on all
    ranks: each checks a share of the files. Raises Failed on all if any cannot read its share."""
    def check_share() -> str:
        share = sorted(complete["files"])[dist.get_rank() :: dist.get_world_size()]
        wait_for_files(save, share)
        wrong = (n for n in share if sha256(save / n, show_progress=True) != complete["files"][n])
        return next((f"{name}: its SHA-256 differs" for name in wrong), "")

    complete = on_all_ranks(lambda: read_complete(save) if dist.get_rank() == 0 else None)[0]
    return complete if isinstance(complete, str) else next(filter(None, on_all_ranks(check_share)), complete)


def wait_for_files(folder: Path, names, seconds: int = 60) -> set[str]:
    """Waits until this machine sees the files that other machines wrote, which may take a while on a network file
    system. Returns the names of those still missing."""
    for _ in range(seconds):
        if not (missing := {*names} - {*(os.listdir(folder) if folder.exists() else ())}):
            break
        time.sleep(1)
    return missing


class MetadataOnly(pickle.Unpickler):
    """Reads the table of contents of a save, a pickle written by PyTorch, and refuses anything else in it."""

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


def check_metadata(path: Path) -> dict[str, tuple]:
    """{name: (dtype, shape)} of the tensors in a save. Call it before PyTorch's own reader, which would run any code in
    the pickle or in entries that are not tensors. Raises UnpicklingError if there is any."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata  # slow to import

    with open(path, "rb") as file:
        metadata = MetadataOnly(file).load()
    for name, entry in metadata.state_dict_metadata.items():
        if not isinstance(entry, TensorStorageMetadata):
            raise pickle.UnpicklingError(f"its entry {name} is not a tensor; nothing in it was run")
    return {name: (entry.properties.dtype, entry.size) for name, entry in metadata.state_dict_metadata.items()}


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
                if key in ("student", "teacher", "centers"):
                    raise ValueError(f"the optimizer has an entry named {key!r}, a name that saves reserve")
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
    damaged, or if the newest does not fit or holds anything but tensors."""
    try:
        complete, damaged, missing = find_newest(folder)
    except Failed as error:
        raise ValueError(f"{folder} cannot be read ({error}); make it readable and try again") from None
    if missing:
        raise ValueError(missing)
    if complete is None and damaged:
        raise ValueError(f"no save in {folder} is intact; copy {folder.parent}/ckpt.pth, the teacher, elsewhere if you "
                         "need it, then start over with --overwrite")
    if complete is None:
        return {}, []
    save = folder / save_name(complete["step"])
    try:
        check_metadata(save / ".metadata")
        with noticing_losses():
            load_save(state, save)
    except BaseException as error:  # PyTorch's CheckpointException is no Exception
        if isinstance(error, (KeyboardInterrupt, Lost)):
            raise
        raise ValueError(f"{save} is intact but does not fit this run ({root_cause(error)}); if settings have changed, "
                         f"go back to those in {folder.parent}/config.json") from None
    return complete, damaged


def find_newest(folder: Path) -> tuple[dict | None, list[str], str]:
    """The content of `complete` of the newest intact save, if any; the names of newer, damaged ones; and if there is no
    save where there should be one, what to do. Raises Failed on all ranks if any cannot read them."""
    def look() -> tuple[list[str], str]:
        names = [save.name for save in saves_in(folder)]
        return names, "" if names else what_is_missing(folder)

    damaged, main = [], dist.get_rank() == 0  # only one looks: on a slow network file system others may see less
    names, missing = on_all_ranks(lambda: look() if main else None)[0]
    for name in names:
        complete = verify(folder / name)
        if isinstance(complete, dict):
            return complete, damaged, ""
        damaged.append(name)
        if main:
            print(f"note: {folder / name} is damaged ({complete}) and skipped", file=sys.stderr, flush=True)
    return None, damaged, missing


PARTIAL = "partial_" + "[0-9a-f]" * 32  # saves that are being written, or were when a run was killed


def what_is_missing(folder: Path) -> str:
    """Why a run without saves should not simply start over; "" if nothing speaks against it."""
    if renamed := min((path.parent.name for path in folder.glob("step_*/complete")), default=""):
        return (f"{folder} holds no save with a name like {save_name(70)}, only {renamed}; rename it to continue from "
                "it, or start over with --overwrite")
    # ckpt.pth is written just before the first save gets its name; a run killed in between leaves a partial save
    if (ckpt := folder.with_name("ckpt.pth")).exists() and not any(folder.glob(PARTIAL)):
        return (f"the saves of the run in {folder.parent} are gone, so it cannot be continued; {ckpt}, its teacher, "
                "would be lost: copy it elsewhere if you need it, then start over with --overwrite")
    return ""


# ----------------------------------------------------------------------------------------------------------------------
# Writing saves while training continues


def check_save(folder: Path, step: int, shapes: dict[str, tuple]) -> None:
    """Checks a save, before it gets its name, as loading will. Raises ValueError or UnpicklingError if this code could
    not read it, or if its tensors are not those in `shapes`, {name: (dtype, shape)}."""
    if isinstance(complete := read_complete(folder, step), str):
        raise ValueError(complete)
    written = check_metadata(folder / ".metadata")
    if wrong := [name for name in written.keys() | shapes.keys() if written.get(name) != shapes.get(name)]:
        raise ValueError(f"{min(wrong)} was written as {written.get(min(wrong))}, not as {shapes.get(min(wrong))}")


def without_name(save: Path) -> Path:
    """Renames a save that is about to be deleted, so that a half-deleted one is never taken for a save."""
    return save.rename(save.with_name(f"partial_{uuid.uuid4().hex}"))


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
        self.thread, self.began, self.step, self.good = None, start, start, start  # last attempt, last success
        self.error, self.failing_since, self.last = "", None, time.monotonic()  # of the last attempt
        self.asked, self.stall, self.seconds = False, 0.0, 0.0
        self.reason = ""  # what hopeless() found last

    def __enter__(self):
        return self

    def __exit__(self, kind, *error) -> None:
        """Waits for a save under way; after a crash only for a minute, since other processes may be gone."""
        patience = math.inf if kind in (None, Failed) else time.monotonic() + 60
        while self.thread is not None and self.thread.is_alive() and time.monotonic() < patience:
            with contextlib.suppress(RuntimeError):  # the error of a data-loading worker that dies is raised anywhere
                self.thread.join(1)

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
                     f"step {self.good}; free disk space or repair the disk, and run the same command again")
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
            shapes = {f"{part}.{name}": (t.dtype, t.shape) for part in copies for name, t in copies[part].items()}
            on_all_ranks(lambda: self.publish(folder, step, counters, files, shapes) if self.main else None, self.group)
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
            lost = "" if saves_in(self.folder) else "; the saves that were in it are lost"
            claim_output(self.cfg, overwrite=False)
            self.say(f"note: {out if lost else out / 'config.json'} had disappeared; created it again{lost}")
        for path in self.folder.glob(PARTIAL):  # left by a run that was killed
            shutil.rmtree(path, ignore_errors=True)
        folder = self.folder / f"partial_{uuid.uuid4().hex}"
        folder.mkdir(parents=True)
        return folder

    def publish(self, folder: Path, step: int, counters: dict, files: dict[str, str], shapes: dict) -> None:
        """Writes ckpt.pth, completes the save, gives it its name, and deletes all but the newest `keep`."""
        if unseen := wait_for_files(folder, files):
            raise OSError(errno.ENOENT, "written by another machine but not visible here; --out must be a folder that "
                          "all machines share", str(folder / min(unseen)))
        self.lock.check()
        self.write_checkpoints()
        for path in (Path(self.cfg.out) / "metrics.jsonl", Path(self.cfg.out) / "bad_samples.txt"):
            if path.exists():
                make_durable(path)  # a save must not survive a power cut without them
        write_json(folder / "complete", dict(
            step=step, counters=counters, files=files | {".metadata": sha256(folder / ".metadata")},
            processes=dist.get_world_size(), torch=str(torch.__version__), config=dataclasses.asdict(self.cfg)))
        check_save(folder, step, shapes)
        self.lock.check()
        for name in self.damaged:
            with contextlib.suppress(FileNotFoundError):  # removed in the meantime
                set_aside(self.folder / name, "is damaged")
        self.damaged = []
        final = self.folder / save_name(step)
        doomed = [without_name(final)] if final.is_dir() and not final.is_symlink() else []
        if os.path.lexists(final):
            set_aside(final, "is in the way of a save")
        folder.rename(final)
        make_durable(self.folder)
        older = [save for save in saves_in(self.folder) if step_of(save) < step and complete_of(save)]
        for save in doomed + [without_name(save) for save in older[self.cfg.keep - 1 :]]:
            save.unlink() if save.is_symlink() else shutil.rmtree(save, ignore_errors=True)

    def write_checkpoints(self) -> None:
        """Writes ckpt.pth and the exports that are due."""
        for path, ckpt in list(self.owed.items()):
            make_way(path.parent, folder=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            make_way(path)
            with replacing(path, durable=True) as temporary:
                torch.save(ckpt, temporary)
            del self.owed[path]

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
        self.say(f"note: step {self.step} could not be saved ({self.error}); the last good save is step "
                 f"{self.good}. Trying again every {self.RETRY:g} s, for {self.cfg.save_patience:g} minutes")

    def finish(self, step: int, counters: dict) -> None:
        """Waits until the state after `step` steps is saved. Raises Failed if saving cannot succeed any more."""
        while True:
            self.collect()
            if self.good == step and not self.error and (self.step > self.began or self.checkpoint_is_whole(step)):
                return
            if hopeless := on_all_ranks(self.hopeless, self.group)[0]:
                raise Failed(hopeless)
            if self.error:
                time.sleep(self.RETRY)
            self.start(step, counters, [])

    def checkpoint_is_whole(self, step: int) -> bool:
        """Whether ckpt.pth holds this teacher; for a run that was finished before it started. Call it on all ranks."""
        ckpt, path = self.make_checkpoint(step), Path(self.cfg.out) / "ckpt.pth"

        def differs() -> bool:
            try:
                there = torch.load(path, map_location="cpu", weights_only=True)
                return there["step"] != step or any(not torch.equal(t, there["teacher"][name])
                                                    for name, t in ckpt["teacher"].items())
            except Exception:  # a damaged file can fail in any way
                return True

        wrong = on_all_ranks(lambda: self.main and differs(), self.group)[0]
        if wrong:
            self.say(f"note: {path} is missing or damaged; writing the teacher again")
        return not wrong

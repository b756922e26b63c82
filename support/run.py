"""What keeps a run: its output folder and lock, signals, last words. Apache License 2.0."""
import contextlib
import dataclasses
import errno
import itertools
import json
import math
import os
import re
import shlex
import shutil
import signal
import socket
import sys
import textwrap
import threading
import time
import uuid
from pathlib import Path

from support.files import write_json
from support.machine import known_failure, less_memory
from support.parallel import Lost, from_rank_0, root_cause


# ----------------------------------------------------------------------------------------------------------------------
# The output folder


OUTPUTS = (  # besides config.json, which marks a run
    "ckpt.pth", "metrics.jsonl", "resume", "eval", "bad_samples.txt", "first_batch.png", "nonfinite")

PARTIAL = (  # what a killed run may leave half-written; not all of .*.partial, since evaluations also write there
    ".config.json", ".ckpt.pth", ".metrics.jsonl", ".bad_samples.txt", "eval/*/.teacher_checkpoint.pth", "nonfinite/.*")


def check_output(cfg, resume: bool, overwrite: bool, changeable: set[str]) -> None:
    """Raises ValueError if --out holds anything but this run, unless the flags allow it. Writes nothing."""
    out = Path(cfg.out)
    if resume and overwrite:
        raise ValueError("--resume continues the run in --out, --overwrite deletes it; give one of the two")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; name a folder")
    try:
        stored = stored_settings(out)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be read ({root_cause(error)}); make it readable, or choose another folder"
                         ) from None
    if not stored and settings_in(out / "config.json"):
        raise ValueError(f"--out {out} holds a config.json that no training run wrote; choose another --out")
    if not stored and not os.path.lexists(out / "config.json"):
        if resume:
            raise ValueError(f"--resume: {out} holds no run; omit the flag to start one")
        if foreign := [name for name in OUTPUTS if (out / name).exists()]:
            raise ValueError(f"--out {out} holds {foreign[0]} but no config.json, so it is not a training run; "
                             "choose another --out")
    elif not overwrite and os.path.lexists(out / "resume") and not (out / "resume").is_dir():
        raise ValueError(f"{out}/resume, where the saves belong, is not a folder; put the folder back, or start over "
                         "with --overwrite")
    elif not (resume or overwrite):
        check_settings(out, stored, cfg, changeable)


def check_settings(out: Path, stored: list[dict], cfg, changeable: set[str]) -> None:
    """Raises ValueError if the run in --out has different settings."""
    if not stored:
        raise ValueError(f"{out}/config.json is damaged; --resume continues the run with these settings")
    mine, defaults = (json.loads(json.dumps(dataclasses.asdict(c))) for c in (cfg, type(cfg)()))
    theirs = [defaults | settings for settings in stored]  # older versions had fewer fields
    changed = [[f"{k} {textwrap.shorten(str(t[k]), 200)} -> {v}" for k, v in mine.items()
                if t[k] != v and k not in changeable] for t in theirs]
    if all(changed):
        some = ", ".join(changed[0][:12]) + " …" * (len(changed[0]) > 12)
        raise ValueError(f"--out {out} holds a different run ({some}); choose another --out, or --overwrite it, or "
                         "--resume it with the new values")


def stored_settings(out: Path) -> list[dict]:
    """The settings of the run in --out: those in config.json and those in its newest save; the former may be missing
    or damaged, or belong to a run that has not saved yet. Raises OSError for files that cannot be read."""
    newest = next(filter(None, map(complete_of, saves_in(out / "resume"))), {})
    found = settings_in(out / "config.json"), newest.get("config")
    return [settings for settings in found if isinstance(settings, dict) and "data" in settings]


def settings_in(path: Path) -> dict:
    """The content of a config.json; {} if it is missing or damaged."""
    content = read_json(path)
    return content if isinstance(content, dict) else {}


def restarted() -> bool:
    """Whether torchrun has restarted this command because a process failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def claim_output(cfg, overwrite: bool) -> None:
    """Makes --out this run's folder: removes files that killed runs left half-written and, with `overwrite`, the run
    that was there."""
    out = Path(cfg.out)
    for path in [out / name for name in OUTPUTS] if overwrite else []:
        remove(path)
    for path in itertools.chain.from_iterable(out.glob(f"{name}.*.partial") for name in PARTIAL):
        remove(path)
    for name in ("config.json", "ckpt.pth", "metrics.jsonl", "bad_samples.txt"):
        make_way(out / name)
    for name in ("eval", "nonfinite"):
        make_way(out / name, folder=True)
    if saves_in(out / "resume") and "data" not in settings_in(out / "config.json"):
        print(f"note: {out}/config.json is missing or damaged; writing it again", file=sys.stderr, flush=True)
    write_json(out / "config.json", dataclasses.asdict(cfg))


def remove(path: Path) -> None:
    """Deletes a file, a folder, or a link, but not what a link points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def set_aside(path: Path, why: str) -> None:
    """Renames a file or folder to damaged_NAME_XXXXXXXX, for inspection."""
    aside = path.with_name(f"damaged_{path.name}_{uuid.uuid4().hex[:8]}")
    os.replace(path, aside)
    print(f"note: {path} {why}; it is now {aside.name}", file=sys.stderr, flush=True)


def make_way(path: Path, folder: bool = False) -> None:
    """Sets aside whatever is in the way at `path`: a folder where a file belongs, a file where a folder belongs, or a
    dangling link."""
    if os.path.lexists(path) and not (path.is_dir() if folder else path.is_file()):
        set_aside(path, f"is not a {'folder' if folder else 'file'}")


def read_json(path: Path):
    """The content of a JSON file; None if it is missing or cannot be parsed."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except (ValueError, RecursionError):
        return None


# ----------------------------------------------------------------------------------------------------------------------
# The list of saves


def saves_in(folder: Path) -> list[Path]:
    """The folders named like a save, step_000000070, newest first. Others, such as copies, do not count."""
    named = [path for path in folder.iterdir() if is_save_name(path.name)] if folder.is_dir() else []
    return sorted((path for path in named if path.is_dir()), key=step_of, reverse=True)


def is_save_name(name: str) -> bool:
    return bool(re.fullmatch("step_[0-9]{9,18}", name)) and name == save_name(int(name[5:]))


def save_name(step: int) -> str:
    return f"step_{step:09d}"


def step_of(save: Path) -> int:
    return int(save.name[5:])


def read_complete(save: Path, step: int | None = None) -> dict | str:
    """The content of the file `complete` of a save; or what is wrong with it, in words. `step`: the step it should
    name, by default the one in the folder's name."""
    there = {path.name for path in save.iterdir() if path.is_file()}
    if "complete" not in there:
        return "complete: missing"
    complete, step = read_json(save / "complete"), step_of(save) if step is None else step
    if not is_complete(complete):
        return "complete: not readable"
    if complete["step"] != step:
        return f"complete: names step {complete['step']} instead of {step}"
    tensors = {name for name in there if name.startswith("__") and name.endswith(".distcp")}
    if unlisted := {".metadata", *tensors} - complete["files"].keys():
        return f"complete: does not list {min(unlisted)}"
    missing = complete["files"].keys() - there
    return f"{min(missing)}: missing" if missing else complete


def complete_of(save: Path) -> dict:
    """The content of the file `complete` of a save; {} if the save is damaged or cannot be read."""
    try:
        content = read_complete(save)
        return content if isinstance(content, dict) else {}
    except OSError:
        return {}


def is_complete(content) -> bool:
    """Whether this could be the content of a file `complete`."""
    if not isinstance(content, dict) or not all(isinstance(content.get(key), dict) for key in ("files", "counters")):
        return False
    step, counters = content.get("step"), content["counters"]
    if not all(type(n) is int and 0 <= n < 2**63 for n in (step, *counters.values())):
        return False
    return counters.get("skipped_in_a_row", 0) <= counters.get("skipped_steps", 0) <= step


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
            if self.path.is_dir():
                raise ValueError(f"{self.path} is a folder, where a file belongs; remove it") from None
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
                    owner = textwrap.shorten(self.path.read_text("utf-8", "replace"), 200) or owner
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
        lock = OutputLock(Path(cfg.out))

    from_rank_0(take)
    return lock


# ----------------------------------------------------------------------------------------------------------------------
# Signals, and the end of a run


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


def last_save(out: Path) -> str:
    """The newest save of a run, in words."""
    with contextlib.suppress(OSError):
        for save in filter(complete_of, saves_in(out / "resume")):
            return f"the last good save is step {step_of(save)}"
    return "nothing is saved yet"


def stop_for(error: BaseException, cfg) -> None:
    """Ends this process with one line and exit code 1 if the machine failed or another process is gone; raises any
    other error again."""
    failure = str(error) if isinstance(error, Lost) else known_failure(error, less_memory(cfg))
    if not failure:
        raise error
    sys.stdout.flush()
    print(f"error: {failure} ({last_save(Path(cfg.out))})", file=sys.stderr, flush=True)
    os._exit(1) if "WORLD_SIZE" in os.environ else sys.exit(1)  # an orderly exit may wait for the other processes


def last_words(out: str, labeled: bool) -> str:
    """Where the results are, and commands that show them."""
    ckpt = f"{out}/ckpt.pth"
    commands = [["eval_knn.py", ckpt] if labeled else ["visualize.py", "neighbors", "--model", ckpt],
                ["visualize.py", "curves", out]]
    lines = [shlex.join(["python", os.path.join(os.path.dirname(sys.argv[0]), name), *rest])
             for name, *rest in commands]
    return "\n    ".join([f"done; the teacher is in {ckpt}, the log in {out}/metrics.jsonl. What to run next:", *lines])

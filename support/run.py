"""What keeps a run: its folder and lock, signals, log. Its saves are in support/saves.py. Apache License 2.0."""
import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import math
import os
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

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from support.cli import printable
from support.files import replacing, write_json
from support.parallel import Failed, on_all_ranks, root_cause


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
    try:
        stored = stored_settings(out)
    except OSError as error:
        raise ValueError(f"--out {out} cannot be read ({root_cause(error)}); make it readable, or choose another folder"
                         ) from None
    if not stored and settings_in(out / "config.json"):
        raise ValueError(f"--out {out} holds a config.json that is not of a training run; choose another --out")
    if not stored and not os.path.lexists(out / "config.json"):
        if resume:
            raise ValueError(f"--resume: {out} holds no run; omit the flag to start one")
        if foreign := [name for name in OUTPUTS if (out / name).exists()]:
            raise ValueError(f"--out {out} holds {foreign[0]} but no config.json, so it is not a training run; "
                             "choose another --out")
    elif not overwrite and os.path.lexists(out / "resume") and not (out / "resume").is_dir():
        raise ValueError(f"{out}/resume, where the saves should be, is not a folder; put the folder back, or start "
                         "over with --overwrite")
    elif not (resume or overwrite):
        check_settings(out, stored, cfg, changeable)


def check_settings(out: Path, stored: list[dict], cfg, changeable: set[str]) -> None:
    """Raises ValueError if the run in --out has other settings than this one."""
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
    """The settings of the run in --out: those in config.json, unless it is missing or damaged, and those of the newest
    save, whose run they were. Raises OSError for files that cannot be read."""
    newest = next(filter(None, map(complete_of, saves_in(out / "resume"))), {})
    found = settings_in(out / "config.json"), newest.get("config")
    return [settings for settings in found if isinstance(settings, dict) and "data" in settings]


def settings_in(path: Path) -> dict:
    """The content of a config.json; {} if there is none, or a damaged one."""
    content = read_json(path)
    return content if isinstance(content, dict) else {}


def restarted() -> bool:
    """Whether torchrun has restarted this command because a process failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def claim_output(cfg, overwrite: bool) -> None:
    """Makes --out this run's folder: removes what killed runs left half-written and, with `overwrite`, their run."""
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
        print(f"note: {out}/config.json is missing or damaged; it is written again", file=sys.stderr, flush=True)
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
    """Sets aside a folder where a file should be, a file where a folder should be, a link to nothing."""
    if os.path.lexists(path) and not (path.is_dir() if folder else path.is_file()):
        set_aside(path, f"is not a {'folder' if folder else 'file'}")


def read_json(path: Path):
    """The content of a JSON file; None if there is none, or nothing that can be understood."""
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except (ValueError, RecursionError):
        return None


# ----------------------------------------------------------------------------------------------------------------------
# The list of saves


def saves_in(folder: Path) -> list[Path]:
    """The folders that have the name of a save, step_000000070, newest first. Others, such as copies, do not count."""
    named = [path for path in folder.iterdir() if is_save_name(path.name)] if folder.is_dir() else []
    return sorted((path for path in named if path.is_dir()), key=step_of, reverse=True)


def is_save_name(name: str) -> bool:
    return bool(re.fullmatch("step_[0-9]{9,18}", name)) and name == save_name(int(name[5:]))


def save_name(step: int) -> str:
    return f"step_{step:09d}"


def step_of(save: Path) -> int:
    return int(save.name[5:])


def read_complete(save: Path, step: int | None = None) -> dict | str:
    """The content of the file `complete` of a save; or what is wrong with it, in words. `step`: the number it should
    name, if not that in the name of the folder."""
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
    """The content of the file `complete` of a save; {} if it is damaged or cannot be read."""
    try:
        content = read_complete(save)
        return content if isinstance(content, dict) else {}
    except OSError:
        return {}


def is_complete(content) -> bool:
    """Whether this may be the content of a file `complete`."""
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
        if dist.get_rank() == 0:
            lock = OutputLock(Path(cfg.out))

    try:
        on_all_ranks(take)
    except Failed as error:
        raise ValueError(str(error)) from None
    return lock


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


def read_records(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, one for each step and kind: of several the last. If some cannot be understood, sets
    the file aside, unless that is only the last, which a killed run may leave half-written."""
    records, bad = {}, []
    for line in (content := path.read_bytes()).splitlines():
        try:
            record = json.loads(line.decode())
        except (ValueError, RecursionError):
            record = None
        if is_record(record):
            records[record["step"], "knn" in record] = record
        else:
            bad.append(line)
    if bad and (len(bad) > 1 or not content.endswith(bad[0])):
        set_aside(path, f"has {len(bad)} damaged lines, which are left out")
    return list(records.values())


def is_record(record) -> bool:
    """Whether this may be a line of metrics.jsonl."""
    if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 0:
        return False
    accuracies = [record[key] for key in ("knn", "knn_raw_pixels") if record.get(key) is not None]
    return all(isinstance(a, dict) and isinstance(a.get("top1_k20"), (int, float)) for a in accuracies)


class Log:
    """metrics.jsonl and the progress bar, on rank 0 only. A resumed run drops the lines that it will write again. With
    `lock`, writes nothing unless --out is still this run's."""

    def __init__(self, path: Path, start: int, steps: int, counters: dict[str, int], lock: OutputLock | None = None):
        self.main, self.lock = dist.get_rank() == 0, lock
        self.path, self.records, self.behind = path, [], False
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=None if self.main else True, smoothing=0.05)
        self.steps, self.printed = steps, time.monotonic() - 50  # without a terminal: after 10 s, then every minute
        self.bad_path, self.new_bad = path.with_name("bad_samples.txt"), []  # (name, reason) since the last line
        self.counters = dict(bad_samples=0, skipped_steps=0, skipped_in_a_row=0) | counters
        self.bad_before = self.counters["bad_samples"]
        if self.main:
            # k-NN lines count the steps done, the others name the step itself, from 0
            self.records = [r for r in self.read_back(read_records, path, [])
                            if r["step"] < start + ("knn" in r and start > 0)]
            self.store(anew=True)
        listed = self.read_back(lambda path: path.read_text("utf-8", "surrogateescape"), self.bad_path, "")
        self.bad_files = dict(line.partition("\t")[::2] for line in listed.split("\n") if line)  # name -> reason
        self.n_listed = len(self.bad_files)

    def read_back(self, read, path: Path, nothing):
        """read(path), or `nothing` if there is no such file, or none that can be read: it is set aside."""
        try:
            return read(path) if path.is_file() else nothing
        except OSError as error:
            if self.main:
                with contextlib.suppress(OSError):
                    set_aside(path, f"cannot be read ({root_cause(error)})")
            return nothing

    def store(self, anew: bool) -> None:
        """Adds the last record to the file, or writes all `anew`. If that fails, it is done with a later one."""
        try:
            self.check_lock()
            if anew or self.behind or not self.path.exists():
                self.rewrite()
            else:
                with open(self.path, "a") as file:
                    file.write(json.dumps(self.records[-1]) + "\n")
            self.behind = False
        except OSError as error:
            if not self.behind:
                self.say(f"note: {self.path} cannot be written ({root_cause(error)}); its lines are kept in memory")
            self.behind = True

    def rewrite(self) -> None:
        with replacing(self.path, durable=True) as temporary:
            temporary.write_text("".join(json.dumps(record) + "\n" for record in self.records))

    def check_lock(self) -> None:
        """Raises OSError if --out was deleted or belongs to another run. Only a save creates it again."""
        if self.lock is not None:
            self.lock.check(take_back=False)

    def write(self, record: dict) -> None:
        """Adds a line, with null for numbers that are not finite. If that fails, it is written with a later one."""
        if self.main:
            finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
            self.records.append(finite)
            self.store(anew=False)

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
            self.bad_files.setdefault(printable(name), printable(reason))
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

    def __init__(self, cfg, log: Log, batches, saver):
        self.cfg, self.log, self.batches, self.saver, self.pending = cfg, log, batches, saver, None

    def watch(self, step: int, finite: Tensor, terms: dict[str, Tensor]) -> None:
        self.settle()
        on_gpu = finite.is_cuda
        on_host = torch.empty((), dtype=torch.bool, pin_memory=on_gpu).copy_(finite, non_blocking=on_gpu)
        copied = torch.cuda.current_stream().record_event() if on_gpu else None
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

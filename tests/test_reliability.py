import contextlib
import dataclasses
import errno
import fcntl
import itertools
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
import torch.distributed.launcher.api as launcher

import data
import train
import support.parallel
import support.files
import support.run
import support.saves
from tests.common import (HERE, TINY, Launched, everything, free_port, metrics, same, saved_tensors, saving,
                          set_up_and_release, train_main, wait_for, write_images)


def test_train_images_that_vanish_end_the_run_with_one_line(tmp_path, cache):
    write_images(tmp_path / "p", ["1.png", "2.png"])
    flags = [*TINY, "--num-workers", 1, "--data", tmp_path / "p", "--steps", 2, "--out", tmp_path / "out"]
    text = Launched(tmp_path / "log", train.main, *flags, before=partial(take_away, tmp_path / "p")).wait(2)
    assert "error: 50 images in a row could not be read" in text and "Traceback" not in text


def take_away(folder: Path) -> None:
    claim = train.claim_output
    train.claim_output = lambda *a: (claim(*a), shutil.rmtree(folder))


def test_train_says_when_shared_memory_is_short(monkeypatch, tmp_path):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**26, 0, 2**26))
    cfg = train.Config(batch_size=256, num_workers=8)
    if Path("/dev/shm").is_dir():
        with pytest.raises(ValueError, match="64 MB free, prefetched batches need \\d+ MB; start the container"):
            train.check_shared_memory(cfg, 1)
    train.check_shared_memory(dataclasses.replace(cfg, num_workers=0), 1)


LASTING = (*TINY, "--data", "digits:split=VAL", "--steps", 14, "--log-every", 3, "--save-every", 2, "--eval-every", 7,
           "--export-every", 5, "--centering", "centering", "--drop-path-rate", 0.3, "--keep", 4)


@pytest.fixture(scope="session")
def straight(tmp_path_factory) -> tuple[dict, float]:
    """A run without an interruption, and the seconds it took."""
    tmp_path = tmp_path_factory.mktemp("straight")
    Launched(tmp_path / "first", print).wait()  # so that what launches is there
    start = time.monotonic()
    Launched(tmp_path / "log", train.main, *LASTING, "--out", tmp_path / "out").wait()
    return everything(tmp_path / "out", tmp_path), time.monotonic() - start


def kill_until_done(moments, tmp_path: Path, out: Path) -> list[int]:
    """Starts the run over and over, killing it after as many seconds as `moments` say; "save": as soon as a save is
    being written. Returns the steps from which it continued."""
    for moment in moments:
        job = Launched(tmp_path / "log", train.main, *LASTING, "--out", out)
        if moment == "save":
            while job.alive() and not list(out.glob("resume/partial*/__0_0.distcp")):
                time.sleep(0.001)
        else:
            job.processes[0].join(moment)
        job.signal(signal.SIGKILL)
        job.join()
    return [int(n) for n in re.findall(r"step (\d+) of 14, batch", (tmp_path / "log").read_text())]


@pytest.mark.parametrize("seed", [pytest.param(s, marks=pytest.mark.slow if s else ()) for s in range(20)])
def test_resume_after_sigkill_at_random_moments_is_exact(seed, straight, tmp_path):
    """Two or three kills per run, one of them in the middle of a save: in the end every bit is there."""
    expected, seconds = straight
    rng, out = random.Random(seed), tmp_path / "out"
    moments = [rng.uniform(0.2, 1.0) * seconds, "save", rng.uniform(0.2, 0.8) * seconds][: 3 if seed else 2]
    rng.shuffle(moments)
    kill_until_done(moments, tmp_path, out)
    Launched(tmp_path / "log", train.main, *LASTING, "--out", out).wait()
    assert same(everything(out, tmp_path), expected)
    assert not (out / "lock").exists() and not list(out.glob("resume/partial*"))


def test_signals_are_heard():
    lock = types.SimpleNamespace(release=lambda: None)
    for name in ("SIGTERM", "SIGUSR1", "SIGINT"):
        before = signal.getsignal(getattr(signal, name))
        with support.run.StopSignals(lock) as heard:
            assert not heard.name and signal.getsignal(getattr(signal, name)) != before  # else it would end pytest
            signal.raise_signal(getattr(signal, name))
            assert heard.name == name
        assert signal.getsignal(getattr(signal, name)) == before


def test_signals_that_windows_lacks_are_not_needed(monkeypatch):
    before = signal.getsignal(signal.SIGUSR1)
    monkeypatch.setattr(signal, "Signals", [signal.SIGINT, signal.SIGTERM])
    with support.run.StopSignals(None) as heard:
        assert [*heard.before] == [signal.SIGINT, signal.SIGTERM] and signal.getsignal(signal.SIGUSR1) == before
    ignored = []
    monkeypatch.setattr(signal, "signal", lambda number, handler: ignored.append(number))
    data.start_worker(0)  # of a loader
    assert ignored == [signal.SIGINT, signal.SIGTERM]


@pytest.mark.parametrize("name,world", [("SIGTERM", 2), pytest.param("SIGUSR1", 1, marks=pytest.mark.slow),
                                        pytest.param("SIGINT", 1, marks=pytest.mark.slow)])
def test_resume_after_signals(name, world, straight, tmp_path):
    """The step is finished, all is saved, the exit code is 0, and the command that continues is printed; to several
    processes it is enough to tell one. Scheduler's signals to the loader's workers do no harm."""
    out, log = tmp_path / "out", tmp_path / "log"
    job = Launched(log, train.main, *LASTING, "--num-workers", 1, "--out", out, world=world, before=slowly)
    job.until("saved step 4")
    os.kill(int(children(job.processes[0])[0]), getattr(signal, name))
    job.signal(getattr(signal, name), rank=world - 1)
    text = job.wait()
    done = int(re.search(rf"{name if world == 1 else ''}.* after step (\d+) of 14: everything is saved", text)[1])
    assert 4 < done < 14 and (out / f"resume/step_{done:09}/complete").exists() and not (out / "lock").exists()
    command = text[text.index("To continue:") :].splitlines()[1].strip()
    assert command.startswith("python" if world == 1 else "torchrun --standalone --nproc-per-node 2 ")
    argv = shlex.split(command)
    Launched(log, train.main, *argv[argv.index("train.py") + 1 :]).wait()
    ours = everything(out, tmp_path)
    if world == 1:
        assert same(ours, straight[0])
    assert [r["step"] for r in ours["metrics"]] == [r["step"] for r in straight[0]["metrics"]]


def test_resume_second_ctrl_c_ends_at_once(tmp_path):
    job = Launched(tmp_path / "log", train.main, *LASTING, "--out", tmp_path / "out", before=endless_saves)
    job.until("saving")
    job.signal(signal.SIGINT)
    job.until("finishing the step")
    for _ in range(2):  # these come at once, as torchrun's echo, and are ignored
        job.signal(signal.SIGINT)
        time.sleep(0.05)
    time.sleep(1.5)
    assert job.alive()
    job.signal(signal.SIGINT)
    assert "stopped at once; the same command continues" in job.wait(130)
    assert not (tmp_path / "out/lock").exists()


def slowly() -> None:
    """Steps that take a while, so that there is something to interrupt."""
    step = train.train_step
    train.train_step = lambda *a: (time.sleep(0.1), step(*a))[1]


def endless_saves() -> None:
    torch.distributed.checkpoint.save = lambda *a, **k: (print("saving", flush=True), time.sleep(1000))
    support.run.StopSignals.ECHO = 1.0  # so that a machine that stalls for half a second does no harm


def test_saves_that_fail_are_retried(tmp_path, monkeypatch, capsys):
    """Something in the way of resume/: the run goes on, says so, and saves once it is gone; with no patience it ends,
    naming the last good save."""
    out, step, calls = tmp_path / "out", train.train_step, []
    monkeypatch.setattr(support.saves.Saver, "RETRY", 0.0)

    def blocked(*args):
        calls.append(1)
        wait_for(lambda: not saving())
        if len(calls) == 3:
            os.rename(out / "resume", out / "away")
            (out / "resume").write_text("in the way")
        if len(calls) == 8:
            (out / "resume").unlink()
            os.rename(out / "away", out / "resume")
        return step(*args)

    monkeypatch.setattr(train, "train_step", blocked)
    flags = [*TINY, "--steps", 12, "--save-every", 2, "--keep", 20]
    train_main(*flags, "--export-every", 4, "--out", out)
    said = capsys.readouterr().out
    assert "note: step 4 could not be saved (" in said and "the last good save is step 2" in said
    steps = sorted(int(p.name[5:]) for p in (out / "resume").iterdir())
    assert steps[0] == 2 and 4 not in steps and 6 not in steps and steps[-1] == 12
    assert (out / "eval/training_3/teacher_checkpoint.pth").exists()  # what was owed is written later
    assert torch.load(out / "eval/training_3/teacher_checkpoint.pth", weights_only=True)["step"] == 4

    monkeypatch.setattr(train, "train_step", step)
    os.rename(out / "resume/step_000000012", out / "away")
    (out / "resume").rename(out / "gone")
    (out / "resume").write_text("in the way")
    monkeypatch.setattr(train, "check_output", lambda *a: None)  # which would see it before the start
    monkeypatch.setattr(train, "load_newest", lambda *a: (dict(step=12), []))
    with pytest.raises(support.parallel.Failed, match="saving has failed for 0.001 minutes .* last good .* step 12;"):
        train_main(*flags, "--steps", 500, "--save-patience", 0.001, "--export-every", 4, "--out", out)
    assert not (out / "lock").exists()


def test_saves_survive_a_vanished_folder(tmp_path, monkeypatch):
    """--out is deleted while the run goes on: all but the saves that were lost is there again."""
    out, step, calls = tmp_path / "out", train.train_step, []

    def vanish(*args):
        calls.append(1)
        if len(calls) == 5:
            out.rename(tmp_path / "elsewhere")  # in one go: a save may be under way, and rmtree cannot win that race
        return step(*args)

    train_main(*TINY, "--steps", 8, "--save-every", 2, "--out", tmp_path / "undisturbed")
    monkeypatch.setattr(train, "train_step", vanish)
    monkeypatch.setattr(support.saves.Saver, "RETRY", 0.05)
    train_main(*TINY, "--steps", 8, "--save-every", 2, "--out", out)
    assert metrics(out) == metrics(tmp_path / "undisturbed") and not (out / "lock").exists()
    weights = [torch.load(p / "ckpt.pth", weights_only=True)["teacher"] for p in (out, tmp_path / "undisturbed")]
    assert same(*weights) and (out / "resume/step_000000008/complete").exists()
    train_main(*TINY, "--steps", 8, "--save-every", 2, "--out", out)  # and it is a run like any other


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a file system of 12 MB, if this user may make one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("may not mount a file system")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_saves_on_a_full_and_on_a_read_only_disk(small_disk, tmp_path):
    """50 steps while the disk is full, then read-only, then neither: as if nothing had been."""
    out, log = small_disk / "out", tmp_path / "log"
    flags = [*TINY, "--steps", 50, "--save-every", 5, "--keep", 1]
    (tmp_path / "slow").touch()
    job = Launched(log, train.main, *flags, "--out", out, before=partial(slowly_and_retrying, tmp_path / "slow"))
    undisturbed = Launched(tmp_path / "log2", train.main, *flags, "--out", tmp_path / "out")
    job.until("saved step 5")
    with open(small_disk / "filler", "wb", buffering=0) as file:
        while "could not be saved (No space left on device" not in job.text():  # a save under way may give room back
            assert job.alive(), job.text()
            try:
                file.write(bytes(1 << 16))
            except OSError:
                time.sleep(0.01)
    (small_disk / "filler").unlink()
    job.until("saved step", more=True)
    remount = lambda how: subprocess.run(["mount", "-o", f"remount,{how}", small_disk]).returncode  # noqa: E731
    wait_for(lambda: remount("ro") == 0)  # refused while a file is being written
    job.until("could not be saved (Read-only file system")
    assert remount("rw") == 0
    (tmp_path / "slow").unlink()
    text = job.wait()
    assert "saved step 50" in text and "metrics.jsonl cannot be written" in text
    undisturbed.wait()
    assert metrics(out) == metrics(tmp_path / "out")
    assert same(*(saved_tensors(p / "resume/step_000000050", tmp_path) for p in (out, tmp_path / "out")))
    assert [p.name for p in (out / "resume").iterdir()] == ["step_000000050"]


def slowly_and_retrying(slow: Path) -> None:
    """Steps that take a while as long as the file `slow` is there."""
    step, support.saves.Saver.RETRY = train.train_step, 0.1
    train.train_step = lambda *a: (time.sleep(0.1 * slow.exists()), step(*a))[1]


def test_nonfinite_steps_are_skipped_on_all_processes(tmp_path):
    """A NaN in one process's loss: nobody's student, optimizer or centers change, the samples are listed; the run goes
    on with the next. So many in a row end it, saved before."""
    out, log = tmp_path / "out", tmp_path / "log"
    flags = [*TINY, "--steps", 9, "--save-every", 3, "--centering", "centering", "--max-nonfinite", 3]
    Launched(log, train.main, *flags, "--out", out, world=2, before=partial(poison, {4, 5, 7})).wait()
    lines = metrics(out)
    assert len(lines) == 9 and lines[4]["ibot"] is None and lines[3]["ibot"] and lines[-1]["skipped_steps"] == 3
    assert [r["skipped_steps"] for r in lines[3:6]] == [0, 1, 2]
    report = json.loads((out / "nonfinite/step_000000004.json").read_text())
    assert [p["rank"] for p in report["processes"]] == [0, 1] and report["processes"][1]["terms"]["ibot"] == "nan"
    assert list(report["processes"][1]["samples"]) == [str(s) for s in range(4 * 8 + 4, 4 * 8 + 8)]
    assert report["processes"][0]["terms"]["ibot"] != "nan"

    flags = [*TINY, "--steps", 12, "--save-every", 6, "--max-nonfinite", 3]
    text = Launched(log, train.main, *flags, "--out", tmp_path / "end", before=partial(poison, {6, 8, 9, 10})).wait(1)
    assert "error: loss or gradients were not finite in 3 steps in a row, the last 10" in text
    assert "The last good save is step 6" in text
    assert (tmp_path / "end/resume/step_000000006/complete").exists()


def test_saves_follow_an_optimizer_that_starts_late(tmp_path, monkeypatch):
    """If the first step is skipped, the save after it has no optimizer state, the next one has; both continue."""
    monkeypatch.setattr(train, "step_losses", train.step_losses)  # for poison()
    flags = [*TINY, "--steps", 3, "--save-every", 1, "--keep", 9]
    poison({0})
    train_main(*flags, "--out", tmp_path / "out")
    saves = sorted((tmp_path / "out/resume").iterdir())
    names = [saved_tensors(save, tmp_path).keys() for save in saves]
    assert not any("exp_avg" in name for name in names[0]) and any("exp_avg" in name for name in names[1])
    expected = saved_tensors(saves[2], tmp_path)
    for save in saves[1:]:
        shutil.rmtree(save)
    monkeypatch.undo()
    train_main(*flags, "--out", tmp_path / "out")
    assert same(saved_tensors(saves[2], tmp_path), expected)


def poison(steps: set[int]) -> None:
    """Makes these steps' iBOT loss NaN, in the last process alone."""
    step_losses, number, last = train.step_losses, itertools.count(), int(os.environ.get("RANK", 0)) + 1 == int(
        os.environ.get("WORLD_SIZE", 1))

    def poisoned(*args):
        loss, terms = step_losses(*args)
        poison = math.nan if next(number) in steps and last else 1.0
        return loss * poison, terms | dict(ibot=terms["ibot"] * poison)

    train.step_losses = poisoned


def test_lock_keeps_a_second_run_away(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    job = Launched(tmp_path / "log", train.main, *TINY, "--steps", 400, "--out", out, before=slowly)
    job.until("step 0 of 400")
    with pytest.raises(ValueError, match=f"is in use by process {job.processes[0].pid} on .*; wait for it, or choose"):
        train_main(*TINY, "--steps", 400, "--out", out)
    job.signal(signal.SIGKILL)
    job.join()
    assert (out / "lock").exists()
    train_main(*TINY, "--steps", 4, "--out", out, "--resume")  # the lock is free, though its file is there
    assert not (out / "lock").exists()


def test_lock_is_not_inherited_by_workers(tmp_path):
    """SIGKILL of a trainer whose data-loading workers live on: the lock is free at once."""
    out = tmp_path / "out"
    job = Launched(tmp_path / "log", train.main, *TINY, "--steps", 400, "--num-workers", 2, "--out", out, before=slowly)
    job.until("step 0 of 400")
    wait_for(lambda: (out / "metrics.jsonl").read_text())
    workers = [int(pid) for pid in children(job.processes[0])]
    assert len(workers) >= 2
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # they would notice within seconds that they are orphans
    try:
        with pytest.raises(ValueError, match=f"is in use by process {job.processes[0].pid} on "):
            support.run.OutputLock(out)
        job.signal(signal.SIGKILL)
        job.join()
        assert all(Path(f"/proc/{pid}").exists() for pid in workers)
        support.run.OutputLock(out).release()
    finally:
        for pid in workers:
            os.kill(pid, signal.SIGKILL)
    assert not (out / "lock").exists()


def test_lock_of_another_machine_and_without_locks(tmp_path, monkeypatch, capsys):
    """The server of a network file system may hold the lock of a machine that is gone for a while; some have none."""
    owner = support.run.OutputLock(tmp_path / "out")
    (tmp_path / "out/lock").write_text("process 1 on elsewhere")
    naps = []
    monkeypatch.setattr(support.run.time, "sleep", naps.append)
    with pytest.raises(ValueError, match="is in use by process 1 on elsewhere; wait for it, or choose another"):
        support.run.OutputLock(tmp_path / "out")
    assert sum(naps) == 120 and "locked by process 1 on elsewhere; waiting up to 120 s" in capsys.readouterr().err
    monkeypatch.setattr(support.run.time, "sleep", lambda seconds: owner.release())
    second = support.run.OutputLock(tmp_path / "out")  # not the file that its owner has removed meanwhile
    assert second.is_ours() and not owner.is_ours()
    with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "):
        support.run.OutputLock(tmp_path / "out")
    second.release()
    assert not (tmp_path / "out/lock").exists()

    flock, access = fcntl.flock, fcntl.fcntl

    def of_nfs(descriptor, how):
        if access(descriptor, 3) & os.O_ACCMODE == os.O_RDONLY:  # F_GETFL
            raise OSError(errno.EBADF, "Bad file descriptor")
        flock(descriptor, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", of_nfs)
        owner = support.run.OutputLock(tmp_path / "out")
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on "):
            support.run.OutputLock(tmp_path / "out")
        owner.release()
    assert "cannot be locked" not in capsys.readouterr().err

    def no_flock(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    for module in (types.SimpleNamespace(LOCK_EX=2, LOCK_NB=4, flock=no_flock), None):
        monkeypatch.setitem(sys.modules, "fcntl", module)  # None: the import fails
        support.run.OutputLock(tmp_path / "out").release()
        assert capsys.readouterr().err.count("note: --out cannot be locked here (") == 1
    (tmp_path / "file").write_text("")
    monkeypatch.undo()
    mine = support.run.OutputLock(tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / "gone")
    mine.check()  # nobody else has come: it is locked again
    with pytest.raises(ValueError, match="in use by process"):
        support.run.OutputLock(tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / "gone too")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/config.json").write_text("another run's, which has ended")
    for _ in range(2):
        with pytest.raises(OSError, match="another run has taken over"):
            mine.check()
        assert mine.lost and not (tmp_path / "out/lock").exists()
    with pytest.raises(ValueError, match="file/out cannot be written \\(Not a directory.*; choose another folder"):
        support.run.OutputLock(tmp_path / "file/out")


def test_lock_on_smb(tmp_path, monkeypatch):
    """A locked file can neither be read nor written through another descriptor there, not even by its owner."""
    def refused(path, *args):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "write_text", refused)
    monkeypatch.setattr(Path, "read_text", refused)
    monkeypatch.setattr(support.run.OutputLock, "LEASE", 0)
    with support.run.OutputLock(tmp_path / "out"), pytest.raises(ValueError, match="in use by another process; wait"):
        support.run.OutputLock(tmp_path / "out")
    assert not (tmp_path / "out/lock").exists()


def test_lock_checks_do_not_wait(tmp_path, monkeypatch):
    """Training itself calls check(): it waits neither for another owner nor takes a deleted folder back."""
    monkeypatch.setattr(support.run.time, "sleep", lambda seconds: pytest.fail("it waits"))
    mine = support.run.OutputLock(tmp_path / "out")
    os.rename(tmp_path / "out", tmp_path / "gone")
    with pytest.raises(OSError, match="it was deleted"):
        mine.check(take_back=False)
    assert not mine.lost and not (tmp_path / "out").exists()
    with support.run.OutputLock(tmp_path / "out"):
        (tmp_path / "out/lock").write_text("process 1 on elsewhere")
        with pytest.raises(OSError, match="another run has taken over"):
            mine.check()
    assert mine.lost


def test_lock_lost_to_another_keeps_its_metrics_whole(tmp_path):
    """--out is deleted and another run starts there before the first one saves: the first ends, and the log holds the
    other's lines only."""
    out, log = tmp_path / "out", tmp_path / "log"
    first = Launched(log, train.main, *TINY, "--steps", 400, "--save-every", 400, "--out", out, before=slowly)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 5)
    os.rename(out, tmp_path / "deleted")
    second = Launched(tmp_path / "log2", train.main, *TINY, "--steps", 12, "--seed", 1, "--out", out, before=slowly)
    assert "another run has taken over" in first.wait(1) and "Traceback" not in log.read_text()
    second.wait()
    alone = Launched(tmp_path / "log3", train.main, *TINY, "--steps", 12, "--seed", 1, "--out", tmp_path / "alone")
    alone.wait()
    assert metrics(out) == metrics(tmp_path / "alone") and [r["step"] for r in metrics(out)] == list(range(12))


@pytest.mark.parametrize("value,text", [
    ("a string", "error: the optimizer's 'odd' of .* is a str; only tensors and numbers can be saved"),
    (torch.zeros(2, dtype=torch.complex64), "saving has failed for 0 minutes \\(it holds code, torch.complex64;")])
def test_saves_that_nobody_could_read_end_the_run(value, text, tmp_path):
    """One line, at the first save, and no save that looks whole."""
    flags = [*TINY, "--steps", 6, "--save-every", 2, "--save-patience", 0, "--out", tmp_path / "out"]
    said = Launched(tmp_path / "log", train.main, *flags, before=partial(odd_state, value)).wait(1)
    assert re.search(text, said) and "Traceback" not in said
    assert not list((tmp_path / "out").glob("resume/step_*"))


def odd_state(value) -> None:
    """An optimizer that keeps this, too, for each parameter."""
    state_of = support.saves.optimizer_state_of
    support.saves.optimizer_state_of = lambda state: {k: v | dict(odd=value) for k, v in state_of(state).items()}


def test_saves_that_vanish_name_the_first_reason(tmp_path, monkeypatch):
    def lost(tensors, checkpoint_id, process_group):
        shutil.rmtree(checkpoint_id)
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(torch.distributed.checkpoint, "save", lost)
    with pytest.raises(support.parallel.Failed, match="\\(Input/output error\\)"):
        train_main(*TINY, "--steps", 6, "--save-every", 2, "--save-patience", 0, "--out", tmp_path / "out")


def test_saves_hold_every_plain_dtype(tmp_path):
    support.parallel.start_processes(torch.device("cpu"))
    names = "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool".split()
    tensors = {name: torch.zeros(2, dtype=getattr(torch, name)) for name in names}
    torch.distributed.checkpoint.save(tensors, checkpoint_id=str(tmp_path / "save"))
    torch.distributed.destroy_process_group()
    support.saves.check_metadata(tmp_path / "save/.metadata")


def test_start_removes_what_a_killed_run_left(tmp_path):
    """But not what an evaluation may just be writing."""
    out = tmp_path / "out"
    train_main(*TINY, "--steps", 2, "--out", out)
    names = [".ckpt.pth.0.partial", ".metrics.jsonl.0.partial", ".config.json.0.partial", ".bad_samples.txt.0.partial",
             "eval/training_3/.teacher_checkpoint.pth.0.partial", "nonfinite/.step_000000004.json.0.partial"]
    for name in [*names, "eval/training_3/.results.0.partial"]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).touch()
    set_up_and_release(*TINY, "--steps", 2, "--out", out)
    assert [p.name for p in out.rglob(".*.partial")] == [".results.0.partial"]


@pytest.mark.parametrize("alive", [True, False])
def test_lock_lost_to_another_ends_the_run(alive, tmp_path):
    """--out is deleted, and another run starts there, before this one saves again: this one touches nothing."""
    out = tmp_path / "out"
    job = Launched(tmp_path / "log", train.main, *TINY, "--steps", 400, "--save-every", 5, "--out", out, before=slowly)
    job.until("saved step 5")
    other = tmp_path / "other"
    lock = support.run.OutputLock(other)
    (other / "config.json").write_text("theirs")
    if not alive:
        lock.release()
    os.rename(out, tmp_path / "deleted")
    os.rename(other, out)
    assert "another run has taken over" in job.wait(1)
    assert (out / "config.json").read_text() == "theirs" and not (out / "resume").exists()
    assert (out / "lock").exists() == alive
    lock.close()


def test_replacing_leaves_the_old_or_the_new(tmp_path):
    """A file or a folder that appears whole, and of a failure nothing."""
    path = tmp_path / "file"
    for durable in (False, True):
        with support.files.replacing(path, durable) as temporary:
            temporary.write_text("new")
            assert temporary.parent == tmp_path and not path.exists()
        assert path.read_text() == "new"
        with pytest.raises(ZeroDivisionError), support.files.replacing(path, durable) as temporary:
            temporary.write_text("newer")
            1 / 0
        assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["file"]
        path.unlink()
    with support.files.replacing(path) as one, support.files.replacing(tmp_path / "two") as two:
        one.mkdir()
        (one / "inside").write_text("one")
        two.write_text("two")
    assert (path / "inside").read_text() == "one" and (tmp_path / "two").read_text() == "two"
    with support.files.replacing(path) as one, support.files.replacing(path) as two:
        assert one != two  # several containers, in which a process has the same number, may share a folder
        one.mkdir()
        two.mkdir()
        path.rename(tmp_path / "aside")
    with pytest.raises(ValueError, match="two/x could not be written \\(File exists"):
        support.files.write_file(tmp_path / "two/x", print)


def test_restart_by_torchrun_never_overwrites(tmp_path, monkeypatch):
    """A command with --overwrite that torchrun starts again after a failure continues what it has begun."""
    flags = [*TINY, "--steps", 4, "--save-every", 2, "--out", tmp_path / "out", "--overwrite"]
    train_main(*flags)
    shutil.rmtree(tmp_path / "out/resume/step_000000004")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert set_up_and_release(*flags).start == 2


def train_in_agent(killed: Path, argv: list[str]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    sys.argv = ["train.py", *argv]
    step, calls = train.train_step, itertools.count(1)  # nobody gets far before one is killed
    train.train_step = lambda *a: (next(calls) == 9 and wait_for(killed.exists), step(*a))[1]
    train.main(argv)


def quick_agent(n: int, endpoint: str, killed: Path, argv: list[str]) -> None:
    """What `torchrun --nnodes {n} --nproc-per-node 1 --max-restarts 3` does, with a forked worker, for a fast start."""
    config = launcher.LaunchConfig(min_nodes=n, max_nodes=n, nproc_per_node=1, run_id="four", rdzv_backend="c10d",
                                   rdzv_endpoint=endpoint, max_restarts=3, start_method="fork")
    launcher.elastic_launch(config, train_in_agent)(killed, argv)


def agent(endpoint: str, argv, log: Path, prefix=(), flags=(), n: int = 4) -> subprocess.Popen:
    """One of n `torchrun --nnodes n`, a machine of its own as far as it knows."""
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", "--nnodes", n, "--nproc-per-node", "1",
               "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, *flags, "train.py", *argv]
    with open(log, "ab") as file:
        return subprocess.Popen([str(c) for c in command], cwd=HERE, stdout=file, stderr=file, start_new_session=True,
                                env=os.environ | dict(OMP_NUM_THREADS="1"))


@pytest.mark.slow
def test_torchrun_restarts_after_any_process_is_killed(tmp_path):
    """The command of the README with --max-restarts: either process, before and after the first save."""
    out, log = tmp_path / "out", tmp_path / "log"
    argv = [*TINY, "--steps", 40, "--save-every", 7, "--out", out]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               "--max-restarts", "4", "train.py", *map(str, argv)]
    with open(log, "w") as file:
        job = subprocess.Popen(command, cwd=HERE, stdout=file, stderr=file, start_new_session=True,
                               env=os.environ | dict(OMP_NUM_THREADS="1"))
    starts = lambda: [int(s) for s in re.findall(r"step (\d+) of 40, global batch", log.read_text())]  # noqa: E731
    try:
        for n, (victim, step) in enumerate([(0, 0), (1, 0), (0, 7), (1, 14)], 1):
            wait_for(lambda: len(starts()) == n and (not step or f"saved step {step}:" in log.read_text()), 90)
            os.kill(int(children(job)[victim]), signal.SIGKILL)
        assert job.wait(timeout=90) == 0, log.read_text()[-3000:]
    finally:
        kill_machine(job)
    assert len(starts()) == 5 and starts()[:3] == [0, 0, 0] and starts()[3] >= 7 and starts()[4] >= 14
    assert [r["step"] for r in metrics(out)] == list(range(40)) and "Traceback" not in log.read_text()


def children(process) -> list[str]:
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def kill_machine(agent: subprocess.Popen) -> None:
    """The agent and its worker at one blow."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for pid in [*children(agent), agent.pid]:
            os.kill(int(pid), signal.SIGKILL)
    agent.wait()


FOUR = (*TINY, "--batch-size", 16, "--steps", 24, "--save-every", 5, "--keep", 100)


def check_agents(tmp_path: Path, n_starts: int, one: Launched, steps: int = 24, n: int = 4) -> None:
    """All steps are there, as `one` process does them, after so many starts of n processes."""
    out, log = tmp_path / "out", (tmp_path / "log").read_text()
    starts = [int(s) for s in re.findall(rf"step (\d+) of {steps}, global batch 16 \({n} x", log)]
    assert starts[0] == 0 and starts[1] >= 5 and len(starts) == n_starts, starts
    assert [r["step"] for r in metrics(out)] == list(range(steps))
    one.wait()
    for many, one in zip(metrics(out), metrics(tmp_path / "one"), strict=True):
        assert many == pytest.approx(one, rel=0.01, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("n", [2, 4])
def test_agents_survive_the_loss_of_a_worker(n, tmp_path):
    """All restart, by themselves, from the last save."""
    flags, killed = [*FOUR, "--steps", 12, "--out"], tmp_path / "killed"
    quick = partial(quick_agent, n, f"127.0.0.1:{free_port()}", killed)
    agents = [Launched(tmp_path / "log", quick, *flags, tmp_path / "out") for _ in range(n)]
    wait_for((tmp_path / "out/resume/step_000000005/complete").exists)
    os.kill(int(children(agents[-1].processes[0])[0]), signal.SIGKILL)
    killed.touch()
    one = Launched(tmp_path / "log1", train.main, *flags, tmp_path / "one")
    for a in agents:
        a.wait()
    check_agents(tmp_path, n_starts=2, one=one, steps=12, n=n)


def four_agents(tmp_path: Path, machine_too: bool, endpoint: str = "", machines=((),) * 4) -> None:
    """The same with torchrun itself. With `machine_too` an agent is killed as well, after which a scheduler would end
    and requeue the job: here the test does."""
    argv, log, endpoint = [*FOUR, "--out", tmp_path / "out"], tmp_path / "log", endpoint or f"127.0.0.1:{free_port()}"
    agents = [agent(endpoint, argv, log, *machine) for machine in machines]
    try:
        wait_for((tmp_path / "out/resume/step_000000005/complete").exists, 100)
        os.kill(int(children(agents[3])[0]), signal.SIGKILL)
        if machine_too:
            wait_for(lambda: len(re.findall(r"global batch 16 \(4 x", log.read_text())) == 2)
            kill_machine(agents[3])
            for a in agents[:3]:
                a.terminate()
            assert [a.wait(timeout=100) for a in agents[:3]] != [0, 0, 0]
            agents = [agent(endpoint, argv, log, *machine) for machine in machines]
        assert [a.wait(timeout=300) for a in agents] == [0, 0, 0, 0], log.read_text()[-3000:]
    finally:
        for a in agents:
            kill_machine(a)
    one = Launched(tmp_path / "log1", train.main, *FOUR, "--out", tmp_path / "one")
    check_agents(tmp_path, n_starts=2 + machine_too, one=one)


SHIMS = dict(  # what the script calls of Slurm, for one machine with one GPU
    scontrol='[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> "$FOLDER/requeued"',
    srun='shift; echo $$ > "$FOLDER/step"; exec "$@"', torchrun='exec "$PYTHON" -m torch.distributed.run "$@"',
    scancel='all() { for c in $(cat "/proc/$1/task/$1/children"); do all "$c"; done; echo "$1"; }; '
            'kill -USR1 $(all "$(cat "$FOLDER/step")")')


STAND_IN = """
import os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["FOLDER"])
with open(folder / "commands", "a") as file:
    print(*sys.argv[1:], file=file)
if not (folder / "saved").exists():  # trains until it is told to save
    signal.signal(signal.SIGUSR1, lambda *a: ((folder / "saved").touch(), sys.exit(0)))
    (folder / "ready").touch()
    time.sleep(100)
    sys.exit(1)
"""


@pytest.mark.parametrize("torchrun", ["stand-in", pytest.param("real", marks=pytest.mark.slow)])
def test_slurm_script_of_the_docs(torchrun, tmp_path):
    """Run as printed, but for data and port, with stand-ins for Slurm: the signal before the end has the training save,
    and the job requeued; the next time it ends, and nothing is requeued."""
    pages = [HERE / "README.md", *sorted((HERE / "docs").glob("*.md"))]
    text = "\n".join(page.read_text() for page in pages)
    script, = re.findall(r"```bash\n(#!/bin/bash\n#SBATCH.*?)```", text, re.DOTALL)
    assert script.count("\n") <= 20
    real, out, port = torchrun == "real", tmp_path / "out", free_port()
    argv = [*TINY, "--steps", 60, "--num-workers", 1, "--save-every", 30, "--out", out]
    script, n = re.subn(r"train.py --preset .* &", f"train.py {shlex.join(map(str, argv))} &", script)
    (tmp_path / "job.sh").write_text(script.replace(":29500", f":{port}"))
    assert n == 1
    (tmp_path / "stand_in.py").write_text(STAND_IN)
    stand_in = {} if real else dict(torchrun='exec "$PYTHON" -S "$FOLDER/stand_in.py" "$@"')
    for name, text in (SHIMS | stand_in).items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHON=sys.executable, FOLDER=str(tmp_path),
                            SLURM_JOB_ID="7", SLURM_JOB_NODELIST="here", SLURM_NNODES="1", SLURM_GPUS_ON_NODE="1",
                            OMP_NUM_THREADS="1")
    log, texts = tmp_path / "log", []
    for interrupt in (True, False):
        with open(log, "w") as file:
            job = subprocess.Popen(["bash", tmp_path / "job.sh"], cwd=HERE, env=env, stdout=file, stderr=file)
        if interrupt and real:
            wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics(out)) > 3)
        elif interrupt:
            wait_for((tmp_path / "ready").exists)
        if interrupt:
            job.send_signal(signal.SIGUSR1)
        code = job.wait(timeout=200)
        texts.append(log.read_text())
        assert interrupt or code == 0, texts[-1]
        assert (tmp_path / "requeued").read_text() == "requeue 7\n", texts[-1]
    if real:
        assert "everything is saved" in texts[0] and "done; the teacher is in" in texts[1], texts[0]
        assert "of 60, global batch 8 (1 x cpu, 8 each)" in texts[1] and "step 0 of 60" not in texts[1]
        assert [r["step"] for r in metrics(out)] == list(range(60))
    else:
        commands = (tmp_path / "commands").read_text().splitlines()
        assert commands == ["--nnodes 1 --nproc-per-node 1 --max-restarts 3 --rdzv-backend c10d --rdzv-id 7 "
                            f"--rdzv-endpoint 127.0.0.1:{port} train.py {' '.join(map(str, argv))}"] * 2


@pytest.mark.slow
def test_four_torchruns_survive_the_loss_of_a_worker(tmp_path):
    four_agents(tmp_path, machine_too=False)


@pytest.mark.slow
def test_four_agents_survive_the_loss_of_a_machine(tmp_path):
    four_agents(tmp_path, machine_too=True)


@contextlib.contextmanager
def separate_machines(n: int, folder: Path):
    """The prefix and the flags of torchrun on n machines, as far as network and names go: addresses of their own,
    joined by a bridge. Each knows the others' names, and takes its own for 127.0.0.1, as in many clouds."""
    names = [f"dinov2test{i}" for i in range(n)]
    ip = lambda *a: subprocess.run(["ip", *a], capture_output=True, check=True)  # noqa: E731
    try:
        ip("link", "add", "dinov2test", "type", "bridge")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("may not make network namespaces")
    try:
        ip("link", "set", "dinov2test", "up")
        for i, name in enumerate(names):
            ip("netns", "add", name)
            ip("link", "add", f"veth{i}", "type", "veth", "peer", "name", "eth0", "netns", name)
            ip("link", "set", f"veth{i}", "master", "dinov2test", "up")
            ip("-n", name, "addr", "add", f"10.99.0.{i + 1}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "eth0", "up")
            ip("-n", name, "link", "set", "lo", "up")
            others = "".join(f"10.99.0.{j + 1} {other}\n" for j, other in enumerate(names) if j != i)
            (folder / f"hosts{i}").write_text(f"127.0.0.1 localhost\n127.0.0.1 {name}\n{others}")
        enter = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'
        yield [(("env", "-u", "GLOO_SOCKET_IFNAME", "ip", "netns", "exec", name, "unshare", "--uts", "--mount", "sh",
                 "-c", enter, "sh", name, folder / f"hosts{i}"),
                ("--local-addr", name, "--rdzv-conf", f"is_host={i == 0}")) for i, name in enumerate(names)]
    finally:
        for i, name in enumerate(names):
            subprocess.run(["ip", "link", "del", f"veth{i}"], capture_output=True)  # at once; with its namespace, later
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", "dinov2test"], capture_output=True)


@pytest.mark.slow
def test_two_machines_whose_names_are_127_0_0_1(tmp_path):
    """Without GLOO_SOCKET_IFNAME; and the first process finds the network by itself, though MASTER_ADDR is its own."""
    argv = [*TINY, "--steps", 3, "--out", tmp_path / "out"]
    with separate_machines(2, tmp_path) as machines:
        agents = [agent("dinov2test0:29500", argv, tmp_path / "log", *machine, n=2) for machine in machines]
        try:
            assert [a.wait(timeout=100) for a in agents] == [0, 0], (tmp_path / "log").read_text()[-3000:]
        finally:
            for a in agents:
                kill_machine(a)
    assert len(metrics(tmp_path / "out")) == 3


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere gloo chooses")
def test_interfaces_are_found_by_address():
    address = support.parallel.address_towards("127.0.0.1")
    assert support.parallel.interface_of(address) == "lo" and support.parallel.interface_of("203.0.113.7") == ""
    if Path("/proc/net/if_inet6").exists() and "00000001 01" in Path("/proc/net/if_inet6").read_text():
        assert support.parallel.interface_of(support.parallel.address_towards("::1")) == "lo"
    with pytest.raises(ValueError, match="no network leads to no.such.host.invalid .*; between machines, give each"):
        support.parallel.address_towards("no.such.host.invalid")


@pytest.mark.parametrize("given,found,chosen", [("", "10.0.0.5", "eth7"), ("ib0", "10.0.0.5", "ib0"),
                                                ("", "127.0.0.1", "eth9"), ("", "10.0.0.6", "")])
def test_gloo_gets_the_interface_that_leads_to_the_first_process(given, found, chosen, monkeypatch, capsys):
    """What the user names stays; on the machine of MASTER_ADDR it is the interface that leads to the last process."""
    store, towards = dist.HashStore(), dict(head=found, other="10.0.0.7")
    store.set("address of 7", "other")
    for name, value in dict(GLOO_SOCKET_IFNAME=given, MASTER_ADDR="head", LOCAL_WORLD_SIZE="4").items():
        monkeypatch.setenv(name, value)
    if not given:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    monkeypatch.setattr(support.parallel, "address_towards", towards.get)
    monkeypatch.setattr(support.parallel, "interface_of", {"10.0.0.5": "eth7", "10.0.0.7": "eth9"}.get)
    support.parallel.choose_interface(store, 0, 8)
    assert os.environ.get("GLOO_SOCKET_IFNAME", "") == chosen and store.get("address of 0").decode() == found
    assert ("note: no network interface has 10.0.0.6" in capsys.readouterr().err) == (chosen == "")
    monkeypatch.setattr(support.parallel, "interface_of", None)
    support.parallel.choose_interface(store, 0, 4)  # one machine: nothing to choose


@pytest.mark.slow
def test_four_agents_in_four_network_namespaces(tmp_path):
    with separate_machines(4, tmp_path) as machines:
        four_agents(tmp_path, machine_too=False, endpoint="dinov2test0:29500", machines=machines)

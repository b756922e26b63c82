"""What a run reports: metrics.jsonl, the progress bar, unreadable images, skipped steps. Apache License 2.0."""
import contextlib
import json
import math
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm

from support.cli import printable
from support.files import replacing, write_json
from support.parallel import Failed, on_all_ranks, root_cause
from support.run import OutputLock, set_aside


class TooManyBad(Exception):
    """More images than allowed cannot be read. Raised on all ranks, after saving."""


def on_terminal() -> bool:
    """Whether a progress bar can be seen. Some containers and CI systems provide a terminal of size zero."""
    return sys.stderr.isatty() and all(os.get_terminal_size(sys.stderr.fileno()))


def read_records(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl, the last one for each step and kind. If any cannot be parsed, sets the file aside,
    unless it is only the last line, which a killed run may leave half-written."""
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
        set_aside(path, f"has {len(bad)} damaged lines, which are dropped")
    return list(records.values())


def is_record(record) -> bool:
    """Whether this could be a line of metrics.jsonl."""
    if not isinstance(record, dict) or type(record.get("step")) is not int or record["step"] < 0:
        return False
    accuracies = [record[key] for key in ("knn", "knn_raw_pixels") if record.get(key) is not None]
    return all(isinstance(a, dict) and isinstance(a.get("top1_k20"), (int, float)) for a in accuracies)


class Log:
    """metrics.jsonl and the progress bar, on rank 0 only. A resumed run drops the lines it will write again. With
    `lock`, nothing is written unless --out still belongs to this run."""

    def __init__(self, path: Path, start: int, steps: int, counters: dict[str, int], lock: OutputLock | None = None):
        self.main, self.lock = dist.get_rank() == 0, lock
        self.path, self.records, self.behind = path, [], False
        self.bar = tqdm(total=steps, initial=start, unit="step", disable=not (self.main and on_terminal()),
                        smoothing=0.05)
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
        """read(path), or `nothing` if there is no such file or it cannot be read; then it is set aside."""
        try:
            return read(path) if path.is_file() else nothing
        except OSError as error:
            if self.main:
                with contextlib.suppress(OSError):
                    set_aside(path, f"cannot be read ({root_cause(error)})")
            return nothing

    def store(self, anew: bool) -> None:
        """Appends the last record to the file, or writes all of them `anew`. If that fails, a later call makes up for
        it."""
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
        """Adds a line, with null for numbers that are not finite. If that fails, a later call writes it."""
        if self.main:
            finite = {k: v if not isinstance(v, float) or math.isfinite(v) else None for k, v in record.items()}
            self.records.append(finite)
            self.store(anew=False)

    def knn(self, step: int, key: str = "knn") -> dict | None:
        return next((r[key] for r in self.records if r["step"] == step and key in r), None)

    def start_clock(self, done: int, waited: float) -> None:
        """Starts measuring speed here: after `done` steps, with `waited` seconds spent waiting for images so far."""
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
                         f"last {step}; see {folder}. The last good save is step {self.saver.good}: lower --lr "
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

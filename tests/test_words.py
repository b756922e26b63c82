"""What the commands say: suggestions, last words, notes, and what happens when memory runs out."""
import dataclasses
import errno
import fcntl
import itertools
import json
import multiprocessing
import os
import pty
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import termios
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import bench
import eval_dense
import eval_knn
import eval_linear
import eval_logreg
import export
import hub
import model
import support.evaluation
import support.machine
import support.parallel
import support.run
import support.sources
import train
import visualize
from support.cli import run
from support.machine import duration, foreseen, known_failure, training_estimate
from support.suggest import nearest
from tests.common import HERE, TINY, Launched, exit_code, write_images

COMMANDS = {
    "train": train.parse, "knn": eval_knn.parse, "linear": eval_linear.parse, "logreg": eval_logreg.parse,
    "dense": eval_dense.parse, "pca": lambda argv: visualize.parse(["pca", *argv]),
    "curves": lambda argv: visualize.parse(["curves", *argv]), "features": export.features, "program": export.program,
    "neighbors": lambda argv: visualize.parse(["neighbors", *argv])}

FLAGS = """
train: --lerning-rate->--lr --ephocs->--steps
train: --learning-rate->--lr -lr->--lr --blr->--lr --epochs->--steps --epochs=100->--steps --max_steps->--steps
train: --bs->--batch-size -b->--batch-size --batch->--batch-size --batchsize->--batch-size --batch_size->--batch-size
train: --bach-size->--batch-size --workers->--num-workers -j->--num-workers --num_worker->--num-workers
train: --wd->--weight-decay --weigth-decay->--weight-decay --amp->--dtype --fp16->--dtype --precision->--dtype
train: --accum->--gradient-accumulation-steps --grad_accum->--gradient-accumulation-steps
train: --recompute->--activation-checkpointing --gradient-checkpointing->--activation-checkpointing --shard->--sharding
train: --fsdp->--sharding --model->--arch --output->--out --save-dir->--out --output_dir->--out -o->--out
train: --checkpoint->--init --pretrained->--init --weights->--init --data-path->--data --data_dir->--data
train: --dataset->--data --train->--data --root->--data --images->--data --image-size->--global-crops-size
train: --img_size->--global-crops-size --crop-size->--global-crops-size --ema->--momentum-teacher
train: --momentum->--momentum-teacher --config->--preset --config-file->--preset --save-freq->--save-every
train: --gpu->--device --no-cuda->--device --sed->--seed --random-seed->--seed --clip->--clip-grad
train: --warmup-epochs->--warmup-steps --compil->--compile --nocompile->--no-compile --patch->--patch-size
train: --grad->--gradient-accumulation-steps --registers->--num-register-tokens --overwrit->- --force->- --clobber->-
train: --foo->- --xyzzy->- --delete->- --resum->--resume
knn: --data->--train --dataset->--train --val-dir->--val --k->--ks --temp->--temperature --batch_size->-
knn: --image-size->--crop --output->--out --overwrite->- --workers->--num-workers --fp16->--dtype --learning-rate->-
knn: --sharding->-
linear: --lr->--learning-rates --steps->--epochs --bs->--batch-size --data->--train --no-resum->- --overwrite->-
logreg: --max-iters->--max-iter --epochs->--max-iter --c->--cs
dense: --learning-rate->--lr --train->--data --epochs->--steps --warmup-steps->--warmup --clip-grad->--clip
pca: --checkpoint->--model --weights->--model --arch->--model --image-size->--size --output->--out --gpu->--device
pca: --foregroud->--foreground
neighbors: --dataset->--data --knn->- --n-neighbors->--k --query->--queries
curves: --output->--out --lr->-
features: --checkpoint->--model --batch->--batch-size --workers->--num-workers --output-dir->--out --resolution->--size
program: --checkpoint->--model --resolution->--size
"""


@pytest.mark.parametrize("command,typed,meant", [
    (line.partition(":")[0], *pair.split("->")) for line in FLAGS.strip().splitlines()
    for pair in line.partition(":")[2].split()])
def test_suggested_flags(command, typed, meant):
    """Another word for a flag, or one spelled alike, suggests it; "-": nothing is close, and nothing is suggested. The
    unknown flag is named before a required one that is missing."""
    with pytest.raises(ValueError) as told:
        COMMANDS[command]([typed])
    assert f"unknown argument {typed!r}" in str(told.value) and "--overwrite" not in str(told.value).partition("'; ")[2]
    assert re.findall(r"did you mean (\S+)\?", str(told.value)) == [meant] * (meant != "-"), told.value


@pytest.mark.parametrize("command,typed,text", [
    ("train", "--epochs", "did you mean --steps? (one epoch is the number of images / --batch-size steps)"),
    ("train", "--gpus", "(torchrun --nproc-per-node N starts one process per GPU)"),
    ("linear", "--devices", "(torchrun --nproc-per-node N starts one process per GPU)"),
    ("train", "--dist-url", "(torchrun sets the processes up"), ("train", "--local_rank", "(torchrun sets"),
    ("train", "--wandb", "python visualize.py curves"), ("train", "--tensorboard", "metrics.jsonl"),
    ("linear", "--resume", "(the same command resumes by itself)"),
    ("train", "--auto-resume", "(the same command continues a run)"),
    ("knn", "--checkpoint", "(checkpoint is given without a flag)"), ("knn", "--model", "(checkpoint is given without"),
    ("pca", "--input", "(images is given without a flag)"), ("program", "--output", "(out is given without a flag)")])
def test_what_to_do_instead_of_a_flag(command, typed, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        COMMANDS[command]([typed])


def test_a_path_without_a_flag_is_data_and_a_preset_a_preset(tmp_path):
    with pytest.raises(ValueError, match=f"did you mean --data {tmp_path}"):
        train.parse([str(tmp_path)])
    with pytest.raises(ValueError, match="unknown argument 'vits16_short', did you mean --preset vits16_short"):
        train.parse(["vits16_short", "--data", "digits"])
    assert train.parse(["--data", "digits"])[0].data == "digits"


@pytest.mark.parametrize("names,typed,meant", [
    (model.ARCHS, "vit_s", "vit_small"), (model.ARCHS, "vits16", "vit_small with --patch-size 16"),
    (model.ARCHS, "ViT-S/14", "vit_small with --patch-size 14"), (model.ARCHS, "vit_b", "vit_base"),
    (model.ARCHS, "vit_b_16", "vit_base with --patch-size 16"),
    (model.ARCHS, "vitl14", "vit_large with --patch-size 14"),
    (model.ARCHS, "vit_g", "vit_giant2"), (model.ARCHS, "ViT-Ti", "vit_tiny"), (model.ARCHS, "vit_nan", "vit_nano"),
    (model.ARCHS, "dinov2_vits14", "vit_small with --patch-size 14"), (model.ARCHS, "vit_huge", ""),
    (model.ARCHS, "vit_small_patch16_224", "vit_small with --patch-size 16"), (model.ARCHS, "resnet50", ""),
    (train.PRESETS, "vits", "vits16_short"), (train.PRESETS, "vits16", "vits16_short"),
    (train.PRESETS, "vitl16", "vitl16_short"), (train.PRESETS, "vit_large", "vitl16_short"),
    (train.PRESETS, "ViT-L/14", "vitl14"), (train.PRESETS, "vitg16", "vitg14"), (train.PRESETS, "digit", "digits"),
    (train.PRESETS, "fashionmnist", "fashion"), (train.PRESETS, "default", ""),
    (support.sources.NAMED, "imagenet1k", "ImageNet"), (support.sources.NAMED, "imagenet", "ImageNet"),
    (support.sources.NAMED, "ImageNet-21k", "ImageNet22k"), (support.sources.NAMED, "cifar", "CIFAR10"),
    (support.sources.NAMED, "cifar-100", "CIFAR100"), (support.sources.NAMED, "fashion_mnist", "FashionMNIST"),
    (support.sources.NAMED, "inat", ""), (support.sources.NAMED, "/my/photos", ""),
    (support.sources.NAMED, "laion", ""),
    (hub.RELEASED, "dinov2_vits", "dinov2_vits14"), (hub.RELEASED, "vits14", "dinov2_vits14"),
    (hub.RELEASED, "dinov2_vitb14_reg4", "dinov2_vitb14_reg"), (hub.RELEASED, "facebook/dinov2-small", "dinov2_vits14"),
    (hub.RELEASED, "dinov2-with-registers-large", "dinov2_vitl14_reg"),
    (hub.RELEASED, "dinov2_vits16", "dinov2_vits14"),
    (hub.RELEASED, "vit_small_patch14_reg4_dinov2.lvd142m", "dinov2_vits14_reg"), (hub.RELEASED, "none.pth", ""),
    (hub.RELEASED, "out/ckpt.pth", ""), (hub.RELEASED, "runs/vitb.pth", ""), (hub.RELEASED, "vits16/ckpt.pth", ""),
    (hub.DENSE_HEADS, "nyu_dbt", "nyu_dpt"), (hub.DENSE_HEADS, "ade20k", "ade20k_ms"),
    (("auto", "bf16", "fp32"), "fp16", "bf16"), (("auto", "bf16", "fp32"), "float32", "fp32"),
    (("ddp", "zero2", "zero3", "hsdp"), "fsdp", "zero3"), (("ddp", "zero2", "zero3", "hsdp"), "none", "ddp"),
    (("centering", "sinkhorn_knopp"), "sinkhorn", "sinkhorn_knopp"), (visualize.COMMANDS, "attn", "attention"),
    (visualize.COMMANDS, "loss", "curves"), (visualize.COMMANDS, "seg", "segment"),
    (export.COMMANDS, "onnx", "program")])
def test_suggested_values(names, typed, meant):
    assert nearest(typed, names) == (f", did you mean {meant}?" if meant else "")


def test_a_data_set_as_preset():
    assert "--preset vits16_short suits" in nearest("imagenet", train.PRESETS)


# ----------------------------------------------------------------------------------------------------------------------
# ImageNet beside train.py


def checkout(folder: Path) -> Path:
    """A copy of the program."""
    ignored = shutil.ignore_patterns("__pycache__", "tests", "docs", "pictures", "out*", ".*")
    return Path(shutil.copytree(HERE, folder, ignore=ignored))


def small_run(folder: Path, *flags) -> subprocess.CompletedProcess:
    """`torchrun train.py --preset vitl16_short`, with all that is large made small by flags, started elsewhere."""
    small = ("--arch vit_nano --batch-size 4 --group-size 4 --steps 1 --warmup-steps 0 --num-workers 0 "
             "--global-crops-size 32 --local-crops-size 16 --head-n-prototypes 16 --head-hidden-dim 16 "
             "--head-bottleneck-dim 8").split()
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", folder / "train.py", "--preset", "vitl16_short", *small,
         *flags], capture_output=True, text=True, cwd=folder.parent, env=os.environ | dict(PYTHONPATH=""))


@pytest.mark.slow
def test_imagenet_beside_train(tmp_path, cache):
    """The model card's command: --data may be left out where ImageNet, or a link to it, lies beside train.py."""
    program = checkout(tmp_path / "program")
    write_images(tmp_path / "elsewhere", [f"train/n0{i % 2}/{i}.JPEG" for i in range(8)])
    (program / "imagenet").symlink_to(tmp_path / "elsewhere")
    done = small_run(program, "--out", "out")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/config.json").read_text())["data"] == "ImageNet:split=TRAIN"
    assert f"on {tmp_path}/elsewhere/train: 8 images" in done.stdout


@pytest.mark.parametrize("preset", ["vitl16_short", "vitl14"])
def test_imagenet_beside_train_is_found(preset, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(support.sources, "__file__", str(tmp_path / "support/sources.py"))
    write_images(tmp_path, ["imagenet/train/n01/a.JPEG", "imagenet/val/n01/b.JPEG", "n01/c.png"])
    (tmp_path / "imagenet22k").mkdir()
    with tarfile.open(tmp_path / "imagenet22k/n01.tar", "w") as tar:
        tar.add(tmp_path / "n01/c.png", "n01_c.JPEG")
    train_spec, val_spec = support.sources.eval_specs(train.parse(["--preset", preset])[0].data)
    source = support.sources.open_source(train_spec)
    assert len(source) == 1 and source.image(0).shape == (3, 40, 32)
    assert val_spec is None or len(support.sources.open_source(val_spec)) == 1


@pytest.mark.parametrize("preset,beside", [("vitl16_short", "imagenet"), ("vits16_short", "imagenet"),
                                           ("vitl14", "imagenet22k")])
def test_no_imagenet_beside_train(preset, beside):
    cfg = train.parse(["--preset", preset])[0]
    with pytest.raises(ValueError, match=f"{beside}, where a folder or a link may be; .*images: --data /my/photos$"):
        support.sources.open_source(cfg.data)


# ----------------------------------------------------------------------------------------------------------------------
# Running out of memory

CUDA_FULL = ("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB of which "
             "1.12 GiB is free.")


def allocate(function):
    try:
        function()
    except (RuntimeError, MemoryError) as error:
        return error


@pytest.mark.parametrize("error,text", [
    (torch.OutOfMemoryError(CUDA_FULL), "out of GPU memory (2.1 GB more were needed); lower --x"),
    (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
     "out of GPU memory; lower"),
    (RuntimeError("CUDA error: out of memory\nCompile with ..."), "out of GPU memory; lower --x"),
    (RuntimeError("MPS backend out of memory (MPS allocated: 5.00 GB)"), "out of GPU memory; lower --x"),
    (allocate(lambda: torch.empty(2**60, dtype=torch.uint8)), "out of memory (1.2e+09 GB more were needed); lower --x"),
    (allocate(lambda: np.empty(2**60, dtype=np.uint8)), "out of memory (1.2e+09 GB more were needed); lower --x"),
    (RuntimeError("[enforce fail at alloc_cpu.cpp:121] data. DefaultCPUAllocator: not enough memory: you tried to "
                  "allocate 4194304000 bytes."), "out of memory (4.2 GB more were needed); lower --x"),
    (MemoryError(), "out of memory; lower --x"), (RuntimeError("std::bad_alloc"), "out of memory; lower --x"),
    (OSError(errno.ENOMEM, "Cannot allocate memory"), "out of memory; lower --x"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. "),
     "too little memory; lower --num-workers"),
    (RuntimeError("DataLoader worker (pid(s) 7, 8) exited unexpectedly"), "too little memory; lower --num-workers"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                  "are out of shared memory."), "/dev/shm, is full; lower --num-workers"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Segmentation fault. "),
     "--num-workers 0 shows where"),
    (RuntimeError("expected scalar type Float"), ""), (ValueError("out of memory"), ""),
    (OSError(errno.ENOSPC, "full"), "")])
def test_failures_of_the_machine_are_known(error, text):
    told = known_failure(error, "lower --x")
    assert (text in told) if text else told == "" and "\n" not in told


@pytest.mark.parametrize("script,argv,text", [
    ("eval_knn.py", [], "--dtype bf16"), ("eval_logreg.py", [], "--dtype bf16"), ("eval_linear.py", [], "--batch-size"),
    ("eval_dense.py", ["--task", "seg", "--data", "{tmp}"], "--batch-size"),
    ("visualize.py", ["pca", "{tmp}/a.png"], "--size"),
    ("export.py", ["features", "{tmp}/a.png", "--out", "{tmp}/f.npz"], "--size or --batch-size")])
def test_a_command_out_of_memory(script, argv, text, tmp_path, monkeypatch, capsys):
    def read(*_):
        raise torch.OutOfMemoryError(CUDA_FULL)

    monkeypatch.setattr(hub, "read", read)
    write_images(tmp_path, ["a.png"])
    name = ["--model", "ckpt.pth"] if script in ("visualize.py", "export.py") else ["ckpt.pth"]
    flags = [flag.format(tmp=tmp_path) for flag in argv]
    assert exit_code(script, *(flags + name if "--model" in name else name + flags)) == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and told.startswith("error: out of GPU memory (2.1 GB more were needed); "), told
    assert text in told


def little_memory() -> None:
    """As much as this process has, and 400 MB."""
    now = 4096 * int(Path("/proc/self/statm").read_text().split()[0]) + 400 * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (now, now))


def ends_in_one_line(log: str) -> str:
    errors = [line for line in log.replace("\0", "").splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "Traceback" not in log, log
    return errors[0]


def too_large_a_step() -> None:
    train.train_step = lambda *arguments: torch.empty(2**50)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of a process")
@pytest.mark.parametrize("flags,before", [(("--head-n-prototypes", 40_000_000), little_memory), ((), too_large_a_step)])
def test_training_out_of_memory(flags, before, tmp_path):
    """Where the network does not fit, and where a step does not."""
    training = Launched(tmp_path / "log", train.main, *TINY, "--steps", 4, "--out", tmp_path / "out", *flags,
                        before=before)
    error = ends_in_one_line(training.wait(ok=1))
    assert re.fullmatch(r"error: out of memory \([\d.e+]+ GB more were needed\); --gradient-accumulation-steps 2 or "
                        r"--activation-checkpointing selective needs less, for the same result; so does a "
                        r"smaller --batch-size, but that is a different experiment \(nothing is saved yet\)", error)


def full_at(step: int, rank: int = 0) -> None:
    """GPU memory runs out in one process, in the step after so many."""
    train_step, calls = train.train_step, itertools.count()

    def full(*arguments):
        if next(calls) == step and int(os.environ.get("RANK", 0)) == rank:
            raise torch.OutOfMemoryError(CUDA_FULL)
        return train_step(*arguments)

    train.train_step = full


def test_training_out_of_memory_names_the_last_save(tmp_path):
    argv = (*TINY, "--steps", 6, "--save-every", 2, "--out", tmp_path / "out")
    error = ends_in_one_line(Launched(tmp_path / "log", train.main, *argv, before=partial(full_at, 5)).wait(ok=1))
    assert error.startswith("error: out of GPU memory (2.1 GB more were needed); --gradient-accumulation-steps 2 or ")
    assert error.endswith("(the last good save is step 4)")
    again = Launched(tmp_path / "log", train.main, *argv, "--gradient-accumulation-steps", 2).wait()
    assert "step 4 of 6" in again and not (tmp_path / "out/lock").exists()


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_training_out_of_memory_in_one_of_two_processes(rank, tmp_path):
    """Both end, within seconds."""
    training = Launched(tmp_path / "log", train.main, *TINY, "--steps", 6, "--save-every", 2, "--out", tmp_path / "out",
                        world=2, before=partial(full_at, 3, rank))
    began = time.monotonic()
    log = training.wait(ok=1)
    assert time.monotonic() - began < 60 and "Traceback" not in log, log
    lines = sorted(line for line in log.splitlines() if line.startswith("error: "))
    assert lines[0].startswith("error: contact with another process was lost"), log
    assert lines[1].startswith("error: out of GPU memory (2.1 GB more were needed)"), log


def knn_command(argv: list[str]) -> None:
    run(partial(eval_knn.main, argv))


def full_in_the_second() -> None:
    def full(*arguments):
        raise torch.OutOfMemoryError(CUDA_FULL)

    if os.environ["RANK"] == "1":
        support.evaluation.extract_features = full


def test_an_evaluation_out_of_memory_in_one_of_two_processes(trained, tmp_path):
    evaluation = Launched(tmp_path / "log", knn_command, trained / "ckpt.pth", "--device", "cpu", "--num-workers", 0,
                          "--out", tmp_path / "out.jsonl", world=2, before=full_in_the_second)
    log = evaluation.wait(ok=1)
    assert "Traceback" not in log and log.count("error: ") == 2 and "error: out of GPU memory" in log
    assert "error: contact with another process was lost" in log and not (tmp_path / "out.jsonl").exists()


def kill_worker(how: int) -> None:
    train_step, calls = train.train_step, itertools.count()

    def killing(*arguments):
        if next(calls) == 3:
            os.kill(multiprocessing.active_children()[0].pid, how)
        return train_step(*arguments)

    train.train_step = killing


@pytest.mark.parametrize("how,text", [(signal.SIGKILL, "too little memory; lower --num-workers"),
                                      (signal.SIGBUS, "shared memory, /dev/shm, is full")])
def test_training_with_a_killed_worker(how, text, tmp_path):
    training = Launched(tmp_path / "log", train.main, *TINY, "--steps", 400, "--save-every", 2, "--num-workers", 1,
                        "--out", tmp_path / "out", before=partial(kill_worker, how))
    log = training.wait(ok=1)
    error = ends_in_one_line(log)
    assert re.search("the last good save is step [24]\\)$", error), log  # the error may arrive a step later
    assert error.startswith("error: a data-loading worker was killed: ") and text in error


@pytest.mark.parametrize("folder,limit,used", [
    ("", "memory.max", "memory.current"), ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes")])
def test_free_memory_in_a_container(folder, limit, used, tmp_path):
    """Cached files count as free; a limit of "max" is none."""
    group = tmp_path / folder
    group.mkdir(exist_ok=True)
    (group / used).write_text("900000\n")
    for text, free in (("1000000\n", 600_000), ("max\n", None)):
        (group / limit).write_text(text)
        (group / "memory.stat").write_text("anon 7\ninactive_file 500000\ntotal_inactive_file 500000\n")
        found = support.machine.free_memory(torch.device("cpu"), str(tmp_path))
        assert found == free if free else found > 1e7
    (group / "memory.stat").unlink()
    (group / limit).write_text("1000000\n")
    assert support.machine.free_memory(torch.device("cpu"), str(tmp_path)) == 100_000


def test_memory_and_time_are_foreseen(monkeypatch):
    """Operations within 6 %, bytes within a quarter of those that bench.py counts; a note where either is too much."""
    for preset, checkpointing in (("vits16_short", "none"), ("vitl14", "selective"), ("fashion", "none")):
        cfg = dataclasses.replace(train.Config(**train.PRESETS[preset]), activation_checkpointing=checkpointing)
        operations, size = training_estimate(cfg, model.ARCHS[cfg.arch], 64, 1, 2)
        assert 0.94 < operations / 64 / bench.train_flops(cfg) < 1.06
        assert 0.75 < size / sum(bench.memory(cfg, "zero2", 1, 64, checkpointing).values()) < 1.25
    monkeypatch.setattr(support.machine, "free_memory", lambda device: 20e9)
    monkeypatch.setattr(support.machine, "operations_per_second", lambda: 50e9)

    def told(*argv) -> str:
        cfg = train.parse(list(argv))[0]
        return foreseen(cfg, model.ARCHS[cfg.arch], torch.device("cpu"), 1)

    assert told() == told("--preset", "fashion") == ""
    note = told("--preset", "vits16_short")
    assert re.match(r"a step takes about 4\d minutes on this CPU, the run \d+ years; smaller networks: docs/pict", note)
    assert re.search(r"\. 2\d\d GB of memory needed, 20 GB free; --gradient-accumulation-steps 16 or ", note)
    assert told("--preset", "vits16_short", "--batch-size", "64", "--gradient-accumulation-steps", "64",
                "--group-size", "1").count("memory") == 0
    assert [duration(s) for s in (7, 150, 9000, 2e5, 1e9)] == [
        "7 seconds", "2 minutes", "2 hours", "2 days", "32 years"]


# ----------------------------------------------------------------------------------------------------------------------
# What is said along the way


@pytest.mark.parametrize("threads,load,cores,usable,text", [
    (8, 1.0, 8, 8, "OMP_NUM_THREADS=7"), (8, 7.9, 8, 8, "a load of 7.9 on 8 cores, and PyTorch has 8 threads"),
    (2, 9.0, 2, 2, "OMP_NUM_THREADS=1"),
    (64, 30.0, 64, 4, "4 cores are available"), (64, 63.0, 64, 4, "OMP_NUM_THREADS=1"),
    (8, 0.2, 8, 8, ""), (1, 9.0, 2, 2, ""), (4, 30.0, 64, 4, "")])
def test_a_busy_machine(threads, load, cores, usable, text, monkeypatch, capsys):
    """pick_device(), which every command calls, says so in one line, unless the user has set the number of threads."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(support.parallel, "usable_cores", lambda: usable)
    support.parallel.pick_device("cpu")
    assert capsys.readouterr().err == ""  # conftest.py has set OMP_NUM_THREADS
    monkeypatch.delenv("OMP_NUM_THREADS")
    support.parallel.pick_device("cpu")
    told = capsys.readouterr().err
    assert text in told and told.count("\n") == bool(text)


@pytest.mark.skipif(sys.platform != "linux", reason="pseudo-terminals")
@pytest.mark.parametrize("size", [(0, 0), pytest.param((24, 0), marks=pytest.mark.slow), (24, 80)])
def test_a_line_a_minute_on_a_terminal_of_no_size(size, tmp_path):
    """Where tqdm draws nothing, lines come as without a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", *size, 0, 0))
    training = Launched(tmp_path / "log", train.main, *TINY, "--steps", 3, "--out", tmp_path / "out",
                        before=partial(in_terminal, os.ttyname(theirs)))
    training.join()
    os.set_blocking(ours, False)
    shown = os.read(ours, 100_000).decode()
    assert ("step 1 of 3: loss" in shown) == (0 in size) and ("3/3" in shown) == (0 not in size), shown


def in_terminal(name: str) -> None:
    terminal = os.open(name, os.O_RDWR | os.O_NOCTTY)
    os.dup2(terminal, 1)
    os.dup2(terminal, 2)
    monotonic = time.monotonic
    time.monotonic = lambda: 10_000 * monotonic()  # minutes pass


def test_last_words(trained, capsys, monkeypatch):
    """A run ends with the files it wrote and commands that run as they are."""
    monkeypatch.setattr(sys, "argv", ["../code/train.py"])
    assert support.run.last_words("my out", labeled=False).splitlines()[1:] == [
        "    python ../code/visualize.py neighbors --model 'my out/ckpt.pth'",
        "    python ../code/visualize.py curves 'my out'"]
    monkeypatch.setattr(sys, "argv", ["train.py"])
    first, *commands = support.run.last_words(str(trained), labeled=True).splitlines()
    assert first == (f"done; the teacher is in {trained}/ckpt.pth, the log in {trained}/metrics.jsonl. What to run "
                     "next:")
    for command in commands:
        python, script, *argv = command.split()
        assert python == "python" and (HERE / script).exists() and all(Path(a).exists() for a in argv if "/" in a)
        COMMANDS[dict(eval_knn="knn").get(Path(script).stem, "curves")](argv[argv[0] == "curves" :])


def test_many_patches_are_announced(monkeypatch):
    vit = model.build("vit_small", img_size=224, patch_size=14)
    monkeypatch.setattr(support.machine, "operations_per_second", lambda: 100e9)
    note = support.machine.many_patches(vit, torch.Size([1, 3, 6720, 6720]), "a.jpg")
    assert note == ("a.jpg has 230,400 patches at 6720 x 6720 pixels, which take about 3 hours and 4.2 GB of memory; a "
                    "smaller --size, such as 224, is faster")
    assert support.machine.many_patches(vit, torch.Size([1, 3, 448, 448]), "a.jpg") == ""
    monkeypatch.setattr(support.machine, "free_memory", lambda device: 1e6)  # on a GPU only memory counts
    assert "which take 0.019 GB of memory;" in support.machine.many_patches(vit, torch.Size([1, 3, 448, 448]), "a.jpg")


@pytest.mark.parametrize("script,argv", [
    ("visualize.py", ["pca"]), ("visualize.py", ["attention"]), ("visualize.py", ["similarity", "--at", "3,3"]),
    ("export.py", ["features"])])
def test_commands_announce_many_patches(script, argv, tmp_path, monkeypatch, capsys):
    """Once per command, before it starts."""
    write_images(tmp_path, ["a.png", "b.png"])
    torch.save(model.build("vit_nano", img_size=16, patch_size=8).state_dict(), tmp_path / "vit.pth")
    monkeypatch.setattr(support.machine, "free_memory", lambda device: 1e3)
    main = dict(visualize=visualize.main, export=export.main)[Path(script).stem]
    main([argv[0], str(tmp_path / "a.png"), str(tmp_path / "b.png"), *argv[1:], "--model", str(tmp_path / "vit.pth"),
          "--size", "0", "--device", "cpu", "--out", str(tmp_path / ("o.npz" if "export" in script else "o.png"))])
    told = capsys.readouterr().err
    assert told.count("note: ") == told.count(f"note: {tmp_path}/a.png has 20 patches at 40 x 32 pixels") == 1


def test_nearly_black_pictures_are_explained():
    drawn = np.full((3, 10, 10, 3), 200, np.uint8)
    assert visualize.background_note([*drawn], ["a", "b", "c"]) == ""
    drawn[1, 1:] = 0
    assert visualize.background_note([*drawn], ["a", "b", "c"]) == ""  # a tenth is foreground
    drawn[1, 0, :3], drawn[0, :5] = 0, 0
    note = visualize.background_note([*drawn], ["a", "b", "c"])
    assert note.startswith("b is nearly black: 48% of all patches were taken for background; --foreground all colors")
    drawn[2] = 0
    assert visualize.background_note([*drawn], ["a", "b", "c"]).startswith("2 images, such as b, are nearly black: 81%")

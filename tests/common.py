"""What several test files use: golden numbers, programs in new processes, small images and networks.

test_golden.npz holds numbers that the official DINOv2 code (facebookresearch/dinov2, commit b8931f7) gave on a CPU in
float32: outputs, losses, gradients, three whole optimizer steps. Weights and images are not in it: they follow from the
seeds given here. Of large tensors it keeps the norm and some entries. test_golden_dense.npz: likewise of the official
depth, segmentation and Mask2Former heads, whose weights follow from their names, see fill_by_names.
"""
import contextlib
import functools
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import runpy
import signal
import socket
import sys
import threading
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.format_utils
from PIL import Image

import eval_linear
import model
import train
import support.sources

HERE = Path(__file__).parents[1]
CPU = torch.device("cpu")
sklearn.datasets.load_digits = functools.cache(sklearn.datasets.load_digits)  # reading the file takes as long as a step


class Golden:
    """golden["key"] -> tensor; golden.json("key") -> whatever was stored as JSON; golden.keys(prefix)."""

    def __init__(self, path: Path):
        with np.load(path) as file:
            self.arrays = dict(file)
        self.index = json.loads(self.arrays.pop("index").tobytes())

    def numpy(self, key: str) -> np.ndarray:
        dtype, start, shape = self.index[key]
        return self.arrays[dtype][start : start + math.prod(shape)].reshape(shape)

    def __getitem__(self, key: str) -> torch.Tensor:
        return torch.from_numpy(self.numpy(key))

    def json(self, key: str):
        return json.loads(self.numpy(key).tobytes())

    def keys(self, prefix: str) -> list[str]:
        return [k.removeprefix(prefix) for k in self.index if k.startswith(prefix)]


golden = Golden(HERE / "test_golden.npz")
golden_dense = Golden(HERE / "test_golden_dense.npz")


def randn(seed: int, *shapes) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def fill(module: torch.nn.Module, seed: int, scale: float = 0.05) -> None:
    """The weight rule of the golden numbers: normal, keys in sorted order; norms, gammas and weight_g around 1. Keys
    count in their unchunked form, as `name` gives them."""
    generator, state = torch.Generator().manual_seed(seed), module.state_dict()
    for key in sorted(state):
        noise = torch.randn(state[key].shape, generator=generator) * scale
        parent = key.split(".")[-2] if "." in key else ""
        around_one = key.endswith(("gamma", "weight_g")) or (key.endswith(".weight") and parent.startswith("norm"))
        state[key].copy_(noise + around_one)


def assert_close(a, b, atol: float, what: str = "") -> None:
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    assert a.shape == b.shape, f"{what}: {tuple(a.shape)} against {tuple(b.shape)}"
    worst = (a.double() - b.double()).abs().max().item() if a.numel() else 0.0
    assert worst <= atol, f"{what}: differs by {worst:.2e}, allowed {atol:.0e}"


def fill_by_names(module: torch.nn.Module, prefix: str = "") -> torch.nn.Module:
    """The weight rule of the dense golden numbers: each tensor is drawn by the CRC-32 of its full official name."""
    for key, value in module.state_dict().items():
        rng = np.random.RandomState(zlib.crc32((prefix + key).encode()))
        if not value.is_floating_point():
            value.fill_(7)
            continue
        x = 0.5 + rng.random_sample(value.shape) if key.endswith("running_var") else rng.standard_normal(value.shape)
        tables = ("pos_embed", "cls_token", "level_embed", "query_embed.weight", "query_feat.weight",
                  "level_encoding.weight", "level_embed.weight")
        if key.endswith("running_mean"):
            x = 0.1 * x
        elif key.endswith("sampling_offsets.bias"):
            x = 2 * x
        elif key.endswith(tables):
            x = 0.5 * x
        elif key.endswith(("gamma", "gamma1", "gamma2")):
            x = 0.5 + 0.1 * x
        elif value.ndim >= 2:
            x = x / math.prod(value.shape[1:]) ** 0.5
        elif not key.endswith("running_var"):
            x = 0.1 * x + key.endswith("weight")
        value.copy_(torch.from_numpy(np.asarray(x)))
    return module.eval()


def dense_close(key: str, value: torch.Tensor) -> None:
    """Is this the golden tensor, of large ones every so manieth entry, within 2e-4 of its largest value?"""
    expected, steps = golden_dense[key], golden_dense.json("steps")
    if key in steps:
        step, shape = steps[key]
        assert list(value.shape) == shape, f"{key}: {tuple(value.shape)}, should be {shape}"
        value = value.flatten()[::step]
    expected = expected.reshape(value.shape) if expected.numel() == 1 else expected
    assert_close(value, expected, 2e-4 * max(1.0, expected.abs().max().item()), key)


def exit_code(script: str, *argv) -> int:
    """That of `python script argv`, run in this process, where it ends by itself."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [script, *map(str, argv)])
        runpy.run_path(str(HERE / script), run_name="__main__")
    return stop.value.code


def train_main(*argv) -> None:
    """A training in this process; the process group is gone afterwards, whatever happens."""
    try:
        train.train(train.set_up([str(a) for a in argv]))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


FORKS = multiprocessing.get_context("forkserver")  # of a process that has imported everything already
FORKS.set_forkserver_preload(["tests.common", "torch._dynamo"])


class Launched:
    """main(*argv) of one of our programs in `world` new processes, as torchrun would start them; what they print is
    appended to `log`. `before` is called in each first. A start takes a tenth of a second, not ten."""

    def __init__(self, log: Path, main, *argv, world: int = 1, before=None):
        self.log, port = log, free_port()
        argv = [str(a) for a in argv]
        log.touch()
        self.skip = log.stat().st_size  # what earlier ones have printed
        self.processes = [FORKS.Process(target=launched, args=(log, main, argv, rank, world, port, before))
                          for rank in range(world)]
        for process in self.processes:
            process.start()

    def text(self) -> str:
        return self.log.read_bytes()[self.skip :].decode()

    def alive(self) -> bool:
        return any(p.is_alive() for p in self.processes)

    def signal(self, number: int, rank: int = 0) -> None:
        with contextlib.suppress(ProcessLookupError):  # it may just have ended
            os.kill(self.processes[rank].pid, number)

    def until(self, text: str, more: bool = False) -> None:
        """Waits until `text` is printed; with `more`, once more than it is by now."""
        n, alive = self.text().count(text) if more else 0, True
        while self.text().count(text) <= n:
            assert alive, self.text()
            alive = self.alive()  # looked up before the text: the last words may come in between
            time.sleep(0.01)

    def join(self, seconds: float = 200) -> None:
        for process in self.processes:
            process.join(seconds)
            if process.is_alive():
                process.kill()

    def wait(self, ok: int = 0) -> str:
        """Waits for the end, with this exit code; returns all that is in `log`."""
        self.join()
        assert [p.exitcode for p in self.processes] == [ok] * len(self.processes), self.text()[-4000:]
        return self.log.read_text()


def launched(log: Path, main, argv: list[str], rank: int, world: int, port: int, before) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of the workers of loaders
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if world > 1:
        os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    sys.argv = ["train.py", *argv]
    if before:
        before()
    main(*([argv] if argv else []))


def free_port() -> int:
    """Below the range that connections get theirs from: none takes this one before it is used."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as s:
            s.bind(("127.0.0.1", random.SystemRandom().randrange(15000, 30000)))
            return s.getsockname()[1]


TINY = ("--batch-size", 8, "--group-size", 4, "--num-workers", 0, "--warmup-steps", 1, "--log-every", 1,
        "--warmup-teacher-temp-steps", 4, "--eval-every", 0, "--device", "cpu")


def metrics(out: Path) -> list[dict]:
    """The logged lines without the timings, which are never the same twice."""
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if k not in ("images_per_s", "data_wait")} for r in records]


def write_images(folder: Path, names, size=(40, 32)) -> None:
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)


RELEASED = {f"dinov2_vit{arch[4]}14{reg}": (arch, reg)
            for arch in ("vit_small", "vit_base", "vit_large", "vit_giant2") for reg in ("", "_reg")}


class Numbers(support.sources.Source):
    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n


def png(i: int, size=(8, 8)) -> bytes:
    """A small gray image of value i."""
    file = io.BytesIO()
    Image.new("L", size, i % 256).save(file, "PNG")
    return file.getvalue()


def photographs() -> list[torch.Tensor]:
    from sklearn.datasets import load_sample_images

    return [torch.tensor(image).permute(2, 0, 1).contiguous() for image in load_sample_images().images]


def saved_tensors(save: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Student, teacher, both moments, centers of a save, as one flat dict."""
    dcp.format_utils.dcp_to_torch_save(str(save), tmp_path / "whole.pth")
    tree = torch.load(tmp_path / "whole.pth", weights_only=True)
    return {f"{part}.{name}": t for part, tensors in tree.items() for name, t in tensors.items()}


def everything(out: Path, tmp_path: Path) -> dict:
    """All that a finished run leaves, to the bit: state, teacher, exports, metrics."""
    files = {str(p.relative_to(out)): torch.load(p, weights_only=True) for p in sorted(out.rglob("*.pth"))}
    for ckpt in files.values():
        ckpt.pop("config")  # --out and --num-workers may differ
    newest = max((out / "resume").glob("step_*"))
    complete = json.loads((newest / "complete").read_text())
    return dict(state=saved_tensors(newest, tmp_path), files=files, metrics=metrics(out), step=complete["step"],
                counters=complete["counters"])


def same(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def stop_at(step: int) -> None:
    """A run that is asked to stop so that it does after `step` of its steps."""
    train_step, calls = train.train_step, itertools.count(2)  # one step later all know
    train.train_step = lambda *a: (next(calls) == step and signal.raise_signal(signal.SIGTERM), train_step(*a))[1]


def set_up_and_release(*argv) -> train.Run:
    try:
        state = train.set_up([str(a) for a in argv])
        state.lock.release()
        return state
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def saving() -> bool:
    """Whether a save of a run in this process is under way."""
    return any(thread.name.endswith("(write)") for thread in threading.enumerate())


def wait_for(condition, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)


class Payload:
    def __reduce__(self):
        return os.system, ("touch /tmp/dinov2_test_was_executed",)


HUB_VIT = dict(img_size=56, patch_size=14, embed_dim=128, depth=3, num_heads=2, init_values=1.0, block_chunks=0)


def randomize(module: torch.nn.Module) -> torch.nn.Module:
    """Every weight away from what it starts with, so that none can be left out unseen; in eval mode."""
    generator = torch.Generator().manual_seed(0)
    for name, p in module.named_parameters():
        p.data.normal_(float(p.ndim == 1 and not name.endswith("bias")), 0.1, generator=generator)
    return module.eval()


def hub_vit(registers: int = 0, ffn_layer: str = "mlp") -> model.DinoVisionTransformer:
    rule = dict(interpolate_antialias=True, interpolate_offset=0.0) if registers else {}
    return randomize(model.DinoVisionTransformer(**HUB_VIT, num_register_tokens=registers, ffn_layer=ffn_layer, **rule))


def results(stem: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in Path(f"{stem}.eval_{name}.jsonl").read_text().splitlines()]


def golden_grid() -> eval_linear.Grid:
    """The 52 classifiers of the official code before their first step."""
    rates = [rate * 1024 / 256 for rate in eval_linear.RATES]
    grid = eval_linear.Grid(6, 4, 5, rates)
    assert grid.names() == golden.json("linear/names")
    set_grid(grid, "state_dict")
    return grid


def set_grid(grid, what: str) -> None:
    for j, name in enumerate(grid.names()):
        kind, rate = divmod(j, 13)
        value = golden[f"linear/{what}/{name}"]  # (5, width + 1)
        grid.weights[kind][5 * rate : 5 * rate + 5] = value[:, :-1]
        grid.biases[kind][5 * rate : 5 * rate + 5] = value[:, -1:]


def size_of(path) -> tuple[int, int]:
    """Width and height of a PNG that can be decoded."""
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        image.load()
        return image.size


def pixels_of(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def as_released(head: torch.nn.Module, path: Path, **meta) -> Path:
    """A head's file as the tools that trained the released ones write it: numbers of numpy and an optimizer beside."""
    weights = {f"decode_head.{k}": v for k, v in head.state_dict().items()}
    state = {i: dict(step=7, exp_avg=torch.zeros_like(v)) for i, v in enumerate(weights.values())}
    meta = dict(config="model = dict(...)", iter=38400, hook_msgs=dict(best_score=np.float64(0.3), n=np.int64(3),
                                                                       x=np.float32(2))) | meta
    torch.save(dict(meta=meta, state_dict=weights, optimizer=dict(state=state, param_groups=[dict(lr=1e-4)])), path)
    return path


M2F = dict(n_classes=7, embed_dim=64, depth=8, num_heads=4, img_size=56, conv_dim=8, adapter_heads=4, decoder_dim=64,
           decoder_heads=4, deform_heads=4, decoder_ffn_dim=128, n_queries=10)
M2F_TINY = M2F | dict(n_classes=3, embed_dim=32, depth=4, decoder_dim=32, decoder_ffn_dim=32, encoder_layers=1,
                      decoder_layers=2)

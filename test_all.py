"""All tests. `python -m pytest test_all.py`, or a part: `python -m pytest test_all.py -k losses`.

test_golden.npz holds numbers that the official DINOv2 code (facebookresearch/dinov2, commit b8931f7) gave on a CPU in
float32: outputs, losses, gradients, three whole optimizer steps. Weights and images are not in it: they follow from the
seeds given here. Of large tensors it keeps the norm and some entries. test_golden_dense.npz: likewise of the official
depth, segmentation and Mask2Former heads, whose weights follow from their names, see fill_by_names.
"""
import ast
import contextlib
import copy
import dataclasses
import gzip
import io
import importlib.util
import inspect
import itertools
import json
import math
import multiprocessing
import os
import pickle
import random
import re
import runpy
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
import types
import urllib.error
import weakref
import zlib
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.distributed.checkpoint.format_utils
import torch.distributed.launcher.api as launcher
from PIL import Image
from torch import library

import bench
import data
import eval_dense
import eval_knn
import eval_linear
import eval_logreg
import heads
import hub
import losses
import mask2former
import model
import train
import visualize

HERE = Path(__file__).parent
CPU = torch.device("cpu")
pytestmark = [pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities"),  # torchvision 0.29
              pytest.mark.filterwarnings("ignore:This DataLoader will create")]
MODULES = ("bench", "data", "eval_dense", "eval_knn", "eval_linear", "eval_logreg", "heads", "hub", "hubconf", "losses",
           "mask2former", "model", "train", "visualize")
torch.set_num_threads(1)  # tensors are tiny here: several threads wait for each other, for long where cores are busy


# ----------------------------------------------------------------------------------------------------------------------
# Helpers


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


def run(*command, ok: int = 0, **env) -> subprocess.CompletedProcess:
    result = subprocess.run([str(c) for c in command], cwd=HERE, capture_output=True, text=True, timeout=300,
                            env={**os.environ, "OMP_NUM_THREADS": "1", **env})
    assert result.returncode == ok, f"exit {result.returncode}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result


def train_main(*argv) -> None:
    """A training in this process; the process group is gone afterwards, whatever happens."""
    try:
        train.train(train.set_up([str(a) for a in argv]))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


FORKS = multiprocessing.get_context("forkserver")  # of a process that has imported everything already
FORKS.set_forkserver_preload(["test_all", "sklearn.datasets", "torch._dynamo"])


class Launched:
    """main(*argv) of one of our programs in `world` new processes, as torchrun would start them; what they print goes to
    the end of `log`. `before` is called in each first. A start takes a tenth of a second, not ten."""

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


# ----------------------------------------------------------------------------------------------------------------------
# Contracts of the house


IMPORTS = {"model": set(), "losses": set(), "data": set(), "heads": set(), "mask2former": set(), "hubconf": set(),
           "hub": {"model", "heads", "mask2former", "data"}, "eval_knn": {"hub", "model", "data"},
           "eval_linear": {"eval_knn", "hub", "model", "data"}, "eval_logreg": {"eval_knn"},
           "eval_dense": {"eval_knn", "heads", "hub", "data", "visualize"},
           "train": {"model", "losses", "data", "eval_knn", "hub"},
           "visualize": {"hub", "data", "eval_knn", "heads"},
           "bench": {"data", "heads", "hub", "losses", "mask2former", "model", "train", "eval_knn", "eval_linear",
                     "eval_logreg"}}
IMPORTS["kernels/attention"] = set()  # loaded by path: an __init__.py would hide the package `kernels` of others
OPTIONAL = {"hub": {"safetensors", "onnxruntime", "onnxscript"}, "mask2former": {"scipy"}}


def imports_of(name: str) -> set[str]:
    nodes = ast.walk(ast.parse((HERE / f"{name}.py").read_text()))
    full = itertools.chain.from_iterable(
        [a.name for a in n.names] if isinstance(n, ast.Import) else [n.module] for n in nodes
        if isinstance(n, (ast.Import, ast.ImportFrom)))
    return {f.split(".")[0] for f in full}


@pytest.mark.parametrize("name", IMPORTS)
def test_contract_imports(name):
    """Files import what the map allows, and no package beyond the five but for those they can do without."""
    imported = imports_of(name)
    assert imported & {p.stem for p in HERE.glob("*.py")} == IMPORTS[name]
    allowed = {"torch", "torchvision", "numpy", "tqdm", "sklearn", "PIL"} | OPTIONAL.get(name, set())
    assert imported - set(sys.stdlib_module_names) - IMPORTS.keys() <= allowed


@pytest.mark.parametrize("name", ["model", "losses", "data", "heads", "mask2former"])
def test_contract_leaf_files_stand_alone(name, tmp_path):
    shutil.copy(HERE / f"{name}.py", tmp_path)
    code = f"import sys; sys.path[:0] = [{str(tmp_path)!r}]; import {name}"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0 and result.stdout == result.stderr == "", result.stderr


@pytest.mark.parametrize("name", [*MODULES, "kernels/attention"])
def test_contract_style(name):
    """No function over 80 lines, no line over 120 columns, no top-level statement that runs something."""
    text = (HERE / f"{name}.py").read_text()
    tree = ast.parse(text)
    assert [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 120] == []
    long = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
    assert {k: v for k, v in long.items() if v > 80} == {}
    assert {type(n) for n in tree.body if isinstance(n, (ast.For, ast.While, ast.With, ast.Try))} == set()
    assert "weights_only=True" in text or "torch.load(" not in text


def readme_commands() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split(" #")[0].strip() for line in lines if ".py" in line and "pytest" not in line]


def test_readme_commands_parse():
    """Every training and evaluation command of the README names existing presets and flags."""
    commands = readme_commands()
    assert sum("train.py" in c for c in commands) >= 5 and all(
        any(f"eval_{name}.py" in c for c in commands) for name in ("knn", "linear", "logreg", "dense"))
    for command in commands:
        script, *argv = shlex.split(command[re.search(r"\w+\.py", command).start() :])
        if script == "train.py" and "--help" not in argv:
            train.check(train.parse(argv)[0], 1)
        if script.startswith("eval_"):
            programs = dict(eval_knn=eval_knn, eval_linear=eval_linear, eval_logreg=eval_logreg, eval_dense=eval_dense)
            programs[script[:-3]].parse(argv)
        if script == "bench.py":
            bench.parse(argv)
        if script == "data.py" and "/data/" not in command:
            argv += ["--num-workers", "0", "--images", "9"]
            data.main(argv) if argv[0] == "stats" else pytest.raises(SystemExit, data.main, argv)


def test_readme_hub_and_picture_commands_run(trained, tmp_path, monkeypatch, cache):
    """All that need neither a download nor an optional package that is absent, literally, in a folder with a run in
    out/, two photographs, and dense heads."""
    shutil.copytree(trained, tmp_path / "out")
    shutil.copytree(trained, tmp_path / "out_photos")
    for name, head in (("depth_linear4", heads.LinearDepthHead(64)), ("seg_linear", heads.SegmentationHead(64, 5))):
        about = dict(dim=64, dataset="", depth_range=(0.001, 10), classes=list("abcde"), recipe=(32, 99, 32, 16))
        torch.save(dict(state_dict=head.state_dict(), about=about), tmp_path / f"out_photos/ckpt.{name}_head.pth")
    write_images(tmp_path / "photos", ["china.png", "flower.png"], size=(32, 40))
    monkeypatch.chdir(tmp_path)
    written = {"curves.png", "visualize-neighbors.png", "pca.png", "visualize-similarity.png", "features.npz",
               "visualize-depth.png", "segment.png", "out_hf/config.json", "out/vit.pt2"}
    for command in readme_commands():
        argv = shlex.split(command.replace("/my/photos", "photos").replace("320,250", "30,20"))[1:]
        if argv[0] not in ("hub.py", "visualize.py") or "--help" in argv or "dinov2" in command:
            continue
        if "hf" in argv and importlib.util.find_spec("safetensors") is None:
            written.remove("out_hf/config.json")
            continue
        dict(hub=hub, visualize=visualize)[argv[0][:-3]].main(argv[1:])
    assert all((tmp_path / name).stat().st_size > 100 for name in written)


def test_readme_snippet_runs(trained):
    snippet = re.search(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)[1]
    names = {}
    exec(snippet.replace("out/ckpt.pth", str(trained / "ckpt.pth")), names)
    assert names["cls"].shape == (2, 64) and [m.shape for m in names["maps"]] == [(2, 64, 4, 4)] * 2


def test_readme_line_counts():
    """The file map of the README states the line counts, rounded to tens."""
    text = (HERE / "README.md").read_text()
    for name in MODULES:
        stated = int(re.search(rf"`{name}\.py` \| (\d+)", text)[1])
        assert abs(stated - len((HERE / f"{name}.py").read_text().splitlines())) <= 10, name


# ----------------------------------------------------------------------------------------------------------------------
# model.py

X_SHAPES = dict(x56=(2, 3, 56, 56), x42=(2, 3, 42, 42), x70x28=(1, 3, 70, 28), x112x28=(1, 3, 112, 28))
TINY_VIT = dict(img_size=56, patch_size=14, embed_dim=48, depth=4, num_heads=3, init_values=1e-5)


def golden_images() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1234)
    images = {k: torch.randn(s, generator=generator) for k, s in X_SHAPES.items()}
    return images | dict(masks56=torch.rand(2, 16, generator=generator) < 0.4)


@torch.no_grad()
@pytest.mark.parametrize("variant", golden.json("vit/kwargs"))
def test_model_forward_golden(variant):
    vit = model.DinoVisionTransformer(**TINY_VIT | golden.json("vit/kwargs")[variant]).eval()
    fill(vit, 100)
    images = golden_images()
    for name in X_SHAPES:
        assert_close(vit.forward_features(images[name])["x_prenorm"], golden[f"vit/{variant}/{name}"], 1e-5, name)
        assert_close(vit(images[name]), golden[f"vit/{variant}/{name}/cls"], 1e-5, name)
    masked = vit.forward_features(images["x56"], images["masks56"])
    assert_close(masked["x_prenorm"], golden[f"vit/{variant}/masked"], 1e-5)
    assert masked["masks"] is images["masks56"]
    pairs = vit.get_intermediate_layers(images["x56"], 2, return_class_token=True)
    for i, (patches, cls) in enumerate(pairs):
        assert_close(patches, golden[f"vit/{variant}/n2/{i}/patches"], 1e-5)
        assert_close(cls, golden[f"vit/{variant}/n2/{i}/cls"], 1e-5)
    maps = vit.get_intermediate_layers(images["x70x28"], [2, 0], reshape=True, norm=False)  # ascending in any case
    for i, patches in enumerate(maps):
        assert_close(patches, golden[f"vit/{variant}/list02/{i}"], 1e-5)
        assert patches.is_contiguous()


@pytest.mark.parametrize("table", ["M37", "M16", "M14"])
def test_model_position_interpolation_golden(table):
    img_size, patch = dict(M37=(518, 14), M16=(224, 14), M14=(224, 16))[table]
    cases = golden.keys(f"pos/{table}/")
    assert len(cases) >= 8
    for case in cases:
        offset, antialias, size = re.fullmatch(r"off(.*)/aa(.)/(.*)", case).groups()
        h, w = map(int, size.split("x"))
        vit = model.DinoVisionTransformer(img_size, patch, embed_dim=6, depth=1, num_heads=1,
                                          interpolate_offset=float(offset), interpolate_antialias=antialias == "1")
        vit.pos_embed.data = randn(9, vit.pos_embed.shape)[0]
        tokens = torch.zeros(1, 1 + (h // patch) * (w // patch), 6)
        assert_close(vit.interpolate_pos_encoding(tokens, h, w), golden[f"pos/{table}/{case}"], 1e-5, case)


@torch.no_grad()
@pytest.mark.parametrize("case", ["uniform0.3", "uniform0.4", "linear0.3", "uniform0.1"])
def test_model_stochastic_depth_golden(case):
    """The list path for any rate; the single tensor is the same path, where the official code agrees (rate > 0.1)."""
    vit = model.DinoVisionTransformer(**TINY_VIT, drop_path_rate=float(case[-3:]), drop_path_uniform=case[0] == "u",
                                      block_chunks=0)
    fill(vit.train(), 101)
    images, local = randn(77, (5, 3, 56, 56), (7, 3, 28, 28))
    masks = golden["depth/masks"]
    torch.manual_seed(6)
    outs = vit.forward_features([images, local], [masks, None])
    assert_close(outs[0]["x_prenorm"], golden[f"depth/{case}/global"], 1e-5)
    assert_close(outs[1]["x_prenorm"], golden[f"depth/{case}/local"], 1e-5)
    if f"depth/{case}/single" in golden.index:
        torch.manual_seed(5)
        assert_close(vit.forward_features(images, masks)["x_prenorm"], golden[f"depth/{case}/single"], 1e-5)
    plain = vit.eval().forward_features(images, masks)["x_prenorm"]
    assert (plain - golden[f"depth/{case}/global"]).abs().max() > 0.1  # dropping did something


@torch.no_grad()
def test_model_stochastic_depth_by_orders():
    """Rows in given orders, by groups: a batch of two groups is two batches of one, and the dropped rows are untouched."""
    vit = model.DinoVisionTransformer(**TINY_VIT, drop_path_rate=0.5, drop_path_uniform=True, block_chunks=0)
    fill(vit.train(), 101)
    images, local = randn(77, (8, 3, 56, 56), (6, 3, 28, 28))
    depth = len(vit.block_list())
    orders, local_orders = (torch.stack([torch.stack([torch.randperm(n) + n * g for g in range(2)])
                                         for _ in range(2 * depth)]) for n in (4, 3))
    both = vit.forward_features([images, local], [None, None], [orders, local_orders])
    for g in range(2):
        alone = vit.forward_features([images[4 * g : 4 * g + 4], local[3 * g : 3 * g + 3]], [None, None],
                                     [orders[:, g : g + 1] - 4 * g, local_orders[:, g : g + 1] - 3 * g])
        assert_close(both[0]["x_prenorm"][4 * g : 4 * g + 4], alone[0]["x_prenorm"], 1e-5)
        assert_close(both[1]["x_prenorm"][3 * g : 3 * g + 3], alone[1]["x_prenorm"], 1e-5)
    always_last = torch.arange(8).expand(2 * depth, 1, 8)  # rows 4 to 7 are never computed
    out = vit.forward_features(images, None, always_last)["x_prenorm"]
    assert torch.equal(out[4:], vit.prepare_tokens_with_masks(images)[4:]) and not torch.equal(out, both[0]["x_prenorm"])


def test_model_deterministic_interpolation_is_the_same():
    """By a product instead of bicubic, which has no deterministic backward pass on GPUs: values and gradients."""
    vit = model.DinoVisionTransformer(**TINY_VIT)
    tokens, results = torch.zeros(1, 1 + 6, 32), []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        vit.zero_grad()
        table = vit.interpolate_pos_encoding(tokens, 28, 42)
        table.square().sum().backward()
        results.append((table, vit.pos_embed.grad.clone()))
    torch.use_deterministic_algorithms(False)
    assert_close(results[0][0], results[1][0], 1e-6)
    assert_close(results[0][1], results[1][1], 1e-6)
    assert results[0][0].abs().max() > 1e-3 and "UpsampleBicubic" not in str(results[1][0].grad_fn.next_functions)


@pytest.mark.parametrize("nlayers", [1, 2, 3, 4])
def test_model_head_golden(nlayers):
    head = model.DINOHead(32, 50, nlayers=nlayers, hidden_dim=40, bottleneck_dim=16)
    fill(head, 200)
    x, coef = randn(21, (7, 32))[0].requires_grad_(), randn(22, (7, 50))[0]
    y = head(x)
    (y * coef).sum().backward()
    assert_close(y, golden[f"head/{nlayers}/y"], 1e-5)
    assert_close(x.grad, golden[f"head/{nlayers}/x_grad"], 2e-5)
    assert {k for k, _ in head.named_parameters()} == set(golden.keys(f"head/{nlayers}/grad/"))
    for key, p in head.named_parameters():
        expected = golden[f"head/{nlayers}/grad/{key}"]
        assert_close(p.grad.flatten()[:64], expected, 1e-4 * expected.abs().max().item(), key)


RELEASED = {f"dinov2_vit{arch[4]}14{reg}": (arch, reg)
            for arch in ("vit_small", "vit_base", "vit_large", "vit_giant2") for reg in ("", "_reg")}


@pytest.mark.parametrize("name", RELEASED)
def test_model_keys_and_shapes_of_released_models(name):
    """Names, order-free, and shapes of all eight; and the constructor arguments can be read off them."""
    arch, reg = RELEASED[name]
    arguments = dict(img_size=518, patch_size=14, init_values=1.0, block_chunks=0, num_register_tokens=4 if reg else 0,
                     ffn_layer="swiglu" if arch == "vit_giant2" else "mlp", interpolate_antialias=bool(reg),
                     interpolate_offset=0.0 if reg else 0.1)
    with torch.device("meta"):
        weights = model.build(arch, **arguments).state_dict()
    assert {k: list(v.shape) for k, v in weights.items()} == golden.json("shapes")[name]
    inferred = model.infer_arguments(name, weights)
    assert {k: inferred[k] for k in arguments} == arguments and inferred["num_heads"] == model.ARCHS[arch]["num_heads"]


@pytest.mark.parametrize("preset", ["vitl16_short", "vitl14", "vitg14"])
def test_model_keys_and_shapes_of_training_networks(preset):
    cfg = train.Config(**train.PRESETS[preset])
    shapes = golden.json("shapes")
    with torch.device("meta"):
        network = train.build_network(cfg)
    own = {k: list(v.shape) for k, v in network["backbone"].state_dict().items()}
    chunked = shapes["train_backbones"][f"train/{preset}"]
    assert own == {re.sub(r"blocks\.\d+\.(\d+)", r"blocks.\1", k): s for k, s in chunked.items()}
    for key, expected in shapes["ssl_heads"].items():
        if key.startswith(preset + "."):
            head = network[key.split(".")[1].removesuffix("(shared)")]
            assert {k: list(v.shape) for k, v in head.state_dict().items()} == expected


def test_model_initialization_golden():
    torch.manual_seed(0)
    vit = model.build("vit_small", patch_size=16, num_register_tokens=4, init_values=1e-5, block_chunks=0)
    head = model.DINOHead(384, 4096)
    for module, name in ((vit, "vit_small_p16_reg4_ls1e-5"), (head, "dino_head_384_4096_256")):
        for key, expected in golden.json("init_stats")[name].items():
            w = module.state_dict()[key]
            assert list(w.shape) == expected["shape"], key
            tolerance = 0.15 * expected["std"] + 1e-9
            assert abs(w.std(correction=0).item() - expected["std"]) <= tolerance, key
            assert abs(w.mean().item() - expected["mean"]) <= 6 * expected["std"] / w.numel() ** 0.5 + 1e-9, key
            assert w.abs().max() <= 1.5 * max(abs(expected["min"]), abs(expected["max"])) + 1e-9, key


def test_model_list_equals_single_batches():
    torch.manual_seed(0)
    vit = model.DinoVisionTransformer(**TINY_VIT, num_register_tokens=2).eval()
    batches = [torch.randn(3, 3, 56, 56), torch.randn(5, 3, 28, 28), torch.randn(2, 3, 28, 56)]
    masks = [torch.rand(3, 16) < 0.5, None, torch.rand(2, 8) < 0.5]
    for together, images, m in zip(vit.forward_features(batches, masks), batches, masks):
        for key, value in vit.forward_features(images, m).items():
            if key != "masks":
                assert_close(together[key], value, 1e-5, key)


def test_model_blocks_can_be_driven_by_hand():
    """Code that loops over model.blocks on (B, N, D) tokens, or hooks attn.qkv, works as with the official model."""
    vit = model.DinoVisionTransformer(**TINY_VIT, block_chunks=0).eval()
    seen = []
    vit.blocks[-1].attn.qkv.register_forward_hook(lambda module, x, y: seen.append(y.shape))
    images = torch.randn(2, 3, 56, 56)
    x = vit.prepare_tokens_with_masks(images)
    for block in vit.blocks:
        x = block(x)
    assert torch.equal(vit.norm(x)[:, 0], vit(images))
    assert seen == [(2, 17, 144)] * 2


def test_model_head_survives_deepcopy_and_training():
    head = model.DINOHead(8, 6, hidden_dim=8, bottleneck_dim=4)
    twin = copy.deepcopy(head)
    keys = [f"mlp.{i}.{w}" for i in (0, 2, 4) for w in ("weight", "bias")]
    assert list(twin.state_dict()) == keys + ["last_layer.weight_g", "last_layer.weight_v"]
    x = torch.randn(5, 8)
    assert torch.equal(head(x), twin(x))
    twin.last_layer.weight_v.data.mul_(3)  # only the direction of weight_v counts
    assert_close(head(x), twin(x), 1e-6)
    twin.last_layer.weight_g.data.mul_(3)
    assert_close(3 * head(x), twin(x), 1e-6)


def test_model_errors_name_the_fix():
    vit = model.DinoVisionTransformer(**TINY_VIT)
    for text, call in {
        "not a multiple of the patch size 14; resize or crop to 56x42": lambda: vit(torch.zeros(1, 3, 60, 50)),
        "not a multiple of the patch size": lambda: model.build("vit_small", img_size=100, patch_size=14),
        "choose one of vit_nano": lambda: model.build("vit_smal"),
        "choose one of mlp, swiglu": lambda: model.build("vit_small", ffn_layer="relu"),
        "the model has blocks 0 to 3": lambda: vit.get_intermediate_layers(torch.zeros(1, 3, 56, 56), [4]),
    }.items():
        with pytest.raises(ValueError, match=re.escape(text)):
            call()


# ----------------------------------------------------------------------------------------------------------------------
# losses.py

TEMP = 0.06


def losses_in(name: str) -> torch.Tensor:
    return golden[f"losses/in/{name}"].clone()


def test_losses_targets_golden():
    logits, patches = losses_in("teacher_logits"), losses_in("teacher_patch")
    assert_close(losses.sinkhorn_knopp(logits[0], TEMP), golden["losses/world1/0/dino_sk"], 1e-6)
    assert_close(losses.sinkhorn_knopp(logits[0], TEMP, 5), golden["losses/world1/0/dino_sk_it5"], 1e-6)
    assert_close(losses.sinkhorn_knopp(patches[0], TEMP), golden["losses/world1/0/ibot_sk"], 1e-6)
    for name, sequence in dict(dino=logits, ibot=patches).items():
        center = torch.zeros(24)
        for s, z in enumerate(sequence):
            assert_close(center, golden[f"losses/world1/0/{name}_center_used/{s}"].flatten(), 1e-6)
            assert_close(losses.softmax_center(z, center, TEMP), golden[f"losses/world1/0/{name}_center_softmax/{s}"],
                         1e-6)
            losses.update_center(center, losses.center_total(z))
        assert_close(center, golden[f"losses/world1/0/{name}_center_final"].flatten(), 1e-6)


def test_losses_rank_means_give_the_official_patch_center():
    """The official iBOT center averages the means of the ranks; ours is the mean over all patches. Averaging what each
    rank alone would get gives the official numbers."""
    patches, official = losses_in("teacher_patch"), golden["losses/world2/0/ibot_center_final"].flatten()
    center, joined = torch.zeros(24), torch.zeros(24)
    for z in patches:
        shares = [center.clone(), center.clone()]
        for share, rows in zip(shares, (z[:6], z[6:])):
            losses.update_center(share, losses.center_total(rows))
        center = (shares[0] + shares[1]) / 2
        losses.update_center(joined, losses.center_total(z))
    assert_close(center, official, 1e-6)
    assert (joined - official).abs().max() > 1e-4


def test_losses_values_and_gradients_golden():
    local, both = losses_in("student_local").requires_grad_(), losses_in("student_global").requires_grad_()
    targets = golden["losses/world1/0/dino_sk"]
    loss = losses.dino_loss(local.view(3, 4, 24), targets.view(2, 4, 24))
    loss.backward()
    assert_close(loss, golden["losses/world1/0/dino_local_raw"], 1e-4)  # of about 120
    assert_close(local.grad, golden["losses/world1/0/grad_sl"], 1e-5)
    loss = losses.dino_loss(both[None], targets[None])
    loss.backward()
    assert_close(loss, golden["losses/world1/0/dino_global_raw"], 1e-5)
    assert_close(both.grad, golden["losses/world1/0/grad_sg"], 1e-5)
    patch = losses_in("student_patch").requires_grad_()
    loss = losses.ibot_loss(patch, golden["losses/world1/0/ibot_sk"], golden["losses/world1/0/masks_weight"], n_crops=8)
    loss.backward()
    assert_close(loss, golden["losses/world1/0/ibot_masked"], 1e-5)
    assert_close(patch.grad, golden["losses/world1/0/grad_sp"], 1e-6)
    x = losses_in("koleo_x").requires_grad_()
    loss = losses.koleo_loss(x)
    loss.backward()
    assert_close(loss, golden["losses/world1/0/koleo"], 1e-6)
    assert_close(x.grad, golden["losses/world1/0/koleo_grad"], 1e-6)


def test_losses_dino_is_the_sum_over_pairs():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 5, 7), torch.softmax(torch.randn(2, 5, 7), -1)
    slow = sum(-(t * torch.log_softmax(s / 0.1, -1)).sum(-1).mean() for s in student for t in teacher)
    assert_close(losses.dino_loss(student, teacher), slow, 1e-4)


def test_losses_sinkhorn_balances():
    torch.manual_seed(0)
    q = losses.sinkhorn_knopp(torch.randn(64, 16).clamp(-1, 1), 0.3, n_iterations=20)
    assert_close(q.sum(1), torch.ones(64), 1e-5)
    assert_close(q.sum(0), torch.full((16,), 4.0), 1e-3)
    one_sided = torch.zeros(4, 8).index_fill(1, torch.tensor([0]), 60.0)  # the others underflow: finite all the same
    assert losses.sinkhorn_knopp(one_sided, 1.0).isfinite().all()


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of five rows of 8 logits or less."""
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", dict(cpu=40))


def factors(n_prototypes: int, *rows: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Prototypes (K, 6) and tokens (M_i, 6), all of length 1, as a head makes them; in float64."""
    torch.manual_seed(1)
    vectors = [torch.nn.functional.normalize(torch.randn(n, 6, dtype=torch.float64), dim=-1) for n in (n_prototypes, *rows)]
    return vectors[0], vectors[1:]


def test_losses_in_chunks_are_the_definitions(small_chunks):
    """Values and gradients equal those of dino_loss() + ibot_loss() on all logits, although no chunk has more than five
    rows; with one table of prototypes or two, compiled, and without any masked patch."""
    prototypes, (cls, patches, teacher, others) = factors(8, 12, 11, 23, 8)
    leaves = prototypes, others, cls, patches = [x.float().requires_grad_() for x in (prototypes, others, cls, patches)]
    targets = losses.softmax_center(teacher.float() @ prototypes.detach().T, torch.zeros(8), 0.1)
    cls_targets, patch_targets, weight = targets[:8].view(2, 4, 8), targets[12:], torch.rand(11)
    compiled = [torch.compile(f, backend="aot_eager", dynamic=True) for f in (losses.dino_loss, losses.ibot_loss)]
    for n, table, (dino_loss, ibot_loss) in itertools.product(
            (11, 0), (prototypes, others), ((losses.dino_loss, losses.ibot_loss), compiled)):
        def dino(logits, images):
            assert logits.shape[0] == 3 and logits.shape[1:] == cls_targets[0, images].shape and logits.numel() <= 40
            return dino_loss(logits, cls_targets[:, images]) * logits.shape[1] / 4

        def ibot(logits, rows):
            assert logits.shape == patch_targets[rows].shape and logits.numel() <= 40
            return ibot_loss(logits, patch_targets[rows], weight[rows], n_crops=5)

        one = losses.dino_loss((cls @ prototypes.T).view(3, 4, 8), cls_targets)
        two = losses.ibot_loss((patches @ table.T)[:n], patch_targets[:n], weight[:n], n_crops=5)
        expected = torch.autograd.grad(0.3 * (one + two), leaves, allow_unused=True)
        loss, terms = losses.chunked_losses([(cls.view(3, 4, 6), prototypes, dino), (patches[:n], table, ibot)])
        assert_close(loss, one + two, 1e-5)
        assert_close(terms[0], one, 1e-5)
        assert_close(terms[1], two, 1e-5)
        assert not any(x.requires_grad for x in terms)
        for got, want in zip(torch.autograd.grad(0.3 * loss, leaves, retain_graph=True, allow_unused=True), expected):
            assert (got is None and want is None) or assert_close(got, want, 1e-6) is None
        with pytest.raises(RuntimeError, match="already differentiated"):
            torch.autograd.grad(loss, leaves, allow_unused=True)


def test_losses_in_chunks_hold_few_rows():
    """No tensor of a loss over 300 x 5,000 logits is as large as they are."""
    prototypes, (tokens, teacher) = factors(5_000, 300, 300)
    prototypes, tokens = prototypes.float().requires_grad_(), tokens.float().requires_grad_()
    largest = LargestTensor()
    with pytest.MonkeyPatch.context() as patch, largest:
        patch.setattr(losses, "CHUNK_ELEMENTS", dict(cpu=50_000))
        logits = losses.lazy_logits(teacher.float(), prototypes.detach())
        targets = logits.map(lambda x: losses.softmax_center(x, torch.zeros(5_000), 0.1))
        weight = torch.rand(300)
        losses.chunked_losses([(tokens, prototypes, lambda logits, rows: losses.ibot_loss(
            logits, targets[rows], weight[rows], 2))])[0].backward()
    assert largest.numel <= max(50_000, prototypes.numel())
    with largest:
        losses.cross_entropy(tokens @ prototypes.T, torch.rand(300, 5_000))
    assert largest.numel == 300 * 5_000


class LargestTensor(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in torch.utils._pytree.tree_leaves(out) if torch.is_tensor(x))])
        return out


def test_losses_sinkhorn_of_lazy_logits(small_chunks):
    """Kept in memory or recomputed in each iteration, whole or as several batches, one of them empty: the targets are
    those of all logits in one tensor, which stays as it is."""
    prototypes, tokens = factors(8, 13, 0, 7)
    batches = [losses.lazy_logits(x, prototypes) for x in tokens]
    logits = torch.cat(tokens).float() @ prototypes.float().T
    before, expected = logits.clone(), losses.sinkhorn_knopp(logits, 0.05)
    assert torch.equal(logits, before)
    for found in (losses.sinkhorn_knopp(batches, 0.05),
                  losses.sinkhorn_knopp([losses.lazy_logits(torch.cat(tokens), prototypes)], 0.05)):
        for _ in range(2):  # asking again gives the same
            rows = [x[rows] for x in found for rows in losses.row_chunks(*x.shape, x.device)]
            assert_close(torch.cat(rows), expected, 1e-6)
    assert_close(expected.sum(1), torch.ones(20), 1e-5)


def test_losses_center_total_without_logits():
    prototypes, (tokens,) = factors(8, 13)
    assert_close(losses.center_total(tokens.float(), prototypes.float()),
                 losses.center_total((tokens @ prototypes.T).float()), 1e-6)
    assert losses.center_total(tokens.float(), prototypes.float())[-1] == 13


def test_losses_koleo_edges():
    """Finite for one image and for duplicates, in any dtype, with gradients; groups are independent."""
    for x in (torch.ones(1, 4), torch.ones(6, 4), torch.zeros(4, 4), torch.randn(6, 4).half(),
              torch.randn(6, 4).bfloat16()):
        x.requires_grad_()
        loss = losses.koleo_loss(x)
        loss.backward()
        assert loss.dtype == torch.float32 and loss.isfinite() and x.grad.isfinite().all()
    x = torch.randn(12, 5)
    assert_close(losses.koleo_loss(x, 4), sum(losses.koleo_loss(g) for g in x.split(4)) / 3, 1e-6)
    pair = torch.tensor([[1.0, 0], [-1, 0]])  # opposite points are each other's nearest neighbor
    assert_close(losses.koleo_loss(pair), torch.tensor(-math.log(2)), 1e-6)
    with pytest.raises(ValueError, match="groups of 5"):
        losses.koleo_loss(x, 5)


def test_losses_bf16_inputs_are_computed_in_float32():
    torch.manual_seed(0)
    z, t = torch.randn(4, 6, 9).bfloat16(), torch.softmax(torch.randn(2, 6, 9), -1)
    assert losses.dino_loss(z, t).dtype == torch.float32
    assert_close(losses.dino_loss(z, t), losses.dino_loss(z.float(), t), 1e-6)
    assert_close(losses.sinkhorn_knopp(z[0], TEMP), losses.sinkhorn_knopp(z[0].float(), TEMP), 1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# data.py


@pytest.mark.parametrize("key,grid,most", [("g16_p14", 16, 128.0), ("g14_p16", 14, 98.0)])
def test_data_block_masks_golden(key, grid, most):
    rng = random.Random(0)
    for target, expected in zip(golden[f"masks/{key}/targets"].tolist(), golden.numpy(f"masks/{key}")):
        assert (data.block_mask(rng, (grid, grid), target, most) == expected).all()
    rng = random.Random(5)
    for expected in golden.numpy("masks/6x10"):
        assert (data.block_mask(rng, (6, 10), 15, 20, min_patches=2) == expected).all()


@pytest.mark.parametrize("case", ["B6_default", "B5_p0.3", "B4_p1.0"])
def test_data_batch_masks_golden(case):
    args = golden.json(f"collate/{case}/args")
    masks = data.draw_masks(random.Random(11), 2 * args["B"], (16, 16), 128.0, args["mask_prob"], args["mask_ratio"])
    assert (masks == golden.numpy(f"collate/{case}/masks")).all()
    index, weight = data.mask_weights(torch.from_numpy(masks))
    assert torch.equal(index, golden[f"collate/{case}/index"])
    assert_close(weight, golden[f"collate/{case}/weight"], 1e-7)


def digit_batches(**changes) -> data.TrainBatches:
    cfg = dataclasses.replace(train.Config(**train.PRESETS["digits"]), batch_size=16, group_size=4, flip_prob=0.5)
    arguments = {k: changes.pop(k) for k in ("rank", "n_ranks") if k in changes}
    return train.training_batches(dataclasses.replace(cfg, **changes), data.open_source("digits"),
                                  arguments.get("rank", 0), arguments.get("n_ranks", 1))


def test_data_batch_depends_on_step_and_seed_alone():
    """Same samples, crops, colors and masks in any order of asking; another step or seed gives others."""
    batches = digit_batches()
    first, again = batches[7], (digit_batches()[3], digit_batches()[7])[1]
    for key in ("global_crops", "local_crops", "global_ops", "local_ops", "masks", "mask_index", "mask_weight",
                "samples"):
        assert torch.equal(getattr(first, key), getattr(again, key)), key
    for other in (batches[8], digit_batches(seed=1)[7]):
        for key in ("global_crops", "local_crops", "global_ops", "local_ops", "masks"):
            assert not torch.equal(getattr(first, key), getattr(other, key)), key


def test_data_two_processes_share_the_batch_of_one():
    whole, halves = digit_batches()[5], [digit_batches(rank=r, n_ranks=2)[5] for r in range(2)]
    for key in ("global_crops", "local_crops", "global_ops", "local_ops", "masks"):
        crops = [t.unflatten(0, (-1, 8)) for t in (getattr(h, key) for h in halves)]  # (crops, B/2, …)
        assert torch.equal(getattr(whole, key).unflatten(0, (-1, 16)), torch.cat(crops, 1)), key
    assert whole.samples.tolist() == list(range(80, 96)) == sum((h.samples.tolist() for h in halves), [])
    assert [len(set(h.masks.sum(-1).tolist())) > 1 for h in halves] == [True, True]


def test_data_parts_and_processes_share_images_masks_and_dropped_rows():
    """A step in 2 parts on each of 2 processes: the same as on one process, image by image."""
    whole = digit_batches(batch_size=24, group_size=3, drop_path_rate=0.1)[5]
    assert whole.global_orders.shape == (6, 8, 6) and whole.local_orders.shape == (6, 8, 6)
    assert digit_batches(batch_size=24, group_size=3)[5].global_orders.numel() == 0
    for rank, part in itertools.product(range(2), range(2)):
        batches = digit_batches(batch_size=24, group_size=3, drop_path_rate=0.1, rank=rank, n_ranks=2, gradient_accumulation_steps=2)
        ours, first = batches[5 * 2 + part], 12 * rank + 6 * part
        assert ours.samples.tolist() == whole.samples[first : first + 6].tolist()
        assert set(ours.samples.tolist()) <= set(batches.samples_of(5)) and len(batches.samples_of(5)) == 12
        for name, n_crops in (("global", 2), ("local", 2)):
            crops, orders = getattr(whole, f"{name}_crops"), getattr(whole, f"{name}_orders")
            mine = getattr(ours, f"{name}_crops").unflatten(0, (n_crops, 6))
            assert torch.equal(mine, crops.unflatten(0, (n_crops, 24))[:, first : first + 6])
            rows = torch.arange(n_crops * 24).unflatten(0, (n_crops, 24))[:, first : first + 6].flatten()
            assert torch.equal(rows[getattr(ours, f"{name}_orders")], orders[:, first // 3 : first // 3 + 2])
        assert torch.equal(ours.masks.unflatten(0, (2, 6)), whole.masks.unflatten(0, (2, 24))[:, first : first + 6])
    assert all(sorted(o.flatten().tolist()) == list(range(48)) for o in whole.global_orders)  # permutations, by group
    assert not torch.equal(whole.global_orders[0], whole.global_orders[1])
    with pytest.raises(ValueError, match=r"for 2 process\(es\) in 3 parts each; make it a multiple of 18"):
        digit_batches(batch_size=24, group_size=3, n_ranks=2, gradient_accumulation_steps=3)


def test_data_workers_change_nothing():
    batches = digit_batches()
    loaded = list(data.train_loader(batches, 2, 6, num_workers=2, pin_memory=False))
    assert [b.samples[0].item() for b in loaded] == [32, 48, 64, 80]
    assert all(torch.equal(b.global_crops, batches[i].global_crops) for i, b in enumerate(loaded, 2))


class Numbers(data.Source):
    def __init__(self, n: int):
        self.n = n

    def __len__(self) -> int:
        return self.n


@pytest.mark.parametrize("n", [1, 2, 3, 10, 100, 1437])
def test_data_order_is_a_permutation(n):
    orders = [[Numbers(n).pick(epoch * n + i, seed=3) for i in range(n)] for epoch in range(3)]
    assert all(sorted(order) == list(range(n)) for order in orders)
    if n >= 10:
        assert orders[0] != orders[1] != orders[2] and orders[0] != list(range(n))


def test_data_order_is_well_mixed():
    """Neighbors in the keyed order are no nearer to each other than in a random one; and it scales to huge sets."""
    n = 10_000
    order = np.array([data.shuffled(i, n, key=1) for i in range(n)])
    assert abs(np.abs(np.diff(order)).mean() / (n / 3) - 1) < 0.03
    assert abs(np.corrcoef(np.arange(n), order)[0, 1]) < 0.03
    assert len({data.shuffled(i, 142_000_000, key=9) for i in range(2000)}) == 2000


def test_data_crop_boxes_follow_scale_and_ratio():
    rng = random.Random(0)
    boxes = np.array([data.crop_box(rng, 300, 400, (0.3, 0.6)) for _ in range(3000)])
    top, left, h, w = boxes.T
    assert (top >= 0).all() and (left >= 0).all() and (top + h <= 300).all() and (left + w <= 400).all()
    share, aspect = h * w / 120_000, w / h
    assert 0.29 < share.min() < 0.31 and 0.59 < share.max() < 0.61 and abs(share.mean() - 0.45) < 0.01
    assert 0.74 < aspect.min() < 0.77 and 1.3 < aspect.max() < 1.35 and abs(np.log(aspect).mean()) < 0.02
    assert data.crop_box(rng, 10, 1000, (0.9, 1.0)) == (0, 493, 10, 13)  # nothing fits: the central box


def test_data_cut_crop_equals_pillow():
    """Crop and resize of uint8 tensors equal Pillow's bicubic within rounding."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 9, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
    image = torch.from_numpy(pixels).permute(2, 0, 1)
    box = data.crop_box(random.Random(4), *image.shape[1:], (0.3, 0.9))
    crop = data.cut_crop(random.Random(4), image, 32, (0.3, 0.9))
    top, left, h, w = box
    pillow = Image.fromarray(pixels).crop((left, top, left + w, top + h)).resize((32, 32), Image.Resampling.BICUBIC)
    difference = np.abs(crop.numpy().astype(int) - np.asarray(pillow).astype(int))
    assert difference.max() <= 2 and (difference > 1).mean() < 1e-3
    deep = data.cut_crop(random.Random(4), data.widen(image), 32, (0.3, 0.9))  # the same in 16 bits, finer
    assert deep.dtype == torch.uint16
    assert (deep.float() / 257 - crop.float()).abs().mean() < 1
    for c in (1, 2, 4, 7):
        assert data.cut_crop(random.Random(4), image[:1].expand(c, -1, -1), 32, (0.3, 0.9)).shape == (32, 32, c)


def test_data_color_operations_equal_torchvision():
    from torchvision.transforms.v2 import functional as TF

    torch.manual_seed(0)
    x = torch.rand(6, 3, 24, 20)
    f = torch.tensor([0.3, 0.8, 1.0, 1.3, 1.7, 0.0])[:, None, None, None]
    turn = torch.tensor([-0.5, -0.1, 0.05, 0.1, 0.31, 0.5])[:, None, None, None]
    sigma = torch.tensor([0.1, 0.4, 0.8, 1.2, 1.6, 2.0])[:, None, None, None]
    for ours, theirs, values in (
        (data.brightness, TF.adjust_brightness, f), (data.contrast, TF.adjust_contrast, f),
        (data.saturation, TF.adjust_saturation, f), (data.hue, TF.adjust_hue, turn),
        (data.gaussian_blur, lambda image, s: TF.gaussian_blur(image, [9, 9], [s, s]), sigma),
    ):
        expected = torch.stack([theirs(image, v.item()) for image, v in zip(x, values)])
        assert_close(ours(x, values), expected, 1 / 255, ours.__name__)


@pytest.mark.parametrize("augment", [data.augment_by_groups, data.augment_at_once])
def test_data_augment_applies_each_operation_to_its_rows(augment):
    identity = [1.0, 1, 1, 0, 0, 1, 3, 2, 0, 0, 0, 0]
    changed = {0: 1.4, 1: 0.6, 2: 1.2, 3: 0.1, 8: 1, 9: 1.5, 10: 1, 11: 1}
    ops = torch.tensor([identity] + [[v if i == j else identity[i] for i in range(12)] for j, v in changed.items()])
    crop = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 16, 16), dtype=np.uint8))
    out = augment(crop.permute(1, 2, 0).expand(9, -1, -1, -1), ops)
    assert_close(out[0], data.normalize(crop[None] / 255)[0], 1e-5)
    assert all((out[i] - out[0]).abs().max() > 0.05 for i in range(1, 9))
    assert_close(out[8], out[0].flip(-1), 1e-5)
    gray = out[5] * torch.tensor(data.STD)[:, None, None] + torch.tensor(data.MEAN)[:, None, None]
    assert_close(gray[0], gray[1], 1e-6)
    solarized = out[7] * torch.tensor(data.STD)[:, None, None] + torch.tensor(data.MEAN)[:, None, None]
    assert_close(solarized, torch.where(crop < 128, crop, 255 - crop) / 255, 1e-5)


def test_data_color_probabilities():
    """The rates of the official code as it runs: blur 0, 0.9, 0.5; solarize 0.2 in the second global crop alone; the
    paper's blur by an argument."""
    draws = [np.array([data.draw_ops(random.Random(f"{kind}/{i}"), kind) for i in range(3000)]) for kind in range(3)]
    for kind, ops in enumerate(draws):
        rates = [(ops[:, 0] != 1).mean(), *(ops[:, 8:] > 0).mean(0)]
        np.testing.assert_allclose(rates, [0.8, 0.2, (0, 0.9, 0.5)[kind], (0, 0.2, 0)[kind], 0.5], atol=0.035)
        jittered = ops[ops[:, 0] != 1]
        np.testing.assert_allclose(jittered[:, :4].min(0), [0.6, 0.6, 0.8, -0.1], atol=0.01)
        np.testing.assert_allclose(jittered[:, :4].max(0), [1.4, 1.4, 1.2, 0.1], atol=0.01)
        assert set(map(tuple, ops[:, 4:8].astype(int))) == set(itertools.permutations(range(4)))
    paper = [np.mean([data.draw_ops(random.Random(i), kind, blur_probs=(1.0, 0.1, 0.5))[9] > 0 for i in range(1000)])
             for kind in range(3)]
    np.testing.assert_allclose(paper, (1.0, 0.1, 0.5), atol=0.05)


def test_data_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    photos = tmp_path / "photos"
    write_images(photos, ["b/2.png", "a/1.jpg", "a/deep/er/0.webp", "a/ä.png"])
    (photos / "notes.txt").write_text("no image")
    source = data.open_source(str(photos))
    assert [Path(source.describe(i)).name for i in range(4)] == ["1.jpg", "ä.png", "0.webp", "2.png"]
    assert source.labels.tolist() == [0, 0, 0, 1] and source.image(3).shape == (3, 40, 32)
    write_images(photos, ["a/deep/er/new.jpg"])  # the cached listing notices
    assert len(data.open_source(str(photos))) == 5
    write_images(photos, ["loose.jpg"])
    assert data.open_source(str(photos)).labels is None
    (photos / "a/.hidden.jpg").write_bytes(b"")
    (photos / "a/dangling.jpg").symlink_to("nowhere")
    assert data.eval_specs(str(photos)) == data.eval_specs("digits", str(photos)) == (str(photos), None)
    (photos / "a/deep/back").symlink_to(photos)
    (photos / "twice").symlink_to(photos / "b")
    assert len(data.open_source(str(photos))) == 6  # links are followed, each folder once
    write_images(tmp_path / "split", ["train/x/1.jpg", "train/y/2.jpg", "val/x/3.jpg", "val/y/4.jpg"])
    train_spec, val_spec = data.eval_specs(str(tmp_path / "split"))
    assert data.eval_specs("digits", str(tmp_path / "split")) == (train_spec, val_spec)
    assert data.eval_specs("digits", "digits:split=VAL") == ("digits:split=VAL", None)
    assert data.eval_specs("digits", "", "x") == ("digits:split=TRAIN", "x")
    assert [len(data.open_source(s)) for s in (str(tmp_path / "split"), train_spec, val_spec)] == [2, 2, 2]


def test_data_listing_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_images(tmp_path / "p", ["1.png", "2.png"])
    data.open_source(str(tmp_path / "p"))
    monkeypatch.setattr(data, "list_folder", lambda root: pytest.fail("listed again"))
    assert len(data.open_source(str(tmp_path / "p"))) == 2


def test_data_imagenet(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root, extra = tmp_path / "in1k", tmp_path / "extra"
    write_images(root,
                 ["train/n01/n01_10.JPEG", "train/n01/n01_2.JPEG", "train/n02/n02_7.JPEG",
                  "val/n02/ILSVRC2012_val_00000003.JPEG"])
    listed = data.open_source(f"ImageNet:split=TRAIN:root={root}")
    assert listed.labels.tolist() == [0, 0, 1]
    extra.mkdir()
    fields = [("actual_index", "<u4"), ("class_index", "<u4"), ("class_id", "U3"), ("class_name", "U3")]
    np.save(extra / "entries-TRAIN.npy",
            np.array([(10, 0, "n01", "x"), (2, 0, "n01", "x"), (7, 1, "n02", "y")], fields))
    np.save(extra / "entries-VAL.npy", np.array([(3, 1, "n02", "y")], fields))
    entries = data.open_source(f"ImageNet:split=TRAIN:root={root}:extra={extra}")
    assert entries.labels.tolist() == [0, 0, 1]
    assert [Path(entries.describe(i)) for i in range(3)] == [Path(listed.describe(i)) for i in range(3)]
    train_spec, val_spec = data.eval_specs(f"ImageNet:split=TRAIN:root={root}:extra={extra}")
    assert data.open_source(val_spec).image(0).shape == (3, 40, 32) and len(data.open_source(train_spec)) == 3


def test_data_fashion_mnist_files(tmp_path):
    images = np.arange(2 * 28 * 28, dtype=np.uint8).reshape(2, 28, 28)
    header = b"\0\0\x08\x03" + np.array(images.shape, ">i4").tobytes()
    (tmp_path / "t10k-images-idx3-ubyte").write_bytes(header + images.tobytes())
    import gzip
    with gzip.open(tmp_path / "t10k-labels-idx1-ubyte.gz", "wb") as file:
        file.write(b"\0\0\x08\x01" + np.array([2], ">i4").tobytes() + bytes([9, 4]))
    source = data.open_source(f"FashionMNIST:split=VAL:root={tmp_path}")
    assert source.labels.tolist() == [9, 4] and torch.equal(source.image(1)[2], torch.from_numpy(images[1]))


def test_data_unreadable_files_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_images(tmp_path / "p", [f"{i}.png" for i in range(6)])
    (tmp_path / "p" / "3.png").write_bytes(b"")
    (tmp_path / "p" / "4.png").write_bytes((tmp_path / "p" / "4.png").read_bytes()[:100])
    batches = data.TrainBatches(data.open_source(str(tmp_path / "p")), batch_size=12, group_size=4, global_size=16,
                                local_size=8, patch_size=8)
    batch = batches[0]
    assert {Path(name).name for name, why in batch.bad} == {"3.png", "4.png"} and len(batch.bad) >= 4
    assert all(why for name, why in batch.bad)
    assert torch.equal(batch.global_crops, batches[0].global_crops)


def test_data_odd_image_files(tmp_path):
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    variants = {"gray.png": rgb.convert("L"), "palette.png": rgb.convert("P"), "rgba.png": rgb.convert("RGBA"),
                "cmyk.jpg": rgb.convert("CMYK"), "one.png": rgb.crop((0, 0, 1, 1)), "t.tif": rgb, "b.bmp": rgb}
    for name, image in variants.items():
        image.save(tmp_path / name)
        for channels in (1, 3, 4):
            shape = load(tmp_path / name, channels).shape
            assert shape == (channels, image.height, image.width), (name, channels)
    rgb.save(tmp_path / "animated.gif", save_all=True, append_images=[rgb.transpose(Image.Transpose.ROTATE_180)] * 2)
    assert load(tmp_path / "animated.gif").shape == (3, 6, 8)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    rgb.save(tmp_path / "exif.jpg", exif=turned)
    assert load(tmp_path / "exif.jpg").shape == (3, 8, 6)


def load(path: Path, channels: int = 3) -> torch.Tensor:
    return data.decode(data.read_file(str(path)), channels)


def test_data_deep_and_many_channelled_images(tmp_path):
    """16 bits stay 16 bits, any number of channels arrives, and what cannot be meant is refused."""
    rng = np.random.default_rng(0)
    deep = rng.integers(0, 65536, (6, 8), dtype=np.uint16)
    for name in ("deep.png", "deep.tif"):
        Image.fromarray(deep).save(tmp_path / name)
        for channels in (1, 3):
            assert np.array_equal(load(tmp_path / name, channels)[-1].numpy(), deep), name
    for dtype in (np.uint8, np.uint16):
        pages = rng.integers(0, 256, (7, 6, 8), dtype=dtype)
        first, *others = [Image.fromarray(p) for p in pages]
        first.save(tmp_path / "seven.tif", save_all=True, append_images=others)
        assert np.array_equal(load(tmp_path / "seven.tif", 7).numpy(), pages)
    moving = [Image.fromarray(p) for p in rng.integers(0, 256, (5, 6, 8, 3), dtype=np.uint8)]
    moving[0].save(tmp_path / "moving.webp", save_all=True, append_images=moving[1:], lossless=True)
    assert load(tmp_path / "moving.webp", 5).shape == (5, 6, 8) and load(tmp_path / "moving.webp").shape == (3, 6, 8)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    rgba = load(tmp_path / "deep.png", 4)
    assert rgba.dtype == torch.uint16 and (rgba[3] == 65535).all() and load(tmp_path / "deep.png", 2).shape == (2, 6, 8)
    bands = rng.integers(0, 65536, (6, 8, 12), dtype=np.uint16)
    np.save(tmp_path / "twelve.npy", bands)
    assert np.array_equal(load(tmp_path / "twelve.npy", 12).permute(1, 2, 0).numpy(), bands)
    np.save(tmp_path / "float.npy", bands.astype(np.float32))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "float.tif")
    for name, channels, text in (("twelve.npy", 3, "12 channels, not 3"), ("float.npy", 12, "uint8 or uint16"),
                                 ("objects.npy", 1, "allow_pickle"), ("float.tif", 1, "16-bit integers")):
        with pytest.raises(ValueError, match=text):
            load(tmp_path / name, channels)


def test_data_decompression_bombs_are_refused(tmp_path, monkeypatch):
    """By their headers: nothing is decoded. A long narrow image is none."""
    Image.new("1", (20_000, 10_000)).save(tmp_path / "bomb.png")
    Image.new("L", (12_000, 12_000)).save(tmp_path / "bomb.jpg")
    Image.new("L", (20_000, 3)).save(tmp_path / "long.jpg")
    monkeypatch.setattr(data.torchvision.io, "decode_jpeg", lambda *args, **kwargs: pytest.fail("decoded"))
    for name in ("bomb.png", "bomb.jpg"):
        with pytest.raises(Exception, match="MAX_PIXELS|decompression bomb"):
            load(tmp_path / name)
    monkeypatch.undo()
    with open(tmp_path / "sparse.jpg", "wb") as file:
        file.truncate(data.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="MAX_BYTES"):
        load(tmp_path / "sparse.jpg")
    long = load(tmp_path / "long.jpg")
    assert data.cut_crop(random.Random(0), long, 32, (0.05, 0.3)).shape == (32, 32, 3)
    (tmp_path / "long.txt").write_text("long.jpg")
    source = data.open_source(str(tmp_path / "long.txt"))
    image, ok = data.EvalImages(source, 64, 48)[0]
    assert ok and image.shape == (3, 48, 48)
    monkeypatch.setattr(data, "MAX_BYTES", 10**6)
    (tmp_path / "zip.jpg").write_bytes(gzip.compress(png(1) + bytes(10**7)))
    assert load(tmp_path / "zip.jpg").shape == (3, 8, 8)  # of which no more was unpacked than the bound


def test_data_decodes_without_torchvision_too(tmp_path, monkeypatch):
    """torchvision 0.29 announces that its decoders will go; Pillow takes over."""
    write_images(tmp_path, ["a.jpg"])
    image = load(tmp_path / "a.jpg")
    monkeypatch.delattr(data.torchvision.io, "decode_jpeg")
    monkeypatch.delattr(data.torchvision.io, "ImageReadMode")
    assert_close(load(tmp_path / "a.jpg").float(), image.float(), 2)


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def png(i: int, size=(8, 8)) -> bytes:
    """A small gray image of value i."""
    file = io.BytesIO()
    Image.new("L", size, i % 256).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_data_file_list(tmp_path, cache):
    write_images(tmp_path, ["a/1.png", "b/2 x.png"])
    listed = tmp_path / "list.txt"
    listed.write_text(f"a/1.png\tcat\n\n{tmp_path}/b/2 x.png\tant\r\n")
    source = data.open_source(str(listed))
    assert source.labels.tolist() == [1, 0] and source.classes == ["ant", "cat"]
    assert source.image(1).shape == (3, 40, 32)
    listed.write_text("b/2 x.png\n")
    os.utime(listed, ns=(1, 1))
    source = data.open_source(str(listed))
    assert len(source) == 1 and source.labels is None
    listed.write_text("a/1.png\tcat\nb/2 x.png\na/1.png\tant\n")
    os.utime(listed, ns=(2, 2))
    source = data.open_source(str(listed))
    assert source.labels.tolist() == [1, -1, 0] and source.classes == ["ant", "cat"]
    listed.write_text("a\0b")
    os.utime(listed, ns=(3, 3))
    with pytest.raises(ValueError, match="no readable text"):
        data.open_source(str(listed))


def test_data_tar_shards(tmp_path, cache, capsys):
    """Shards of unequal length: every image once per pass, in a new order each time, each shard from front to back."""
    lengths, i = [700, 1, 0, 1500, 900], 0
    for j, n in enumerate(lengths):
        members = {}
        for k in range(n):
            members |= {f"{j}/{k:05}.cls": b"%d" % (i % 10), f"{j}/{k:05}.png": png(i)}
            i += 1
        write_tar(tmp_path / f"s-{j:03}.tar", members | {"notes.txt": b"x"})
    source = data.open_source(f"{tmp_path}/s-{{000..004}}.tar:interleave=2")
    n = sum(lengths)
    assert len(source) == n and source.labels[:12].tolist() == [*range(10), 0, 1]
    assert [source.image(i)[0, 0, 0].item() for i in (0, 699, 701, n - 1)] == [i % 256 for i in (0, 699, 701, n - 1)]
    passes = [[source.pick(epoch * n + s, seed=5) for s in range(n)] for epoch in range(3)]
    assert all(sorted(order) == list(range(n)) for order in passes) and passes[0] != passes[1] != passes[2]
    tars, starts = source.tars_in_order(random.Random("5/epoch/0").getrandbits(64))
    row = [source.first[j] + k for j in tars for k in range(lengths[j])]  # the tars, one behind the other
    half, place = -(-n // 2), {int(i): k for k, i in enumerate(row)}
    for window in range(n // 512 - 1):  # the next 256 images of either half, in no order
        picks = [place[i] for i in passes[0][512 * window : 512 * (window + 1)]]
        depth = [k % half for k in picks]
        assert sum(k < half for k in picks) == 256 and picks != sorted(picks)
        assert (min(depth), max(depth)) == (256 * window, 256 * window + 255)
    sequence = passes[0]  # so reading advances in each tar
    for j, n_images in enumerate(lengths):
        if n_images > 512:
            read = np.array([i for i in sequence if source.shard[i] == j])
            assert np.corrcoef(np.arange(n_images), read)[0, 1] > 0.5, j
    at_random = data.open_source(f"{tmp_path}/s-*.tar:interleave=0")
    assert sorted(at_random.pick(s, 0) for s in range(n)) == list(range(n))
    assert "s-000.tar at byte" in source.describe(3)
    whole = (tmp_path / "s-000.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    cut = data.open_source(f"{tmp_path}/cut.tar")
    assert 300 < len(cut) < 400 and "is damaged after" in capsys.readouterr().err
    (tmp_path / "zip.tar").write_bytes(b"\x1f\x8b no tar")
    for spec, text in ((f"{tmp_path}/zip.tar", "no plain tar"), (f"{tmp_path}/none.tar", "does not exist"),
                       (f"{tmp_path}/s-002.tar", "no image"), (f"{tmp_path}/cut.tar:interleave=x", "interleave is")):
        with pytest.raises(ValueError, match=text):
            data.open_source(spec)
    with pytest.raises(ValueError, match=r"named .*/\*\.tar"):
        data.open_source(str(tmp_path))


def test_data_mixtures(tmp_path, cache):
    """Exact shares in every round; within its share each source is gone through once per pass."""
    write_images(tmp_path, ["a/1.png", "a/2.png", "a/3.png", "b/4.png"])
    mix = data.open_source(f"{tmp_path}/a*0.7,{tmp_path}/b*0.2,digits*.1")
    picks = [mix.pick(s, seed=1) for s in range(300)]
    for start in range(0, 300, 10):
        whose = [0 if i < 3 else 1 if i == 3 else 2 for i in picks[start : start + 10]]
        assert sorted(whose) == [0] * 7 + [1] * 2 + [2]
    assert [sorted(i for i in picks if i < 3).count(k) for k in range(3)] == [70] * 3
    assert len({i for i in picks if i > 3}) == 30  # digits: no repetition within a pass
    assert mix.image(3).shape == (3, 40, 32) and mix.image(4).shape == (3, 32, 32) and mix.labels is None
    both = data.open_source(f"{tmp_path}/a,{tmp_path}/b")
    assert sorted(both.pick(s, 0) for s in range(4)) == [0, 1, 2, 3] and both.describe(3).endswith("4.png")
    write_images(tmp_path / "x,y*2", ["5.png"])  # a folder's name comes first
    assert len(data.open_source(f"{tmp_path}/x,y*2")) == 1
    split = f"{tmp_path}/s"
    write_images(tmp_path / "s", ["train/1.png", "val/2.png"])
    assert data.open_source(f"{split}:split=TRAIN*0.5, {split}:split=VAL*0.5").describe(1).endswith("val/2.png")
    for spec in ("ImageNet:root=/a,ImageNet22k:root=/b", "CIFAR10:root=/d*0.5,CIFAR100:root=/d*0.5", "CIFAR10*1"):
        assert data.eval_specs(spec) == (spec, None)
    (tmp_path / "a/1.png").write_bytes(b"damaged")
    lame = data.open_source(f"{tmp_path}/a*0.9,digits*0.1")
    assert {lame.replacement(0, random.Random(i)) for i in range(50)} == {0, 1, 2}  # the shares stay what they are
    for spec, text in (("digits*0.5,digits", "or none"), ("digits*0.5,digits*0", "0.001 or more"),
                       ("digits,", "nothing before or after")):
        with pytest.raises(ValueError, match=text):
            data.open_source(spec)


def test_data_imagenet_extra_golden(tmp_path, cache, capsys):
    """`data.py extra` writes what the official classes dumped from the same tree, to the byte."""
    for split in ("train/", "val/"):
        write_images(tmp_path, [f for f in golden.json("extra/files") if f.startswith(split)])
    (tmp_path / "labels.txt").write_text(golden.json("extra/labels"))
    data.main(["extra", f"ImageNet:root={tmp_path}:extra={tmp_path}/extra"])
    for name, rows in golden.json("extra/imagenet").items():
        ours = np.load(tmp_path / "extra" / name)
        assert [str(ours.dtype), ours.tolist()] == [rows[0], [tuple(r) if isinstance(r, list) else r for r in rows[1]]]
    source = data.open_source(f"ImageNet:split=TRAIN:root={tmp_path}:extra={tmp_path}/extra")
    listed = data.open_source(f"ImageNet:split=TRAIN:root={tmp_path}")
    assert [source.describe(i) for i in range(9)] == [listed.describe(i) for i in range(9)]
    write_images(tmp_path, ["test/ILSVRC2012_test_00000002.JPEG", "test/ILSVRC2012_test_00000001.JPEG"])
    data.main(["extra", f"ImageNet:split=TEST:root={tmp_path}:extra={tmp_path}/extra"])
    test = data.open_source(f"ImageNet:split=TEST:root={tmp_path}:extra={tmp_path}/extra")
    assert test.labels is None and test.describe(1).endswith("test_00000002.JPEG")
    assert test.image(1).shape == (3, 40, 32)


@pytest.mark.parametrize("logs", [True, False])
def test_data_imagenet22k_golden(logs, tmp_path, cache):
    """entries.npy from the block logs, or from the tars alone, equals the official one; images come from the tars."""
    for wnid, log in golden.json("extra/blocks").items():
        names = re.findall(r"\w+\.JPEG", log)
        files = {name: png(7 * k, (20, 20)).ljust(600, b"\0") for k, name in enumerate(names)}
        write_tar(tmp_path / f"{wnid}.tar", files)
        if logs:
            (tmp_path / "blocks").mkdir(exist_ok=True)
            (tmp_path / "blocks" / f"{wnid}.log").write_text(log)
    data.main(["extra", f"ImageNet22k:root={tmp_path}:extra={tmp_path}/extra"])
    for name, (dtype, rows) in golden.json("extra/imagenet22k").items():
        ours = np.load(tmp_path / "extra" / name)
        assert str(ours.dtype) == dtype and ours.tolist() == [tuple(r) if isinstance(r, list) else r for r in rows]
    for spec in (f"ImageNet22k:root={tmp_path}:extra={tmp_path}/extra", f"ImageNet22k:root={tmp_path}"):
        source = data.open_source(spec)
        assert source.labels.tolist() == [0, 0, 0, 1, 1, 1]
        assert [source.image(i)[0, 0, 0].item() for i in range(6)] == [0, 7, 14] * 2
    packed = gzip.compress(png(9))  # as a few of its files are
    write_tar(tmp_path / "n00000003.tar", {"a.JPEG": packed})
    assert data.open_source(f"ImageNet22k:root={tmp_path}").image(6)[0, 0, 0] == 9


def test_data_torchvision_sets(tmp_path, monkeypatch):
    import torchvision

    with pytest.raises(ValueError, match="download=yes"):
        data.open_source(f"CIFAR10:root={tmp_path}")
    pixels = np.arange(3 * 32 * 32 * 3, dtype=np.uint32).astype(np.uint8).reshape(3, 32, 32, 3)

    class Fake:
        def __init__(self, root, train, download):
            n = 3 if train else 1
            self.data, self.targets, self.classes = pixels[:n], [1, 0, 1][:n], ["a", "b"]
            assert Path(root) == tmp_path and not download

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", Fake)
    source = data.open_source(f"CIFAR100:root={tmp_path}")
    assert source.labels.tolist() == [1, 0, 1] and source.classes == ["a", "b"]
    assert np.array_equal(source.image(2).permute(1, 2, 0).numpy(), pixels[2])
    assert len(data.open_source(f"CIFAR100:split=VAL:root={tmp_path}", channels=1)) == 1
    assert data.eval_specs("CIFAR100:root=x") == ("CIFAR100:root=x:split=TRAIN", "CIFAR100:root=x:split=VAL")


def test_data_stats_and_check_commands(tmp_path, cache, capsys):
    for i, value in enumerate((0, 51, 102)):
        Image.new("RGB", (10, 10 + i), (value, 255, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff no more")
    data.main(["stats", str(tmp_path), "--num-workers", "0"])
    out = capsys.readouterr().out
    pixels = np.repeat([0, 0.2, 0.4], [100, 110, 120])
    assert f"--mean {pixels.mean():.4g} 1 0 --std {pixels.std():.4g} 0 0" in out
    with pytest.raises(SystemExit) as stop:
        data.main(["check", str(tmp_path), "--num-workers", "1"])
    out = capsys.readouterr().out
    assert "bad.jpg\tcannot identify" in out and "1 of 4 images" in out
    assert stop.value.code == 1
    result = run(sys.executable, "data.py", "stats", tmp_path / "no", ok=2)
    assert result.stderr.startswith("error: --data") and result.stderr.count("\n") == 1


def test_data_listing_is_shared_and_small(tmp_path, cache):
    """What a worker gets is the spec alone; the listing is mapped from the file, not copied."""
    write_images(tmp_path / "p", [f"{c}/{i}.png" for c in "ab" for i in range(3)])
    source = data.open_source(str(tmp_path / "p"))
    pickled = pickle.dumps(source)
    assert len(pickled) < 300 and [pickle.loads(pickled).describe(i) for i in range(6)] == [
        source.describe(i) for i in range(6)]
    maps = Path("/proc/self/maps")
    assert not maps.exists() or ".listing" in maps.read_text()


def test_data_order_needs_no_memory():
    """142 million images: the order is computed, not stored."""
    import tracemalloc

    source = Numbers(142_000_000)
    tracemalloc.start()
    picks = {source.pick(s, seed=3) for s in range(0, 10**9, 10**6)}
    assert tracemalloc.get_traced_memory()[1] < 10**6 and len(picks) > 990
    tracemalloc.stop()


def test_data_workers_and_processes_change_nothing_in_mid_epoch():
    """1, 2 and 3 workers, 1 and 2 processes, and a start in the middle give the same bits."""
    batches = digit_batches(batch_size=24)  # 1437 images: the first pass ends within step 59
    assert 58 * 24 < 1437 < 60 * 24
    expected = [batches[step] for step in range(57, 62)]
    keys = ("global_crops", "local_crops", "global_ops", "local_ops", "masks", "mask_index", "samples")
    for workers, start in ((1, 57), (2, 57), (3, 59)):
        loaded = list(data.train_loader(batches, start, 62, num_workers=workers, pin_memory=False))
        for ours, theirs in zip(loaded, expected[start - 57 :], strict=True):
            assert all(torch.equal(getattr(ours, key), getattr(theirs, key)) for key in keys), workers
    for step, whole in enumerate(expected, 57):
        halves = [digit_batches(batch_size=24, rank=r, n_ranks=2)[step] for r in range(2)]
        crops = [h.global_crops.unflatten(0, (2, 12)) for h in halves]
        assert torch.equal(whole.global_crops.unflatten(0, (2, 24)), torch.cat(crops, 1))


def test_data_augment_compiles_and_both_ways_agree():
    rng = random.Random(0)
    compiled = torch.compile(data.augment_at_once, backend="aot_eager", fullgraph=True, dynamic=False)
    for kind, dtype, channels in ((0, torch.uint8, 3), (1, torch.uint8, 3), (2, torch.uint16, 3), (1, torch.uint8, 4)):
        jitter = dict(jitter=(0.4, 0.4, 0.0, 0.0), gray_prob=0.0) if channels != 3 else {}
        ops = torch.tensor([data.draw_ops(rng, kind, **jitter) for _ in range(60)])
        crops = torch.randint(0, 256, (60, 24, 24, channels), dtype=torch.uint8)
        crops = data.widen(crops) if dtype == torch.uint16 else crops
        mean, std = (0.4,) * channels, (0.3,) * channels
        at_once = data.augment_at_once(crops, ops, mean, std)
        assert_close(data.augment_by_groups(crops, ops, mean, std), at_once, 1e-5)
        assert_close(compiled(crops, ops, mean, std), at_once, 1e-5)


# What torchvision does, as distributions, on scikit-learn's photographs. Each figure is an average over many draws.


def photographs() -> list[torch.Tensor]:
    from sklearn.datasets import load_sample_images

    return [torch.tensor(image).permute(2, 0, 1).contiguous() for image in load_sample_images().images]


def looks(images: torch.Tensor) -> torch.Tensor:
    """(n, 3, h, w) in [0, 1] -> (n, 9): per channel mean, variance, gradient energy."""
    dx, dy = images.diff(dim=-1).square().mean((2, 3)), images.diff(dim=-2).square().mean((2, 3))
    return torch.cat([images.mean((2, 3)), images.var((2, 3)), dx + dy], dim=1)


def assert_same_distribution(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    """Kolmogorov-Smirnov on each column of (n, k); with 1,000 draws a distance of 0.09 comes once in 1,000 tests."""
    for column, (a, b) in enumerate(zip(ours.T.double().numpy(), theirs.T.double().numpy())):
        a, b, near = np.sort(a), np.sort(b), 1e-3 * max(np.abs(a).max(), np.abs(b).max())  # values may be rounded
        below = lambda x, at: np.searchsorted(x, at, side="right") / len(x)  # noqa: E731
        distance = max((below(x, x) - below(y, x + near)).max() for x, y in ((a, b), (b, a)))
        assert distance < 1.95 * math.sqrt(2 / len(a)) + 0.01, f"{what}, column {column}: distance {distance:.3f}"


def test_data_crop_distribution_equals_torchvision():
    from torchvision.transforms.v2 import RandomResizedCrop

    torch.manual_seed(0)
    rng = random.Random(0)
    for size, scale in (((375, 500), (0.32, 1.0)), ((375, 500), (0.05, 0.32)), ((100, 600), (0.32, 1.0))):
        theirs = RandomResizedCrop(96, scale=scale)
        draws = [theirs.make_params([torch.empty(3, *size)]) for _ in range(1500)]
        draws = [[d["top"], d["left"], d["height"], d["width"]] for d in draws]
        ours = [data.crop_box(rng, *size, scale) for _ in range(1500)]
        tables = [torch.tensor(boxes, dtype=torch.float64) for boxes in (ours, draws)]
        tables = [torch.cat([t, t[:, 2:3] * t[:, 3:], (t[:, 3:] / t[:, 2:3]).log()], 1) for t in tables]
        assert_same_distribution(*tables, f"boxes of {scale} in {size}")


OPERATIONS = {  # keyword arguments of draw_ops that leave one operation on, and torchvision's transform for the same
    "flip": (dict(flip_prob=0.5), "RandomHorizontalFlip()"),
    "brightness": (dict(jitter_prob=1.0, jitter=(0.4, 0, 0, 0)), "ColorJitter(brightness=0.4)"),
    "contrast": (dict(jitter_prob=1.0, jitter=(0, 0.4, 0, 0)), "ColorJitter(contrast=0.4)"),
    "saturation": (dict(jitter_prob=1.0, jitter=(0, 0, 0.2, 0)), "ColorJitter(saturation=0.2)"),
    "hue": (dict(jitter_prob=1.0, jitter=(0, 0, 0, 0.1)), "ColorJitter(hue=0.1)"),
    "jitter": (dict(jitter_prob=0.8), "RandomApply([ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8)"),
    "gray": (dict(gray_prob=0.2), "RandomGrayscale(p=0.2)"),
    "blur": (dict(blur_probs=(1.0, 1.0, 1.0)), "GaussianBlur(9, (0.1, 2.0))"),
    "solarize": (dict(solarize_prob=0.2), "RandomSolarize(128 / 255, p=0.2)"),
    "all": (None, "Compose([RandomHorizontalFlip(), RandomApply([ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8), "
                  "RandomGrayscale(p=0.2), RandomApply([GaussianBlur(9, (0.1, 2.0))], p=0.9), "
                  "RandomSolarize(128 / 255, p=0.2)])")}


@pytest.mark.parametrize("name", OPERATIONS)
def test_data_augmentation_distribution_equals_torchvision(name):
    import torchvision.transforms.v2 as T

    arguments, transform = OPERATIONS[name]
    off = dict(flip_prob=0.0, jitter_prob=0.0, gray_prob=0.0, blur_probs=(0.0, 0.0, 0.0), solarize_prob=0.0)
    arguments = {} if arguments is None else off | arguments
    transform, rng, n = eval(transform, vars(T)), random.Random(name), 500
    torch.manual_seed(0)
    for photo in photographs():
        crop = data.cut_crop(random.Random(0), photo, 48, (0.3, 0.4))
        ops = torch.tensor([data.draw_ops(rng, 1, **arguments) for _ in range(n)])
        ours = data.augment(crop.expand(n, -1, -1, -1), ops, (0, 0, 0), (1, 1, 1))
        theirs = torch.stack([transform(crop.permute(2, 0, 1) / 255) for _ in range(n)])
        assert_same_distribution(looks(ours), looks(theirs), name)


def test_data_whole_pipeline_distribution_equals_torchvision():
    """From the photograph to the normalized second global crop, against the official order on Pillow images."""
    from torchvision.transforms.v2.functional import to_pil_image

    torch.manual_seed(0)
    n, rng, photo = 300, random.Random(0), photographs()[0][:, ::2, ::2]
    crops = torch.stack([data.cut_crop(rng, photo, 224, (0.32, 1.0)) for _ in range(n)])
    ours = data.augment(crops, torch.tensor([data.draw_ops(rng, 1) for _ in range(n)]))
    image, transform = to_pil_image(photo), bench.official_pipeline()[1]
    theirs = torch.stack([transform(image) for _ in range(n)])
    assert_same_distribution(looks(ours), looks(theirs), "whole")


def mutated_files(folder: Path, n: int) -> None:
    """n image files of all formats, three of four of them damaged in some way."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (24, 20, 3), dtype=np.uint8)
    originals = []
    for mode, suffixes in (("RGB", ("jpg", "png", "gif", "webp", "bmp", "tif", "ppm")),
                           ("L", ("jpg", "png", "tif", "pgm")), ("CMYK", ("jpg", "tif")), ("P", ("png", "gif")),
                           ("RGBA", ("png", "webp", "tif")),
                           ("I;16", ("png", "tif"))):
        for suffix in suffixes:
            image = Image.fromarray(pixels).convert("L" if mode == "I;16" else mode)
            image = Image.fromarray(np.asarray(image).astype(np.uint16) * 257) if mode == "I;16" else image
            file = io.BytesIO()
            image.save(file, {"jpg": "JPEG", "tif": "TIFF", "pgm": "PPM"}.get(suffix, suffix.upper()))
            originals.append((suffix, file.getvalue()))
    for i in range(n):
        suffix, content = originals[i % len(originals)]
        content = bytearray(content)
        kind, place = int(rng.integers(8)), int(rng.integers(len(content)))
        if kind == 0:
            content = content[:place]
        elif kind == 1:
            content[place] ^= 1 << rng.integers(8)
        elif kind == 2:
            content[place : place + 16] = rng.bytes(16)
        elif kind == 3:
            content = content[:place] + originals[int(rng.integers(len(originals)))][1][place:]
        elif kind == 4:
            suffix = originals[int(rng.integers(len(originals)))][0]  # a wrong extension harms nobody
        elif kind == 5 and i % 3 == 0:
            content = bytearray(rng.bytes(place) if i % 2 else b"")
        (folder / f"{i:04}.{suffix}").write_bytes(content)


@pytest.mark.filterwarnings("ignore")
def test_data_fuzz_2000_damaged_files(tmp_path, cache):
    """No crash, no hang, no silent loss: one pass over all, with workers, reports exactly the unreadable ones."""
    (tmp_path / "p").mkdir()
    mutated_files(tmp_path / "p", 2000)
    source = data.open_source(str(tmp_path / "p"))
    unreadable = set()
    for i in range(len(source)):
        try:
            image = source.image(i)
            assert image.dtype in (torch.uint8, torch.uint16) and len(image) == 3
        except Exception:
            unreadable.add(source.describe(i))
    assert 200 < len(unreadable) < 1500
    batches = data.TrainBatches(source, batch_size=40, group_size=40, global_size=16, local_size=8, n_local=1,
                                patch_size=8)
    bad = []
    for batch in data.train_loader(batches, 0, 50, num_workers=2, pin_memory=False):
        assert batch.global_crops.shape == (80, 16, 16, 3)
        bad += batch.bad
    assert {name for name, why in bad} == unreadable and all(why for name, why in bad)
    assert len(bad) > len(unreadable)  # a replacement may be bad, too


def test_data_unreadable_sources_end_the_run(tmp_path, cache):
    write_images(tmp_path / "p", ["1.png", "2.png"])
    source = data.open_source(str(tmp_path / "p"))
    shutil.rmtree(tmp_path / "p")  # the disk is gone
    batches = data.TrainBatches(source, batch_size=2, group_size=2, global_size=16, local_size=8, patch_size=8)
    with pytest.raises(data.Unreadable, match="50 images in a row"):
        batches[0]


def test_data_worker_count(monkeypatch, tmp_path):
    monkeypatch.setattr(data, "usable_cores", lambda: 64)
    assert [data.worker_count(*a) for a in ((-1,), (-1, 8), (-1, 64), (3, 8), (0,))] == [16, 7, 1, 3, 0]
    monkeypatch.undo()
    cores = data.usable_cores(proc="/nowhere")
    monkeypatch.setattr(data.os, "sched_getaffinity", lambda pid: range(64), raising=False)
    monkeypatch.setattr(data.os, "cpu_count", lambda: 64)
    mounts, proc = tmp_path / "mounts", tmp_path / "cgroup"
    for text, file, content, expected in (
            ("0::/slurm/job\n", "slurm/cpu.max", "800000 100000\n", 8), ("0::/\n", "cpu.max", "max 100000\n", 64),
            ("0::/a/b\n", "cpu.max", "150000 100000", 1),  # the container's own group is at the top
            ("5:memory:/x\n4:cpu,cpuacct:/x\n0::/\n", "cpu/x/cpu.cfs_quota_us", "300000\n", 3)):
        shutil.rmtree(mounts, ignore_errors=True)
        (mounts / file).parent.mkdir(parents=True)
        (mounts / file).write_text(content)
        (mounts / file).with_name("cpu.cfs_period_us").write_text("100000\n")
        proc.write_text(text)
        assert data.usable_cores(str(proc), str(mounts)) == expected, text
    assert 1 <= cores <= 64


def test_data_prefetcher_yields_all_in_order():
    batches = digit_batches()
    fetcher = data.Prefetcher([batches[2], batches[3]], lambda batch: data.prepare(batch, CPU), CPU)
    fetched = list(fetcher)
    assert [b.samples[0].item() for b in fetched] == [32, 48] and fetcher.waited > 0
    assert torch.equal(fetched[1].global_crops, data.prepare(batches[3], CPU).global_crops)


def test_data_prefetcher_on_a_gpu_is_one_batch_ahead(monkeypatch):
    """The order of events, with streams that only take notes: a batch is made while the step before it is under way,
    after the steps before that, and waited for before it is used."""
    notes = []

    class Stream:
        def __init__(self, name="side"):
            self.name = name

        def wait_stream(self, other):
            notes.append(f"{self.name} waits for {other.name}")

        def record_event(self):
            return len([n for n in notes if n.startswith("made")]) - 1

        def wait_event(self, event):
            notes.append(f"{self.name} waits for batch {event}")

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("main"))
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    def prepare(batch):
        notes.append(f"made {batch}")
        return (batch,)

    for (batch,) in data.Prefetcher([0, 1, 2], prepare, torch.device("cuda")):
        notes.append(f"step {batch}")
    make = lambda k: ["side waits for main", f"made {k}"]  # noqa: E731
    use = lambda k: [f"main waits for batch {k}", f"step {k}"]  # noqa: E731
    assert notes == make(0) + make(1) + use(0) + make(2) + use(1) + use(2)


def test_data_picture_of_a_batch():
    batch = data.prepare(digit_batches()[0], CPU)
    picture = data.draw_batch(batch)
    assert picture.width > 300 and picture.height > 300 and len(picture.getcolors(10**6)) > 50
    unmasked = data.draw_batch(batch._replace(masks=torch.zeros_like(batch.masks)))
    assert np.asarray(picture).mean() < np.asarray(unmasked).mean()


@pytest.mark.parametrize("spec,text", [
    ("no/such/folder", "is no folder"), ("{tmp}/file.txt", "names no image"), ("{tmp}/empty", "holds no image"),
    ("digits:split=TEST", "splits TRAIN and VAL"), ("digits:sprit=VAL", "unknown key 'sprit'; digits takes split"),
    ("FashionMNIST:root={tmp}", "dataset-fashion-mnist"), ("ImageNet:split=TRAIN", "ImageNet:split=TRAIN:root="),
    ("ImageNet:split=VAL:root={tmp}", "train and val"), ("{tmp}/empty:split=VAL", "no sub-folder for split VAL")])
def test_data_errors_name_the_fix(spec, text, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("")
    with pytest.raises(ValueError, match=re.escape(text)):
        data.open_source(spec.format(tmp=tmp_path))


# ----------------------------------------------------------------------------------------------------------------------
# train.py: recipe


OFFICIAL_NAMES = {
    "dino.loss_weight": "dino_loss_weight", "dino.head_n_prototypes": "head_n_prototypes",
    "dino.head_bottleneck_dim": "head_bottleneck_dim", "dino.head_nlayers": "head_nlayers",
    "dino.head_hidden_dim": "head_hidden_dim", "dino.koleo_loss_weight": "koleo_loss_weight",
    "ibot.loss_weight": "ibot_loss_weight", "ibot.mask_sample_probability": "mask_sample_probability",
    "ibot.mask_ratio_min_max": "mask_ratio_min_max", "ibot.separate_head": "ibot_separate_head",
    "ibot.head_n_prototypes": "ibot_head_n_prototypes", "ibot.head_bottleneck_dim": "ibot_head_bottleneck_dim",
    "ibot.head_nlayers": "ibot_head_nlayers", "ibot.head_hidden_dim": "ibot_head_hidden_dim",
    "train.batch_size_per_gpu": "group_size", "train.dataset_path": "data",
    "train.centering": "centering", "train.seed": "seed", "student.arch": "arch", "student.patch_size": "patch_size",
    "student.drop_path_rate": "drop_path_rate", "student.layerscale": "layerscale",
    "student.drop_path_uniform": "drop_path_uniform", "student.pretrained_weights": "init",
    "student.ffn_layer": "ffn_layer",
    "student.qkv_bias": "qkv_bias", "student.proj_bias": "proj_bias", "student.ffn_bias": "ffn_bias",
    "student.num_register_tokens": "num_register_tokens", "student.interpolate_antialias": "interpolate_antialias",
    "student.interpolate_offset": "interpolate_offset", "teacher.momentum_teacher": "momentum_teacher",
    "teacher.final_momentum_teacher": "final_momentum_teacher", "teacher.warmup_teacher_temp": "warmup_teacher_temp",
    "teacher.teacher_temp": "teacher_temp", "optim.weight_decay": "weight_decay",
    "optim.weight_decay_end": "weight_decay_end",
    "optim.base_lr": "lr", "optim.min_lr": "min_lr", "optim.clip_grad": "clip_grad",
    "optim.patch_embed_lr_mult": "patch_embed_lr_mult", "optim.layerwise_decay": "layerwise_decay",
    "crops.global_crops_scale": "global_crops_scale", "crops.local_crops_number": "local_crops_number",
    "crops.local_crops_scale": "local_crops_scale", "crops.global_crops_size": "global_crops_size",
    "crops.local_crops_size": "local_crops_size", "evaluation.eval_period_iterations": "export_every"}
OFFICIAL_EPOCHS = {  # counted in epochs of 1250 iterations there, in steps here
    "teacher.warmup_teacher_temp_epochs": "warmup_teacher_temp_steps", "optim.epochs": "steps",
    "optim.warmup_epochs": "warmup_steps", "optim.freeze_last_layer_epochs": "freeze_last_layer_steps"}
OFFICIAL_UNUSED = {  # read by no line of the official code, or replaced here by something without a setting
    "MODEL.WEIGHTS", "train.output_dir", "train.num_workers", "train.saveckp_freq", "train.cache_dataset",
    "train.OFFICIAL_EPOCH_LENGTH", "student.block_chunks", "optim.lr", "optim.scaling_rule", "optim.adamw_beta1",
    "optim.adamw_beta2"}


@pytest.mark.parametrize("preset,gpus", [("vitl16_short", 32), ("vitl14", 96), ("vitg14", 256)])
def test_train_presets_equal_official_configs(preset, gpus):
    def flatten(tree, prefix=""):
        for key, value in tree.items():
            yield from flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(prefix + key, value)]

    cfg = train.Config(**train.PRESETS[preset])
    official = {k: v for k, v in flatten(golden.json("configs")[preset]) if not k.startswith("compute_precision")}
    assert official.keys() == OFFICIAL_NAMES.keys() | OFFICIAL_EPOCHS.keys() | OFFICIAL_UNUSED
    for theirs, ours in OFFICIAL_NAMES.items():
        value = official[theirs]
        assert getattr(cfg, ours) == (tuple(value) if isinstance(value, list) else value), theirs
    for theirs, ours in OFFICIAL_EPOCHS.items():
        assert getattr(cfg, ours) == 1250 * official[theirs], theirs
    assert cfg.betas == (official["optim.adamw_beta1"], official["optim.adamw_beta2"])
    assert cfg.batch_size == gpus * official["train.batch_size_per_gpu"]


@pytest.mark.parametrize("preset", ["vitl16_short", "vitl14", "vitg14"])
def test_train_schedules_golden(preset):
    cfg = train.Config(**train.PRESETS[preset])
    if preset == "vitg14":  # the golden numbers are those of one GPU
        cfg = dataclasses.replace(cfg, batch_size=12)
    ours, names = train.schedules(cfg), dict(lr="lr", wd="weight_decay", momentum="momentum",
                                             teacher_temp="teacher_temp", last_layer_lr="last_layer_lr")
    index = golden.numpy(f"schedules/{preset}/index")
    inside = index < cfg.steps
    for theirs, name in names.items():
        np.testing.assert_allclose(ours[name][index[inside]], golden.numpy(f"schedules/{preset}/{theirs}")[inside],
                                   rtol=1e-12)


def test_train_small_schedules_golden():
    """7 iterations an epoch; 12 epochs, 3 of warm-up, 2 of freezing, 5 of temperature warm-up."""
    cfg = dataclasses.replace(train.Config(), steps=84, warmup_steps=21, freeze_last_layer_steps=14,
                              warmup_teacher_temp_steps=35,
                              lr=0.01, batch_size=1024)
    ours = train.schedules(cfg)
    for theirs, name in dict(lr="lr", wd="weight_decay", momentum="momentum", last_layer_lr="last_layer_lr").items():
        np.testing.assert_allclose(ours[name], golden.numpy(f"schedules/small/{theirs}"), rtol=1e-12)
    np.testing.assert_allclose(ours["teacher_temp"][:35], golden.numpy("schedules/small/teacher_temp"), rtol=1e-12)
    assert all(len(values) == 84 for values in ours.values()) and ours["teacher_temp"][-1] == cfg.teacher_temp


def test_train_param_groups_golden():
    tables, seen = golden.json("param_groups"), 0
    for name, table in tables.items():
        decay = {"vitg14.backbone": 1.0}.get(name, 0.9)
        rows = table["per_param[lr_mult,wd_mult,is_last_layer]"]
        blocks = [re.match(r"blocks\.(?:\d+\.)?(\d+)\.", key) for key in rows]
        depth = max((1 + int(match[1]) for match in blocks if match), default=0)
        for key, expected in rows.items():
            ours = train.param_options(key, depth, 1.0 if name == "dino_head" else decay, 0.2)
            assert ours == pytest.approx(expected), (name, key)
            seen += 1
    assert seen > 1000


def test_train_param_groups_are_fused():
    cfg = train.Config(**train.PRESETS["digits"])
    cfg = dataclasses.replace(cfg, layerwise_decay=0.9, patch_embed_lr_mult=0.2)
    network = train.build_network(cfg)
    groups = train.param_groups(network, cfg)
    assert len({(g["lr_mult"], g["wd_mult"], g["is_last_layer"]) for g in groups}) == len(groups)
    assert sum(len(g["params"]) for g in groups) == len(list(network.parameters()))


# ----------------------------------------------------------------------------------------------------------------------
# train.py: the step, against three whole steps of the official code

TINY_ARCH = dict(embed_dim=32, depth=3, num_heads=2)
OVERRIDES = {"train.centering": "centering", "ibot.separate_head": "ibot_separate_head",
             "ibot.loss_weight": "ibot_loss_weight",
             "dino.koleo_loss_weight": "koleo_loss_weight", "student.num_register_tokens": "num_register_tokens",
             "student.ffn_layer": "ffn_layer", "student.interpolate_offset": "interpolate_offset",
             "student.interpolate_antialias": "interpolate_antialias", "student.drop_path_rate": "drop_path_rate"}


def golden_config(case: str, n_images: int) -> train.Config:
    override = golden.json("train/override")[case]
    flat = {f"{section}.{key}": v for section, values in override.items() for key, v in values.items()}
    return train.Config(
        **{OVERRIDES[k]: v for k, v in flat.items() if k != "student.block_chunks"} | dict(
            arch="tiny", patch_size=14, head_n_prototypes=40, head_bottleneck_dim=16, head_hidden_dim=24,
            ibot_head_n_prototypes=36, ibot_head_bottleneck_dim=12, ibot_head_hidden_dim=20, global_crops_size=56,
            local_crops_size=28, local_crops_number=3, group_size=n_images)
        | ({} if "student.drop_path_rate" in flat else dict(drop_path_rate=0.0)))


def golden_batch(generator: torch.Generator, masks: torch.Tensor) -> data.Batch:
    """Two global and three local crops of each image, drawn image by image; rows are crop-major."""
    n = len(masks) // 2
    draws = [[torch.randn(3, size, size, generator=generator) for size in (56, 56, 28, 28, 28)] for _ in range(n)]
    crops = list(zip(*draws))
    flat = lambda lists: torch.stack(list(itertools.chain.from_iterable(lists)))  # noqa: E731
    return data.Batch(flat(crops[:2]), flat(crops[2:]), None, None, masks, *data.mask_weights(masks), torch.arange(n),
                      [])


def golden_networks(cfg: train.Config) -> tuple[torch.nn.ModuleDict, torch.nn.ModuleDict]:
    student, teacher = train.build_network(cfg, cfg.drop_path_rate).train(), train.build_network(cfg).eval()
    fill(student, 400)
    fill(teacher, 401)
    return student, teacher.requires_grad_(False)


def check_fingerprints(prefix: str, tensors: dict[str, torch.Tensor], rtol: float, atol: float) -> None:
    """Norm and 16 entries spread over the tensor. The key third of attn.qkv.bias, without true gradient, is out."""
    assert set(golden.keys(prefix)) == set(tensors), prefix
    for key, t in tensors.items():
        if key.endswith("attn.qkv.bias"):
            t = torch.cat([t[: len(t) // 3], t[2 * len(t) // 3 :]])
        expected, flat = golden[prefix + key], t.flatten()
        ours = torch.cat([flat.norm()[None], flat[:: max(len(flat) // 16, 1)][:16]])
        assert_close(ours[:1], expected[:1], atol + rtol * expected[0].item(), prefix + key)
        assert_close(ours[1:], expected[1:], atol + rtol * expected[1:].abs().max().item(), prefix + key)


def golden_schedule(now: dict) -> dict:
    return dict(lr=now["lr"], last_layer_lr=now["last_layer_lr"], weight_decay=now["wd"], momentum=now["mom"],
                teacher_temp=now["teacher_temp"])


def check_losses(prefix: str, ours: dict[str, torch.Tensor]) -> None:
    """The official log halves koleo and ibot; what it minimizes does not."""
    names = {"dino_local_crops_loss": ("dino_local", 1), "dino_global_crops_loss": ("dino_global", 1),
             "ibot_loss": ("ibot", 2), "koleo_loss": ("koleo", 2)}
    logged = [k for k in golden.keys(prefix) if "/" not in k]
    assert {names[k][0] for k in logged} == {k for k in ours if "grad_norm" not in k}
    for key in logged:
        name, factor = names[key]
        assert_close(ours[name], factor * golden[prefix + key], 1e-5, prefix + key)


@pytest.fixture
def tiny_arch(monkeypatch):
    monkeypatch.setitem(model.ARCHS, "tiny", TINY_ARCH)


@pytest.mark.parametrize("case,switches", [(case, {}) for case in golden.json("train/override")] + [
    ("centering_shared", dict(compile=True, activation_checkpointing="selective")),
    ("sinkhorn_separate", dict(compile=True, activation_checkpointing="full"))])
def test_train_steps_golden(case, switches, tiny_arch, monkeypatch):
    """Also compiled, recomputed, and with losses in parts of two rows or one."""
    cfg = dataclasses.replace(golden_config(case, 4), **switches)
    student, teacher = golden_networks(cfg)
    if switches:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
        monkeypatch.setattr(losses, "CHUNK_ELEMENTS", dict(cpu=80))
        train.compiled.cache_clear()
        alone = types.SimpleNamespace(size=lambda: 1)
        train.shard(student, alone, torch.float32, cfg.activation_checkpointing, cfg.compile)
        train.shard(teacher, alone, torch.float32, compile_blocks=True, with_backward=False)
    optimizer = torch.optim.AdamW(train.param_groups(student, cfg), lr=0.0, betas=cfg.betas, fused=True)
    centers, generator, clip = train.build_centers(cfg, CPU), torch.Generator().manual_seed(61), train.clip_gradients
    for step, now in enumerate(golden.json("train/sched")):
        gradients = {}

        def record_then_clip(*arguments):
            gradients.update({k: p.grad.clone() for k, p in student.named_parameters() if p.grad is not None})
            return clip(*arguments)

        monkeypatch.setattr(train, "clip_gradients", record_then_clip)
        torch.manual_seed(1000 + step)  # the dropped paths
        batch = golden_batch(generator, golden[f"train/masks/{step}"])
        ours, finite = train.train_step(student, teacher, [optimizer], [batch], cfg, golden_schedule(now), centers)
        assert finite
        check_losses(f"train/{case}/{step}/", ours)
        for part in golden.keys(f"train/{case}/{step}/norm/"):
            expected = golden[f"train/{case}/{step}/norm/{part}"].item()
            assert ours[f"grad_norm/{part}"].item() == pytest.approx(expected, rel=1e-5)
        if step == 0:
            check_fingerprints(f"train/{case}/grads/", gradients, rtol=1e-4, atol=1e-6)
    check_fingerprints(f"train/{case}/student/", student.state_dict(), rtol=1e-5, atol=1e-4)
    check_fingerprints(f"train/{case}/teacher/", teacher.state_dict(), rtol=1e-5, atol=2e-5)


def two_process_checks(rank: int, folder: str) -> None:
    """Run by two processes: the official two-rank losses and steps, sharded by FSDP2, and the joined-batch rule."""
    model.ARCHS["tiny"] = TINY_ARCH
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", 2), rank=rank, world_size=2)
    logits, patches = losses_in("teacher_logits"), losses_in("teacher_patch")
    rows, own = slice(4 * rank, 4 * rank + 4), slice(6) if rank == 0 else slice(6, 16)
    prefix = f"losses/world2/{rank}/"
    assert_close(losses.sinkhorn_knopp(logits[0][rows], TEMP), golden[prefix + "dino_sk"], 1e-6)
    assert_close(losses.sinkhorn_knopp(patches[0][own], TEMP), golden[prefix + "ibot_sk"], 1e-6)
    center, joined = torch.zeros(24), torch.zeros(24)
    for z in logits:
        losses.update_center(center, losses.center_total(z[rows]))
    assert_close(center, golden[prefix + "dino_center_final"].flatten(), 1e-6)
    center.zero_()
    for z in patches:  # ranks with 6 and 10 rows: the mean over all 16
        losses.update_center(center, losses.center_total(z[own]))
        joined = 0.9 * joined + 0.1 * z.mean(0)
    assert_close(center, joined, 1e-6)

    mesh = dist.init_device_mesh("cpu", (2,))
    for case in ("centering_shared", "sinkhorn_separate"):
        cfg = golden_config(case, 3)
        student, teacher = golden_networks(cfg)
        train.shard(student, mesh, torch.float32)
        train.shard(teacher, mesh, torch.float32, with_backward=False)
        optimizer = torch.optim.AdamW(train.param_groups(student, cfg), lr=0.0, betas=cfg.betas, fused=True)
        centers, generator = train.build_centers(cfg, CPU), torch.Generator().manual_seed(71)
        for step, now in enumerate(golden.json("train2/sched")):
            batches = [golden_batch(generator, golden[f"train2/masks/{step}/{r}"]) for r in range(2)]
            ours, _ = train.train_step(student, teacher, [optimizer], batches[rank : rank + 1], cfg, golden_schedule(now),
                                       centers)
            check_losses(f"train2/{case}/{step}/{rank}/", ours)
            for part in golden.keys(f"train2/{case}/{step}/norm/"):
                expected = golden[f"train2/{case}/{step}/norm/{part}"].item()
                assert ours[f"grad_norm/{part}"].item() == pytest.approx(expected, rel=1e-5)
        for name, network in dict(student=student, teacher=teacher).items():
            weights = {k: v.full_tensor() for k, v in network.state_dict().items()}
            check_fingerprints(f"train2/{case}/{name}/", weights, rtol=1e-5, atol=1e-4)
    Path(folder, f"passed{rank}").touch()
    dist.barrier()
    dist.destroy_process_group()


def test_train_two_processes_golden(tmp_path):
    torch.multiprocessing.spawn(two_process_checks, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "passed0").exists() and (tmp_path / "passed1").exists()


# ----------------------------------------------------------------------------------------------------------------------
# train.py: the program


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A finished tiny run on the digits, with k-NN, exports and saves."""
    out = tmp_path_factory.mktemp("trained") / "out"
    train_main(*TINY, "--steps", 4, "--out", out, "--eval-every", 2, "--export-every", 3, "--save-every", 2)
    return out


def test_train_writes_what_it_promises(trained, capsys):
    assert sorted(p.name for p in trained.iterdir()) == [
        "ckpt.pth", "config.json", "eval", "first_batch.png", "metrics.jsonl", "resume"]
    assert (trained / "eval/training_2/teacher_checkpoint.pth").exists()
    assert sorted(p.name for p in (trained / "resume").iterdir()) == [f"step_00000000{i}" for i in (2, 3, 4)]
    records = metrics(trained)
    lines, knn = [r for r in records if "loss" in r], {r["step"]: r["knn"] for r in records if "knn" in r}
    assert [r["step"] for r in lines] == [0, 1, 2, 3] and list(knn) == [0, 2, 4]
    assert records[0]["knn_raw_pixels"]["top1_k20"] == 97.5
    expected = {"step", "loss", "dino_local", "dino_global", "ibot", "koleo", "grad_norm/backbone",
                "grad_norm/dino_head",
                "lr", "last_layer_lr", "weight_decay", "momentum", "teacher_temp", "bad_samples", "skipped_steps"}
    assert all(r.keys() == expected for r in lines)
    for r in lines:
        assert r["loss"] == pytest.approx(r["dino_local"] + r["dino_global"] + r["ibot"] + r["koleo"])


def test_train_checkpoint_describes_itself(trained):
    ckpt = torch.load(trained / "ckpt.pth", weights_only=True)
    assert ckpt["step"] == 4 and ckpt["preset"] == "digits" and ckpt["format"] == 1
    assert train.Config(**ckpt["config"]).batch_size == 8
    network = train.build_network(train.Config(**ckpt["config"]))
    network.load_state_dict(ckpt["teacher"])  # strict, and plain tensors
    backbone = model.load_backbone(str(trained / "ckpt.pth"))
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(backbone(images), network["backbone"].eval()(images))


def saved_tensors(save: Path, tmp_path: Path) -> dict[str, torch.Tensor]:
    """Student, teacher, both moments, centers of a save, as one flat dict."""
    dcp.format_utils.dcp_to_torch_save(str(save), tmp_path / "whole.pth")
    tree = torch.load(tmp_path / "whole.pth", weights_only=True)
    return {f"{part}.{name}": t for part, tensors in tree.items() for name, t in tensors.items()}


def test_train_resumes_to_the_bit(trained, tmp_path):
    """4 steps = 2 steps, a fresh start from what was saved, 2 steps: weights, optimizer, metrics."""
    out = tmp_path / "out"
    shutil.copytree(trained, out)
    shutil.rmtree(out / "resume/step_000000004")
    shutil.rmtree(out / "eval")
    (out / "ckpt.pth").unlink()
    train_main(*TINY, "--steps", 4, "--out", out, "--eval-every", 2, "--export-every", 3, "--save-every", 2)
    straight, resumed = (torch.load(p / "ckpt.pth", weights_only=True)["teacher"] for p in (trained, out))
    assert all(torch.equal(straight[k], resumed[k]) for k in straight)
    assert metrics(trained) == metrics(out)
    saves = [saved_tensors(p / "resume/step_000000004", tmp_path) for p in (trained, out)]
    assert len(saves[0]) > 200 and all(torch.equal(saves[0][k], saves[1][k]) for k in saves[0])


def test_train_repeated_command_is_a_no_op(trained, capsys):
    before = (trained / "ckpt.pth").stat().st_mtime_ns, metrics(trained)
    train_main(*TINY, "--steps", 4, "--out", trained, "--eval-every", 2, "--export-every", 3, "--save-every", 2)
    assert (trained / "ckpt.pth").stat().st_mtime_ns == before[0] and metrics(trained) == before[1]
    assert capsys.readouterr().out.splitlines()[-1].startswith("k-NN top-1 (k=20): trained teacher ")


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "centering"])
def test_train_two_processes_equal_one(centering, tmp_path):
    """The same global batch on 1 and on 2 processes: the same losses, gradient norms and final weights."""
    flags = [*TINY, "--steps", 3, "--centering", centering]
    train_main(*flags, "--out", tmp_path / "one")
    Launched(tmp_path / "log", train.main, *flags, "--out", tmp_path / "two", world=2).wait()
    for one, two in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert one == pytest.approx(two, rel=2e-4, abs=1e-6)
    one, two = (torch.load(tmp_path / d / "ckpt.pth", weights_only=True)["teacher"] for d in ("one", "two"))
    worst = max((one[k] - two[k]).abs().max().item() for k in one if not k.endswith("qkv.bias"))
    assert worst < 1e-3, worst
    # and the saved state of two processes continues on one
    train_main(*flags, "--steps", 4, "--out", tmp_path / "two", "--resume")
    assert [r["step"] for r in metrics(tmp_path / "two")] == [0, 1, 2, 3]


def test_train_counts_and_lists_bad_images(tmp_path, cache, capsys):
    """Each once, with the reason, also after a resume and by two processes; too many stop the run, saved."""
    write_images(tmp_path / "p", [f"{i:02}.png" for i in range(20)])
    for name in ("03.png", "11.png"):
        (tmp_path / "p" / name).write_bytes(b"damaged")
    out = tmp_path / "out"
    flags = [*TINY, "--data", tmp_path / "p", "--steps", 20, "--save-every", 3, "--max-bad-share", 0.3, "--out", out]
    train_main(*flags)
    lines = (out / "bad_samples.txt").read_text().splitlines()
    assert sorted(Path(line.split("\t")[0]).name for line in lines) == ["03.png", "11.png"]
    assert all("cannot identify" in line for line in lines)
    counted = metrics(out)[-1]["bad_samples"]
    assert 16 <= counted <= 30  # eight passes over 20 images, now and then a bad one for a bad one
    shutil.rmtree(out / "resume/step_000000020")
    train_main(*flags, "--num-workers", 2)  # again from step 3
    assert (out / "bad_samples.txt").read_text().splitlines() == lines and metrics(out)[-1]["bad_samples"] == counted
    Launched(tmp_path / "log", train.main, *flags[:-1], tmp_path / "two", world=2).wait()
    assert sorted((tmp_path / "two/bad_samples.txt").read_text().splitlines()) == sorted(lines)
    assert metrics(tmp_path / "two")[-1]["bad_samples"] == counted
    for i in range(12):
        (tmp_path / "p" / f"{i:02}.png").write_bytes(b"")
    os.rename(tmp_path / "p" / "11.png", os.fsencode(tmp_path) + b"/p/\xff\n\t.png")  # no UTF-8, no single line
    with pytest.raises(train.TooManyBad, match=r"\d+% of the images .* --max-bad-share"):
        train_main(*flags[:-1], tmp_path / "bad")
    assert (tmp_path / "bad/resume/step_000000013").exists()  # 104 samples; fewer prove nothing
    assert len((tmp_path / "bad/bad_samples.txt").read_bytes().splitlines()) == 12
    with pytest.raises(SystemExit) as stop:
        train.main([str(a) for a in [*flags[:-1], tmp_path / "bad2"]])
    error = capsys.readouterr().err
    dist.destroy_process_group()
    assert stop.value.code == 2 and error.strip().splitlines()[-1].startswith("error: ")
    train_main(*flags[:-1], tmp_path / "bad", "--max-bad-share", 0.9)


def test_train_images_that_vanish_end_the_run_with_one_line(tmp_path, cache):
    write_images(tmp_path / "p", ["1.png", "2.png"])
    flags = [*TINY, "--num-workers", 1, "--data", tmp_path / "p", "--steps", 2, "--out", tmp_path / "out"]
    text = Launched(tmp_path / "log", train.main, *flags, before=partial(take_away, tmp_path / "p")).wait(2)
    assert "error: 50 images in a row could not be read" in text and "Traceback" not in text


def take_away(folder: Path) -> None:
    claim = train.claim_output
    train.claim_output = lambda *a: (claim(*a), shutil.rmtree(folder))


@pytest.mark.parametrize("channels", [1, 4])
def test_train_other_channels(channels, tmp_path, cache, capsys):
    """From 16-bit gray or RGBA files to a checkpoint that the evaluation understands without flags."""
    rng = np.random.default_rng(0)
    for i in range(16):
        path = tmp_path / "p" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        deep = rng.integers(0, 4096, (20, 24), dtype=np.uint16)
        Image.fromarray(deep if channels == 1 else rng.integers(0, 256, (20, 24, 4), dtype=np.uint8)).save(path)
    with pytest.raises(ValueError, match=r"--mean has 2 values, --in-chans is .* python data.py stats"):
        train_main(*TINY, "--data", tmp_path / "p", "--in-chans", channels, "--mean", 0.1, 0.2, "--out", tmp_path / "o")
    data.main(["stats", str(tmp_path / "p"), "--in-chans", str(channels), "--num-workers", "0"])
    measured = capsys.readouterr().out.split()
    assert channels == 4 or 0.025 < float(measured[1]) < 0.037  # 12 bits of 16
    train_main(*TINY, "--data", tmp_path / "p", "--in-chans", channels, *measured, "--steps", 2, "--eval-every", 2,
               "--out", tmp_path / "out")
    ckpt = torch.load(tmp_path / "out/ckpt.pth", weights_only=True)
    assert ckpt["model"]["in_chans"] == channels
    assert eval_knn.main([str(tmp_path / "out/ckpt.pth")]) == pytest.approx(metrics(tmp_path / "out")[-1]["knn"])


def test_train_says_when_shared_memory_is_short(monkeypatch, tmp_path):
    monkeypatch.setattr(train.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**26, 0, 2**26))
    cfg = train.Config(batch_size=256, num_workers=8)
    if Path("/dev/shm").is_dir():
        with pytest.raises(ValueError, match="64 MB free, batches in the making need \\d+ MB; start the container"):
            train.check_shared_memory(cfg, 1)
    train.check_shared_memory(dataclasses.replace(cfg, num_workers=0), 1)


def test_train_init_starts_from_a_checkpoint(trained, tmp_path):
    train_main(*TINY, "--steps", 1, "--lr", 0, "--min-lr", 0, "--out", tmp_path / "out", "--init", trained / "ckpt.pth")
    start, after = (torch.load(p / "ckpt.pth", weights_only=True)["teacher"] for p in (trained, tmp_path / "out"))
    assert all(torch.allclose(start[k], after[k], atol=1e-6) for k in start if k.startswith("backbone."))
    assert not torch.allclose(start["dino_head.last_layer.weight_v"], after["dino_head.last_layer.weight_v"])


def test_train_bf16_and_recomputation(tmp_path):
    """Recomputing blocks, or the cheap part of them, changes nothing; bfloat16 changes the losses by its rounding."""
    losses_of = {}
    for name, flags in dict(plain=[], again=["--activation-checkpointing", "full"], some=["--activation-checkpointing", "selective"],
                            bf16=["--dtype", "bf16"]).items():
        train_main(*TINY, "--steps", 2, "--out", tmp_path / name, "--drop-path-rate", 0.3, *flags)
        losses_of[name] = [r["loss"] for r in metrics(tmp_path / name)]
    assert losses_of["plain"] == losses_of["again"] == losses_of["some"]
    assert losses_of["plain"] != losses_of["bf16"] and losses_of["plain"] == pytest.approx(losses_of["bf16"], rel=0.05)


def test_train_survives_half_a_line_of_metrics(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "out")
    with open(tmp_path / "out/metrics.jsonl", "a") as file:
        file.write('{"step": 4, "loss": 1.')
    flags = ["--eval-every", 2, "--export-every", 3, "--save-every", 2]
    train_main(*TINY, "--steps", 4, "--out", tmp_path / "out", *flags)
    assert metrics(tmp_path / "out") == metrics(trained)


def test_train_compiles_once(tmp_path, monkeypatch):
    """--compile: one whole graph for the student's blocks and one for the teacher's, with stochastic depth, with FSDP2
    around them, also with activation checkpointing, and three for the losses (local crops, global crops, patches); none
    after the first step, although the number of masked patches changes. The losses stay the same."""
    graphs = {}

    def count(graph, inputs):
        graphs.setdefault(name, []).append(len(metrics(tmp_path / name)) if (tmp_path / name).exists() else 0)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    for name, flags in dict(plain=[], whole=["--compile"], selective=["--compile", "--activation-checkpointing", "selective"],
                            blocks=["--compile", "--activation-checkpointing", "full"]).items():
        train.compiled.cache_clear()
        train_main(*TINY, "--steps", 4, "--log-every", 1, "--out", tmp_path / name, "--drop-path-rate", 0.3,
                   "--dtype", "bf16", *flags)
        assert graphs.get(name, []) == [0] * dict(plain=0, whole=5).get(name, 1)  # the teacher's and the losses' remain
        losses_of = [[r["loss"] for r in metrics(tmp_path / n)] for n in ("plain", name)]
        assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-3)  # bfloat16; in float32, see the golden steps
    train.compiled.cache_clear()


# ----------------------------------------------------------------------------------------------------------------------
# train.py: sharing weights among processes, and computing them anew


def on_machines_of(n: int) -> None:
    """Has the processes believe that each `n` of them are on a machine of their own; the last may hold fewer."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ |= dict(LOCAL_WORLD_SIZE=str(min(n, world - rank // n * n)), LOCAL_RANK=str(rank % n))


def test_shard_modes_equal_one_process_and_continue_each_other(tmp_path):
    """none, hybrid on two machines, full, grad, each going on from the save of the one before: losses, gradient norms
    and weights of one process, with clipping at work; and each state is saved once, whoever holds copies of it."""
    flags = [*TINY, "--steps", 8, "--drop-path-rate", 0.3, "--batch-size", 16, "--save-every", 5, "--clip-grad", 0.3]
    alone = Launched(tmp_path / "log1", train.main, *flags, "--out", tmp_path / "one")
    flags += ["--out", tmp_path / "many"]
    for mode, world, stop in (("ddp", 2, 2), ("hsdp", 4, 2), ("zero3", 2, 2), ("zero2", 4, None)):
        before = partial(on_machines_and_stop, stop)
        text = Launched(tmp_path / "log", train.main, *flags, "--sharding", mode, world=world, before=before).wait()
    assert re.findall(r"step (\d+) of 8, batch 16 on (\d)", text) == [("0", "2"), ("2", "4"), ("4", "2"), ("6", "4")]
    alone.wait()
    for one, many in zip(metrics(tmp_path / "one"), metrics(tmp_path / "many"), strict=True):
        assert one["grad_norm/backbone"] > 0.3 and one == pytest.approx(many, rel=1e-3, abs=1e-6)
    saves = sorted((tmp_path / "many/resume").iterdir())
    one, many = (saved_tensors(p, tmp_path) for p in (tmp_path / "one/resume/step_000000008", saves[-1]))
    worst = {k: (one[k] - many[k]).abs().max().item() for k in one if not k.endswith("qkv.bias")}
    assert one.keys() == many.keys() and max(worst.values()) < 2e-3, max(worst, key=worst.get)
    sizes = [sum(f.stat().st_size for f in save.glob("*.distcp")) for save in saves]
    assert max(sizes) < 1.5 * min(sizes)  # each tensor has a head of its own in a file


def test_shard_in_parts_equals_one_process(tmp_path):
    """Several copies of the weights, and a share in parts, of which the last adds up the gradients of all."""
    flags = [*TINY, "--steps", 3, "--batch-size", 16]
    alone = Launched(tmp_path / "log1", train.main, *flags, "--out", tmp_path / "one")
    sent = Launched(tmp_path / "log2", train.main, *flags, "--out", tmp_path / "many", "--gradient-accumulation-steps", 2, "--sharding", "ddp",
                    world=2, before=note_all_reduces)
    alone.wait()
    numbers = json.loads(re.search(r"all-reduces (\[.*\])", sent.wait())[1])
    for one, many in zip(metrics(tmp_path / "one"), metrics(tmp_path / "many"), strict=True):
        assert one == pytest.approx(many, rel=1e-4, abs=1e-6)
    assert len(numbers) == 6 and min(numbers[1::2]) > max(numbers[::2]) == 0


def note_all_reduces() -> None:
    """Has the first process print how often a large tensor was summed over processes in each backward pass."""
    backward, all_reduce, numbers = torch.Tensor.backward, dist.all_reduce, []

    def counted(tensor, *args, **kwargs):
        numbers[-1] += tensor.numel() > 1000
        return all_reduce(tensor, *args, **kwargs)

    def noted(loss):
        numbers.append(0)
        dist.all_reduce = counted
        backward(loss)
        dist.all_reduce = all_reduce
        if len(numbers) == 6 and dist.get_rank() == 0:
            print("all-reduces", numbers, flush=True)

    torch.Tensor.backward = noted


def on_machines_and_stop(step: int | None) -> None:
    on_machines_of(2)
    if step:
        stop_at(step)


def shards_checks() -> None:
    """Run by four processes on two machines: what each holds before, between and after the passes, in bytes."""
    cfg = train.Config(**train.PRESETS["digits"] | dict(
        batch_size=16, group_size=4, ibot_separate_head=True, ibot_head_n_prototypes=48, ibot_head_hidden_dim=32,
        ibot_head_bottleneck_dim=16))
    train.start_processes(CPU)
    batch = data.prepare(train.training_batches(cfg, data.open_source("digits"), dist.get_rank(), 4)[0], CPU)
    gradients = {}
    for mode, n_shards in dict(ddp=1, hsdp=2, zero2=4, zero3=4).items():
        torch.manual_seed(0)
        network, teacher = train.build_network(cfg), train.build_network(cfg).requires_grad_(False).eval()
        whole = {name: p.numel() for name, p in network.named_parameters()}
        mesh = train.share_mesh("cpu", mode)
        assert mesh.shape == ((4,) if n_shards == 4 else (4 // n_shards, n_shards))
        train.shard(network, mesh, torch.bfloat16, mode=mode)
        train.shard(teacher, mesh, torch.bfloat16, with_backward=False, mode=mode)
        assert train.n_replicas(network) * n_shards == 4
        held = {name: p.to_local() for name, p in network.named_parameters()}
        for name, p in held.items():  # rows are dealt out evenly; of single rows, the first process has them
            even = network.get_parameter(name).shape[0] % n_shards == 0
            assert p.dtype == torch.float32 and p.numel() in ([whole[name] // n_shards] if even else [0, whole[name]])

        (targets,), _ = train.teacher_targets(teacher, [batch], cfg, 0.05, {})
        loss, _ = train.step_losses(network, batch, targets, cfg)
        gathered = {name: not isinstance(p, train.DTensor) for name, p in network.named_parameters()}
        assert not any(not isinstance(p, train.DTensor) for p in teacher.parameters())  # or its mean would miss them
        assert all(kept == (mode != "zero3" or "_head." in name) for name, kept in gathered.items()), mode
        kinds = {(name.split(".")[0], p.dtype) for name, p in network.named_parameters() if gathered[name]}
        assert kinds - {("backbone", torch.bfloat16)} == {(h, torch.float32) for h in ("dino_head", "ibot_head")}
        loss.backward()
        assert all(isinstance(p, train.DTensor) for p in network.parameters())
        gradients[mode] = {name: p.grad.full_tensor() for name, p in network.named_parameters()}
    for mode, grads in gradients.items():
        for name, g in grads.items():  # added up in float32: in bfloat16, sums would have no more than 8 bits
            assert g.dtype == torch.float32 and torch.allclose(g, gradients["zero2"][name], rtol=1e-5, atol=1e-7), name
        fc1 = grads["backbone.blocks.0.mlp.fc1.weight"]
        assert (fc1.bfloat16() != fc1).float().mean() > 0.5, mode
    dist.barrier()
    dist.destroy_process_group()


def test_shard_modes_hold_what_they_should(tmp_path):
    Launched(tmp_path / "log", shards_checks, world=4, before=partial(on_machines_of, 2)).wait()


@pytest.mark.parametrize("ffn", ["mlp", "swiglu"])
def test_recompute_gives_the_same_gradients_in_less_memory(ffn):
    """Blocks that keep everything, matrix products and attention, nothing; plain, and compiled as one graph each."""
    def passes(way: str, compiled: bool):
        torch._dynamo.reset()  # it counts what it compiled before
        torch.manual_seed(0)
        cfg = train.Config(**train.PRESETS["digits"] | dict(ffn_layer=ffn, init_std=0.1))
        network = train.build_network(cfg, 0.3)
        train.shard(network, types.SimpleNamespace(size=lambda: 1), torch.float32, way)  # alone: nothing to share
        for block in network["backbone"].block_list() if compiled else ():
            block.compile(backend="aot_eager", fullgraph=True)
        images = [torch.randn(8, 3, 12, 12), torch.randn(16, 3, 8, 8)]
        orders = [torch.stack([torch.randperm(len(i))[None] for _ in range(6)]) for i in images]
        forward = partial(network["backbone"], images, is_training=True, drop_orders=orders)
        size = 0 if compiled else bench.kept_bytes(forward)
        sum(out["x_prenorm"].square().mean() for out in forward()).backward()
        return size, {name: p.grad for name, p in network["backbone"].named_parameters() if p.grad is not None}

    kept, expected = passes("none", False)
    sizes = [kept]
    for way, compiled in itertools.product(("selective", "blocks"), (False, True)):
        size, gradients = passes(way, compiled)
        assert gradients.keys() == expected.keys() and len(expected) > 30
        for name, g in gradients.items():
            assert_close(g, expected[name], 1e-5 if compiled else 0.0, f"{way} {name}")
        sizes += [] if compiled else [size]
    assert sizes[0] > 1.5 * sizes[1] > 3 * sizes[2], sizes


def test_shard_and_recompute_of_a_run_that_knew_neither(trained, tmp_path):
    """A run that began with the field recompute_blocks, or without --sharding, goes on, with any value of the two."""
    shutil.copytree(trained, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    config = {k: v for k, v in config.items() if k not in ("sharding", "activation_checkpointing")} | dict(recompute_blocks=True)
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    flags = ["--steps", 4, "--eval-every", 2, "--export-every", 3, "--save-every", 2, "--out", tmp_path / "out"]
    assert set_up_and_release(*TINY, *flags, "--sharding", "zero3", "--activation-checkpointing", "selective").start == 4


def test_shard_hsdp_wants_equal_machines(tmp_path):
    """One line on each process, and nothing is written."""
    flags = [*TINY, "--batch-size", 12, "--steps", 1, "--sharding", "hsdp", "--out", tmp_path / "out"]
    text = Launched(tmp_path / "log", train.main, *flags, world=3, before=partial(on_machines_of, 2)).wait(2)
    errors = [line for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3 and "--sharding hsdp wants as many processes on each machine" in errors[0]
    assert "take --sharding zero2" in errors[0] and not (tmp_path / "out").exists()
    for field, value, fix in (("sharding", "zero4", "did you mean zero"), ("activation_checkpointing", "ful", "did you mean full")):
        with pytest.raises(ValueError, match="--" + field.replace("_", "-") + f" .{value}., {fix}"):
            train.check(train.Config(**{field: value}), 1)


def test_train_compiles_blocks_of_rising_rates(monkeypatch):
    """Each block with a rate of stochastic depth of its own is a graph of its own, more of them than Dynamo allows."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setitem(model.ARCHS["vit_nano"], "depth", 12)
    torch._dynamo.reset()
    network = train.build_network(train.Config(**train.PRESETS["digits"] | dict(drop_path_uniform=False)), 0.3)
    train.shard(network, types.SimpleNamespace(size=lambda: 1), torch.float32, compile_blocks=True)
    orders = torch.stack([torch.randperm(8)[None] for _ in range(24)])
    out = network["backbone"](torch.randn(8, 3, 12, 12), is_training=True, drop_orders=orders)
    assert out["x_norm_clstoken"].shape == (8, 64)


def small_step(**changes):
    """A function that does training steps on the same small batch."""
    cfg = train.Config(**train.PRESETS["digits"] | dict(batch_size=8, group_size=4, num_workers=0) | changes)
    torch.manual_seed(0)
    student = train.build_network(cfg, cfg.drop_path_rate).train()
    teacher = train.build_network(cfg).eval().requires_grad_(False)
    optimizer, centers = torch.optim.AdamW(train.param_groups(student, cfg), fused=True), train.build_centers(cfg, CPU)
    batches = train.training_batches(cfg, data.open_source(cfg.data), 0, 1)
    parts = [data.prepare(batches[i], CPU) for i in range(cfg.gradient_accumulation_steps)]
    now = {k: float(v[100]) for k, v in train.schedules(cfg).items()}
    return partial(train.train_step, student, teacher, [optimizer], parts, cfg, now, centers)


@pytest.mark.parametrize("accum", [1, 2])
@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "centering"])
def test_train_targets_are_gone_before_the_backward_pass(centering, accum, monkeypatch):
    """They may be as large as the logits. With gradient accumulation, what is left can only compute rows again."""
    seen, left, backward = [], [], torch.Tensor.backward
    softmax_center, sinkhorn_knopp = losses.softmax_center, losses.sinkhorn_knopp

    def noted(rows):
        seen.append(weakref.ref(rows))
        return rows

    monkeypatch.setattr(losses, "softmax_center", lambda logits, **k: noted(softmax_center(logits, **k)))
    monkeypatch.setattr(losses, "sinkhorn_knopp", lambda logits, *args: [
        noted(x.map(noted)) for x in sinkhorn_knopp([noted(x.map(noted)) for x in logits], *args)])
    monkeypatch.setattr(torch.Tensor, "backward", lambda loss: (
        left.append([x() for x in seen if torch.is_tensor(x()) or accum == 1 and x()]), backward(loss)))
    small_step(centering=centering, gradient_accumulation_steps=accum)()
    assert len(seen) >= 2 and len(left) == accum and left[-1] == []


def twice(function):
    """function, whose result (tensor, or list of lazy rows) is doubled."""
    def doubled(*args, **kwargs):
        result = function(*args, **kwargs)
        return [x.map(lambda rows: 2 * rows) for x in result] if isinstance(result, list) else 2 * result
    return doubled


@pytest.mark.parametrize("compiled", [False, True])
def test_train_runs_the_documented_losses(compiled, monkeypatch):
    """Each function of losses.py, replaced there, changes just the terms of the loss that it should."""
    terms = ("dino_local", "dino_global", "ibot", "koleo")
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    for name, centering, changed in (
            ("dino_loss", "centering", terms[:2]), ("ibot_loss", "centering", terms[2:3]),
            ("koleo_loss", "centering", terms[3:]), ("cross_entropy", "centering", terms[:3]),
            ("softmax_center", "centering", terms[:3]), ("sinkhorn_knopp", "sinkhorn_knopp", terms[:3])):
        results = []
        for wrap in (lambda f: f, twice):
            with monkeypatch.context() as patch:
                patch.setattr(losses, name, wrap(getattr(losses, name)))
                step = small_step(centering=centering, compile=compiled)
                results.append({k: v.item() for k, v in step()[0].items()})
        before, after = results
        for term in terms:
            assert after[term] == pytest.approx(before[term] * (2 if term in changed else 1), rel=1e-5), name
        assert after["grad_norm/backbone"] != pytest.approx(before["grad_norm/backbone"], rel=1e-3), name
    train.compiled.cache_clear()


def test_train_step_does_not_wait_for_its_numbers(monkeypatch):
    """No number is fetched from the device during a step, which would make the host wait for it."""
    class NoFetch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            assert not any(word in str(function) for word in ("_local_scalar_dense", "nonzero", "masked_select"))
            return function(*args, **(kwargs or {}))

    for changes in (dict(centering="sinkhorn_knopp", gradient_accumulation_steps=2), dict(centering="centering", drop_path_rate=0.3),
                    dict(ibot_separate_head=True)):
        step = small_step(**changes)
        step()
        with NoFetch():
            step()
        with NoFetch(), pytest.raises(AssertionError):
            step()[0]["ibot"].item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_cuda_train_step_does_not_wait_for_the_gpu(tmp_path, monkeypatch):
    """As above, by the driver's own account, from the fourth step on."""
    step, number = train.train_step, itertools.count()

    def watched(*args):
        torch.cuda.set_sync_debug_mode("error" if next(number) >= 3 else "default")
        try:
            return step(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(train, "train_step", watched)
    train_main(*TINY, "--device", "cuda", "--steps", 6, "--out", tmp_path / "out")
    assert next(number) == 6


def test_train_attention_by_a_kernel(monkeypatch):
    """A kernel is given what all crops of a block need, once per block, and its result is used."""
    calls = []

    def kernel(qkv, batches, lengths, scale):  # as kernels/attention.py, by PyTorch
        calls.append((qkv.shape, batches, lengths))
        outs = []
        for part, b, n in zip(qkv.split([b * n for b, n in zip(batches, lengths)]), batches, lengths):
            q, k, v = part.view(b, n, *qkv.shape[1:]).permute(2, 0, 3, 1, 4)
            outs.append(torch.softmax(q @ k.mT * scale, -1).matmul(v).transpose(1, 2).flatten(0, 1))
        return torch.cat(outs)

    results = []
    for with_kernel in (False, True):
        step = small_step(drop_path_rate=0.3)
        for block in [b for network in step.args[:2] for b in network["backbone"].block_list()] * with_kernel:
            block.attn.kernel = kernel
        step()
        results.append([{k: v.item() for k, v in step()[0].items()}, *step.args[0].parameters()])
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-4)
    assert len(calls) == 2 * 2 * 3  # steps, networks, blocks
    assert calls[0] == ((16 * 10, 3, 2, 32), [16], [10]) and calls[3] == ((10 * 10 + 10 * 5, 3, 2, 32), [10, 10], [10, 5])


FIELD_CHANGES = dict(  # every field of Config, with a value that must change something in a two-step run
    in_chans=1, mean=(0.4, 0.5, 0.4), std=(0.2, 0.2, 0.3), max_bad_share=0.5,
    data="digits:split=VAL", eval_train="digits:split=VAL", eval_val="digits:split=TRAIN", eval_resize=24, eval_crop=8,
    batch_size=16, group_size=2, num_workers=1, seed=1, global_crops_size=16, global_crops_scale=(0.2, 0.5),
    local_crops_number=3, local_crops_size=12, local_crops_scale=(0.1, 0.2), flip_prob=1.0, jitter_prob=0.1,
    jitter=(0.1, 0.4, 0.2, 0.1), gray_prob=1.0, blur_probs=(1.0, 1.0, 1.0), solarize_prob=1.0, arch="vit_micro",
    patch_size=2, ffn_layer="swiglu", qkv_bias=False, proj_bias=False, ffn_bias=False, layerscale=0.1,
    drop_path_rate=0.5, drop_path_uniform=False, num_register_tokens=2, interpolate_antialias=True,
    interpolate_offset=0.0, init_std=0.05, pos_embed_std=0.3, init="", head_n_prototypes=64, head_bottleneck_dim=16,
    head_nlayers=2, head_hidden_dim=64, ibot_separate_head=True, ibot_head_n_prototypes=48, ibot_head_bottleneck_dim=24,
    ibot_head_nlayers=1, ibot_head_hidden_dim=40, dino_loss_weight=0.5, ibot_loss_weight=0.5, koleo_loss_weight=0.5,
    mask_sample_probability=0.25, mask_ratio_min_max=(0.5, 0.7), centering="centering", momentum_teacher=0.5,
    final_momentum_teacher=0.5, warmup_teacher_temp=0.05, teacher_temp=0.09, warmup_teacher_temp_steps=4, steps=4,
    warmup_steps=0, lr=1e-3, min_lr=1e-3, weight_decay=0.5, weight_decay_end=0.5, layerwise_decay=0.5,
    patch_embed_lr_mult=0.1, clip_grad=0.01, freeze_last_layer_steps=2, betas=(0.5, 0.6), device="cpu", dtype="bf16",
    compile=True, kernels=True, activation_checkpointing="full", sharding="zero3", gradient_accumulation_steps=2, deterministic=True, out="", log_every=2, eval_every=2,
    export_every=1,
    save_every=1, save_minutes=1e-9, save_patience=1.0, keep=1, max_nonfinite=1)
NO_EFFECT_BY_DESIGN = {  # other tests use them: nothing may change
    "num_workers", "device", "activation_checkpointing", "sharding", "max_bad_share"}
ELSEWHERE = {  # tests of their own
    "init", "out", "compile", "kernels", "gradient_accumulation_steps", "deterministic", "save_minutes", "save_patience", "max_nonfinite"}


def observe(cfg: train.Config, out: Path) -> tuple:
    """All that a run leaves behind, but for timings and the config itself."""
    argv = []
    for name, value in dataclasses.asdict(cfg).items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            argv += [f"--{flag}" if value else f"--no-{flag}"]
        else:
            argv += [f"--{flag}", *(value if isinstance(value, tuple) else [value])]
    train_main(*argv, "--out", out)
    weights = torch.load(out / "ckpt.pth", weights_only=True)["teacher"]
    files = sorted(str(p.relative_to(out)) for p in [*out.rglob("*.pth"), *out.glob("resume/*")])
    lines = metrics(out)
    shutil.rmtree(out)
    return lines, files, {k: (tuple(v.shape), v.double().sum().item()) for k, v in weights.items()}


def save_names_alone() -> None:
    """For a process that calls observe(): only the names of saves are looked at, and writing them takes long. PyTorch's
    pool of threads, lost in the fork, is made anew by one thread: by those of a backward pass at once, it would abort."""
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of the workers of loaders
    train.dcp.save = lambda *a, checkpoint_id, **k: Path(checkpoint_id, ".metadata").touch()


def observe_all(configs: list, folder: Path) -> dict:
    """{config: what observe() sees}, by two processes."""
    with ProcessPoolExecutor(2, FORKS, save_names_alone) as pool:
        futures = {pool.submit(observe, cfg, folder / str(i)): cfg for i, cfg in enumerate(configs)}
        return {futures[future]: future.result() for future in as_completed(futures)}


def test_train_every_field_has_an_effect(tmp_path):
    assert FIELD_CHANGES.keys() == {f.name for f in dataclasses.fields(train.Config)}
    base = train.Config(**train.PRESETS["digits"] | dict(
        batch_size=8, group_size=4, steps=3, warmup_steps=1, num_workers=0, log_every=1, drop_path_rate=0.3,
        gray_prob=0.2, freeze_last_layer_steps=0,
        jitter=(0.4, 0.4, 0.2, 0.1), warmup_teacher_temp_steps=2, patch_embed_lr_mult=0.5, save_every=2, keep=3))
    need = {f: dict(ibot_separate_head=True) for f in FIELD_CHANGES if f.startswith("ibot_head")}
    need |= {f: dict(eval_every=1) for f in FIELD_CHANGES if f.startswith("eval_")}
    base, pairs = dataclasses.replace(base, eval_every=0), {}
    for name, value in FIELD_CHANGES.items():
        if name not in ELSEWHERE:
            before = dataclasses.replace(base, **need.get(name, {}))
            assert getattr(before, name) != value or name in NO_EFFECT_BY_DESIGN, name
            pairs[name] = before, dataclasses.replace(before, **{name: value})
    runs = observe_all(list(dict.fromkeys(itertools.chain.from_iterable(pairs.values()))), tmp_path)
    for name, (before, after) in pairs.items():
        assert (runs[before] != runs[after]) == (name not in NO_EFFECT_BY_DESIGN), name


# ----------------------------------------------------------------------------------------------------------------------
# train.py: no run is lost


SLOW = pytest.mark.skipif("SLOW" not in os.environ, reason="takes minutes: SLOW=1 runs it")
LASTING = (*TINY, "--steps", 14, "--log-every", 3, "--save-every", 2, "--eval-every", 7, "--export-every", 5,
           "--centering", "centering", "--drop-path-rate", 0.3, "--keep", 4)


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


@pytest.mark.parametrize("seed", [pytest.param(s, marks=SLOW if s > 2 else ()) for s in range(20)])
def test_resume_after_sigkill_at_random_moments_is_exact(seed, straight, tmp_path):
    """Three kills per run, one of them in the middle of a save: in the end every bit is there."""
    expected, seconds = straight
    rng, out = random.Random(seed), tmp_path / "out"
    moments = [rng.uniform(0.2, 1.0) * seconds, "save", rng.uniform(0.2, 0.8) * seconds]
    rng.shuffle(moments)
    kill_until_done(moments, tmp_path, out)
    Launched(tmp_path / "log", train.main, *LASTING, "--out", out).wait()
    assert same(everything(out, tmp_path), expected)
    assert not (out / "lock").exists() and not list(out.glob("resume/partial*"))


@pytest.mark.parametrize("name,world", [("SIGTERM", 2), ("SIGUSR1", 1), ("SIGINT", 1)])
def test_resume_after_signals(name, world, straight, tmp_path):
    """The step is finished, all is saved, the exit code is 0, and the command that continues is printed; to several
    processes it is enough to tell one. Scheduler's signals to the loader's workers do no harm."""
    out, log = tmp_path / "out", tmp_path / "log"
    job = Launched(log, train.main, *LASTING, "--num-workers", 1, "--out", out, world=world, before=slowly)
    job.until("saved step 4")
    os.kill(int(children(job.processes[0])[0]), getattr(signal, name))
    job.signal(getattr(signal, name), rank=world - 1)
    text = job.wait()
    done = int(re.search(rf"{name if world == 1 else ''}.* after step (\d+) of 14: all is saved", text)[1])
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
    train.dcp.save = lambda *a, **k: (print("saving", flush=True), time.sleep(1000))
    train.StopSignals.ECHO = 1.0  # so that a machine that stalls for half a second does no harm


def stop_at(step: int) -> None:
    """A run that is asked to stop so that it does after `step` of its steps."""
    train_step, calls = train.train_step, itertools.count(2)  # one step later all know
    train.train_step = lambda *a: (next(calls) == step and signal.raise_signal(signal.SIGTERM), train_step(*a))[1]


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "centering"])
def test_resume_on_other_numbers_of_processes(centering, tmp_path):
    """1 -> 2 -> 1 processes, then 2 with 2 parts each: the losses and the weights of one process but for rounding, also
    with stochastic depth (test_data_… show that samples, crops, masks and dropped rows are the same to the bit)."""
    log, flags = tmp_path / "log", [*TINY, "--steps", 12, "--drop-path-rate", 0.3, "--batch-size", 16, "--save-every",
                                    5, "--centering", centering]
    alone = Launched(tmp_path / "log1", train.main, *flags, "--out", tmp_path / "one")
    flags += ["--out", tmp_path / "many"]
    for before, argv, world in ((partial(stop_at, 3), [], 1), (partial(stop_at, 3), [], 2), (partial(stop_at, 3), [], 1),
                                (None, ["--gradient-accumulation-steps", 2], 2)):
        text = Launched(log, train.main, *flags, *argv, world=world, before=before).wait()
    assert re.findall(r"step (\d+) of 12, batch 16 on (\d)", text) == [("0", "1"), ("3", "2"), ("6", "1"), ("9", "2")]
    alone.wait()
    for one, many in zip(metrics(tmp_path / "one"), metrics(tmp_path / "many"), strict=True):
        assert one == pytest.approx(many, rel=1e-3, abs=1e-6)
    one, many = (torch.load(tmp_path / d / "ckpt.pth", weights_only=True)["teacher"] for d in ("one", "many"))
    worst = max((one[k] - many[k]).abs().max().item() for k in one if not k.endswith("qkv.bias"))
    assert worst < 2e-3, worst


@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "centering"])
@pytest.mark.parametrize("separate", [False, True])
def test_accumulation_gives_what_one_part_gives(centering, separate):
    """Losses, gradient norms, centers and weights of two steps in 1, 2 and 4 parts; and memory is what it saves."""
    def steps(accum: int):
        cfg = train.Config(**train.PRESETS["digits"] | dict(
            batch_size=16, group_size=4, gradient_accumulation_steps=accum, centering=centering, ibot_separate_head=separate, steps=4,
            warmup_steps=0, drop_path_rate=0.4, ibot_head_hidden_dim=32, ibot_head_n_prototypes=48))
        torch.manual_seed(0)
        student, teacher = train.build_network(cfg, cfg.drop_path_rate).train(), train.build_network(cfg).eval()
        teacher.load_state_dict(student.state_dict())
        optimizer = torch.optim.AdamW(train.param_groups(student, cfg), lr=0.0, fused=True)
        centers, schedule = train.build_centers(cfg, CPU), train.schedules(cfg)
        batches, results = train.training_batches(cfg, data.open_source("digits"), 0, 1), []
        for step in range(2):
            parts = [data.prepare(batches[step * accum + i], CPU) for i in range(accum)]
            now = {k: float(v[step]) for k, v in schedule.items()}
            results.append(train.train_step(student, teacher, [optimizer], parts, cfg, now, centers)[0])
        return results, centers, student.state_dict() | teacher.state_dict()

    (losses_1, centers_1, weights_1), others = steps(1), [steps(2), steps(4)]
    for results, centers, weights in others:
        for a, b in zip(losses_1, results):
            assert a.keys() == b.keys() and all(b[k].item() == pytest.approx(a[k].item(), rel=1e-4) for k in a)
        for name in centers:
            assert_close(centers[name], centers_1[name], 1e-5, name)
        for name in weights:
            if not name.endswith("qkv.bias"):
                assert_close(weights[name], weights_1[name], 2e-3, name)


def test_resume_from_what_is_whole(trained, tmp_path, capsys):
    """Each file of the newest save truncated, changed, zeroed, emptied, deleted: never used, always the one before;
    and the damaged one is put aside by the next save."""
    flags = [*TINY, "--steps", 4, "--eval-every", 2, "--export-every", 3, "--save-every", 2]
    harm = dict(
        truncated=lambda p: os.truncate(p, p.stat().st_size // 2), zeroed=lambda p: p.write_bytes(bytes(p.stat().st_size)),
        changed=lambda p: p.write_bytes(p.read_bytes()[:-9] + b"?" + p.read_bytes()[-8:]), deleted=Path.unlink,
        empty=lambda p: p.write_bytes(b""))
    whole, out = tmp_path / "whole", tmp_path / "out"
    shutil.copytree(trained, whole)
    for name in ("complete", ".metadata", "__0_0.distcp"):
        for how, damage in harm.items():
            shutil.rmtree(out, ignore_errors=True)
            shutil.copytree(whole, out)
            damage(out / "resume/step_000000004" / name)
            state = set_up_and_release(*flags, "--out", out)
            assert state.start == 3 and state.damaged == ["step_000000004"], (name, how)
            assert f"step_000000004 is damaged ({name}" in capsys.readouterr().err or name == "complete", (name, how)
    for save in (out / "resume").iterdir():  # the last is not enough
        (save / "complete").unlink()
    with pytest.raises(ValueError, match="no save in .* is whole; copy .*, then start anew with --overwrite"):
        set_up_and_release(*flags, "--out", out)
    shutil.rmtree(out)
    shutil.copytree(whole, out)
    (out / "resume/step_000000004/complete").unlink()
    (out / "resume/step_000000003/__0_0.distcp").write_bytes(b"")
    train_main(*flags, "--out", out)
    assert same(everything(out, tmp_path), everything(trained, tmp_path) | dict(files=everything(out, tmp_path)["files"]))
    names = sorted(p.name for p in (out / "resume").iterdir())
    assert names[2:] == ["step_000000002", "step_000000003", "step_000000004"]
    assert [n[:22] for n in names[:2]] == ["damaged_step_000000003", "damaged_step_000000004"]


def set_up_and_release(*argv) -> train.Run:
    try:
        state = train.set_up([str(a) for a in argv])
        state.lock.release()
        return state
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def test_saves_show_the_step_they_began_at_while_training_goes_on(tmp_path, monkeypatch):
    """A writer that takes longer than the next steps: nothing of these gets into the save, and they do not wait."""
    flags = [*TINY, "--steps", 6, "--save-every", 3, "--keep", 2]
    train_main(*flags, "--out", tmp_path / "quick")
    began, calls, save, step = [], [], train.dcp.save, train.train_step

    def slow_save(*args, **options):
        began.append(len(calls))
        if len(began) == 1:
            while len(calls) < 6:
                time.sleep(0.01)
        return save(*args, **options)

    def counted(*args):
        calls.append(1)
        if len(calls) == 5:
            wait_for(lambda: began)  # else a thread that starts late would find the last step done
        return step(*args)

    monkeypatch.setattr(train.dcp, "save", slow_save)
    monkeypatch.setattr(train, "train_step", counted)
    train_main(*flags, "--out", tmp_path / "slow")
    assert 3 <= began[0] < 6 and began[1] == 6
    for name in ("step_000000003", "step_000000006"):
        quick, slow = (saved_tensors(tmp_path / d / "resume" / name, tmp_path) for d in ("quick", "slow"))
        assert same(quick, slow)


def saving() -> bool:
    """Whether a save of a run in this process is under way."""
    return any(thread.name.endswith("(write)") for thread in threading.enumerate())


def test_saves_by_minutes(tmp_path, monkeypatch):
    step = train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: (wait_for(lambda: not saving()), step(*a))[1])
    train_main(*TINY, "--steps", 6, "--save-minutes", 1e-9, "--keep", 9, "--out", tmp_path / "out")
    steps = sorted(int(p.name[5:]) for p in (tmp_path / "out/resume").iterdir())
    assert steps == [2, 4, 6]  # asked for at the end of one step, heard at the end of the next


def test_saves_that_fail_are_retried(tmp_path, monkeypatch, capsys):
    """Something in the way of resume/: the run goes on, says so, and saves once it is gone; with no patience it ends,
    naming the last good save."""
    out, step, calls = tmp_path / "out", train.train_step, []
    monkeypatch.setattr(train.Saver, "RETRY", 0.0)

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
    assert "note: step 4 could not be saved (" in said and "the last good save is that of step 2" in said
    steps = sorted(int(p.name[5:]) for p in (out / "resume").iterdir())
    assert steps[0] == 2 and 4 not in steps and 6 not in steps and steps[-1] == 12
    assert (out / "eval/training_3/teacher_checkpoint.pth").exists()  # what was owed is written later
    assert torch.load(out / "eval/training_3/teacher_checkpoint.pth", weights_only=True)["step"] == 4

    monkeypatch.setattr(train, "train_step", step)
    os.rename(out / "resume/step_000000012", out / "away")
    (out / "resume").rename(out / "gone")
    (out / "resume").write_text("in the way")
    monkeypatch.setattr(train.TrainState, "load_newest", lambda *a: (dict(step=12), []))
    with pytest.raises(train.Failed, match="saving has failed for 0.001 minutes .* last good save is that of step 12; "):
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
    monkeypatch.setattr(train.Saver, "RETRY", 0.05)
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
    step, train.Saver.RETRY = train.train_step, 0.1
    train.train_step = lambda *a: (time.sleep(0.1 * slow.exists()), step(*a))[1]


def test_nonfinite_steps_are_skipped_on_all_processes(tmp_path):
    """A NaN in one process's loss: nobody's student, optimizer or centers change, the samples are listed; the run goes
    on with the next. So many in a row end it, saved before."""
    out, log = tmp_path / "out", tmp_path / "log"
    flags = [*TINY, "--steps", 18, "--save-every", 7, "--centering", "centering", "--max-nonfinite", 3]
    Launched(log, train.main, *flags, "--out", out, world=2, before=partial(poison, {10, 11, 15})).wait()
    lines = metrics(out)
    assert len(lines) == 18 and lines[10]["ibot"] is None and lines[9]["ibot"] and lines[-1]["skipped_steps"] == 3
    assert [r["skipped_steps"] for r in lines[9:12]] == [0, 1, 2]
    report = json.loads((out / "nonfinite/step_000000010.json").read_text())
    assert [p["rank"] for p in report["processes"]] == [0, 1] and report["processes"][1]["terms"]["ibot"] == "nan"
    assert list(report["processes"][1]["samples"]) == [str(s) for s in range(10 * 8 + 4, 10 * 8 + 8)]
    assert report["processes"][0]["terms"]["ibot"] != "nan"

    flags[flags.index("--centering") :] = ["--max-nonfinite", 3]
    text = Launched(log, train.main, *flags, "--out", tmp_path / "end", before=partial(poison, {8, 10, 11, 12})).wait(1)
    assert "error: loss or gradients were not finite in 3 steps in a row, the last 12" in text
    assert "The last good save is that of step 7" in text
    assert (tmp_path / "end/resume/step_000000007/complete").exists()


def poison(steps: set[int]) -> None:
    """Makes these steps' iBOT loss NaN, in the last process alone."""
    step_losses, number, last = train.step_losses, itertools.count(), int(os.environ.get("RANK", 0)) + 1 == int(
        os.environ.get("WORLD_SIZE", 1))

    def poisoned(*args):
        loss, terms = step_losses(*args)
        poison = math.nan if next(number) in steps and last else 1.0
        return loss * poison, terms | dict(ibot=terms["ibot"] * poison)

    train.step_losses = poisoned


OPTIMIZERS = {
    "AdamW": lambda student, cfg: [torch.optim.AdamW(train.param_groups(student, cfg), fused=False)],
    "AdamW foreach": lambda student, cfg: [torch.optim.AdamW(train.param_groups(student, cfg), foreach=True)],
    "AdamW fused": train.build_optimizers,
    "SGD": lambda student, cfg: [torch.optim.SGD(train.param_groups(student, cfg))],
    "SGD momentum": lambda student, cfg: [torch.optim.SGD(train.param_groups(student, cfg), momentum=0.9, dampening=0.1)],
    "SGD fused": lambda student, cfg: [torch.optim.SGD(train.param_groups(student, cfg), momentum=0.9, fused=True)],
    "Muon": lambda student, cfg: [
        torch.optim.Muon(train.param_groups(student, cfg, matrices=True)),
        torch.optim.AdamW(train.param_groups(student, cfg, matrices=False), betas=cfg.betas, fused=True)],
    "numbers": lambda student, cfg: [Counting(train.param_groups(student, cfg), dict(lr=0.0))]}


class Counting(torch.optim.Optimizer):
    """SGD with a bias correction, which keeps in its state a number, a tensor and None."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    state["number"], state["none"] = 0.9 * state.get("number", 0.0) + 0.1, None
                    state["mean"] = 0.9 * state.get("mean", 0.0) + 0.1 * p.grad
                    p.sub_(state["mean"], alpha=group["lr"] / state["number"])


def tiny_state(**changes):
    """A TrainState of the digits preset, and a function that takes a step on the batch with a given number; with NaN in
    it if wanted. In the process group of this test."""
    cfg = train.Config(**train.PRESETS["digits"] | dict(batch_size=8, group_size=4, centering="centering", clip_grad=1.0)
                       | changes)
    state = train.TrainState(cfg, train.share_mesh("cpu", cfg.sharding), CPU)
    rank, world = dist.get_rank(), dist.get_world_size()
    batches = train.training_batches(dataclasses.replace(cfg, seed=0), data.open_source("digits"), rank, world)
    now = {k: float(v[100]) for k, v in train.schedules(cfg).items()}

    def step(i: int, bad: bool = False) -> bool:
        batch = data.prepare(batches[i], CPU)
        if bad and rank == world - 1:
            batch.global_crops[0, 0, 0, 0] = math.nan
        return train.train_step(state.student, state.teacher, state.optimizers, [batch], cfg, now, state.centers)[1].item()

    return state, step


@pytest.fixture
def process_group():
    train.start_processes(CPU)
    yield
    dist.destroy_process_group()


def tensors_of(state, *parts: str) -> dict[str, torch.Tensor]:
    tree = state.tensors()
    return {f"{part}.{name}": train.local_shards([t])[0].detach().clone() for part in parts or tree
            for name, t in tree[part].items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_by_one_line(name, process_group, tmp_path, monkeypatch):
    """Each trains; steps with NaN, also the first, change nothing but the teacher; and after a save and a resume by a
    new state, everything is the same to the bit."""
    monkeypatch.setattr(train, "build_optimizers", OPTIMIZERS[name])
    state, step = tiny_state()
    assert sum(len(g["params"]) for o in state.optimizers for g in o.param_groups) == len([*state.student.parameters()])
    begin = tensors_of(state, "student", "centers")
    assert not step(0, bad=True) and same(tensors_of(state, "student", "centers"), begin)
    assert not any(optimizer.state for optimizer in state.optimizers)
    assert step(1)
    after = tensors_of(state)
    assert sum(not torch.equal(after[k], v) for k, v in begin.items()) > 50
    assert not step(2, bad=True)
    now = tensors_of(state)
    assert same({k: v for k, v in now.items() if "teacher" not in k}, {k: v for k, v in after.items() if "teacher" not in k})
    assert step(3)
    dcp.save(state.tensors(), checkpoint_id=str(tmp_path / "save"))
    train.check_metadata(tmp_path / "save/.metadata")
    saved = tensors_of(state)
    assert step(4) and step(5)

    other, other_step = tiny_state(seed=1)
    other.load(tmp_path / "save")
    assert same(tensors_of(other), saved)
    assert other_step(4) and other_step(5)
    assert same(tensors_of(other), tensors_of(state))
    for a, b in zip(state.optimizers, other.optimizers):
        for p, q in zip(state.student.parameters(), other.student.parameters()):
            assert same(a.state.get(p, {}), b.state.get(q, {}))


def test_optimizer_state_of_parameters_without_gradient(process_group, tmp_path, monkeypatch):
    """They have none, after a resume neither; a run that never made a finite step resumes, too."""
    state, step = tiny_state()
    state.student["backbone"].pos_embed.requires_grad_(False)
    dcp.save(state.tensors(), checkpoint_id=str(tmp_path / "start"))
    assert step(0)
    dcp.save(state.tensors(), checkpoint_id=str(tmp_path / "save"))
    for save, n in (("save", len(list(state.student.parameters())) - 1), ("start", 0)):
        other, _ = tiny_state()
        other.load(tmp_path / save)
        assert len(other.optimizer_state()) == n and "backbone.pos_embed" not in other.optimizer_state()
    monkeypatch.setattr(train, "build_optimizers", OPTIMIZERS["SGD momentum"])
    with pytest.raises(ValueError, match="optimizer is another: exp_avg.backbone"):
        tiny_state()[0].load(tmp_path / "save")


def sharded_optimizer_checks(folder: str, name: str) -> None:
    """Run by two processes: NaN in one of them, a save, and a resume to the bit."""
    train.build_optimizers = OPTIMIZERS[name]
    train.start_processes(CPU)
    state, step = tiny_state()
    assert step(0)
    before = tensors_of(state, "student", "centers")
    assert not step(1, bad=True) and same(tensors_of(state, "student", "centers"), before)
    assert isinstance(next(iter(state.optimizer_tensors()["momentum_buffer"].values())), train.DTensor)
    dcp.save(state.tensors(), checkpoint_id=f"{folder}/save")
    other, other_step = tiny_state(seed=1)
    other.load(Path(folder, "save"))
    assert step(2) and other_step(2) and same(tensors_of(other), tensors_of(state))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", ["SGD momentum", "Muon"])
def test_optimizer_on_shards(name, tmp_path):
    Launched(tmp_path / "log", partial(sharded_optimizer_checks, str(tmp_path), name), world=2).wait()


def test_nonfinite_step_changes_nothing_but_the_teacher():
    """Also when infinity comes from the gradient alone, or NaN reaches the centers."""
    cfg = train.Config(**train.PRESETS["digits"] | dict(batch_size=8, group_size=4, centering="centering"))
    torch.manual_seed(0)
    student, teacher = train.build_network(cfg).train(), train.build_network(cfg).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(train.param_groups(student, cfg), lr=0.0, fused=True)
    centers, now = train.build_centers(cfg, CPU), {k: float(v[100]) for k, v in train.schedules(cfg).items()}
    batches = train.training_batches(cfg, data.open_source("digits"), 0, 1)
    good = data.prepare(batches[0], CPU)

    def step(batch):
        return train.train_step(student, teacher, [optimizer], [batch], cfg, now, centers)[1].item()

    def state():
        moments = {f"{i}.{k}": v.clone() for i, s in enumerate(optimizer.state.values()) for k, v in s.items()}
        return {k: v.clone() for k, v in (student.state_dict() | centers | moments).items()}

    assert step(good)
    before = state()
    images = good.global_crops.clone()
    images[0, 0, 0, 0] = math.inf
    assert not step(good._replace(global_crops=images)) and same(state(), before)
    hook = student["backbone"].norm.weight.register_hook(lambda g: g * math.inf)
    assert not step(good) and same(state(), before)
    hook.remove()
    assert step(good) and not same(state(), before)
    assert all(t.isfinite().all() for t in (state() | teacher.state_dict()).values())


def lock_of(out: Path, **changes) -> None:
    host, boot, space = train.machine()
    owner = dict(host=host, boot=boot, space=space, pid=os.getpid(), start=train.born(os.getpid()), key="another")
    (out / "lock").write_text(json.dumps(owner | changes))


def test_lock_keeps_a_second_run_away(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    job = Launched(tmp_path / "log", train.main, *TINY, "--steps", 400, "--out", out, before=slowly)
    job.until("step 0 of 400")
    with pytest.raises(ValueError, match=f"is in use by process {job.processes[0].pid} on .*; wait for it, or choose"):
        train_main(*TINY, "--steps", 400, "--out", out)
    job.signal(signal.SIGKILL)
    job.join()
    assert (out / "lock").exists()
    train_main(*TINY, "--steps", 4, "--out", out, "--resume")  # the owner is dead
    assert not (out / "lock").exists()


def test_lock_of_other_machines_and_times(tmp_path, monkeypatch):
    """Dead: no such process, or its number used again, or silent on another machine. Alive: touched by another."""
    naps, sign_of_life = [], [None]

    def sleep(seconds):
        naps.append(seconds)
        if len(naps) == sign_of_life[0]:
            os.utime(tmp_path / "lock", (1, 1))

    monkeypatch.setattr(train, "time", types.SimpleNamespace(sleep=sleep))
    for changes in (dict(pid=2**22 + 1), dict(start="1"), dict(host="elsewhere"), dict(boot="before"), dict(space="x")):
        naps.clear()
        lock_of(tmp_path, **changes)
        train.OutputLock(tmp_path).release()
        assert sum(naps) == (0 if changes.keys() & {"pid", "start"} else 60), changes
    (tmp_path / "lock").write_text("")  # made by one that died at that moment
    train.OutputLock(tmp_path).release()
    lock_of(tmp_path)
    with pytest.raises(ValueError, match="is in use by process"):
        train.OutputLock(tmp_path)
    lock_of(tmp_path, host="elsewhere")
    naps.clear()
    sign_of_life[0] = 60  # at the last moment
    with pytest.raises(ValueError, match="is in use by process .* on elsewhere"):
        train.OutputLock(tmp_path)


def test_lock_lost_to_another_ends_the_run(tmp_path):
    """A process that slept so long that it was thought dead finds another at its place: it touches nothing."""
    out = tmp_path / "out"
    job = Launched(tmp_path / "log", train.main, *TINY, "--steps", 400, "--save-every", 5, "--out", out, before=slowly)
    job.until("saved step 5")
    lock_of(out)
    assert "another process has taken over" in job.wait(1)
    saves = sorted(p.name for p in (out / "resume").iterdir())
    assert json.loads((out / "lock").read_text())["key"] == "another" and saves[0] == "step_000000005" and len(saves) < 9


def test_restart_by_torchrun_never_overwrites(tmp_path, monkeypatch):
    """A command with --overwrite that torchrun starts again after a failure continues what it has begun."""
    flags = [*TINY, "--steps", 4, "--save-every", 2, "--out", tmp_path / "out", "--overwrite"]
    train_main(*flags)
    shutil.rmtree(tmp_path / "out/resume/step_000000004")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert set_up_and_release(*flags).start == 2


def test_deterministic_runs_have_one_hash(tmp_path):
    """The flag reaches PyTorch, the hash is printed, and two runs agree."""
    flags = [*TINY, "--steps", 3, "--deterministic"]
    jobs = [Launched(tmp_path / f"log{i}", train.main, *flags, *more, "--out", tmp_path / str(i), before=must_be_exact)
            for i, more in enumerate(([], [], ["--seed", 1]))]
    hashes = [re.search("weights ([0-9a-f]{64})", job.wait())[1] for job in jobs]
    assert hashes[0] == hashes[1] != hashes[2]


def must_be_exact() -> None:
    step = train.train_step

    def checked(*args):
        assert torch.are_deterministic_algorithms_enabled() and os.environ["CUBLAS_WORKSPACE_CONFIG"]
        return step(*args)

    train.train_step = checked


def train_in_agent(killed: Path, argv: list[str]) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    sys.argv = ["train.py", *argv]
    step, calls = train.train_step, itertools.count(1)  # nobody gets far before one is killed
    train.train_step = lambda *a: (next(calls) == 9 and wait_for(killed.exists), step(*a))[1]
    train.main(argv)


def quick_agent(endpoint: str, killed: Path, argv: list[str]) -> None:
    """What `torchrun --nnodes 4 --nproc-per-node 1 --max-restarts 3` does, its worker forked, not started from nothing."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    config = launcher.LaunchConfig(min_nodes=4, max_nodes=4, nproc_per_node=1, run_id="four", rdzv_backend="c10d",
                                   rdzv_endpoint=endpoint, max_restarts=3, start_method="fork")
    launcher.elastic_launch(config, train_in_agent)(killed, argv)


def agent(endpoint: str, argv, log: Path, prefix=(), flags=()) -> subprocess.Popen:
    """One of four `torchrun --nnodes 4`, a machine of its own as far as it knows."""
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", "--nnodes", "4", "--nproc-per-node", "1",
               "--max-restarts", "3", "--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint, *flags, "train.py", *argv]
    with open(log, "ab") as file:
        return subprocess.Popen([str(c) for c in command], cwd=HERE, stdout=file, stderr=file, start_new_session=True,
                                env=os.environ | dict(OMP_NUM_THREADS="1", TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"))


def children(process) -> list[str]:
    return Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()


def kill_machine(agent: subprocess.Popen) -> None:
    """The agent and its worker at one blow."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for pid in [*children(agent), agent.pid]:
            os.kill(int(pid), signal.SIGKILL)
    agent.wait()


def wait_for(condition, seconds: float = 240) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)


FOUR = (*TINY, "--batch-size", 16, "--steps", 24, "--save-every", 5, "--keep", 100)


def check_four(tmp_path: Path, n_starts: int, one: Launched, steps: int = 24) -> None:
    """All steps are there, as `one` process does them, after so many starts."""
    out, log = tmp_path / "out", (tmp_path / "log").read_text()
    starts = [int(s) for s in re.findall(rf"step (\d+) of {steps}, batch 16 on 4", log)]
    assert starts[0] == 0 and starts[1] >= 5 and len(starts) == n_starts, starts
    assert [r["step"] for r in metrics(out)] == list(range(steps))
    one.wait()
    for four, one in zip(metrics(out), metrics(tmp_path / "one"), strict=True):
        assert four == pytest.approx(one, rel=0.01, abs=1e-5)


def test_four_agents_survive_the_loss_of_a_worker(tmp_path):
    """All restart, by themselves, from the last save."""
    flags, killed = [*FOUR, "--steps", 12, "--out"], tmp_path / "killed"
    quick = partial(quick_agent, f"127.0.0.1:{free_port()}", killed)
    agents = [Launched(tmp_path / "log", quick, *flags, tmp_path / "out") for _ in range(4)]
    wait_for((tmp_path / "out/resume/step_000000005/complete").exists)
    os.kill(int(children(agents[3].processes[0])[0]), signal.SIGKILL)
    killed.touch()
    one = Launched(tmp_path / "log1", train.main, *flags, tmp_path / "one")
    for a in agents:
        a.wait()
    check_four(tmp_path, n_starts=2, one=one, steps=12)


def four_agents(tmp_path: Path, machine_too: bool, endpoint: str = "", machines=((),) * 4) -> None:
    """The same with torchrun itself. With `machine_too` an agent is killed as well, after which a scheduler would end
    and requeue the job: here the test does."""
    argv, log, endpoint = [*FOUR, "--out", tmp_path / "out"], tmp_path / "log", endpoint or f"127.0.0.1:{free_port()}"
    agents = [agent(endpoint, argv, log, *machine) for machine in machines]
    try:
        wait_for((tmp_path / "out/resume/step_000000005/complete").exists, 100)
        os.kill(int(children(agents[3])[0]), signal.SIGKILL)
        if machine_too:
            wait_for(lambda: log.read_text().count("24, batch 16 on 4") == 2)
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
    check_four(tmp_path, n_starts=2 + machine_too, one=one)


SHIMS = dict(  # what the script calls of Slurm, for one machine with one GPU
    scontrol='[ "$1" = show ] && echo 127.0.0.1 || echo "$@" >> "$FOLDER/requeued"', srun='shift; echo $$ > "$FOLDER/step"; exec "$@"',
    torchrun='exec "$PYTHON" -m torch.distributed.run "$@"', scancel='all() { for c in $(cat "/proc/$1/task/$1/children"); do all "$c"; done; echo "$1"; }; '
            'kill -USR1 $(all "$(cat "$FOLDER/step")")')


def test_slurm_script_of_the_readme(tmp_path):
    """Run as printed, but for data and port, with stand-ins for Slurm: the signal before the end has the training save,
    and the job requeued; the next time it ends, and nothing is requeued."""
    script = re.search(r"```bash\n(#!/bin/bash.*?)```", (HERE / "README.md").read_text(), re.DOTALL)[1]
    assert script.count("\n") <= 20
    argv = [*TINY, "--steps", 60, "--num-workers", 1, "--save-every", 30, "--out", tmp_path / "out"]
    script, n = re.subn(r"train.py --preset .* &", f"train.py {shlex.join(map(str, argv))} &", script)
    (tmp_path / "job.sh").write_text(script.replace(":29500", f":{free_port()}"))
    assert n == 1
    for name, text in SHIMS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    env = os.environ | dict(PATH=f"{tmp_path}:{os.environ['PATH']}", PYTHON=sys.executable, FOLDER=str(tmp_path),
                            SLURM_JOB_ID="7", SLURM_JOB_NODELIST="here", SLURM_NNODES="1", SLURM_GPUS_ON_NODE="1",
                            OMP_NUM_THREADS="1")
    log, texts = tmp_path / "log", []
    for interrupt in (True, False):
        with open(log, "w") as file:
            job = subprocess.Popen(["bash", tmp_path / "job.sh"], cwd=HERE, env=env, stdout=file, stderr=file)
        if interrupt:
            wait_for(lambda: (tmp_path / "out/metrics.jsonl").exists() and len(metrics(tmp_path / "out")) > 3)
            job.send_signal(signal.SIGUSR1)
        code = job.wait(timeout=200)
        texts.append(log.read_text())
        assert interrupt or code == 0, texts[-1]
        assert (tmp_path / "requeued").read_text() == "requeue 7\n", texts[-1]
    assert "all is saved" in texts[0] and "done; the teacher is in" in texts[1], texts[0]
    assert "of 60, batch 8 on 1 x cpu" in texts[1] and "step 0 of 60" not in texts[1]
    assert [r["step"] for r in metrics(tmp_path / "out")] == list(range(60))


@SLOW
def test_four_torchruns_survive_the_loss_of_a_worker(tmp_path):
    four_agents(tmp_path, machine_too=False)


@SLOW
def test_four_agents_survive_the_loss_of_a_machine(tmp_path):
    four_agents(tmp_path, machine_too=True)


@SLOW
def test_four_agents_in_four_network_namespaces(tmp_path):
    """Four machines, as far as the network goes: addresses of their own, joined by a bridge."""
    names = [f"dinov2test{i}" for i in range(4)]
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
        machines = [(("ip", "netns", "exec", name, "env", "GLOO_SOCKET_IFNAME=eth0"),
                     ("--local-addr", f"10.99.0.{i + 1}", "--rdzv-conf", f"is_host={i == 0}"))
                    for i, name in enumerate(names)]
        four_agents(tmp_path, machine_too=False, endpoint="10.99.0.1:29500", machines=machines)
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
        subprocess.run(["ip", "link", "del", "dinov2test"], capture_output=True)


# ----------------------------------------------------------------------------------------------------------------------
# train.py and eval_knn.py: wrong input


class Payload:
    def __reduce__(self):
        return os.system, ("touch /tmp/dinov2_test_was_executed",)


@pytest.mark.parametrize("argv,text", [
    (["--preset", "vitl16_shor"], "unknown preset 'vitl16_shor', did you mean vitl16_short?"),
    (["--preset", "vitl16_short"], "ImageNet:split=TRAIN:root="),
    (["--batch_size", "8"], "unknown argument '--batch_size', did you mean --batch-size?"),
    (["--step", "8"], "unknown argument '--step', did you mean --steps?"),
    (["--lr", "fast"], "invalid float value: 'fast'"),
    (["--global-crops-scale", "0.5"], "expected 2 arguments"),
    (["--arch", "vit_nan"], "did you mean vit_nano?"),
    (["--centering", "sinkhorn"], "did you mean sinkhorn_knopp?"),
    (["--data", "/no/such/folder"], "is no folder"),
    (["--global-crops-size", "18"], "--global-crops-size 18 is not a multiple of --patch-size 4; use 16 or 20"),
    (["--local-crops-size", "3"], "--local-crops-size 3 is not a multiple"),
    (["--batch-size", "100"], "multiple of 64"),
    (["--num-workers", "-7"], "--num-workers must be -1 or more"),
    (["--steps", "10"], "--warmup-steps 20 is more than --steps 10"),
    (["--steps", "0", "--warmup-steps", "0"], "--steps must be 1 or more, got 0"),
    (["--patch-size", "0"], "--patch-size must be 1 or more"),
    (["--data", ""], "--data must not be empty"),
    (["--betas", "0.9", "1.0"], "--betas must lie between"),
    (["--preset", "vitl14", "--group-size", "32"], "ImageNet22k is named as"),
    (["--resume", "--overwrite"], "give one of the two"),
    (["--clip-grad", "-1"], "--clip-grad must be 0 or more"),
    (["--lr", "nan"], "--lr must be 0 or more"),
    (["--mask-ratio-min-max", "0.5", "0.1"], "wants the smaller value first"),
    (["--mask-sample-probability", "2"], "must lie between 0.0 and 1.0, got 2.0"),
    (["--device", "gpu"], "'gpu' is no device"),
    (["--kernels", "--dtype", "bf16"], "--kernels needs an NVIDIA GPU, and this runs on cpu"),
    (["--device", "mps"], "no Apple GPU"),
    (["--device", "cuda"], "finds no CUDA GPU"),
    (["--init", "/no/file.pth"], "no such checkpoint"),
    (["--resume"], "holds no run"),
])
def test_errors_of_train(argv, text, tmp_path, monkeypatch):
    if text == "finds no CUDA GPU":
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match=re.escape(text)):
        train_main("--warmup-steps", 20, "--batch-size", 64, "--group-size", 64, "--num-workers", 0,
                   "--eval-every", 0, "--out", tmp_path / "out", *argv)
    assert not (tmp_path / "out").exists()


def test_errors_are_one_line_and_exit_code_2(tmp_path):
    for command, text in ((["train.py", "--preset", "digit"], "did you mean digits?"),
                          (["eval_knn.py", tmp_path / "none.pth"], "no such checkpoint"),
                          (["eval_linear.py", tmp_path / "none.pth"], "no such checkpoint"),
                          (["eval_logreg.py", tmp_path / "none.pth"], "no such checkpoint")):
        result = run(sys.executable, *command, ok=2)
        assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: ") and text in result.stderr
        assert result.stdout == ""


def test_errors_more_processes_than_images_in_a_batch(monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "16")
    with pytest.raises(ValueError, match="--batch-size 8 is smaller than the number of processes, 16"):
        train_main(*TINY, "--out", tmp_path / "out")


def test_errors_of_data_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "broken", ["a.png", "b.png"])
    for name in "ab":
        (tmp_path / "broken" / f"{name}.png").write_bytes(b"no image at all")
    write_images(tmp_path / "fine", ["a.png", "b.png"])
    for flags, text in ((["--data", tmp_path / "empty"], "holds no image"),
                        (["--data", tmp_path / "broken"], "no readable image"),
                        (["--data", tmp_path / "fine", "--eval-every", 1], "make one sub-folder per class")):
        with pytest.raises(ValueError, match=text):
            train_main(*TINY, "--steps", 2, *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_errors_of_output_folders(trained, tmp_path):
    before = metrics(trained)
    with pytest.raises(ValueError, match=r"holds a different run \(lr 0.0.* -> 0.5\); choose another --out"):
        train_main(*TINY, "--steps", 4, "--eval-every", 2, "--lr", 0.5, "--out", trained)
    assert metrics(trained) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        train_main(*TINY, "--steps", 2, "--out", tmp_path / "file" / "out")
    copy_of = tmp_path / "copy"
    shutil.copytree(trained, copy_of)
    (copy_of / "notes.txt").write_text("mine")
    train_main(*TINY, "--steps", 2, "--out", copy_of, "--overwrite")
    assert [r["step"] for r in metrics(copy_of)] == [0, 1] and (copy_of / "notes.txt").exists()
    assert not (copy_of / "eval").exists()
    (copy_of / "config.json").unlink()
    for flags in ([], ["--overwrite"]):
        with pytest.raises(ValueError, match="holds ckpt.pth but no config.json"):
            train_main(*TINY, "--steps", 2, "--out", copy_of, *flags)
    with pytest.raises(ValueError, match="--steps 2 is less than the 4 steps"):
        train_main(*TINY, "--steps", 2, "--eval-every", 2, "--out", trained, "--resume")


def bad_checkpoints(folder: Path, good: Path) -> dict[str, tuple[Path, str]]:
    whole = good.read_bytes()
    (folder / "truncated.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "text.pth").write_text("hello")
    (folder / "zero.pth").write_bytes(b"")
    torch.save(dict(teacher=Payload()), folder / "malicious.pth")
    (folder / "pickle.pth").write_bytes(pickle.dumps(Payload()))
    torch.save(dict(fc=torch.zeros(3)), folder / "foreign.pth")
    torch.save([1, 2], folder / "list.pth")
    torch.save(dict(model=dict(fc=torch.zeros(3))), folder / "nested.pth")
    torch.save(dict(teacher=torch.zeros(3)), folder / "tensor.pth")
    torch.save({1: torch.zeros(3)}, folder / "numbers.pth")
    ckpt = torch.load(good, weights_only=True)
    del ckpt["teacher"]["backbone.norm.weight"]
    torch.save(ckpt, folder / "incomplete.pth")
    refused = "holds pickled code"
    texts = dict(truncated="is truncated or", text="is truncated or", zero="is truncated or", malicious=refused,
                 pickle="is truncated or",
                 foreign="holds no DINOv2 backbone", nested="holds no DINOv2 backbone",
                 tensor="holds no DINOv2 backbone",
                 numbers="holds no DINOv2 backbone", list="holds a list",
                 incomplete="another architecture: keys 1 missing, such as norm.weight")
    return {name: (folder / f"{name}.pth", text) for name, text in texts.items()}


def test_errors_of_checkpoints(trained, tmp_path):
    """For the evaluation and for --init: explained, and nothing in them is executed."""
    Path("/tmp/dinov2_test_was_executed").unlink(missing_ok=True)
    for path, text in bad_checkpoints(tmp_path, trained / "ckpt.pth").values():
        with pytest.raises(ValueError, match=text):
            eval_knn.main([str(path)])
        with pytest.raises(ValueError, match=text):
            train_main(*TINY, "--steps", 2, "--init", path, "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="is a folder; name the checkpoint in it"):
        eval_knn.main([str(trained)])
    with pytest.raises(ValueError, match="another architecture"):
        train_main(*TINY, "--steps", 2, "--arch", "vit_micro", "--init", trained / "ckpt.pth", "--out",
                   tmp_path / "out")
    assert not Path("/tmp/dinov2_test_was_executed").exists() and not (tmp_path / "out").exists()


def test_errors_of_saves(trained, tmp_path):
    """A damaged or malicious save is named, nothing in it is executed, and nothing of the run is lost."""
    Path("/tmp/dinov2_test_was_executed").unlink(missing_ok=True)
    flags = [*TINY, "--steps", 5]
    metadata = dcp.FileSystemReader(str(trained / "resume/step_000000004")).read_metadata()
    metadata.state_dict_metadata["student.backbone.cls_token"] = dcp.metadata.BytesStorageMetadata()
    short = lambda text: b"\x8c" + bytes([len(text)]) + text.encode()  # noqa: E731
    dotted = b"\x80\x04" + short("torch.distributed.checkpoint.metadata") + short("os.system") + b"\x93"
    dotted += short("touch /tmp/dinov2_test_was_executed") + b"\x85R."
    held = io.BytesIO()
    torch.save(dict(weight=Payload()), held)
    for name, content, text in ((".metadata", pickle.dumps(Payload()),
                                 "it holds code, posix.system; nothing in it was run"),
                                (".metadata", dotted, "it holds code, torch.distributed.checkpoint.metadata.os.system"),
                                (".metadata", pickle.dumps(metadata), "it holds code"),
                                ("__0_0.distcp", pickle.dumps(Payload()) * 99, "cannot be continued from"),
                                ("__0_0.distcp", held.getvalue() * 99, "cannot be continued from"),
                                ("complete", pickle.dumps(Payload()), "")):
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(trained, out)
        save = out / "resume/step_000000004"
        (save / name).write_bytes(content)
        assert set_up_and_release(*flags, "--out", out).start == 3  # its sum is wrong
        if name == "complete":
            continue
        complete = json.loads((save / "complete").read_text())
        complete["files"][name] = train.sha256(save / name)  # whoever can write the one can write the other
        (save / "complete").write_text(json.dumps(complete))
        with pytest.raises(ValueError, match=text):
            set_up_and_release(*flags, "--out", out)
        assert metrics(out) == metrics(trained)
    with pytest.raises(ValueError, match="cannot be continued from"):  # another architecture
        shutil.rmtree(out)
        shutil.copytree(trained, out)
        train_main(*flags, "--arch", "vit_micro", "--resume", "--out", out)
    assert not Path("/tmp/dinov2_test_was_executed").exists()


# ----------------------------------------------------------------------------------------------------------------------
# hub.py

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


def renamed(weights: dict, *pairs) -> dict:
    for pattern, name in pairs:
        weights = {re.sub(pattern, name, k): v for k, v in weights.items()}
    return weights


def as_transformers(weights: dict, new_names: bool = False) -> dict:
    """The names in its files, or those that its models have since 5.0."""
    weights, split = dict(weights), {}
    parts = "qkv" if new_names else ("query", "key", "value")
    for key in [k for k in weights if ".qkv." in k]:
        for part, tensor in zip(parts, weights.pop(key).chunk(3)):
            name = f"attention.{part}_proj" if new_names else f"attention.attention.{part}"
            split[key.replace("attn.qkv", name)] = tensor
    for key in [k for k in weights if ".w12." in k and new_names]:
        for part, tensor in zip(("gate_proj", "up_proj"), weights.pop(key).chunk(2)):
            split[key.replace("w12", part)] = tensor
    return renamed(
        weights | split, (r"^blocks", "encoder.layer"), (r"^norm\.", "layernorm."), (r"w12", "weights_in"),
        (r"w3", "down_proj" if new_names else "weights_out"), (r"ls(.)\.gamma", r"layer_scale\1.lambda1"),
        (r"attn\.proj", "attention.o_proj" if new_names else "attention.output.dense"),
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"^(cls_token|mask_token|register_tokens)", r"embeddings.\1"))


def as_timm(weights: dict) -> dict:
    weights = renamed(weights, (r"w12", "fc1"), (r"w3", "fc2"), (r"register_tokens", "reg_token"))
    del weights["mask_token"]
    if "reg_token" in weights:
        weights["cls_token"] = weights["cls_token"] + weights["pos_embed"][:, :1]
        weights["pos_embed"] = weights["pos_embed"][:, 1:]
    return weights


def prefixed(prefix: str, weights: dict, *more: str) -> dict:
    return {prefix + k: v for k, v in weights.items()} | {k: torch.ones(2) for k in more}


HUB_LAYOUTS = {
    "released": lambda w: w,
    "train": lambda w: dict(teacher=prefixed("backbone.", w, "dino_head.mlp.0.weight", "ibot_head.mlp.0.weight")),
    "chunks": lambda w: dict(teacher=renamed(prefixed("backbone.", w), (r"\.blocks\.([01])", r".blocks.0.\1"),
                                             (r"\.blocks\.2", ".blocks.1.2"))),
    "fsdp": lambda w: prefixed(
        "teacher.backbone._fsdp_wrapped_module.", renamed(w, (r"^blocks\.(\d)", (
            r"blocks.0._fsdp_wrapped_module._orig_mod.\1._fsdp_wrapped_module"))),
        "student.backbone.norm.bias", "teacher.dino_head.mlp.0.weight", "dino_loss.center"),
    "ddp, compiled": lambda w: prefixed("module._orig_mod.", w),
    "classifier": lambda w: prefixed("backbone.", w, "linear_head.bias"),
    "transformers": as_transformers,
    "transformers 5": partial(as_transformers, new_names=True),
    "transformers classifier": lambda w: prefixed("dinov2.", as_transformers(w), "classifier.weight"),
    "transformers registers": lambda w: prefixed("dinov2_with_registers.", as_transformers(w), "classifier.bias"),
    "timm": as_timm,
    "timm classifier": lambda w: as_timm(w) | {"head.weight": torch.ones(2)},
    "double": lambda w: {k: v.double() for k, v in w.items()},
}


@pytest.mark.parametrize("registers,ffn", [(0, "mlp"), (4, "mlp"), (4, "swiglu")])
@pytest.mark.parametrize("layout", HUB_LAYOUTS)
def test_hub_layouts(layout, registers, ffn, tmp_path):
    """The same weights in every layout give the same model, with the position rule of whose layout it is."""
    vit, images = hub_vit(registers, ffn), randn(1, (2, 3, 42, 70))[0]
    if not registers and (foreign := [k for k in hub.POSITIONS if k in layout]):
        official = vit(images)
        vit.interpolate_offset, vit.interpolate_antialias = hub.POSITIONS[foreign[0]].values()
        assert (vit(images) - official).abs().max() > 1e-3
    torch.save(HUB_LAYOUTS[layout](vit.state_dict()), tmp_path / "pytorch_model.bin")
    loaded = hub.load(tmp_path)
    assert not loaded.training and {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert_close(loaded(images), vit(images), 1e-5 if "timm" in layout and registers else 0, layout)
    assert loaded.state_dict().keys() == vit.state_dict().keys()
    for key, value in loaded.state_dict().items():
        if "timm" not in layout:
            assert torch.equal(value, vit.state_dict()[key]), key
    assert "timm" not in layout or not loaded.mask_token.any()


def test_hub_checkpoints_of_train(trained):
    for path in (trained / "ckpt.pth", trained / "eval/training_2/teacher_checkpoint.pth"):
        file, ckpt = hub.read(path)
        assert file == str(path) and ckpt["config"]["data"] == "digits"
        ours, theirs, images = hub.load(file, ckpt), model.load_backbone(file), randn(1, (2, 3, 16, 16))[0]
        assert ours.num_heads == theirs.num_heads == 2  # of width 32, which only the checkpoint knows
        assert torch.equal(ours(images), theirs(images))


HUB_SIZES = (1, 3, 518, 518), (2, 3, 224, 224), (1, 3, 252, 182), (1, 3, 28, 28)
TRANSFORMERS = dict(hidden_size=128, num_hidden_layers=3, num_attention_heads=2, image_size=56, patch_size=14)


@pytest.mark.parametrize("kind,swiglu", [("Dinov2", False), ("Dinov2", True), ("Dinov2WithRegisters", False),
                                         ("Dinov2WithRegisters", True)])
def test_hub_equals_transformers(kind, swiglu, tmp_path):
    """At 518 pixels, the size of the weights, at 224 and at a size that is not square. Its folder, and its model's own
    names."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**TRANSFORMERS | dict(image_size=518), use_swiglu_ffn=swiglu)
    theirs = randomize(getattr(transformers, f"{kind}Model")(config))
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.state_dict(), tmp_path / "own_names.pth")
    for spec in (tmp_path, tmp_path / "own_names.pth"):
        ours = hub.load(spec)
        for images in randn(1, *HUB_SIZES):
            out, expected = ours.forward_features(images), theirs(images).last_hidden_state.detach()
            assert expected.std() > 0.5
            assert_close(out["x_norm_clstoken"], expected[:, 0], 1e-5, "CLS")
            assert_close(out["x_norm_patchtokens"], expected[:, 1 + ours.num_register_tokens :], 1e-5, "patches")
            assert_close(out["x_norm_regtokens"], expected[:, 1 : 1 + ours.num_register_tokens], 1e-5, "registers")


@pytest.mark.parametrize("kind", ["Dinov2", "Dinov2WithRegisters"])
def test_hub_equals_transformers_classifier(kind, tmp_path):
    """Its classifier is ours of one layer; the registers are no patches."""
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(**TRANSFORMERS, num_labels=5)
    theirs = randomize(getattr(transformers, f"{kind}ForImageClassification")(config))
    theirs.save_pretrained(tmp_path)
    torch.save(theirs.classifier.state_dict(), tmp_path / "head.pth")
    images = randn(1, (2, 3, 56, 56))[0]
    assert_close(hub.load_classifier(tmp_path, tmp_path / "head.pth")(images), theirs(images).logits.detach(), 1e-5)


@pytest.mark.parametrize("registers", [0, 4])
@pytest.mark.parametrize("kind", ["registered", "mlp", "swiglu"])
def test_hub_equals_timm(kind, registers, tmp_path):
    timm = pytest.importorskip("timm")
    if kind == "registered":
        name = f"vit_small_patch14_{'reg4_' * bool(registers)}dinov2"
        theirs = timm.create_model(name, pretrained=False, dynamic_img_size=True)
    else:  # the gate and the value of SwiGLU lie in a matrix of 688 rows, as in ours
        gated = dict(mlp_ratio=5.375, mlp_layer=timm.layers.SwiGLUPacked, act_layer=torch.nn.SiLU)
        theirs = timm.models.VisionTransformer(
            img_size=518, patch_size=14, embed_dim=128, depth=3, num_heads=2, init_values=1.0, num_classes=0,
            reg_tokens=registers, no_embed_class=registers > 0, dynamic_img_size=True,
            **gated if kind == "swiglu" else {})
    torch.save(randomize(theirs).state_dict(), tmp_path / "timm.pth")
    ours = hub.load(tmp_path / "timm.pth")
    assert ours.num_register_tokens == registers and ("w12" in str(ours)) == (kind == "swiglu")
    for images in randn(1, *HUB_SIZES):
        expected = theirs.forward_features(images).detach()
        assert expected.std() > 0.5
        assert_close(ours(images), expected[:, 0], 1e-5, "CLS")
        patches = ours.forward_features(images)["x_norm_patchtokens"]
        assert_close(patches, expected[:, 1 + registers :], 1e-5, "patches")


@pytest.mark.parametrize("name", ["dinov2_vitb14_reg", "dinov2_vitg14", "dinov2_vitg14_reg"])
def test_hub_released_shapes(name):
    """timm's and transformers' networks of the released sizes have the weights that we take them to have."""
    timm, transformers = pytest.importorskip("timm"), pytest.importorskip("transformers")
    size, reg = {"b": "base", "g": "giant"}[name[10]], name.endswith("_reg")
    sizes = dict(base=(768, 12), giant=(1536, 40))[size]
    config = dict(zip(("hidden_size", "num_hidden_layers"), sizes), num_attention_heads=sizes[0] // 64, image_size=518)
    kind = f"Dinov2{'WithRegisters' * reg}"
    with torch.device("meta"):
        of_timm = timm.create_model(f"vit_{size}_patch14_{'reg4_' * reg}dinov2", pretrained=False)
        of_transformers = getattr(transformers, f"{kind}Model")(getattr(transformers, f"{kind}Config")(
            **config, patch_size=14, use_swiglu_ffn=size == "giant"))
    for theirs in (of_timm, of_transformers):
        weights = hub.to_official(name, theirs.state_dict())
        assert {k: list(v.shape) for k, v in weights.items()} == golden.json("shapes")[name]


def test_hub_safetensors(tmp_path, monkeypatch):
    vit, path = hub_vit(4), tmp_path / "model.safetensors"
    path.write_bytes(b"damaged")
    with monkeypatch.context() as patch, pytest.raises(ValueError, match="pip install safetensors"):
        patch.setitem(sys.modules, "safetensors", None)
        patch.setitem(sys.modules, "safetensors.torch", None)
        hub.load(path)
    safetensors = pytest.importorskip("safetensors.torch")
    with pytest.raises(ValueError, match="model.safetensors is truncated or is no safetensors file"):
        hub.load(path)
    safetensors.save_file(as_transformers(vit.state_dict()), path)
    for spec in (path, tmp_path):
        assert hub.read(spec)[0] == str(path)
        assert all(torch.equal(v, vit.state_dict()[k]) for k, v in hub.load(spec).state_dict().items())


@pytest.mark.parametrize("layout", ["released", "transformers", "transformers 5", "timm"])
def test_hub_is_strict(layout):
    """Any weight missing, of another shape or too much is an error, never a guess. (A file without registers is one of
    a network without.)"""
    vit = model.DinoVisionTransformer(**HUB_VIT | dict(depth=2), num_register_tokens=4, ffn_layer="swiglu")
    weights = HUB_LAYOUTS[layout](vit.state_dict())
    for key in [k for k in weights if ".0." not in k]:
        wrong = [weights | {key: torch.zeros(shape)} for shape in ((), (3,), (2, 2, 2))]
        wrong.append({k + "_" * (k == key): v for k, v in weights.items()})
        if not key.endswith(("mask_token", "register_tokens")):
            wrong.append({k: v for k, v in weights.items() if k != key})
        for i, ckpt in enumerate(wrong):
            with pytest.raises(ValueError):
                hub.load("x.pth", ckpt)
                pytest.fail(f"{key}, case {i}, went unnoticed")


def test_hub_names_what_does_not_fit(tmp_path):
    weights = hub_vit().state_dict()
    hf = as_transformers(weights)
    del weights["norm.bias"], hf["encoder.layer.1.attention.attention.key.weight"]
    whole = hub_vit().state_dict()
    for ckpt, text in (
        (weights, "x.pth is from another architecture: keys 1 missing, such as norm.bias"),
        (hf, "1 missing, such as blocks.1.attn.qkv.weight; 2 unexpected, such as blocks.1.attn.q.weight"),
        (whole | {"neck.0.weight": torch.ones(2)}, "1 unexpected, such as neck.0.weight"),
        (whole | {"blocks.2.mlp.fc1.weight": torch.ones(9, 128)}, "of another shape, such as blocks.2.mlp.fc1.weight"),
        (whole | {"pos_embed": torch.ones(1, 12, 128)}, "1 of another shape, such as pos_embed"),
        (whole | {"pos_embed": torch.ones(17, 128)}, "pos_embed missing or of another shape"),
        (whole | {"module.norm.bias": torch.ones(128)}, "holds norm.bias twice, the second time as module.norm.bias"),
        (whole | {"blocks.0.attn.q.bias": torch.ones(128)}, "unexpected, such as blocks.0.attn.q.bias"),
        (as_transformers(whole) | {"blocks.0.attn.qkv.bias": torch.ones(384)}, "unexpected, such as blocks.0.attn.k.b"),
        (dict(fc=torch.ones(2)), "no DINOv2 backbone: cls_token, pos_embed, .* missing .*its entries: fc"),
        (dict(model=dict(fc=torch.ones(2))), "holds no DINOv2 backbone"),
        (dict(teacher=torch.ones(2)), "holds no DINOv2 backbone"),
        ({1: torch.ones(2)}, "holds no DINOv2 backbone"),
        ({}, "holds no DINOv2 backbone"),
    ):
        with pytest.raises(ValueError, match=text):
            hub.load("x.pth", ckpt)


def test_hub_heads_of_transformers_are_in_its_config(tmp_path):
    wide = hub_vit().state_dict()
    torch.save(as_transformers(wide), tmp_path / "pytorch_model.bin")
    for text, n in (('{"num_attention_heads": 4, "hidden_size": 128}', 4), ('{"hidden_size": 128}', 2), ("[", 2),
                    ('{"num_attention_heads": 4, "hidden_size": 64}', 2)):
        (tmp_path / "config.json").write_text(text)
        assert hub.load(tmp_path).num_heads == n, text
    assert hub.load(tmp_path, num_heads=8).num_heads == 8


def test_hub_refuses_code_and_what_is_no_checkpoint(tmp_path):
    Path("/tmp/dinov2_test_was_executed").unlink(missing_ok=True)
    torch.save(dict(teacher=Payload()), tmp_path / "pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    for spec, text in ((tmp_path, "pytorch_model.bin holds pickled code, not just weights: refused"),
                       (tmp_path / "empty", "empty is a folder; name the checkpoint in it, as .*empty/ckpt.pth"),
                       (tmp_path / "none.pth", r"no such checkpoint: .*none.pth; give a file, .*\[_reg\]$"),
                       ("dinov2_vitx14_reg", "no such checkpoint: .* did you mean dinov2_vit.14_reg?"),
                       ("\0", "no such checkpoint")):
        with pytest.raises(ValueError, match=text):
            hub.load(spec)
    assert not Path("/tmp/dinov2_test_was_executed").exists()


def test_hub_released_names(tmp_path, monkeypatch):
    """Where each of the eight comes from and goes to; a file that is there is not downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    asked = []

    def offline(url, *args, **kwargs):
        asked.append(url)
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    for name in hub.RELEASED:
        file = f"{name.replace('_reg', '_reg4')}_pretrain.pth"
        with pytest.raises(ValueError, match=f"no route to host.* put it at {tmp_path}/hub/checkpoints/{file}$"):
            hub.load(name)
        assert asked.pop() == f"https://dl.fbaipublicfiles.com/dinov2/{name.removesuffix('_reg')}/{file}"
    assert len(hub.RELEASED) == len(RELEASED) == 8 and list((tmp_path / "hub/checkpoints").iterdir()) == []
    torch.save(hub_vit(4).state_dict(), tmp_path / "hub/checkpoints/dinov2_vits14_reg4_pretrain.pth")
    assert hub.load("dinov2_vits14_reg").num_register_tokens == 4 and asked == []


def test_hub_download(tmp_path, monkeypatch):
    """By torch.hub's own function, from a folder instead of the network. What is cut short is not kept."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub, "URL", (tmp_path / "there").as_uri())
    file = tmp_path / "there/dinov2_vitb14/dinov2_vitb14_pretrain.pth"
    file.parent.mkdir(parents=True)
    torch.save(hub_vit().state_dict(), file)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], b"<html>Please log in</html>"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="could not be downloaded .*truncated"):
            hub.load("dinov2_vitb14")
        assert list((tmp_path / "home/hub/checkpoints").iterdir()) == []
    file.write_bytes(whole)
    path, ckpt = hub.read("dinov2_vitb14")
    assert [str(p) for p in (tmp_path / "home/hub/checkpoints").iterdir()] == [path]
    assert ckpt.keys() == hub_vit().state_dict().keys()


@pytest.mark.parametrize("layers", [1, 4])
def test_hub_classifier(layers, tmp_path):
    vit = randomize(model.DinoVisionTransformer(**HUB_VIT | dict(depth=5), num_register_tokens=4))
    head = dict(zip(("weight", "bias"), randn(2, (7, (1 + layers) * 128), (7,))))
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    torch.save(head, tmp_path / "head.pth")
    images = randn(1, (2, 3, 56, 56))[0]
    tokens, normed = vit.prepare_tokens_with_masks(images), []
    for block in vit.blocks:
        tokens = block(tokens)
        normed.append(vit.norm(tokens))  # (B, 1+4+16, D)
    features = [t[:, 0] for t in normed[-layers:]] + [normed[-1][:, 5:].sum(1) / 16]
    expected = torch.cat(features, 1) @ head["weight"].T + head["bias"]
    classifier = hub.load_classifier(tmp_path / "vit.pth", tmp_path / "head.pth")
    assert classifier.layers == layers and not classifier.training
    assert expected.std() > 1
    assert_close(classifier(images), expected, 1e-4)
    assert {k.split(".")[0] for k in classifier.state_dict()} == {"backbone", "linear_head"}
    assert all(torch.equal(v, head[k]) for k, v in classifier.linear_head.state_dict().items())


def test_hub_classifier_errors(tmp_path):
    torch.save(hub_vit().state_dict(), tmp_path / "vit.pth")
    for head, text in (
        (dict(weight=torch.zeros(5, 768), bias=torch.zeros(5)), "takes 768 features, those of this one, 128 wide"),
        (dict(weight=torch.zeros(5, 256)), "holds no linear head"),
        (dict(weight=torch.zeros(5, 256), bias=torch.zeros(4)), "holds no linear head"),
        (dict(weight=torch.zeros(5), bias=torch.zeros(5)), "holds no linear head"),
        (dict(weight=torch.zeros(5, 256), bias=torch.zeros(5), scale=torch.ones(1)), "holds no linear head"),
        (hub_vit().state_dict(), "holds no linear head.*its entries: cls_token, pos_embed"),
        (dict(weight=Payload()), "holds pickled code"),
    ):
        torch.save(head, tmp_path / "head.pth")
        with pytest.raises(ValueError, match=text):
            hub.load_classifier(tmp_path / "vit.pth", tmp_path / "head.pth")
    with pytest.raises(ValueError, match="1 or 4 layers, not 2"):
        hub.LinearClassifier(hub_vit(), torch.nn.Linear(3, 3), 2)


def test_hub_entry_points(tmp_path, monkeypatch):
    """All 25 official names and 9 of ours; the networks have the released keys and shapes, kwargs and layers are heard."""
    points = hub.entry_points()
    assert len(points) == 34 and all(points[n].__name__ == n and points[n].__doc__ for n in points)
    for name in hub.RELEASED:
        with torch.device("meta"):
            vit, linear = points[name](pretrained=False), points[f"{name}_lc"](pretrained=False, layers=1)
        assert {k: list(v.shape) for k, v in vit.state_dict().items()} == golden.json("shapes")[name]
        assert linear.linear_head.weight.shape == (1000, 2 * vit.embed_dim) and vit.training and linear.training
        rule = (vit.interpolate_offset, vit.interpolate_antialias)
        assert rule == ((0.0, True) if name.endswith("_reg") else (0.1, False))
    assert points["dinov2_vits14"](pretrained=False, drop_path_rate=0.5).blocks[-1].drop_path == 0.5
    with pytest.raises(NotImplementedError, match="dinotxt_tet1280d20h24l is not here"):
        points["dinov2_vitl14_reg4_dinotxt_tet1280d20h24l"](pretrained=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(hub, "URL", "file:///nowhere")
    for kwargs, file in ((dict(), "dinov2_vits14_reg4_pretrain"), (dict(weights="LVD142M"), "dinov2_vits14_reg4_pre")):
        with pytest.raises(ValueError, match=f"file:///nowhere/dinov2_vits14/{file}.* put it at {tmp_path}"):
            points["dinov2_vits14_reg"](**kwargs)
    for kwargs, text in ((dict(weights="XRay"), "neither 'LVD142M', the released ones, nor a file"),
                         (dict(weights=os.devnull), "no PyTorch|not a PyTorch")):
        with pytest.raises(ValueError, match=text):
            points["dinov2_vits14"](**kwargs)


def test_hub_entry_points_load(tmp_path, monkeypatch):
    """With small networks in the place of ViT-S: backbone and both heads from the cache or from named files."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(model.ARCHS, "vit_small", dict(embed_dim=64, depth=4, num_heads=1))
    cache, points = tmp_path / "hub/checkpoints", hub.entry_points()
    cache.mkdir(parents=True)
    vit = randomize(points["dinov2_vits14"](pretrained=False))
    torch.save(vit.state_dict(), cache / "dinov2_vits14_pretrain.pth")
    for layers, name in ((1, "linear"), (4, "linear4")):
        head = dict(zip(("weight", "bias"), randn(layers, (1000, (1 + layers) * 64), (1000,))))
        torch.save(head, cache / f"dinov2_vits14_{name}_head.pth")
    images = randn(1, (2, 3, 28, 42))[0]
    ours = points["dinov2_vits14"]()
    assert ours.training and torch.equal(ours(images), vit(images)) and next(ours.parameters()).requires_grad
    for layers, name in ((1, "linear"), (4, "linear4")):
        file = cache / f"dinov2_vits14_{name}_head.pth"
        expected = hub.load_classifier("dinov2_vits14", file)(images)
        assert torch.equal(points["dinov2_vits14_lc"](layers=layers)(images), expected)
        assert torch.equal(points["dinov2_vits14_lc"](layers=layers, weights=str(file))(images), expected)
    with pytest.raises(ValueError, match="a head for 4 layers; call this with layers=4"):
        points["dinov2_vits14_lc"](layers=1, weights=str(file))
    with pytest.raises(ValueError, match="1 or 4 layers, not 2"):
        points["dinov2_vits14_lc"](layers=2)
    with pytest.raises(ValueError, match="from another architecture"):
        points["dinov2_vits14"](img_size=224)


@pytest.mark.parametrize("order", ["before", "after"])
def test_hub_by_torch_hub_beside_modules_of_the_same_names(order, tmp_path):
    """From a foreign folder, whose own modules of our names are imported before or after."""
    for name in ("model", "data", "losses", "train", "hub"):
        (tmp_path / f"{name}.py").write_text(f"mine = {name!r}")
    mine = "import model, data, losses, train, hub\nassert hub.mine == 'hub' and model.mine == 'model'\n"
    load = (f"import torch, copy, pickle\nvit, linear = (torch.hub.load({str(HERE)!r}, n, source='local', "
            "pretrained=False) for n in ('dinov2_vits14', 'dinov2_vits14_reg_lc'))\n"
            "assert vit(torch.zeros(1, 3, 28, 28)).shape == (1, 384) and type(linear.backbone) is type(vit)\n"
            "pickle.loads(pickle.dumps(copy.deepcopy(vit)))\n")
    check = "import sys\nassert 'torchvision' not in sys.modules and model.mine == 'model'\n" + mine
    code = mine + load + check if order == "before" else load + mine + check
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("to", ["official", "safetensors", "timm", "hf"])
@pytest.mark.parametrize("registers,ffn", [(0, "mlp"), (4, "swiglu")])
def test_hub_convert_there_and_back(to, registers, ffn, tmp_path, capsys):
    """The features at the size of the weights stay the same, and all weights that the layout has."""
    if to in ("safetensors", "hf"):
        pytest.importorskip("safetensors")
    vit, images = hub_vit(registers, ffn), randn(1, (2, 3, 56, 56))[0]
    out = tmp_path / {"official": "b.pth", "safetensors": "b.safetensors", "timm": "b.pth", "hf": "b"}[to]
    torch.save(dict(teacher=prefixed("backbone.", vit.state_dict())), tmp_path / "a.pth")
    hub.main(["convert", str(tmp_path / "a.pth"), str(out), "--to", to])
    told = capsys.readouterr()
    assert f"layout {to}" in told.out and ("at others" in told.err) == (not registers and to in ("timm", "hf"))
    assert hub.layout_of(hub.read(out)[1]) == dict(timm="timm", hf="transformers").get(to, "official")
    again = hub.load(out)
    assert_close(again(images), vit(images), 1e-5 if to == "timm" and registers else 0)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["a.pth", out.name])
    hub.main(["convert", str(out), str(tmp_path / "c.pth"), "--to", "official"])
    assert_close(hub.load(tmp_path / "c.pth")(images), vit(images), 1e-5 if to == "timm" and registers else 0)


def test_hub_convert_is_read_by_transformers_and_timm(trained, tmp_path):
    transformers, timm = pytest.importorskip("transformers"), pytest.importorskip("timm")
    vit, images = randomize(hub.load(trained / "ckpt.pth")), randn(1, (2, 3, 12, 12))[0]
    ckpt = torch.load(trained / "ckpt.pth", weights_only=True)
    torch.save(ckpt | dict(teacher=prefixed("backbone.", vit.state_dict())), tmp_path / "a.pth")
    hub.main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "hf"), "--to", "hf"])
    theirs = transformers.AutoModel.from_pretrained(tmp_path / "hf").eval()
    assert_close(theirs(images).last_hidden_state[:, 0].detach(), vit(images), 1e-5)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "hf")
    assert processor.crop_size["height"] == 12 and processor.size["shortest_edge"] == 12
    assert_close(hub.load(tmp_path / "hf")(images), vit(images), 0)  # 2 heads, 32 wide
    with pytest.raises(ValueError, match="2 heads for a width of .* use --to hf"):
        hub.main(["convert", str(tmp_path / "a.pth"), str(tmp_path / "b.pth"), "--to", "official"])
    for registers in (0, 4):
        big = timm.create_model(f"vit_small_patch14_{'reg4_' * bool(registers)}dinov2", pretrained=False)
        torch.save(hub.backbone(f"dinov2_vits14{'_reg' * bool(registers)}", pretrained=False).state_dict(),
                   tmp_path / "s.pth")
        hub.main(["convert", str(tmp_path / "s.pth"), str(tmp_path / "t.pth"), "--to", "timm"])
        big.load_state_dict(torch.load(tmp_path / "t.pth", weights_only=True))
        x = randn(1, (1, 3, 518, 518))[0]
        assert_close(big.eval()(x).detach(), hub.load(tmp_path / "s.pth")(x).detach(), 1e-5)


def test_hub_info(trained, tmp_path, capsys):
    torch.save(hub_vit(4, "swiglu").state_dict(), tmp_path / "a.pth")
    torch.save(dict(weight=torch.ones(7, 1920), bias=torch.ones(7)), tmp_path / "head.pth")
    with torch.device("meta"):
        shapes = hub.backbone("dinov2_vits14", pretrained=False).state_dict()
    chunked = {re.sub(r"blocks\.(\d+)", r"blocks.0.\1", f"backbone.{k}"): torch.zeros(v.shape).half()
               for k, v in shapes.items()}
    torch.save(dict(teacher=chunked), tmp_path / "s.pth")
    for path, texts in (
        (trained / "ckpt.pth", ("layout       train.py", "digits, ", "2 heads, MLP", "left out")),
        (tmp_path / "a.pth", ("official", "128 wide, 3 blocks, 2 heads, SwiGLU, 4 registers", "with antialiasing")),
        (tmp_path / "head.pth", ("7 classes, 1,920 features: 4 CLS of a backbone 384 wide",)),
        (tmp_path / "s.pth", ("official, blocks in chunks", "22,056,576 in float16", "same as      dinov2_vits14,")),
    ):
        hub.main(["info", str(path)])
        told = capsys.readouterr().out
        assert all(text in told for text in texts), told


def test_data_image_paths_come_once(tmp_path, cache):
    write_images(tmp_path / "a", ["0.png", "1.png"])
    found = data.image_paths([str(tmp_path / "a/1.png"), str(tmp_path / "a")])
    assert [Path(p).name for p in found] == ["1.png", "0.png"]


def test_data_fit_brings_images_to_multiples_of_the_patch():
    """Where a pixel goes is what Fit says; padding has the mean color; sizes that are given are kept."""
    image = torch.zeros(3, 40, 90, dtype=torch.uint8)
    image[:, 20:24, 60:64] = 255  # a square whose middle is (62, 22)
    for how, size, canvas in (("crop", (), (28, 84)), ("pad", (), (42, 98)), ("resize", (), (42, 84)),
                              ("crop", (80,), (70, 168)), ("pad", (80,), (84, 182)), ("resize", (80,), (84, 182)),
                              ("crop", (56, 70), (56, 70)), ("pad", (56, 70), (56, 70)), ("resize", (56, 70), (56, 70))):
        fit = data.plan_fit(40, 90, 14, how, size)
        out = data.fit_image(image, fit)
        assert out.shape[1:] == fit.canvas == canvas and out.dtype == torch.uint8
        x, y = fit.left + 62 * fit.scaled[1] / 90, fit.top + 22 * fit.scaled[0] / 40
        if 0 <= x < canvas[1]:
            bright = (out[0].float() * (torch.arange(canvas[1]) - x).abs().lt(20)).clamp(min=130) - 130
            ys, xs = torch.meshgrid(*(torch.arange(n) + 0.5 for n in canvas), indexing="ij")
            assert abs((bright * xs).sum() / bright.sum() - x) < 1 and abs((bright * ys).sum() / bright.sum() - y) < 1
        if how == "pad":
            assert out[:, 0, 0].tolist() == [124, 116, 104]
    deep = data.fit_image(image.to(torch.uint16) * 257, data.plan_fit(40, 90, 14, "pad"))
    assert deep.dtype == torch.uint16 and deep[0, 0, 0] == round(0.485 * 65535)
    for hw, args, text in (((10, 90), (), "10x90 pixels is less than one patch of 14x14"),
                           ((40, 90), ("crop", (50, 70)), "size 50 is no multiple of the patch size 14; the nearest is 56")):
        with pytest.raises(ValueError, match=text):
            data.plan_fit(*hw, 14, *args)
    assert data.plan_fit(10, 90, 14, "pad").canvas == (14, 98)


def test_hub_features(tmp_path, cache, capsys):
    """Of images and folders, in one file or one each: equal to the model's, whatever the batch."""
    vit, photos, paths = hub_vit(4), tmp_path / "photos", {}
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    write_images(photos, ["b.png", "sub/a.png", "sub/c.png"], size=(60, 90))
    write_images(tmp_path, ["own.png"], size=(90, 60))
    (photos / "bad.png").write_bytes(b"no image")
    for k in ("b.png", "sub/a.png", "sub/c.png"):
        paths[k] = photos / k
    model_flags = ["--model", str(tmp_path / "vit.pth"), "--batch-size", "2", "--num-workers", "0"]
    hub.main(["features", str(photos), str(tmp_path / "own.png"), *model_flags, "--out", str(tmp_path / "f.npz")])
    assert "4 images" in (told := capsys.readouterr()).out and "bad.png cannot be read" in told.err
    stacked = np.load(tmp_path / "f.npz")
    assert [Path(f).name for f in stacked["files"]] == ["b.png", "a.png", "c.png", "own.png"]
    assert stacked["cls"].shape == (4, 128) and stacked["patches"].shape == (4, 4, 4, 128)
    hub.main(["features", str(photos), str(tmp_path / "own.png"), *model_flags, "--out", str(tmp_path / "each"),
              "--size", "0", "--fit", "pad"])
    for i, (path, name) in enumerate(((tmp_path / "own.png", "own.png"), (photos / "sub/c.png", "photos/sub/c.png"))):
        one = np.load(tmp_path / f"each/{name}.npz")
        image = data.read_image(str(path))
        for fit, given in ((data.plan_fit(*image.shape[1:], 14, "pad"), one),
                           (data.plan_fit(*image.shape[1:], 14, "crop", (56, 56)), {k: stacked[k][3 - i] for k in one})):
            out = vit.forward_features(data.normalize(data.to_float(data.fit_image(image, fit)[None])))
            for key, whole in (("cls", "clstoken"), ("registers", "regtokens"), ("patches", "patchtokens")):
                expected = out[f"x_norm_{whole}"][0].detach()
                assert_close(torch.from_numpy(given[key]).view(expected.shape), expected, 1e-5, key)
    for argv, text in (
        ([str(photos), str(tmp_path / "own.png"), "--size", "0"], "own.png has 6x4 patches, .* give --size HEIGHT WIDTH"),
        ([str(photos / "bad.png")], "bad.png cannot be read as an image"),
        ([str(tmp_path / "none.png")], "no such image or folder: .*none.png"),
        ([str(tmp_path / "own.png"), "--size", "10", "--fit", "crop"], "10x10 pixels is less than one patch"),
        ([str(tmp_path / "own.png"), "--size", "50", "56"], "size 50 is no multiple"),
        ([str(tmp_path / "own.png"), "--size", "1", "2", "3"], "--size takes height and width"),
        ([str(tmp_path / "own.png"), "--fit", "stretch"], "invalid choice: 'stretch'"),
    ):
        with pytest.raises(ValueError, match=text):
            hub.main(["features", *argv, *model_flags, "--out", str(tmp_path / "g.npz")])
    assert not list(tmp_path.glob("*g.npz*")) and sorted(p.name for p in (tmp_path / "each").rglob("*.npz")) == [
        "a.png.npz", "b.png.npz", "c.png.npz", "own.png.npz"]


@pytest.mark.parametrize("suffix", [".pt2", ".onnx"])
def test_hub_export(suffix, tmp_path, capsys):
    """A program for images of one size, not square, and batches of any; its outputs are the model's."""
    vit, out = hub_vit(4), tmp_path / f"vit{suffix}"
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    argv = ["export", str(out), "--model", str(tmp_path / "vit.pth"), "--size", "42", "70"]
    if suffix == ".onnx":
        if importlib.util.find_spec("onnxscript") is None:
            with pytest.raises(ValueError, match="pip install onnx onnxscript onnxruntime"):
                hub.main(argv)
        onnxruntime = pytest.importorskip("onnxruntime")
    hub.main(argv)
    assert "on batches of 1, 2 and 3 images 42x70" in capsys.readouterr().out
    images = randn(1, (5, 3, 42, 70))[0]
    if suffix == ".pt2":
        given = torch.export.load(out).module()(images)
    else:
        session = onnxruntime.InferenceSession(out, providers=["CPUExecutionProvider"])
        names = [o.name for o in session.get_outputs()]
        given = dict(zip(names, map(torch.from_numpy, session.run(names, {"images": images.numpy()}))))
    expected = vit.forward_features(images)
    for key, whole in (("cls", "clstoken"), ("registers", "regtokens"), ("patches", "patchtokens")):
        assert_close(given[key].detach(), expected[f"x_norm_{whole}"].detach(), 1e-5, key)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(["vit.pth", out.name])


def test_hub_refuses_features_that_are_not_finite(tmp_path):
    weights = hub_vit().state_dict()
    torch.save(weights | {"norm.weight": torch.full((128,), torch.nan)}, tmp_path / "nan.pth")
    write_images(tmp_path, ["a.png"])
    flags = ["--model", str(tmp_path / "nan.pth")]
    for argv in (["features", str(tmp_path / "a.png"), "--out", str(tmp_path / "f.npz")],
                 ["export", str(tmp_path / "f.pt2"), "--size", "28"]):
        with pytest.raises(ValueError, match="nan.pth are not finite"):
            hub.main([*argv, *flags])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "nan.pth"]


def test_hub_command_errors(tmp_path):
    torch.save(hub_vit().state_dict(), tmp_path / "vit.pth")
    vit = str(tmp_path / "vit.pth")
    for argv, text in (
        (["inform", vit], "unknown command 'inform', did you mean info?"),
        (["info", "none.pth"], "no such checkpoint: none.pth"),
        (["convert", vit, vit, "--to", "official"], "is the file to convert"),
        (["convert", vit, str(tmp_path / "b.txt"), "--to", "timm"], "must end in .pth or .safetensors"),
        (["convert", vit, str(tmp_path / "b.pth"), "--to", "safetensors"], "must end in .safetensors"),
        (["convert", vit, str(tmp_path), "--to", "hf"], "exists; name a new folder"),
        (["convert", vit, "/proc/b.pth", "--to", "official"], "/proc/b.pth could not be written"),
        (["export", "b.pt", "--model", vit], "must be a file that ends in .onnx or .pt2"),
        (["convert", vit, f"{vit}/b.pth", "--to", "official"], "vit.pth/b.pth could not be written"),
        (["features", str(HERE / "pictures"), "--model", vit, "--device", "meta", "--out", "f.npz"], "'meta' is no dev"),
        (["export", "b.pt2", "--model", vit, "--size", "50"], "multiples of this model's patch size, 14"),
        (["features", "a.png", "--model", vit, "--out", vit], "is no file that ends in .npz, and no folder"),
        (["features", "a.png", "--model", vit, "--out", "f.txt"], "is no file that ends in .npz, and no folder"),
        (["features", "a.png", "--out", "f.npz"], "required: --model"),
    ):
        with pytest.raises(ValueError, match=text):
            hub.main(argv)
    assert [p.name for p in tmp_path.iterdir()] == ["vit.pth"]
    result = subprocess.run([sys.executable, HERE / "hub.py", "info", "none"], capture_output=True, text=True)
    assert result.returncode == 2 and result.stderr.startswith("error: no such checkpoint") and not result.stdout


# ----------------------------------------------------------------------------------------------------------------------
# bench.py


def test_bench_save(capsys):
    bench.main(["save", "--preset", "digits", "--repeats", "1", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 6 and all(row["ms"] == row["ms"] for row in rows) and rows[0]["ms"] > 0 and rows[2]["ms"] > 0
    with pytest.raises(ValueError, match="unknown preset 'digit', did you mean digits"):
        bench.main(["save", "--preset", "digit"])
    with pytest.raises(ValueError, match="--every says nothing to `bench.py knn`; it is for logreg"):
        bench.main(["knn", "--every", "2"])


@pytest.mark.parametrize("preset,teraflop", [("vits16_short", 0.123), ("vitb16_short", 0.444), ("vitl16_short", 1.535),
                                             ("vitl14", 2.04), ("vitg14", 7.54)])
def test_bench_nominal_flops(preset, teraflop):
    assert bench.train_flops(train.Config(**train.PRESETS[preset])) == pytest.approx(teraflop * 1e12, rel=0.02)


def test_bench_scale(capsys):
    """What must hold between the modes; and bytes by hand, of ViT-L/14 on 8 GPUs."""
    bench.main(["scale", "--preset", "vitl14", "--json"])
    network, *rows = json.loads(capsys.readouterr().out)["rows"]
    rows = {row["sharding"]: row for row in rows}
    assert tuple(rows) == train.SHARDINGS and network["images per GPU"] == 32
    backbone, heads = 1e6 * network["backbone, M"], 1e6 * network["heads, M"]
    gathered = 2 * backbone + 4 * heads
    by_hand = dict(ddp=8 * (backbone + heads), zero2=2 * gathered + 4 * (backbone + heads))
    by_hand |= dict(hsdp=by_hand["zero2"], zero3=by_hand["zero2"] + 2 * backbone)
    for mode, size in by_hand.items():
        assert rows[mode]["8: GB"] == pytest.approx(7 / 8 * size / 1e9)
    across = 2 * 3 / 4 * 4 * (backbone + heads) / 8  # four machines add up eighths, of float32
    assert rows["hsdp"]["32: GB"] == rows["ddp"]["32: GB"] == pytest.approx(across / 1e9)
    assert rows["ddp"]["8: memory"] > rows["hsdp"]["8: memory"] == rows["zero2"]["8: memory"] > rows["zero3"]["8: memory"]
    assert rows["hsdp"]["256: memory"] == rows["hsdp"]["8: memory"] > rows["zero2"]["256: memory"]
    kept = [network[f"GB, checkpointing {way}"] for way in train.CHECKPOINTING]
    assert kept[0] > 1.5 * kept[1] > 4 * kept[2]


@pytest.mark.parametrize("way", train.CHECKPOINTING)
def test_bench_estimates_activations(way):
    """What a block on the meta device keeps, times the blocks, is what a real backbone keeps, but for its embeddings and
    its last norm."""
    cfg = train.Config(**train.PRESETS["digits"] | dict(device="cpu", dtype="fp32", activation_checkpointing=way, drop_path_rate=0.3))
    results = multiprocessing.SimpleQueue()
    bench.measure_steps(cfg, results)
    estimate, tokens = 3 * bench.block_bytes(cfg, 128, torch.float32)[way], 128 * (2 * 10 + 2 * 5) * 64 * 4
    assert 0.95 * estimate < results.get()[0] < estimate + 3 * tokens  # here, the rows to drop are rounded by groups


def bench_rows(capsys, *argv) -> list[dict]:
    bench.main([*map(str, argv), "--json"])
    return json.loads(capsys.readouterr().out)["rows"]


@pytest.mark.parametrize("flags", [[], ["--compile", "--gradient-accumulation-steps", 2, "--drop-path-rate", 0.3, "--centering", "centering"]])
def test_bench_train(flags, capsys, tmp_path, monkeypatch):
    """The parts are all that train.py names, and no figure is out of its range."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))  # captured, but not translated
    rows = bench_rows(capsys, "train", "--preset", "digits", "--batch-size", 16, "--group-size", 8, "--device", "cpu",
                      "--repeats", 1, "--num-workers", 0, "--profile", tmp_path / "trace.json", *flags)
    figures = {row["figure"]: row["value"] for row in rows if "figure" in row}
    assert figures["images per second"] == pytest.approx(16 / figures["seconds per step of 16 images"])
    assert all(figures[name] > 0 for name in list(figures)[:8]) and figures["share of that rate"] < 1.5
    assert figures["GB beyond the imports"] < figures["GB at most"]
    cfg = train.Config(**train.PRESETS["digits"])
    assert figures["GFLOP per image, nominal"] == pytest.approx(bench.train_flops(cfg) / 1e9)

    parts = {row["part"]: row for row in rows if "part" in row}
    named = re.findall(r'record_function\("(.+)"\)', inspect.getsource(train))
    assert list(parts)[:2] + list(parts)[-1:] == ["wait for the loader", "color of the crops", "the rest"]
    assert set(list(parts)[2:-1]) == set(named) and len(named) == 6
    assert sum(row["percent"] for row in parts.values()) == pytest.approx(100)
    assert all(row["ms"] > 0 for row in parts.values()) and parts["the rest"]["percent"] < 50
    operators = [row for row in rows if "operator" in row]
    assert len(operators) == 10 and sum(row["percent"] for row in operators) <= 100.1
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert set(named) <= {event.get("name") for event in trace}
    if "--compile" in flags:
        assert figures["graphs compiled"] >= 2 and figures["of these after step 3"] == figures["graph breaks"] == 0


def test_bench_train_counts_flops():
    """The nominal work is what PyTorch counts in a step, stochastic depth and prototypes' share apart: those are
    computed part after part, forward and gradient."""
    from torch.utils.flop_counter import FlopCounterMode

    cfg = train.Config(**train.PRESETS["digits"] | dict(batch_size=32, group_size=32, mask_ratio_min_max=(0.3, 0.3),
                                                        device="cpu", num_workers=0))
    training = bench.Training(cfg, data.open_source("digits"), CPU)
    parts = list(map(training.prepare, training.next_batch()))
    with FlopCounterMode(display=False) as counter:
        training.step(parts)
    dist.destroy_process_group()
    assert counter.get_total_flops() == pytest.approx(32 * bench.train_flops(cfg), rel=0.1)


@pytest.mark.parametrize("centering", ["centering", "sinkhorn_knopp"])
def test_bench_heads(centering, capsys):
    rows = bench_rows(capsys, "heads", "--arch", "vit_nano", "--batch-size", 4, "--head-n-prototypes", 65536,
                      "--head-hidden-dim", 8, "--head-bottleneck-dim", 8, "--device", "cpu", "--centering", centering,
                      "--repeats", 1)
    ours, plain = rows[:2]
    assert len(rows) == 2 + hasattr(torch.nn.functional, "linear_cross_entropy")
    assert all(row["loss"] == pytest.approx(ours["loss"], rel=1e-5) and row["s"] > 0 for row in rows)
    assert 0 < ours["GB"] < 0.8 * plain["GB"] and plain["times_ours_GB"] == plain["GB"] / ours["GB"]


def test_bench_attention(capsys):
    rows = bench_rows(capsys, "attention", "--preset", "digits", "--batch-size", 2, "--device", "cpu", "--repeats", 1)
    assert {row["backend"] for row in rows if "way" in row} == {"flash", "math"} and len(rows) == 8
    assert all(row["ms"] > 0 for row in rows) and [row["times_ours"] for row in rows[:4:3]] == [1, 1]
    assert [row["tokens"] for row in rows[6:]] == ["10 and 5"] * 2 and min(row["times_best"] for row in rows[6:]) == 1

    attention = model.Attention(64, 2)
    shapes = [(2, 10), (3, 5)]
    x, = randn(1, (1, 35, 64))
    assert_close(bench.with_copies(attention, x, shapes), attention(x, shapes), 1e-6)
    qkv = attention.qkv(x)[0].unflatten(-1, (3, 2, 32))
    out = attention.proj(bench.by_sdpa(qkv, [2, 3], [10, 5], 32**-0.5).flatten(1)[None])
    assert_close(out, attention(x, shapes), 1e-6)


def test_bench_gpu(capsys, monkeypatch, tmp_path):
    """The commands are right; what fails or takes too long does not keep the others from running."""
    bench.main(["gpu", "--list"])
    commands = [line.removeprefix("python ") for line in capsys.readouterr().out.splitlines()]
    assert len(commands) >= 10
    for script, *argv in map(shlex.split, commands):
        if script == "train.py":
            train.check(train.parse([*argv, "--device", "cpu"])[0], 1)
        if script == "bench.py":
            bench.parse(argv)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA GPU here; `python bench.py gpu --list`"):
        bench.main(["gpu", "--out", str(tmp_path)])
    table = json.dumps(dict(rows=[dict(way="a", ms=1.5)]))
    monkeypatch.setattr(bench, "GPU_COMMANDS", (shlex.join(["-c", f"print({table!r})", "--json"]), "-c 'raise ValueError(7)'",
                                                "-c 'import time; time.sleep(60)'", "-c 'print(TEMPORARY)'"))
    args = bench.parse(["gpu", "--out", str(tmp_path / "gpu"), "--minutes", "0.05"])
    results = [row["result"] for row in bench.bench_gpu(args, torch.device("cuda"))]
    assert results[0] == "done" and results[1] == "failed (1): ValueError: 7" and set(results[2:]) == {
        "stopped: out of time"}
    assert "| a | 1.50 |" in (tmp_path / "gpu/tables.md").read_text()
    assert json.loads((tmp_path / "gpu/results.json").read_text())["found"] == [json.loads(table)]
    assert "ValueError: 7" in (tmp_path / "gpu/log.txt").read_text()


@pytest.mark.parametrize("argv,text", [
    (["train", "--bach-size", "8"], "unknown argument '--bach-size', did you mean --batch-size"),
    (["train", "--preset", "vits16"], "unknown preset 'vits16', did you mean vits16_short"),
    (["heads", "--centering", "sinkhorn"], "--centering 'sinkhorn', did you mean sinkhorn_knopp"),
    (["attention", "--local-crops-size", "95"], "95 is not a multiple of --patch-size 16; use 80 or 96"),
    (["save", "--batch-size", "8"], "unknown argument '--batch-size'"), (["gpu", "--minutes", "0"], "--minutes")])
def test_bench_errors(argv, text):
    with pytest.raises(ValueError, match=text):
        bench.main(argv)


@pytest.mark.parametrize("what,flags,rows", [("knn", ["--images", 2000, "--queries", 20], 4), ("linear", [], 2),
                                             ("hub", ["--name", "dinov2_vits14"], 4), ("dense", [], 2),
                                             ("logreg", ["--images", 1000, "--every", 22], 3)])
def test_bench_of_evaluations(what, flags, rows, capsys):
    bench.main([what, *["--dim", "8"] * (what != "hub"), "--repeats", "1", "--json", *map(str, flags)])
    found = json.loads(capsys.readouterr().out)["rows"]
    assert len(found) == rows and all(v > 0 for row in found for k, v in row.items() if k in ("s", "ms"))
    if what == "logreg":  # both have solved the same problem
        assert [row["fits"] for row in found] == ["45", "3", "3"] and found[1]["excess"] > -0.1


def test_bench_data(capsys):
    bench.main(["data", "--repeats", "1", "--json"])
    result = json.loads(capsys.readouterr().out)
    rows = {row["stage"]: row for row in result["rows"]}
    assert len(rows) >= 7 and all(row["ms"] > 0 and row["times_official"] > 0 for row in rows.values())
    assert result["about"]["torch"] == torch.__version__ and "python bench.py data" in result["about"]["command"]
    with pytest.raises(ValueError, match="invalid choice"):
        bench.main(["dat"])


# ----------------------------------------------------------------------------------------------------------------------
# eval_knn.py, and what all evaluations share


def results(stem: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in Path(f"{stem}.eval_{name}.jsonl").read_text().splitlines()]


def test_eval_knn_golden():
    """Neighbors, votes, few-shot choices and metrics of the official code."""
    bank, labels, queries, answers = (golden[f"knn/{n}"] for n in (
        "train_features", "train_labels", "test_features", "test_labels"))
    similarity, rows = eval_knn.neighbors(queries @ bank.T, 20)
    assert_close(similarity, golden["knn/sims"], 1e-6)
    assert torch.equal(labels[rows], golden["knn/neighbor_labels"])
    votes = eval_knn.knn_scores(bank, labels, queries, ks=(1, 5, 10, 20))
    for k in votes:
        assert_close(votes[k], golden[f"knn/votes/{k}"], 1e-6, f"k = {k}")
    for attempt in range(2):
        rows = eval_knn.few_shot_rows(labels, 3, attempt)
        assert torch.equal(rows, golden[f"knn/few{attempt}/indices"])
        votes = eval_knn.knn_scores(bank[rows], labels[rows], queries, ks=(1, 3))
        for k in votes:
            assert_close(votes[k], golden[f"knn/few{attempt}/votes/{k}"], 1e-6)
    scores = golden["knn/votes/10"]
    rank, better = eval_knn.ranks(scores, answers), (scores > scores.gather(1, answers[:, None])).sum(1)
    assert_close((rank < 1).float().mean(), golden["knn/metrics/MEAN_ACCURACY/top-1"], 1e-6)
    assert_close((better < 5).float().mean(), golden["knn/metrics/MEAN_ACCURACY/top-5"], 1e-6)
    assert (rank != better).nonzero().flatten().tolist() == [8]  # where two classes have no vote; topk took the other
    measured = eval_linear.accuracies(scores.topk(5).indices[:, None], answers)
    assert_close(measured["top1"], 100 * golden["knn/metrics/MEAN_ACCURACY/top-1"].double()[None], 1e-5)
    assert_close(measured["mean_per_class"], 100 * golden["knn/metrics/MEAN_PER_CLASS_ACCURACY/top-1"].double()[None], 1e-5)
    answers = [[a for a in row if a >= 0] for row in golden["knn/real/target"].tolist()]
    measured = eval_linear.real_accuracies(golden["knn/real/preds"].topk(5).indices[:, None], answers)
    for t in (1, 5):
        assert_close(measured[f"top{t}"], 100 * golden[f"knn/real/top-{t}"].double()[None], 1e-5)


@pytest.mark.parametrize("n", [1, 2, 7, 50, 1000, 1003])
@pytest.mark.parametrize("values", [2, 30, 10**6])
def test_eval_knn_neighbors_are_exact_and_ties_go_by_row(n, values):
    generator = torch.Generator().manual_seed(n)
    x = torch.randint(values, (9, n), generator=generator).float() / values
    for k in {1, min(n, 5), min(n, 40), n}:
        expected = x.sort(dim=1, descending=True, stable=True)
        found, columns = eval_knn.neighbors(x, k)
        assert torch.equal(found, expected.values[:, :k]) and torch.equal(columns, expected.indices[:, :k])
    assert torch.equal(eval_knn.ranks(x, torch.full((9,), n - 1)),
                       (expected.indices == n - 1).int().argmax(1))  # of equal classes the first comes first


def test_eval_knn_without_flags(trained, capsys):
    """The command line on our checkpoints finds data, size and architecture; its figures are those of the run."""
    for path in (trained / "ckpt.pth", trained / "eval/training_2/teacher_checkpoint.pth"):
        result = eval_knn.main([str(path)])
        saved = results(path.with_suffix(""), "knn")[-1]
        assert saved["result"] == result and saved["data"]["val"] == dict(spec="digits:split=VAL", images=360)
        assert len(saved["model"]["sha256"]) == 64 and saved["versions"]["torch"] == torch.__version__
    assert "k=20" in capsys.readouterr().out
    assert metrics(trained)[-1]["knn"] == pytest.approx(eval_knn.main([str(trained / "ckpt.pth"), "--json"]))
    printed = json.loads(capsys.readouterr().out)
    assert printed == results(trained / "ckpt", "knn")[-1] and len(results(trained / "ckpt", "knn")) >= 2


def test_eval_knn_two_processes_equal_one(trained, tmp_path):
    """To the bit: the batches are the same, whoever computes them."""
    flags = [trained / "ckpt.pth", "--out", tmp_path / "results", "--n-per-class", 3, "--tries", 2]
    alone = eval_knn.main([str(f) for f in flags])
    Launched(tmp_path / "log", eval_knn.main, *flags, world=2).wait()
    saved = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert saved[1]["result"] == alone and [s["processes"] for s in saved] == [1, 2]
    assert {"top1_k3_n3", "top5_k3_n3", "top1_k200"} <= alone.keys()


def test_eval_knn_few_shot_is_the_mean_of_its_tries():
    torch.manual_seed(0)
    bank, queries = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (60, 40))
    labels, answers = torch.arange(60) % 4, torch.arange(40) % 4
    tries = [eval_knn.few_shot(bank[rows], labels[rows], queries, answers, 5, 1, (2, 20))
             for rows in (eval_knn.few_shot_rows(labels, 5, t) for t in range(3))]
    mean = eval_knn.few_shot(bank, labels, queries, answers, 5, 3, (2, 20))
    assert set(mean) == {"top1_k2", "top5_k2", "top1_k5", "top5_k5"}  # those up to 5, and 5 itself
    assert len({t["top1_k2"] for t in tries}) > 1
    assert mean["top1_k2"] == pytest.approx(sum(t["top1_k2"] for t in tries) / 3)


def test_eval_knn_leave_one_out_and_small_sets():
    torch.manual_seed(0)
    centers = torch.nn.functional.normalize(torch.randn(4, 16), dim=1)
    labels = torch.arange(40) % 4
    bank = torch.nn.functional.normalize(centers[labels] + 0.05 * torch.randn(40, 16), dim=1)
    assert eval_knn.knn_accuracy(bank, labels, None, ks=(5, 200))["top1_k5"] == 100
    assert eval_knn.knn_accuracy(bank, torch.arange(40), None, ks=(1,))["top1_k1"] == 0  # never its own neighbor
    assert eval_knn.knn_accuracy(bank, labels, bank[:1], labels[:1])["top1_k10"] == 100
    assert eval_knn.knn_accuracy(bank, labels, bank[:4], torch.full((4,), 9))["top5_k10"] == 0  # class 9 has no images
    with pytest.raises(ValueError, match="single image has no neighbor"):
        eval_knn.knn_accuracy(bank[:1], labels[:1], None)
    table, ok = torch.arange(40.0)[:, None].repeat(1, 2), torch.arange(40) % 3 > 0
    rows, left = eval_knn.kept(table, np.where(np.arange(40) % 5 > 0, np.arange(40), -1), ok)
    assert rows[:, 0].tolist() == left.tolist() == [i for i in range(40) if i % 3 and i % 5]
    with pytest.raises(ValueError, match="no image that can be read has a label"):
        eval_knn.kept(table, np.full(40, -1), ok)
    whole = eval_knn.knn_accuracy(bank, labels, bank, labels)
    assert eval_knn.knn_accuracy(bank, labels, bank, labels, chunk=7) == whole


def test_eval_features_are_cached_by_model_and_data(trained, tmp_path, monkeypatch, capsys):
    flags = [str(trained / "ckpt.pth"), "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "results")]
    first, extracted = eval_knn.main(flags), []
    extract = eval_knn.extract_features
    monkeypatch.setattr(eval_knn, "extract_features", lambda *a: extracted.append(a[1].name) or extract(*a))
    assert eval_knn.main(flags) == first and not extracted
    assert eval_knn.main([*flags, "--train", "digits:split=VAL", "--val", "digits"]) and not extracted  # the same images
    eval_knn.main([*flags, "--resize", "20"])
    assert len(extracted) == 2
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    assert eval_knn.main(flags) == first and len(extracted) == 4 and "is damaged" in capsys.readouterr().err
    ckpt = torch.load(trained / "ckpt.pth", weights_only=True)
    ckpt["teacher"]["backbone.norm.bias"] += 1
    torch.save(ckpt, tmp_path / "other.pth")
    eval_knn.main([str(tmp_path / "other.pth"), *flags[1:]])
    assert len(extracted) == 6


def test_eval_of_released_files_and_few_images(tmp_path, cache, monkeypatch):
    """Official weights; 1, 2 and 3 images of odd sizes, and one without a label."""
    vit = model.DinoVisionTransformer(**TINY_VIT | dict(num_heads=1))
    fill(vit, 0, 0.5)
    torch.save(vit.state_dict(), tmp_path / "released.pth")
    write_images(tmp_path / "photos", ["0.png", "1.png", "2.png", "3.png"])
    for n in (3, 2, 1):
        lines = [f"photos/{i}.png\t{'ab'[i % 2]}\n" for i in range(n)] + ["photos/3.png\n"] * (n > 1)
        (tmp_path / f"{n}.txt").write_text("".join(lines))
        result = eval_knn.main([str(tmp_path / "released.pth"), "--train", str(tmp_path / "3.txt"), "--val",
                                str(tmp_path / f"{n}.txt"), "--ks", "1"] if n < 3 else
                               [str(tmp_path / "released.pth"), "--train", str(tmp_path / "3.txt"), "--ks", "1"])
        assert n == 3 or result["top1_k1"] == 100  # each is its own neighbor, and those without a label don't count
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "read", lambda spec: (str(tmp_path / "released.pth"), vit.state_dict()))
    eval_knn.main(["dinov2_vits14", "--train", "3.txt", "--ks", "1"])
    assert results(Path("dinov2_vits14"), "knn")[0]["data"]["train"]["images"] == 4  # here, not in torch.hub's folder


def test_eval_knn_errors(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    write_images(tmp_path / "plain", ["a.png", "b.png"])
    ckpt = str(trained / "ckpt.pth")
    for flags, text in ((["--train", str(tmp_path / "plain")], "has no labels"), (["--crop", "15"], "no multiple"), (["--resize", "9"], "leaves no square"),
                        (["--tempreature", "1"], "unknown argument '--tempreature', did you mean --temperature?"),
                        (["--train", "digits", "--n-per-class", "0"], "must be positive"),
                        (["--val", "digits:split=TRAIN"], "--val is the same as --train")):
        with pytest.raises(ValueError, match=text):
            eval_knn.main([ckpt, *flags])
    broken = torch.load(ckpt, weights_only=True)
    broken["teacher"]["backbone.norm.weight"].fill_(torch.nan)
    torch.save(broken, tmp_path / "broken.pth")
    for main in (eval_knn.main, eval_linear.main, eval_logreg.main):
        with pytest.raises(ValueError, match="features of .* images of digits .* are not finite, such as that of digits"):
            main([str(tmp_path / "broken.pth"), *(["--cached"] if main is eval_linear.main else [])])
    with pytest.raises(ValueError, match="does not say which data to use"):
        torch.save(model.DinoVisionTransformer(**TINY_VIT | dict(num_heads=1), block_chunks=2).state_dict(),
                   tmp_path / "released.pth")
        eval_knn.main([str(tmp_path / "released.pth")])


class FirstPixel(torch.nn.Module):
    def forward(self, x):
        return torch.stack([x[:, 0, 0, 0], torch.ones(len(x))], 1)


def test_eval_knn_mixed_depths_and_bad_files(tmp_path, cache):
    """8 and 16 bits in one batch, with an unreadable file: read on one scale, left out and not counted."""
    for i in range(8):
        path = tmp_path / "d" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        value = 40 + 100 * (i % 2)
        pixels = np.full((8, 8), value * 257, np.uint16) if i > 3 else np.full((8, 8), value, np.uint8)
        Image.fromarray(pixels).save(path)
    (tmp_path / "d/a/0.png").write_bytes(b"damaged")
    source = data.open_source(str(tmp_path / "d"), channels=1)
    table, ok = eval_knn.extract_features(FirstPixel(), source, 8, 8, CPU, mean=(0.5,), std=(0.5,))
    assert ok.tolist() == [False] + [True] * 7
    assert len({tuple(row) for row in table[ok].tolist()}) == 2


def test_eval_knn_classes_are_matched_by_name(tmp_path, monkeypatch):
    """The folders of the two sets need not number their classes alike; unreadable images are left out."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for split, classes in dict(train="abc", val="bc").items():
        for name in classes:
            for i in range(4):
                path = tmp_path / "d" / split / name / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (8, 8), (100 * "abc".index(name),) * 3).save(path)
    (tmp_path / "d/val/b/3.png").write_bytes(b"damaged")
    sources = [data.open_source(s) for s in data.eval_specs(str(tmp_path / "d"))]
    assert eval_knn.evaluate(FirstPixel(), *sources, 8, 8, CPU, ks=(3,))["top1_k3"] == 100
    (tmp_path / "d/val/c").rename(tmp_path / "d/val/z")
    with pytest.raises(ValueError, match="class 'z' that .* does not have"):
        eval_knn.evaluate(FirstPixel(), sources[0], data.open_source(f"{tmp_path}/d:split=VAL"), 8, 8, CPU)


# ----------------------------------------------------------------------------------------------------------------------
# eval_linear.py


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


def test_eval_linear_golden():
    """Six steps of all 52 classifiers."""
    grid = golden_grid()
    for step in range(6):
        outs = [(golden[f"linear/patches/{n}"][step], golden[f"linear/cls/{n}"][step]) for n in range(4)]
        vit = types.SimpleNamespace(get_intermediate_layers=lambda x, n, return_class_token, outs=outs: outs[-n:])
        x = eval_linear.embed(vit, 4, None)
        if step == 0:
            for columns, name in zip(grid.inputs, ("n1_avgFalse", "n1_avgTrue", "n4_avgFalse", "n4_avgTrue")):
                assert_close(x[:, columns], golden[f"linear/input/{name}"], 1e-6)
        factor = 0.5 * (1 + math.cos(math.pi * step / 10))
        rates = torch.tensor(grid.rates, dtype=torch.float64) * factor
        assert_close(rates.repeat(4), golden["linear/rates"][step], 1e-9)
        losses = grid.step(x, golden["linear/labels"][step], 8, factor)
        assert_close(losses.flatten(), golden["linear/losses"][step], 2e-6)
    trained = grid.values.clone()
    set_grid(grid, "final_state_dict")
    assert_close(trained, grid.values, 2e-6)


def test_eval_linear_default_protocol():
    """The released grid, official lengths for ImageNet-1k and shorter ones for small sets."""
    args = eval_linear.parse(["ckpt.pth"])
    assert (args.batch_size, args.epochs, len(args.learning_rates), args.crop_scale) == (1024, 10, 13, [0.08, 1.0])
    vit = types.SimpleNamespace(n_blocks=12, embed_dim=8, state_dict=dict)
    for n, length in ((1_281_167, 1250), (14_000_000, 1250), (60_000, 58), (1437, 50)):
        e = types.SimpleNamespace(args=args, model=vit, train=Numbers(n), device=CPU, model_hash="", crop=8,
                                  stem=lambda: Path("x"), specs=("a", "b"), resize=8)
        assert eval_linear.Probe(e, 10).steps == 10 * length


@pytest.mark.parametrize("cached", [False, True])
def test_eval_linear_two_processes_and_resuming_equal_one(cached, trained, tmp_path, monkeypatch, capsys):
    shutil.copy(trained / "ckpt.pth", tmp_path / "a.pth")
    flags = ["--batch-size", "64", "--epochs", "3", "--epoch-length", "4", *["--cached"] * cached, "--num-workers", "0"]
    alone = eval_linear.main([str(tmp_path / "a.pth"), *flags])
    end = "linear_head_cached.pth" if cached else "linear_head.pth"
    head = torch.load(tmp_path / f"a.{end}", weights_only=True)
    assert len(alone["classifiers"]) == 52 and alone["top1"] == max(alone["classifiers"].values())
    assert ("not the official protocol" in results(tmp_path / "a", "linear")[0]["protocol"]["features"]) == cached
    shutil.copy(trained / "ckpt.pth", tmp_path / "b.pth")
    Launched(tmp_path / "log", eval_linear.main, tmp_path / "b.pth", *flags, world=2).wait()
    two = results(tmp_path / "b", "linear")[0]
    assert two["processes"] == 2 and two["result"]["best_classifier"] == alone["best_classifier"]
    for name, top1 in two["result"]["classifiers"].items():
        assert top1 == pytest.approx(alone["classifiers"][name], abs=0.6), name  # rounding may move an image or two
    other = torch.load(tmp_path / f"b.{end}", weights_only=True)
    assert_close(other["weight"], head["weight"], 1e-5 * head["weight"].abs().max().item())

    steps, step = [], eval_linear.Grid.step
    def killed(*args):
        steps.append(1)
        if len(steps) == 10:
            raise KeyboardInterrupt
        return step(*args)
    shutil.copy(trained / "ckpt.pth", tmp_path / "c.pth")
    monkeypatch.setattr(eval_linear.Grid, "step", killed)
    with pytest.raises(KeyboardInterrupt):
        eval_linear.main([str(tmp_path / "c.pth"), *flags])
    again = eval_linear.main([str(tmp_path / "c.pth"), *flags])
    assert len(steps) == 10 + 4 and "goes on after step 8 of 12" in capsys.readouterr().err
    assert again["classifiers"] == alone["classifiers"] and again["curve"] == alone["curve"]
    assert same(head, torch.load(tmp_path / f"c.{end}", weights_only=True))
    assert not list(tmp_path.glob("*.resume"))


def test_eval_linear_head_is_one_of_the_hub(trained, tmp_path, cache):
    """The winner's file gives in hub.load_classifier the answers that the evaluation counted, and can be evaluated by
    --head, also on further sets."""
    shutil.copy(trained / "ckpt.pth", tmp_path / "a.pth")
    flags = [str(tmp_path / "a.pth"), "--num-workers", "0"]
    result = eval_linear.main([*flags, "--batch-size", "128", "--epochs", "1", "--epoch-length", "20", "--cached"])
    classifier = hub.load_classifier(tmp_path / "a.pth", tmp_path / "a.linear_head_cached.pth")
    source = data.open_source("digits:split=VAL")
    images = torch.stack([data.EvalImages(source, 12, 12)[i][0] for i in range(len(source))])  # the preset's size
    with torch.no_grad():
        answers = classifier(data.normalize(data.to_float(images))).argmax(1)
    assert 100 * (answers == torch.from_numpy(source.labels)).double().mean().item() == pytest.approx(result["top1"])
    write_images(tmp_path / "numbered", [f"{c}/{i}.png" for c in (3, 8) for i in range(2)], size=(16, 16))
    np.save(tmp_path / "map.npy", np.array([3, 8]))
    again = eval_linear.main([*flags, "--head", str(tmp_path / "a.linear_head_cached.pth"), "--test", "digits:split=TRAIN",
                              str(tmp_path / "numbered"), str(tmp_path / "numbered"), "--test-classes", "auto", "auto",
                              str(tmp_path / "map.npy")])
    assert again["top1"] == result["top1"] and again["tests"]["digits:split=TRAIN"]["top1"] > 20
    assert again["tests"][str(tmp_path / "numbered")]["top5"] == 100  # of two classes
    with pytest.raises(ValueError, match="head of another backbone: it takes 7 features"):
        torch.save(dict(weight=torch.zeros(10, 7), bias=torch.zeros(10)), tmp_path / "wrong.pth")
        eval_linear.main([*flags, "--head", str(tmp_path / "wrong.pth")])
    with pytest.raises(ValueError, match="knows 4 classes, digits .* has 10"):
        torch.save(dict(weight=torch.zeros(4, 128), bias=torch.zeros(4)), tmp_path / "wrong.pth")
        eval_linear.main([*flags, "--head", str(tmp_path / "wrong.pth")])


def test_eval_linear_more_processes_than_batches(trained, tmp_path):
    """Two batches of 256 to classify, three processes; in bfloat16, but for the classifiers."""
    shutil.copy(trained / "ckpt.pth", tmp_path / "a.pth")
    flags = ["--batch-size", 7, "--epochs", 1, "--epoch-length", 2, "--num-workers", 0, "--dtype", "bf16"]
    Launched(tmp_path / "log", eval_linear.main, tmp_path / "a.pth", *flags, world=3).wait()
    alone = eval_linear.main([str(f) for f in (tmp_path / "a.pth", *flags, "--no-resume")])
    three = results(tmp_path / "a", "linear")[0]["result"]
    assert three["classifiers"] == pytest.approx(alone["classifiers"], abs=0.6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert next(golden_grid().logits(randn(0, (7, 30))[0])).dtype == torch.float32


def test_eval_linear_mistakes_show_before_the_training(trained, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(eval_linear.Probe, "train", None)
    write_images(tmp_path / "plain", ["a.png"])
    write_images(tmp_path / "names", ["x/a.png", "y/b.png"])
    (tmp_path / "real.json").write_text("{}")
    for flags, text in ((["--test", tmp_path / "plain"], "has no labels; --test needs"), (["--test", "/none"], "no folder"),
                        (["--test", tmp_path / "names"], "class 'x' of .* was not trained by that name"),
                        (["--real", tmp_path / "real.json"], "is not called ILSVRC2012_val"),
                        (["--flip-prob", "-0.3"], "from 0 to 1"), (["--head", "x", "--cached"], "leave --cached out"),
                        (["--batch-size", "0"], "must be positive"), (["--test-classes", "a"], "give one for each")):
        with pytest.raises(ValueError, match=text):
            eval_linear.main([str(trained / "ckpt.pth"), *map(str, flags)])


def test_eval_linear_head_has_zeros_where_the_patches_do_not_count():
    grid = golden_grid()
    x = randn(0, (7, 30))[0]
    for j, name in enumerate(grid.names()):
        head, n = grid.head(j), int(name.split("_")[1])
        logits = x[:, (4 - n) * 6 :] @ head["weight"].T + head["bias"]
        assert head["weight"].shape == (5, (1 + n) * 6)
        assert torch.equal(logits.topk(5).indices.int(), grid.predict(x)[:, j]), name


def test_eval_linear_classes_of_other_test_sets(tmp_path):
    """By name (ImageNet-A, R, Sketch), by folders that are numbers (V2), or by a file."""
    def source(classes, n=0):
        return types.SimpleNamespace(classes=classes, labels=np.arange(n or len(classes)), name="set")

    train = source(["n01", "n02", "n03", "n04"])
    columns = partial(eval_linear.class_columns, train=train, path="auto")
    assert columns(source(["n02", "n04"])).tolist() == [1, 3]
    assert columns(source(["0", "1", "3"])).tolist() == [0, 1, 3]
    numbered = source(["1", "10", "2"])
    assert eval_linear.class_columns(source(["10", "2"]), numbered, "").tolist() == [1, 2]
    with pytest.raises(ValueError, match="class '02' of set was not trained"):
        eval_linear.class_columns(source(["02", "1"]), numbered, "")
    assert eval_linear.class_columns(source(None, 3), source(None, 4), "").tolist() == [0, 1, 2]
    np.save(tmp_path / "map.npy", np.array([3, 0]))
    assert eval_linear.class_columns(source(["x", "y"]), train, str(tmp_path / "map.npy")).tolist() == [3, 0]
    for bad, path, text in ((["n02", "n09"], "auto", "class 'n09' of set was not trained"), (["0", "4"], "", "a class 4"),
                            (["x", "y", "z"], str(tmp_path / "map.npy"), "must hold, for each of the 3 classes"),
                            (["x"], str(tmp_path / "none.npy"), "cannot be read")):
        with pytest.raises(ValueError, match=text):
            eval_linear.class_columns(source(bad), train, path)
    grid = golden_grid()
    x = randn(0, (7, 30))[0]
    few = grid.predict(x, torch.tensor([4, 2]))
    assert set(few.unique().tolist()) == {-1, 0, 1}
    scores = torch.cat(list(grid.logits(x)), 1)
    assert torch.equal(few[..., 0] == 0, scores[..., 4] > scores[..., 2])


def test_eval_linear_real_labels_go_by_file_name(tmp_path):
    names = [f"/val/n1/ILSVRC2012_val_{n:08d}.JPEG" for n in (2, 1, 4)]
    source = Numbers(3)
    source.describe = names.__getitem__
    (tmp_path / "real.json").write_text("[[5], [6, 7], [], []]")
    assert eval_linear.read_real(str(tmp_path / "real.json"), source) == [[6, 7], [5], []]
    for content, text in (("[[5]]", "no list of 4"), ("no", "cannot be read"), ("[[], [], [], []]", "no answer")):
        (tmp_path / "real.json").write_text(content)
        with pytest.raises(ValueError, match=text):
            eval_linear.read_real(str(tmp_path / "real.json"), source)


def test_eval_linear_crops_are_shared_out_and_left_out_when_bad(tmp_path, cache):
    """Two processes' batches are one's; crops are mirrored; unreadable and unlabeled images are replaced."""
    write_images(tmp_path, [f"{i}.png" for i in range(6)], size=(20, 24))
    (tmp_path / "4.png").write_bytes(b"damaged")
    (tmp_path / "l.txt").write_text("".join(f"{i}.png" + (f"\t{i}" if i != 5 else "") + "\n" for i in range(6)))
    source = data.open_source(str(tmp_path / "l.txt"))
    def batches(rank=0, world=1, flip=0.5):
        return eval_linear.ProbeBatches(source, source.labels, 12, 8, (0.3, 1.0), flip, 0, rank, world)

    crops, labels, bad = batches()[3]
    assert crops.shape == (12, 3, 8, 8) and set(labels.tolist()) == {0, 1, 2, 3}
    parts = [batches(rank, 2)[3] for rank in range(2)]
    assert torch.equal(torch.cat([p[0] for p in parts]), crops) and bad == sum(p[2] for p in parts) > 0
    never, always = (batches(flip=p)[3][0] for p in (0.0, 1.0))
    assert torch.equal(never.flip(3), always) and not torch.equal(crops, never) and not torch.equal(crops, always)


# ----------------------------------------------------------------------------------------------------------------------
# eval_logreg.py


def clusters(n: int, dim: int, n_classes: int, noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    centers, x = randn(seed, (n_classes, dim), (n, dim))
    labels = torch.arange(n) % n_classes
    return centers[labels] + noise * x + 3, labels


def test_eval_logreg_values_of_c_are_the_official_ones():
    assert list(eval_logreg.CS) == golden.json("logreg/cs")


@pytest.mark.parametrize("n_classes", [2, 5])
@pytest.mark.parametrize("scales", [0, 1])
def test_eval_logreg_equals_scikit_learn(n_classes, scales):
    """Coefficients, also of badly scaled features; the loss where scikit-learn does not get to the end."""
    x, labels = clusters(400, 6, n_classes, 2.0)
    x = x * torch.logspace(-scales, scales, 6)
    cs = [1e-6, 1e-3, 0.1, 1.0, 100.0, 1e5]
    models = eval_logreg.fit(eval_logreg.Principal(x.clone()), labels, cs, tol=1e-6)
    oracle = eval_logreg.fit_by_sklearn(x, labels, cs, max_iter=100_000, tol=1e-9)
    assert models.converged.all() and models.iterations.max() < 80  # scikit-learn's go into the thousands
    for j, c in enumerate(cs):
        assert_close(models.weight[j], oracle.weight[j], 1e-3 * oracle.weight[j].abs().max().item(), f"C = {c:g}")
        bias = models.bias[j] - models.bias[j].mean(), oracle.bias[j] - oracle.bias[j].mean()  # a shift has no effect
        assert_close(*bias, 2e-3 * oracle.bias[j].abs().max().item(), f"C = {c:g}")
    ours, theirs = (eval_logreg.accuracies(m, x, labels, n_classes)["top1"] for m in (models, oracle))
    assert_close(ours, theirs, 0.1 + 1e-6)


def test_eval_logreg_default_tolerance():
    """Close to the optimum as it is, also where a few rows are a hundred times larger than the others."""
    for outliers in (0, 5):
        x, labels = clusters(600, 30, 6, 2.0)
        x[:outliers] *= 100
        cs = [1e-4, 1e-2, 1.0]
        near, exact = (eval_logreg.fit(eval_logreg.Principal(x.to(dtype, copy=True)), labels, cs, **options)
                       for dtype, options in ((torch.float32, {}), (torch.float64, dict(tol=1e-7, max_iter=9999))))
        for a, b in zip(near.weight, exact.weight):
            assert (a - b).norm() <= 5e-3 * b.norm()
        both = (eval_logreg.accuracies(m, x, labels, 6)["top1"] for m in (near, exact))
        assert_close(*both, 0.17)  # an image of 600
    assert eval_logreg.parse(["x"]).tol == 1e-4 and eval_logreg.parse(["x", "--sklearn"]).tol == 1e-7


def test_eval_logreg_converges_on_hard_data_and_says_when_not():
    """Separable, so that weights grow with C; columns that are constant, equal, or a million times larger."""
    x, labels = clusters(300, 5, 3, 0.1)
    x = torch.cat([x, x[:, :1], torch.ones(300, 1), 1e6 * x[:, 1:2]], 1)
    models = eval_logreg.fit(eval_logreg.Principal(x.clone()), labels, eval_logreg.CS)
    assert models.converged.all() and (eval_logreg.accuracies(models, x, labels, 3)["top1"][30:] == 100).all()
    assert not eval_logreg.fit(eval_logreg.Principal(x.clone()), labels, [1e5], max_iter=2).converged.any()
    with pytest.raises(ValueError, match="of one class"):
        eval_logreg.fit(eval_logreg.Principal(x), torch.zeros_like(labels), [1.0])


def test_eval_logreg_gradient_and_curvature():
    """Of the objective, against automatic differentiation."""
    x, labels = clusters(50, 4, 3, 1.0)
    features = eval_logreg.Principal(x.double())
    cs = torch.tensor([0.1, 10.0], dtype=torch.float64)
    objective = eval_logreg.Objective(features, torch.arange(50), labels, 3, cs)
    w = randn(1, (2, 3, 5))[0].double().requires_grad_()
    loss = torch.stack([
        torch.nn.functional.cross_entropy(features.x @ w[j, :, :4].T + w[j, :, 4], labels)
        + w[j, :, :4].square().sum() / (2 * cs[j] * 50) for j in range(2)])
    loss.sum().backward()
    value, gradient, curvature = objective(w.detach(), torch.arange(2))
    assert_close(value, loss.detach(), 1e-12)
    assert_close(gradient, w.grad, 1e-12)
    p = torch.softmax(features.x @ w[0, :, :4].T.detach() + w[0, :, 4].detach(), 1)
    spread = (p * (1 - p))[:, 1:2] * torch.cat([features.x, torch.ones(50, 1)], 1).square()  # (50, 5)
    assert_close(curvature[0, 1], spread.mean(0) + torch.tensor([1, 1, 1, 1, 0]) / 5.0, 1e-7)
    assert objective(w.detach(), torch.arange(2), False)[2] is None
    variance = features.x.square().mean(0)
    assert_close(variance, features.variance, 1e-12)
    assert_close(features.x.T @ features.x / 50, torch.diag(variance), 1e-12)


def test_eval_logreg_without_flags(trained, tmp_path):
    """C is chosen on the official tenth of the training images; one and two processes and scikit-learn agree."""
    flags = [trained / "ckpt.pth", "--out", tmp_path / "results", "--cs", 1e-5, 1e-3]
    alone = eval_logreg.main([str(f) for f in flags])
    Launched(tmp_path / "log", eval_logreg.main, *flags, world=2).wait()
    saved = [json.loads(line) for line in (tmp_path / "results").read_text().splitlines()]
    assert saved[1]["processes"] == 2 and saved[1]["result"]["best_c"] == alone["best_c"]
    assert saved[1]["result"]["top1"] == pytest.approx(alone["top1"], abs=0.3)
    assert saved[0]["protocol"]["chosen_on"].startswith("a tenth")
    oracle = eval_logreg.main([str(f) for f in flags] + ["--sklearn"])
    assert oracle["top1"] == pytest.approx(alone["top1"], abs=0.3) and oracle["best_c"] == alone["best_c"]

    with eval_knn.Evaluation("logreg", eval_logreg.parse([str(trained / "ckpt.pth")])) as e:
        x, labels = e.labeled(e.train, e.train_labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rows = order[:143], order[143:]
    models = eval_logreg.fit(eval_logreg.Principal(x.clone()), labels, [1e-5, 1e-3], rows)
    expected = eval_logreg.accuracies(models, x[held], labels[held], 10)["top1"]
    assert list(alone["figures"].values()) == pytest.approx(expected.tolist())


def test_eval_logreg_other_ways_to_choose_and_missing_classes(trained, tmp_path, cache, capsys):
    main = lambda *flags: eval_logreg.main([str(trained / "ckpt.pth"), "--cs", "0.01", "1", "--out",  # noqa: E731
                                            str(tmp_path / "results"), *map(str, flags)])
    on_val = main("--finetune-on-val")
    assert on_val["chosen_by"] == max(on_val["figures"].values()) and on_val["train_images"] == 1437
    other = main("--finetune", "digits:split=VAL", "--metric", "mean_per_class", "--max-iter", "1")
    assert other["train_images"] == 1437 + 360 and "3 of 3 fits have not converged" in capsys.readouterr().err
    write_images(tmp_path / "d", [f"train/{c}/{i}.png" for c in "ab" for i in range(10)] +
                 [f"val/{c}/{i}.png" for c in "abc" for i in range(3)])
    (tmp_path / "d/train/c").mkdir()
    write_images(tmp_path / "d/train/c", ["x.png"])
    (tmp_path / "d/train/c/x.png").write_bytes(b"damaged")  # so class c has no image to learn from
    missing = main("--train", tmp_path / "d/train", "--val", tmp_path / "d/val")
    assert missing["classes"] == 2 and missing["val_images"] == 9 and missing["top1"] <= 67
    write_images(tmp_path / "few", [f"train/{c}/{i}.png" for c in "ab" for i in range(2)] + ["val/a/0.png", "val/b/0.png"])
    with pytest.raises(ValueError, match="a tenth of 4 training images is none"):
        main("--train", tmp_path / "few")
    assert main("--train", tmp_path / "few", "--finetune-on-val")["val_images"] == 2
    with pytest.raises(ValueError, match="exclude each other"):
        main("--finetune", "digits", "--finetune-on-val")
    with pytest.raises(ValueError, match="without images to classify"):
        main("--train", tmp_path / "few/train")


# ----------------------------------------------------------------------------------------------------------------------
# visualize.py


def draw(*argv) -> None:
    visualize.main([str(a) for a in argv])


def size_of(path) -> tuple[int, int]:
    """Width and height of a PNG that can be decoded."""
    with Image.open(path) as image:
        assert image.format == "PNG" and image.mode == "RGB"
        image.load()
        return image.size


def pixels_of(path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


@pytest.fixture
def desk(tmp_path, monkeypatch, cache) -> Path:
    """An empty folder to work in, which is the current one."""
    (tmp_path / "desk").mkdir()
    monkeypatch.chdir(tmp_path / "desk")
    return tmp_path / "desk"


@pytest.fixture(scope="session")
def with_registers(tmp_path_factory) -> Path:
    """An untrained network with 4 registers, patches of 14 pixels, 2 heads and 3 blocks."""
    path = tmp_path_factory.mktemp("visual") / "reg4.pth"
    torch.save(hub_vit(registers=4).state_dict(), path)
    return path


def test_visual_principal_equals_svd():
    """Directions are those of the SVD of all rows, however they are parted, with the largest entry positive."""
    x = randn(0, (300, 7))[0] * torch.tensor([5.0, 4, 3, 2, 1, 1, 1]) @ randn(1, (7, 7))[0] + 3
    mean, directions = visualize.principal([x[:11], x[11:250], x[250:]])
    expected = np.linalg.svd(x.double().numpy() - x.double().numpy().mean(0), full_matrices=False)[2][:3].T  # (7, 3)
    assert_close(mean, x.double().mean(0), 1e-12)
    assert_close(directions.abs(), np.abs(expected), 1e-9)
    assert_close((directions * torch.tensor(expected)).sum(0).abs(), torch.ones(3), 1e-9)
    assert (directions.gather(0, directions.abs().argmax(0)[None]) > 0).all()
    for sign in (1, -1):  # the rows of a mirrored set have the same directions
        assert_close(visualize.principal([sign * x])[1], directions, 1e-9)

    flat = randn(2, (50, 2))[0] @ randn(3, (2, 7))[0]  # two dimensions only
    directions = visualize.principal([flat])[1]
    assert_close(directions.norm(dim=0), torch.tensor([1.0, 1, 0]), 1e-9)
    with pytest.raises(ValueError, match="all patches have the same features"):
        visualize.principal([torch.full((9, 7), 0.3).half()])
    with pytest.raises(ValueError, match="2 dimension.*too few for 3 colors"):
        visualize.principal([x[:, :2]])


def test_visual_otsu_parts_two_heaps():
    """The threshold is that of least variance within both classes, by trying all, and in the middle of a gap."""
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.normal(0.25, 0.08, 700), rng.normal(0.75, 0.05, 200)]).clip(0, 1)
    centers = (np.floor(values * 256).clip(max=255) + 0.5) / 256
    within = {}
    for t in np.arange(1, 256) / 256:
        low, high = centers[centers < t], centers[centers > t]
        within[t] = len(low) * low.var() + len(high) * high.var() if len(low) and len(high) else np.inf
    best = [t for t, v in within.items() if v <= min(within.values()) * (1 + 1e-9)]
    assert visualize.otsu(values) == pytest.approx(np.mean(best), abs=1e-9) and 0.4 < np.mean(best) < 0.65
    assert visualize.otsu(np.array([0.1] * 30 + [0.9] * 5)) == pytest.approx(0.5, abs=1 / 128)


def test_visual_foreground_is_the_object():
    """Of two kinds of patches those that touch the borders less are foreground; sides and thresholds can be named."""
    kinds, noise = randn(4, (2, 16), (2, 6, 8, 16))
    inside = torch.zeros(2, 6, 8, dtype=torch.bool)
    inside[0, 1:4, 2:7] = inside[1, 3:6, 3:5] = True
    for flip in (False, True):  # whichever kind has the higher component
        parts = list(kinds[(inside ^ flip).long()] + 0.05 * noise)
        assert torch.equal(torch.stack(visualize.foreground_of(parts)), inside)
        sides = {which: torch.stack(visualize.foreground_of(parts, which)) for which in ("high", "low", "all")}
        assert sides["all"].all() and torch.equal(sides["high"], ~sides["low"])
        assert any(torch.equal(sides[which], inside) for which in ("high", "low"))
        assert [sum(int(m.sum()) for m in visualize.foreground_of(parts, "high", t)) for t in (0.0, 1.0)] == [95, 0]
        for drawn, mask in zip(visualize.pca_colors(parts), inside.numpy()):
            assert drawn.dtype == np.uint8 and (drawn[~mask] == 0).all() and (drawn[mask].max(-1) > 0).mean() > 0.9
    with pytest.raises(ValueError, match="^0 patches are foreground"):
        visualize.pca_colors(parts, "high", 1.0)


@pytest.mark.parametrize("foreground", ["auto", "all"])
def test_visual_pca_has_one_scale_and_no_order(foreground):
    """The picture of an image is the same in any order of the images; equal patches have one color in all of them."""
    parts = [x.half() for x in randn(5, (4, 6, 32), (5, 3, 32), (7, 7, 32))]
    parts[1][2, :] = parts[0][1, 2:5]
    drawn = visualize.pca_colors(parts, foreground)
    for order in itertools.permutations(range(3)):
        for i, again in zip(order, visualize.pca_colors([parts[i] for i in order], foreground)):
            assert np.array_equal(again, drawn[i])
    assert np.array_equal(drawn[1][2], drawn[0][1, 2:5]) and drawn[0][1, 2:5].any()
    assert not np.array_equal(visualize.pca_colors(parts[:1], foreground)[0], drawn[0])  # the others count
    if foreground == "all":
        everything = np.concatenate([d.reshape(-1, 3) for d in drawn])
        assert (everything.min(0) == 0).all() and (everything.max(0) == 255).all()


@pytest.mark.parametrize("block", [-1, 1, 0])
def test_visual_attention_equals_full_softmax(block):
    """The rows are those of the whole attention matrix, and weigh the values to what the block's attention gives."""
    network, seen = hub_vit(registers=4), {}
    attn = network.block_list()[block].attn
    attn.register_forward_hook(lambda module, args, out: seen.update(x=args[0], out=out))
    with torch.inference_mode():
        maps = visualize.attention_of(network, randn(6, (1, 3, 56, 84))[0], block)
        n_tokens, dim = 1 + 4 + 4 * 6, 128
        assert maps.shape == (5, 2, n_tokens)
        assert_close(maps.sum(-1), torch.ones(5, 2), 1e-5)
        q, k, v = (seen["x"][0] @ attn.qkv.weight.T + attn.qkv.bias).split(dim, -1)
        outputs = []
        for head in range(2):
            part = slice(64 * head, 64 * head + 64)
            full = (q[:, part] @ k[:, part].T / 8).exp()
            full = full / full.sum(1, keepdim=True)  # (N, N)
            assert_close(maps[:, head], full[:5], 1e-5, f"head {head}")
            outputs.append(maps[0, head] @ v[:, part])
        assert_close(torch.cat(outputs) @ attn.proj.weight.T + attn.proj.bias, seen["out"][0, 0], 1e-4)
    assert maps[0].std() > 1e-4 and len(attn.qkv._forward_hooks) == 0


FITTED = [(how, size, shape) for how in ("crop", "pad", "resize") for size in (["0"], ["56"], ["56", "84"])
          for shape in ((61, 93), (120, 50))]


@pytest.mark.parametrize("how, size, shape", FITTED)
def test_visual_a_pixel_is_found_in_its_patch(how, size, shape, with_registers, desk):
    """A spot on an image lies, in what the network sees, where patch_at() says, whatever the fit and the shape."""
    args = visualize.parse(["similarity", "a.png", "--model", str(with_registers), "--device", "cpu", "--at", "0,0",
                            "--fit", how, "--size", *size])
    viewer = visualize.Viewer(args)
    for x, y in ((shape[1] // 2, shape[0] // 2), (shape[1] // 2 - 14, shape[0] // 2 + 9)):
        pixels = np.zeros((*shape, 3), np.uint8)
        pixels[y - 2 : y + 3, x - 2 : x + 3] = 255
        Image.fromarray(pixels).save("a.png")
        seen = viewer.see("a.png")
        across, down, row, column = visualize.patch_at(seen, x, y, 14)
        white = np.where(seen.image[0].numpy() > 190, 1.0, 0.0)  # the color of what is added is 124
        ys, xs = (np.arange(n) + 0.5 for n in white.shape)
        middle = white.sum(1) @ ys / white.sum(), white.sum(0) @ xs / white.sum()
        assert middle == pytest.approx((down, across), abs=0.8)
        assert (row, column) == (int(down) // 14, int(across) // 14)
        assert white[14 * row : 14 * row + 14, 14 * column : 14 * column + 14].any()


def test_visual_pixels_that_are_not_there(with_registers, desk):
    """The corner pixels of an image are in, those beyond are not, and what --fit crop cuts away is told."""
    write_images(desk, ["a.png"], (61, 93))  # crop to 56x84 cuts 2 and 3 rows, 4 and 5 columns
    seen = {how: visualize.Viewer(visualize.parse([
        "similarity", "a.png", "--model", str(with_registers), "--device", "cpu", "--at", "0,0", "--size", "0", "--fit",
        how])).see("a.png") for how in ("crop", "pad", "resize")}
    find = lambda how, x, y: visualize.patch_at(seen[how], x, y, 14)[2:]  # noqa: E731
    for how, last in (("pad", (4, 6)), ("resize", (3, 6))):
        assert find(how, 0, 0) == (0, 0) and find(how, 92, 60) == last
    kept = []
    for x in range(93):
        try:
            kept.append((x, *find("crop", x, 30)))
        except ValueError as error:
            assert str(error) == f"--at {x},30 was cut away from a.png; choose --fit pad or --fit resize"
    first = kept[0][0]
    assert first in (4, 5) and kept == [(first + i, kept[0][1], i // 14) for i in range(84)]
    for x, y in ((93, 0), (0, 61), (-1, 0), (0, -1), (60, 92)):
        with pytest.raises(ValueError, match=rf"--at {x},{y} lies outside a.png, which is 93 pixels wide and 61 high"):
            find("pad", x, y)


@pytest.mark.parametrize("how", ["crop", "pad", "resize"])
def test_visual_similarity_is_one_at_the_pixel(how, trained, desk, monkeypatch):
    """Cosines to the patch of the pixel: 1 there and less elsewhere, in the image itself and in others."""
    write_images(desk, ["a.png", "b.png"], (30, 50))
    maps, real = [], visualize.heat
    monkeypatch.setattr(visualize, "heat", lambda v, low, high: maps.append((v, low, high)) or real(v, low, high))
    draw("similarity", "a.png", "b.png", "--model", trained / "ckpt.pth", "--device", "cpu", "--at", "31,17",
         "--size", 0, "--fit", how, "--out", "s.png")
    grid, at = {"crop": ((7, 12), (4, 7)), "pad": ((8, 13), (4, 8)), "resize": ((8, 12), (4, 7))}[how]
    (first, low, high), (second, *_) = [m for m in maps if m[0].shape == grid]
    assert high == 1 and low == min(first.min(), second.min())
    assert np.unravel_index(first.argmax(), grid) == at and first[at] == pytest.approx(1, abs=1e-6)
    assert np.sort(first, None)[-2] < 1 - 1e-4 and second.max() < 1 - 1e-4
    times = 480 // (4 * grid[1])
    height, width = (4 * n * times for n in grid)
    assert size_of("s.png") == (12 + 2 * (width + 12), 12 + 2 * (12 + 23 + height) + 20 + 12)  # a bar of 20 pixels
    cell = pixels_of("s.png")[12 + 35 + height + 23 :, 12 + width + 12 :][:height, :width]  # without ring
    assert np.array_equal(cell, real(second, low, 1).repeat(4 * times, 0).repeat(4 * times, 1))


def test_visual_nearest_images_equal_brute_force():
    """All neighbors in order by cosine, without unreadable rows and without the image itself."""
    bank, queries = randn(7, (60, 12), (9, 12))
    ok, own = torch.ones(60, dtype=torch.bool), torch.arange(9) * 6
    ok[[3, 17, 40]] = False
    cosines = torch.nn.functional.cosine_similarity(queries[:, None], bank[None], dim=-1)
    for excluded in (None, own):
        values, rows = visualize.nearest_images(bank.clone(), ok, queries.clone(), 5, excluded)
        for q in range(9):
            allowed = [i for i in range(60) if ok[i] and (excluded is None or i != own[q])]
            expected = sorted(allowed, key=lambda i: -cosines[q, i])[:5]
            assert rows[q].tolist() == expected
            assert_close(values[q], cosines[q, expected], 1e-6)
    values, rows = visualize.nearest_images(bank.clone(), ok, bank[own].clone(), 5, None)
    assert torch.equal(rows[:, 0], own)  # an image is nearest to itself,
    rows = visualize.nearest_images(bank.clone(), ok, bank[own].clone(), 99, own)[1]
    assert rows.shape == (9, 56) and not (rows == own[:, None]).any()  # or left out
    with pytest.raises(ValueError, match="a single image has no neighbor"):
        visualize.nearest_images(bank[:1].clone(), ok[:1], bank[:1].clone(), 1, torch.tensor([0]))


def test_visual_ticks_are_round():
    """Known ones; and for any range at least one, at most n + 1, all within."""
    for low, high, expected in (
            (0, 10, [0, 2, 4, 6, 8, 10]), (0.13, 0.42, [0.2, 0.3, 0.4]), (-1, 1, [-1, -0.5, 0, 0.5, 1]),
            (97.1, 97.9, [97.2, 97.4, 97.6, 97.8]), (0, 125000, [0, 50000, 100000])):
        assert visualize.ticks(low, high) == expected
    rng = np.random.default_rng(0)
    for low, width, n in zip(rng.normal(0, 50, 200), 10 ** rng.uniform(-3, 6, 200), rng.integers(3, 9, 200)):
        found = visualize.ticks(low, low + width, int(n))
        assert 1 <= len(found) <= n + 1 and all(low - 1e-6 * width <= t <= low + width + 1e-6 * width for t in found)


def write_run(folder: Path, *records, end: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + end)
    return folder


def test_visual_read_run(trained, desk):
    """What a run has logged; of a step logged twice the later; without numbers that are none and half a last line."""
    curves = visualize.read_run(str(trained))
    lines = [r for r in metrics(trained) if "loss" in r]
    for key in ("loss", "dino_local", "dino_global", "ibot", "koleo"):
        assert curves[key] == [(r["step"], r[key]) for r in lines]
    assert curves["knn"] == [(r["step"], r["knn"]["top1_k20"]) for r in metrics(trained) if "knn" in r]
    assert curves["knn_raw_pixels"] == [(0, 97.5)]
    assert visualize.read_run(str(trained / "metrics.jsonl")) == curves

    records = [dict(step=5, loss=3.0), dict(step=0, loss=4.0), dict(step=5, loss=2.0), dict(step=6, loss=math.nan),
               dict(step=7, loss=None)]  # what train.py writes for a number that is not finite
    partly = write_run(desk / "partly", *records, end='{"step": 8, "los')
    assert visualize.read_run(str(partly)) == dict(loss=[(0, 4.0), (5, 2.0)])
    damaged = write_run(desk / "damaged", records[0], end='{"step": 6, "lo\n{"step": 7, "loss": 1.0}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is no record"):
        visualize.read_run(str(damaged))
    with pytest.raises(ValueError, match="holds no finite number yet"):
        visualize.read_run(str(write_run(desk / "empty", end='{"st')))
    with pytest.raises(ValueError, match="holds no finite"):
        visualize.read_run(str(write_run(desk / "nan", dict(step=0, loss=math.nan), dict(step=1, loss=None))))


def test_visual_curves_go_through_their_points():
    """Lines have their color where their values are, and the picture is white elsewhere; raw pixels are dashed."""
    rgb = [tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in visualize.COLORS]
    runs = {"a": dict(loss=[(0, 0.0), (50, 10.0), (100, 0.0)],
                      knn=[(0, 40.0), (100, 80.0)], knn_raw_pixels=[(0, 60.0)]),
            "b": dict(loss=[(0, 10.0), (100, 10.0)])}
    picture = visualize.draw_curves(runs)
    assert picture.size == (1520, 542)
    found = np.asarray(picture).astype(int)
    left, right, top, bottom = 74, 724, 66, 484  # of the first diagram
    place = lambda step, share: (left + step / 100 * (right - left),  # noqa: E731
                                 bottom - (0.05 + share) / 1.1 * (bottom - top))  # 5 % above and below

    def distance(x, y, color, reach=1):
        x, y = int(x), int(y)
        near = found[y - reach : y + reach + 1, x - reach : x + reach + 1]
        return np.abs(near - np.array(color)).max(-1).min()
    for step in (10, 25, 40, 60, 77, 90):
        x, y = place(step, 1 - abs(step - 50) / 50)
        assert distance(x, y, rgb[0]) < 60, step
        assert min(distance(x, y + dy, rgb[0]) for dy in (-25, 25)) > 100, step
        assert distance(*place(step, 1.0), rgb[1]) < 30, step
    along = [distance(760 + place(s, 0.5)[0], place(s, 0.5)[1], rgb[0], 0) for s in np.arange(60, 90, 0.2)]
    assert 0.2 < np.mean([d < 80 for d in along]) < 0.8  # dashes
    for step in (15, 35, 70):
        assert distance(760 + place(step, step / 100)[0], place(step, step / 100)[1], rgb[0]) < 60, step
    assert visualize.draw_curves({"a": dict(loss=[(0, 1.0)])}).size == (760, 542)  # a single step


def test_visual_pca_command(trained, desk, capsys):
    """A sheet, or a folder with a picture of each image, the same in any order; bad images of a folder are left out."""
    write_images(desk, ["in/a.png", "in/b.png", "in/sub/c.png"], (24, 40))
    (desk / "in/bad.png").write_bytes(b"no image")
    flags = ["--model", trained / "ckpt.pth", "--device", "cpu", "--size", 0, "--foreground", "all"]
    draw("pca", "in", *flags, "--out", "sheet.png")
    printed = capsys.readouterr()
    assert printed.out == "sheet.png\n" and "left out: " in printed.err and "bad.png" in printed.err
    assert size_of("sheet.png") == (12 + 2 * (480 + 12), 12 + 3 * (12 + 23 + 288) + 0)  # 40x24, 12 times
    draw("pca", "in/a.png", "in/b.png", "in/sub/c.png", *flags, "--out", "one")
    draw("pca", "in/sub/c.png", "in/b.png", "in/a.png", *flags, "--out", "other")
    assert sorted(p.name for p in Path("one").iterdir()) == ["a.png", "b.png", "c.png", "sheet.png"]
    assert size_of("one/sheet.png") == size_of("sheet.png")
    for name in "abc":
        assert size_of(f"one/{name}.png") == (40, 24)
        assert np.array_equal(pixels_of(f"one/{name}.png"), pixels_of(f"other/{name}.png")), name
    cells = pixels_of("one/a.png")
    assert np.array_equal(cells, cells[::4, ::4].repeat(4, 0).repeat(4, 1))
    assert len(np.unique(cells.reshape(-1, 3), axis=0)) > 20
    assert visualize.file_names(["x/a.png", "y/a.png", "y/b.jpg"]) == ["x_a", "y_a", "y_b"]
    assert visualize.file_names(["x/a.png", "x/a.jpg"]) == ["000000_a", "000001_a"]
    assert "sheet" not in visualize.file_names(["x/sheet.png", "x/a.png"])


def test_visual_attention_command(with_registers, desk):
    """A row for CLS and each register; in it the image, the mean and each head."""
    write_images(desk, ["a.png"], (56, 84))
    draw("attention", "a.png", "--model", with_registers, "--device", "cpu", "--block", 0, "--size", 0,
         "--out", "at.png")
    left = 12 + math.ceil(visualize.font().getlength("register 4")) + 12
    assert size_of("at.png") == (left + 4 * (252 + 12), 12 + 5 * (12 + 23 + 168 + 23))  # 84x56, 3 times
    shown = pixels_of("at.png")[12 + 23 :, left : left + 252][:168]
    assert np.array_equal(shown[1::3, 1::3], pixels_of("a.png"))
    cell = pixels_of("at.png")[12 + 23 :, left + 264 :][:168, :252]  # the mean of the heads, 4x6 patches
    maps = visualize.attention_of(hub.load(with_registers), visualize.normalize(
        torch.tensor(pixels_of("a.png")).permute(2, 0, 1)[None] / 255), 0)[0].mean(0)[5:].unflatten(0, (4, 6)).numpy()
    expected = visualize.heat(maps, 0, maps.max()).repeat(42, 0).repeat(42, 1)
    assert np.abs(cell - expected).max() <= 1


def test_visual_neighbors_command(trained, desk, monkeypatch):
    """The nearest by the features of the model; frames say whether the class is the same; an image is not its own."""
    write_images(desk, [f"d/{c}/{i}.png" for c in "ab" for i in range(6)], (16, 16))
    for c in "ab":  # a class of dark images and one of bright
        for p in Path("d", c).iterdir():
            Image.fromarray((pixels_of(p) // 4 + 190 * (c == "b")).astype(np.uint8)).save(p)
    sheets, real = [], visualize.neighbor_sheet
    monkeypatch.setattr(visualize, "neighbor_sheet", lambda *args: sheets.append(args) or real(*args))
    flags = ["--model", trained / "ckpt.pth", "--device", "cpu", "--num-workers", 0]
    draw("neighbors", "--data", "d", *flags, "--k", 4, "--queries", 3, "--out", "n.png")
    source, queries, cosines, rows = sheets[0]
    assert len(queries) == len(rows) == 3 and {len(r) for r in rows} == {4}
    assert not any(queries.describe(q) in [source.describe(i) for i in rows[q]] for q in range(3))
    assert all(values == sorted(values, reverse=True) for values in cosines)
    assert size_of("n.png") == (12 + 5 * (160 + 12), 12 + 3 * (12 + 23 + 160 + 23))  # 16x16, 10 times
    frames = pixels_of("n.png")[12 + 23 - 2, 12 + 172 + 80 :: 172]  # above the neighbors of the first
    classes = [Path(source.describe(i)).parent.name == Path(queries.describe(0)).parent.name for i in rows[0]]
    assert [tuple(f) for f in frames] == [(0, 158, 115) if same else (213, 94, 0) for same in classes]

    draw("neighbors", "d/b/3.png", *flags, "--data", "d", "--k", 2, "--out", "one.png")
    source, queries, cosines, rows = sheets[1]
    assert source.describe(rows[0][0]).endswith("b/3.png") and cosines[0][0] == pytest.approx(1, abs=1e-5)
    assert cosines[0][1] < 1 - 1e-5 and size_of("one.png") == (12 + 3 * 172, 12 + 218)
    draw("neighbors", *flags, "--k", 2, "--queries", 2, "--out", "digits.png")  # the images of the training
    assert size_of("digits.png") == (12 + 3 * 172, 12 + 2 * 218)  # 16x16


def test_visual_curves_command(trained, desk, capsys):
    """One run or several, as folders or files; k-NN has a diagram of its own where it was measured."""
    other = write_run(desk / "other", dict(step=0, loss=3.0), dict(step=9, loss=2.0))
    draw("curves", trained)
    assert capsys.readouterr().out == "visualize-curves.png\n"
    assert size_of("visualize-curves.png") == (1520, 542)
    draw("curves", trained / "metrics.jsonl", other, "--out", "two.PNG")
    assert size_of("two.PNG") == (1520, 542)
    draw("curves", other, "--out", "alone.png")
    assert size_of("alone.png") == (760, 542)


MODEL = ["--model", "{ckpt}", "--device", "cpu"]


@pytest.mark.parametrize("argv, text", [
    (["pac", "a.png", *MODEL], "unknown command 'pac', did you mean pca"),
    (["pca", "a.png", *MODEL, "--sise", "32"], "unknown argument '--sise', did you mean --size"),
    (["pca", "missing.png", *MODEL], "no such image or folder: missing.png"),
    (["pca", "a.png", "bad.png", *MODEL], "bad.png cannot be read as an image"),
    (["pca", "only_bad", *MODEL], "none of the 1 images can be used; the last: .*x.png"),
    (["attention", "small.png", *MODEL, "--size", "0"], "small.png: an image of 3x3 pixels is less than one patch"),
    (["pca", "a.png", *MODEL, "--size", "16", "16", "16"], "--size takes the short side"),
    (["pca", "a.png", *MODEL, "--size", "-8"], "--size takes the short side"),
    (["pca", "a.png", *MODEL, "--size", "16", "18"], "size 18 is no multiple of the patch size 4; the nearest is 16"),
    (["pca", "a.png", *MODEL, "--threshold", "1.5"], "--threshold lies between 0 and 1"),
    (["pca", "a.png", *MODEL, "--foreground", "all", "--threshold", "0.5"], "has no use with --foreground all"),
    (["pca", "a.png", *MODEL, "--foreground", "high", "--threshold", "1"], "0 patches are foreground"),
    (["pca", "a.png", *MODEL, "--foreground", "high", "--threshold", "1", "--out", "new"], "0 patches are foreground"),
    (["pca", "a.png", "--model", "missing.pth"], "no such checkpoint: missing.pth"),
    (["pca", "a.png", *MODEL, "--out", "only_bad/.."], "would overwrite the images"),
    (["pca", "a.png", *MODEL, "--out", "bad.png/new"], "cannot be written; name a folder"),
    (["pca", "a.png", *MODEL, "--out", "a.png"], "--out a.png would overwrite the images"),
    (["similarity", "a.png", *MODEL, "--at", "1,1", "--out", "./a.png"], "a.png would overwrite the images"),
    (["attention", "a.png", *MODEL, "--out", "out.jpg"], "--out out.jpg is no .png file"),
    (["attention", "a.png", *MODEL, "--out", "only_bad"], "--out only_bad is no .png file.*only_bad/picture.png"),
    (["attention", "a.png", *MODEL, "--block", "99"], "--block 99 does not exist; the model has 0 to "),
    (["attention", "a.png", *MODEL, "--block", "-99"], "--block -99 does not exist"),
    (["similarity", "a.png", *MODEL], "required: --at"),
    (["similarity", "a.png", *MODEL, "--at", "7"], "argument --at"),
    (["similarity", "a.png", *MODEL, "--at", "32,5"], "--at 32,5 lies outside a.png, which is 32 pixels wide"),
    (["similarity", "wide.png", *MODEL, "--at", "0,5", "--size", "16", "16"], "--at 0,5 was cut away from wide.png"),
    (["neighbors", *MODEL, "--k", "0"], "--k must be 1 to 24"),
    (["neighbors", *MODEL, "--queries", "0"], "--queries or the images 1 to 96"),
    (["neighbors", "a.png", *MODEL, "--data", "missing"], "missing"),
    (["curves", "only_bad"], "only_bad/metrics.jsonl cannot be read; name the --out folder of a run"),
    (["curves", "{run}", "{run}"], "is named twice"),
    (["curves", *["{run}"] * 9], "9 runs are too many"),
    (["curves", "{run}", "--out", "curves.svg"], "--out curves.svg is no .png file"),
])
def test_visual_mistakes_are_named_and_write_nothing(argv, text, trained, desk):
    write_images(desk, ["a.png"])
    write_images(desk, ["small.png"], (3, 3))
    write_images(desk, ["wide.png"], (20, 60))
    (desk / "only_bad").mkdir()
    for name in ("bad.png", "only_bad/x.png"):
        (desk / name).write_bytes(b"no image")
    before = {p: p.is_file() and p.read_bytes() for p in desk.rglob("*")}
    with pytest.raises(ValueError, match=text):
        draw(*(a.format(ckpt=trained / "ckpt.pth", run=trained) for a in argv))
    assert {p: p.is_file() and p.read_bytes() for p in desk.rglob("*")} == before


def test_visual_wrong_input_is_one_line_and_exit_code_2(desk, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["visualize.py", "curves", "gone", "--out", "x.png"])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(HERE / "visualize.py"), run_name="__main__")
    printed = capsys.readouterr()
    assert left.value.code == 2 and printed.out == "" and list(desk.iterdir()) == []
    assert re.fullmatch(r"error: gone cannot be read.*\n", printed.err)


def test_visual_depth_colors_are_magma_from_its_light_end():
    """Some rows of matplotlib's table of that name, the first, the last and five between, within two gray levels; depth
    beyond the ends has their colors, unknown depth is gray, and the bar shows all with the meters."""
    magma = {0: (0, 0, 3), 36: (35, 17, 81), 64: (80, 18, 123), 127: (181, 54, 121), 128: (182, 54, 121),
             191: (251, 134, 96), 255: (251, 252, 191)}
    depth = np.array([[8 - 6 * i / 255 for i in magma]])
    drawn = visualize.depth_colors(depth, 2, 8).astype(int)
    assert drawn.shape == (1, 7, 3) and np.abs(drawn[0] - [*magma.values()]).max() <= 2
    ends = visualize.depth_colors(np.array([[0, 1e-3, 2, 8, 99]]), 2, 8)[0].tolist()
    assert ends[0] == [128] * 3 and ends[1] == ends[2] == [252, 253, 191] and ends[3] == ends[4] == [0, 0, 4]
    bright = visualize.depth_colors(np.linspace(1, 9, 500)[None], 1, 9).astype(float)[0] @ [0.3, 0.59, 0.11]
    assert (np.diff(bright[::10]) < 0).all() and bright[0] > 235 and bright[-1] < 2  # one after the other darker
    bar = visualize.depth_bar(0.71, 10, 300)
    row = np.asarray(bar)[10].astype(int)
    start = math.ceil(visualize.font().getlength("0.71")) + 8
    assert bar.width == 300 and np.abs(row[start] - (252, 253, 191)).max() < 4
    end = 300 - math.ceil(visualize.font().getlength("10.00 m")) - 8
    assert np.abs(row[end - 1] - (0, 0, 4)).max() < 4 and (row[end : end + 6] == 255).all()
    assert visualize.depth_bar(1, 2, 10).width > 90  # never too short for the text
    assert (np.asarray(visualize.depth_bar(0, 2, 300)) != 128).any(-1).all()  # 0 is an end here, not unknown


def test_visual_depth_files_are_millimeters(tmp_path):
    depth = np.array([[0, 0.0014, 0.0016], [1.2344, 65.535, 80]], np.float32)
    visualize.save_depth(tmp_path / "new/d.png", depth)
    with Image.open(tmp_path / "new/d.png") as image:
        assert image.mode.startswith("I;16") and np.asarray(image).tolist() == [[0, 1, 2], [1234, 65535, 65535]]
    again = np.random.default_rng(0).uniform(0.001, 60, (50, 70)).astype(np.float32)
    visualize.save_depth(tmp_path / "d.png", again)
    assert np.abs(pixels_of(tmp_path / "d.png") / 1000 - again).max() <= 0.00051


class Redness(torch.nn.Module):
    """A depth network by which each pixel is as many meters away as it is red, 0 to 1, and those at the left nearer."""

    def __init__(self, rules: dict):
        super().__init__()
        self.rules, self.seen, self.unit = rules, [], torch.nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(images.shape[-2:]))
        across = torch.linspace(0, 1, images.shape[-1])
        return self.unit * (images[:, :1] * self.rules["std"][0] + self.rules["mean"][0]) + across


def test_visual_depth_is_where_the_pixels_are():
    """Of any size and at any --size, 8 bits or 16, gray or not; the mirrored image changes sides and comes back."""
    rules = dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.1))
    network, image = Redness(rules), torch.zeros(3, 37, 61, dtype=torch.uint8)
    image[:, 5:10, 40:52] = 255
    across = torch.linspace(0, 1, 61).expand(37, 61)
    red = image[0] / 255
    assert_close(visualize.depth_of(network, image, rules), red + across, 1e-5)
    deep = (image.int() * 257).to(torch.uint16)
    assert_close(visualize.depth_of(network, deep, rules), red + across, 1e-5)
    assert_close(visualize.depth_of(network, image, rules, flip=True), red + 0.5, 1e-5)
    gray = {k: v[:1] for k, v in rules.items()}
    assert_close(visualize.depth_of(Redness(gray), image[:1], gray), red + across, 1e-5)
    network.seen.clear()
    for size in (20, 90):
        smooth = visualize.depth_of(network, image, rules, size)
        assert smooth.shape == (37, 61) and np.abs(smooth - (red + across).numpy()).mean() < 0.05
        assert np.abs(smooth[6:9, 43:49] - 1 - across[6:9, 43:49].numpy()).max() < 0.2
    assert network.seen == [(20, 33), (90, 148)]


@pytest.fixture(scope="session")
def dense_files(tmp_path_factory) -> Path:
    """A folder of heads for the backbone of `trained`, two of them not finite."""
    folder = tmp_path_factory.mktemp("dense")
    for name, head in (("x_nyu_linear4_head", heads.LinearDepthHead(64)), ("unknown", heads.LinearDepthHead(64, 1)),
                       ("x_kitti_dpt_head", heads.DPTHead(64, channels=16)),
                       ("x_voc2012_linear_head", heads.SegmentationHead(64, 21)),
                       ("x_ade20k_ms_head", heads.SegmentationHead(64, 150, 4)),
                       ("nan_nyu_linear_head", heads.LinearDepthHead(64, 1)),
                       ("nan_voc2012_linear_head", heads.SegmentationHead(64, 21))):
        fill_by_names(head)
        if name.startswith("nan"):
            next(head.parameters()).data.fill_(math.nan)
        as_released(head, folder / f"{name}.pth")
    return folder


def test_visual_depth_command(trained, dense_files, desk, capsys):
    """A sheet, with a bar below each; or a folder, with a picture and 16 bits of each; bad images are left out."""
    write_images(desk, ["in/a.png", "in/sub/b.png"], (24, 40))
    (desk / "in/bad.png").write_bytes(b"no image")
    flags = ["--model", trained / "ckpt.pth", "--device", "cpu", "--head", dense_files / "x_nyu_linear4_head.pth"]
    network, _ = hub.load_dense(trained / "ckpt.pth", dense_files / "x_nyu_linear4_head.pth")
    rules = visualize.load(trained / "ckpt.pth", CPU)[1]
    images = [data.read_image(f"in/{name}.png") for name in ("a", "sub/b")]
    meters = [visualize.depth_of(network, image, rules) for image in images]
    with torch.inference_mode():
        own = network(visualize.normalize(images[0][None] / 255, rules["mean"], rules["std"]))[0, 0]
    assert_close(meters[0], own, 1e-5)
    drawn = [visualize.depth_colors(m, m.min(), m.max()) for m in meters]

    draw("depth", "in", *flags, "--out", "sheet.png")
    printed = capsys.readouterr()
    assert printed.out == "sheet.png\n" and "left out: " in printed.err and "bad.png" in printed.err
    assert size_of("sheet.png") == (12 + 2 * (480 + 12), 12 + 2 * (12 + 23 + 288 + 26))  # 40x24, 12 times
    for row, expected in enumerate(drawn):
        cell = pixels_of("sheet.png")[12 + 23 + 349 * row :, 12 + 492 :][:288, :480]
        assert np.array_equal(cell, expected.repeat(12, 0).repeat(12, 1))

    draw("depth", "in/a.png", "in/sub/b.png", *flags, "--out", "new")
    assert {p.name for p in Path("new").iterdir()} == {"a.png", "a_depth.png", "b.png", "b_depth.png", "sheet.png"}
    assert np.array_equal(pixels_of("new/sheet.png"), pixels_of("sheet.png"))
    for name, m, expected in zip("ab", meters, drawn):
        assert np.array_equal(pixels_of(f"new/{name}.png"), expected)
        assert np.abs(pixels_of(f"new/{name}_depth.png") / 1000 - m).max() < 0.00051
    near, far = meters[0].min() - 0.5, meters[0].max() + 1
    draw("depth", "in/a.png", *flags, "--out", "fixed", "--near", near, "--far", far, "--flip", "--size", 16)
    other = visualize.depth_of(network, images[0], rules, 16, True)
    assert np.abs(other - meters[0]).max() > 0.01 * np.ptp(meters[0])
    assert np.array_equal(pixels_of("fixed/a.png"), visualize.depth_colors(other, near, far))

    ckpt = hub.read_pth(str(trained / "ckpt.pth"))
    ckpt["config"] |= dict(mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))  # a run on other images
    torch.save(ckpt, "other.pth")
    draw("depth", "in/a.png", "--model", "other.pth", *flags[2:], "--out", "other")
    other = visualize.depth_of(network, images[0], {k: ckpt["config"][k] for k in ("mean", "std")})
    assert np.abs(other - meters[0]).max() > 0.01 * np.ptp(meters[0])
    assert np.array_equal(pixels_of("other/a.png"), visualize.depth_colors(other, other.min(), other.max()))
    draw("depth", "in/a.png", *flags[:-1], dense_files / "unknown.pth", "--depth-range", 2, 3, "--out", "range")
    assert 2000 <= pixels_of("range/a_depth.png").min() <= pixels_of("range/a_depth.png").max() <= 3000
    draw("depth", "in/a.png", *flags[:-1], dense_files / "x_kitti_dpt_head.pth", "--far", 0.0001, "--out", "dpt")
    assert (pixels_of("dpt/a_depth.png") >= 1).all()
    assert visualize.file_names(["x/a.png", "x/a_depth.png"], "_depth") == ["000000_a", "000001_a_depth"]
    assert visualize.file_names(["x/a.png", "x/a_depth.png"], "_labels") == ["a", "a_depth"]


def test_visual_segment_labels_and_legend(tmp_path):
    """The palette's index is the class; what is no class is white; the legend's rows come by their number of pixels."""
    colors = heads.colors(21)
    labels = np.full((20, 50), 15)
    labels[:, :10], labels[:3, 10:20], labels[19, 49], labels[10:20, 20:30] = 0, 20, 7, 255
    drawn = visualize.label_colors(labels, colors)
    assert drawn.dtype == np.uint8 and drawn.shape == (20, 50, 3)
    assert {k: drawn[labels == k][0].tolist() for k in (0, 7, 15, 20, 255)} == {
        0: [0, 0, 0], 7: [128, 128, 128], 15: [192, 128, 128], 20: [0, 64, 128], 255: [255] * 3}
    visualize.save_labels(tmp_path / "l.png", labels, colors)
    with Image.open(tmp_path / "l.png") as image:
        assert image.mode == "P" and np.array_equal(np.asarray(image), labels)
        assert np.array_equal(np.asarray(image.convert("RGB")), drawn)
    with pytest.raises(ValueError, match="holds 256 classes, not 300"):
        visualize.save_labels(tmp_path / "m.png", labels, [(0, 0, 0)] * 300)

    texts, real = [], visualize.ImageDraw.ImageDraw.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(visualize.ImageDraw.ImageDraw, "text", lambda self, place, text, *args, **kwargs: (
            texts.append((place, text)), real(self, place, text, *args, **kwargs)))
        shown = visualize.legend(labels, heads.CLASSES["voc2012"], colors)
        visualize.legend(labels, heads.CLASSES["voc2012"], colors, 2)
    assert [text for _, text in texts] == ["74.3 %", "person", "22.2 %", "background", "3.3 %", "tvmonitor", "0.1 %",
                                           "car", "74.3 %", "person", "22.2 %", "background", "3.4 %", "and 2 more"]
    assert shown.size == (visualize.LEGEND, 4 * 23) and [shown.getpixel((9, 23 * row + 9)) for row in range(4)] == [
        colors[k] for k in (15, 0, 20, 7)]
    assert {x for (x, y), _ in texts} == {76, 86} and [y for (x, y), _ in texts[:8:2]] == [16, 39, 62, 85]
    nothing = visualize.legend(np.full((3, 3), 255), ["a"], [(1, 2, 3)])
    assert nothing.getextrema() == ((255, 255),) * 3


def test_visual_segment_command(trained, dense_files, desk, monkeypatch):
    """The image, classes over it, and their names; or a folder, with label maps; the recipe of the head is followed,
    but for what the flags say."""
    write_images(desk, ["a.png", "b.png"], (24, 40))
    files, seen, real = dense_files / "x_voc2012_linear_head.pth", [], heads.segment
    monkeypatch.setattr(heads, "segment", lambda *args: seen.append(args) or real(*args))
    flags = ["--model", trained / "ckpt.pth", "--device", "cpu", "--head", files, "--size", 32]
    draw("segment", "a.png", "b.png", *flags, "--out", "new")
    assert {p.name for p in Path("new").iterdir()} == {"a.png", "a_labels.png", "b.png", "b_labels.png", "sheet.png"}
    network, about = hub.load_dense(trained / "ckpt.pth", files)
    rules = visualize.load(trained / "ckpt.pth", CPU)[1]
    for name in "ab":
        image = data.read_image(f"{name}.png")
        labels = real(network, image, about.recipe._replace(short=32), rules["mean"], rules["std"]).argmax(0).numpy()
        assert np.array_equal(pixels_of(f"new/{name}_labels.png"), labels) and len(np.unique(labels)) > 1
        colors = visualize.label_colors(labels, about.colors)
        mixed = 0.6 * colors + 0.4 * image.permute(1, 2, 0).numpy()
        assert np.abs(pixels_of(f"new/{name}.png") - mixed).max() <= 1
    assert size_of("new/sheet.png") == (12 + 2 * 492 + visualize.LEGEND + 12, 12 + 2 * (12 + 23 + 288))
    cell = pixels_of("new/sheet.png")[12 + 23 + 323 :, 12 + 492 :][:288, :480]  # of b
    assert np.array_equal(cell, pixels_of("new/b.png").repeat(12, 0).repeat(12, 1))

    seen.clear()
    draw("segment", "a.png", *flags, "--opacity", 1, "--out", "full.png")
    cell = pixels_of("full.png")[12 + 23 :, 12 + 492 :][:288, :480]
    assert np.array_equal(cell[::12, ::12], visualize.label_colors(pixels_of("new/a_labels.png"), about.colors))
    draw("segment", "a.png", *flags, "--flip", "--out", "x.png")
    ms = [*flags[:-3], dense_files / "x_ade20k_ms_head.pth"]
    monkeypatch.setattr(heads, "segment", lambda *args: seen.append(args) or torch.ones(150, 24, 40))
    for more in ([], ["--scales", 3, "--no-flip"], ["--size", 300]):
        draw("segment", "a.png", *ms, *more, "--out", "x.png")
    linear, multi = heads.RECIPES["voc2012", "linear"]._replace(short=32), heads.MULTI_SCALE
    assert [args[2] for args in seen] == [linear, linear._replace(flip=True), multi, multi._replace(
        ratios=(1.0, 1.32, 1.73), flip=False), multi._replace(short=300)]


@pytest.mark.parametrize("argv, text", [
    (["depth", "a.png", "--model", "{ckpt}"], "ckpt.pth is a backbone; name its head by --head.*nyu_dpt or kitti_dpt"),
    (["segment", "a.png", "--model", "{ckpt}"], "is a backbone; name its head by --head.*ade20k_ms or voc2012_ms"),
    (["depth", "a.png", *MODEL, "--head", "{dense}/x_voc2012_linear_head.pth"], "of segmentation.*command segment"),
    (["segment", "a.png", *MODEL, "--head", "{dense}/x_kitti_dpt_head.pth"], "is a head of depth.*the command depth"),
    (["depth", "a.png", *MODEL, "--head", "{dense}/unknown.pth"], "does not say for which depths it is; give"),
    (["depth", "a.png", *MODEL, "--head", "nyu_dpt"], "nyu_dpt is a head of the released"),
    (["depth", "a.png", *MODEL, "--head", "{dense}/nan_nyu_linear_head.pth"], "are not finite: the checkpoint"),
    (["segment", "a.png", *MODEL, "--head", "{dense}/nan_voc2012_linear_head.pth", "--size", "16"], "are not finite"),
    (["depth", "a.png", *MODEL, "--head", "x", "--near", "3", "--far", "2"], "--near and --far are meters"),
    (["depth", "a.png", *MODEL, "--head", "x", "--far", "nan"], "--near and --far are meters"),
    (["depth", "a.png", *MODEL, "--head", "x", "--size", "-1"], "--size is a side in pixels"),
    (["segment", "a.png", *MODEL, "--head", "x", "--opacity", "1.5"], "--opacity lies between 0 and 1"),
    (["segment", "a.png", *MODEL, "--head", "{dense}/x_ade20k_ms_head.pth", "--scales", "6"], "6 is none of 1 to 5"),
    (["segment", "a.png", *MODEL, "--head", "{dense}/x_ade20k_ms_head.pth", "--scales", "0"], "0 is none of 1 to 5"),
    (["segment", "a.png", *MODEL, "--head", "x", "--depth-range", "1", "2"], "unknown argument '--depth-range'"),
    (["depth", "bad.png", *MODEL, "--head", "{dense}/x_kitti_dpt_head.pth", "--out", "new"], "bad.png cannot be read"),
    (["depth", "a.png", *MODEL, "--head", "x", "--out", "a.png"], "--out a.png would overwrite the images"),
    (["segment", "a.png", *MODEL, "--head", "x", "--out", "."], "--out . would overwrite the images"),
])
def test_visual_depth_and_segment_mistakes_write_nothing(argv, text, trained, dense_files, desk):
    write_images(desk, ["a.png"])
    (desk / "bad.png").write_bytes(b"no image")
    before = {p: p.is_file() and p.read_bytes() for p in desk.rglob("*")}
    with pytest.raises(ValueError, match=text) as error:
        draw(*(a.format(ckpt=trained / "ckpt.pth", dense=dense_files) for a in argv))
    assert "\n" not in str(error.value) and {p: p.is_file() and p.read_bytes() for p in desk.rglob("*")} == before


# What the two notebooks of the release show. The weights do not come along: see hub.py on where to put them.


def notebook(name: str) -> torch.Tensor:
    """A picture of the notebooks: (H, W, 3) uint8 the photograph, (H, W) what was predicted for it."""
    with Image.open(io.BytesIO(golden_dense.numpy(f"notebook/{name}").tobytes())) as image:
        return torch.from_numpy(np.array(image))


def official(*files: str) -> None:
    """Skips the test unless these files of the release are in torch.hub's folder."""
    folder = Path(torch.hub.get_dir(), "checkpoints")
    if missing := [file for file in files if not (folder / file).exists()]:
        pytest.skip(f"needs official weights, {' and '.join(missing)}, in {folder}")


RULES = hub.image_rules(types.SimpleNamespace(patch_embed=types.SimpleNamespace(in_chans=3)), {})


def test_notebook_depth():
    """Depth of the photograph by the ViT-S with its DPT head for NYU: in the colors of the notebook, at most two of
    their 256 apart, all but one pixel in a hundred."""
    official("dinov2_vits14_pretrain.pth", "dinov2_vits14_nyu_dpt_head.pth")
    network, _ = hub.load_dense("dinov2_vits14", "nyu_dpt")
    meters = torch.from_numpy(visualize.depth_of(network, notebook("example_640x480").permute(2, 0, 1), RULES))
    gray = 255 * (meters - meters.min()) / (meters.max() - meters.min())
    near = (gray - notebook("depth_nyu_dpt_vits14_u8")).abs() <= 2
    assert near.float().mean() >= 0.99, f"{near.float().mean():.1%} of the pixels"


@torch.inference_mode()
def test_notebook_depth_before_it_is_resized():
    """The first numbers that the head gives, as transformers' test of the same weights has them, which adds no
    millimeter."""
    official("dinov2_vits14_pretrain.pth", "dinov2_vits14_nyu_dpt_head.pth")
    network, _ = hub.load_dense("dinov2_vits14", "nyu_dpt")
    x = visualize.normalize(notebook("example_640x480").permute(2, 0, 1)[None] / 255, RULES["mean"], RULES["std"])
    out = network.decode_head(network.features(x))
    assert out.shape == (1, 1, 576, 736)
    expected = [[3.3576, 3.4741, 3.4345], [3.4324, 3.5012, 3.2775], [3.2560, 3.3563, 3.2354]]
    assert_close(out[0, 0, :3, :3] - 0.001, expected, 1e-3)


@pytest.mark.parametrize("spec, head, recipe, expected, files", [
    ("dinov2_vits14", "voc2012_ms", heads.MULTI_SCALE._replace(ratios=(1.0, 1.32, 1.73)), "voc2012_ms3scales_vits14",
     ["dinov2_vits14_pretrain.pth", "dinov2_vits14_voc2012_ms_head.pth"]),
    ("dinov2_vitg14_m2f", None, heads.RECIPES["ade20k", "m2f"], "ade20k_m2f_vitg14", ["dinov2_vitg14_ade20k_m2f.pth"])])
def test_notebook_segmentation(spec, head, recipe, expected, files):
    """Classes of the photograph: the same in all but one pixel in a hundred."""
    official(*files)
    network, _ = hub.load_dense(spec, head)
    chances = heads.segment(network, notebook("example_640x480").permute(2, 0, 1), recipe, RULES["mean"], RULES["std"])
    same = chances.argmax(0) == notebook(f"{expected}_pred")
    assert same.float().mean() >= 0.99, f"{same.float().mean():.1%} of the pixels"


# ----------------------------------------------------------------------------------------------------------------------
# Dense heads


def golden_features(name: str, n: int, with_cls: bool = True) -> list:
    blank = torch.zeros(2, 384)
    return [(golden_dense[f"{name}/{'patch' if with_cls else 'f'}{i}"],
             golden_dense[f"{name}/cls{i}"] if with_cls else blank) for i in range(n)]


def kept_by(module: torch.nn.Module, keep: dict, name: str) -> None:
    module.register_forward_hook(lambda m, args, out: keep.__setitem__(name, (args[0], out)))


@pytest.mark.parametrize("name,layers", [("depth_linear", 1), ("depth_linear4", 4)])
@torch.no_grad()
def test_heads_linear_depth_golden(name, layers):
    features, keep = golden_features(name, layers), {}
    for kind, limits in (*heads.RANGES.items(), ("hub_bug_max80", (0.001, 80))):
        head = fill_by_names(heads.LinearDepthHead(384, layers, *limits), "decode_head.")
        kept_by(head.conv_depth, keep, "logits")
        dense_close(f"{name}/out_{kind}", head(features))
    x, logits = keep["logits"]
    dense_close(f"{name}/feat", heads.resize(x, (20, 28))[:, ::97])
    dense_close(f"{name}/logit_nobins", heads.resize(logits, (20, 28))[:, ::17])
    assert x.shape[-2:] == (5, 7)  # the convolution sees the small map: 16 times less memory than officially


@torch.no_grad()
def test_heads_dpt_golden():
    head, keep = fill_by_names(heads.DPTHead(384), "decode_head."), {}
    for what, modules in (("conv", head.convs), ("fusion", head.fusion_blocks)):
        for i, module in enumerate(modules):
            kept_by(module, keep, f"{what}{i}")
    out = head(golden_features("depth_dpt", 4))
    for what, (x, y) in keep.items():
        dense_close(f"depth_dpt/{what}_every16ch", y[:, ::16])
        if what.startswith("conv"):
            dense_close(f"depth_dpt/{what.replace('conv', 'reassemble')}", x)
    dense_close("depth_dpt/out", out)


@pytest.mark.parametrize("kind", ["linear", "linear4", "dpt"])
@torch.no_grad()
def test_heads_depth_of_images_golden(kind):
    vit = fill_by_names(model.build("vit_small", patch_size=14, img_size=518, init_values=1.0, block_chunks=0))
    head = heads.DPTHead(384) if kind == "dpt" else heads.LinearDepthHead(384, 4 if kind == "linear4" else 1)
    network = heads.Dense(vit, fill_by_names(head, "decode_head.")).eval()
    images = golden_dense["depth_e2e/img"]
    dense_close("depth_e2e/centerpad_out", heads.center_pad(images, 14))
    if kind == "dpt":
        for i, (patches, cls) in enumerate(network.features(images)):
            dense_close(f"depth_e2e/tap{i}_patch", patches)
            dense_close(f"depth_e2e/tap{i}_cls", cls)
    dense_close(f"depth_e2e/out_{kind}", network(images))
    dense_close(f"depth_e2e/out_{kind}", network.whole_inference(images, img_meta=None, rescale=True))
    dense_close(f"depth_e2e/out_{kind}_norescale", network.whole_inference(images, rescale=False))
    dense_close(f"depth_e2e/out_{kind}_fliptta", heads.estimate_depth(network, images, flip=True))


@pytest.mark.parametrize("most,kind", [(None, "maxNone"), (10.0, "max10")])
def test_heads_depth_losses_golden(most, kind):
    at = lambda name: golden_dense[f"depth_losses/{name}"]  # noqa: E731
    depth, target = at("pred").requires_grad_(), at("gt")
    dense_close(f"depth_losses/sig_warm_{kind}", heads.sig_loss(depth, target, most, warm_up=True))
    dense_close(f"depth_losses/sig_main_{kind}", heads.sig_loss(depth, target, most))
    wrong = lambda *pair: heads.gradient_loss(*(x.permute(2, 3, 0, 1) for x in pair), most)  # noqa: E731, the official
    dense_close(f"depth_losses/grad4d_B2_{kind}", 0.5 * wrong(depth, target))
    dense_close(f"depth_losses/grad2d_{kind}", 0.5 * heads.gradient_loss(depth[0], target[0], most))
    dense_close("depth_losses/sig_w10_nowarm", 10 * heads.sig_loss(depth, target))
    dense_close("depth_losses/grad4d_B3", 0.5 * heads.gradient_loss(
        *(at(name).permute(2, 3, 0, 1) for name in ("pred3", "gt3"))))
    (heads.sig_loss(depth, target, most) + heads.gradient_loss(depth, target, most)).backward()
    assert depth.grad.isfinite().all() and depth.grad[target <= 0].abs().max() == 0


def test_heads_depth_losses_without_a_known_pixel():
    depth = torch.rand(1, 1, 9, 9, requires_grad=True)
    (heads.sig_loss(depth, torch.zeros(1, 1, 9, 9)) + heads.gradient_loss(depth, torch.zeros(1, 1, 9, 9))).backward()
    assert (depth.grad == 0).all()
    one = torch.zeros(1, 1, 9, 9)
    one[..., 4, 4] = 2.0
    assert heads.sig_loss(depth, one).isfinite()
    assert heads.sig_loss(one, one) < 1e-5 and heads.sig_loss(one.requires_grad_(), one.detach()).requires_grad


@pytest.mark.parametrize("name,layers,n_classes", [("seg_linear_voc2012", 1, 21), ("seg_ms_ade20k", 4, 150)])
@torch.no_grad()
def test_heads_segmentation_golden(name, layers, n_classes):
    head, keep = fill_by_names(heads.SegmentationHead(384, n_classes, layers), "decode_head."), {}
    kept_by(head.conv_seg, keep, "conv")
    features = golden_features(name, 4, with_cls=False) if layers == 4 else [
        (golden_dense[f"{name}/f3"], torch.zeros(2, 384))]
    dense_close(f"{name}/out", head(features))
    dense_close(f"{name}/feat_every32", keep["conv"][0][:, ::32])


class ToyBackbone(torch.nn.Module):
    """Of the golden numbers of sliding windows: four maps that are polynomials of averages of 14 x 14 pixels."""
    n_blocks, patch_size = 4, 14

    def get_intermediate_layers(self, x, n, reshape, return_class_token, norm):
        a = torch.nn.functional.avg_pool2d(x, 14)
        return [((k + 1) * a + 0.1 * k * a**2, a.mean((2, 3))) for k in n]


@torch.no_grad()
def test_heads_slide_and_views_golden():
    network = heads.Dense(ToyBackbone(), fill_by_names(heads.SegmentationHead(3, 5, 4), "decode_head."))
    at = lambda name: golden_dense[f"seg_slide_tta_toy/{name}"]  # noqa: E731
    dense_close("seg_slide_tta_toy/crop_logits", network(at("img")[..., :50, :56]))
    whole = [heads.slide(network, at(name), 56, 28, batch) for name, batch in (("img", 3), ("img2", 1))]
    dense_close("seg_slide_tta_toy/slide_norescale", whole[0])
    views = [heads.resize(x, (71, 59)) for x in whole]
    dense_close("seg_slide_tta_toy/slide_rescale", views[0])
    first, second = views[0].softmax(1), views[1].softmax(1).flip(-1)
    dense_close("seg_slide_tta_toy/prob1", first)
    dense_close("seg_slide_tta_toy/prob2_flipped_back", second)
    assert (first.argmax(1) == at("simple_pred")).all()
    assert ((first + second).argmax(1) == at("aug_pred")).all()


@torch.no_grad()
def test_heads_segment_is_these_steps(tmp_path):
    """segment() against its parts, written out, on a photograph."""
    network = heads.Dense(ToyBackbone(), fill_by_names(heads.SegmentationHead(3, 5, 4), "decode_head."))
    photo = torch.from_numpy(golden_dense.numpy("preprocess_mmcv/img_bgr").copy()).permute(2, 0, 1)
    recipe = heads.Recipe(40, 70, crop=28, stride=21, ratios=(1.0, 1.5), flip=True)
    mean, std = torch.tensor(data.MEAN)[:, None, None], torch.tensor(data.STD)[:, None, None]
    views = []
    for size in ((40, 57), (60, 86)):
        x = (heads.resize_bytes(photo, size) / 255 - mean) / std
        for flip in (False, True):
            y = heads.slide(network, (x.flip(-1) if flip else x)[None], 28, 21)
            y = heads.resize(y, (37, 53)).softmax(1)[0]
            views.append(y.flip(-1) if flip else y)
    found = heads.segment(network, photo, recipe)
    assert_close(found, torch.stack(views).mean(0), 1e-6)
    assert_close(found.sum(0), torch.ones(37, 53), 1e-5)
    deep = heads.segment(network, data.widen(photo), recipe)
    assert_close(deep, found, 1e-3)
    stretched = heads.Recipe(40, 70, 64, 64, multiple=32)  # to sides of 64 and 64
    view = (heads.resize_bytes(heads.resize_bytes(photo, (40, 57)), (64, 64)) / 255 - mean) / std
    expected = heads.resize(heads.slide(network, view[None], 64, 64), (37, 53)).softmax(1)[0]
    assert_close(heads.segment(network, photo, stretched), expected, 1e-6)


def test_heads_sizes_are_those_of_mmcv():
    for h, w, long, short, *expected in golden_dense.numpy(
            "preprocess_mmcv/rescale_size_table__h_w_scalelong_scaleshort_newh_neww").tolist():
        assert list(heads.scaled_size(h, w, long, short)) == expected
    photo = torch.from_numpy(golden_dense.numpy("preprocess_mmcv/img_bgr").copy()).permute(2, 0, 1)
    for key in golden_dense.keys("preprocess_mmcv/rescale_"):
        if not key.startswith("size"):
            long, short = map(int, key.split("_"))
            found = heads.resize_bytes(photo, heads.scaled_size(37, 53, long, short)).permute(1, 2, 0)
            assert_close(found, golden_dense[f"preprocess_mmcv/rescale_{key}"].float(), 1)
    assert_close(heads.resize_bytes(photo, (64, 64)).permute(1, 2, 0),
                 golden_dense["preprocess_mmcv/resize_to_multiple32"].float(), 1)
    rgb = photo.flip(0)[None]
    assert_close(data.normalize(data.to_float(rgb))[0].permute(1, 2, 0),
                 golden_dense["preprocess_mmcv/normalized_from_bgr"], 1e-5)


def test_heads_segmentation_loss_golden():
    loss = heads.segmentation_loss(golden_dense["seg_loss/logit"], golden_dense["seg_loss/label"][:, 0])
    dense_close("seg_loss/loss_ce", loss)
    labels = golden_dense["seg_loss/label"][:, 0]
    right = (heads.resize(golden_dense["seg_loss/logit"], (8, 10)).argmax(1) == labels)[labels != 255]
    dense_close("seg_loss/acc_seg", 100 * right.float().mean())
    ignored = torch.full((2, 8, 10), 255, dtype=torch.uint8)
    assert heads.segmentation_loss(golden_dense["seg_loss/logit"], ignored) == 0


def test_heads_names_and_colors_of_classes():
    tables = golden_dense.json("classes")
    for name, table in tables.items():
        assert heads.CLASSES[name] == [s.strip() for s in table["names"]]
        assert [list(c) for c in heads.colors(len(table["rgb"]), name)] == table["rgb"]
    assert len(set(heads.colors(256))) == 256


@pytest.mark.parametrize("n_blocks,even", [(12, (2, 5, 8, 11)), (24, (4, 11, 17, 23)), (40, (9, 19, 29, 39))])
def test_heads_taps(n_blocks, even):
    assert heads.LinearDepthHead(8, 4).taps(n_blocks) == heads.DPTHead(8).taps(n_blocks) == even
    assert heads.LinearDepthHead(8, 1).taps(n_blocks) == heads.SegmentationHead(8, 2).taps(n_blocks) == (n_blocks - 1,)
    assert heads.SegmentationHead(8, 2, 4).taps(n_blocks) == tuple(range(n_blocks - 4, n_blocks))


@pytest.mark.parametrize("make", [lambda: heads.DPTHead(64, channels=16), lambda: heads.LinearDepthHead(64),
                                  lambda: heads.SegmentationHead(64, 3, 4)])
def test_heads_on_small_networks_and_odd_sizes(make):
    network = heads.Dense(model.build("vit_nano", img_size=32, patch_size=8), make()).eval()  # of 3 blocks
    for size in ((1, 1), (8, 8), (37, 50)):
        assert network(torch.randn(2, 3, *size)).shape[-2:] == size
    assert heads.even_taps(3) == (0, 1, 2, 2)


@pytest.mark.parametrize("call", [lambda: heads.LinearDepthHead(8, 2), lambda: heads.SegmentationHead(8, 2, 3),
                                  lambda: heads.DPTHead(8, 0, 10), lambda: heads.LinearDepthHead(8, 1, 10, 1),
                                  lambda: heads.Dense(None, None).whole_inference(None, {})])
def test_heads_errors(call):
    with pytest.raises(ValueError, match="1 or 4 blocks|two positive numbers|leave it None"):
        call()


DENSE_SHAPES = golden_dense.json("shapes")
POINTS = {"linear": ("_ld", dict(layers=1)), "linear4": ("_ld", {}), "dpt": ("_dd", {})}


@pytest.mark.parametrize("key", [k for k in DENSE_SHAPES if k.endswith("_head")])
def test_dense_entry_points_have_the_released_keys(key):
    """The 40 heads: names in order, shapes; the range of depth is that of the data, not the 80 m of the official hub."""
    name, dataset, kind, _ = key.rsplit("_", 3)
    suffix, kwargs = POINTS[kind] if dataset in heads.RANGES else (f"_{kind[0]}s", {})
    with torch.device("meta"):
        network = hub.entry_points()[name + suffix](pretrained=False, weights=dataset.upper(), **kwargs)
    keys = {f"decode_head.{k}": list(v.shape) for k, v in network.decode_head.state_dict().items()}
    assert list(keys.items()) == list(DENSE_SHAPES[key].items()) and not network.training
    assert network.decode_head.depth_range == heads.RANGES.get(dataset)


class Foreign:
    """Something that a pickle would run."""

    def __reduce__(self):
        return os.system, ("touch /tmp/should_not_exist",)


def as_released(head: torch.nn.Module, path: Path, **meta) -> Path:
    """A head's file as the tools that trained the released ones write it: numbers of numpy and an optimizer beside."""
    weights = {f"decode_head.{k}": v for k, v in head.state_dict().items()}
    state = {i: dict(step=7, exp_avg=torch.zeros_like(v)) for i, v in enumerate(weights.values())}
    meta = dict(config="model = dict(...)", iter=38400, hook_msgs=dict(best_score=np.float64(0.3), n=np.int64(3),
                                                                       x=np.float32(2))) | meta
    torch.save(dict(meta=meta, state_dict=weights, optimizer=dict(state=state, param_groups=[dict(lr=1e-4)])), path)
    return path


@pytest.fixture
def small_released(tmp_path, monkeypatch):
    """dinov2_vits14 in torch.hub's folder, a small network in its place; and that folder."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setitem(model.ARCHS, "vit_small", dict(embed_dim=64, depth=4, num_heads=1))
    cache = tmp_path / "hub/checkpoints"
    cache.mkdir(parents=True)
    torch.save(randomize(hub.backbone("dinov2_vits14", pretrained=False)).state_dict(),
               cache / "dinov2_vits14_pretrain.pth")
    return cache


HEADS = {"linear": lambda: heads.LinearDepthHead(64, 1), "linear4": lambda: heads.LinearDepthHead(64),
         "dpt": lambda: heads.DPTHead(64)}


@pytest.mark.parametrize("kind", HEADS)
@torch.no_grad()
def test_dense_released_depth_files(kind, small_released):
    points, (suffix, kwargs) = hub.entry_points(), POINTS[kind]
    head = fill_by_names(HEADS[kind](), "decode_head.")
    file = as_released(head, small_released / f"dinov2_vits14_nyu_{kind}_head.pth")
    as_released(head, small_released / f"dinov2_vits14_kitti_{kind}_head.pth")
    images, make = randn(1, (1, 3, 50, 61))[0], partial(points[f"dinov2_vits14{suffix}"], **kwargs)
    expected = heads.Dense(hub.load("dinov2_vits14"), head).eval()(images)
    assert torch.equal(make()(images), expected) and torch.equal(make(weights=str(file))(images), expected)
    network, about = hub.load_dense("dinov2_vits14", f"nyu_{kind}")
    assert torch.equal(network(images), expected) and about == hub.About("depth", "nyu")
    assert make(weights="KITTI").decode_head.depth_range == (0.001, 80)
    literal = make(depth_range=(0.001, 80))(images)  # the official hub's way with NYU's linear heads
    assert (literal / expected).min() > 7.9 if kind != "dpt" else torch.equal(literal, expected)
    other = small_released / "mine.pth"
    shutil.copy(file, other)
    with pytest.raises(ValueError, match="does not say for which depths it is; give their range"):
        hub.load_dense("dinov2_vits14", other)
    assert torch.equal(hub.load_dense("dinov2_vits14", other, (0.001, 10))[0](images), expected)


@pytest.mark.parametrize("kind,layers", [("linear", 1), ("ms", 4)])
@pytest.mark.parametrize("dataset", heads.CLASSES)
@torch.no_grad()
def test_dense_released_segmentation_files(kind, layers, dataset, small_released):
    names = heads.CLASSES[dataset]
    head = fill_by_names(heads.SegmentationHead(64, len(names), layers), "decode_head.")
    file = as_released(head, small_released / f"dinov2_vits14_{dataset}_{kind}_head.pth", CLASSES=tuple(names))
    images = randn(1, (1, 3, 50, 61))[0]
    network, about = hub.load_dense("dinov2_vits14", f"{dataset}_{kind}")
    assert about == hub.About("seg", dataset, names, heads.colors(len(names), dataset), heads.RECIPES[dataset, kind])
    made = hub.entry_points()[f"dinov2_vits14_{kind[0]}s"](weights=dataset.upper())
    assert torch.equal(made(images), network(images)) and network(images).shape == (1, len(names), 50, 61)
    file = file.rename(small_released / "mine.pth")
    assert hub.load_dense("dinov2_vits14", file)[1] == about  # by the number of classes


def test_dense_files_that_do_not_fit(small_released, tmp_path):
    save = lambda head, name, **meta: as_released(head, tmp_path / name, **meta)  # noqa: E731
    load = partial(hub.load_dense, "dinov2_vits14")
    wide = save(heads.LinearDepthHead(96), "nyu_linear4_head.pth")
    short = heads.SegmentationHead(64, 21)
    del short.bn
    more = heads.DPTHead(64)
    more.extra = torch.nn.Linear(1, 1)
    for path, text in (
            (wide, "is the head of another backbone: it takes 768 channels, this one, 64 wide, gives 128 or 512"),
            (save(heads.DPTHead(96), "a_nyu_dpt_head.pth"), "takes 96 channels, this one, 64 wide, gives 64$"),
            (save(heads.SegmentationHead(96, 21), "voc2012_linear_head.pth"), "gives 64 or 256"),
            (save(short, "short.pth"), "5 missing, such as bn.bias"), (save(more, "b_nyu_dpt_head.pth"), "2 unexp"),
            (small_released / "dinov2_vits14_pretrain.pth", "holds no depth or segmentation head"),
            ("nyu_dbt", "no such dense head: nyu_dbt, did you mean nyu_dpt"), ("missing.pth", "no such dense head")):
        with pytest.raises(ValueError, match=text):
            load(path)
    with pytest.raises(ValueError, match="nyu_dpt is a head of the released dinov2_vit{s,b,l,g}14, dinov2_vits14_reg is none"):
        hub.load_dense("dinov2_vits14_reg", "nyu_dpt")
    linear, segments = save(heads.LinearDepthHead(64, 1), "nyu_linear_head.pth"), save(heads.SegmentationHead(64, 21), "s")
    points = {k: partial(v, weights=str(segments)) for k, v in hub.entry_points().items() if "vits14_" in k}
    for call, text in ((partial(points["dinov2_vits14_ld"], weights=str(linear)), "a head for layers=1"),
                       (partial(points["dinov2_vits14_dd"], weights=str(linear)), "is a linear head; call dinov2_._ld"),
                       (points["dinov2_vits14_dd"], "is a head for segmentation"),
                       (points["dinov2_vits14_ms"], "is a head for dinov2_._ls"),
                       (partial(points["dinov2_vits14_ls"], weights=str(linear)), "is a head for depth"),
                       (partial(points["dinov2_vits14_ld"], layers=2), "1 or 4 layers, not 2"),
                       (partial(points["dinov2_vits14_ld"], weights="SUN"), "neither 'NYU' nor 'KITTI'"),
                       (partial(points["dinov2_vits14_dd"], weights=str(linear), depth_range=(10, 1)), "two positive")):
        with pytest.raises(ValueError, match=text):
            call()


def test_dense_files_run_no_code(small_released, tmp_path):
    file = as_released(HEADS["linear"](), tmp_path / "nyu_linear_head.pth", hooks=Foreign())
    with pytest.raises(ValueError, match="holds pickled code, not just weights: refused"):
        hub.load_dense("dinov2_vits14", file)
    assert not os.path.exists("/tmp/should_not_exist")


def test_dense_info(small_released, tmp_path, capsys):
    for head, texts in ((HEADS["linear4"](), ("linear", "one 64 wide")), (HEADS["dpt"](), ("DPT", "64 wide")),
                        (heads.SegmentationHead(64, 21), ("21 classes", "the last block of a backbone 64 wide"))):
        hub.main(["info", str(as_released(head, tmp_path / "head.pth"))])
        out = capsys.readouterr().out
        assert all(text in out for text in texts), out


# ----------------------------------------------------------------------------------------------------------------------
# Mask2Former

M2F = dict(n_classes=7, embed_dim=64, depth=8, num_heads=4, img_size=56, conv_dim=8, adapter_heads=4, decoder_dim=64,
           decoder_heads=4, deform_heads=4, decoder_ffn_dim=128, n_queries=10)
M2F_TINY = M2F | dict(n_classes=3, embed_dim=32, depth=4, decoder_dim=32, decoder_ffn_dim=32, encoder_layers=1,
                      decoder_layers=2)


@pytest.fixture(scope="module")
def m2f() -> mask2former.Mask2Former:
    return fill_by_names(mask2former.Mask2Former(**M2F))


def m2f_shapes(key: str) -> list[tuple[int, int]]:
    return [tuple(shape) for shape in golden_dense[f"m2f_msda/{key}"].tolist()]


@pytest.mark.parametrize("name, arguments, n", [
    ("dinov2_vitg14_ade20k_m2f", {}, 1175), ("_m2f_reduced_golden", M2F, 663)])
def test_m2f_keys_and_shapes(name, arguments, n):
    with torch.device("meta"):
        state = mask2former.Mask2Former(**arguments).state_dict()
    assert [(k, list(v.shape)) for k, v in state.items()] == list(golden_dense.json("shapes")[name].items())
    assert len(state) == n


@torch.inference_mode()
def test_m2f_built_on_meta_takes_weights(m2f):
    with torch.device("meta"):
        network = mask2former.Mask2Former(**M2F)
    network.load_state_dict(m2f.state_dict(), assign=True)
    images = golden_dense["m2f_reduced/img"]
    assert torch.equal(network.eval()(images), m2f(images))


@torch.inference_mode()
def test_m2f_deformable_attention_golden():
    part, shapes = partial("m2f_msda/{}".format), m2f_shapes("spatial_shapes")
    given = golden_dense[part("value")], shapes, golden_dense[part("sampling_locations")]
    weights = golden_dense[part("attention_weights")]
    dense_close(part("core_out"), mask2former.deformable_sampling(*given, weights))
    layer = fill_by_names(mask2former.DeformableAttention(48, 3, 4, 4, 0.5), "msda.")
    query, places, value = (golden_dense[part(k)] for k in ("msda_query", "msda_ref", "msda_feat"))
    dense_close(part("msda_out"), layer(query, places, value, shapes))


def test_m2f_places_and_positions_golden():
    for to, of in (("di1_ref", "di2_shapes"), ("di2_ref", "di1_shapes")):  # each reads from the other's grids
        dense_close(f"m2f_msda/{to}", mask2former.centers(m2f_shapes(of)))
    dense_close("m2f_msda/sine_pos_5x7_nf16", mask2former.sine_position(5, 7, 32).T.view(1, 32, 5, 7))


@torch.inference_mode()
def test_m2f_adapter_golden(m2f):
    images = golden_dense["m2f_reduced/img"]
    for i, x in enumerate(m2f.backbone.spm(images), 1):
        dense_close(f"m2f_reduced/spm_c{i}", x)
    for i, x in enumerate(m2f.backbone(images), 1):
        dense_close(f"m2f_reduced/adapter_f{i}", x)


@torch.inference_mode()
def test_m2f_decoders_golden(m2f):
    features = [golden_dense[f"m2f_reduced/pd_in{i}"] for i in range(4)]
    mask_feature, maps = m2f.decode_head.pixel_decoder(features)
    dense_close("m2f_reduced/pd_mask_feature", mask_feature)
    for i, x in enumerate(maps):
        dense_close(f"m2f_reduced/pd_ms{i}", x)
    outputs = m2f.decode_head(features)
    logits, masks = (torch.stack(x) for x in zip(*outputs))
    dense_close("m2f_reduced/head_cls", logits)
    dense_close("m2f_reduced/head_mask", masks)
    dense_close("m2f_reduced/head_forward_test", mask2former.class_maps(*outputs[-1]))
    blocked = [(mask2former.resize(m, maps[i % 3].shape[-2:]) < 0).flatten(2).all(-1) for i, m in enumerate(masks[:-1])]
    assert torch.cat(blocked).any()  # these numbers do tell what happens to queries with empty masks


@torch.inference_mode()
def test_m2f_whole_golden(m2f):
    """A whole image, then overlapping windows, enlarged to the original size, and their label map."""
    images = golden_dense["m2f_reduced/img"]
    dense_close("m2f_reduced/e2e_encode_decode", m2f(images))
    values = heads.resize(heads.slide(m2f, images, 64, 32, batch_size=1), (50, 77))
    dense_close("m2f_reduced/e2e_slide_rescale", values)
    dense_close("m2f_reduced/e2e_prob", values.softmax(1))
    assert (values.argmax(1) != golden_dense["m2f_reduced/e2e_pred"]).float().mean() <= 1e-3


def test_m2f_losses_golden():
    part = {k: golden_dense[f"m2f_losses/{k}"] for k in golden_dense.keys("m2f_losses/")}
    costs = mask2former.match_costs(part["cls_pred"], part["mask_pts"], part["gt_labels"], part["gt_pts"])
    for name, cost in zip(("cls", "mask", "dice"), costs, strict=True):
        dense_close(f"m2f_losses/cost_{name}", cost)
    queries, targets = mask2former.match(sum(costs))
    assigned = torch.zeros(10, dtype=torch.int64).index_put((queries,), targets + 1)
    assert torch.equal(assigned, part["assigned_gt_inds"])
    masks = part["mask_pts"][queries], part["gt_pts"][targets], 3
    dense_close("m2f_losses/loss_cls", 2 * mask2former.class_loss(part["cls_pred"][None], part["labels"][None])[None])
    dense_close("m2f_losses/loss_mask", 5 * mask2former.mask_loss(*masks)[None])
    dense_close("m2f_losses/loss_dice", 5 * mask2former.dice_loss(*masks)[None])
    dense_close("m2f_losses/ps_out", mask2former.point_sample(part["ps_feat"], part["ps_points"]))


def test_m2f_deformable_sampling_gradients():
    """To values, places and weights, against finite differences; float64 is not cut down. No place lies on the edge
    between two cells, where there is no derivative."""
    shapes, generator = [(2, 3), (4, 5)], torch.Generator().manual_seed(0)
    value, weights = (torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_()
                      for s in ((1, 26, 2, 3), (1, 4, 2, 2, 2)))
    places = (torch.rand(1, 4, 2, 2, 2, 2, generator=generator, dtype=torch.float64) * 1.2 - 0.1).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda *x: mask2former.deformable_sampling(x[0], shapes, x[1], x[2]), (value, places, weights))
    half = mask2former.deformable_sampling(value.bfloat16(), shapes, places.bfloat16(), weights.bfloat16())
    assert half.dtype == torch.float32


def test_m2f_deformable_attention_starts_around_its_place():
    """Before training, head m looks into direction m, its point p at p cells, with equal weights."""
    layer = mask2former.DeformableAttention(8, 1, 4, 2)
    assert_close(layer.sampling_offsets.bias.view(4, 2, 2)[:, 1], [[2, 0], [0, 2], [-2, 0], [0, -2]], 1e-6)
    with torch.no_grad():
        layer.value_proj.weight.copy_(torch.eye(8))
        layer.output_proj.weight.copy_(torch.eye(8))
    value = torch.zeros(1, 25, 8)
    value[:, 13] = value[:, 14] = 1  # one and two cells right of the middle
    out = layer(torch.randn(1, 1, 8), torch.tensor([[[[0.5, 0.5]]]]), value, [(5, 5)])
    assert_close(out, [[[1.0, 1, 0, 0, 0, 0, 0, 0]]], 1e-6)


def test_m2f_empty_masks_block_nothing():
    masks = torch.full((1, 3, 8, 8), -1.0)
    masks[0, 1, :, :4] = 1
    masks[0, 2] = 1
    blocked = mask2former.blocked_places(masks, (4, 4)).view(1, 3, 4, 4)
    assert not blocked[0, [0, 2]].any() and blocked[0, 1, :, 2:].all() and not blocked[0, 1, :, :2].any()


@pytest.mark.parametrize("size, fits", [((64, 100), "64 x 128"), ((33, 32), "64 x 32"), ((0, 32), "32 x 32")])
def test_m2f_sides_must_be_multiples_of_32(m2f, size, fits):
    assert m2f.multiple == 32
    with pytest.raises(ValueError, match=f"multiples of 32; resize it to {fits}"):
        m2f(torch.zeros(1, 3, *size))


@pytest.mark.parametrize("arguments, text", [
    (dict(depth=6), "depth 6 is not a multiple of 4; make it 4"),
    (dict(num_heads=5), "embed_dim 64 is not a multiple of 5; make it 60"),
    (dict(adapter_heads=24), "adapter_ratio 32 is not a multiple of 24"),
    (dict(decoder_dim=48, decoder_heads=3, deform_heads=3), "decoder_dim 48 is not a multiple of 32"),
    (dict(deform_heads=7), "decoder_dim 64 is not a multiple of 7")])
def test_m2f_sizes_that_do_not_divide_are_named(arguments, text):
    with pytest.raises(ValueError, match=text):
        mask2former.Mask2Former(**M2F | arguments)


@torch.inference_mode()
def test_m2f_every_argument_has_an_effect():
    other = dict(n_classes=4, embed_dim=64, depth=8, num_heads=2, patch_size=16, img_size=112, mlp_ratio=2.0,
                 conv_dim=4, adapter_heads=2, adapter_ratio=1.0, adapter_ffn_ratio=0.5, decoder_dim=64, decoder_heads=2,
                 deform_heads=2, decoder_ffn_dim=64, n_queries=5, encoder_layers=2, decoder_layers=1, n_points=2)
    assert list(other) == list(inspect.signature(mask2former.Mask2Former).parameters)
    with torch.device("meta"):
        shapes = {k: [v.shape for v in mask2former.Mask2Former(**M2F_TINY | {k: other[k]}).state_dict().values()]
                  for k in other}
        usual = [v.shape for v in mask2former.Mask2Former(**M2F_TINY).state_dict().values()]
    silent = [k for k in other if shapes[k] == usual]
    assert silent == ["num_heads", "decoder_heads"]
    images = golden_dense["m2f_reduced/img"]
    before, *after = (fill_by_names(mask2former.Mask2Former(**M2F_TINY | {k: other[k] for k in keys}))(images)
                      for keys in ([], *([k] for k in silent)))
    assert all((before - x).abs().max() > 1e-3 for x in after)


@torch.inference_mode()
def test_m2f_batch_of_other_size_and_half_precision(m2f):
    """Images do not see each other; bfloat16, by autocast or of weights, is near float32."""
    images = torch.cat([golden_dense["m2f_reduced/img"][..., :64], torch.zeros(1, 3, 64, 64)])
    expected = m2f(images)
    assert_close(m2f(images[:1]), expected[:1], 1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = m2f(images)
    half = copy.deepcopy(m2f).bfloat16()(images.bfloat16())
    for x in (mixed, half):
        assert x.dtype == torch.float32 and x.isfinite().all()
        assert (x - expected).abs().mean() < 0.1 * expected.mean()  # masks of attention flip where undecided


def test_m2f_uncertain_points_lie_where_masks_are_undecided():
    torch.manual_seed(0)
    masks = torch.linspace(-4, 4, 32).expand(2, 32, 32)  # undecided in the middle column
    points = mask2former.uncertain_points(masks, 400)
    assert points.shape == (2, 400, 2) and points.min() >= 0 and points.max() <= 1
    near = (points[..., 0] - 0.5).abs() < 0.18  # a quarter of 3 * 400 lies within 0.125 or so
    assert near[:, :300].float().mean() > 0.97 and 0.1 < near[:, 300:].float().mean() < 0.5
    assert mask2former.uncertain_points(masks[:0], 8).shape == (0, 8, 2)


def test_m2f_training_reduces_the_loss():
    torch.manual_seed(0)
    network = mask2former.Mask2Former(**M2F_TINY)
    network.backbone.blocks.requires_grad_(False)
    images, labels = torch.randn(2, 3, 32, 64), torch.full((2, 32, 64), 2, dtype=torch.uint8)
    images[:, :, :, 32:] += 2
    labels[:, :, 32:], labels[:, :4] = 0, 255
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=2e-3)
    values = []
    for _ in range(15):
        loss = mask2former.total_loss(network.encode(images), labels, n_points=64)
        optimizer.zero_grad()
        loss.backward()
        assert not values or all(p.grad is not None for p in network.parameters() if p.requires_grad)
        optimizer.step()
        values.append(loss.item())
    assert values[-1] < 0.5 * values[0]
    predicted = network.eval()(images).argmax(1)
    assert (predicted == labels)[labels != 255].float().mean() > 0.9


def test_m2f_loss_of_labels_without_classes_and_out_of_range():
    torch.manual_seed(0)
    outputs = [(torch.randn(2, 4, 6, requires_grad=True), torch.randn(2, 4, 8, 8, requires_grad=True))]
    labels = torch.full((2, 16, 16), 255)
    loss = mask2former.total_loss(outputs, labels, n_points=8)
    assert_close(loss, 2 * mask2former.class_loss(outputs[0][0], torch.full((2, 4), 5)), 1e-6)
    loss.backward()
    assert outputs[0][1].grad.abs().max() == 0
    with torch.autocast("cpu", torch.bfloat16):
        assert mask2former.total_loss([(x.bfloat16(), m.bfloat16()) for x, m in outputs], labels).dtype == torch.float32
    labels[0, 0, 0] = 5
    with pytest.raises(ValueError, match="labels 5 to 5, but the network has classes 0 to 4; give pixels"):
        mask2former.total_loss(outputs, labels)
    with pytest.raises(ValueError, match=r"one map per image, \(2, H, W\)"):
        mask2former.total_loss(outputs, labels[:1])


def test_m2f_loss_counts_the_masks_of_all_processes(monkeypatch):
    """With 2 masks here and 4 in the other process, sums are divided by 3."""
    masks, labels = torch.randn(1, 4, 8, 8), torch.arange(2).repeat_interleave(32).view(1, 8, 8)
    mask_losses = partial(mask2former.total_loss, [(torch.zeros(1, 4, 3), masks)], labels, 64, weights=(0.0, 1.0, 1.0))
    torch.manual_seed(0)
    alone = mask_losses()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda x: x.add_(4))
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    torch.manual_seed(0)
    assert_close(mask_losses(), alone * 2 / 3, 1e-5)


def test_m2f_by_the_hub(tmp_path, monkeypatch):
    """Its file, from torch.hub's folder and by name, with a small network in its place; and what has no head in it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(hub, "Mask2Former", type("Small", (mask2former.Mask2Former,), dict(
        __init__=lambda self: mask2former.Mask2Former.__init__(self, **M2F_TINY | dict(n_classes=150)))))
    small = fill_by_names(hub.Mask2Former())
    cache = tmp_path / "hub/checkpoints"
    cache.mkdir(parents=True)
    file = cache / "dinov2_vitg14_ade20k_m2f.pth"
    torch.save(dict(meta=dict(best=np.float64(60)), state_dict=small.state_dict()), file)
    images, make = randn(1, (1, 3, 64, 32))[0], hub.entry_points()["dinov2_vitg14_m2f"]
    with torch.inference_mode():
        expected = small(images)
        for network, about in (hub.load_dense("dinov2_vitg14_m2f"), hub.load_dense(file), (make(), about_m2f())):
            assert torch.equal(network(images), expected) and about == about_m2f()
        assert not make(pretrained=False).training
        photo = data.to_float(images.mul(50).add(128).clamp(0, 255).byte()) * 255
        chances = heads.segment(make(weights=str(file)), photo[0].byte(), about.recipe._replace(short=64))
    assert chances.shape == (150, 64, 32)
    torch.save(model.build("vit_nano", patch_size=8, img_size=16).state_dict(), tmp_path / "vit.pth")
    for call in (lambda: hub.load_dense(tmp_path / "vit.pth"), lambda: make(weights=str(tmp_path / "vit.pth"))):
        with pytest.raises(ValueError, match="vit.pth has no dense head in it; name one beside it"):
            call()
    with pytest.raises(ValueError, match="holds no DINOv2 backbone"):
        hub.load(file)


def about_m2f() -> hub.About:
    names = heads.CLASSES["ade20k"]
    return hub.About("seg", "ade20k", names, heads.colors(150, "ade20k"), heads.RECIPES["ade20k", "m2f"])


# ----------------------------------------------------------------------------------------------------------------------
# Depth and segmentation of eval_dense.py


def dense(*argv) -> dict:
    return eval_dense.main([str(a) for a in argv])


def put(path: Path, pixels, palette: bool = False) -> Path:
    """A file of an array, by its suffix; with `palette` an indexed PNG in the colors of VOC."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, pixels)
    else:
        picture = Image.fromarray(np.asarray(pixels))
        if palette:
            picture.putpalette([c for color in heads.colors(256) for c in color])
        picture.save(path)
    return path


def noise(seed: int, *shape: int, high: int = 256, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape, dtype=dtype)


@pytest.fixture(scope="session")
def dense_pairs(tmp_path_factory) -> Path:
    """18 pieces, 48 x 64, of scikit-learn's two photographs, 14 to train with. Depth: 1 m and 6 m times the smoothed
    brightness; classes: the thirds of that brightness."""
    root, pieces = tmp_path_factory.mktemp("pairs"), []
    for photo in photographs():
        small = np.asarray(Image.fromarray(photo.permute(1, 2, 0).numpy()).resize((213, 142), Image.BOX))
        pieces += [small[y : y + 48, x : x + 64] for y in (0, 48, 94) for x in (0, 64, 128)]
    bright = torch.from_numpy(np.stack(pieces)).float().mean(-1, keepdim=True).movedim(-1, 1) / 255
    pad = torch.nn.functional.pad(bright, [4] * 4, mode="replicate")
    bright = torch.nn.functional.avg_pool2d(pad, 9, 1)[:, 0].numpy()
    thirds = np.digitize(bright, np.quantile(bright, [1 / 3, 2 / 3]))
    for i, piece in enumerate(pieces):
        end = f"{'val' if i % 4 == 3 else 'train'}/{i:02d}.png"
        put(root / "images" / end, piece)
        put(root / "depth" / end, (1000 + 6000 * bright[i]).round().astype(np.uint16))
        put(root / "labels" / end, thirds[i].astype(np.uint8))
    (root / "classes.txt").write_text("dark\nmiddling\n\nbright\n")
    return root


@pytest.fixture
def dense_vit(desk) -> Path:
    """A small backbone with random weights, in a folder of its own."""
    torch.manual_seed(0)
    vit = model.build("vit_nano", patch_size=8, img_size=32)
    (desk / "model").mkdir()
    torch.save(vit.state_dict(), desk / "model/vit.pth")
    return desk / "model/vit.pth"


QUICK = ("--num-workers", 0, "--device", "cpu", "--eval-every", 2, "--steps", 4, "--batch-size", 4, "--crop", 32, 32)
TASKS = {"depth": ("--task", "depth"), "seg": ("--task", "seg", "--short", 32)}


# Measures


def test_eval_dense_depth_measures_golden():
    gt, pred = golden_dense["depth_metrics/gt"], golden_dense["depth_metrics/pred"]
    measures = eval_dense.depth_measures(pred[0], gt[0], (gt[0] > 0.001) & (gt[0] < 10))
    keys = set(golden_dense.keys("depth_metrics/")) - {"gt", "pred"}
    assert keys == set(eval_dense.DEPTH_MEASURES)
    for name, value in zip(eval_dense.DEPTH_MEASURES, measures):
        assert_close(value, golden_dense[f"depth_metrics/{name}"][0], 1e-5, name)


@pytest.mark.parametrize("name, size, rows, columns", [
    ("nyu", (480, 640), (45, 471), (41, 601)), ("garg", (352, 1216), (143, 349), (43, 1172)),
    ("eigen", (352, 1216), (117, 321), (43, 1172)), ("none", (5, 7), (0, 5), (0, 7)),
    ("garg", (375, 1242), (int(0.40810811 * 375), int(0.99189189 * 375)),
     (int(0.03594771 * 1242), int(0.96405229 * 1242)))])
def test_eval_dense_crops(name, size, rows, columns):
    expected = torch.zeros(size, dtype=torch.bool)
    expected[slice(*rows), slice(*columns)] = True
    assert torch.equal(eval_dense.crop_of(torch.ones(size), name), expected)


def plain_depth(p: np.ndarray, d: np.ndarray) -> dict[str, float]:
    """The measures of one image's known pixels, as they are written in the papers."""
    p, d = p.astype(np.float64), d.astype(np.float64)
    worse, e = np.maximum(p / d, d / p), np.log(p) - np.log(d)
    return dict(a1=np.mean(worse < 1.25), a2=np.mean(worse < 1.25**2), a3=np.mean(worse < 1.25**3),
                abs_rel=np.mean(abs(p - d) / d), sq_rel=np.mean((p - d) ** 2 / d), rmse=np.sqrt(np.mean((p - d) ** 2)),
                rmse_log=np.sqrt(np.mean(e**2)), log_10=np.mean(abs(np.log10(p) - np.log10(d))), silog=100 * np.std(e))


def test_eval_dense_depth_summary_is_a_mean_over_images():
    """Not over pixels; images without a known pixel are left out."""
    rng, table, expected = np.random.default_rng(0), [], []
    for n_known in (1, 100, 0, 7):
        p, d = (torch.from_numpy(rng.uniform(0.5, 9, (10, 12)).astype(np.float32)) for _ in range(2))
        valid = torch.arange(120).view(10, 12) < n_known
        known = d[valid].double()
        table.append(torch.cat([eval_dense.depth_measures(p, d, valid),
                                torch.stack([known.mean(), (known**2).mean()])]))
        if n_known:
            expected.append(plain_depth(p[valid].numpy(), d[valid].numpy()) | dict(d=d[valid].double().numpy()))
    result = eval_dense.depth_summary(types.SimpleNamespace(name="x"), torch.stack(table))
    for name in eval_dense.DEPTH_MEASURES:
        assert result[name] == pytest.approx(np.mean([e[name] for e in expected]), abs=1e-6), name
    middle = np.mean([e["d"].mean() for e in expected])
    constant = dict(depth=middle, rmse=np.mean([np.sqrt(np.mean((e["d"] - middle) ** 2)) for e in expected]))
    assert result["images_left_out"] == 1 and result["constant_everywhere"] == pytest.approx(constant)
    with pytest.raises(ValueError, match="no image of x has a pixel with a depth in the range"):
        eval_dense.depth_summary(types.SimpleNamespace(name="x"), torch.stack(table[2:3]))


def test_eval_dense_segmentation_measures_equal_confusion_matrix():
    """Also of images of several sizes; class 4 occurs nowhere, 5 is predicted alone, 6 never predicted."""
    from sklearn.metrics import confusion_matrix
    rng, counts, matrix = np.random.default_rng(1), torch.zeros(3, 7, dtype=torch.int64), np.zeros((7, 7), int)
    for shape in ((9, 14), (20, 5), (3, 3)):
        labels, answers = rng.choice([0, 1, 2, 3, 6, 255], shape), rng.choice([0, 1, 2, 3, 5], shape)
        answers = np.where(rng.random(shape) < 0.5, np.where(labels > 3, 0, labels), answers)
        counts += eval_dense.count_labels(torch.from_numpy(answers), torch.from_numpy(labels.astype(np.uint8)), 7)
        known = labels != 255
        matrix += confusion_matrix(labels[known], answers[known], labels=range(7))
    result = eval_dense.segmentation_measures(counts)
    right, labeled, answered = np.diag(matrix), matrix.sum(1), matrix.sum(0)
    iou = [100 * r / (a + b - r) if a + b else None for r, a, b in zip(right, labeled, answered)]
    assert [None if v is None else round(v, 4) for v in iou] == result["IoU"]
    assert iou[4] is None and iou[5] == iou[6] == 0
    assert result["mIoU"] == pytest.approx(np.mean([v for v in iou if v is not None]))
    assert result["aAcc"] == pytest.approx(100 * right.sum() / matrix.sum())
    assert result["mAcc"] == pytest.approx(np.mean([100 * right[k] / labeled[k] for k in range(7) if labeled[k]]))


# Data sets on disk


def test_eval_dense_nyu_on_disk(tmp_path):
    for i in range(3):
        put(tmp_path / f"room_{i}/rgb_{i}.png", noise(i, 6, 8, 3))
        put(tmp_path / f"room_{i}/sync_depth_{i}.png", noise(i, 6, 8, high=9000, dtype=np.uint16) * (i < 2))
    line = "{0}room_{1}/rgb_{1}.png {0}room_{1}/sync_depth_{1}.png 518.8579\n"
    (tmp_path / "nyu_train.txt").write_text(line.format("/", 1) + "\n" + line.format("", 0))
    (tmp_path / "nyu_test.txt").write_text(line.format("/", 2))
    pairs, val = (eval_dense.open_pairs(str(tmp_path), "depth", split) for split in ("TRAIN", "VAL"))
    assert (pairs.dataset, len(pairs), len(val)) == ("nyu", 2, 1)
    assert [Path(p).name for item in pairs.items for p in item] == [
        "rgb_0.png", "sync_depth_0.png", "rgb_1.png", "sync_depth_1.png"]
    image, depth = pairs.read(0)
    assert torch.equal(image, torch.from_numpy(noise(0, 6, 8, 3)).permute(2, 0, 1))
    assert_close(depth, noise(0, 6, 8, high=9000, dtype=np.uint16) / 1000, 1e-6)
    assert not val.read(0)[1].any()
    (tmp_path / "nyu_test.txt").unlink()
    with pytest.raises(ValueError, match=r"nyu_test.txt cannot be read \(No such file"):
        eval_dense.open_pairs(str(tmp_path), "depth", "VAL")
    for text, says in (("a b 1\n", "names 2 files that do not exist, the first: .*/a$"), ("\n", "names no pairs"),
                       ("a\n", "has a line 'a'; lines are `photo depth focal`")):
        (tmp_path / "nyu_train.txt").write_text(text)
        with pytest.raises(ValueError, match=f"nyu_train.txt {says}"):
            eval_dense.open_pairs(str(tmp_path), "depth", "TRAIN")


def test_eval_dense_kitti_on_disk(tmp_path):
    """Rows without a depth are left out; of photograph and depth the lowest 352 rows and the middle 1216 columns are
    taken."""
    y, x = np.mgrid[:375, :1242]
    put(tmp_path / "input/day/drive/image_02/data/7.png", np.stack([x % 256, y % 256, x // 256], -1).astype(np.uint8))
    put(tmp_path / "gt_depth/drive/proj_depth/groundtruth/image_02/7.png", (x + 10 * y).astype(np.uint16))
    put(tmp_path / "input/small.png", noise(0, 100, 1300, 3))
    put(tmp_path / "gt_depth/small.png", noise(0, 100, 1300, dtype=np.uint16))
    (tmp_path / "kitti_eigen_train.txt").write_text("small.png small.png 1")
    (tmp_path / "kitti_eigen_test.txt").write_text(
        "day/drive/image_02/data/7.png drive/proj_depth/groundtruth/image_02/7.png 721\nday/drive/8.png None 721\n")
    pairs = eval_dense.open_pairs(str(tmp_path), "depth", "VAL")
    image, depth = pairs.read(0)
    assert (pairs.dataset, len(pairs), image.shape, depth.shape) == ("kitti", 1, (3, 352, 1216), (352, 1216))
    columns, rows = 256 * image[2].int() + image[0], 23 + torch.arange(352)[:, None].expand(-1, 1216)
    assert torch.equal(columns, 13 + torch.arange(1216, dtype=torch.int32).expand(352, -1))
    assert torch.equal(depth, (columns + 10 * rows) / 256)
    with pytest.raises(ValueError, match="small.png is smaller than the 352x1216 pixels that KITTI"):
        eval_dense.open_pairs(str(tmp_path), "depth", "TRAIN").read(0)


def test_eval_dense_ade20k_on_disk(tmp_path, cache):
    raw = np.array([[0, 1, 2], [150, 255, 77]], np.uint8)
    for part in ("training", "validation"):
        put(tmp_path / f"images/{part}/a.jpg", noise(0, 2, 3, 3))
        put(tmp_path / f"annotations/{part}/a.png", raw)
    for split in ("TRAIN", "VAL"):
        pairs = eval_dense.open_pairs(str(tmp_path), "seg", split)
        assert (pairs.dataset, len(pairs), len(pairs.classes)) == ("ade20k", 1, 150)
        assert pairs.read(0)[1].tolist() == [[255, 0, 1], [149, 255, 76]]
    raw[0, 0] = 151
    put(tmp_path / "annotations/training/a.png", raw)
    with pytest.raises(ValueError, match="annotations/training/a.png has the label 150, but the 150 classes are num"):
        eval_dense.open_pairs(str(tmp_path), "seg", "TRAIN").read(0)
    shutil.rmtree(tmp_path / "images/validation")
    with pytest.raises(ValueError, match="no such folder: .*images/validation"):
        eval_dense.open_pairs(str(tmp_path), "seg", "VAL")


def test_eval_dense_voc2012_on_disk(tmp_path):
    """Photographs of train and aug; the numbers of the palette are the classes."""
    labels = np.array([[0, 20], [255, 7]], np.uint8)
    for part, folder, name in (("train", "SegmentationClass", "a"), ("aug", "SegmentationClassAug", "b"),
                               ("val", "SegmentationClass", "c")):
        put(tmp_path / f"JPEGImages/{name}.jpg", noise(0, 2, 2, 3))
        put(tmp_path / folder / f"{name}.png", labels, palette=True)
        listing = tmp_path / f"ImageSets/Segmentation/{part}.txt"
        listing.parent.mkdir(parents=True, exist_ok=True)
        listing.write_text(f"{name}\n")
    assert Image.open(tmp_path / "SegmentationClass/a.png").mode == "P"
    pairs, val = (eval_dense.open_pairs(str(tmp_path), "seg", split) for split in ("TRAIN", "VAL"))
    assert [Path(p).stem for p, _ in pairs.items] == ["a", "b"] and [Path(p).stem for p, _ in val.items] == ["c"]
    assert (pairs.dataset, len(pairs.classes)) == ("voc2012", 21)
    assert all(p.read(i)[1].tolist() == labels.tolist() for p, i in ((pairs, 0), (pairs, 1), (val, 0)))
    shutil.rmtree(tmp_path / "SegmentationClassAug")
    with pytest.raises(ValueError, match="names 1 files that do not exist, the first: .*SegmentationClassAug/b.png"):
        eval_dense.open_pairs(str(tmp_path), "seg", "TRAIN")
    (tmp_path / "ImageSets/Segmentation/aug.txt").unlink()
    assert len(eval_dense.open_pairs(str(tmp_path), "seg", "TRAIN")) == 1


def test_eval_dense_plain_folders(tmp_path, cache):
    """Parts of several names, sub-folders, deep photographs, depth as an array; folders without parts."""
    deep = noise(0, 4, 6, high=65536, dtype=np.uint16)
    meters = np.array([[1.5, np.nan, -2, np.inf, 0, 70]] * 4, np.float32)
    for part in ("training", "valid"):
        put(tmp_path / f"images/{part}/x/a.png", deep)
        put(tmp_path / f"images/{part}/b.jpg", noise(1, 4, 6, 3))
        put(tmp_path / f"depth/{part}/x/a.npy", meters)
        put(tmp_path / f"depth/{part}/b.png", deep)
        put(tmp_path / f"labels/{part}/x/a.png", np.full((4, 6), 2, np.uint8), palette=True)
        put(tmp_path / f"labels/{part}/b.npy", noise(1, 4, 6, high=2, dtype=np.int64))
    for split in ("TRAIN", "VAL"):
        pairs = eval_dense.open_pairs(str(tmp_path), "depth", split, depth_scale=500)
        read = {Path(pairs.describe(i)).name: pairs.read(i) for i in range(len(pairs))}
        image, depth = read["a.png"]
        assert image.dtype == torch.uint16 and image.shape == (3, 4, 6)
        assert depth.tolist() == [[1.5, 0, 0, 0, 0, 70]] * 4
        assert_close(read["b.jpg"][1], deep / 500, 1e-5)
        pairs = eval_dense.open_pairs(str(tmp_path), "seg", split)
        assert pairs.classes is None and eval_dense.count_classes(pairs) == ["class 0", "class 1", "class 2"]
    (tmp_path / "classes.txt").write_text(" one \n\ntwo\nthree")
    assert eval_dense.open_pairs(str(tmp_path), "seg", "TRAIN").classes == ["one", "two", "three"]
    flat = tmp_path / "images/training", tmp_path / "depth/training"
    for folder in flat:
        shutil.copytree(folder, tmp_path / "flat" / folder.parent.name)
    assert len(eval_dense.open_pairs(str(tmp_path / "flat"), "depth", "TRAIN")) == 2
    assert eval_dense.open_pairs(str(tmp_path / "flat"), "depth", "VAL") is None


def spoil(root: Path, what: str) -> None:
    """Something that is wrong with a copy of `dense_pairs`."""
    label, depth = root / "labels/train/00.png", root / "depth/train/00.png"
    if what == "no partner":
        label.unlink()
    elif what == "no photograph":
        put(root / "labels/train/more.png", np.zeros((4, 4), np.uint8))
    elif what == "sizes":
        put(label, np.zeros((48, 63), np.uint8))
    elif what == "colors":
        put(label, np.zeros((48, 64, 3), np.uint8))
    elif what == "label":
        put(label, np.full((48, 64), 3, np.uint8))
    elif what == "negative":
        label.unlink(), put(label.with_suffix(".npy"), np.full((48, 64), -1))
    elif what == "fractions":
        label.unlink(), put(label.with_suffix(".npy"), np.full((48, 64), 0.5))
    elif what == "damaged":
        depth.write_bytes(depth.read_bytes()[:300])
    elif what == "photograph damaged":
        (root / "images/train/00.png").write_bytes(b"none")
    elif what == "no val":
        shutil.rmtree(root / "images/val")
    elif what == "no train":
        shutil.rmtree(root / "images/train")
    elif what == "classes":
        (root / "classes.txt").write_text("\n")
    elif what in ("ignored", "all ignored"):
        (root / "classes.txt").unlink()
        for path in (root / "labels").rglob("val/*.png" if what == "ignored" else "*.png"):
            put(path, np.full((48, 64), 255, np.uint8))
    elif what == "unknown":
        for path in (root / "depth/val").iterdir():
            put(path, np.zeros((48, 64), np.uint16))


@pytest.mark.parametrize("task, what, text", [
    ("seg", "no partner", "images/train/00.* has no partner of the same name in .*labels/train"),
    ("seg", "no photograph", "labels/train/more.png has no partner of the same name in .*images/train"),
    ("seg", "sizes", "images/train/00.png has 48x64 pixels, .*labels/train/00.png has 48x63; .* of one size"),
    ("seg", "colors", r"labels/train/00.png has the shape \(48, 64, 3\).* as a gray or palette PNG"),
    ("seg", "label", r"labels/train/00.png has the label 3, but the 3 classes are numbered from 0 to 2 \(255"),
    ("seg", "negative", "labels/train/00.npy: labels are whole numbers, 0 or more, not int64 from -1"),
    ("seg", "fractions", "labels/train/00.npy: labels are whole numbers, 0 or more, not float64 from 0.5"),
    ("depth", "damaged", "depth/train/00.png cannot be read"),
    ("depth", "photograph damaged", "images/train/00.png cannot be read as an image"),
    ("seg", "no val", "has no part to evaluate with, such as images/val; name one by --val"),
    ("depth", "no train", "has no part to train with, such as images/train"),
    ("seg", "classes", "classes.txt names 0 classes; it must be 1 to 255"),
    ("seg", "ignored", "all pixels of .*VAL.* are labeled 255, which is to be ignored"),
    ("seg", "all ignored", "all pixels of .*TRAIN.* are labeled 255, which is to be ignored"),
    ("depth", "unknown", "no image of .*VAL.* has a pixel with a depth in the range that is evaluated")])
def test_eval_dense_wrong_data_is_named(task, what, text, dense_pairs, dense_vit, desk):
    root = Path(shutil.copytree(dense_pairs, desk / "pairs"))
    spoil(root, what)
    with pytest.raises(ValueError, match=text):
        dense(dense_vit, "--data", root, *TASKS[task], *QUICK, "--batch-size", 14)
    assert [p.name for p in dense_vit.parent.iterdir()] == ["vit.pth"]


@pytest.mark.parametrize("argv, text", [
    (("--task", "depth", "--data", "nowhere"), "no such folder: nowhere"),
    (("--task", "depth", "--data", "."), "none of the known data sets for --task depth, and has no folders images/"),
    (("--task", "seg", "--data", "{depth}"), "has no folders images/ and labels/; see --help"),
    (("--task", "seg", "--decoder", "dpt"), "--decoder dpt is none of --task seg; choose linear or ms"),
    (("--task", "depth", "--data", "{flat}", "--val", "{flat}"), "has pairs of --data .* in it; name others"),
    (("--task", "depth", "--data", "{flat}"), "has no part to evaluate with, such as images/val; name one by --val"),
    (("--task", "seg", "--val", "{other}"), r"other \(VAL\) has other classes than .* \(TRAIN\), or in another order"),
    (("--task", "seg", "--gradient-weight", 1), "are of --task depth"),
    (("--task", "depth", "--scales", 1), "are of --task seg"),
    (("--task", "depth", "--steps", 0), "must be positive"), (("--task", "depth", "--warmup", 2), "is a share, 0 to 1"),
    (("--task", "seg", "--ratios", 2, 1), "the smaller first"),
    (("--task", "depth", "--depth-range", 9, 1), "two positive numbers"),
    (("--task", "seg", "--head", "x", "--lr", 1), "--lr is of training, but the head is there already"),
    (("--task", "depth", "--decoder", "linear4"), "--channels is of --decoder dpt"),
    (("--task", "seg", "--depth-scale", 5), "are of --task depth"),
    (("--task", "depth", "--predictions", "{file}"), "is a file; name a folder"),
    (("--task", "depth", "--out", "none/x"), "--out none/x cannot be written: No such file"),
    (("--task", "depth", "--device", "tpu"), "is no device"),
    (("--task", "depth", "--head", "no.pth"), "no such dense head: no.pth"),
    (("--task", "depth", "--lr", 1e30, "--clip", 0), "predictions for .*03.png are not finite; choose a smaller"),
    (("--task", "seg", "--lr", 1e30, "--steps", 9, "--eval-every", 9), "the loss of step .* is .*; choose a smaller")])
def test_eval_dense_wrong_flags_are_named(argv, text, dense_pairs, dense_vit, desk):
    (desk / "file").touch()
    half = Path(shutil.copytree(dense_pairs, desk / "half"))
    shutil.rmtree(half / "labels")
    for name in ("images", "depth"):
        shutil.copytree(dense_pairs / name / "val", desk / "flat" / name)
    shutil.copytree(dense_pairs, desk / "other")
    (desk / "other/classes.txt").write_text("dark\nbright\nmiddling")
    argv = [str(a).format(other=desk / "other", flat=desk / "flat", depth=half, file=desk / "file") for a in argv]
    with pytest.raises(ValueError, match=text):
        dense(dense_vit, *([] if "--data" in argv else ["--data", dense_pairs]), *(() if "--head" in argv else QUICK),
              *(["--channels", 8] if "linear4" in argv else []), *argv)


def test_eval_dense_wrong_input_is_one_line_and_exit_code_2(dense_pairs, dense_vit, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval_dense.py", str(dense_vit), "--task", "seg", "--data", "nowhere"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(HERE / "eval_dense.py"), run_name="__main__")
    assert end.value.code == 2 and capsys.readouterr().err == "error: no such folder: nowhere\n"


# Recipes


class Coins:
    """Random numbers whose random() is as given; the others, by a seed, are noted."""

    def __init__(self, seed: int, *coins: bool):
        self.coins, self.rest, self.drawn = [0.1 if c else 0.9 for c in coins], random.Random(seed), []

    def random(self) -> float:
        return self.coins.pop(0)

    def uniform(self, low: float, high: float) -> float:
        self.drawn.append((low, high, self.rest.uniform(low, high)))
        return self.drawn[-1][2]

    def randint(self, low: int, high: int) -> int:
        return self.rest.randint(low, high)


@pytest.mark.parametrize("task, steps, warm, start", [("depth", 38400, 12800, 1e-3), ("seg", 40000, 1500, 1e-6)])
def test_eval_dense_schedules(task, steps, warm, start):
    """Those of the configurations: cosine to 1e-8, or a straight line to 0, times a linear warm-up; Adam's first beta
    0.95, 0.85 after three tenths, 0.95."""
    recipe = eval_dense.TRAININGS["nyu" if task == "depth" else "ms"]
    assert recipe.steps == steps and recipe.start == start and recipe.warmup * steps == pytest.approx(warm)
    between = lambda a, b, share: b + (a - b) * (1 + math.cos(math.pi * share)) / 2  # noqa: E731
    bottom = int(0.3 * steps) - 1
    for t in (0, 1, 700, 1499, 1500, 5000, bottom, bottom + 1, 12799, 12800, 20000, steps - 1):
        rate = between(1, 1e-8, t / steps) if task == "depth" else 1 - t / steps
        if t < warm:
            rate *= 1 - (1 - t / warm) * (1 - start)
        beta = between(0.95, 0.85, t / bottom) if t <= bottom else between(
            0.85, 0.95, (t - bottom) / (steps - 1 - bottom))
        assert eval_dense.learning_rate(t, recipe._replace(steps=steps), task) == pytest.approx(rate, rel=1e-9)
        assert eval_dense.first_beta(t, steps, task) == pytest.approx(beta if task == "depth" else 0.9, rel=1e-9)
    for short in (1, 2, 3):  # of a few steps too
        assert all(0 < eval_dense.learning_rate(t, recipe._replace(steps=short), task) <= 1 and
                   0.85 <= eval_dense.first_beta(t, short, task) <= 0.95 for t in range(short))


RECIPE_ROWS = {  # steps, rate, decay, clip, crop; range of depth or short side, windows, stride, scales, ratios, flip
    ("depth", "nyu", "linear4"): (38400, 1e-4, 0.01, 35, (416, 544), (0.001, 10)),
    ("depth", "kitti", "dpt"): (38400, 1e-4, 0.01, 35, (352, 704), (0.001, 80)),
    ("depth", "", "linear"): (38400, 1e-4, 0.01, 35, (416, 500), (0.001, 10)),
    ("seg", "ade20k", "linear"): (40000, 1e-3, 1e-4, 0, (512, 512), (512, 512, 341, (1,), (0.5, 2), False)),
    ("seg", "voc2012", "linear"): (40000, 1e-3, 1e-4, 0, (512, 512), (512, 512, 341, (1,), (0.5, 2), False)),
    ("seg", "", "ms"): (40000, 1e-3, 1e-4, 0, (640, 640), (640, 640, 320, (1, 1.32, 1.73, 2.28, 3), (1, 3), True))}


@pytest.mark.parametrize("task, dataset, decoder", RECIPE_ROWS)
def test_eval_dense_default_recipes(task, dataset, decoder):
    args = eval_dense.parse(["ckpt.pth", "--task", task, "--data", "x", "--decoder", decoder])
    train = types.SimpleNamespace(dataset=dataset, read=lambda i: (None, torch.zeros(600, 1216 if dataset else 500)))
    job = types.SimpleNamespace(args=args, task=task, train=train)
    eval_dense.Job.choose_recipe(job)
    r = job.recipe
    row = (r.steps, r.lr, r.weight_decay, r.clip, r.crop)
    if task == "depth":
        assert RECIPE_ROWS[task, dataset, decoder] == (*row, job.limits) and job.test is None
    else:
        t = job.test
        assert RECIPE_ROWS[task, dataset, decoder] == (*row, (t.short, t.crop, t.stride, t.ratios, job.ratios, t.flip))
    assert args.batch_size == 16 and args.gradient_weight == 0 and args.channels == 256


def test_eval_dense_training_follows_its_recipe(dense_pairs, dense_vit, monkeypatch):
    """Rates and betas that the optimizer gets, norms of gradients, sizes of photographs in training."""
    seen, norms, step, augment = [], [], torch.optim.AdamW.step, eval_dense.augment_labels

    def noted(self, *a):
        seen.extend((g["lr"], *g["betas"], g["weight_decay"]) for g in self.param_groups)
        norms.append(math.sqrt(sum(p.grad.square().sum() for g in self.param_groups for p in g["params"])))
        return step(self, *a)
    monkeypatch.setattr(torch.optim.AdamW, "step", noted)
    flags = (*QUICK, "--steps", 10, "--eval-every", 10, "--batch-size", 2)
    dense(dense_vit, "--data", dense_pairs, "--task", "depth", *flags, "--lr", 0.5, "--weight-decay", 0.25, "--clip",
          1e-3, "--warmup", 0.4)
    recipe = eval_dense.DEPTH._replace(steps=10, warmup=0.4)
    assert seen == [(0.5 * eval_dense.learning_rate(t, recipe, "depth"), eval_dense.first_beta(t, 10, "depth"),
                     0.999, 0.25) for t in range(10)]
    assert max(norms) < 1.001e-3
    sizes = []
    monkeypatch.setattr(eval_dense, "augment_labels", lambda *a, **k: sizes.append(k) or augment(*a, **k))
    for decoder, long in (("linear", 4 * 20), ("ms", 99999999)):
        dense(dense_vit, "--data", dense_pairs, "--task", "seg", "--decoder", decoder, *flags, "--steps", 1,
              "--short", 20)
        assert sizes[-1] == dict(short=20, long=long, ratios=eval_dense.RATIOS[decoder])


def coordinates(height: int, width: int, dtype=torch.uint16) -> torch.Tensor:
    """A photograph whose first two channels are column and row, times 64."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return (64 * torch.stack([columns, rows, columns])).to(dtype)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("dataset, size, crop", [("", (60, 90), (40, 50)), ("nyu", (480, 640), (416, 544)),
                                                 ("", (60, 90), (65, 90))])
def test_eval_dense_photograph_and_depth_stay_together(turned, mirrored, dataset, size, crop):
    photo = coordinates(*size)
    depth = (photo[0].float() + 1000 * photo[1].float()) / 64 + 1e6  # 0 is what comes from outside
    x, d = eval_dense.augment_depth(Coins(3, turned, mirrored, False), photo, depth, crop, dataset)
    assert x.shape == (3, *map(min, crop, size)) and d.shape == x.shape[1:]
    known = d > 0
    columns, rows = (d - 1e6) % 1000, ((d - 1e6) / 1000).floor()
    far = [(x[i] * 65535 / 64 - place).abs()[known] for i, place in enumerate((columns, rows))]
    if not turned:
        assert known.all() and max(f.max() for f in far) < 0.01
        assert (columns.diff(dim=1) == (-1 if mirrored else 1)).all() and (rows.diff(dim=0) == 1).all()
    else:
        assert known.float().mean() > 0.9 and (rows.diff(dim=1) != 0).any()
        assert all(f.quantile(0.97) < 0.75 for f in far)  # but for the rim, where photographs fade to 0
        angle = math.degrees(math.atan((rows[:, -9] - rows[:, 9]).median() / (columns[:, -9] - columns[:, 9]).median()))
        assert 0.2 < abs(angle) < 2.6
    if dataset == "nyu":  # the white frame is cut off
        assert columns[known].min() >= 43 and columns.max() < 608 and rows[known].min() >= 45 and rows.max() < 472


def test_eval_dense_colors_of_depth_photographs():
    """The power of values up to 255, then factors for all and for each channel; of KITTI narrower ones."""
    image = torch.from_numpy(noise(0, 3, 5, 7))
    for dataset, spread in (("nyu", 0.25), ("kitti", 0.1), ("", 0.25)):
        big = torch.nn.functional.pad(image, (43, 32, 45, 8)) if dataset == "nyu" else image
        rng = Coins(5, False, False, True)
        x, _ = eval_dense.augment_depth(rng, big, torch.ones(big.shape[1:]), (5, 7), dataset)
        ranges = [draw[:2] for draw in rng.drawn]
        assert ranges == [(0.9, 1.1), (1 - spread, 1 + spread)] + [(0.9, 1.1)] * 3
        gamma, bright, *shades = (draw[2] for draw in rng.drawn)
        expected = image.numpy().astype(np.float64) ** gamma * bright * np.reshape(shades, (3, 1, 1))
        if dataset != "nyu":
            assert_close(x, expected.clip(0, 255) / 255, 1e-5)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_eval_dense_photograph_and_labels_stay_together(mirrored, seed):
    photo, sizes = coordinates(100, 160), []
    for channel in (0, 1):  # column and row
        rng = Coins(seed, mirrored, *[False] * 5)
        labels = (photo[channel].int() // 64).to(torch.uint8)
        x, y = eval_dense.augment_labels(rng, photo, labels, (90, 90), 100, 400, (0.7, 2.0))
        assert rng.drawn[0][:2] == (0.7, 2.0) and not rng.coins
        ratio = rng.drawn[0][2]
        assert x.shape[1:] == y.shape == (min(90, int(int(100 * ratio) + 0.5)), min(90, y.shape[1]))
        assert (x[channel] * 65535 / 64 - y.float()).abs().max() < 0.5 + 1 / ratio
        slope = y.float().diff(dim=1 - channel).mean().item()
        assert slope == pytest.approx((-1 if mirrored and channel == 0 else 1) / ratio, rel=0.1)
        sizes.append(x.shape)
    assert sizes[0] == sizes[1]


def test_eval_dense_sizes_of_training_photographs():
    """Both limits times the ratio, the short side as mmcv rounds it."""
    for size, short, long, ratio, expected in (
            ((100, 160), 64, 256, 1.0, (64, 102)), ((20, 100), 64, 256, 1.0, (51, 256)),
            ((20, 100), 64, 256, 0.5, (26, 128)), ((48, 64), 32, 999, 2.0, (64, 85))):
        x, y = eval_dense.augment_labels(random.Random(0), torch.zeros(3, *size, dtype=torch.uint8),
                                         torch.zeros(size, dtype=torch.uint8), (999, 999), short, long, (ratio, ratio))
        assert x.shape == (3, *expected) and y.shape == expected


def test_eval_dense_crops_of_one_class_are_drawn_again():
    """What is ignored does not count; with no better place the tenth is taken."""
    labels = torch.zeros(64, 64, dtype=torch.uint8)
    labels[:, 32:] = 1
    labels[::2] = 255  # half of every crop
    image, shares = torch.zeros(3, 64, 64, dtype=torch.uint8), []
    for seed in range(100):
        _, y = eval_dense.augment_labels(random.Random(seed), image, labels, (32, 32), 64, 64, (1, 1))
        counts = y[y != 255].long().bincount(minlength=2)
        shares.append((counts.max() / counts.sum()).item())
    assert sum(s >= 0.75 for s in shares) <= 5 and max(shares) > 0.7  # 55 would be, of first draws
    for y in (torch.zeros_like(labels), torch.full_like(labels, 255)):
        cropped = eval_dense.augment_labels(random.Random(0), image, y, (32, 32), 64, 64, (1, 1))[1]
        assert torch.equal(cropped, y[:32, :32])


def slow_distortion(pixel, shift, gain, saturation, turn, first: bool) -> list[float]:
    import colorsys
    cut = lambda v: min(max(v, 0.0), 1.0)  # noqa: E731
    pixel = [cut(v + shift) for v in pixel]
    if first:
        pixel = [cut(v * gain) for v in pixel]
    h, s, v = colorsys.rgb_to_hsv(*pixel)
    pixel = colorsys.hsv_to_rgb((h + turn) % 1, min(s * saturation, 1), v)
    return list(pixel) if first else [cut(v * gain) for v in pixel]


@pytest.mark.parametrize("coins", [(1, 1, 1, 1, 1), (1, 0, 1, 1, 1), (0, 1, 1, 0, 0), (0, 0, 0, 1, 0), (0, 0, 0, 0, 1),
                                   (1, 0, 0, 0, 0), (0, 0, 0, 0, 0)])
def test_eval_dense_distortion_equals_slow_one(coins):
    """Also of gray pixels, black ones, and those with two equal channels."""
    brightness, first, contrast, saturation, hue = coins
    pixels = torch.cat([torch.rand(60, 3, generator=torch.Generator().manual_seed(0)), torch.eye(3), torch.zeros(1, 3),
                        torch.full((2, 3), 0.4), torch.tensor([[0.2, 0.7, 0.7], [1, 0.5, 1]])])
    for seed in range(3):
        rng = Coins(seed, *coins)
        out = eval_dense.distort(rng, pixels.T[..., None].clone())
        drawn = dict(zip([name for name, on in zip(("shift", "gain", "saturation", "turn"), (
            brightness, contrast, saturation, hue)) if on], rng.drawn))
        for name, low, high in (("shift", -32 / 255, 32 / 255), ("gain", 0.5, 1.5), ("saturation", 0.5, 1.5),
                                ("turn", -18 / 180, 18 / 180)):
            assert name not in drawn or drawn[name][:2] == pytest.approx((low, high))
        values = {k: drawn[k][2] if k in drawn else off for k, off in (
            ("shift", 0), ("gain", 1), ("saturation", 1), ("turn", 0))}
        expected = torch.tensor([slow_distortion(p, **values, first=bool(first)) for p in pixels.tolist()])
        assert_close(out[..., 0].T, expected, 1e-5)
    gray = eval_dense.distort(Coins(0, 1, 1, 1, 1, 1), torch.rand(1, 4, 4))
    assert gray.shape == (1, 4, 4) and 0 <= gray.min() and gray.max() <= 1


def test_eval_dense_samples_go_by_their_number(dense_pairs, cache):
    """Whatever the step, the size of the batch and the number of processes; what a crop lacks is 0 in the photograph,
    unknown in the target. Of every pass each photograph comes once."""
    for task, augment, absent in (("depth", eval_dense.augment_depth, 0), (
            "seg", partial(eval_dense.augment_labels, short=40, long=99, ratios=(1, 1)), 255)):
        pairs = eval_dense.open_pairs(str(dense_pairs), task, "TRAIN")
        make = partial(eval_dense.TrainPairs, pairs, augment, (60, 70), 7, seed=0, mean=data.MEAN, std=data.STD)
        four, two = make(batch_size=4), make(batch_size=2)
        images, targets, error = four[1]
        assert images.shape == (4, 3, 60, 70) and targets.shape == (4, 60, 70) and error == ""
        later, earlier = two[3], two[2]
        assert all(torch.equal(x, torch.cat([a, b])) for x, a, b in zip((images, targets), earlier, later))
        assert not torch.equal(make(batch_size=4, seed=1)[1][0], images)
        height, width = (48, 64) if task == "depth" else (40, 53)
        for part, value in ((images, 0), (targets, absent)):
            assert (part[..., height:, :] == value).all() and (part[..., width:] == value).all()
        assert sorted(pairs.pick(s, 0) for s in range(14)) == list(range(14))


# Training


TRAINED_HEADS = {  # flags; part of a constant's, or the commonest class's, errors that is left at most
    "depth linear": ("--task", "depth", "--steps", 130, "--lr", 0.03, "--batch-size", 2, "--crop", 32, 32),
    "depth dpt": ("--task", "depth", "--decoder", "dpt", "--channels", 8, "--steps", 70, "--lr", 0.01,
                  "--batch-size", 2, "--crop", 16, 24),
    "seg linear": ("--task", "seg", "--steps", 50, "--lr", 0.05, "--batch-size", 4, "--short", 48, "--crop", 48, 48),
    "seg ms": ("--task", "seg", "--decoder", "ms", "--steps", 50, "--lr", 0.05, "--batch-size", 4, "--short", 48,
               "--crop", 48, 48, "--scales", 1, 1.5)}


@pytest.mark.parametrize("kind", TRAINED_HEADS)
def test_eval_dense_training_learns(kind, dense_pairs, dense_vit, monkeypatch):
    """Depth and classes of pieces of photographs that are not trained with, from a network with random weights; against
    what can be said without looking."""
    if kind == "depth dpt":  # which is slow: without the 100 steps that only learn the mean
        monkeypatch.setattr(eval_dense, "sig_loss", lambda *a, warm_up: heads.sig_loss(*a))
    result = dense(dense_vit, "--data", dense_pairs, "--num-workers", 0, *TRAINED_HEADS[kind], "--eval-every", 70)
    task = kind.split()[0]
    folder = dense_pairs / ("depth" if task == "depth" else "labels") / "val"
    targets = [pixels_of(p) for p in sorted(folder.iterdir())]
    if task == "depth":
        middle = np.mean([t.mean() for t in targets]) / 1000
        constant = dict(depth=middle, rmse=np.mean([np.sqrt(np.mean((t / 1000 - middle) ** 2)) for t in targets]))
        assert result["constant_everywhere"] == pytest.approx(constant, rel=1e-6)
        assert result["rmse"] < 0.7 * constant["rmse"] and result["abs_rel"] == min(v for _, v in result["curve"])
    else:
        most = 100 * np.bincount(np.concatenate(targets).ravel(), minlength=3).max() / sum(t.size for t in targets)
        assert result["commonest_class_everywhere"] == pytest.approx(dict(aAcc=most, mIoU=most / 3))
        assert result["aAcc"] > 80 > most + 20 and result["mIoU"] > 60 and result["mIoU"] == result["curve"][-1][1]


def test_eval_dense_batches_are_means_over_pairs(dense_pairs, dense_vit, monkeypatch):
    """The gradient of four photographs is the mean of those of two and two, each with a loss of its own."""
    seen, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: seen.append(
        torch.cat([p.grad.flatten() for g in self.param_groups for p in g["params"]])) or step(self))
    flags = [dense_vit, "--data", dense_pairs, *QUICK, *TASKS["depth"], "--lr", 1e-30, "--clip", 0, "--eval-every", 9]
    result = dense(*flags, "--steps", 1, "--batch-size", 4)
    dense(*flags, "--steps", 2, "--batch-size", 2)
    assert_close(seen[0], (seen[1] + seen[2]) / 2, 1e-6)
    assert seen[1].abs().max() > 1e-3 < (seen[1] - seen[2]).abs().max() and result["curve"][0][0] == 1


def test_eval_dense_batch_statistics_equal_those_of_pytorch():
    """Of groups together, as in training mode on all at once; outside of it the running ones count."""
    torch.manual_seed(0)
    ours, theirs = torch.nn.BatchNorm2d(6).eval(), torch.nn.BatchNorm2d(6).train()
    for _ in range(3):
        groups = [[(3 + 2 * torch.randn(2, 4, 5, 7), None), (torch.randn(2, 2, 5, 7), None)] for _ in range(3)]
        whole = [torch.cat([patches for patches, _ in group], 1) for group in groups]
        finish = eval_dense.batch_statistics(ours, groups)
        with torch.no_grad():
            assert_close(torch.cat([ours(x) for x in whole]), theirs(torch.cat(whole)), 1e-5)
        finish()
        for name, value in theirs.state_dict().items():
            assert_close(ours.state_dict()[name], value, 1e-5, name)


def remember_listings_at(folder: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(folder)


def head_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.mark.parametrize("kind", ["depth linear", "seg ms"])
def test_eval_dense_two_processes_and_resuming_equal_one(kind, dense_pairs, dense_vit, cache, monkeypatch, capsys):
    """One process, two, and one that is interrupted after a save: the same head, the same measures."""
    task, decoder = kind.split()
    flags = [*QUICK, "--task", task, "--decoder", decoder, "--data", dense_pairs, "--lr", 0.01, "--warmup", 0.25,
             *(["--short", 32, "--scales", 1] if task == "seg" else [])]
    file, folder = f"vit.{task}_{decoder}_head.pth", dense_vit.parent
    alone = dense(dense_vit, *flags)
    (head,) = [head_of(folder / file)]
    shutil.copytree(folder, folder.parent / "two")
    Launched(folder.parent / "log", eval_dense.main, folder.parent / "two/vit.pth", *flags, world=2,
             before=partial(remember_listings_at, cache)).wait()
    one, two = results(folder.parent / "two/vit", "dense")
    other = head_of(folder.parent / "two" / file)
    assert one["processes"] == 1 and two["processes"] == 2 and one["result"] == json.loads(json.dumps(alone))
    for key, value in head.items():
        assert_close(other[key].double(), value.double(), 2e-5 * max(1, value.abs().max().item()), key)
    for key in ("rmse", "abs_rel") if task == "depth" else ("mIoU", "aAcc"):
        assert two["result"][key] == pytest.approx(alone[key], rel=1e-3), key
    assert two["result"]["curve"][0] == [2, pytest.approx(alone["curve"][0][1], rel=1e-3)]
    if task == "seg":
        assert head["decode_head.bn.num_batches_tracked"] == 4

    evaluate, calls = eval_dense.evaluate, []

    def interrupted(job, predictions=""):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return evaluate(job, predictions)
    monkeypatch.setattr(eval_dense, "evaluate", interrupted)
    start = dense_vit.rename(folder.parent / "again.pth")
    with pytest.raises(KeyboardInterrupt):
        dense(start, *flags)
    assert len(list(folder.parent.glob("*.resume"))) == 1
    again = dense(start, *flags)
    assert "goes on after step 2 of 4" in capsys.readouterr().err and len(calls) == 3
    assert {k: v for k, v in again.items() if k != "head"} == {k: v for k, v in alone.items() if k != "head"}
    assert same(head, head_of(folder.parent / file.replace("vit", "again")))
    assert not list(folder.parent.rglob("*.resume"))


def test_eval_dense_resumes_only_what_is_its_own(dense_pairs, dense_vit, monkeypatch, capsys):
    """Other flags start anew; a save that is damaged is named; --no-resume does without."""
    evaluate = eval_dense.evaluate
    saves = lambda: sorted(dense_vit.parent.glob("*.resume"))  # noqa: E731

    def interrupted(job):
        if len(saves()) > n_before and not job.args.no_resume:
            raise KeyboardInterrupt
        return evaluate(job)
    monkeypatch.setattr(eval_dense, "evaluate", interrupted)
    flags = [dense_vit, *QUICK, *TASKS["depth"], "--data", dense_pairs]
    for n_before, argv in enumerate(([], ["--lr", 0.5], ["--seed", 1], ["--no-flip"], ["--eval-crop", "garg"],
                                     ["--depth-range", 1, 7])):
        with pytest.raises(KeyboardInterrupt):
            dense(*flags, *argv)
        assert "goes on" not in capsys.readouterr().err and len(saves()) == n_before + 1, argv
    first, *others = sorted(saves(), key=lambda path: path.stat().st_mtime_ns)
    for path in others:
        path.unlink()
    n_before = 0
    with pytest.raises(KeyboardInterrupt):
        dense(*flags)
    assert "goes on after step 2" in capsys.readouterr().err and saves() == [first]
    good = saves()[0].read_bytes()
    for damaged in (good[: len(good) // 2], b"", b"x" * 99):
        saves()[0].write_bytes(damaged)
        with pytest.raises(ValueError, match=r"\.resume is damaged; remove it, and the training starts anew"):
            dense(*flags)
    for state in (dict(head={}), [1, 2], dict(head=None, optimizer=None)):
        torch.save(state, saves()[0])
        with pytest.raises(ValueError, match=r"\.resume is damaged; remove it, and the training starts anew"):
            dense(*flags)
    dense(*flags, "--no-resume")
    assert not saves()


def test_eval_dense_best_head_survives_an_interruption(dense_pairs, dense_vit, monkeypatch):
    """In depth the best so far is kept, though the later ones are worse."""
    evaluate, errors = eval_dense.evaluate, [-1, None, 5]

    def scripted(job):
        if (error := errors.pop(0)) is None:
            raise KeyboardInterrupt
        return evaluate(job) | dict(abs_rel=error)
    monkeypatch.setattr(eval_dense, "evaluate", scripted)
    flags = [dense_vit, *QUICK, *TASKS["depth"], "--data", dense_pairs]
    with pytest.raises(KeyboardInterrupt):
        dense(*flags)
    (save,) = dense_vit.parent.glob("*.resume")
    best = {f"decode_head.{k}": v for k, v in torch.load(save, weights_only=True)["weights"].items()}
    result = dense(*flags)
    assert result["abs_rel"] == -1 and result["curve"] == [(2, -1), (4, 5)]
    assert same(best, head_of(Path(result["head"])))


# The head, and what else comes out


def observed_predictions(network, about, pairs, flip=True):
    """Of each image of --val: what the network of the hub predicts, and the target."""
    for i in range(len(pairs)):
        image, target = pairs.read(i)
        if about.task == "seg":
            yield heads.segment(network, image, about.recipe).argmax(0).numpy(), target.numpy()
        else:
            x = data.normalize(data.to_float(image[None]))
            yield heads.estimate_depth(network, x, flip)[0, 0].numpy(), target.numpy()


@pytest.mark.parametrize("kind", ["depth linear", "depth dpt", "seg linear"])
def test_eval_dense_head_is_one_of_the_hub(kind, dense_pairs, dense_vit, desk, capsys):
    """What is written gives by the hub the predictions that were counted, and the same figures by --head."""
    task, decoder = kind.split()
    own = [*(["--channels", 8] if decoder == "dpt" else []), *(["--depth-range", 1.5, 4] if task == "depth" else
                                                                ["--short", 32, "--crop", 24, 24, "--flip"])]
    result = dense(dense_vit, *QUICK, "--task", task, "--decoder", decoder, "--data", dense_pairs, "--lr", 0.02, *own,
                   "--predictions", desk / "drawn")
    printed = capsys.readouterr().out
    file = dense_vit.with_name(f"vit.{task}_{decoder}_head.pth")
    assert result["head"] == str(file) and str(file) in printed and "vit.eval_dense.jsonl" in printed
    assert sorted(p.name for p in dense_vit.parent.iterdir()) == sorted(["vit.pth", "vit.eval_dense.jsonl", file.name])
    network, about = hub.load_dense(dense_vit, file)
    pairs = eval_dense.open_pairs(str(dense_pairs), task, "VAL")
    pairs.classes = pairs.classes or ["x"]
    seen = list(observed_predictions(network, about, pairs))
    drawn = [pixels_of(desk / "drawn" / f"{Path(pairs.describe(i)).stem}.png") for i in range(len(pairs))]
    assert len(list((desk / "drawn").iterdir())) == len(pairs) + 1 and size_of(desk / "drawn/sheet.png")[0] > 400
    if task == "depth":
        assert network.decode_head.depth_range == (1.5, 4) and about == hub.About("depth")
        known = [(t > 1.5) & (t < 4) for _, t in seen]
        assert all(0 < k.sum() < k.size for k in known)
        expected = [plain_depth(p[k], t[k]) for (p, t), k in zip(seen, known)]
        for name in eval_dense.DEPTH_MEASURES:
            assert result[name] == pytest.approx(np.mean([e[name] for e in expected]), rel=1e-4, abs=1e-5), name
        assert all(abs(d - 1000 * p).max() < 0.6 for d, (p, _) in zip(drawn, seen))
        assert Image.open(desk / "drawn/03.png").mode.startswith("I")
    else:
        assert about.classes == ["dark", "middling", "bright"] and about.colors == heads.colors(3)
        assert about.recipe == heads.Recipe(32, crop=24, stride=16, flip=True)
        right = sum((p == t).sum() for p, t in seen)
        assert result["aAcc"] == pytest.approx(100 * right / sum(t.size for _, t in seen))
        assert all((d == p).all() for d, (p, _) in zip(drawn, seen)) and Image.open(desk / "drawn/03.png").mode == "P"
    again = dense(dense_vit, "--task", task, "--data", dense_pairs, "--head", file, "--num-workers", 0, "--json")
    assert {k: result[k] for k in again} == again
    record = results(dense_vit.with_suffix(""), "dense")[-1]
    assert json.loads(capsys.readouterr().out) == record and record["protocol"]["head"] == str(file)
    assert record["data"]["val"]["images"] == 4 and "train" not in record["data"] and record["result"] == again


def test_eval_dense_heads_that_do_not_fit(dense_pairs, dense_vit, desk):
    flags = ["--data", dense_pairs, "--num-workers", 0]
    dense(dense_vit, *QUICK, *TASKS["seg"], *flags)
    file = dense_vit.with_name("vit.seg_linear_head.pth")
    torch.save(model.build("vit_nano", patch_size=8, img_size=32).state_dict(), desk / "other.pth")
    torch.save(model.build("vit_micro", patch_size=8, img_size=32).state_dict(), desk / "wide.pth")
    put(desk / "ade/images/validation/a.png", noise(0, 9, 9, 3))
    put(desk / "ade/annotations/validation/a.png", noise(0, 9, 9, high=9))
    shutil.copytree(dense_pairs, desk / "four")
    (desk / "four/classes.txt").write_text("a\nb\nc\nd")
    broken = torch.load(file, weights_only=True)
    broken["state_dict"]["decode_head.conv_seg.weight"].fill_(math.nan)
    torch.save(broken, desk / "nan.pth")
    for argv, text in (
            ((desk / "other.pth", "--task", "seg"), "trained on the features of another backbone, of the same width"),
            ((desk / "wide.pth", "--task", "seg"), "is the head of another backbone: it takes 64 channels, this one"),
            ((dense_vit, "--task", "depth"), "vit.seg_linear_head.pth is for --task seg"),
            ((dense_vit, "--task", "seg", "--data", desk / "ade"), "knows the classes of other data, not those of"),
            ((dense_vit, "--task", "seg", "--data", desk / "four"), ".*four.* has other classes than"),
            ((dense_vit, "--task", "seg", "--head", desk / "nan.pth"), "predictions for .*03.png are not finite")):
        with pytest.raises(ValueError, match=text):
            dense(argv[0], *flags, "--head", file, *argv[1:])


def test_eval_dense_on_known_data_sets(dense_vit, desk):
    """NYUv2, of which an image without a pixel that counts is left out, and ADE20K, in miniature."""
    torch.save(model.build("vit_nano", patch_size=40, img_size=80).state_dict(), dense_vit)
    for i, part in enumerate(("train", "train", "test", "test")):
        put(desk / f"nyu/{i}.jpg", noise(i, 480, 640, 3))
        depth = noise(i, 480, 640, high=9000, dtype=np.uint16)
        depth[45:471, 41:601] *= i < 3  # of the last one, all that is known is outside of the crop
        put(desk / f"nyu/{i}.png", depth)
        with open(desk / f"nyu/nyu_{part}.txt", "a") as file:
            file.write(f"/{i}.jpg /{i}.png 518.8\n")
    quick = ["--num-workers", 0, "--steps", 1, "--batch-size", 2]
    result = dense(dense_vit, "--task", "depth", "--data", desk / "nyu", *quick, "--crop", 32, 48)
    record = results(dense_vit.with_suffix(""), "dense")[-1]
    assert result["images_left_out"] == 1 and record["protocol"]["eval_crop"] == "nyu"
    assert record["protocol"]["flip"] is True and record["protocol"]["crop"] == [32, 48]
    known = pixels_of(desk / "nyu/2.png")[45:471, 41:601] / 1000
    assert result["constant_everywhere"]["depth"] == pytest.approx(known[known > 0.001].mean(), rel=1e-5)
    assert hub.load_dense(dense_vit, result["head"])[1] == hub.About("depth", "nyu")
    for part in ("training", "validation"):
        put(desk / f"ade/images/{part}/a.jpg", noise(1, 40, 50, 3))
        put(desk / f"ade/annotations/{part}/a.png", noise(2, 40, 50, high=4))
    result = dense(dense_vit, "--task", "seg", "--data", desk / "ade", *quick, "--short", 32, "--crop", 32, 32)
    share = np.bincount(noise(2, 40, 50, high=4).ravel())[1:]
    trivial = result["commonest_class_everywhere"]
    assert trivial["aAcc"] == pytest.approx(100 * share.max() / share.sum()) and len(result["IoU"]) == 150
    about = hub.load_dense(dense_vit, result["head"])[1]
    assert about.dataset == "ade20k" and about.classes == heads.CLASSES["ade20k"] and about.recipe.stride == 21
    assert about.colors == heads.colors(150, "ade20k")


# Flags


FLAGS = {  # what each is changed to, and in which of the bases below
    "task": ("depth", "seg"), "data": ("depth", "{other}"), "val": ("depth", "{other}"),
    "decoder": ("depth", "linear4"),
    "head": ("head", "{second}"), "channels": ("dpt", 4), "depth-range": ("head", 0.5, 3),
    "depth-scale": ("depth", 500), "steps": ("depth", 3), "batch-size": ("seg", 4), "lr": ("seg", 0.001),
    "weight-decay": ("seg", 0.9), "warmup": ("seg", 0.9), "clip": ("depth", 1e-4), "crop": ("seg", 24, 32),
    "short": ("seg", 40), "ratios": ("seg", 1, 1.1), "gradient-weight": ("depth", 1), "scales": ("seg", 1, 2),
    "flip": ("seg",), "no-flip": ("depth",), "eval-crop": ("depth", "garg"), "eval-every": ("depth", 1),
    "predictions": ("head", "{desk}/drawn"), "seed": ("depth", 1), "device": ("depth", "tpu"),
    "dtype": ("depth", "bf16"), "num-workers": ("depth", 1), "out": ("head", "{desk}/elsewhere"), "json": ("head",)}
ELSEWHERE_DENSE = {"no-resume"}  # a test of its own
DENSE_BASE = {
    "depth": ("--task", "depth", "--lr", 0.01, "--crop", 24, 32),
    "dpt": ("--task", "depth", "--decoder", "dpt", "--channels", 8, "--crop", 24, 32),
    "seg": ("--task", "seg", "--lr", 0.1, "--short", 32, "--crop", 32, 32),
    "head": ("--task", "depth", "--head", "{first}")}


def test_eval_dense_every_flag_has_an_effect(dense_pairs, dense_vit, desk, capsys):
    """On the figures, the head, the files or what is printed; only the number of reading processes has none."""
    flags = re.findall(r'add\("--([a-z-]+)"', (HERE / "eval_dense.py").read_text())
    assert set(flags) | {"no-flip"} == FLAGS.keys() | ELSEWHERE_DENSE
    for what, part in itertools.product(("images", "depth"), ("train", "val")):
        for name in ("01.png", "03.png") if part == "val" else ("02.png", "04.png"):
            home = "val" if name == "03.png" else "train"
            (desk / "few" / what / part).mkdir(parents=True, exist_ok=True)
            shutil.copy(dense_pairs / what / home / name, desk / "few" / what / part)
            put(desk / "other" / what / part / name, pixels_of(dense_pairs / what / home / name)[::-1].astype(
                np.uint8 if what == "images" else np.uint16))
    for part, names in (("train", ("02", "04")), ("val", ("01", "03"))):
        for name in names:
            put(desk / f"few/labels/{part}/{name}.png", noise(int(name), 48, 64, high=3) // 2 * 2)
    names = dict(desk=desk, other=desk / "other", first=desk / "first.pth", second=desk / "second.pth")
    for name, seed in (("first", 1), ("second", 2)):
        torch.manual_seed(seed)
        weights = {f"decode_head.{k}": v for k, v in heads.LinearDepthHead(64, 1).state_dict().items()}
        torch.save(dict(state_dict=weights, about=dict(task="depth", dim=64, depth_range=(0.001, 10))), names[name])

    def outcome(base: str, *argv):
        common = (dense_vit, "--data", desk / "few", "--num-workers", 0, "--device", "cpu",
                  *(() if base == "head" else ("--steps", 2, "--batch-size", 2, "--eval-every", 2)))
        try:
            result = dense(*(str(a).format(**names) for a in (*common, *DENSE_BASE[base], *argv)))
        except ValueError as error:
            return str(error)
        file = result.pop("head", None)
        weights = {k: v.double().sum().item() for k, v in head_of(Path(file)).items()} if file else {}
        found = sorted(p.name for p in desk.iterdir())
        shutil.rmtree(desk / "drawn", ignore_errors=True)
        return result, weights, found, re.sub(r"\d+\.\d+", "", capsys.readouterr().out).count("\n")
    before = {base: outcome(base) for base in DENSE_BASE}
    assert all(isinstance(v, tuple) for v in before.values()), before
    for flag, (base, *values) in FLAGS.items():
        after = outcome(base, f"--{flag}", *values)
        assert (after != before[base]) == (flag != "num-workers"), flag
        assert isinstance(after, tuple) or flag in ("device", "task"), (flag, after)


# Other photographs, networks and numbers


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("task", ["depth", "seg"])
def test_eval_dense_deep_gray_photographs_in_bf16(task, channels, dense_pairs, desk):
    """Of 16 bits, for networks of one and three channels; the same gray in 8 bits gives nearly the same."""
    torch.manual_seed(0)
    torch.save(model.build("vit_nano", patch_size=8, img_size=32, in_chans=channels).state_dict(), desk / "vit.pth")
    what, rmses = "depth" if task == "depth" else "labels", []
    for bits, factor, dtype in ((16, 257, np.uint16), (8, 1, np.uint8)):
        for part in ("train", "val"):
            for path in sorted((dense_pairs / "images" / part).iterdir()):
                put(desk / str(bits) / "images" / part / path.name, (factor * pixels_of(path)[..., 1]).astype(dtype))
        shutil.copytree(dense_pairs / what, desk / str(bits) / what)
        result = dense(desk / "vit.pth", *QUICK, "--steps", 2, "--dtype", "bf16", *TASKS[task],
                       "--data", desk / str(bits))
        rmses.append(result["rmse" if task == "depth" else "aAcc"])
    assert rmses[0] == pytest.approx(rmses[1], rel=0.02)


def test_eval_dense_of_a_network_that_holds_its_head(desk, monkeypatch):
    """Mask2Former, with a small network in its place: the figures are those of heads.segment."""
    monkeypatch.setattr(hub, "Mask2Former", type("Small", (mask2former.Mask2Former,), dict(
        __init__=lambda self: mask2former.Mask2Former.__init__(self, **M2F_TINY | dict(n_classes=150)))))
    small = fill_by_names(hub.Mask2Former())
    torch.save(dict(state_dict=small.state_dict()), desk / "m2f.pth")
    photo, labels = noise(1, 40, 50, 3), noise(2, 40, 50, high=151)
    put(desk / "ade/images/validation/a.png", photo), put(desk / "ade/annotations/validation/a.png", labels)
    result = dense(desk / "m2f.pth", "--task", "seg", "--data", desk / "ade", "--short", 32, "--num-workers", 0)
    recipe = heads.RECIPES["ade20k", "m2f"]._replace(short=32)
    answers = heads.segment(small, torch.from_numpy(photo).permute(2, 0, 1), recipe).argmax(0).numpy()
    assert result["aAcc"] == pytest.approx(100 * (answers == labels - 1.0)[labels > 0].mean())
    with pytest.raises(ValueError, match="m2f.pth is for --task seg"):
        dense(desk / "m2f.pth", "--task", "depth", "--data", desk / "ade")


# What lies beside


def test_eval_dense_folders_that_mislead(dense_pairs, dense_vit, desk):
    """Two photographs of one name, predictions into the data, files that only other programs can read."""
    shutil.copytree(dense_pairs, "mine")
    first = next(Path("mine/images/train").iterdir())
    Image.open(first).save(first.with_suffix(".bmp"))
    with pytest.raises(ValueError, match="have one name but for the suffix"):
        dense(dense_vit, *QUICK, *TASKS["seg"], "--data", "mine")
    first.with_suffix(".bmp").unlink()
    before = {p: p.read_bytes() for p in Path("mine").rglob("*.png")}
    for folder in ("mine/labels/val", "mine/images/val"):
        with pytest.raises(ValueError, match=f"--predictions {folder} would overwrite {folder}/.*png, one of the data"):
            dense(dense_vit, *QUICK, *TASKS["seg"], "--data", "mine", "--predictions", folder)
    assert {p: p.read_bytes() for p in Path("mine").rglob("*.png")} == before
    (desk / "mine/annotations").mkdir()  # of something else than ADE20K
    assert eval_dense.open_pairs("mine", "seg", "TRAIN").dataset == ""
    Path("eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ValueError, match="eps.png cannot be read"):
        eval_dense.read_numbers("eps.png")
    Image.fromarray(np.full((9, 9), 100, np.uint8)).save("flat.png")
    with pytest.raises(ValueError, match="flat.png has 8 bits, too few for depth"):
        eval_dense.read_depth("flat.png", 1000)
    np.save("mm.npy", np.full((9, 9), 3000, np.uint16))
    assert (eval_dense.read_depth("mm.npy", 1000) == 3).all()
    with pytest.raises(ValueError, match="--predictions eps.png/x cannot be made in .*eps.png"):
        dense(dense_vit, *QUICK, *TASKS["seg"], "--data", "mine", "--predictions", "eps.png/x", "--out", "new.jsonl")
    assert not Path("new.jsonl").exists()  # a command that is refused leaves no empty file of results
    os.mkdir(dense_vit.with_name(f"{dense_vit.stem}.depth_linear_head.pth"))
    with pytest.raises(ValueError, match="depth_linear_head.pth cannot be written"):
        dense(dense_vit, *QUICK, *TASKS["depth"], "--data", "mine")


def test_eval_dense_frame_of_nyu_comes_off_before_scaling():
    size = eval_dense.train_size((480, 640), "nyu", 240)
    assert size == (214, 282) and eval_dense.train_size((480, 640)) == (480, 640)
    assert eval_dense.train_size((480, 640), "kitti", 120) == (120, 160)
    x, depth = eval_dense.augment_depth(random.Random(0), torch.zeros(3, 480, 640, dtype=torch.uint8),
                                        torch.ones(480, 640), (999, 999), "nyu", 240)
    assert x.shape[-2:] == depth.shape == size


def test_dense_heads_of_wider_backbones_are_told_by_their_names(tmp_path):
    """Four blocks of a network are as wide as one of a network four times as wide."""
    vit = model.build("vit_nano", embed_dim=256, num_heads=4, patch_size=8, img_size=16)
    for head, name in ((heads.SegmentationHead(64, 150, 4), "ade20k_ms"), (heads.LinearDepthHead(64, 4), "nyu_linear4")):
        with pytest.raises(ValueError, match="is the head of another backbone"):
            hub.put_dense_head(vit, as_released(head, tmp_path / f"dinov2_vits14_{name}_head.pth"))
    odd = as_released(heads.SegmentationHead(256, 151), tmp_path / "dinov2_vits14_ade20k_linear_head.pth")
    about = hub.put_dense_head(vit, odd)[1]
    assert about.dataset == "" and len(about.classes) == len(set(about.colors)) == 151


def test_dense_odd_files_are_no_heads(tmp_path, capsys):
    for content in (dict(state_dict=None), dict(about=3), dict(state_dict=[1]), {}):
        torch.save(content, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match="odd.pth holds no"):
            hub.read_dense_head(tmp_path / "odd.pth", hub_vit())
        with pytest.raises(ValueError, match="odd.pth holds no"):
            hub.main(["info", str(tmp_path / "odd.pth")])


@torch.no_grad()
def test_heads_of_extreme_photographs():
    network = heads.Dense(ToyBackbone(), fill_by_names(heads.SegmentationHead(3, 5, 4), "decode_head."))
    assert heads.scaled_size(2, 20000, 2048, 512) == (1, 2048)
    wide = torch.zeros(3, 2, 2000, dtype=torch.uint8)
    assert heads.segment(network, wide, heads.Recipe(20, 100, 20, 15)).shape == (5, 2, 2000)
    images = torch.zeros(1, 3, 30, 30)
    assert network.whole_inference(images, rescale=False).shape == (1, 5, 3, 3)


# ----------------------------------------------------------------------------------------------------------------------
# Kernels. Without a GPU kernels/emulate.h runs them, thread by thread, on the CPU.

NEEDS_GXX = pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="emulation needs g++")


@pytest.fixture(scope="session")
def kernels() -> types.ModuleType:
    spec = importlib.util.spec_from_file_location("_dinov2_attention", HERE / "kernels/attention.py")
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def qkv_and_grad(tokens: int, heads: int = 1, head_dim: int = 64, dtype=torch.bfloat16) -> list[torch.Tensor]:
    return [x.to(dtype) for x in randn(tokens, (tokens, 3, heads, head_dim), (tokens, heads, head_dim))]


def check_kernel(kernels, heads: int, runs, head_dim: int = 64, device: str = "cpu") -> None:
    for dtype in (torch.bfloat16, torch.float16):
        ours = kernels.compare(runs, heads, head_dim, dtype, device)[0]
        for what, pair in zip(("out", "dq", "dk", "dv"), ours):
            assert all(a <= b for a, b in zip(pair, kernels.limits(dtype, runs))), (what, pair, dtype)


def test_kernels_are_sources_only(kernels):
    """No Python package, no line over 120 columns, the same limit of runs on both sides."""
    files = {p.name: p.read_text() for p in (HERE / "kernels").iterdir() if p.is_file()}
    assert files.keys() == {"attention.cu", "attention.py", "hardware.h", "emulate.h"}
    assert [line for text in files.values() for line in text.splitlines() if len(line) > 120] == []
    assert f"MAX_RUNS = {kernels.MAX_RUNS};" in files["attention.cu"]


@NEEDS_GXX
@pytest.mark.parametrize("heads, runs, order", [
    (2, ([1, 2], [1, 2]), 0), (3, ([2, 1, 2], [7, 16, 37]), 1), (2, ([1, 0, 1], [50, 9, 33]), 2),
    (1, ([1, 1, 1], [63, 64, 65]), 0), (1, ([1, 2], [197, 37]), 1), (1, ([1], [257]), 2), (1, ([1], [290]), 0),
    pytest.param(1, ([1], [1370]), 2, marks=SLOW)])
def test_kernels_emulated_equal_float64(kernels, heads, runs, order):
    """Forward and all gradients; the emulator reports races, wrong addresses and barriers besides, see emulate.h."""
    kernels.load_emulator()(order, 0)
    check_kernel(kernels, heads, runs)


@NEEDS_GXX
@pytest.mark.parametrize("head_dim", [32, pytest.param(128, marks=SLOW)])
def test_kernels_emulated_other_head_widths(kernels, head_dim):
    kernels.load_emulator(head_dim)(2, 1)
    check_kernel(kernels, 2, ([1, 1, 1], [145, 37, 5]), head_dim)


@NEEDS_GXX
def test_kernels_emulated_lse_is_exact(kernels):
    """float32, so that not one key too many or too few hides behind the rounding of the output."""
    kernels.load_emulator()(0, 0)
    runs = ([1, 1, 1], [131, 37, 3])
    qkv = 3 * qkv_and_grad(171, 2)[0]
    lse = torch.ops.dinov2.attention(qkv, *runs, 0.125)[1]
    for part, x in zip(lse.split(runs[1], 1), qkv.double().split(runs[1])):
        scores = torch.einsum("nhd,mhd->hnm", x[:, 0], x[:, 1]) * 0.125
        assert_close(part, scores.logsumexp(-1), 1e-5)


@NEEDS_GXX
@pytest.mark.parametrize("runs", [([1, 2], [70, 21]), pytest.param(([1], [330]), marks=SLOW)])
def test_kernels_emulated_same_bits_in_any_order_of_threads(kernels, runs):
    set_order, outs = kernels.load_emulator(), []
    for order, seed in ((0, 0), (1, 0), (2, 0), (2, 1)):
        set_order(order, seed)
        outs.append(kernels.results(kernels.attend, *qkv_and_grad(sum(b * n for b, n in zip(*runs)), 2), runs))
    assert all(torch.equal(a, b) for other in outs[1:] for a, b in zip(outs[0], other))


@NEEDS_GXX
def test_kernels_extreme_values(kernels):
    """A softmax of scores in the hundreds, and NaN stays within its image."""
    kernels.load_emulator()(0, 0)
    qkv = torch.cat([40 * qkv_and_grad(33)[0], qkv_and_grad(33)[0]])
    exact = kernels.stock(qkv.double(), [2], [33], 0.125)
    assert_close(kernels.attend(qkv, [2], [33], 0.125), exact, 0.01 * exact.abs().max().item())
    qkv[40] = math.nan
    out = kernels.attend(qkv, [2], [33], 0.125)
    assert out[:33].isfinite().all() and out[33:].isnan().all()


@NEEDS_GXX
@SLOW
@pytest.mark.parametrize("before, after, symptom", [
    ("if (i / 4 * 8 + lane % 4 * 2 + i % 2 >= valid)", "if (i / 4 * 8 + lane % 4 * 2 + i % 2 > valid)", "differs"),
    ("if (g * 16 < valid) {", "if (g * 16 + 16 < valid) {", "differs"),
    ("if (valid < TILE)", "if (valid < 0)", "differs"),
    ("int swizzle(int row) { return", "int swizzle(int row) { return 0 *", "bank conflict"),
    ("        sync_block();  // the step's keys", "        // the step's keys", "shared memory"),
    ("            sync_block();  // dS is complete", "            // dS is complete", "never written"),
    ("        copy_wait();\n        sync_block();", "        sync_block();", "before its copy was waited for"),
    ("step % 2 * TILE;\n        const Bits", "step * 0 * TILE;\n        const Bits", "before its copy"),
    ("row < valid ? row * stride + chunk * 8 : 0), row < valid", "row * stride + chunk * 8), true", "outside"),
    ("    sync_warp();  // all lanes have their queries", "    // all lanes have their queries", "race"),
    ("(tokens * heads + 3) / 4 * 4", "tokens * heads", "misaligned"),
    ("if (!first)", "if (false)", "differs"),
    ("ds[i / 4][n][i % 4] = p[i / 4][n][i % 4] * (ds", "ds[i / 4][n][i % 4] = p[i / 4][n][0] * (ds", "differs")])
def test_kernels_tests_see_mistakes(kernels, before, after, symptom, tmp_path, monkeypatch):
    """Each of these mistakes in attention.cu is found, by the numbers or by the emulator."""
    for name in ("attention.cu", "hardware.h", "emulate.h"):
        shutil.copy(HERE / "kernels" / name, tmp_path)
    text = (tmp_path / "attention.cu").read_text()
    assert text.count(before) >= 1
    (tmp_path / "attention.cu").write_text(text.replace(before, after))
    monkeypatch.setattr(kernels, "HERE", tmp_path)
    monkeypatch.setattr(kernels, "libraries", {})
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    kernels.load_emulator()(1, 0)
    found = ""
    for runs in (([1, 1], [37, 19]), ([1], [131]), ([1], [289])):
        try:
            check_kernel(kernels, 1, runs)
        except AssertionError:
            found += "differs "
        except RuntimeError as error:
            found += f"{error} "
    assert symptom in found


@NEEDS_GXX
def test_kernels_operators_are_known_to_pytorch(kernels):
    """opcheck: schema, fake, autograd; torch.compile without a break, with the same gradient."""
    kernels.load_emulator()(0, 0)
    qkv, grad = qkv_and_grad(7 + 2 * 3)
    runs = ([1, 2], [7, 3], 0.125)
    library.opcheck(torch.ops.dinov2.attention.default, (qkv.clone().requires_grad_(), *runs))
    out, lse = torch.ops.dinov2.attention(qkv, *runs)
    library.opcheck(torch.ops.dinov2.attention_backward.default, (grad, qkv, out, lse, *runs))
    whole = lambda x: kernels.attend(2 * x, *runs).sin()  # noqa: E731
    gradients = []
    for function in (whole, torch.compile(whole, fullgraph=True, backend="aot_eager")):
        leaf = qkv.clone().requires_grad_()
        function(leaf).backward(grad)
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_kernels_operators_on_meta(kernels):
    qkv = torch.empty(43, 3, 2, 64, dtype=torch.float16, device="meta", requires_grad=True)
    out, lse = torch.ops.dinov2.attention(qkv, [1, 2], [37, 3], 0.125)
    assert out.shape == (43, 2, 64) and out.dtype == torch.float16 and not lse.requires_grad
    assert lse.shape == (2, 43) and lse.dtype == torch.float32
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape


@pytest.mark.parametrize("change, message", [
    (dict(qkv=torch.zeros(4, 3, 1, 64)), "takes bfloat16 or float16, not float32"),
    (dict(qkv=torch.zeros(4, 192).half()), r"qkv of shape \(T, 3, H, D\), not \(4, 192\)"),
    (dict(qkv=torch.zeros(4, 3, 1, 48).half()), "heads of width 32, 64, 128, not 48"),
    (dict(batches=[2, 1]), "runs, each of a number of images and a length, not"),
    (dict(batches=[1] * 17, lengths=[1] * 17), "takes 1 to 16 runs"),
    (dict(batches=[], lengths=[]), "takes 1 to 16 runs"),
    (dict(batches=[4], lengths=[0]), "not batches .4. and lengths .0."),
    (dict(lengths=[3]), r"batches \[2\] of lengths \[3\] are 6 tokens, qkv has 4"),
    (dict(scale=0.0), "a scale above 0, not 0.0")])
def test_kernels_refuse(kernels, change, message):
    arguments = dict(qkv=torch.zeros(4, 3, 1, 64).half(), batches=[2], lengths=[2], scale=0.125) | change
    with pytest.raises(ValueError, match=message):
        kernels.attend(*arguments.values())


def test_kernels_load_says_why_not(kernels, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(kernels, "libraries", {})
    with pytest.raises(ValueError, match=r"width 64 on cpu is not loaded: call load_emulator\(64\) first"):
        kernels.attend(torch.zeros(4, 3, 1, 64).half(), [2], [2], 0.125)
    with pytest.raises(ValueError, match="heads of width 32, 64, 128, not 80"):
        kernels.load(80)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs an NVIDIA GPU, and PyTorch sees none"):
        kernels.load()
    assert kernels.main([]) == 2 and capsys.readouterr().err.count("\n") == 1
    gpu = types.SimpleNamespace(name="Tesla V100", major=7, minor=0, shared_memory_per_block_optin=98304)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    with pytest.raises(ValueError, match=r"needs compute capability 8.0 \(A100\) or more, Tesla V100 has 7.0"):
        kernels.load()
    gpu.name, gpu.major, gpu.minor = "RTX", 8, 9
    with pytest.raises(ValueError, match="need 160 KB of shared memory per block, RTX has less"):
        kernels.load(128)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(ValueError, match="needs nvcc"):
        kernels.load()
    with pytest.raises(ValueError, match="needs g\\+\\+"):
        kernels.load_emulator()
    (tmp_path / "nvcc").write_text("#!/bin/sh\necho In file included from x; echo 'a.cu(1): error: no' >&2; exit 1\n")
    (tmp_path / "nvcc").chmod(0o755)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(ValueError, match=r"does not compile for sm_89: a.cu\(1\): error: no$"):
        kernels.load()
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "nvcc"))
    with pytest.raises(ValueError, match="cannot be built in .*nvcc/dinov2_kernels: .*Not a directory"):
        kernels.load()


@pytest.mark.skipif(not (shutil.which("nvcc") or Path("/usr/local/cuda/bin/nvcc").exists()), reason="needs nvcc")
def test_kernels_compile_without_spills(kernels):
    """For A100 and H100: what does not fit the registers would go to memory. 163 KB is a block's share on the A100."""
    rows = kernels.resources()
    assert {(r["kernel"], r["dtype"], r["architecture"]) for r in rows} == set(itertools.product(
        ("forward", "backward, N > 64", "backward, N <= 64"), ("bfloat16", "float16"), ("sm_80", "sm_90")))
    assert [r for r in rows if r["spills"] or r["shared"] > 163 * 1024] == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_kernels_on_a_gpu_equal_float64(kernels):
    kernels.load()
    for count, *runs in kernels.CASES + kernels.LARGE_CASES:
        check_kernel(kernels, count, runs, device="cuda")
    qkv = qkv_and_grad(3 * 37, 2)[0].cuda().requires_grad_()
    graph = torch.compile(lambda x: kernels.attend(x, [3], [37], 0.125), fullgraph=True)
    assert torch.equal(graph(qkv), kernels.attend(qkv, [3], [37], 0.125))

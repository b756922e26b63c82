import itertools
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import bench
import data
import model
import train
import support.parallel
import support.sources
from tests.common import (CPU, TINY, Launched, assert_close, free_port, metrics, saved_tensors, set_up_and_release,
                          stop_at, train_main, wait_for)


def test_train_compiles_once(tmp_path, monkeypatch):
    """--compile: one whole graph for the student's blocks and one for the teacher's, with stochastic depth, with FSDP2
    around them, also with activation checkpointing, and one for the losses; none after the first step, although the
    number of masked patches changes. The losses stay the same."""
    graphs = {}

    def count(graph, inputs):
        graphs.setdefault(name, []).append(len(metrics(tmp_path / name)) if (tmp_path / name).exists() else 0)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=count))
    for name, flags in dict(plain=[], whole=["--compile"],
                            selective=["--compile", "--activation-checkpointing", "selective"],
                            blocks=["--compile", "--activation-checkpointing", "full"]).items():
        train.compile_loss.cache_clear()
        train_main(*TINY, "--steps", 4, "--log-every", 1, "--out", tmp_path / name, "--drop-path-rate", 0.3,
                   "--dtype", "bf16", *flags)
        assert graphs.get(name, []) == [0] * dict(plain=0, whole=5).get(name, 1)  # the teacher's and the losses' remain
        losses_of = [[r["loss"] for r in metrics(tmp_path / n)] for n in ("plain", name)]
        assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-3)  # bfloat16; in float32, see the golden steps
    train.compile_loss.cache_clear()


def on_machines_of(n: int) -> None:
    """Has the processes believe that each `n` of them are on a machine of their own; the last may hold fewer."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ |= dict(LOCAL_WORLD_SIZE=str(min(n, world - rank // n * n)), LOCAL_RANK=str(rank % n))


@pytest.mark.parametrize("chain", [
    (("zero3", 2, 4), ("zero2", 1, None)),
    pytest.param((("ddp", 2, 2), ("hsdp", 4, 2), ("zero3", 2, 2), ("zero2", 4, None)), marks=pytest.mark.slow)])
def test_shard_modes_equal_one_process_and_continue_each_other(chain, tmp_path):
    """DDP, HSDP on two machines, ZeRO-3, ZeRO-2, each going on from the save of the one before: losses, gradient norms
    and weights of one process, with clipping at work; and each state is saved once, whoever holds copies of it."""
    flags = [*TINY, "--steps", 8, "--drop-path-rate", 0.3, "--batch-size", 16, "--save-every", 5, "--clip-grad", 0.3]
    alone = Launched(tmp_path / "log1", train.main, *flags, "--out", tmp_path / "one")
    flags += ["--out", tmp_path / "many"]
    for mode, world, stop in chain:
        before = partial(on_machines_and_stop, stop) if world > 1 else None
        text = Launched(tmp_path / "log", train.main, *flags, "--sharding", mode, world=world, before=before).wait()
    starts = itertools.accumulate((stop for _, _, stop in chain[:-1]), initial=0)
    expected = [(str(start), str(world)) for start, (_, world, _) in zip(starts, chain)]
    assert re.findall(r"step (\d+) of 8, global batch 16 \((\d)", text) == expected
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
    sent = Launched(tmp_path / "log2", train.main, *flags, "--out", tmp_path / "many",
                    "--gradient-accumulation-steps", 2, "--sharding", "ddp", world=2, before=note_all_reduces)
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
    support.parallel.start_processes(CPU)
    batch = data.prepare(train.training_batches(cfg, support.sources.open_source("digits"), dist.get_rank(), 4)[0], CPU)
    gradients = {}
    for mode, n_shards in dict(ddp=1, hsdp=2, zero2=4, zero3=4).items():
        torch.manual_seed(0)
        network, teacher = train.build_network(cfg), train.build_network(cfg).requires_grad_(False).eval()
        whole = {name: p.numel() for name, p in network.named_parameters()}
        mesh = support.parallel.make_mesh("cpu", mode)
        assert mesh.shape == ((4,) if n_shards == 4 else (4 // n_shards, n_shards))
        support.parallel.shard(network, mesh, torch.bfloat16, mode=mode)
        support.parallel.shard(teacher, mesh, torch.bfloat16, with_backward=False, mode=mode)
        assert support.parallel.n_replicas(network) * n_shards == 4
        held = {name: p.to_local() for name, p in network.named_parameters()}
        for name, p in held.items():  # rows are dealt out evenly; of single rows, the first process has them
            even = network.get_parameter(name).shape[0] % n_shards == 0
            assert p.dtype == torch.float32 and p.numel() in ([whole[name] // n_shards] if even else [0, whole[name]])

        (targets,), _ = train.teacher_targets(teacher, [batch], cfg, 0.05, {})
        loss, _ = train.step_losses(network, batch, targets, cfg)
        gathered = {name: not support.parallel.is_sharded(p) for name, p in network.named_parameters()}
        assert not any(not support.parallel.is_sharded(p) for p in teacher.parameters())  # or its mean would miss them
        assert all(kept == (mode != "zero3" or "_head." in name) for name, kept in gathered.items()), mode
        kinds = {(name.split(".")[0], p.dtype) for name, p in network.named_parameters() if gathered[name]}
        assert kinds - {("backbone", torch.bfloat16)} == {(h, torch.float32) for h in ("dino_head", "ibot_head")}
        loss.backward()
        assert all(support.parallel.is_sharded(p) for p in network.parameters())
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


@pytest.mark.parametrize("ffn", ["mlp", pytest.param("swiglu", marks=pytest.mark.slow)])
def test_recompute_gives_the_same_gradients_in_less_memory(ffn):
    """Blocks that keep everything, matrix products and attention, nothing; plain, and compiled as one graph each."""
    def passes(way: str, compiled: bool):
        torch._dynamo.reset()  # it counts what it compiled before
        torch.manual_seed(0)
        cfg = train.Config(**train.PRESETS["digits"] | dict(ffn_layer=ffn, init_std=0.1))
        network = train.build_network(cfg, 0.3)
        support.parallel.shard(network, types.SimpleNamespace(size=lambda: 1), torch.float32, way)
        for block in network["backbone"].block_list() if compiled else ():
            block.compile(backend="aot_eager", fullgraph=True)
        images = [torch.randn(8, 3, 12, 12), torch.randn(16, 3, 8, 8)]
        orders = [torch.stack([torch.randperm(len(i))[None] for _ in range(6)]) for i in images]
        forward = partial(network["backbone"], images, is_training=True, drop_orders=orders)
        size = 0 if compiled else bench.saved_bytes(forward)
        sum(out["x_prenorm"].square().mean() for out in forward()).backward()
        return size, {name: p.grad for name, p in network["backbone"].named_parameters() if p.grad is not None}

    kept, expected = passes("none", False)
    sizes = [kept]
    for way, compiled in itertools.product(("selective", "full"), (False, True)):
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
    config = {k: v for k, v in config.items() if k not in ("sharding", "activation_checkpointing")}
    config |= dict(recompute_blocks=True)
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    flags = ["--steps", 4, "--eval-every", 2, "--export-every", 3, "--save-every", 2, "--out", tmp_path / "out"]
    flags += ["--sharding", "zero3", "--activation-checkpointing", "selective"]
    assert set_up_and_release(*TINY, *flags).start == 4


def test_failure_on_one_rank_keeps_its_cause():
    support.parallel.start_processes(CPU)
    try:
        with pytest.raises(support.parallel.Failed, match="division by zero") as raised:
            support.parallel.on_all_ranks(lambda: 1 / 0)
        assert isinstance(raised.value.__cause__, ZeroDivisionError)
    finally:
        dist.destroy_process_group()


def test_shard_hsdp_needs_equal_machines(tmp_path):
    """One line on each process, and nothing is written."""
    flags = [*TINY, "--batch-size", 12, "--steps", 1, "--sharding", "hsdp", "--out", tmp_path / "out"]
    text = Launched(tmp_path / "log", train.main, *flags, world=3, before=partial(on_machines_of, 2)).wait(2)
    assert text.count("error: --sharding hsdp needs the same number of processes on every machine") == 3
    assert text.count("found 2 from rank 0, 1 from rank 2. Use") == text.count("or --sharding zero2") == 3
    assert not (tmp_path / "out").exists()
    for field, value, fix in (("sharding", "zero4", "did you mean zero"),
                              ("activation_checkpointing", "ful", "did you mean full")):
        with pytest.raises(ValueError, match="--" + field.replace("_", "-") + f" .{value}., {fix}"):
            train.check(train.Config(**{field: value}), 1)


@pytest.mark.slow
def test_train_compiles_blocks_of_rising_rates(monkeypatch):
    """Each block with a rate of stochastic depth of its own is a graph of its own, more of them than Dynamo allows."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setitem(model.ARCHS["vit_nano"], "depth", 12)
    torch._dynamo.reset()
    network = train.build_network(train.Config(**train.PRESETS["digits"] | dict(drop_path_uniform=False)), 0.3)
    orders = torch.stack([torch.randperm(8)[None] for _ in range(24)])
    with torch._dynamo.config.patch(recompile_limit=8):
        support.parallel.shard(network, types.SimpleNamespace(size=lambda: 1), torch.float32, compile_blocks=True)
        out = network["backbone"](torch.randn(8, 3, 12, 12), is_training=True, drop_orders=orders)
    assert out["x_norm_clstoken"].shape == (8, 64)


def test_restarted_processes_do_not_see_the_keys_of_dead_ones():
    """After a failure torchrun hands the old store to the new processes. Each start uses a part of its own, even if the
    previous one ended halfway, and sets the same keys again."""
    store, n = dist.HashStore(), 4
    store.set_timeout(timedelta(seconds=60))
    for r in range(1, n):
        store.set(f"rank {r}", "a dead process")
    parts = []
    with ThreadPoolExecutor(n) as pool:
        for start in range(3):
            ranks = random.Random(start).sample(range(n), n)
            futures = {r: pool.submit(support.parallel.store_of_this_start, store, r, n) for r in ranks}
            parts.append({r: future.result(60) for r, future in futures.items()})
            assert not any(part.check(["address"]) for part in parts[-1].values())
            parts[-1][0].set("address", str(start))
            assert [parts[-1][r].get("address") for r in range(n)] == [str(start).encode()] * n
    assert parts[0][3].get("address") == b"0"


def test_a_single_process_uses_the_chosen_gpu(monkeypatch):
    used = []
    monkeypatch.setattr(torch.cuda, "set_device", used.append)
    support.parallel.join_processes(torch.device("cuda:1"))
    assert used == [torch.device("cuda:1")] and not dist.is_initialized()


def test_processes_that_do_not_meet_end_with_one_line(monkeypatch):
    monkeypatch.setattr(support.parallel, "TIMEOUT", timedelta(seconds=1))
    for name, value in dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=free_port(), WORLD_SIZE=2, RANK=0).items():
        monkeypatch.setenv(name, str(value))
    reason = r"did not meet at 127.0.0.1:\d+ \(.*\); between machines, give each torchrun --local-addr"
    for rank in range(2):  # nobody else comes; nobody is there
        monkeypatch.setenv("RANK", str(rank))
        with pytest.raises(ValueError, match=reason):
            support.parallel.start_processes(CPU)
    assert not dist.is_initialized()


def impatient() -> None:
    """Steps time out after 3 seconds. Listing takes longer."""
    support.parallel.TIMEOUT = timedelta(seconds=3)
    if os.environ["RANK"] == "0":
        listing = support.sources.open_source
        support.sources.open_source = lambda *a: (time.sleep(3.5), listing(*a))[1]


def test_a_process_that_vanishes_is_noticed_soon(tmp_path):
    """It stops answering, like one on a machine that lost power or network: the other ends with one line. While rank 0
    lists images, the others wait longer."""
    job = Launched(tmp_path / "log", train.main, *TINY, "--steps", 10**6, "--out", tmp_path / "out", world=2,
                   before=impatient)
    job.until("of 1000000, global batch 8 (2 x cpu")
    wait_for(lambda: len(metrics(tmp_path / "out")) > 2)
    job.signal(signal.SIGSTOP, rank=1)
    job.processes[0].join(60)
    job.signal(signal.SIGKILL, rank=1)
    assert job.processes[0].exitcode == 1, job.text()
    *_, line = job.text().strip().splitlines()
    assert "Traceback" not in job.text() and line.startswith("error: contact with another process was lost (")
    assert "imed out" in line and line.endswith("; run the same command again (nothing is saved yet)")
    assert not (tmp_path / "out/lock").exists()


def initial_weights(mode: str, folder: Path) -> None:
    """Run by several processes: the weights of a new run, whole, are written to folder/MODE.pth."""
    cfg = train.Config(**train.PRESETS["digits"] | dict(num_register_tokens=3, sharding=mode))
    mesh = support.parallel.start_processes(CPU, mode)
    state = train.TrainState(cfg, mesh, CPU)
    weights = {name: support.parallel.full_weights(getattr(state, name)) for name in ("student", "teacher")}
    if dist.get_rank() == 0:
        torch.save(weights, folder / f"{mode}.pth")
    dist.barrier()
    dist.destroy_process_group()


def test_initial_weights_do_not_depend_on_the_processes(tmp_path):
    for mode, world in (("zero2", 1), ("zero3", 3), ("hsdp", 4)):
        Launched(tmp_path / f"log_{mode}", partial(initial_weights, mode, tmp_path), world=world,
                 before=partial(on_machines_of, 2) if mode == "hsdp" else None).wait()
    one, *others = (torch.load(path, weights_only=True) for path in
                    (tmp_path / f"{mode}.pth" for mode in ("zero2", "zero3", "hsdp")))
    assert one["student"].keys() == one["teacher"].keys() and len(others) == 2
    for name, value in one["student"].items():
        assert all(torch.equal(value, w[part][name]) for w in (one, *others) for part in ("student", "teacher")), name
    cfg = train.Config(**train.PRESETS["digits"] | dict(num_register_tokens=3))
    for name, value in train.build_network(cfg).state_dict().items():  # by the constructors: the same distributions
        ours = one["student"][name]
        assert value.std() == ours.std() or abs(ours.std() / value.std() - 1) < 0.5 and ours.std() > 0, name


@pytest.mark.parametrize("error,lost", [
    (dist.DistBackendError("NCCL error in: x.cpp:1, remote process exited or there was a network error"), True),
    (dist.DistBackendError("[Rank 0]: Collective WorkNCCL(SeqNum=7) timed out"), True),
    (dist.DistBackendError("NCCL error in: x.cpp:1, invalid usage\nDuplicate GPU detected"), False),
    (dist.DistStoreError("wait timeout after 5000ms"), True), (RuntimeError("expected Float"), False),
    (RuntimeError("[/x/gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True)])
def test_losses_are_told_from_other_failures(error, lost):
    with pytest.raises(support.parallel.Lost if lost else type(error)) as raised, support.parallel.noticing_losses():
        raise error
    assert isinstance(raised.value, support.parallel.Lost) == lost


def build_large_network() -> None:
    """Run by two processes: prints the table of `bench.py build`."""
    bench.main(["build", "--preset", "vits16_short", "--batch-size", "2", "--group-size", "1", "--json"])


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_new_run_holds_its_shards_and_one_parameter(tmp_path):
    log = Launched(tmp_path / "log", build_large_network, world=2).wait()
    rows = json.loads(log[log.index("{") :])["rows"]
    for row in rows:  # in all 0.35 GB of shards; a whole network would add 0.17 GB to each process
        assert 0.15 < row["GB of shards"] < 0.2 and row["GB at the peak"] < row["GB of shards"] + 0.1, rows
    assert len(rows) == 2

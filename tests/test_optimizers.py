"""Any optimizer of torch.optim by one line of train.py: it trains, skips what is not finite, saves and resumes."""
import dataclasses
import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.tensor import DTensor

import data
import train
import support.parallel
import support.saves
import support.sources
from tests.common import CPU, Launched, same


OPTIMIZERS = {
    "AdamW": lambda student, cfg: [torch.optim.AdamW(train.param_groups(student, cfg), fused=False)],
    "AdamW foreach": lambda student, cfg: [torch.optim.AdamW(train.param_groups(student, cfg), foreach=True)],
    "AdamW fused": train.build_optimizers,
    "SGD": lambda student, cfg: [torch.optim.SGD(train.param_groups(student, cfg))],
    "SGD momentum": lambda student, cfg: [
        torch.optim.SGD(train.param_groups(student, cfg), momentum=0.9, dampening=0.1)],
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
    cfg = train.Config(**train.PRESETS["digits"] | dict(
        batch_size=8, group_size=4, centering="centering", clip_grad=1.0) | changes)
    state = train.TrainState(cfg, support.parallel.make_mesh("cpu", cfg.sharding), CPU)
    rank, world = dist.get_rank(), dist.get_world_size()
    source = support.sources.open_source("digits")
    batches = train.training_batches(dataclasses.replace(cfg, seed=0), source, rank, world)
    now = {k: float(v[100]) for k, v in train.schedules(cfg).items()}

    def step(i: int, bad: bool = False) -> bool:
        batch = data.prepare(batches[i], CPU)
        if bad and rank == world - 1:
            batch.global_crops[0, 0, 0, 0] = math.nan
        _, finite = train.train_step(
            state.student, state.teacher, state.optimizers, [batch], cfg, now, state.centers)
        return finite.item()

    return state, step


@pytest.fixture
def process_group():
    support.parallel.start_processes(CPU)
    yield
    dist.destroy_process_group()


def tensors_of(state, *parts: str) -> dict[str, torch.Tensor]:
    tree = support.saves.tensors_of(state)
    return {f"{part}.{name}": support.parallel.local_shards([t])[0].detach().clone() for part in parts or tree
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
    assert same(*({k: v for k, v in tree.items() if "teacher" not in k} for tree in (now, after)))
    assert step(3)
    dcp.save(support.saves.tensors_of(state), checkpoint_id=str(tmp_path / "save"))
    support.saves.check_metadata(tmp_path / "save/.metadata")
    saved = tensors_of(state)
    assert step(4) and step(5)

    other, other_step = tiny_state(seed=1)
    support.saves.load_save(other, tmp_path / "save")
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
    dcp.save(support.saves.tensors_of(state), checkpoint_id=str(tmp_path / "start"))
    assert step(0)
    dcp.save(support.saves.tensors_of(state), checkpoint_id=str(tmp_path / "save"))
    for save, n in (("save", len(list(state.student.parameters())) - 1), ("start", 0)):
        other, _ = tiny_state()
        support.saves.load_save(other, tmp_path / save)
        kept = support.saves.optimizer_state_of(other)
        assert len(kept) == n and "backbone.pos_embed" not in kept
    monkeypatch.setattr(train, "build_optimizers", OPTIMIZERS["SGD momentum"])
    with pytest.raises(ValueError, match="another optimizer wrote it: exp_avg.backbone"):
        support.saves.load_save(tiny_state()[0], tmp_path / "save")


def sharded_optimizer_checks(folder: str, name: str) -> None:
    """Run by two processes: NaN in one of them, a save, and a resume to the bit."""
    train.build_optimizers = OPTIMIZERS[name]
    support.parallel.start_processes(CPU)
    state, step = tiny_state()
    assert step(0)
    before = tensors_of(state, "student", "centers")
    assert not step(1, bad=True) and same(tensors_of(state, "student", "centers"), before)
    assert isinstance(next(iter(support.saves.optimizer_tensors_of(state)["momentum_buffer"].values())), DTensor)
    dcp.save(support.saves.tensors_of(state), checkpoint_id=f"{folder}/save")
    other, other_step = tiny_state(seed=1)
    support.saves.load_save(other, Path(folder, "save"))
    assert step(2) and other_step(2) and same(tensors_of(other), tensors_of(state))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("name", [pytest.param("SGD momentum", marks=pytest.mark.slow), "Muon"])
def test_optimizer_on_shards(name, tmp_path):
    Launched(tmp_path / "log", partial(sharded_optimizer_checks, str(tmp_path), name), world=2).wait()

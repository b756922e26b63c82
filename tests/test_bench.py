import inspect
import json
import re
import shlex
from functools import partial

import pytest
import torch
import torch.distributed as dist

import bench
import model
import train
import support.parallel
import support.sources
from tests.common import CPU, assert_close, randn


@pytest.mark.slow
def test_bench_save(capsys):
    bench.main(["save", "--preset", "digits", "--repeats", "1", "--json"])
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert len(rows) == 6 and all(row["ms"] == row["ms"] for row in rows) and rows[0]["ms"] > 0 and rows[2]["ms"] > 0
    with pytest.raises(ValueError, match="unknown preset 'digit', did you mean digits"):
        bench.main(["save", "--preset", "digit"])
    with pytest.raises(ValueError, match="--every has no effect on `bench.py knn`; it is for logreg"):
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
    assert tuple(rows) == support.parallel.SHARDINGS and network["images per GPU"] == 32
    backbone, heads = 1e6 * network["backbone, M"], 1e6 * network["heads, M"]
    gathered = 2 * backbone + 4 * heads
    by_hand = dict(ddp=8 * (backbone + heads), zero2=2 * gathered + 4 * (backbone + heads))
    by_hand |= dict(hsdp=by_hand["zero2"], zero3=by_hand["zero2"] + 2 * backbone)
    for mode, size in by_hand.items():
        assert rows[mode]["8: GB"] == pytest.approx(7 / 8 * size / 1e9)
    across = 2 * 3 / 4 * 4 * (backbone + heads) / 8  # four machines add up eighths, of float32
    assert rows["hsdp"]["32: GB"] == rows["ddp"]["32: GB"] == pytest.approx(across / 1e9)
    ddp, hsdp, zero2, zero3 = (rows[mode]["8: memory"] for mode in ("ddp", "hsdp", "zero2", "zero3"))
    assert ddp > hsdp == zero2 > zero3
    assert rows["hsdp"]["256: memory"] == rows["hsdp"]["8: memory"] > rows["zero2"]["256: memory"]
    kept = [network[f"GB, checkpointing {way}"] for way in support.parallel.CHECKPOINTING]
    assert kept[0] > 1.5 * kept[1] > 4 * kept[2]


@pytest.mark.parametrize("way", support.parallel.CHECKPOINTING)
def test_bench_estimates_activations(way):
    """What a block on the meta device keeps, times the number of blocks, is what a real backbone keeps, but for its
    embeddings and its last norm."""
    cfg = train.Config(**train.PRESETS["digits"] | dict(
        device="cpu", dtype="fp32", activation_checkpointing=way, drop_path_rate=0.3))
    saved, _ = bench.measure_steps(cfg)
    estimate, tokens = 3 * bench.block_bytes(cfg, 128, torch.float32)[way], 128 * (2 * 10 + 2 * 5) * 64 * 4
    assert 0.95 * estimate < saved < estimate + 3 * tokens  # here, the rows to drop are rounded by groups


def bench_rows(capsys, *argv) -> list[dict]:
    bench.main([*map(str, argv), "--json"])
    return json.loads(capsys.readouterr().out)["rows"]


@pytest.mark.parametrize("flags", [[], pytest.param([
    "--compile", "--gradient-accumulation-steps", 2, "--drop-path-rate", 0.3, "--centering", "centering"],
    marks=pytest.mark.slow)])
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
    training = bench.TimedTraining(cfg, support.sources.open_source("digits"), CPU)
    batches = list(map(training.prepare, training.next_batches()))
    with FlopCounterMode(display=False) as counter:
        training.step(batches)
    dist.destroy_process_group()
    assert counter.get_total_flops() == pytest.approx(32 * bench.train_flops(cfg), rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("centering", ["sinkhorn_knopp", "centering"])
def test_bench_heads(centering, capsys):
    rows = bench_rows(capsys, "heads", "--arch", "vit_nano", "--batch-size", 12, "--head-n-prototypes", 65536,
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
    monkeypatch.setattr(bench, "GPU_COMMANDS", (
        shlex.join(["-c", f"print({table!r})", "--json"]), "-c 'raise ValueError(7)'",
        "-c 'import time; time.sleep(60)'", "-c 'print(TEMPORARY)'"))
    args = bench.parse(["gpu", "--out", str(tmp_path / "gpu"), "--minutes", "0.03"])
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


@pytest.mark.parametrize("what,flags,rows", [
    ("knn", ["--images", 2000, "--queries", 20], 4), ("linear", [], 2), ("dense", [], 2),
    pytest.param("hub", ["--name", "dinov2_vits14"], 4, marks=pytest.mark.slow),
    pytest.param("logreg", ["--images", 1000, "--every", 22], 3, marks=pytest.mark.slow)])
def test_bench_of_evaluations(what, flags, rows, capsys):
    bench.main([what, *["--dim", "8"] * (what != "hub"), "--repeats", "1", "--json", *map(str, flags)])
    found = json.loads(capsys.readouterr().out)["rows"]
    assert len(found) == rows and all(v > 0 for row in found for k, v in row.items() if k in ("s", "ms"))
    if what == "logreg":  # both have solved the same problem
        assert [row["fits"] for row in found] == ["45", "3", "3"] and found[1]["excess"] > -0.1


@pytest.mark.slow
def test_bench_data(capsys):
    bench.main(["data", "--repeats", "1", "--json"])
    result = json.loads(capsys.readouterr().out)
    rows = {row["stage"]: row for row in result["rows"]}
    assert len(rows) >= 7 and all(row["ms"] > 0 and row["times_official"] > 0 for row in rows.values())
    assert result["about"]["torch"] == torch.__version__ and "python bench.py data" in result["about"]["command"]
    with pytest.raises(ValueError, match="invalid choice"):
        bench.main(["dat"])

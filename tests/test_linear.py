import shutil
import subprocess
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import eval_linear
import hub
import support.evaluation
import support.sources
from support.cli import last_line
from tests.common import Launched, Numbers, assert_close, golden_grid, randn, results, same, write_images


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
    assert len(steps) == 10 + 4 and "resuming after step 8 of 12" in capsys.readouterr().err
    assert again["classifiers"] == alone["classifiers"] and again["curve"] == alone["curve"]
    assert same(head, torch.load(tmp_path / f"c.{end}", weights_only=True))
    assert not list(tmp_path.glob("*.resume"))


def test_eval_linear_resumes_only_its_own_undamaged_state(trained, tmp_path, monkeypatch, capsys):
    """Other settings start from scratch; a damaged state is named; --no-resume does without it."""
    shutil.copy(trained / "ckpt.pth", tmp_path / "a.pth")
    flags = [str(tmp_path / "a.pth"), "--batch-size", "32", "--epochs", "2", "--epoch-length", "2", "--cached"]
    save = support.evaluation.ResumeFile.save
    def save_and_stop(*args):
        save(*args)
        raise KeyboardInterrupt
    monkeypatch.setattr(support.evaluation.ResumeFile, "save", save_and_stop)
    for n, more in enumerate(([], ["--seed", "1"], ["--learning-rates", "0.1"]), 1):
        with pytest.raises(KeyboardInterrupt):
            eval_linear.main([*flags, *more])
        assert len(list(tmp_path.glob("*.resume"))) == n and "resuming" not in capsys.readouterr().err
    monkeypatch.setattr(support.evaluation.ResumeFile, "save", save)
    for path in tmp_path.glob("*.resume"):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"\.resume is damaged; remove it to start from scratch"):
        eval_linear.main(flags)
    eval_linear.main([*flags, "--no-resume"])
    assert len(list(tmp_path.glob("*.resume"))) == 2  # its own is gone


def test_eval_linear_head_is_one_of_the_hub(trained, tmp_path, cache):
    """The winner's file gives in hub.load_classifier the answers that the evaluation counted, and can be evaluated by
    --head, also on further sets."""
    shutil.copy(trained / "ckpt.pth", tmp_path / "a.pth")
    flags = [str(tmp_path / "a.pth"), "--num-workers", "0"]
    result = eval_linear.main([*flags, "--batch-size", "128", "--epochs", "1", "--epoch-length", "20", "--cached"])
    classifier = hub.load_classifier(tmp_path / "a.pth", tmp_path / "a.linear_head_cached.pth")
    source = support.sources.open_source("digits:split=VAL")
    validation = support.evaluation.EvalImages(source, 12, 12)  # the preset's size
    images = torch.stack([validation[i][0] for i in range(len(source))])
    with torch.no_grad():
        answers = classifier(data.normalize(data.to_float(images))).argmax(1)
    assert 100 * (answers == torch.from_numpy(source.labels)).double().mean().item() == pytest.approx(result["top1"])
    write_images(tmp_path / "numbered", [f"{c}/{i}.png" for c in (3, 8) for i in range(2)], size=(16, 16))
    np.save(tmp_path / "map.npy", np.array([3, 8]))
    again = eval_linear.main([
        *flags, "--head", str(tmp_path / "a.linear_head_cached.pth"), "--test", "digits:split=TRAIN",
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
    for flags, text in ((["--test", tmp_path / "plain"], "has no labels; make one sub-folder per class"),
                        (["--test", "/none"], "is not a folder"),
                        (["--test", tmp_path / "names"], "class 'x' of .* is not among the training classes"),
                        (["--real", tmp_path / "real.json"], "is not called ILSVRC2012_val"),
                        (["--flip-prob", "-0.3"], "from 0 to 1"), (["--head", "x", "--cached"], "leave --cached out"),
                        (["--batch-size", "0"], "must be 1 or more"), (["--test-classes", "a"], "give one for each")):
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
    with pytest.raises(ValueError, match="class '02' of set is not among the training classes"):
        eval_linear.class_columns(source(["02", "1"]), numbered, "")
    assert eval_linear.class_columns(source(None, 3), source(None, 4), "").tolist() == [0, 1, 2]
    np.save(tmp_path / "map.npy", np.array([3, 0]))
    assert eval_linear.class_columns(source(["x", "y"]), train, str(tmp_path / "map.npy")).tolist() == [3, 0]
    for bad, path, text in ((["n02", "n09"], "auto", "class 'n09' of set is not among the training classes"),
                            (["0", "4"], "", "a class 4"),
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
    for content, text in (("[[5]]", "no list of 4 or more"), ("no", "cannot be read"),
                          ("[[], [], [], []]", "no answer")):
        (tmp_path / "real.json").write_text(content)
        with pytest.raises(ValueError, match=text):
            eval_linear.read_real(str(tmp_path / "real.json"), source)


def test_eval_linear_crops_are_shared_out_and_left_out_when_bad(tmp_path, cache):
    """Two processes' batches are one's; crops are mirrored; unreadable and unlabeled images are replaced."""
    write_images(tmp_path, [f"{i}.png" for i in range(6)], size=(20, 24))
    (tmp_path / "4.png").write_bytes(b"damaged")
    (tmp_path / "l.txt").write_text("".join(f"{i}.png" + (f"\t{i}" if i != 5 else "") + "\n" for i in range(6)))
    source = support.sources.open_source(str(tmp_path / "l.txt"))
    def batches(rank=0, n_ranks=1, flip=0.5):
        return eval_linear.ProbeBatches(source, source.labels, 12, 8, (0.3, 1.0), flip, 0, rank, n_ranks)

    crops, labels, bad = batches()[3]
    assert crops.shape == (12, 3, 8, 8) and set(labels.tolist()) == {0, 1, 2, 3}
    parts = [batches(rank, 2)[3] for rank in range(2)]
    assert torch.equal(torch.cat([p[0] for p in parts]), crops) and bad == sum(p[2] for p in parts) > 0
    never, always = (batches(flip=p)[3][0] for p in (0.0, 1.0))
    assert torch.equal(never.flip(3), always) and not torch.equal(crops, never) and not torch.equal(crops, always)


def test_eval_linear_ends_with_one_line_if_no_training_image_can_be_read(trained, tmp_path):
    """The error is raised in a data-loading worker; nothing is printed about the other one, which is killed."""
    write_images(tmp_path / "val", ["a/1.png", "b/1.png"])
    for name in [f"{c}/{i}.png" for c in "ab" for i in range(30)]:
        (tmp_path / "train" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / name).write_bytes(b"garbage")
    shutil.copy(trained / "ckpt.pth", tmp_path / "a.pth")
    command = [sys.executable, "eval_linear.py", tmp_path / "a.pth", "--train", tmp_path, "--num-workers", "2",
               "--batch-size", "8", "--epochs", "1"]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("error: 50 images in a row could not be read, the last ")


def test_errors_from_workers_are_shortened_to_their_message():
    worker = "Caught {0} in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  F\n{0}: a: b"
    assert last_line(ValueError(worker.format("data.Unreadable"))) == "a: b"
    assert last_line(ValueError(worker.format("ValueError"))) == "a: b"
    assert last_line(ValueError("MNIST: download is yes")) == "MNIST: download is yes"
    assert last_line(ValueError()) == "ValueError"

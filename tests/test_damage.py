"""Damage in --out, by accident or by hand: a run continues from its newest intact save, or says in one line why not."""
import json
import math
import os
import pickle
import random
import shutil
import sys
import types
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint

import eval_dense
import eval_knn
import eval_linear
import eval_logreg
import export
import support.cli
import support.evaluation
import support.parallel
import support.log
import support.saves
import support.sources
import train
import visualize
from tests.common import TINY, Launched, metrics, set_up_and_release, train_main, write_images

FLAGS = (*TINY, "--steps", 4, "--eval-every", 2, "--export-every", 3, "--save-every", 2)  # those of `trained`
ODD = (None, True, -1, 0, 5, 7.5, 10**4000, math.nan, math.inf, "7", "", "../../config.json", "/etc/passwd", [], {},
       [1])


# ----------------------------------------------------------------------------------------------------------------------
# Random damage


def lose(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


def become_folder(path: Path, rng) -> None:
    lose(path)
    path.mkdir()
    (path / "notes.txt").write_text("mine")


def become_file(path: Path, rng) -> None:
    lose(path)
    path.write_bytes(rng.choice([b"", b"\xff\xfe", b"5\n", b"[" * 100_000, b"{}", b"[]", b"null", rng.randbytes(99)]))


def become_link(path: Path, rng) -> None:
    lose(path)
    path.symlink_to(rng.choice([path.name, "nowhere", "../nowhere/else"]))


def change_bytes(path: Path, rng) -> None:
    if path.is_file() and (content := bytearray(path.read_bytes())):
        for _ in range(rng.choice([1, 1, 9])):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)


def cut(path: Path, rng) -> None:
    if path.is_file():
        os.truncate(path, rng.randrange(path.stat().st_size + 1))


def change_values(path: Path, rng) -> None:
    """In a file of JSON lines, or of one JSON object, a value becomes an odd one, or a key another; or a line twice."""
    if not path.is_file():
        return
    text = path.read_text(errors="replace")
    try:
        documents = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else [json.loads(text)]
    except ValueError:
        return
    inner = rng.choice(documents or [{}])
    while isinstance(inner, dict) and inner:
        key = rng.choice([*inner])
        if not isinstance(inner[key], dict) or rng.random() < 0.3:
            if rng.random() < 0.2:
                inner[rng.choice(["x", "../x", "step"])] = inner.pop(key)
            else:
                inner[key] = rng.choice(ODD)
            break
        inner = inner[key]
    path.write_text("\n".join(map(dump, documents * rng.choice([1, 1, 2]))) + "\n")


def dump(value) -> str:
    return json.dumps(value if value != 10**4000 else 0).replace("10" * 9, "1" * 4000)


HOWS = (lambda path, rng: lose(path), become_folder, become_file, become_link, change_bytes, cut, change_values)
SAVES = tuple(f"resume/step_00000000{n}" for n in (2, 3, 4))
PLACES = ("metrics.jsonl", "config.json", "bad_samples.txt", "lock", "ckpt.pth", "first_batch.png", "eval", "nonfinite",
          "eval/training_2/teacher_checkpoint.pth", "resume", *SAVES[1:],
          *(f"{save}/{name}" for save in SAVES[1:] for name in ("complete", "complete", ".metadata", "__0_0.distcp")))


def foreign(out: Path, rng) -> Path | None:
    """A copy of a save under another name, as people make them."""
    name = rng.choice(["step_000000070.bak", "step_best", "step_70", "step_0000000004", "step_000000070", "step_4",
                       "copy_of_step_000000004", "step_-00000001", "step_000000070 (1)"])
    if not (out / SAVES[0]).is_dir() or (out / "resume" / name).exists():
        return None
    return shutil.copytree(out / SAVES[0], out / "resume" / name)


def content_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} if folder.is_dir() else {}


def start_without_networks(monkeypatch, out: Path, *flags) -> tuple[train.Run, support.log.Log]:
    """Everything train.py does before the first step, except building and loading networks."""
    monkeypatch.setattr(train, "TrainState", lambda *a: None)
    monkeypatch.setattr(support.saves, "load_save", lambda *a: None)
    try:
        run = train.set_up([str(a) for a in (*FLAGS, *flags, "--out", out)])
        try:
            log = support.log.Log(out / "metrics.jsonl", run.start, 4, run.counters, run.lock)
            log.new_bad += [("x.jpg", "damaged")]
            log.count_bad(100)
            log.write(dict(step=run.start, loss=1.0))
            support.log.summary(log, 0), support.log.summary(log, 4)
            return run, log
        finally:
            run.lock.release()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.parametrize("seed,n", [(0, 25), *(pytest.param(s, 100, marks=pytest.mark.slow) for s in (1, 2, 3))])
def test_damage_anywhere_in_out(seed, n, trained, tmp_path, monkeypatch):
    """One to three kinds of damage at once. The newest untouched save is used, or a newer one whose tensors are intact;
    unless the lock or resume/ itself is in the way, which is reported in one line."""
    rng = random.Random(seed)
    whole = {save: content_of(trained / save) for save in SAVES}
    for trial in range(n):
        out, copies = tmp_path / str(trial), []
        shutil.copytree(trained, out)
        for _ in range(rng.choice([1, 1, 2, 3])):
            if rng.random() < 0.2:
                copies += filter(None, [foreign(out, rng)])
            else:
                place = out / rng.choice(PLACES)
                if place.parent.is_dir():
                    rng.choice(HOWS)(place, rng)
        copies = {path: content_of(path) for path in copies if path.exists()}
        now = {save: content_of(out / save) for save in SAVES}
        untouched = [int(save[-1]) for save in SAVES if now[save] == whole[save]]
        unharmed = [int(save[-1]) for save in SAVES if all(
            now[save].get(name) == content for name, content in whole[save].items() if name != "complete")]
        try:
            run, log = start_without_networks(monkeypatch, out, *rng.choice([[], ["--resume"]]))
        except ValueError as error:
            text = str(error)
            assert len(text) < 400 and "\n" not in text and any(why in text for why in (
                f"{out} cannot be written (", "resume, where the saves belong, is not a folder",
                "holds a different run", "config.json is damaged; --resume", "holds no run; omit the flag",
                "so it is not a training run", "that no training run wrote", "holds no save with a name like",
                "no save in", "lock is a folder, where a file belongs", "are gone, so it cannot be continued")), text
            assert "are gone" not in text or not untouched
            assert "config.json is damaged" not in text or not untouched
            assert "different run" not in text or not untouched
            assert "no save in" not in text or not untouched
        else:
            assert run.start in ({0} if not untouched else {*unharmed}) and run.start >= max(untouched, default=0)
            assert json.loads((out / "config.json").read_text())["data"] == "digits"
            lines = metrics(out)
            assert all(r["step"] <= run.start for r in lines) and lines[-1] == dict(step=run.start, loss=1.0)
            assert "x.jpg\tdamaged\n" in (out / "bad_samples.txt").read_text("utf-8", "replace")
        assert all(content_of(path) == content for path, content in copies.items())
        shutil.rmtree(out)


# ----------------------------------------------------------------------------------------------------------------------
# Cases by name


@pytest.fixture
def out(trained, tmp_path) -> Path:
    return shutil.copytree(trained, tmp_path / "out")


KNN = dict(step=1, knn=dict(top1_k20=50.0))


@pytest.mark.parametrize("content,kept", [
    (b"5\n", 0), (b"\xff\n", 0), (b"null\n", 0), (b"[1]\n", 0), (b'{"loss": 1.0}\n', 0), (b'{"step": "3"}\n', 0),
    (b'{"step": true}\n', 0), (b'{"step": -1}\n', 0), (b'{"step": 1e999}\n', 0), (b'{"step": 1, "knn": 5}\n', 0),
    (b'{"step": 1, "knn": {"top1_k2": 5}}\n', 0), (b"[" * 10**5 + b"\n", 0), (bytes(512) + b"\n", 0),
    (json.dumps(KNN).encode() + b"\n", 1), (b'{"step": 1}\n' * 3, 1), (b'{"step": 1', None)])
def test_damage_in_metrics(content, kept, out, monkeypatch, capsys):
    """Intact lines are kept, once; a file with others is set aside, unless a kill explains the damage."""
    (out / "metrics.jsonl").write_bytes(b'{"step": 0, "loss": 2.0}\n' + content)
    before = (out / "metrics.jsonl").read_bytes()
    start_without_networks(monkeypatch, out)
    steps = [r["step"] for r in metrics(out)]
    assert steps == [0, *[1] * (kept or 0), 4]
    aside = [path.read_bytes() for path in out.glob("damaged_metrics.jsonl_*")]
    assert aside == ([before] if kept == 0 else [])
    said = "damaged lines, which are dropped; it is now damaged_metrics.jsonl_" in capsys.readouterr().err
    assert said == bool(aside)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "bad_samples.txt", "ckpt.pth", "eval", "nonfinite"])
def test_damage_by_folders_and_links_in_the_way(name, out, monkeypatch, capsys):
    """They are set aside with a note, nothing in them is lost, and the run continues."""
    for harm in (become_folder, become_link):
        if harm is become_folder and name in ("eval", "nonfinite"):
            harm = become_file
        harm(out / name, random.Random(0))
        assert start_without_networks(monkeypatch, out)[0].start == 4
        kind = "folder" if name in ("eval", "nonfinite") else "file"
        assert f"{name} is not a {kind}; it is now damaged_{name}_" in capsys.readouterr().err
    assert len([*out.glob(f"damaged_{name}_*")]) == 2


@pytest.mark.parametrize("content", [b"[]", b"null", b"5", b"{}", b"", b"\xff", b'{"seed": 1', b"[" * 10**5, None])
def test_damage_of_the_settings(content, out, monkeypatch):
    """config.json is rewritten from the settings in the newest save; if that has none, only --resume continues."""
    path = out / "config.json"
    settings = json.loads(path.read_text())
    for flags in ([], ["--resume"]):
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        if not flags:
            with pytest.raises(ValueError, match="holds a different run \\(seed 0 -> 1\\)"):
                start_without_networks(monkeypatch, out, "--seed", 1)
        assert start_without_networks(monkeypatch, out, *flags)[0].start == 4
        assert json.loads(path.read_text()) == settings | dict(out=str(out))
    for save in (out / "resume").iterdir():
        (save / "complete").write_text(json.dumps(json.loads((save / "complete").read_text()) | dict(config=[1])))
    if content is not None:
        path.write_bytes(content)
        with pytest.raises(ValueError, match="config.json is damaged; --resume continues the run with these settings"):
            start_without_networks(monkeypatch, out)
        assert start_without_networks(monkeypatch, out, "--resume")[0].start == 4


def test_damage_of_one_setting(out, monkeypatch):
    """The command of the newest save continues, whatever config.json says, and so does that of config.json, whose run
    may not have saved yet; no other."""
    path = out / "config.json"
    settings = json.loads(path.read_text())
    for changed in (dict(lr=10**400), dict(seed=[7]), dict(arch=None, mean="x\n" * 999)):
        path.write_text(json.dumps(settings | changed))
        with pytest.raises(ValueError, match="holds a different run \\(.* -> .*\\); choose another"):
            start_without_networks(monkeypatch, out, "--seed", 1)
        assert start_without_networks(monkeypatch, out)[0].start == 4
        assert json.loads(path.read_text()) == settings | dict(out=str(out))
    path.write_text(json.dumps(settings | dict(seed=1)))
    assert start_without_networks(monkeypatch, out, "--seed", 1)[0].start == 4


def test_foreign_settings_stay(tmp_path, monkeypatch):
    """If --out is the folder of someone else's model, its config.json stays, whatever the flags."""
    (tmp_path / "config.json").write_text('{"model_type": "dinov2"}')
    for flags in ([], ["--resume"], ["--overwrite"]):
        with pytest.raises(ValueError, match="holds a config.json that no training run wrote; choose another --out"):
            start_without_networks(monkeypatch, tmp_path, *flags)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


FILES = ".metadata", "__0_0.distcp"


@pytest.mark.parametrize("change", [
    *(dict(step=step) for step in ("7", "4", -5, 999999, 3, 4.0, True, None, 10**30)),
    *(dict(files=files) for files in (
        {}, [], None, {"complete": "x"}, *({name: "x"} for name in FILES), {"../../config.json": "x"},
        {"/etc/passwd": "x"}, {"": "x"}, {".": "x"}, {"..": "x"}, {"../step_000000003/complete": "x"})),
    *(dict(counters=counters) for counters in (
        [], None, dict(bad_samples=-1), dict(bad_samples="7"), dict(bad_samples=7.5), dict(bad_samples=math.nan),
        dict(skipped_steps=5), dict(skipped_in_a_row=1), dict(bad_samples=None), dict(bad_samples=10**20)))])
def test_damage_in_complete(change, out, monkeypatch, capsys):
    """The save counts as damaged, and the one before is used. Nothing outside its folder is read."""
    save = out / SAVES[2]
    complete = json.loads((save / "complete").read_text())
    files = complete["files"]
    if isinstance(change.get("files"), dict):  # else the other files would be missing already
        keep = {} if change["files"].keys() <= files.keys() | {"complete"} else files
        change = dict(files=keep | {name: files.get(name, "x") for name in change["files"]})
    (save / "complete").write_text(json.dumps(complete | change))
    monkeypatch.setattr(support.saves, "sha256", partial(sha256_inside, out / "resume", support.saves.sha256))
    assert start_without_networks(monkeypatch, out)[0].start == 3
    assert "step_000000004 is damaged (" in capsys.readouterr().err


def sha256_inside(folder: Path, sha256, path: Path, **options) -> str:
    assert path.parent.parent == folder and ".." not in path.parts
    return sha256(path, **options)


def test_unreadable_saves(out, monkeypatch):
    """They are no reason to silently go back to an older save."""
    read = Path.read_bytes

    def refused(path):
        if path.parent.name == "step_000000004":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refused)
    with pytest.raises(ValueError, match="resume cannot be read \\(Permission denied: .*complete\\); make it readable"):
        start_without_networks(monkeypatch, out)
    monkeypatch.setattr(Path, "read_bytes", lambda path: refused(
        out / SAVES[2] / path.name if path.name == "metrics.jsonl" else path))
    shutil.rmtree(out / SAVES[2])
    (out / "metrics.jsonl").write_text("mine")
    shutil.copytree(out / SAVES[1], out / "resume/step_000000070")  # names step 3
    assert start_without_networks(monkeypatch, out)[0].start == 3


def test_a_run_whose_saves_were_deleted_is_not_trained_again(out, tmp_path):
    """Its teacher would be replaced by that of a new run. One that was killed during its first save starts over."""
    ckpt = (out / "ckpt.pth").read_bytes()
    for delete in (lambda: [lose(save) for save in (out / "resume").iterdir()], lambda: lose(out / "resume")):
        delete()
        for flags in ([], ["--resume"]):
            with pytest.raises(ValueError, match="gone, so it cannot be continued; .*ckpt.pth, its teacher, would"):
                set_up_and_release(*FLAGS, "--steps", 6, *flags, "--out", out)
    assert (out / "ckpt.pth").read_bytes() == ckpt
    (out / "resume/partial_0123456789abcdef0123456789abcdef").mkdir(parents=True)
    assert set_up_and_release(*FLAGS, "--steps", 6, "--resume", "--out", out).start == 0
    lose(out / "resume")
    assert set_up_and_release(*FLAGS, "--steps", 6, "--overwrite", "--out", out).start == 0


def test_damage_by_copies_of_saves(out, monkeypatch, capsys):
    """Whatever they are called, they are never used, counted among --keep, or deleted; and nothing in the way of a save
    or an export is lost."""
    become_folder(out / "resume/partial_results", None)
    (out / "resume/partial_0123456789abcdef0123456789abcdef").mkdir()  # of a save that was interrupted
    notes, strange = "step_000000001", ["step_000000070.bak", "step_best", "step_70", "step_0000000005", "notes"]
    for name in strange:
        shutil.copytree(out / SAVES[0], out / "resume" / name)
    become_folder(out / "resume/step_000000001", None)  # no save, though named like one
    (out / "resume/step_000000006").write_text("mine")
    (out / "resume/step_000000009").write_text("mine")
    (out / "eval/training_5").write_text("mine")
    train_main(*FLAGS, "--steps", 6, "--keep", 2, "--resume", "--out", out)
    names = {path.name for path in (out / "resume").iterdir()}
    assert names - {*strange, notes, "partial_results", "step_000000009"} == {"step_000000004", "step_000000006"} | {
        name for name in names if name.startswith("damaged_step_000000006_")} and len(names) == 11
    assert all(content_of(out / "resume" / name).keys() == {*FILES, "complete"} for name in strange)
    assert (out / "eval/training_5/teacher_checkpoint.pth").is_file() and len([*out.glob("eval/damaged_*")]) == 1
    capsys.readouterr()
    for path in (out / "resume").iterdir():
        if path.name not in strange:
            lose(path)
    with pytest.raises(ValueError, match="holds no save with a name like step_000000070, only step_0000000005; rename"):
        train_main(*FLAGS, "--steps", 6, "--resume", "--out", out)


def test_damage_of_the_teacher_of_a_finished_run(out, capsys):
    """Typed again, the command writes ckpt.pth again; else it leaves everything as it is."""
    ckpt, save = out / "ckpt.pth", out / SAVES[2] / "complete"
    before, moment = torch.load(ckpt, weights_only=True), save.stat().st_mtime_ns
    train_main(*FLAGS, "--deterministic", "--out", out)
    assert save.stat().st_mtime_ns == moment
    for harm in (lose, partial(cut, rng=random.Random(1)), change_a_weight):
        harm(ckpt)
        train_main(*FLAGS, "--deterministic", "--out", out)
        after = torch.load(ckpt, weights_only=True)
        assert after["step"] == 4 and all(torch.equal(after["teacher"][k], t) for k, t in before["teacher"].items())
        assert "ckpt.pth is missing or damaged; writing the teacher again" in capsys.readouterr().out
    assert sorted(path.name for path in (out / "resume").iterdir()) == [Path(save).name for save in SAVES]


def change_a_weight(path: Path) -> None:
    ckpt = torch.load(path, weights_only=True)
    next(iter(ckpt["teacher"].values())).view(-1)[0] += 1e-3
    torch.save(ckpt, path)


# ----------------------------------------------------------------------------------------------------------------------
# Saves that this code could not read


def newer_class(metadata) -> None:
    metadata.planner_data = types.SimpleNamespace(written_by="a newer torch")


def not_a_tensor(metadata) -> None:
    metadata.state_dict_metadata["student.x"] = torch.distributed.checkpoint.metadata.BytesStorageMetadata()


def other_name(metadata) -> None:
    entries = metadata.state_dict_metadata
    entries["module.student.x"] = entries.pop(next(iter(entries)))


def other_shape(metadata) -> None:
    next(iter(metadata.state_dict_metadata.values())).size = torch.Size([7])


@pytest.mark.parametrize("change,text", [
    (newer_class, "it holds code, types.SimpleNamespace; nothing in it was run"),
    pytest.param(not_a_tensor, "it holds code, .*BytesStorageMetadata", marks=pytest.mark.slow),
    pytest.param(other_name, "module.student.x was written as", marks=pytest.mark.slow),
    (other_shape, "was written as \\(torch.float32, torch.Size\\(\\[7\\]\\)\\), not as")])
def test_saves_that_could_not_be_read_get_no_name(change, text, tmp_path, monkeypatch, capsys):
    """From step 4 on, PyTorch writes what loading would refuse: the save before stays, each try is reported, and the
    run ends once patience is over."""
    out, write = tmp_path / "out", torch.distributed.checkpoint.save

    def save(tensors, checkpoint_id, process_group):
        write(tensors, checkpoint_id=checkpoint_id, process_group=process_group)
        if (out / "resume/step_000000002").exists():
            path = Path(checkpoint_id, ".metadata")
            metadata = pickle.loads(path.read_bytes())
            change(metadata)
            path.write_bytes(pickle.dumps(metadata))

    monkeypatch.setattr(torch.distributed.checkpoint, "save", save)
    monkeypatch.setattr(support.saves.Saver, "RETRY", 0.0)
    flags = [*TINY, "--steps", 6, "--save-every", 2, "--keep", 1, "--out", out]
    with pytest.raises(support.parallel.Failed, match=f"saving has failed for 0.002 minutes .*{text}.* step 2; free"):
        train_main(*flags, "--save-patience", 0.002)
    said = capsys.readouterr().out
    assert "note: step 4 could not be saved (" in said and "note: step 6 could not be saved (" in said
    assert [path.name for path in (out / "resume").iterdir()] == ["step_000000002"]
    monkeypatch.undo()
    assert set_up_and_release(*flags, "--save-patience", 0.002).start == 2


def test_saves_outlive_the_error_of_a_worker():
    """A crash waits for the save under way, even if a data-loading worker's error is raised in the middle of that."""
    saver, joins = object.__new__(support.saves.Saver), []

    def join(seconds) -> None:
        joins.append(seconds)
        if len(joins) == 1:
            raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    saver.thread = types.SimpleNamespace(join=join, is_alive=lambda: len(joins) < 3)
    saver.__exit__(RuntimeError)
    assert len(joins) == 3


def test_saves_need_names_of_their_own():
    """An entry of the optimizer's state must not have the name of another part of a save."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    state = types.SimpleNamespace(student=torch.nn.ParameterDict(dict(w=parameter)), optimizers=[
        types.SimpleNamespace(state={parameter: dict(teacher=torch.zeros(2))})])
    with pytest.raises(ValueError, match="the optimizer has an entry named 'teacher', a name that saves reserve"):
        support.saves.optimizer_tensors_of(state)


# ----------------------------------------------------------------------------------------------------------------------
# Files of evaluations


@pytest.mark.parametrize("main", [eval_knn.main, eval_linear.main, eval_logreg.main, eval_dense.main])
def test_results_are_added_to_results_only(main, trained, tmp_path):
    """--out that names the checkpoint, or any other file that is no list of results, is refused, and stays."""
    ckpt = shutil.copy(trained / "ckpt.pth", tmp_path / "x.pth")
    shutil.copy(trained / "metrics.jsonl", tmp_path)
    (tmp_path / "list.csv").write_text("a.jpg,cat\n")
    (tmp_path / "folder").mkdir()
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    flags = ["--task", "depth", "--data", tmp_path] if main is eval_dense.main else []
    for name, text in {"x.pth": "exists and does not hold evaluation results; choose another file",
                       "list.csv": "exists", "metrics.jsonl": "exists", "folder": "cannot be written: Is a directory",
                       "none/x": "cannot be written: No such file"}.items():
        with pytest.raises(ValueError, match=f"--out .*{name} {text}"):
            main([str(a) for a in (ckpt, *flags, "--out", tmp_path / name)])
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def test_results_follow_a_line_that_was_cut_off(trained, tmp_path, capsys):
    out = tmp_path / "results.jsonl"
    flags = [str(trained / "ckpt.pth"), "--num-workers", "0", "--out", str(out)]
    out.touch()
    eval_knn.main(flags)
    out.write_text(out.read_text() + '{"evaluation": "kn')
    eval_knn.main(flags)
    first, torn, last = out.read_text().splitlines()
    assert json.loads(first)["result"] == json.loads(last)["result"] and torn == '{"evaluation": "kn'
    ckpt = shutil.copy(trained / "ckpt.pth", tmp_path / "x.pth")
    (tmp_path / "x.eval_knn.jsonl").write_text("mine")  # where results go without --out
    eval_knn.main([str(ckpt), "--num-workers", "0"])
    assert (tmp_path / "x.eval_knn.jsonl").read_text() == "mine"
    assert "could not be written: it does not hold evaluation results" in capsys.readouterr().err


def test_results_of_several_processes(trained, tmp_path):
    """Looking whether --out can be written leaves nothing for another process to trip over; all end alike."""
    support.evaluation.check_writable(str(tmp_path / "new"))
    assert not [*tmp_path.iterdir()]
    argv = ["eval_knn.py", str(trained / "ckpt.pth"), "--out", str(trained / "ckpt.pth")]
    job = Launched(tmp_path / "log", partial(support.cli.run, eval_knn.main), world=2, before=partial(set_argv, argv))
    text = job.wait(2)
    assert text.count("error: --out") == 2 and "Traceback" not in text


def set_argv(argv: list[str]) -> None:
    sys.argv = argv


def test_damage_in_cached_features(trained, tmp_path, capsys):
    """Rows too few, other types, NaN, other content, one bit: computed again, with a note, and kept again."""
    flags = [str(trained / "ckpt.pth"), "--num-workers", "0", "--cache", str(tmp_path / "cache"), "--out",
             str(tmp_path / "results")]
    expected, file, rng = eval_knn.main(flags), min((tmp_path / "cache").iterdir()), random.Random(0)
    good, (table, ok) = file.read_bytes(), torch.load(file, weights_only=True)
    n = len(table)
    assert torch.equal(support.evaluation.load_table(file, n)[0], table)
    for content in ((table[1:], ok), (table[1:], ok[1:]), (table.double(), ok), (table.flatten(), ok),
                    (table, ok.int()), (table * math.nan, ok), (table, ~ok), [1, 2], (table,), dict(table=table),
                    table, "x", *(bytes(good[:n]) for n in (0, 99, len(good) // 2)),
                    *(flipped(good, rng) for _ in range(9))):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        assert support.evaluation.load_table(file, n) is None
        assert f"note: {file} is damaged; computing the features again" in capsys.readouterr().err
    assert eval_knn.main(flags) == expected and file.read_bytes() == good
    file.unlink()
    file.mkdir()  # cannot be written either
    assert eval_knn.main(flags) == expected
    said = capsys.readouterr().err
    assert "is damaged; computing the features again" in said and "could not be written (Is a directory" in said


def test_features_of_a_set_with_unreadable_images_are_cached(trained, tmp_path, monkeypatch):
    """Until one of them can be read."""
    write_images(tmp_path / "photos", [f"{c}/{i}.png" for c in "ab" for i in range(5)])
    broken = tmp_path / "photos/a/3.png"
    good = broken.read_bytes()
    broken.write_bytes(good[:50])
    flags = [str(trained / "ckpt.pth"), "--train", str(tmp_path / "photos"), "--num-workers", "0", "--cache",
             str(tmp_path / "cache"), "--out", str(tmp_path / "results"), "--ks", "3"]
    expected, extract, extracted = eval_knn.main(flags), support.evaluation.extract_features, []
    monkeypatch.setattr(support.evaluation, "extract_features",
                        lambda model, source, *a: extracted.append(len(source)) or extract(model, source, *a))
    assert eval_knn.main(flags) == expected and extracted == []
    broken.write_bytes(good)
    eval_knn.main(flags)
    assert extracted == [10]
    eval_knn.main(flags)
    assert extracted == [10]


def flipped(content: bytes, rng) -> bytes:
    """With one bit changed, in the middle, where the numbers are."""
    changed = bytearray(content)
    changed[rng.randrange(len(content) // 4, len(content) // 2)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def test_damage_in_the_state_of_an_evaluation(tmp_path):
    """One bit, or the state of a command with other settings under this one's name: refused in one line."""
    file = support.evaluation.ResumeFile(tmp_path / "x", ["these"])
    found = []
    state = dict(done=3, values=torch.arange(1000.0))
    file.load(lambda state: found.append(state) or 3, state, 3)
    file.save(state)
    file.load(lambda state: found.append(state["values"]) or 3, dict(done=0, values=torch.zeros(1000)), 3)
    assert len(found) == 1 and torch.equal(found[0], torch.arange(1000.0))
    good, other = file.path.read_bytes(), support.evaluation.ResumeFile(tmp_path / "x", ["others"])
    other.save(state)
    contents = [other.path.read_bytes(), flipped(good, random.Random(0)), good[:-1], b"", b"x" * 99]
    for content in contents:
        file.path.write_bytes(content)
        with pytest.raises(ValueError, match=r"\.resume is damaged; remove it to start from scratch"):
            file.load(lambda state: pytest.fail("it was used"), state, 3)
    file.path.write_bytes(good)
    for like, steps in ((state, 2), (state | dict(more=1), 3), (dict(done=3, values=torch.zeros(999)), 3)):
        with pytest.raises(ValueError, match=r"\.resume is damaged; remove it to start from scratch"):
            file.load(lambda state: pytest.fail("it was used"), like, steps)


def test_export_refuses_its_inputs(trained, tmp_path):
    """Whatever is to be read stays, whichever name it has."""
    write_images(tmp_path, ["a.png"])
    for name in ("m.npz", "m.pt2", "m.safetensors.pth"):
        shutil.copy(trained / "ckpt.pth", tmp_path / name)
    (tmp_path / "link.npz").symlink_to(tmp_path / "m.npz")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for argv in (["features", "a.png", "--model", "m.npz", "--out", "m.npz"],
                 ["features", "a.png", "--model", "m.npz", "--out", "link.npz"],
                 ["program", "m.pt2", "--model", "m.pt2"],
                 ["convert", "m.safetensors.pth", "m.safetensors.pth", "--to", "timm"]):
        argv = [str(tmp_path / a) if (tmp_path / a).exists() else a for a in argv]
        with pytest.raises(ValueError, match="is one of the input files; choose another name"):
            export.main(argv)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "folder.npz").mkdir()
    with pytest.raises(ValueError, match="folder.npz must be a file that ends in .npz, or a folder"):
        export.main(["features", str(tmp_path / "a.png"), "--model", "m", "--out", str(tmp_path / "folder.npz")])


def test_knn_during_training_uses_a_sample(tmp_path, monkeypatch, capsys):
    """Of sets larger than the limits always the same random images, with their labels; one line says so."""
    monkeypatch.setattr(train, "KNN_SAMPLE", (1000, 100))
    sources = [support.sources.open_source(f"digits:split={split}") for split in ("TRAIN", "VAL")]
    knns = [train.Knn(train.Config(), torch.device("cpu"), [sources[0], sources[1]]) for _ in range(2)]
    said = capsys.readouterr().err.splitlines()[:2]
    assert "100 of the" in said[1]
    assert said[0].startswith("note: k-NN during training uses 1,000 of the 1,437 images of digits")
    for first, second, whole, n in zip(knns[0].sources, knns[1].sources, sources, (1000, 100)):
        assert len(first) == n == len(set(first.rows)) and (first.rows == second.rows).all()
        for i in (0, n - 1):
            assert torch.equal(first.image(i), whole.image(first.rows[i]))
            assert first.labels[i] == whole.labels[first.rows[i]] and first.describe(i) == whole.describe(first.rows[i])
    assert knns[0].raw_pixels() is None
    train_main(*FLAGS, "--steps", 2, "--out", tmp_path / "out")
    assert [r["knn"]["top1_k20"] > 20 for r in metrics(tmp_path / "out") if "knn" in r] == [True, True]
    assert capsys.readouterr().err.count("note: k-NN during training") == 2
    monkeypatch.setattr(train, "KNN_SAMPLE", (1437, 360))
    assert train.Knn(train.Config(), torch.device("cpu"), [sources[0], None]).sources == [sources[0], None]


@pytest.mark.parametrize("line", ['{"step": "x", "loss": 1}', '{"step": 1, "loss": "x"}', '{"step": 1, "knn": 5}', "5",
                                  '{"step": 1, "loss": [1]}', '{"step": 1e999, "loss": 1}', "[" * 10**5])
def test_curves_of_damaged_metrics(line, tmp_path):
    (tmp_path / "metrics.jsonl").write_text(line + '\n{"step": 2, "loss": 1.0}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 1, is not a training record"):
        visualize.read_run(str(tmp_path))

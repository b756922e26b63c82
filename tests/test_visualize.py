import itertools
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

import data
import heads
import hub
import visualize
import support.draw
import support.images
from tests.common import (CPU, as_released, assert_close, exit_code, fill_by_names, hub_vit, metrics, pixels_of, randn,
                          size_of, write_images)


def draw(*argv) -> None:
    visualize.main([str(a) for a in argv])


@pytest.fixture(scope="session")
def with_registers(tmp_path_factory) -> Path:
    """An untrained network with 4 registers, patches of 14 pixels, 2 heads and 3 blocks."""
    path = tmp_path_factory.mktemp("visual") / "reg4.pth"
    torch.save(hub_vit(registers=4).state_dict(), path)
    return path


def test_visual_principal_equals_svd():
    """Directions are those of the SVD of all rows, however they are parted, with the largest entry positive."""
    x = randn(0, (300, 7))[0] * torch.tensor([5.0, 4, 3, 2, 1, 1, 1]) @ randn(1, (7, 7))[0] + 3
    mean, directions = visualize.principal_directions([x[:11], x[11:250], x[250:]])
    expected = np.linalg.svd(x.double().numpy() - x.double().numpy().mean(0), full_matrices=False)[2][:3].T  # (7, 3)
    assert_close(mean, x.double().mean(0), 1e-12)
    assert_close(directions.abs(), np.abs(expected), 1e-9)
    assert_close((directions * torch.tensor(expected)).sum(0).abs(), torch.ones(3), 1e-9)
    assert (directions.gather(0, directions.abs().argmax(0)[None]) > 0).all()
    for sign in (1, -1):  # the rows of a mirrored set have the same directions
        assert_close(visualize.principal_directions([sign * x])[1], directions, 1e-9)

    flat = randn(2, (50, 2))[0] @ randn(3, (2, 7))[0]  # two dimensions only
    directions = visualize.principal_directions([flat])[1]
    assert_close(directions.norm(dim=0), torch.tensor([1.0, 1, 0]), 1e-9)
    with pytest.raises(ValueError, match="all patches have the same features"):
        visualize.principal_directions([torch.full((9, 7), 0.3).half()])
    with pytest.raises(ValueError, match="2 dimension.*too few for 3 colors"):
        visualize.principal_directions([x[:, :2]])


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
    assert visualize.otsu_threshold(values) == pytest.approx(np.mean(best), abs=1e-9) and 0.4 < np.mean(best) < 0.65
    assert visualize.otsu_threshold(np.array([0.1] * 30 + [0.9] * 5)) == pytest.approx(0.5, abs=1 / 128)


def test_visual_foreground_is_the_object():
    """Of two kinds of patches those that touch the borders less are foreground; sides and thresholds can be named."""
    kinds, noise = randn(4, (2, 16), (2, 6, 8, 16))
    inside = torch.zeros(2, 6, 8, dtype=torch.bool)
    inside[0, 1:4, 2:7] = inside[1, 3:6, 3:5] = True
    for flip in (False, True):  # whichever kind has the higher component
        parts = list(kinds[(inside ^ flip).long()] + 0.05 * noise)
        assert torch.equal(torch.stack(visualize.foreground_masks(parts)), inside)
        sides = {which: torch.stack(visualize.foreground_masks(parts, which)) for which in ("high", "low", "all")}
        assert sides["all"].all() and torch.equal(sides["high"], ~sides["low"])
        assert any(torch.equal(sides[which], inside) for which in ("high", "low"))
        assert [sum(int(m.sum()) for m in visualize.foreground_masks(parts, "high", t)) for t in (0.0, 1.0)] == [95, 0]
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
    viewer = visualize.Viewer(str(with_registers), "cpu", how, list(map(int, size)))
    for x, y in ((shape[1] // 2, shape[0] // 2), (shape[1] // 2 - 14, shape[0] // 2 + 9)):
        pixels = np.zeros((*shape, 3), np.uint8)
        pixels[y - 2 : y + 3, x - 2 : x + 3] = 255
        Image.fromarray(pixels).save("a.png")
        seen = viewer.read("a.png")
        across, down, row, column = visualize.patch_at(seen, x, y, 14)
        white = np.where(seen.pixels[0].numpy() > 190, 1.0, 0.0)  # the color of what is added is 124
        ys, xs = (np.arange(n) + 0.5 for n in white.shape)
        middle = white.sum(1) @ ys / white.sum(), white.sum(0) @ xs / white.sum()
        assert middle == pytest.approx((down, across), abs=0.8)
        assert (row, column) == (int(down) // 14, int(across) // 14)
        assert white[14 * row : 14 * row + 14, 14 * column : 14 * column + 14].any()


def test_visual_pixels_that_are_not_there(with_registers, desk):
    """The corner pixels of an image are in, those beyond are not, and what --fit crop cuts away is told."""
    write_images(desk, ["a.png"], (61, 93))  # crop to 56x84 cuts 2 and 3 rows, 4 and 5 columns
    seen = {how: visualize.Viewer(str(with_registers), "cpu", how, [0]).read("a.png")
            for how in ("crop", "pad", "resize")}
    find = lambda how, x, y: visualize.patch_at(seen[how], x, y, 14)[2:]  # noqa: E731
    for how, last in (("pad", (4, 6)), ("resize", (3, 6))):
        assert find(how, 0, 0) == (0, 0) and find(how, 92, 60) == last
    kept = []
    for x in range(93):
        try:
            kept.append((x, *find("crop", x, 30)))
        except ValueError as error:
            assert str(error) == f"--at {x},30 was cropped away from a.png; use --fit pad or --fit resize"
    first = kept[0][0]
    assert first in (4, 5) and kept == [(first + i, kept[0][1], i // 14) for i in range(84)]
    for x, y in ((93, 0), (0, 61), (-1, 0), (0, -1), (60, 92)):
        with pytest.raises(ValueError, match=rf"--at {x},{y} lies outside a.png, which is 93 pixels wide and 61 high"):
            find("pad", x, y)


@pytest.mark.parametrize("how", ["crop", "pad", "resize"])
def test_visual_similarity_is_one_at_the_pixel(how, trained, desk, monkeypatch):
    """Cosines to the patch of the pixel: 1 there and less elsewhere, in the image itself and in others."""
    write_images(desk, ["a.png", "b.png"], (30, 50))
    maps, real = [], support.draw.heat_colors
    monkeypatch.setattr(visualize, "heat_colors", lambda *args: maps.append(args) or real(*args))
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
        assert support.draw.ticks(low, high) == expected
    rng = np.random.default_rng(0)
    for low, width, n in zip(rng.normal(0, 50, 200), 10 ** rng.uniform(-3, 6, 200), rng.integers(3, 9, 200)):
        found = support.draw.ticks(low, low + width, int(n))
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
    with pytest.raises(ValueError, match="metrics.jsonl, line 2, is not a training record"):
        visualize.read_run(str(damaged))
    with pytest.raises(ValueError, match="holds no finite value yet"):
        visualize.read_run(str(write_run(desk / "empty", end='{"st')))
    with pytest.raises(ValueError, match="holds no finite"):
        visualize.read_run(str(write_run(desk / "nan", dict(step=0, loss=math.nan), dict(step=1, loss=None))))


def test_visual_curves_go_through_their_points():
    """Lines have their color where their values are, and the picture is white elsewhere; raw pixels are dashed."""
    rgb = [tuple(int(c[i : i + 2], 16) for i in (1, 3, 5)) for c in support.draw.PALETTE]
    runs = {"a": dict(loss=[(0, 0.0), (50, 10.0), (100, 0.0)],
                      knn=[(0, 40.0), (100, 80.0)], knn_raw_pixels=[(0, 60.0)]),
            "b": dict(loss=[(0, 10.0), (100, 10.0)])}
    picture = support.draw.draw_curves(visualize.panels_of(runs))
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
    single = visualize.panels_of({"a": dict(loss=[(0, 1.0)])})  # a single step
    assert support.draw.draw_curves(single).size == (760, 542)


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
    assert support.draw.picture_names(["x/a.png", "y/a.png", "y/b.jpg"]) == ["x_a", "y_a", "y_b"]
    assert support.draw.picture_names(["x/a.png", "x/a.jpg"]) == ["000000_a", "000001_a"]
    assert "sheet" not in support.draw.picture_names(["x/sheet.png", "x/a.png"])


def test_visual_attention_command(with_registers, desk):
    """A row for CLS and each register; in it the image, the mean and each head."""
    write_images(desk, ["a.png"], (56, 84))
    draw("attention", "a.png", "--model", with_registers, "--device", "cpu", "--block", 0, "--size", 0,
         "--out", "at.png")
    left = 12 + math.ceil(support.draw.font().getlength("register 4")) + 12
    assert size_of("at.png") == (left + 4 * (252 + 12), 12 + 5 * (12 + 23 + 168 + 23))  # 84x56, 3 times
    shown = pixels_of("at.png")[12 + 23 :, left : left + 252][:168]
    assert np.array_equal(shown[1::3, 1::3], pixels_of("a.png"))
    cell = pixels_of("at.png")[12 + 23 :, left + 264 :][:168, :252]  # the mean of the heads, 4x6 patches
    maps = visualize.attention_of(hub.load(with_registers), data.normalize(
        torch.tensor(pixels_of("a.png")).permute(2, 0, 1)[None] / 255), 0)[0].mean(0)[5:].unflatten(0, (4, 6)).numpy()
    expected = support.draw.heat_colors(maps, 0, maps.max()).repeat(42, 0).repeat(42, 1)
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
    (["pca", "a.png", *MODEL, "--size", "16", "16", "16"], "--size is the short side"),
    (["pca", "a.png", *MODEL, "--size", "-8"], "--size is the short side"),
    (["pca", "a.png", *MODEL, "--size", "16", "18"], "18 is not a multiple of the patch size 4; the nearest is 16"),
    (["pca", "a.png", *MODEL, "--threshold", "1.5"], "--threshold must be between 0 and 1"),
    (["pca", "a.png", *MODEL, "--foreground", "all", "--threshold", "0.5"], "has no effect with --foreground all"),
    (["pca", "a.png", *MODEL, "--foreground", "high", "--threshold", "1"], "0 patches are foreground"),
    (["pca", "a.png", *MODEL, "--foreground", "high", "--threshold", "1", "--out", "new"], "0 patches are foreground"),
    (["pca", "a.png", "--model", "missing.pth"], "no such checkpoint: missing.pth"),
    (["pca", "a.png", *MODEL, "--out", "only_bad/.."], "would overwrite the images"),
    (["pca", "a.png", *MODEL, "--out", "bad.png/new"], "cannot be written; choose another folder"),
    (["pca", "a.png", *MODEL, "--out", "a.png"], "--out a.png would overwrite the images"),
    (["similarity", "a.png", *MODEL, "--at", "1,1", "--out", "./a.png"], "a.png would overwrite the images"),
    (["attention", "a.png", *MODEL, "--out", "out.jpg"], "--out out.jpg is not a .png file"),
    (["attention", "a.png", *MODEL, "--out", "only_bad"], "--out only_bad is not a .png file.*only_bad/picture.png"),
    (["attention", "a.png", *MODEL, "--block", "99"], "--block 99 does not exist; the model has 0 to "),
    (["attention", "a.png", *MODEL, "--block", "-99"], "--block -99 does not exist"),
    (["similarity", "a.png", *MODEL], "required: --at"),
    (["similarity", "a.png", *MODEL, "--at", "7"], "argument --at"),
    (["similarity", "a.png", *MODEL, "--at", "32,5"], "--at 32,5 lies outside a.png, which is 32 pixels wide"),
    (["similarity", "wide.png", *MODEL, "--at", "0,5", "--size", "16", "16"], "0,5 was cropped away from wide.png"),
    (["neighbors", *MODEL, "--k", "0"], "--k must be 1 to 24"),
    (["neighbors", *MODEL, "--queries", "0"], "--queries or the images 1 to 96"),
    (["neighbors", "a.png", *MODEL, "--data", "missing"], "missing"),
    (["curves", "only_bad"], "only_bad/metrics.jsonl cannot be read; name the --out folder of a run"),
    (["curves", "{run}", "{run}"], "is named twice"),
    (["curves", *["{run}"] * 9], "9 runs are too many"),
    (["curves", "{run}", "--out", "curves.svg"], "--out curves.svg is not a .png file"),
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


def test_visual_wrong_input_is_one_line_and_exit_code_2(desk, capsys):
    assert exit_code("visualize.py", "curves", "gone", "--out", "x.png") == 2
    printed = capsys.readouterr()
    assert printed.out == "" and list(desk.iterdir()) == []
    assert re.fullmatch(r"error: gone cannot be read.*\n", printed.err)


def test_visual_depth_colors_are_magma_from_its_light_end():
    """Some rows of matplotlib's table of that name, the first, the last and five between, within two gray levels; depth
    beyond the ends has their colors, unknown depth is gray, and the bar shows all with the meters."""
    magma = {0: (0, 0, 3), 36: (35, 17, 81), 64: (80, 18, 123), 127: (181, 54, 121), 128: (182, 54, 121),
             191: (251, 134, 96), 255: (251, 252, 191)}
    depth = np.array([[8 - 6 * i / 255 for i in magma]])
    drawn = support.draw.depth_colors(depth, 2, 8).astype(int)
    assert drawn.shape == (1, 7, 3) and np.abs(drawn[0] - [*magma.values()]).max() <= 2
    ends = support.draw.depth_colors(np.array([[0, 1e-3, 2, 8, 99]]), 2, 8)[0].tolist()
    assert ends[0] == [128] * 3 and ends[1] == ends[2] == [252, 253, 191] and ends[3] == ends[4] == [0, 0, 4]
    bright = support.draw.depth_colors(np.linspace(1, 9, 500)[None], 1, 9).astype(float)[0] @ [0.3, 0.59, 0.11]
    assert (np.diff(bright[::10]) < 0).all() and bright[0] > 235 and bright[-1] < 2  # one after the other darker
    bar = support.draw.depth_bar(0.71, 10, 300)
    row = np.asarray(bar)[10].astype(int)
    start = math.ceil(support.draw.font().getlength("0.71")) + 8
    assert bar.width == 300 and np.abs(row[start] - (252, 253, 191)).max() < 4
    end = 300 - math.ceil(support.draw.font().getlength("10.00 m")) - 8
    assert np.abs(row[end - 1] - (0, 0, 4)).max() < 4 and (row[end : end + 6] == 255).all()
    assert support.draw.depth_bar(1, 2, 10).width > 90  # never too short for the text
    assert (np.asarray(support.draw.depth_bar(0, 2, 300)) != 128).any(-1).all()  # 0 is an end here, not unknown


def test_visual_depth_files_are_millimeters(tmp_path):
    depth = np.array([[0, 0.0014, 0.0016], [1.2344, 65.535, 80]], np.float32)
    support.draw.save_depth(tmp_path / "new/d.png", depth)
    with Image.open(tmp_path / "new/d.png") as image:
        assert image.mode.startswith("I;16") and np.asarray(image).tolist() == [[0, 1, 2], [1234, 65535, 65535]]
    again = np.random.default_rng(0).uniform(0.001, 60, (50, 70)).astype(np.float32)
    support.draw.save_depth(tmp_path / "d.png", again)
    assert np.abs(pixels_of(tmp_path / "d.png") / 1000 - again).max() <= 0.00051


def depth_of(network, image: torch.Tensor, rules: dict, size: int = 0, flip: bool = False) -> np.ndarray:
    return heads.predict_depth(network, image, rules["mean"], rules["std"], size, flip).numpy()


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
    assert_close(depth_of(network, image, rules), red + across, 1e-5)
    deep = (image.int() * 257).to(torch.uint16)
    assert_close(depth_of(network, deep, rules), red + across, 1e-5)
    assert_close(depth_of(network, image, rules, flip=True), red + 0.5, 1e-5)
    gray = {k: v[:1] for k, v in rules.items()}
    assert_close(depth_of(Redness(gray), image[:1], gray), red + across, 1e-5)
    network.seen.clear()
    for size in (20, 90):
        smooth = depth_of(network, image, rules, size)
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
    rules = visualize.load_model(trained / "ckpt.pth", CPU)[1]
    images = [support.images.read_image(f"in/{name}.png") for name in ("a", "sub/b")]
    meters = [depth_of(network, image, rules) for image in images]
    with torch.inference_mode():
        own = network(data.normalize(images[0][None] / 255, rules["mean"], rules["std"]))[0, 0]
    assert_close(meters[0], own, 1e-5)
    drawn = [support.draw.depth_colors(m, m.min(), m.max()) for m in meters]

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
    other = depth_of(network, images[0], rules, 16, True)
    assert np.abs(other - meters[0]).max() > 0.01 * np.ptp(meters[0])
    assert np.array_equal(pixels_of("fixed/a.png"), support.draw.depth_colors(other, near, far))

    ckpt = hub.read_file(str(trained / "ckpt.pth"))
    ckpt["config"] |= dict(mean=(0.1, 0.2, 0.3), std=(0.5, 0.5, 0.5))  # a run on other images
    torch.save(ckpt, "other.pth")
    draw("depth", "in/a.png", "--model", "other.pth", *flags[2:], "--out", "other")
    other = depth_of(network, images[0], {k: ckpt["config"][k] for k in ("mean", "std")})
    assert np.abs(other - meters[0]).max() > 0.01 * np.ptp(meters[0])
    assert np.array_equal(pixels_of("other/a.png"), support.draw.depth_colors(other, other.min(), other.max()))
    draw("depth", "in/a.png", *flags[:-1], dense_files / "unknown.pth", "--depth-range", 2, 3, "--out", "range")
    assert 2000 <= pixels_of("range/a_depth.png").min() <= pixels_of("range/a_depth.png").max() <= 3000
    draw("depth", "in/a.png", *flags[:-1], dense_files / "x_kitti_dpt_head.pth", "--far", 0.0001, "--out", "dpt")
    assert (pixels_of("dpt/a_depth.png") >= 1).all()
    assert support.draw.picture_names(["x/a.png", "x/a_depth.png"], "_depth") == ["000000_a", "000001_a_depth"]
    assert support.draw.picture_names(["x/a.png", "x/a_depth.png"], "_labels") == ["a", "a_depth"]


def test_visual_segment_labels_and_legend(tmp_path):
    """The palette's index is the class; what is no class is white; the legend's rows come by their number of pixels."""
    colors = heads.colors(21)
    labels = np.full((20, 50), 15)
    labels[:, :10], labels[:3, 10:20], labels[19, 49], labels[10:20, 20:30] = 0, 20, 7, 255
    drawn = support.draw.label_colors(labels, colors)
    assert drawn.dtype == np.uint8 and drawn.shape == (20, 50, 3)
    assert {k: drawn[labels == k][0].tolist() for k in (0, 7, 15, 20, 255)} == {
        0: [0, 0, 0], 7: [128, 128, 128], 15: [192, 128, 128], 20: [0, 64, 128], 255: [255] * 3}
    support.draw.save_labels(tmp_path / "l.png", labels, colors)
    with Image.open(tmp_path / "l.png") as image:
        assert image.mode == "P" and np.array_equal(np.asarray(image), labels)
        assert np.array_equal(np.asarray(image.convert("RGB")), drawn)
    with pytest.raises(ValueError, match="holds 256 classes, not 300"):
        support.draw.save_labels(tmp_path / "m.png", labels, [(0, 0, 0)] * 300)

    texts, real = [], ImageDraw.ImageDraw.text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageDraw.ImageDraw, "text", lambda self, place, text, *args, **kwargs: (
            texts.append((place, text)), real(self, place, text, *args, **kwargs)))
        shown = support.draw.legend(labels, heads.CLASSES["voc2012"], colors)
        support.draw.legend(labels, heads.CLASSES["voc2012"], colors, 2)
    assert [text for _, text in texts] == ["74.3 %", "person", "22.2 %", "background", "3.3 %", "tvmonitor", "0.1 %",
                                           "car", "74.3 %", "person", "22.2 %", "background", "3.4 %", "and 2 more"]
    assert shown.size == (support.draw.LEGEND_WIDTH, 4 * 23)
    assert [shown.getpixel((9, 23 * row + 9)) for row in range(4)] == [colors[k] for k in (15, 0, 20, 7)]
    assert {x for (x, y), _ in texts} == {76, 86} and [y for (x, y), _ in texts[:8:2]] == [16, 39, 62, 85]
    nothing = support.draw.legend(np.full((3, 3), 255), ["a"], [(1, 2, 3)])
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
    rules = visualize.load_model(trained / "ckpt.pth", CPU)[1]
    for name in "ab":
        image = support.images.read_image(f"{name}.png")
        labels = real(network, image, about.recipe._replace(short=32), rules["mean"], rules["std"]).argmax(0).numpy()
        assert np.array_equal(pixels_of(f"new/{name}_labels.png"), labels) and len(np.unique(labels)) > 1
        colors = support.draw.label_colors(labels, about.colors)
        mixed = 0.6 * colors + 0.4 * image.permute(1, 2, 0).numpy()
        assert np.abs(pixels_of(f"new/{name}.png") - mixed).max() <= 1
    assert size_of("new/sheet.png") == (12 + 2 * 492 + support.draw.LEGEND_WIDTH + 12, 12 + 2 * (12 + 23 + 288))
    cell = pixels_of("new/sheet.png")[12 + 23 + 323 :, 12 + 492 :][:288, :480]  # of b
    assert np.array_equal(cell, pixels_of("new/b.png").repeat(12, 0).repeat(12, 1))

    seen.clear()
    draw("segment", "a.png", *flags, "--opacity", 1, "--out", "full.png")
    cell = pixels_of("full.png")[12 + 23 :, 12 + 492 :][:288, :480]
    assert np.array_equal(cell[::12, ::12], support.draw.label_colors(pixels_of("new/a_labels.png"), about.colors))
    draw("segment", "a.png", *flags, "--flip", "--out", "x.png")
    ms = [*flags[:-3], dense_files / "x_ade20k_ms_head.pth"]
    monkeypatch.setattr(heads, "segment", lambda *args: seen.append(args) or torch.ones(150, 24, 40))
    for more in ([], ["--scales", 3, "--no-flip"], ["--size", 300]):
        draw("segment", "a.png", *ms, *more, "--out", "x.png")
    linear, multi = heads.RECIPES["voc2012", "linear"]._replace(short=32), heads.MULTI_SCALE
    assert [args[2] for args in seen] == [linear, linear._replace(flip=True), multi, multi._replace(
        ratios=(1.0, 1.32, 1.73), flip=False), multi._replace(short=300)]


@pytest.mark.parametrize("argv, text", [
    (["depth", "a.png", "--model", "{ckpt}"], "ckpt.pth is a backbone; give its head by --head.*nyu_dpt or kitti_dpt"),
    (["segment", "a.png", "--model", "{ckpt}"], "is a backbone; give its head by --head.*ade20k_ms or voc2012_ms"),
    (["depth", "a.png", *MODEL, "--head", "{dense}/x_voc2012_linear_head.pth"], "segmentation head; use: .* segment"),
    (["segment", "a.png", *MODEL, "--head", "{dense}/x_kitti_dpt_head.pth"], "depth head; use: .* depth"),
    (["depth", "a.png", *MODEL, "--head", "{dense}/unknown.pth"], "does not say which depths it was trained for; give"),
    (["depth", "a.png", *MODEL, "--head", "nyu_dpt"], "nyu_dpt is a head of the released"),
    (["depth", "a.png", *MODEL, "--head", "{dense}/nan_nyu_linear_head.pth"], "are not finite: the checkpoint"),
    (["segment", "a.png", *MODEL, "--head", "{dense}/nan_voc2012_linear_head.pth", "--size", "16"], "are not finite"),
    (["depth", "a.png", *MODEL, "--head", "x", "--near", "3", "--far", "2"], "--near and --far are meters"),
    (["depth", "a.png", *MODEL, "--head", "x", "--far", "nan"], "--near and --far are meters"),
    (["depth", "a.png", *MODEL, "--head", "x", "--size", "-1"], "--size is a side in pixels"),
    (["segment", "a.png", *MODEL, "--head", "x", "--opacity", "1.5"], "--opacity is between 0 and 1"),
    (["segment", "a.png", *MODEL, "--head", "{dense}/x_ade20k_ms_head.pth", "--scales", "6"], "1 to 5, .* not 6"),
    (["segment", "a.png", *MODEL, "--head", "{dense}/x_ade20k_ms_head.pth", "--scales", "0"], "1 to 5, .* not 0"),
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

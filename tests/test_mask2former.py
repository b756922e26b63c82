import copy
import inspect
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist

import data
import heads
import hub
import mask2former
import model
from tests.common import M2F, M2F_TINY, assert_close, dense_close, fill_by_names, golden_dense, randn


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
    blocked = [(mask2former.bilinear(m, maps[i % 3].shape[-2:]) < 0).flatten(2).all(-1)
               for i, m in enumerate(masks[:-1])]
    assert torch.cat(blocked).any()  # these numbers do tell what happens to queries with empty masks


@torch.inference_mode()
def test_m2f_whole_golden(m2f):
    """A whole image, then overlapping windows, enlarged to the original size, and their label map."""
    images = golden_dense["m2f_reduced/img"]
    dense_close("m2f_reduced/e2e_encode_decode", m2f(images))
    values = heads.bilinear(heads.slide(m2f, images, 64, 32, batch_size=1), (50, 77))
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
    with pytest.raises(ValueError, match="labels 5 to 5, but the network has classes 0 to 4; label pixels"):
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
        with pytest.raises(ValueError, match="vit.pth holds no dense head; name one too"):
            call()
    with pytest.raises(ValueError, match="holds a ViT adapter, as of Mask2Former"):
        hub.load(file)


def about_m2f() -> hub.About:
    names = heads.CLASSES["ade20k"]
    return hub.About("seg", "ade20k", names, heads.colors(150, "ade20k"), heads.RECIPES["ade20k", "m2f"])

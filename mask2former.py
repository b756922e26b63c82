"""Mask2Former on a ViT-Adapter, in plain PyTorch: the network behind DINOv2's best ADE20K segmentation.

    with torch.device("meta"):
        network = Mask2Former()                                # ViT-g/14 and 150 classes, 1.7 G parameters
    network.load_state_dict(weights, assign=True)              # the keys of dinov2_vitg14_ade20k_m2f.pth
    labels = network.eval()(images).argmax(1)                  # images (B, 3, H, W), sides multiples of 32
    loss = total_loss(network.encode(images), label_maps)      # for fine-tuning; the release froze `backbone.blocks`

A ViT sees 14-pixel patches at a single scale. The adapter adds a small convolutional pyramid with strides 4 to 32; the
two exchange information four times. The pixel decoder refines the four resulting maps, and each query, which stands for
one class and one mask, attends to them inside its mask from the previous layer. Images are RGB in 0..1, normalized by
the ImageNet mean and standard deviation. Nothing is padded: the ViT ignores pixels beyond the last whole patch.

This file needs only torch (`match` also scipy) and may be copied on its own. Papers: Mask2Former (Cheng et al. 2022,
arXiv 2112.01527), ViT-Adapter (Chen et al. 2023, arXiv 2205.08534), deformable attention (Zhu et al. 2021, arXiv
2010.04159), DINOv2 (Oquab et al. 2023, arXiv 2304.07193). Apache License 2.0.

Letters in shape comments
    B  images       D  width          C  classes       Q  queries       M  attention heads       h, w  side of a map
    L  levels       P  points         S  concatenated tokens of several maps, row by row         T  masks of an image
    K  points at which masks are compared                                                        N  masks of a batch
"""
import math
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------------------------
# Maps, tokens, positions


Shapes = list[tuple[int, int]]  # (h, w) of the maps whose tokens are concatenated


def to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, h*w, D)


def to_maps(x: Tensor, shapes: Shapes) -> list[Tensor]:
    parts = x.split([h * w for h, w in shapes], dim=1)
    return [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes)]  # each (B, D, h, w)


def bilinear(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))  # half precision becomes float32, float64 stays


def centers(shapes: Shapes, device=None) -> Tensor:
    """(x, y) of the center of every cell, as fractions of the map's width and height: (1, S, 1, 2)."""
    grids = [torch.stack([((torch.arange(w, device=device) + 0.5) / w).expand(h, w),
                          ((torch.arange(h, device=device) + 0.5) / h)[:, None].expand(h, w)], dim=-1)
             for h, w in shapes]
    return torch.cat([g.flatten(0, 1) for g in grids])[None, :, None]


def sine_position(h: int, w: int, dim: int, device=None) -> Tensor:
    """Sinusoidal position embedding of every cell, as in DETR: (h*w, dim) float32, sines and cosines alternating, the
    first half of the channels for the row, the second for the column. Rows are numbered 1 to h, scaled to 2 pi."""
    periods = 10000 ** (torch.arange(0, dim // 2, 2, device=device) / (dim // 2))

    def waves(n: int) -> Tensor:
        angles = torch.arange(1, n + 1, device=device) / (n + 1e-6) * 2 * math.pi
        angles = angles[:, None] / periods  # (n, dim/4)
        return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)  # (n, dim/2)

    rows, columns = waves(h)[:, None].expand(h, w, -1), waves(w).expand(h, w, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1)


# ----------------------------------------------------------------------------------------------------------------------
# Multi-scale deformable attention


def deformable_sampling(value: Tensor, shapes: Shapes, places: Tensor, weights: Tensor) -> Tensor:
    """Weighted sum of values sampled at a few positions of each level (deformable DETR, equation 3).

    Args: value (B, S, M, D/M); places (B, Q, M, L, P, 2), (x, y) as fractions of the map, outside of which values are
    0; weights (B, Q, M, L, P). Returns (B, Q, D), heads concatenated. Half precision is computed in float32; gradients
    flow to all three. One level at a time, since its samples alone are P times as large as the result.
    """
    value, places, weights = full_precision(value), full_precision(places), full_precision(weights)
    total = 0
    for i, level in enumerate(to_maps(value.flatten(2), shapes)):  # (B, D, h, w)
        level = level.unflatten(1, value.shape[2:]).flatten(0, 1)  # (B*M, D/M, h, w)
        grid = 2 * places[:, :, :, i].transpose(1, 2).flatten(0, 1) - 1  # (B*M, Q, P, 2)
        weight = weights[:, :, :, i].transpose(1, 2).flatten(0, 1)  # (B*M, Q, P)
        total = total + (F.grid_sample(level, grid, align_corners=False) * weight[:, None]).sum(-1)  # (B*M, D/M, Q)
    return total.unflatten(0, (len(value), -1)).flatten(1, 2).transpose(1, 2)


class DeformableAttention(nn.Module):
    """Each query samples `points` positions per level and head, at offsets that it predicts from its own position.

    Values are `ratio` * dim wide. At initialization each head looks in a different direction, its points at increasing
    distance, with equal weights.
    """

    def __init__(self, dim: int, levels: int, heads: int, points: int = 4, ratio: float = 1.0):
        super().__init__()
        self.split = (heads, levels, points)
        self.sampling_offsets = nn.Linear(dim, heads * levels * points * 2)
        self.attention_weights = nn.Linear(dim, heads * levels * points)
        self.value_proj = nn.Linear(dim, int(dim * ratio))
        self.output_proj = nn.Linear(int(dim * ratio), dim)
        for parameter in self.parameters():
            nn.init.zeros_(parameter)
        nn.init.xavier_uniform_(self.value_proj.weight)
        nn.init.xavier_uniform_(self.output_proj.weight)
        angles = torch.arange(heads) * 2 * math.pi / heads
        directions = torch.stack([angles.cos(), angles.sin()], dim=-1)  # (M, 2)
        directions = directions / directions.abs().amax(-1, keepdim=True)
        offsets = directions[:, None, None] * torch.arange(1, points + 1)[:, None]  # (M, 1, P, 2)
        self.sampling_offsets.bias.data.copy_(offsets.expand(-1, levels, -1, -1).flatten())

    def forward(self, query: Tensor, places: Tensor, value: Tensor, shapes: Shapes) -> Tensor:
        """query (B, Q, D), its positions `places` (B or 1, Q, L or 1, 2), value (B, S, D) of L maps -> (B, Q, D)."""
        heads, levels, points = self.split
        value = self.value_proj(value).unflatten(-1, (heads, -1))  # (B, S, M, D*ratio/M)
        weights = full_precision(self.attention_weights(query)).unflatten(-1, (heads, levels * points)).softmax(-1)
        offsets = full_precision(self.sampling_offsets(query)).unflatten(-1, (heads, levels, points, 2))
        sizes = torch.tensor([(w, h) for h, w in shapes], device=query.device)[:, None]  # (L, 1, 2)
        places = places[:, :, None, :, None] + offsets / sizes  # (B, Q, M, L, P, 2)
        out = deformable_sampling(value, shapes, places, weights.unflatten(-1, (levels, points)))
        return self.output_proj(out.to(value.dtype))


# ----------------------------------------------------------------------------------------------------------------------
# ViT-Adapter: ViT blocks, a convolutional pyramid, and the attention between the two


class Attention(nn.Module):
    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (B, M, S, D/M)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))  # (B, S, D)


class SwiGLU(nn.Module):
    """Gated feed-forward (Shazeer 2020); w1 and w2 are the two halves of `w12` in DINOv2's weights."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden)
        self.w2 = nn.Linear(dim, hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(F.silu(self.w1(x)) * self.w2(x))


class Block(nn.Module):
    """Pre-norm block of ViT-g with LayerScale: (B, S, D) -> (B, S, D)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float):
        super().__init__()
        self.gamma1 = nn.Parameter(torch.ones(dim))
        self.gamma2 = nn.Parameter(torch.ones(dim))
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, (int(dim * mlp_ratio * 2 / 3) + 7) // 8 * 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.attn(self.norm1(x))
        return x + self.gamma2 * self.mlp(self.norm2(x))


def conv_bn(in_dim: int, dim: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(in_dim, dim, 3, stride, padding=1, bias=False), nn.BatchNorm2d(dim), nn.ReLU(inplace=True)]


class SpatialPrior(nn.Module):
    """Images (B, 3, H, W) -> a map (B, D, H/4, W/4) and the tokens (B, h*w, D) at strides 8, 16, 32. `n` is the width
    of the first convolutions. For training on several GPUs, see nn.SyncBatchNorm.convert_sync_batchnorm."""

    def __init__(self, dim: int, n: int):
        super().__init__()
        self.stem = nn.Sequential(*conv_bn(3, n, 2), *conv_bn(n, n, 1), *conv_bn(n, n, 1), nn.MaxPool2d(3, 2, 1))
        self.conv2 = nn.Sequential(*conv_bn(n, 2 * n, 2))
        self.conv3 = nn.Sequential(*conv_bn(2 * n, 4 * n, 2))
        self.conv4 = nn.Sequential(*conv_bn(4 * n, 4 * n, 2))
        self.fc1 = nn.Conv2d(n, dim, 1)
        self.fc2 = nn.Conv2d(2 * n, dim, 1)
        self.fc3 = nn.Conv2d(4 * n, dim, 1)
        self.fc4 = nn.Conv2d(4 * n, dim, 1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        c1 = self.stem(images)
        c2 = self.conv2(c1)
        c3 = self.conv3(c2)
        c4 = self.conv4(c3)
        return self.fc1(c1), to_tokens(self.fc2(c2)), to_tokens(self.fc3(c3)), to_tokens(self.fc4(c4))


class Injector(nn.Module):
    """The ViT's patch tokens x attend to the pyramid's tokens c. The identity at initialization: gamma is 0."""

    def __init__(self, dim: int, heads: int, points: int, ratio: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(dim))
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = DeformableAttention(dim, 3, heads, points, ratio)

    def forward(self, x: Tensor, c: Tensor, grid: tuple[int, int], shapes: Shapes) -> Tensor:
        places = centers([grid], x.device)
        return x + self.gamma * self.attn(self.query_norm(x), places, self.feat_norm(c), shapes)


class ConvFFN(nn.Module):
    """Feed-forward with a depthwise convolution in the middle, applied to each of the concatenated maps separately."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Sequential(OrderedDict(dwconv=nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        x = torch.cat([to_tokens(self.dwconv(m)) for m in to_maps(self.fc1(x), shapes)], dim=1)  # (B, S, hidden)
        return self.fc2(F.gelu(x))


class Extractor(nn.Module):
    """The pyramid's tokens c attend to the ViT's patch tokens x, followed by a convolutional feed-forward."""

    def __init__(self, dim: int, heads: int, points: int, ratio: float, ffn_ratio: float):
        super().__init__()
        self.query_norm = nn.LayerNorm(dim, eps=1e-6)
        self.feat_norm = nn.LayerNorm(dim, eps=1e-6)
        self.attn = DeformableAttention(dim, 1, heads, points, ratio)
        self.ffn = ConvFFN(dim, int(dim * ffn_ratio))
        self.ffn_norm = nn.LayerNorm(dim, eps=1e-6)

    def forward(self, c: Tensor, x: Tensor, grid: tuple[int, int], shapes: Shapes) -> Tensor:
        c = c + self.attn(self.query_norm(c), centers(shapes, c.device), self.feat_norm(x), [grid])
        return c + self.ffn(self.ffn_norm(c), shapes)


class Interaction(nn.Module):
    """An injector, a group of ViT blocks, and 1 + `extras` extractors. Updates and returns the patch tokens x
    (B, h*w, D) of the `grid`, the pyramid tokens c (B, S, D) and cls (B, 1, D)."""

    def __init__(self, dim: int, heads: int, points: int, ratio: float, ffn_ratio: float, extras: int):
        super().__init__()
        self.injector = Injector(dim, heads, points, ratio)
        self.extractor = Extractor(dim, heads, points, ratio, ffn_ratio)
        self.extra_extractors = nn.ModuleList(Extractor(dim, heads, points, ratio, ffn_ratio) for _ in range(extras))

    def forward(self, x: Tensor, c: Tensor, cls: Tensor, blocks, grid: tuple[int, int], shapes: Shapes):
        x = torch.cat([cls, self.injector(x, c, grid, shapes)], dim=1)
        for block in blocks:
            x = block(x)
        cls, x = x[:, :1], x[:, 1:]
        for extractor in (self.extractor, *self.extra_extractors):
            c = extractor(c, x, grid, shapes)
        return x, c, cls


class ViTAdapter(nn.Module):
    """Images (B, 3, H, W) -> four maps (B, D, H/s, W/s), s = 4, 8, 16, 32.

    The ViT has no final norm here, and its position embedding is resized to the exact size of the patch grid.
    """

    def __init__(self, dim: int, depth: int, num_heads: int, patch_size: int, img_size: int, mlp_ratio: float,
                 conv_dim: int, heads: int, points: int, ratio: float, ffn_ratio: float):
        super().__init__()
        self.patch_size, self.table_side = patch_size, img_size // patch_size
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + self.table_side**2, dim).normal_(std=0.02))
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim).normal_(std=0.02))
        self.level_embed = nn.Parameter(torch.empty(3, dim).normal_())
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, patch_size, patch_size)))
        self.blocks = nn.ModuleList(Block(dim, num_heads, mlp_ratio) for _ in range(depth))
        self.spm = SpatialPrior(dim, conv_dim)
        self.interactions = nn.ModuleList(
            Interaction(dim, heads, points, ratio, ffn_ratio, extras) for extras in (0, 0, 0, 2))
        self.up = nn.ConvTranspose2d(dim, dim, 2, 2)
        self.norm1 = nn.BatchNorm2d(dim)
        self.norm2 = nn.BatchNorm2d(dim)
        self.norm3 = nn.BatchNorm2d(dim)
        self.norm4 = nn.BatchNorm2d(dim)

    def forward(self, images: Tensor) -> list[Tensor]:
        height, width = images.shape[-2:]
        grid = (height // self.patch_size, width // self.patch_size)
        shapes = [(height // s, width // s) for s in (8, 16, 32)]
        c1, *levels = self.spm(images)
        c = torch.cat([level + e for level, e in zip(levels, self.level_embed)], dim=1)  # (B, S, D)
        table = to_maps(self.pos_embed[:, 1:], [(self.table_side, self.table_side)])[0]
        x = self.patch_embed(images) + F.interpolate(table, grid, mode="bicubic", align_corners=False)
        x, cls = to_tokens(x), (self.cls_token + self.pos_embed[:, :1]).expand(len(x), -1, -1).to(x.dtype)
        group, taps = len(self.blocks) // 4, []
        for i, interaction in enumerate(self.interactions):
            x, c, cls = interaction(x, c, cls, self.blocks[i * group : (i + 1) * group], grid, shapes)
            taps += to_maps(x, [grid])
        maps = to_maps(c, shapes)
        maps = [self.up(maps[0]) + c1, *maps]
        norms = (self.norm1, self.norm2, self.norm3, self.norm4)
        return [norm(m + bilinear(tap, m.shape[-2:])) for norm, m, tap in zip(norms, maps, taps)]


# ----------------------------------------------------------------------------------------------------------------------
# Pixel decoder and query decoder. Some modules only nest others, for the parameter names of the released weights.


def feed_forward(dim: int, hidden: int) -> nn.Module:
    inner = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(inplace=True))
    return nn.Sequential(OrderedDict(layers=nn.Sequential(inner, nn.Linear(hidden, dim))))


def conv_gn(in_dim: int, dim: int, kernel: int, bias: bool) -> nn.Module:
    conv = nn.Conv2d(in_dim, dim, kernel, padding=kernel // 2, bias=bias)
    return nn.Sequential(OrderedDict(conv=conv, gn=nn.GroupNorm(32, dim)))


class EncoderLayer(nn.Module):
    """Deformable attention and feed-forward, each followed by its norm: (B, S, D) -> (B, S, D)."""

    def __init__(self, dim: int, heads: int, points: int, ffn_dim: int):
        super().__init__()
        self.attentions = nn.ModuleList([DeformableAttention(dim, 3, heads, points)])
        self.ffns = nn.ModuleList([feed_forward(dim, ffn_dim)])
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))

    def forward(self, x: Tensor, positions: Tensor, places: Tensor, shapes: Shapes) -> Tensor:
        x = self.norms[0](x + self.attentions[0](x + positions, places, x, shapes))
        return self.norms[1](x + self.ffns[0](x))


class PixelDecoder(nn.Module):
    """Four maps (B, in_dim, H/s, W/s), s = 4, 8, 16, 32 -> the mask features (B, D, H/4, W/4) and, for the queries to
    attend to, maps (B, D, h, w) at strides 32, 16, 8."""

    def __init__(self, in_dim: int, dim: int, heads: int, points: int, ffn_dim: int, layers: int):
        super().__init__()
        self.input_convs = nn.ModuleList(conv_gn(in_dim, dim, 1, bias=True) for _ in range(3))
        self.encoder = nn.ModuleDict(dict(
            layers=nn.ModuleList(EncoderLayer(dim, heads, points, ffn_dim) for _ in range(layers))))
        self.level_encoding = nn.Embedding(3, dim)
        self.lateral_convs = nn.ModuleList([conv_gn(in_dim, dim, 1, bias=False)])
        self.output_convs = nn.ModuleList([conv_gn(dim, dim, 3, bias=False)])
        self.mask_feature = nn.Conv2d(dim, dim, 1)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        maps = [conv(f) for conv, f in zip(self.input_convs, features[:0:-1])]  # at strides 32, 16, 8
        shapes = [tuple(m.shape[-2:]) for m in maps]
        x = torch.cat([to_tokens(m) for m in maps], dim=1)  # (B, S, D)
        positions = torch.cat([sine_position(h, w, x.shape[-1], x.device) + level
                               for (h, w), level in zip(shapes, self.level_encoding.weight)]).to(x.dtype)  # (S, D)
        places = centers(shapes, x.device)
        for layer in self.encoder["layers"]:
            x = layer(x, positions, places, shapes)
        maps = to_maps(x, shapes)
        y = self.lateral_convs[0](features[0])
        y = self.output_convs[0](y + bilinear(maps[-1], y.shape[-2:]))
        return self.mask_feature(F.relu(y)), maps


class DecoderLayer(nn.Module):
    """Queries attend to a map, then to each other, then a feed-forward; each is followed by its norm."""

    def __init__(self, dim: int, heads: int, ffn_dim: int):
        super().__init__()
        self.attentions = nn.ModuleList(
            nn.ModuleDict(dict(attn=nn.MultiheadAttention(dim, heads, batch_first=True))) for _ in range(2))
        self.ffns = nn.ModuleList([feed_forward(dim, ffn_dim)])
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(3))

    def forward(self, q: Tensor, q_position: Tensor, memory: Tensor, position: Tensor, blocked: Tensor) -> Tensor:
        """q, q_position (B, Q, D), memory (B, h*w, D), position (h*w, D), blocked (B, Q, h*w) bool -> (B, Q, D)."""
        to_map, to_others = (attention["attn"] for attention in self.attentions)
        blocked = blocked.repeat_interleave(to_map.num_heads, dim=0)  # (B*M, Q, h*w)
        read = to_map(q + q_position, memory + position, memory, attn_mask=blocked, need_weights=False)[0]
        q = self.norms[0](q + read)
        read = to_others(q + q_position, q + q_position, q, need_weights=False)[0]
        q = self.norms[1](q + read)
        return self.norms[2](q + self.ffns[0](q))


def blocked_places(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """The attention mask on a map of `size`, for queries with mask logits (B, Q, h, w): (B, Q, h*w) bool, True outside
    the query's mask (Mask2Former, section 3.2.1). A query with an empty mask attends everywhere."""
    blocked = (bilinear(masks, size).sigmoid() < 0.5).flatten(2)
    return blocked & ~blocked.all(-1, keepdim=True)


class MaskDecoder(nn.Module):
    """Four maps (B, in_dim, H/s, W/s), s = 4, 8, 16, 32 -> the predictions before the first layer and after each, as
    pairs: class logits (B, Q, C+1), the last for "none", and mask logits (B, Q, H/4, W/4)."""

    def __init__(self, in_dim: int, n_classes: int, dim: int, heads: int, deform_heads: int, points: int, ffn_dim: int,
                 n_queries: int, encoder_layers: int, decoder_layers: int):
        super().__init__()
        self.pixel_decoder = PixelDecoder(in_dim, dim, deform_heads, points, ffn_dim, encoder_layers)
        self.transformer_decoder = nn.ModuleDict(dict(
            layers=nn.ModuleList(DecoderLayer(dim, heads, ffn_dim) for _ in range(decoder_layers)),
            post_norm=nn.LayerNorm(dim)))
        self.query_embed = nn.Embedding(n_queries, dim)  # position embedding of the queries
        self.query_feat = nn.Embedding(n_queries, dim)
        self.level_embed = nn.Embedding(3, dim)
        self.cls_embed = nn.Linear(dim, n_classes + 1)
        self.mask_embed = nn.Sequential(
            nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim), nn.ReLU(), nn.Linear(dim, dim))

    def predict(self, q: Tensor, mask_feature: Tensor) -> tuple[Tensor, Tensor]:
        z = self.transformer_decoder["post_norm"](q)
        return self.cls_embed(z), torch.einsum("bqd,bdhw->bqhw", self.mask_embed(z), mask_feature)

    def forward(self, features: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        mask_feature, maps = self.pixel_decoder(features)
        sizes = [tuple(m.shape[-2:]) for m in maps]
        memories = [to_tokens(m) + level for m, level in zip(maps, self.level_embed.weight)]  # each (B, h*w, D)
        positions = [sine_position(*size, m.shape[-1], m.device).to(m.dtype) for size, m in zip(sizes, memories)]
        q = self.query_feat.weight.expand(len(mask_feature), -1, -1)  # (B, Q, D)
        q_position = self.query_embed.weight.expand_as(q)
        outputs = [self.predict(q, mask_feature)]
        for i, layer in enumerate(self.transformer_decoder["layers"]):
            level = i % 3  # coarse to fine, repeatedly
            blocked = blocked_places(outputs[-1][1], sizes[level])
            q = layer(q, q_position, memories[level], positions[level], blocked)
            outputs.append(self.predict(q, mask_feature))
        return outputs


# ----------------------------------------------------------------------------------------------------------------------
# The network


def class_maps(logits: Tensor, masks: Tensor) -> Tensor:
    """Sum over queries of class probability times mask probability: (B, Q, C+1), (B, Q, h, w) -> (B, C, h, w) float32,
    without the class "none" (MaskFormer, Cheng et al. 2021, arXiv 2107.06278, section 3.4)."""
    with torch.autocast(logits.device.type, enabled=False):
        classes, masks = full_precision(logits).softmax(-1)[..., :-1], full_precision(masks).sigmoid()
        return torch.einsum("bqc,bqhw->bchw", classes, masks)


class Mask2Former(nn.Module):
    """Semantic segmentation. The defaults, and the parameter names, are those of the released ViT-g/14 for ADE20K.

    Args:
        n_classes: without "none", which the network adds.
        embed_dim, depth, num_heads, patch_size, img_size, mlp_ratio: of the ViT. `img_size` only determines the size of
            the position embedding.
        conv_dim: width of the adapter's first convolutions. adapter_heads, adapter_ratio, adapter_ffn_ratio: of the
            deformable attention and feed-forward between it and the ViT.
        decoder_dim, decoder_ffn_dim: width of both decoders. decoder_heads: of the queries' attention, which the shapes
            of the weights do not reveal. deform_heads: of the pixel decoder.
        encoder_layers, decoder_layers: of the pixel decoder and of the query decoder.
        n_points: sampled per level by each head of deformable attention.

    There is no stochastic depth. Raises ValueError for sizes that do not divide.
    """

    multiple = 32  # of which the sides of images must be multiples

    def __init__(self, n_classes: int = 150, embed_dim: int = 1536, depth: int = 40, num_heads: int = 24,
                 patch_size: int = 14, img_size: int = 518, mlp_ratio: float = 4.0, conv_dim: int = 64,
                 adapter_heads: int = 24, adapter_ratio: float = 0.5, adapter_ffn_ratio: float = 0.25,
                 decoder_dim: int = 1536, decoder_heads: int = 32, deform_heads: int = 32, decoder_ffn_dim: int = 6144,
                 n_queries: int = 100, encoder_layers: int = 6, decoder_layers: int = 9, n_points: int = 4):
        super().__init__()
        for name, size, parts in (("depth", depth, 4), ("embed_dim", embed_dim, num_heads),  # 4 groups of blocks
                                  ("embed_dim * adapter_ratio", int(embed_dim * adapter_ratio), adapter_heads),
                                  ("decoder_dim", decoder_dim, decoder_heads),
                                  ("decoder_dim", decoder_dim, deform_heads),
                                  ("decoder_dim", decoder_dim, 32)):  # the groups of GroupNorm
            if size % parts:
                raise ValueError(f"{name} {size} is not a multiple of {parts}; make it {max(size // parts, 1) * parts}")
        self.backbone = ViTAdapter(embed_dim, depth, num_heads, patch_size, img_size, mlp_ratio, conv_dim,
                                   adapter_heads, n_points, adapter_ratio, adapter_ffn_ratio)
        self.decode_head = MaskDecoder(embed_dim, n_classes, decoder_dim, decoder_heads, deform_heads, n_points,
                                       decoder_ffn_dim, n_queries, encoder_layers, decoder_layers)

    def encode(self, images: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Predictions before the first decoder layer and after each, as total_loss takes them: pairs of class logits
        (B, Q, C+1), the last for "none", and mask logits (B, Q, H/4, W/4). Raises ValueError unless both sides of the
        images are multiples of 32."""
        height, width = images.shape[-2:]
        if height % self.multiple or width % self.multiple or not height or not width:
            up = " x ".join(str(max(math.ceil(n / self.multiple), 1) * self.multiple) for n in (height, width))
            raise ValueError(f"image {height} x {width}: sides must be multiples of {self.multiple}; resize it to {up}")
        return self.decode_head(self.backbone(images))

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (B, 3, H, W) -> (B, C, H, W) float32: sums of probabilities, not logits; the largest is the
        predicted class. Raises ValueError unless H and W are multiples of 32."""
        return bilinear(class_maps(*self.encode(images)[-1]), images.shape[-2:])


# ----------------------------------------------------------------------------------------------------------------------
# Losses. Masks are compared at sampled points only (Mask2Former, section 3.3), whatever their resolution.


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Values of maps (B, C, h, w) at points (B, K, 2), (x, y) in 0..1 of the map: (B, C, K), bilinear."""
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[..., 0]


@torch.no_grad()
def uncertain_points(masks: Tensor, n_points: int, oversample: float = 3.0, importance: float = 0.75) -> Tensor:
    """Points (N, K, 2) for mask logits (N, h, w): the `importance` * K most uncertain of `oversample` * K random ones,
    the others at random (PointRend, Kirillov et al. 2020, arXiv 1912.08193, section 3.1)."""
    n_uncertain = int(importance * n_points)
    points = torch.rand(len(masks), int(oversample * n_points), 2, device=masks.device)
    nearest = point_sample(masks[:, None], points)[:, 0].abs().topk(n_uncertain, largest=False)[1]  # (N, importance*K)
    points = points.gather(1, nearest[..., None].expand(-1, -1, 2))
    return torch.cat([points, torch.rand(len(masks), n_points - n_uncertain, 2, device=masks.device)], dim=1)


@torch.no_grad()
def match_costs(logits: Tensor, masks: Tensor, classes: Tensor, targets: Tensor,
                weights=(2.0, 5.0, 5.0)) -> list[Tensor]:
    """Weighted costs of assigning target t to query q: [class, mask, dice], each (Q, T).

    Args: logits (Q, C+1); masks (Q, K), logits at points; classes (T,) int64; targets (T, K) in 0..1 at those points.
    """
    mask = F.softplus(masks).mean(-1, keepdim=True) - masks @ targets.T / masks.shape[-1]  # binary cross-entropy
    p = masks.sigmoid()
    dice = 1 - (2 * p @ targets.T + 1) / (p.sum(-1, keepdim=True) + targets.sum(-1) + 1)
    return [w * cost for w, cost in zip(weights, (-logits.softmax(-1)[:, classes], mask, dice))]


@torch.no_grad()
def match(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The cheapest one-to-one assignment for a cost (Q, T): queries (n,) and their targets (n,)."""
    from scipy.optimize import linear_sum_assignment  # comes with scikit-learn; only needed for training
    queries, targets = linear_sum_assignment(cost.cpu().numpy())
    return torch.from_numpy(queries).to(cost.device), torch.from_numpy(targets).to(cost.device)


def class_loss(logits: Tensor, classes: Tensor, none_weight: float = 0.1) -> Tensor:
    """Mean cross-entropy of logits (B, Q, C+1) and classes (B, Q), where C, "none", has weight `none_weight`."""
    weights = logits.new_ones(logits.shape[-1])
    weights[-1] = none_weight
    return F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weights)


def mask_loss(masks: Tensor, targets: Tensor, n_masks: float) -> Tensor:
    """Binary cross-entropy of logits (N, K) and targets (N, K): mean over points, sum over masks / n_masks."""
    return F.binary_cross_entropy_with_logits(masks, targets, reduction="none").mean(-1).sum() / n_masks


def dice_loss(masks: Tensor, targets: Tensor, n_masks: float) -> Tensor:
    """1 - (2 |ab| + 1) / (|a| + |b| + 1), with a the sigmoid of logits (N, K), b targets (N, K); sum / n_masks."""
    p = masks.sigmoid()
    return (1 - (2 * (p * targets).sum(-1) + 1) / (p.sum(-1) + targets.sum(-1) + 1)).sum() / n_masks


def layer_loss(logits: Tensor, masks: Tensor, targets: list[tuple[Tensor, Tensor]], n_points: int,
               weights) -> Tensor:
    """The loss of one pair of outputs (B, Q, C+1), (B, Q, h, w). targets: per image, the classes (T,) int64 and masks
    (T, H, W). The sum over masks is divided by their number, averaged over processes."""
    wanted = torch.full(logits.shape[:2], logits.shape[-1] - 1, device=logits.device)  # "none" unless matched
    chosen, truths = [], []
    for i, (classes, truth) in enumerate(targets):
        points = torch.rand(1, n_points, 2, device=masks.device)
        costs = match_costs(logits[i], point_sample(masks[i : i + 1], points)[0], classes,
                            point_sample(truth[None], points)[0], weights)
        queries, order = match(sum(costs))
        wanted[i, queries] = classes[order]
        chosen.append(masks[i, queries])
        truths.append(truth[order])
    chosen, truths = torch.cat(chosen), torch.cat(truths)  # (N, h, w), (N, H, W)
    points = uncertain_points(chosen, n_points)
    a, b = point_sample(chosen[:, None], points)[:, 0], point_sample(truths[:, None], points)[:, 0]  # (N, K)
    n_masks = torch.tensor(float(len(chosen)), device=masks.device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(n_masks)
        n_masks = n_masks / dist.get_world_size()
    losses = class_loss(logits, wanted), mask_loss(a, b, n_masks.clamp(min=1)), dice_loss(a, b, n_masks.clamp(min=1))
    return sum(w * loss for w, loss in zip(weights, losses))


def total_loss(outputs: list[tuple[Tensor, Tensor]], labels: Tensor, n_points: int = 12544, ignore: int = 255,
               weights=(2.0, 5.0, 5.0)) -> Tensor:
    """The training loss (), summed over all predictions of Mask2Former.encode (Mask2Former, section 4.1).

    labels (B, H, W): integers 0 to C-1, at any resolution. Each class present is one target mask; `ignore` is none.
    `weights` are those of the class, mask and dice losses. Points are drawn from torch's global generator. Raises
    ValueError for labels of the wrong shape or outside the classes.
    """
    outputs = [(full_precision(logits), full_precision(masks)) for logits, masks in outputs]
    batch, n_classes, targets = len(outputs[0][0]), outputs[0][0].shape[-1] - 1, []
    if labels.ndim != 3 or len(labels) != batch:
        raise ValueError(f"labels of shape {tuple(labels.shape)}; pass one map per image, ({batch}, H, W)")
    for image in labels:
        classes = image.unique().long()
        classes = classes[classes != ignore]
        if len(classes) and not 0 <= classes[0] <= classes[-1] < n_classes:
            raise ValueError(f"labels {classes[0]} to {classes[-1]}, but the network has classes 0 to {n_classes - 1}; "
                             f"label pixels without a class {ignore}, and subtract 1 if classes start at 1")
        targets.append((classes, (image == classes[:, None, None]).to(outputs[0][1].dtype)))
    with torch.autocast(labels.device.type, enabled=False):
        return sum(layer_loss(logits, masks, targets, n_points, weights) for logits, masks in outputs)

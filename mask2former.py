"""Mask2Former over a ViT-Adapter, in plain PyTorch: the network of DINOv2's best ADE20K segmentation.

    with torch.device("meta"):
        network = Mask2Former()                                # ViT-g/14 and 150 classes, 1.7 G parameters
    network.load_state_dict(weights, assign=True)              # keys are those of dinov2_vitg14_ade20k_m2f.pth
    labels = network.eval()(images).argmax(1)                  # images (B, 3, H, W), sides multiples of 32
    loss = total_loss(network.encode(images), label_maps)      # to fine-tune; the release kept `backbone.blocks` frozen

A ViT sees patches of 14 pixels, at one scale. The adapter sets a small convolutional pyramid of strides 4 to 32 beside
it; four times the two read from each other. The pixel decoder refines the four maps that result, and queries, each one
class and one mask, look at them through their own masks of the layer before. Images are RGB in 0..1, normalized by the
ImageNet mean and deviation. Nothing is padded: the ViT leaves out what exceeds whole patches.

This file needs torch alone (`match` also scipy) and may be copied on its own. Papers: Mask2Former (Cheng et al. 2022,
arXiv 2112.01527), ViT-Adapter (Chen et al. 2023, arXiv 2205.08534), deformable attention (Zhu et al. 2021, arXiv
2010.04159), DINOv2 (Oquab et al. 2023, arXiv 2304.07193). Apache License 2.0.

Letters in shape comments
    B  images       D  width          C  classes       Q  queries       M  attention heads       h, w  side of a map
    L  levels       P  points         S  tokens of several maps, joined, each row by row         T  masks of an image
    K  points at which masks are compared                                                        N  masks of a batch
"""
import math
from collections import OrderedDict

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

# ----------------------------------------------------------------------------------------------------------------------
# Maps, tokens, places


Shapes = list[tuple[int, int]]  # (h, w) of the maps whose tokens are joined


def to_tokens(x: Tensor) -> Tensor:
    return x.flatten(2).transpose(1, 2)  # (B, D, h, w) -> (B, h*w, D)


def to_maps(x: Tensor, shapes: Shapes) -> list[Tensor]:
    parts = x.split([h * w for h, w in shapes], dim=1)
    return [part.transpose(1, 2).unflatten(2, shape) for part, shape in zip(parts, shapes)]  # each (B, D, h, w)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    return F.interpolate(x, size, mode="bilinear", align_corners=False)


def full_precision(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))  # half types become float32, float64 stays


def centers(shapes: Shapes, device=None) -> Tensor:
    """(x, y) of the middle of every cell, in parts of the map's width and height: (1, S, 1, 2)."""
    grids = [torch.stack([((torch.arange(w, device=device) + 0.5) / w).expand(h, w),
                          ((torch.arange(h, device=device) + 0.5) / h)[:, None].expand(h, w)], dim=-1)
             for h, w in shapes]
    return torch.cat([g.flatten(0, 1) for g in grids])[None, :, None]


def sine_position(h: int, w: int, dim: int, device=None) -> Tensor:
    """Position of every cell as sines and cosines in turn: (h*w, dim) float32, the first half of the channels for the
    row, the second for the column. Rows count 1 to h, scaled so that the last is at 2 pi (DETR's embedding)."""
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
    """Weighted sum of values read at a few places of each level (deformable DETR, equation 3).

    Args: value (B, S, M, D/M); places (B, Q, M, L, P, 2), (x, y) in parts of the map, outside of which values are 0;
    weights (B, Q, M, L, P). Returns (B, Q, D), heads one after another. Computed in float32 if given less; gradients go
    to all three. Level by level, since the samples of one alone are P times as large as the result.
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
    """Each query reads `points` places per level and head, at offsets from its own place that it chooses itself.

    `ratio` narrows the values to dim * ratio. At the start the heads look into directions all around, the points of a
    head at growing distance, with equal weights.
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
        """query (B, Q, D), its places (B or 1, Q, L or 1, 2), value (B, S, D) of L maps of `shapes` -> (B, Q, D)."""
        heads, levels, points = self.split
        value = self.value_proj(value).unflatten(-1, (heads, -1))  # (B, S, M, D*ratio/M)
        weights = full_precision(self.attention_weights(query)).unflatten(-1, (heads, levels * points)).softmax(-1)
        offsets = full_precision(self.sampling_offsets(query)).unflatten(-1, (heads, levels, points, 2))
        sizes = torch.tensor([(w, h) for h, w in shapes], device=query.device)[:, None]  # (L, 1, 2)
        places = places[:, :, None, :, None] + offsets / sizes  # (B, Q, M, L, P, 2)
        out = deformable_sampling(value, shapes, places, weights.unflatten(-1, (levels, points)))
        return self.output_proj(out.to(value.dtype))


# ----------------------------------------------------------------------------------------------------------------------
# ViT-Adapter: ViT blocks, the convolutional pyramid beside them, and what passes between the two


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
    """Gated feed-forward (Shazeer 2020); w1 and w2 are the halves of `w12` in DINOv2's own weights."""

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
    """Images (B, 3, H, W) -> a map (B, D, H/4, W/4) and the tokens (B, h*w, D) of strides 8, 16, 32. `n` is the width
    of the first convolutions. To train on several GPUs, see nn.SyncBatchNorm.convert_sync_batchnorm."""

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
    """The ViT's patch tokens x read from the pyramid's tokens c. Without effect at the start: gamma is 0."""

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
    """Feed-forward with a depth-wise convolution in the middle, over each of the joined maps on its own."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.dwconv = nn.Sequential(OrderedDict(dwconv=nn.Conv2d(hidden, hidden, 3, padding=1, groups=hidden)))
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor, shapes: Shapes) -> Tensor:
        x = torch.cat([to_tokens(self.dwconv(m)) for m in to_maps(self.fc1(x), shapes)], dim=1)  # (B, S, hidden)
        return self.fc2(F.gelu(x))


class Extractor(nn.Module):
    """The pyramid's tokens c read from the ViT's patch tokens x, then a feed-forward among neighbors."""

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
    """A group of ViT blocks with an injector before and an extractor, and `extras` more, after it. Patch tokens x
    (B, h*w, D) of the `grid`, pyramid tokens c (B, S, D) and cls (B, 1, D) come back as they are then."""

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

    The ViT has no final norm here, and its position table is resized to the patch grid itself, by size.
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
        return [norm(m + resize(tap, m.shape[-2:])) for norm, m, tap in zip(norms, maps, taps)]


# ----------------------------------------------------------------------------------------------------------------------
# Pixel decoder and query decoder. Some modules only hold others, under the names of the released weights.


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
    """Four maps (B, in_dim, H/s, W/s), s = 4, 8, 16, 32 -> the map that masks are read from (B, D, H/4, W/4), and maps
    (B, D, h, w) of strides 32, 16, 8 for the queries to look at."""

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
        maps = [conv(f) for conv, f in zip(self.input_convs, features[:0:-1])]  # of strides 32, 16, 8
        shapes = [tuple(m.shape[-2:]) for m in maps]
        x = torch.cat([to_tokens(m) for m in maps], dim=1)  # (B, S, D)
        positions = torch.cat([sine_position(h, w, x.shape[-1], x.device) + level
                               for (h, w), level in zip(shapes, self.level_encoding.weight)]).to(x.dtype)  # (S, D)
        places = centers(shapes, x.device)
        for layer in self.encoder["layers"]:
            x = layer(x, positions, places, shapes)
        maps = to_maps(x, shapes)
        y = self.lateral_convs[0](features[0])
        y = self.output_convs[0](y + resize(maps[-1], y.shape[-2:]))
        return self.mask_feature(F.relu(y)), maps


class DecoderLayer(nn.Module):
    """Queries read from a map, then from each other, then a feed-forward, each followed by its norm."""

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
    """Where queries with these mask logits (B, Q, h, w) may not look on a map of `size`: (B, Q, h*w) bool, True outside
    of the mask (Mask2Former, section 3.2.1). A query whose mask is empty may look everywhere."""
    blocked = (resize(masks, size).sigmoid() < 0.5).flatten(2)
    return blocked & ~blocked.all(-1, keepdim=True)


class MaskDecoder(nn.Module):
    """Four maps (B, in_dim, H/s, W/s), s = 4, 8, 16, 32 -> a list of pairs, of the queries before the first layer and
    after each: class logits (B, Q, C+1), "none" last, and mask logits (B, Q, H/4, W/4)."""

    def __init__(self, in_dim: int, n_classes: int, dim: int, heads: int, deform_heads: int, points: int, ffn_dim: int,
                 n_queries: int, encoder_layers: int, decoder_layers: int):
        super().__init__()
        self.pixel_decoder = PixelDecoder(in_dim, dim, deform_heads, points, ffn_dim, encoder_layers)
        self.transformer_decoder = nn.ModuleDict(dict(
            layers=nn.ModuleList(DecoderLayer(dim, heads, ffn_dim) for _ in range(decoder_layers)),
            post_norm=nn.LayerNorm(dim)))
        self.query_embed = nn.Embedding(n_queries, dim)  # position of the queries
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
            level = i % 3  # coarse to fine, again and again
            blocked = blocked_places(outputs[-1][1], sizes[level])
            q = layer(q, q_position, memories[level], positions[level], blocked)
            outputs.append(self.predict(q, mask_feature))
        return outputs


# ----------------------------------------------------------------------------------------------------------------------
# The network


def class_maps(logits: Tensor, masks: Tensor) -> Tensor:
    """Sum over the queries of class probability times mask probability: (B, Q, C+1), (B, Q, h, w) -> (B, C, h, w)
    float32. Probabilities of "none" are left out (MaskFormer, Cheng et al. 2021, arXiv 2107.06278, section 3.4)."""
    with torch.autocast(logits.device.type, enabled=False):
        classes, masks = full_precision(logits).softmax(-1)[..., :-1], full_precision(masks).sigmoid()
        return torch.einsum("bqc,bqhw->bchw", classes, masks)


class Mask2Former(nn.Module):
    """Semantic segmentation; the defaults are the released DINOv2 ViT-g/14 for ADE20K, and parameter names are its.

    Args:
        n_classes: without "none", which the network adds.
        embed_dim, depth, num_heads, patch_size, img_size, mlp_ratio: of the ViT. `img_size` sets the size of the
            position table alone.
        conv_dim: width of the first convolutions of the adapter. adapter_heads, adapter_ratio, adapter_ffn_ratio: of
            the deformable attention and feed-forward between it and the ViT.
        decoder_dim, decoder_ffn_dim: width of both decoders. decoder_heads: of the attention of queries; the shapes of
            weights do not tell it. deform_heads: of the pixel decoder.
        encoder_layers, decoder_layers: of the pixel decoder, of the query decoder.
        n_points: places that a head of deformable attention reads per level, everywhere.

    There is no stochastic depth. Raises ValueError for sizes that do not divide.
    """

    multiple = 32  # sides of images must be multiples of it

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
        """Predictions before the first and after every decoder layer, as total_loss takes them: a list of pairs, class
        logits (B, Q, C+1), "none" last, and mask logits (B, Q, H/4, W/4). Raises ValueError for sides that do not fit.
        """
        height, width = images.shape[-2:]
        if height % self.multiple or width % self.multiple or not height or not width:
            up = " x ".join(str(max(math.ceil(n / self.multiple), 1) * self.multiple) for n in (height, width))
            raise ValueError(f"image {height} x {width}: sides must be multiples of {self.multiple}; resize it to {up}")
        return self.decode_head(self.backbone(images))

    def forward(self, images: Tensor) -> Tensor:
        """Normalized images (B, 3, H, W) -> (B, C, H, W) float32. Values are sums of probabilities, not logits; the
        largest names the class. H and W are multiples of 32, else ValueError."""
        return resize(class_maps(*self.encode(images)[-1]), images.shape[-2:])


# ----------------------------------------------------------------------------------------------------------------------
# Losses. Masks are compared at points only (Mask2Former, section 3.3), so that their size does not matter.


def point_sample(maps: Tensor, points: Tensor) -> Tensor:
    """Values of maps (B, C, h, w) at points (B, K, 2), (x, y) in 0..1 of the map: (B, C, K), bilinear."""
    return F.grid_sample(maps, 2 * points[:, :, None] - 1, align_corners=False)[..., 0]


@torch.no_grad()
def uncertain_points(masks: Tensor, n_points: int, oversample: float = 3.0, importance: float = 0.75) -> Tensor:
    """Points (N, K, 2) for masks of logits (N, h, w): of `oversample` * K random ones the `importance` * K at which the
    mask is least decided, the rest anywhere (PointRend, Kirillov et al. 2020, arXiv 1912.08193, section 3.1)."""
    n_uncertain = int(importance * n_points)
    points = torch.rand(len(masks), int(oversample * n_points), 2, device=masks.device)
    nearest = point_sample(masks[:, None], points)[:, 0].abs().topk(n_uncertain, largest=False)[1]  # (N, importance*K)
    points = points.gather(1, nearest[..., None].expand(-1, -1, 2))
    return torch.cat([points, torch.rand(len(masks), n_points - n_uncertain, 2, device=masks.device)], dim=1)


@torch.no_grad()
def match_costs(logits: Tensor, masks: Tensor, classes: Tensor, targets: Tensor,
                weights=(2.0, 5.0, 5.0)) -> list[Tensor]:
    """Costs of giving query q the target t: [class, mask, dice], each (Q, T), times its weight.

    Args: logits (Q, C+1); masks (Q, K), logits at points; classes (T,) int64; targets (T, K) in 0..1 at these points.
    """
    mask = F.softplus(masks).mean(-1, keepdim=True) - masks @ targets.T / masks.shape[-1]  # binary cross-entropy
    p = masks.sigmoid()
    dice = 1 - (2 * p @ targets.T + 1) / (p.sum(-1, keepdim=True) + targets.sum(-1) + 1)
    return [w * cost for w, cost in zip(weights, (-logits.softmax(-1)[:, classes], mask, dice))]


@torch.no_grad()
def match(cost: Tensor) -> tuple[Tensor, Tensor]:
    """The pairs of the cheapest one-to-one assignment: queries (n,) and their targets (n,) of a cost (Q, T)."""
    from scipy.optimize import linear_sum_assignment  # comes with scikit-learn; needed for training alone
    queries, targets = linear_sum_assignment(cost.cpu().numpy())
    return torch.from_numpy(queries).to(cost.device), torch.from_numpy(targets).to(cost.device)


def class_loss(logits: Tensor, classes: Tensor, none_weight: float = 0.1) -> Tensor:
    """Cross-entropy of logits (B, Q, C+1) and classes (B, Q), C for "none", which counts `none_weight`; averaged."""
    weights = logits.new_ones(logits.shape[-1])
    weights[-1] = none_weight
    return F.cross_entropy(logits.flatten(0, 1), classes.flatten(), weights)


def mask_loss(masks: Tensor, targets: Tensor, n_masks: float) -> Tensor:
    """Binary cross-entropy of logits (N, K) and targets (N, K), mean over the points, sum over the masks / n_masks."""
    return F.binary_cross_entropy_with_logits(masks, targets, reduction="none").mean(-1).sum() / n_masks


def dice_loss(masks: Tensor, targets: Tensor, n_masks: float) -> Tensor:
    """1 - (2 |ab| + 1) / (|a| + |b| + 1), a the probabilities of logits (N, K), b targets (N, K); sum / n_masks."""
    p = masks.sigmoid()
    return (1 - (2 * (p * targets).sum(-1) + 1) / (p.sum(-1) + targets.sum(-1) + 1)).sum() / n_masks


def layer_loss(logits: Tensor, masks: Tensor, targets: list[tuple[Tensor, Tensor]], n_points: int,
               weights) -> Tensor:
    """The loss of one pair of outputs (B, Q, C+1), (B, Q, h, w). targets: per image the classes (T,) int64 and masks
    (T, H, W). The sum over masks is divided by their number, the mean over the processes where there are several."""
    wanted = torch.full(logits.shape[:2], logits.shape[-1] - 1, device=logits.device)  # "none", but for the matched
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
    """The training loss () of what Mask2Former.encode gives, summed over all its pairs (Mask2Former, section 4.1).

    labels (B, H, W), integers 0 to C-1, of any size; each class present is one mask to find, `ignore` is none. Points
    are drawn by torch's generator. `weights` are those of class, mask and dice. Raises ValueError for labels of another
    shape or beyond the classes.
    """
    outputs = [(full_precision(logits), full_precision(masks)) for logits, masks in outputs]
    batch, n_classes, targets = len(outputs[0][0]), outputs[0][0].shape[-1] - 1, []
    if labels.ndim != 3 or len(labels) != batch:
        raise ValueError(f"labels of shape {tuple(labels.shape)}; give one map per image, ({batch}, H, W)")
    for image in labels:
        classes = image.unique().long()
        classes = classes[classes != ignore]
        if len(classes) and not 0 <= classes[0] <= classes[-1] < n_classes:
            raise ValueError(f"labels {classes[0]} to {classes[-1]}, but the network has classes 0 to {n_classes - 1}; "
                             f"give pixels of no class the value {ignore}, and subtract 1 if classes start at 1")
        targets.append((classes, (image == classes[:, None, None]).to(outputs[0][1].dtype)))
    with torch.autocast(labels.device.type, enabled=False):
        return sum(layer_loss(logits, masks, targets, n_points, weights) for logits, masks in outputs)

"""The model as it is trained: its own weights in a forward that batches images and shares each image among questions.

A scene's prefix (the image) is followed by R rows of L tokens; every row sees the prefix, and its questions see
themselves. It gives what the model's own forward gives on each question alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recipes.vlm_nano.batches import Rows
from recipes.vlm_nano.model import MEAN, PATCH, STD
from recipes.vlm_nano.packing import SPEECH

MIDDLE = 3
"""After this many layers the language model knows where and how far away what it sees is."""


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = states.shape[-1] // 2
    return states * cos + torch.cat((-states[..., half:], states[..., :half]), -1) * sin


def attend(scores: Tensor, values: Tensor) -> Tensor:
    return scores.softmax(-1).to(values.dtype) @ values


def see(block: Any, states: Tensor, cos: Tensor, sin: Tensor, padding: Tensor | None) -> Tensor:
    """One block of the vision tower over (B, N, D)."""
    attention, (batch, count, _) = block.attn, states.shape
    parts = attention.qkv(block.norm1(states)).view(batch, count, 3, attention.num_heads, -1)
    query, key, value = parts.permute(2, 0, 3, 1, 4)
    query, key = rotate(query, cos, sin).to(value.dtype), rotate(key, cos, sin).to(value.dtype)
    scores = (query * attention.scaling) @ key.transpose(2, 3)
    seen = attend(scores if padding is None else scores + padding, value)
    states = states + attention.proj(seen.transpose(1, 2).flatten(2))
    return states + block.mlp(block.norm2(states))  # type: ignore[no-any-return]


def think(
    layer: Any, states: Tensor, cos: Tensor, sin: Tensor, causal: Tensor, inside: Tensor, covered: Tensor | None
) -> Tensor:
    """One layer of the language model over a prefix and then R rows of L tokens.

    Args:
        causal: What is added to the prefix's scores, (prefix, prefix) or one for each of B.
        inside: (B, 1, R, L, L) what is added to the scores within rows.
        covered: (B, 1, 1, prefix) what is added to the rows' scores on the prefix.
    """
    batch, total, width = states.shape
    rows, length = inside.shape[2:4]
    prefix, attention = total - rows * length, layer.self_attn
    normed = layer.input_layernorm(states)
    query, key, value = (
        project(normed).view(batch, total, -1, attention.head_dim).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    query = rotate(query, cos, sin).to(value.dtype) * attention.scaling
    key = rotate(key, cos, sin).to(value.dtype)
    (q0, q1), (k0, k1), (v0, v1) = (part.split([prefix, total - prefix], 2) for part in (query, key, value))
    first = attend(q0 @ k0.transpose(2, 3) + causal, v0)
    q1, k1, v1 = (part.unflatten(2, (rows, length)) for part in (q1, k1, v1))
    outside = q1.flatten(2, 3) @ k0.transpose(2, 3)
    outside = (outside if covered is None else outside + covered).unflatten(2, (rows, length))
    scores = torch.cat([outside, q1 @ k1.transpose(3, 4) + inside], -1).softmax(-1).to(value.dtype)
    second = (scores[..., :prefix].flatten(2, 3) @ v0) + (scores[..., prefix:] @ v1).flatten(2, 3)
    mixed = torch.cat([first, second], 2).transpose(1, 2).reshape(batch, total, width)
    states = states + attention.o_proj(mixed)
    return states + layer.mlp(layer.post_attention_layernorm(states))  # type: ignore[no-any-return]


class Sight(nn.Module):
    """The vision tower over images of one padded size: what is seen, by patch and by token."""

    def __init__(self, visual: Any) -> None:
        super().__init__()
        self.visual = visual
        self.mean, self.std = (
            nn.Buffer(torch.tensor(values).repeat_interleave(PATCH * PATCH), persistent=False) for values in (MEAN, STD)
        )

    def normalised(self, patches: Tensor) -> Tensor:
        return (patches / 255 - self.mean) / self.std

    def forward(self, patches: Tensor, places: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
        """Patches (B, N, K) of uint8 in the processor's order, (row, column) of each (B, N, 2), which are no padding (B, N).

        Returns:
            (B, N, D) the last layer's states and (B, N / 4, W) the visual tokens.
        """
        visual = self.visual
        kernel = visual.patch_embed.proj.weight.sum(2).flatten(1)  # both frames of a still image are the same
        states = F.linear(self.normalised(patches), kernel)
        angles = places[..., None].float() * visual.rotary_pos_emb.inv_freq
        angles = torch.cat([angles.flatten(2)] * 2, -1)[:, None]
        cos, sin = angles.cos(), angles.sin()
        padding = None if real is None else torch.where(real, 0.0, -1e4)[:, None, None]
        for block in visual.blocks:
            states = see(block, states, cos, sin, padding)
        merger = visual.merger
        return states, merger.mlp(merger.ln_q(states).view(len(states), states.shape[1] // 4, -1))


class Language(nn.Module):
    """The language model over a prefix and rows."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.text = text

    def forward(
        self, embeds: Tensor, positions: Tensor, mask: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Final (normalised) states (B, T, W), where T is the prefix and then the rows, R × L, end to end; and those
        of the prefix after `MIDDLE` layers, (B, prefix, W).

        Args:
            embeds: (B, T, W).
            positions: (3, B, T) M-RoPE.
            mask: (B, R, L, L) whether a token sees another of its row.
            hidden: (B, prefix) which tokens of the prefix only see, and are not seen by others.
        """
        prefix = embeds.shape[1] - mask.shape[1] * mask.shape[2]
        cos, sin = (part[:, None] for part in self.text.rotary_emb(embeds.float(), positions))
        causal = torch.full((prefix, prefix), -1e4, device=embeds.device).triu(1)
        covered = None if hidden is None else torch.where(hidden, -1e4, 0.0)[:, None, None]
        if covered is not None:
            causal = (causal + covered) * (1 - torch.eye(prefix, device=causal.device))
        inside = torch.where(mask, 0.0, -1e4)[:, None]
        states, middle = embeds, embeds
        for index, layer in enumerate(self.text.layers):
            middle = states[:, :prefix] if index == MIDDLE else middle
            states = think(layer, states, cos, sin, causal, inside, covered)
        return self.text.norm(states), middle


@dataclass(frozen=True)
class Said:
    """Mean cross-entropy over the answers' tokens and over those of speech; which answers were right as a whole, and
    of which families they are; the image's states after `MIDDLE` layers, (B, V, W)."""

    answers: Tensor
    speech: Tensor
    right: Tensor
    families: Tensor
    middle: Tensor


def say(
    model: Any,
    language: Callable[..., tuple[Tensor, Tensor]],
    rows: Rows,
    images: Tensor,
    crops: Tensor | None,
    hidden: Tensor | None = None,
) -> Said:
    """What the model says where labels stand.

    Args:
        images: (B, V, W) the visual tokens of each scene's image.
        crops: (B, C, W) those of its crop, padded, where there are crops.
        hidden: (B, V) which visual tokens are not to be seen.
    """
    text = model.model.language_model
    prefix = rows.tokens.shape[1] - rows.mask.shape[1] * rows.mask.shape[2]
    seen = rows.image_at[:, :prefix] >= 0
    if hidden is not None:
        hidden = hidden.gather(1, rows.image_at[:, :prefix].clamp(min=0)) & seen
    states, middle = language(embedded(model, rows, images, crops), rows.positions, rows.mask, hidden)
    places = rows.labels >= 0
    logits = F.linear(states[places], text.embed_tokens.weight).float()
    labels, families = rows.labels[places], rows.families[places]
    losses = F.cross_entropy(logits, labels, reduction="none")
    answers = places & (rows.families != SPEECH)
    starts = answers & ~F.pad(answers, (1, 0))[:, :-1]
    answer_of = starts.flatten().cumsum(0).view_as(answers)[answers] - 1
    answering = families != SPEECH
    right = torch.ones(int(starts.sum()), device=labels.device)
    correct = (logits.argmax(-1) == labels).float()[answering]
    return Said(
        losses[answering].mean(), losses[~answering].sum() / (~answering).sum().clamp(min=1),
        right.scatter_reduce(0, answer_of, correct, "amin"), rows.families[starts],
        middle[seen].view(len(images), -1, middle.shape[-1]),
    )  # fmt: skip


def embedded(model: Any, rows: Rows, images: Tensor, crops: Tensor | None) -> Tensor:
    """(B, T, W) the tokens' embeddings, with visual tokens in their places."""
    embeds: Tensor = model.model.language_model.embed_tokens(rows.tokens)
    embeds = torch.where((rows.image_at >= 0)[..., None], taken(images, rows.image_at), embeds)
    if crops is not None:
        embeds = torch.where((rows.crop_at >= 0)[..., None], taken(crops, rows.crop_at), embeds)
    return embeds


def taken(values: Tensor, index: Tensor) -> Tensor:
    """(B, V, W) at (B, T): values[b, index[b, t]]; anything where the index is negative."""
    clamped = index.clamp(min=0)[..., None].expand(-1, -1, values.shape[-1])
    return values.gather(1, clamped).float()

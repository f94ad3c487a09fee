"""What differs between families of vision-language models: images, positions, masks, names of parts.

Everything else goes through what transformers has in common. A family is found by the configuration's `model_type`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pearl.errors import PearlError
from pearl.records import Box


@dataclass(frozen=True)
class Visual:
    """All images of a batch after the vision tower; N is the number of their merged visual tokens.

    Attributes:
        tokens: (N, H), image after image.
        deep: Further (N, H) that are added after the first language layers (DeepStack, Qwen3-VL).
    """

    tokens: Tensor
    deep: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Tokens:
    """What decides who sees whom; each (R, T), int.

    Attributes:
        branch: Which branch of its tree a token belongs to; 0 is the trunk, -1 padding.
        prefix: How much of the trunk its branch sees.
        order: Its place in its own view.
        block: Which run of visual tokens one belongs to, else -1; each run of a row has its own number.
    """

    branch: Tensor
    prefix: Tensor
    order: Tensor
    block: Tensor

    def first(self, count: int) -> Tokens:
        """The first tokens of every row."""
        return Tokens(*(tokens[:, :count] for tokens in (self.branch, self.prefix, self.order, self.block)))


@dataclass(frozen=True)
class Attention:
    """Who sees whom among R rows of T tokens, S of which stand before them in a cache.

    Attributes:
        allowed: (R, T, S + T) bool.
        same_image: (R, T, S + T) bool, whether both are in one run of visual tokens.
        order: (R, T) places of those who see, and `seen_order` (R, S + T) of those who are seen, in their own view.
    """

    allowed: Tensor
    same_image: Tensor
    order: Tensor
    seen_order: Tensor

    @classmethod
    def among(cls, tokens: Tokens, cached: Tokens | None = None) -> Attention:
        """A token sees itself and what is before it in its own branch and in the trunk that the branch grows from."""

        def seen(name: str) -> Tensor:
            own: Tensor = getattr(tokens, name)
            return (own if cached is None else torch.cat([getattr(cached, name), own], dim=1))[:, None, :]

        branch, prefix, order, block = (
            t[:, :, None] for t in (tokens.branch, tokens.prefix, tokens.order, tokens.block)
        )
        ancestor = (seen("branch") == 0) & (seen("order") < prefix) & (branch >= 0)
        allowed = ((seen("branch") == branch) | ancestor) & (seen("order") <= order)
        return cls(allowed, (seen("block") == block) & (block >= 0), tokens.order, seen("order")[:, 0])


class Family:
    """The base: one-dimensional positions, causal attention, images that concatenate."""

    vision_parts: ClassVar[tuple[str, ...]] = ("vision_tower",)
    projector_parts: ClassVar[tuple[str, ...]] = ("multi_modal_projector",)
    language_part: ClassVar[str] = "language_model"
    tree: ClassVar[bool] = True
    """Whether views may stand beside each other in one row."""
    layer_types: ClassVar[frozenset[str]] = frozenset({"full_attention"})
    """The kinds of language layers whose masks it makes."""
    vision_types: ClassVar[frozenset[str]] = frozenset()
    """The vision towers whose images it collates; empty: those that the family comes with."""
    differs_when_several: ClassVar[bool] = False
    """Whether an image is preprocessed in another way where a conversation has several."""
    keeps_sizes: ClassVar[bool] = False
    """Whether larger images have more visual tokens, a number that the image processor tells from their size."""

    def placeholder(self, processor: Any) -> str:
        """What stands for an image in a rendered conversation."""
        return str(processor.image_token)

    def visual_token(self, processor: Any) -> str:
        return str(processor.image_token)

    def visual_token_id(self, processor: Any) -> int:
        return int(processor.tokenizer.convert_tokens_to_ids(self.visual_token(processor)))

    def preprocess(self, processor: Any, pixels: Tensor, *, several: bool = False) -> Any:
        """The image processor's output for one image, uint8 (3, height, width).

        Args:
            several: As it is where a conversation has several, for families of which `differs_when_several` says so.
        """
        return self._processed(processor, [pixels])

    def _processed(self, processor: Any, images: list[Tensor]) -> Any:
        """The images of one conversation; with the processor's own options, which its image processor does not know
        (such as `crop_to_patches` of InternVL)."""
        options = processor._merge_kwargs(processor.valid_processor_kwargs, images_kwargs={})
        return processor.image_processor(images=[images], **{**options["images_kwargs"], "return_tensors": "pt"})

    def collate_images(self, images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        """The vision tower's input for these images."""
        return {name: torch.cat([image[name] for image in images]) for name in images[0]}

    def visual(self, core: nn.Module, inputs: Mapping[str, Tensor]) -> Visual:
        """Runs the vision tower and the projector on collated images."""
        output: Any = core.get_image_features(**inputs, return_dict=True)  # type: ignore[operator]
        return Visual(_rows(output.pooler_output))

    def positions(self, core_config: Any, visual: np.ndarray, images: Sequence[Mapping[str, Tensor]]) -> np.ndarray:
        """Positions (D, T) of a view, from where its visual tokens are (T,) and the images in their order."""
        return np.arange(len(visual))[None]

    def grid(self, core_config: Any, image: Mapping[str, Tensor]) -> np.ndarray:
        """(rows, columns) of an image's parts: which of its merged visual tokens shows each.

        Of an image in tiles those are the tiles' tokens, not those of the whole in small beside them.

        Raises:
            PearlError: it is not known.
        """
        raise PearlError(f"where visual tokens lie is not known of {type(self).__name__}")

    def shown(self, processor: Any, height: int, width: int) -> Box:
        """The part of an image of this size that its visual tokens show."""
        return 0.0, 0.0, 1.0, 1.0

    def language(self, core: nn.Module) -> nn.Module:
        return core.get_submodule(self.language_part)

    def run(
        self, core: nn.Module, embeds: Tensor, positions: Tensor, attention: Attention, visual: Visual, visual_at: Tensor,
        visual_of: Tensor, cache: Any = None,
    ) -> Tensor:  # fmt: skip
        """Final-layer, post-norm states (R, T, H); a cache grows in place.

        Args:
            embeds: (R, T, H).
            positions: (D, R, T).
            visual_at: (M,) flat indices of visual tokens in R × T, ascending; `visual_of` (M,): which of `visual` each is.
            cache: Keys and values of what stands before these tokens; None: nothing is kept.
        """
        output: Any = self.language(core)(
            inputs_embeds=embeds,
            attention_mask=self.mask(core, attention, embeds.dtype),
            position_ids=self.position_ids(positions),
            past_key_values=cache,
            use_cache=cache is not None,
            return_dict=True,
            **self.deep_inputs(embeds, visual, visual_at, visual_of),
        )
        states: Tensor = output.last_hidden_state
        return states

    def position_ids(self, positions: Tensor) -> Tensor:
        """From (D, R, T) what the language model takes: (R, T), or (3, R, T) for M-RoPE."""
        return positions[0]

    def mask(self, core: nn.Module, attention: Attention, dtype: torch.dtype) -> Any:
        """What the language model takes as `attention_mask`: additive (R, 1, T, S + T), or that by layer type."""
        return additive(attention.allowed, dtype)

    def deep_inputs(self, embeds: Tensor, visual: Visual, visual_at: Tensor, visual_of: Tensor) -> dict[str, Any]:
        return {}


class QwenVL(Family):
    """Qwen2.5-VL: images of any size, rotary positions of three dimensions."""

    vision_parts = ("visual",)
    projector_parts: ClassVar[tuple[str, ...]] = ("visual.merger",)
    keeps_sizes = True

    def positions(self, core_config: Any, visual: np.ndarray, images: Sequence[Mapping[str, Tensor]]) -> np.ndarray:
        """As the model's own `get_rope_index`, for one view: an image's tokens share their time, and the text after
        it goes on behind its longer side (Qwen2-VL, arXiv 2409.12191, section 2.1)."""
        grids = [self.grid(core_config, image).shape for image in images]
        pieces, text, start, token = list[np.ndarray](), 0, 0, 0
        for height, width in grids:
            first = token + int(np.argmax(visual[token:]))
            text = first - token
            pieces.append(np.tile(np.arange(start, start + text), (3, 1)))
            start += text
            rows, columns = np.divmod(np.arange(height * width), width)
            pieces.append(start + np.stack([np.zeros_like(rows), rows, columns]))
            start += max(height, width)
            token = first + height * width
        pieces.append(np.tile(np.arange(start, start + len(visual) - token), (3, 1)))
        return np.concatenate(pieces, axis=1)

    def grid(self, core_config: Any, image: Mapping[str, Tensor]) -> np.ndarray:
        merge = core_config.vision_config.spatial_merge_size
        _, height, width = image["image_grid_thw"][0].tolist()
        return tiled(1, 1, height // merge, width // merge)

    def position_ids(self, positions: Tensor) -> Tensor:
        return positions


class Qwen3VL(QwenVL):
    projector_parts = ("visual.merger", "visual.deepstack_merger_list")

    def visual(self, core: nn.Module, inputs: Mapping[str, Tensor]) -> Visual:
        output: Any = core.get_image_features(**inputs, return_dict=True)  # type: ignore[operator]
        return Visual(_rows(output.pooler_output), tuple(_rows(layer) for layer in output.deepstack_features))

    def deep_inputs(self, embeds: Tensor, visual: Visual, visual_at: Tensor, visual_of: Tensor) -> dict[str, Any]:
        if not len(visual_at):
            return {}
        mask = torch.zeros(embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        mask.view(-1)[visual_at] = True
        return {"visual_pos_masks": mask, "deepstack_visual_embeds": [layer[visual_of] for layer in visual.deep]}


class Idefics3(Family):
    """Idefics3 and SmolVLM: an image is a number of tiles and the whole in small, or the whole alone; padded to the
    largest of the batch."""

    vision_parts = ("vision_model",)
    projector_parts = ("connector",)
    language_part = "text_model"

    def preprocess(self, processor: Any, pixels: Tensor, *, several: bool = False) -> Any:
        inputs = super().preprocess(processor, pixels)
        (rows,), (columns,) = inputs["rows"][0], inputs["cols"][0]
        return {**inputs, "tiles": torch.tensor([rows or 1, columns or 1])}

    def grid(self, core_config: Any, image: Mapping[str, Tensor]) -> np.ndarray:
        step = core_config.vision_config.patch_size * core_config.scale_factor
        height, width = image["pixel_values"].shape[-2:]
        rows, columns = image["tiles"].tolist()
        return tiled(rows, columns, height // step, width // step)

    def collate_images(self, images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {name: _padded([image[name] for image in images]) for name in ("pixel_values", "pixel_attention_mask")}


class LlavaOnevision(Family):
    """An image alone is the whole and its tiles; among others it is the whole only, padded to a square (arXiv
    2408.03326, section 3.2)."""

    projector_parts = ("multi_modal_projector", "image_newline")
    differs_when_several = True

    def preprocess(self, processor: Any, pixels: Tensor, *, several: bool = False) -> Any:
        if not several:
            return self._processed(processor, [pixels])
        inputs = self._processed(processor, [pixels, pixels[:, :2, :2]])  # the second only makes them several
        return {**inputs, **{name: inputs[name][:1] for name in ("pixel_values", "image_sizes")}}

    def grid(self, core_config: Any, image: Mapping[str, Tensor]) -> np.ndarray:
        """Of an image alone: as the model packs it, without what pads it and with a newline behind each row."""
        from transformers.models.llava_onevision.modeling_llava_onevision import (
            get_anyres_image_grid_shape,
            unpad_image,
        )

        vision, size = core_config.vision_config, image["image_sizes"][0]
        side = vision.image_size // vision.patch_size
        tall, wide = get_anyres_image_grid_shape(size, core_config.image_grid_pinpoints, vision.image_size)
        rows, columns = unpad_image(torch.empty(1, tall * side, wide * side), size).shape[1:]
        most = int(core_config.vision_aspect_ratio.removeprefix("anyres_max_"))
        if (ratio := math.sqrt(rows * columns / (most * side**2))) > 1.1:
            rows, columns = int(rows // ratio), int(columns // ratio)
        packed: np.ndarray = side**2 + tiled(1, 1, rows, columns + 1)[:, :-1]
        return packed

    def collate_images(self, images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {
            "pixel_values": torch.cat([image["pixel_values"][0] for image in images]),
            "image_sizes": torch.cat([image["image_sizes"] for image in images]),
            "num_views": torch.tensor([image["pixel_values"].shape[1] for image in images]),
        }

    def visual(self, core: nn.Module, inputs: Mapping[str, Tensor]) -> Visual:
        counts = inputs["num_views"].tolist()
        pixels = inputs["pixel_values"].split(counts)
        features: dict[int, Tensor] = {}
        for alone in (True, False):
            if chosen := [number for number, count in enumerate(counts) if (count > 1) == alone]:
                output: Any = core.get_image_features(  # type: ignore[operator]
                    pixel_values=torch.cat([pixels[number] for number in chosen]),
                    image_sizes=inputs["image_sizes"][chosen],
                    # how many images each conversation has, of which it only asks whether that is one
                    batch_num_images=[1] * len(chosen) if alone else [len(chosen) + 1],
                    return_dict=True,
                )
                features |= zip(chosen, output.pooler_output, strict=True)
        return Visual(_rows([features[number] for number in range(len(counts))]))


class Llava(Family):
    vision_types = frozenset({"clip_vision_model", "siglip_vision_model"})

    def collate_images(self, images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {"pixel_values": torch.cat([image["pixel_values"] for image in images])}

    def grid(self, core_config: Any, image: Mapping[str, Tensor]) -> np.ndarray:
        height, width = image["pixel_values"].shape[-2:]
        patch = core_config.vision_config.patch_size
        return tiled(1, 1, height // patch, width // patch)

    def shown(self, processor: Any, height: int, width: int) -> Box:
        """CLIP's image processor resizes the shorter side, then cuts a square out of the middle."""
        settings = processor.image_processor
        if not settings.do_center_crop:
            return super().shown(processor, height, width)
        tall, wide = settings.size.get("height"), settings.size.get("width")
        if short := settings.size.get("shortest_edge"):
            tall, wide = short * height / min(height, width), short * width / min(height, width)
        x, y = (1 - settings.crop_size["width"] / wide) / 2, (1 - settings.crop_size["height"] / tall) / 2
        return x, y, 1 - x, 1 - y


class InternVL(Llava):
    """An image is a number of tiles and the whole in small, or the whole alone."""

    vision_types = frozenset()

    def preprocess(self, processor: Any, pixels: Tensor, *, several: bool = False) -> Any:
        from transformers.models.got_ocr2.image_processing_got_ocr2 import get_optimal_tiled_canvas

        inputs, settings = super().preprocess(processor, pixels), processor.image_processor
        columns, rows = 1, 1
        if len(inputs["pixel_values"]) > 1:
            _, height, width = pixels.shape
            size = settings.size["height"], settings.size["width"]
            columns, rows = get_optimal_tiled_canvas((height, width), size, settings.min_patches, settings.max_patches)
        return {**inputs, "tiles": torch.tensor([rows, columns])}

    def grid(self, core_config: Any, image: Mapping[str, Tensor]) -> np.ndarray:
        height, width = core_config.vision_config.image_size
        step = core_config.vision_config.patch_size[0] / core_config.downsample_ratio
        rows, columns = image["tiles"].tolist()
        return tiled(rows, columns, int(height / step), int(width / step))


class Gemma3(Family):
    """Images see themselves in both directions; most layers look back through a sliding window only."""

    layer_types = frozenset({"full_attention", "sliding_attention"})

    def placeholder(self, processor: Any) -> str:
        return str(processor.boi_token)

    def visual_token(self, processor: Any) -> str:
        return str(processor.tokenizer.image_token)

    def collate_images(self, images: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {"pixel_values": torch.cat([image["pixel_values"] for image in images])}

    def grid(self, core_config: Any, image: Mapping[str, Tensor]) -> np.ndarray:
        side = round(core_config.mm_tokens_per_image**0.5)
        return tiled(1, 1, side, side)

    def mask(self, core: nn.Module, attention: Attention, dtype: torch.dtype) -> Any:
        config: Any = core.config
        window: int = config.text_config.sliding_window
        near = attention.allowed & (attention.order[:, :, None] - attention.seen_order[:, None] < window)
        return {
            "full_attention": additive(attention.allowed | attention.same_image, dtype),
            "sliding_attention": additive(near | attention.same_image, dtype),
        }


class Unknown(Family):
    """A family that nothing is known about: what transformers has in common, each view in a row of its own.

    Its own code makes the mask, so layers without attention work too. Whether its positions are one-dimensional and
    its images go where their tokens stand is tried on an example before any work (`models.check_unknown`).
    """

    tree = False

    def language(self, core: nn.Module) -> nn.Module:
        decoder: nn.Module = core.get_decoder()  # type: ignore[operator]
        return decoder

    def mask(self, core: nn.Module, attention: Attention, dtype: torch.dtype) -> Any:
        return attention.allowed[:, :, 0].long()  # padding alone does not see a row's first token


FAMILIES: dict[str, type[Family]] = {
    "qwen2_5_vl": QwenVL,
    "qwen3_vl": Qwen3VL,
    "smolvlm": Idefics3,
    "idefics3": Idefics3,
    "llava": Llava,
    "llava_onevision": LlavaOnevision,
    "internvl": InternVL,
    "gemma3": Gemma3,
}


def family_of(settings: Any) -> type[Family]:
    """The family of a model's configuration; `Unknown` too where its language model has layers that a known family
    makes no mask for, such as recurrent ones, or its images come from a vision tower that the family does not know."""
    known = FAMILIES.get(settings.model_type)
    if known is None or not _layers(settings.get_text_config()) <= known.layer_types:
        return Unknown
    towers = known.vision_types
    return known if not towers or settings.vision_config.model_type in towers else Unknown


def _layers(text: Any) -> set[str]:
    """The kinds of a language model's layers; of older configurations a window without kinds goes for all layers."""
    window = getattr(text, "sliding_window", None) and getattr(text, "use_sliding_window", True)
    return set(getattr(text, "layer_types", None) or {"sliding_attention" if window else "full_attention"})


def additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, 1, T, S) for attention that adds it, eager or SDPA: 0 where allowed. Eager attention would add a bool."""
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]


def tiled(rows: int, columns: int, height: int, width: int) -> np.ndarray:
    """(rows × height, columns × width): which token shows each part of an image whose tiles follow each other row by
    row, and in each tile its height × width tokens."""
    tokens = np.arange(rows * columns * height * width).reshape(rows, columns, height, width)
    return tokens.swapaxes(1, 2).reshape(rows * height, columns * width)


def _rows(features: Tensor | Sequence[Tensor]) -> Tensor:
    """(N, H) of a list of (n, H), or of (images, n, H)."""
    if isinstance(features, Tensor):
        return features.reshape(-1, features.shape[-1])
    return torch.cat([feature.reshape(-1, feature.shape[-1]) for feature in features])


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    """Concatenates along the first dimension, the others padded with zeros to the largest."""
    sizes = [max(sides) for sides in zip(*(tensor.shape[1:] for tensor in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [size - side for size, side in zip(sizes, tensor.shape[1:], strict=True)]
        padded.append(F.pad(tensor, [amount for side in reversed(missing) for amount in (0, side)]))
    return torch.cat(padded)

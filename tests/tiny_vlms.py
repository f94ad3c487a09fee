"""Tiny random vision-language models with complete processors, built in code: one of each supported family.

Tokens, chat templates, tied weights and image handling follow the families' real checkpoints in miniature. Weights are
drawn wide enough that attention is not uniform, so a wrong position, mask or image shows in the outputs.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from pearl.torch_setup import prepare_torchvision

HIDDEN = 64
TILE = 32  # pixels along a side of what a vision encoder with a fixed input size sees
PATCH = 8
TOKENS = (TILE // PATCH // 2) ** 2  # of a tile whose patches are merged two by two
SPREAD = 0.12  # standard deviation of the weights

_CORPUS = (
    "user assistant system model You are a helpful assistant. What is in the image? Where is the red cup?",
    "The user asks how far the cup is. I call the tool depth and look at the region. The answer is 12.",
    "<think> The object is at the left of the table, near 0.25, 0.50 and 0.75. </think>",
    '{"name": "crop", "arguments": {"box": [10, 20, 30, 40]}} The tool result is shown below.',
)

_WORDS = """
{%- macro words(content) -%}
    {%- if content is string -%}{{ content }}{%- else -%}
        {%- for part in content -%}{{ IMAGE if part.type == 'image' else part.text }}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
"""

_CHATML = r"""
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\n' + words(message.content) + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

_DEFAULT_SYSTEM = r"""
{%- if messages[0].role != 'system' -%}
    {{- '<|im_start|>system\nYou answer questions about images.<|im_end|>\n' -}}
{%- endif -%}
"""

_UTTERANCES = r"""
{{- bos_token -}}
{%- for message in messages -%}
    {%- set starts_with_image = message.content is not string and message.content[0].type == 'image' -%}
    {{- message.role | capitalize + (':' if starts_with_image else ': ') -}}
    {{- words(message.content) + '<end_of_utterance>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""

_VICUNA = r"""
{%- for message in messages -%}
    {{- '' if message.role == 'system' else message.role | upper + ': ' -}}
    {{- words(message.content) + ' ' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'ASSISTANT:' -}}{%- endif -%}
"""

_TURNS = r"""
{{- bos_token -}}
{%- set has_system = messages[0].role == 'system' -%}
{%- for message in (messages[1:] if has_system else messages) -%}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}
        {{- raise_exception('User and assistant have to take turns') -}}
    {%- endif -%}
    {{- '<start_of_turn>' + ('model' if message.role == 'assistant' else 'user') + '\n' -}}
    {{- words(messages[0].content) + '\n\n' if has_system and loop.first else '' -}}
    {{- words(message.content) | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""


def build_tiny_encoder(folder: Path) -> Path:
    """A random DINOv2 with its image processor."""
    prepare_torchvision()
    config = transformers.Dinov2Config(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    transformers.Dinov2Model(config).save_pretrained(folder)
    processor = transformers.BitImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    processor.save_pretrained(folder)
    return folder


def build_tiny_vlm(family: str, folder: Path, *, seed: int = 0) -> Path:
    """Saves a random model of the family and its processor to the folder, and returns the folder."""
    prepare_torchvision()
    parts = _FAMILIES[family]
    processor = parts.processor()
    tokenizer = processor.tokenizer
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForImageTextToText.from_config(parts.config(tokenizer), dtype=torch.float32)
        _vary_constant_weights(model)
    stops = [_id(tokenizer, stop) for stop in parts.stops]
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=stops, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class _Family:
    processor: Callable[[], Any]
    config: Callable[[Any], Any]  # of the tokenizer
    stops: tuple[str, ...]  # what ends a generated answer


@torch.no_grad()
def _vary_constant_weights(model: torch.nn.Module) -> None:
    """Norms start at one, biases and Gemma3's projector at zero, which would hide a forgotten norm and all images."""
    for weight in model.parameters():
        if weight.ndim == 1 or not weight.any():
            weight.add_(torch.randn_like(weight), alpha=SPREAD)


def _tokenizer(
    roles: dict[str, str], *more: str, named: dict[str, str] | None = None, prepend_bos: bool = False
) -> Any:
    """A tokenizer with special tokens by role, by the name of an attribute, and without one (`more`)."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(),
        extra_special_tokens=named or {},
        model_input_names=["input_ids", "attention_mask"],
        **roles,
    )
    tokenizer.add_tokens(list(more), special_tokens=True)
    if prepend_bos:
        bos = roles["bos_token"]
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, _id(tokenizer, bos))]
        )
    return tokenizer


def _byte_level_bpe() -> Tokenizer:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(_CORPUS, trainer)
    return backend


def _chatml_tokenizer(*more: str, named: dict[str, str] | None = None) -> Any:
    roles = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    return _tokenizer(roles, "<|im_start|>", *more, named=named)


def _id(tokenizer: Any, token: str) -> int:
    return int(tokenizer.convert_tokens_to_ids(token))


def _template(body: str, *, image: str) -> str:
    return _WORDS.replace("IMAGE", json.dumps(image)) + body


def _square() -> dict[str, int]:
    return {"height": TILE, "width": TILE}


def _text(tokenizer: Any, **settings: Any) -> dict[str, Any]:
    """Settings of a language model; as in real checkpoints the vocabulary is padded past the tokenizer's."""
    return {
        "vocab_size": (len(tokenizer) // 64 + 1) * 64,
        "hidden_size": HIDDEN,
        "intermediate_size": 2 * HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": SPREAD,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        **settings,
    }


def _vision(**settings: Any) -> dict[str, Any]:
    return {
        "hidden_size": HIDDEN // 2,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": TILE,
        "patch_size": PATCH,
        "initializer_range": SPREAD,
        **settings,
    }


def _qwen_processor(processor: Callable[..., Any], videos: Callable[..., Any], body: str) -> Any:
    """Native resolution: one token for each 16 by 16 pixels, 4 to 16 in all."""
    pixels = {"shortest_edge": 4 * (2 * PATCH) ** 2, "longest_edge": 16 * (2 * PATCH) ** 2}
    return processor(
        image_processor=transformers.Qwen2VLImageProcessor(patch_size=PATCH, size=pixels),
        tokenizer=_chatml_tokenizer("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"),
        video_processor=videos(patch_size=PATCH, size=pixels),
        chat_template=_template(body, image="<|vision_start|><|image_pad|><|vision_end|>"),
    )


def _qwen_config(config: Callable[..., Any], tokenizer: Any, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    return config(
        text_config=_text(tokenizer, **text),
        vision_config=_vision(depth=2, num_heads=2, out_hidden_size=HIDDEN, **vision),
        image_token_id=_id(tokenizer, "<|image_pad|>"),
        video_token_id=_id(tokenizer, "<|video_pad|>"),
        vision_start_token_id=_id(tokenizer, "<|vision_start|>"),
        vision_end_token_id=_id(tokenizer, "<|vision_end|>"),
        tie_word_embeddings=True,
    )


def _qwen2_5_vl_processor() -> Any:
    videos = transformers.Qwen2VLVideoProcessor
    return _qwen_processor(transformers.Qwen2_5_VLProcessor, videos, _DEFAULT_SYSTEM + _CHATML)


def _qwen2_5_vl_config(tokenizer: Any) -> Any:
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    vision = {"window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
    return _qwen_config(transformers.Qwen2_5_VLConfig, tokenizer, text, vision)


def _qwen3_vl_processor() -> Any:
    return _qwen_processor(transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor, _CHATML)


def _qwen3_vl_config(tokenizer: Any) -> Any:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    vision = {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]}
    return _qwen_config(transformers.Qwen3VLConfig, tokenizer, {"rope_parameters": rope, "head_dim": 16}, vision)


def _smolvlm_processor() -> Any:
    """Images are cut into up to 2 by 2 tiles, followed by the whole image; tags of tiles are special tokens."""
    tags = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]
    roles = {"bos_token": "<|im_start|>", "eos_token": "<end_of_utterance>", "pad_token": "<|im_end|>"}
    images: dict[str, Any] = {"size": {"longest_edge": 2 * TILE}, "max_image_size": {"longest_edge": TILE}}
    return transformers.SmolVLMProcessor(
        image_processor=transformers.SmolVLMImageProcessor(**images),
        tokenizer=_tokenizer(roles, "<fake_token_around_image>", "<image>", "<global-img>", *tags),
        video_processor=transformers.SmolVLMVideoProcessor(**images),
        image_seq_len=TOKENS,
        chat_template=_template(_UTTERANCES, image="<image>"),
    )


def _smolvlm_config(tokenizer: Any) -> Any:
    return _idefics_config(transformers.SmolVLMConfig, tokenizer)


def _idefics3_processor() -> Any:
    """Images are not cut (see `do_image_splitting` of the image processor); tags of tiles would be ordinary text."""
    roles = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>", "pad_token": "<|pad|>"}
    more = ("<fake_token_around_image>", "<image>", "<end_of_utterance>")
    return transformers.Idefics3Processor(
        image_processor=transformers.Idefics3ImageProcessor(
            size={"longest_edge": 2 * TILE}, max_image_size={"longest_edge": TILE}, do_image_splitting=False
        ),
        tokenizer=_tokenizer(roles, *more, prepend_bos=True),
        image_seq_len=TOKENS,
        chat_template=_template(_UTTERANCES, image="<image>"),
    )


def _idefics3_config(tokenizer: Any) -> Any:
    return _idefics_config(transformers.Idefics3Config, tokenizer)


def _idefics_config(config: Callable[..., Any], tokenizer: Any) -> Any:
    return config(
        text_config=_text(tokenizer, model_type="llama"),
        vision_config=_vision(),
        image_token_id=_id(tokenizer, "<image>"),
        scale_factor=2,
        tie_word_embeddings=False,
    )


def _llava_processor() -> Any:
    """Square crops, and no token for the encoder's class token."""
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(size={"shortest_edge": TILE}, crop_size=_square()),
        tokenizer=_tokenizer(roles, "<image>", prepend_bos=True),
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_template(_VICUNA, image="<image>\n"),
    )


def _llava_config(tokenizer: Any) -> Any:
    """A language model without grouped attention heads."""
    return transformers.LlavaConfig(
        text_config=_text(tokenizer, model_type="llama", num_key_value_heads=4),
        vision_config=_vision(model_type="clip_vision_model", projection_dim=HIDDEN // 2),
        image_token_index=_id(tokenizer, "<image>"),
        image_seq_length=(TILE // PATCH) ** 2,
    )


def _llava_onevision_processor() -> Any:
    """The whole image and up to 2 by 2 tiles, with the padding's tokens left out and a token after each row."""
    return transformers.LlavaOnevisionProcessor(
        image_processor=transformers.LlavaOnevisionImageProcessor(size=_square(), image_grid_pinpoints=_grids()),
        tokenizer=_chatml_tokenizer("<image>", "<video>"),
        video_processor=transformers.LlavaOnevisionVideoProcessor(size=_square()),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=_template(_CHATML, image="<image>\n"),
    )


def _llava_onevision_config(tokenizer: Any) -> Any:
    return transformers.LlavaOnevisionConfig(
        text_config=_text(tokenizer, model_type="qwen2", tie_word_embeddings=True),
        vision_config=_vision(model_type="siglip_vision_model", patch_size=TILE // 2, vision_use_head=False),
        image_token_index=_id(tokenizer, "<image>"),
        video_token_index=_id(tokenizer, "<video>"),
        image_grid_pinpoints=_grids(),
    )


def _grids() -> list[list[int]]:
    return [[TILE * rows, TILE * columns] for rows in (1, 2) for columns in (1, 2)]


def _internvl_processor() -> Any:
    """One tile, or two and the whole image: cutting is the processor's default, not the image processor's."""
    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    return transformers.InternVLProcessor(
        image_processor=transformers.GotOcr2ImageProcessor(size=_square(), max_patches=2),
        tokenizer=_chatml_tokenizer(named={**named, "video_token": "<video>"}),
        video_processor=transformers.InternVLVideoProcessor(size=_square()),
        image_seq_length=TOKENS,
        chat_template=_template(_CHATML, image="<IMG_CONTEXT>\n"),
    )


def _internvl_config(tokenizer: Any) -> Any:
    return transformers.InternVLConfig(
        text_config=_text(tokenizer, model_type="qwen2"),
        vision_config=_vision(),
        image_token_id=_id(tokenizer, "<IMG_CONTEXT>"),
        image_seq_length=TOKENS,
        tie_word_embeddings=False,
    )


def _gemma3_processor() -> Any:
    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    roles = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return transformers.Gemma3Processor(
        image_processor=transformers.Gemma3ImageProcessor(size=_square()),
        tokenizer=_tokenizer(roles, "<start_of_turn>", "<end_of_turn>", named=named, prepend_bos=True),
        image_seq_length=TOKENS,
        chat_template=_template(_TURNS, image="<start_of_image>"),
    )


def _gemma3_config(tokenizer: Any) -> Any:
    """The tokens of an image see each other; one layer has a sliding window of 16 tokens, one has none."""
    layers = ["sliding_attention", "full_attention"]
    return transformers.Gemma3Config(
        text_config=_text(tokenizer, head_dim=16, query_pre_attn_scalar=16, sliding_window=16, layer_types=layers),
        vision_config=_vision(model_type="siglip_vision_model", vision_use_head=False),
        boi_token_index=_id(tokenizer, "<start_of_image>"),
        eoi_token_index=_id(tokenizer, "<end_of_image>"),
        image_token_index=_id(tokenizer, "<image_soft_token>"),
        mm_tokens_per_image=TOKENS,
    )


def _vipllava_config(tokenizer: Any) -> Any:
    return transformers.VipLlavaConfig(
        text_config=_text(tokenizer, model_type="llama"),
        vision_config=_vision(model_type="clip_vision_model", projection_dim=HIDDEN // 2),
        image_token_index=_id(tokenizer, "<image>"),
        vision_feature_layer=[-1, -2],
    )


def _recurrent_llava_config(tokenizer: Any) -> Any:
    """One layer of the language model is a short convolution, which knows no mask."""
    layers = ["conv", "full_attention"]
    return transformers.LlavaConfig(
        text_config=_text(tokenizer, model_type="lfm2", block_ff_dim=2 * HIDDEN, layer_types=layers),
        vision_config=_vision(model_type="clip_vision_model", projection_dim=HIDDEN // 2),
        image_token_index=_id(tokenizer, "<image>"),
    )


def _windowed_llava_config(tokenizer: Any) -> Any:
    """All layers of the language model look back 16 tokens, which a configuration of its time says by one number."""
    return transformers.LlavaConfig(
        text_config=_text(tokenizer, model_type="mistral", sliding_window=16),
        vision_config=_vision(model_type="clip_vision_model", projection_dim=HIDDEN // 2),
        image_token_index=_id(tokenizer, "<image>"),
    )


def _pixtral_processor() -> Any:
    """Images keep their shapes, so that they do not concatenate."""
    roles = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return transformers.PixtralProcessor(
        image_processor=transformers.PixtralImageProcessor(
            size={"longest_edge": 2 * TILE}, patch_size={"height": PATCH, "width": PATCH}
        ),
        tokenizer=_tokenizer(roles, "[IMG]", "[IMG_BREAK]", "[IMG_END]", prepend_bos=True),
        patch_size=PATCH,
        chat_template=_template(_VICUNA, image="[IMG]"),
    )


def _pixtral_config(tokenizer: Any) -> Any:
    return transformers.LlavaConfig(
        text_config=_text(tokenizer, model_type="llama"),
        vision_config=_vision(model_type="pixtral", image_size=2 * TILE),
        image_token_index=_id(tokenizer, "[IMG]"),
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )


def _scaled_processor() -> Any:
    return _qwen_processor(transformers.HyperCLOVAXVisionV2Processor, transformers.Qwen2VLVideoProcessor, _CHATML)


def _scaled_config(tokenizer: Any) -> Any:
    """Logits are an eighth of what the head says."""
    rope = {"rope_type": "default", "rope_theta": 1e4}
    text = {"model_type": "hyperclovax", "rope_parameters": rope, "logits_scaling": 0.125}
    vision = {"model_type": "qwen2_5_vl_vision", "window_size": 4 * PATCH, "fullatt_block_indexes": [1]}

    def config(vision_start_token_id: int, vision_end_token_id: int, **settings: Any) -> Any:
        return transformers.HyperCLOVAXVisionV2Config(**settings)

    return _qwen_config(config, tokenizer, text, vision)


def _qwen2_vl_processor() -> Any:
    return _qwen_processor(transformers.Qwen2VLProcessor, transformers.Qwen2VLVideoProcessor, _CHATML)


def _qwen2_vl_config(tokenizer: Any) -> Any:
    text = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}}
    vision = {"embed_dim": HIDDEN // 2, "hidden_size": HIDDEN}
    return _qwen_config(transformers.Qwen2VLConfig, tokenizer, text, vision)


_CHATML_STOPS = ("<|im_end|>", "<|endoftext|>")

_FAMILIES = {
    "qwen2_5_vl": _Family(_qwen2_5_vl_processor, _qwen2_5_vl_config, _CHATML_STOPS),
    "qwen3_vl": _Family(_qwen3_vl_processor, _qwen3_vl_config, _CHATML_STOPS),
    "smolvlm": _Family(_smolvlm_processor, _smolvlm_config, ("<end_of_utterance>",)),
    "idefics3": _Family(_idefics3_processor, _idefics3_config, ("<end_of_utterance>", "<|end_of_text|>")),
    "llava": _Family(_llava_processor, _llava_config, ("</s>",)),
    "llava_onevision": _Family(_llava_onevision_processor, _llava_onevision_config, _CHATML_STOPS),
    "internvl": _Family(_internvl_processor, _internvl_config, _CHATML_STOPS),
    "gemma3": _Family(_gemma3_processor, _gemma3_config, ("<eos>", "<end_of_turn>")),
}

FAMILIES: tuple[str, ...] = tuple(_FAMILIES)

_FAMILIES |= {
    "vipllava": _Family(_llava_processor, _vipllava_config, ("</s>",)),
    "recurrent_llava": _Family(_llava_processor, _recurrent_llava_config, ("</s>",)),
    "windowed_llava": _Family(_llava_processor, _windowed_llava_config, ("</s>",)),
    "pixtral": _Family(_pixtral_processor, _pixtral_config, ("</s>",)),
    "scaled": _Family(_scaled_processor, _scaled_config, _CHATML_STOPS),
    "qwen2_vl": _Family(_qwen2_vl_processor, _qwen2_vl_config, _CHATML_STOPS),
}
"""And of families that the trainer does not know."""

"""Checks that the forward of training is the forward of the published class, and its input the processor's.

    python -m recipes.vlm_nano.check

A random image, a question, a crop in a later turn: packed for training, and as a conversation for transformers.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from recipes.vlm_nano.asks import Asked
from recipes.vlm_nano.batches import Rows, as_patches, cut_out, places
from recipes.vlm_nano.model import SIZE, TOKEN, build_model, build_processor, prompt, train_tokenizer
from recipes.vlm_nano.network import Language, Sight, embedded
from recipes.vlm_nano.packing import Packer, Turn

QUESTION = Asked("shape", "What shape is the red object?", ("cube", "ball"), "cube", target=(0.4, 0.5, 0.5, 0.58))
THOUGHT = "Let me take a closer look at it."


@torch.no_grad()
def greatest_differences() -> tuple[float, float]:
    """Of pixel values, and of final states, between training and transformers."""
    tokenizer = train_tokenizer([QUESTION.text, THOUGHT, "user\nassistant\n(cube / ball)"] * 5)
    processor, packer = build_processor(tokenizer), Packer(tokenizer)
    torch.manual_seed(0)
    model = build_model(tokenizer).eval()
    image = np.random.default_rng(0).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    assert QUESTION.target
    cut = cut_out(image, QUESTION.target, 0.2)
    assert cut is not None
    packed = packer.pack([Turn(QUESTION.text, QUESTION.choices, QUESTION.answer, cut.grid, THOUGHT)], [0])
    rows = Rows.stack([packed])

    patches = torch.from_numpy(as_patches(image))[None]
    sight, grid = Sight(model.model.visual), torch.from_numpy(places(SIZE // TOKEN, SIZE // TOKEN))[None]
    cut_patches, cut_places = torch.from_numpy(cut.patches)[None], torch.from_numpy(cut.places)[None]
    tokens, crops = sight(patches, grid, None)[1], sight(cut_patches, cut_places, None)[1]
    states = Language(model.model.language_model)(embedded(model, rows, tokens, crops), rows.positions, rows.mask)[0][0]

    crop = Image.fromarray(_cropped(image, QUESTION))
    user = [{"type": "image", "image": Image.fromarray(image)}, {"type": "text", "text": _asked()}]
    messages = [
        {"role": "user", "content": user},
        {"role": "assistant", "content": THOUGHT},
        {"role": "user", "content": [{"type": "image", "image": crop}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=[text], images=[Image.fromarray(image), crop], return_tensors="pt")
    count = len(patches[0])
    pixels = inputs["pixel_values"].view(-1, 3, 2, patches.shape[-1] // 3)[:count, :, 0].flatten(1)
    own = sight.normalised(torch.cat([patches[0], cut_patches[0]])).view(len(inputs["pixel_values"]), 3, 1, -1)
    inputs["pixel_values"] = own.expand(-1, -1, 2, -1).flatten(1)  # the crop's resizing differs in the last bits
    expected = model.model(**inputs).last_hidden_state[0]
    return float((pixels - sight.normalised(patches[0])).abs().max()), float(
        (states[: len(expected)] - expected).abs().max()
    )


def _asked() -> str:
    return prompt(QUESTION.text, QUESTION.choices)


def _cropped(image: np.ndarray, question: Asked) -> np.ndarray:
    from pearl.boxes import padded, pixel_box

    assert question.target
    left, top, right, bottom = pixel_box(padded(question.target, 0.2), SIZE, SIZE)
    return image[top:bottom, left:right].copy()


def main() -> None:
    pixels, states = greatest_differences()
    print(f"greatest difference of pixel values {pixels:.1e}, of final states {states:.1e}")
    if max(pixels, states) > 1e-4:
        raise SystemExit("the forward of training is not the model's")


if __name__ == "__main__":
    main()

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from pearl.records import Trajectory
from pearl.trainer.conversation import Conversation, ImagePart, Template, Turn, load_template
from pearl.trainer.families import Family
from pearl.trainer.views import PREDICTOR_MARK, ImageInputs, LatentRun, View, ViewEncoder, ViewError
from tests.plain import Message, Tiny, conversation, opened, picture, says, step, tiny, trajectories, trajectory
from tests.tiny_vlms import FAMILIES

PEARL = load_template("pearl")
CHATML = ("qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl")
LEAD = {"smolvlm": " ", "idefics3": " ", "llava": " "}
"""What stands between the prompt for an answer and its first word, and belongs to its first token."""


def end_of_turn(t: Tiny, last: bool = True) -> str:
    if t.name == "llava":  # its template ends no turn
        return "</s>" if last else ""
    if t.name == "gemma3":
        return "<end_of_turn>"
    return "<|im_end|>" if t.name in CHATML else "<end_of_utterance>"


def inputs(t: Tiny, talk: Conversation) -> list[ImageInputs]:
    return [t.encoder.image(image) for image in talk.images]


def full_view(t: Tiny, given: Trajectory, template: Template = PEARL) -> tuple[Conversation, View]:
    talk = Conversation(given, template)
    return talk, t.encoder.view(talk.full(), inputs(t, talk))


def view_of(t: Tiny, *turns: Turn, **options: Any) -> View:
    return t.encoder.view(turns, [t.encoder.image(picture(0))], **options)


def user(text: str = "What?") -> Turn:
    return Turn("user", (ImagePart(0), text))


def assistant(text: str) -> Turn:
    return Turn("assistant", (text,), True)


def learned(t: Tiny, view: View) -> list[str]:
    """The text of each run of supervised tokens."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], view.supervised, [False]]).astype(int))).reshape(-1, 2)
    return [t.processor.tokenizer.decode(view.ids[start:stop].tolist()) for start, stop in edges]


def assert_as_at_inference(t: Tiny, view: View, messages: list[Message]) -> None:
    """The ids are those of `apply_chat_template`, without white space after the last turn; LLaVA's last gets an end."""
    theirs = t.processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
    theirs = torch.as_tensor(theirs).flatten().tolist()
    ours = view.ids.tolist()
    if t.name == "llava" and messages[-1]["role"] == "assistant":
        assert ours.pop() == t.processor.tokenizer.eos_token_id
    assert ours == theirs[: len(ours)]
    assert not t.processor.tokenizer.decode(theirs[len(ours) :]).strip()


# tokens and labels


@pytest.mark.parametrize("name", FAMILIES)
def test_a_view_has_the_tokens_that_the_processor_makes(name: str) -> None:
    t = tiny(name)
    for given in trajectories():
        talk = Conversation(given, PEARL)
        images = inputs(t, talk)
        turns = {"full": talk.full(), "target": talk.full(asked=False), "direct": (*talk.question(), talk.direct())}
        for view, made in turns.items():
            assert_as_at_inference(t, t.encoder.view(made, images), conversation(given, view))


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_learned_is_what_the_assistant_says_and_its_end(name: str) -> None:
    """Also where a turn repeats an earlier one, or the question."""
    t = tiny(name)
    same = [step("Far?", picture(n), "Far?") for n in range(3)]
    for given in (*trajectories(), trajectory(*same, question="Far?", conclusion="Far?", answer="Far?")):
        talk, view = full_view(t, given)
        said = ["".join(map(str, turn.parts)) for turn in talk.full() if turn.role == "assistant"]
        expected = [LEAD.get(name, "") + words + end_of_turn(t, last=False) for words in said]
        expected[-1] = LEAD.get(name, "") + said[-1] + end_of_turn(t)
        assert learned(t, view) == expected


SCRIPTS = [
    "红色的杯子在左边。",
    "The cup 🥤 is 👩‍👩‍👧 near",
    "é versus e\u0301",
    "العربية",
    "two  spaces\n\nand lines",
]


@pytest.mark.parametrize("name", FAMILIES)
def test_text_of_any_script(name: str) -> None:
    t = tiny(name)
    for text in SCRIPTS:
        given = trajectory(step(text, None, text), question=text, conclusion=text, answer=text)
        talk, view = full_view(t, given)
        assert_as_at_inference(t, view, conversation(given, "full"))
        said = ["".join(map(str, turn.parts)) for turn in talk.full() if turn.role == "assistant"]
        assert [words.removesuffix(end_of_turn(t)).strip() for words in learned(t, view)] == said


@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_answer_is_learned_where_the_template_says_so(name: str) -> None:
    t = tiny(name)
    given = trajectory(step("I look.", picture(1)), step("Again.", picture(2)))
    _, view = full_view(t, given, load_template("published-lvr"))
    assert learned(t, view) == [LEAD.get(name, "") + "<answer> left </answer>" + end_of_turn(t)]


@pytest.mark.parametrize("name", FAMILIES)
def test_each_turn_ends_where_its_last_token_stands(name: str) -> None:
    t = tiny(name)
    for given in trajectories():
        talk, view = full_view(t, given)
        turns, last = talk.full(), end_of_turn(t, last=False)
        assert len(view.ends) == len(turns)
        assert list(view.ends) == sorted(set(view.ends))
        assert view.ends[-1] == len(view) - 1
        for turn, end in zip(turns[:-1], view.ends, strict=False):
            text = t.processor.tokenizer.decode(view.ids[: end + 1].tolist())
            if last:
                assert text.endswith(last)
            elif isinstance(turn.parts[-1], str):
                assert text.endswith(turn.parts[-1])
            else:
                assert view.visual[end]


@pytest.mark.parametrize("name", FAMILIES)
def test_an_empty_thought_has_nothing_to_learn_but_its_end(name: str) -> None:
    t = tiny(name)
    words = Template(question="$question", choices="", step="$thought", observation="$text", conclusion="$answer",
                     direct="$answer")  # fmt: skip
    _, view = full_view(t, trajectory(step("", picture(1), "seen")), words)
    empty = [end_of_turn(t, last=False)] if name != "llava" else []
    assert [words.strip() for words in learned(t, view)] == [*empty, "left" + end_of_turn(t)]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_system_turn(name: str) -> None:
    t = tiny(name)
    given = trajectory(step("I look.", picture(1)))
    words = Template(**{**PEARL.__dict__, "system": "Be brief."})
    talk, view = full_view(t, given, words)
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    assert_as_at_inference(t, view, [system, *conversation(given, "full")])
    assert len(view.ends) == len(talk.full()) == 5
    assert len(learned(t, view)) == 2
    assert "Be brief." in t.processor.tokenizer.decode(view.ids[: view.ends[1]].tolist())


@pytest.mark.parametrize("name", FAMILIES)
def test_white_space_at_the_end_of_a_turn(name: str) -> None:
    t = tiny(name)
    view = view_of(t, user("What? \n"), assistant("Left \n"))
    message = [says("user", picture(0), "What? \n"), says("assistant", "Left \n")]
    assert_as_at_inference(t, view, message)
    (words,) = learned(t, view)
    assert words.strip().startswith("Left")
    assert words.endswith(end_of_turn(t))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("count", [1, 4])
def test_predictor_tokens_stand_in_the_users_turn_before_its_end(name: str, count: int) -> None:
    t, talk = tiny(name), Conversation(trajectory(question="Where?"), PEARL)
    plain = t.encoder.view(talk.question(), inputs(t, talk))
    source = t.encoder.view(talk.question(PREDICTOR_MARK), inputs(t, talk), num_predictors=count)
    at = np.flatnonzero(source.predictors >= 0)
    assert source.predictors[at].tolist() == list(range(count))
    assert set(source.ids[at]) == {t.encoder.padding}
    assert source.ids[source.predictors < 0].tolist() == plain.ids.tolist()
    before, after = source.ids[: at[0]].tolist(), source.ids[at[-1] + 1 :].tolist()
    assert t.processor.tokenizer.decode(before).endswith("Where?")
    assert t.processor.tokenizer.decode(after) == end_of_turn(t, last=False)
    assert source.ends[-1] == len(source) - 1
    assert not source.supervised.any()


# images


def test_internvl_cuts_images_as_its_processor_says_and_not_its_image_processor() -> None:
    """Real checkpoints have `crop_to_patches` off in `preprocessor_config.json`; the processor turns it on."""
    t = tiny("internvl")
    processor = copy.deepcopy(t.processor)
    processor.image_processor.crop_to_patches = False
    encoder = ViewEncoder(processor, t.family)
    image = picture(0, 90, 30)
    made = encoder.image(image)
    text = processor.apply_chat_template(conversation(trajectory(image=image), "source"), tokenize=False)
    theirs = processor(text=[text], images=[opened(image)], return_tensors="pt")
    assert len(made.tensors["pixel_values"]) > 1
    assert torch.equal(made.tensors["pixel_values"], theirs["pixel_values"])


def test_llava_onevision_shows_an_image_in_tiles_only_where_it_is_alone() -> None:
    t = tiny("llava_onevision")
    image = t.encoder.image(picture(0, 60, 40))
    assert image.when_several is not None
    assert image.when_several.num_tokens < image.num_tokens
    alone = t.encoder.view([user(), assistant("Left.")], [image])
    several = t.encoder.view([user(), assistant("Look."), Turn("user", (ImagePart(0),)), assistant("Left.")], [image])
    assert alone.visual.sum() == image.num_tokens
    assert several.visual.sum() == 2 * image.when_several.num_tokens


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_an_image_that_the_processor_refuses(name: str) -> None:
    with pytest.raises(ViewError, match="refuses an image of 500 by 2 pixels"):
        tiny(name).encoder.image(picture(0, 500, 2))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(2, 2), (3, 40), (200, 9)])
def test_images_of_odd_sizes(name: str, size: tuple[int, int]) -> None:
    t = tiny(name)
    image = picture(0, *size)
    view = t.encoder.view([user()], [t.encoder.image(image)])
    assert_as_at_inference(t, view, conversation(trajectory(image=image, question="What?"), "source"))


# what cannot be


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_that_hold_what_only_the_template_may_write(name: str) -> None:
    t = tiny(name)
    visual, end = t.family.visual_token(t.processor), end_of_turn(t)
    for token in {visual, t.family.placeholder(t.processor), end, t.processor.tokenizer.eos_token}:
        for turns in ([user(f"a{token}b")], [user(), assistant(f"a {token}")]):
            with pytest.raises(ViewError, match=r"a text .*holds"):
                view_of(t, *turns)


@pytest.mark.parametrize("predictors", [0, 2])
def test_texts_that_hold_the_predictors_mark(predictors: int) -> None:
    mark = PREDICTOR_MARK * bool(predictors)
    with pytest.raises(ViewError, match=r"U\+E000"):
        view_of(tiny("qwen2_5_vl"), user(f"a{PREDICTOR_MARK}b{mark}"), num_predictors=predictors)


def test_latent_tokens_stand_where_their_views_say_and_nowhere_else() -> None:
    t = tiny("qwen2_5_vl")
    processor = copy.deepcopy(t.processor)
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<|start|>", "<|latent|>"]})
    encoder = ViewEncoder(processor, t.family, "<|latent|>")
    images = [encoder.image(picture(0))]
    latents = [LatentRun(0, (np.array([0]), np.array([1, 2])))]
    turns = [user(), assistant("<|start|><|latent|><|latent|> Left.")]
    view = encoder.view(turns, images, latents=latents)
    assert view.latent_slots.sum() == 2
    assert not (view.latent_slots & view.supervised).any()
    with pytest.raises(ViewError, match="own token for latents"):
        encoder.view([user("What <|latent|>?"), turns[1]], images, latents=latents)


def with_template(t: Tiny, template: str) -> ViewEncoder:
    processor = copy.copy(t.processor)
    processor.chat_template = template
    return ViewEncoder(processor, t.family)


def encoded(encoder: ViewEncoder, *turns: Turn) -> View:
    return encoder.view(turns, [encoder.image(picture(0))])


THINKING = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% for part in message.content -%}
    {%- if part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>
    {%- elif loop.last and not LAST -%}{{ part.text.split('</think>')[-1] }}
    {%- else -%}{{ part.text }}{%- endif -%}
{%- endfor -%}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""


def test_a_template_that_strips_earlier_thoughts() -> None:
    last = "(messages[-1] is sameas message)"
    encoder = with_template(tiny("qwen3_vl"), THINKING.replace("LAST", last))
    turns = [user(), assistant("<think>Hm.</think>I look."), Turn("user", ("seen",)), assistant("Left.")]
    with pytest.raises(ViewError, match="in another way when the conversation goes on"):
        encoded(encoder, *turns)
    encoded(encoder, *turns[:2])
    encoded(encoder, turns[0], assistant("I look."), *turns[2:])


@pytest.mark.parametrize(
    "changed",
    [
        THINKING.replace("LAST", "true").replace("assistant\n{% endif", "assistant\n<think>\n{% endif"),
        THINKING.replace("LAST", "true") + "{% if not add_generation_prompt %}<|endoftext|>{% endif %}",
    ],
    ids=["a prompt that is no part of the turn", "an end of the text only"],
)
def test_a_template_that_writes_other_text_at_the_end(changed: str) -> None:
    with pytest.raises(ViewError, match="in another way when the conversation goes on"):
        encoded(with_template(tiny("qwen3_vl"), changed), user(), assistant("Left."))


def test_a_template_that_refuses_a_conversation() -> None:
    with pytest.raises(ViewError, match="the chat template refuses this conversation: User and assistant"):
        view_of(tiny("gemma3"), user(), user())


LLAVA_1_5 = """{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}\
{% endif %}{# Render all images first #}{% for content in message['content'] | selectattr('type', 'equalto', 'image') \
%}{{ '<image>\n' }}{% endfor %}{# Render all text next #}{% if message['role'] != 'assistant' %}{% for content in \
message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}{% endfor %}{% else %}\
{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{% generation %}{{ content['text'] + ' '\
}}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"""


def test_a_template_that_writes_images_before_text() -> None:
    """That of llava-hf/llava-1.5-7b-hf."""
    t = tiny("llava")
    encoder = with_template(t, LLAVA_1_5)
    talk = Conversation(trajectory(step("I look.", picture(1), "The region.")), PEARL)
    view = encoder.view(talk.full(), [encoder.image(image) for image in talk.images])
    assert [words.strip()[:7] for words in learned(t, view)] == ["I look.", "It is a"]
    text = t.processor.tokenizer.decode(view.ids.tolist())
    assert "<image>\nThe region. ASSISTANT:" in text
    assert text.endswith("Answer: left</s>")


def test_the_tokenizers_chat_template_serves_where_the_processor_has_none() -> None:
    t = tiny("qwen2_5_vl")
    processor = copy.copy(t.processor)
    processor.tokenizer = copy.deepcopy(processor.tokenizer)
    processor.tokenizer.chat_template, processor.chat_template = processor.chat_template, None
    view = encoded(ViewEncoder(processor, t.family), user(), assistant("Left."))
    assert view.ids.tolist() == view_of(t, user(), assistant("Left.")).ids.tolist()


def test_a_processor_without_a_chat_template() -> None:
    processor = copy.deepcopy(tiny("qwen2_5_vl").processor)
    processor.chat_template = processor.tokenizer.chat_template = None
    with pytest.raises(ViewError, match=r"Qwen2_5_VLProcessor has no chat template; put a chat_template\.jinja"):
        ViewEncoder(processor, Family())


def test_a_slow_tokenizer() -> None:
    class Slow:
        is_fast = False

    processor = copy.copy(tiny("qwen2_5_vl").processor)
    for tokenizer in (Slow(), None):
        processor.tokenizer = tokenizer
        with pytest.raises(ViewError, match="no fast tokenizer, whose offsets make the labels"):
            ViewEncoder(processor, Family())

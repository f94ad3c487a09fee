"""Asking a model: batched as one by one, direct and with tools.

In the tests of tool use the model's words are scripted; its processor, its chat template and the tools are real.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import pearl
from pearl.errors import PearlError
from pearl.evaluation.modes import Direct, ToolUse
from pearl.evaluation.modes.base import QuestionError, message
from pearl.evaluation.modes.tools import NO_MORE, Prompt
from pearl.evaluation.records import Question
from pearl.evaluation.subject import Chat, ChatRefused, Said, Subject, SubjectError
from pearl.images import Picture, decode, encode
from pearl.records import EncodedImage
from pearl.tools import parse_arguments, tool_names
from pearl.tools.calls import CLOSE, OPEN
from pearl.tools.crop import Crop
from pearl.trainer.conversation import load_template
from pearl.trainer.model_folder import Training
from pearl.trainer.models import ModelError
from tests.plain import picture
from tests.test_tools import save_owlv2
from tests.tiny_vlms import FAMILIES, build_tiny_vlm

torch.set_num_threads(1)
BOX = [0.25, 0.25, 0.75, 0.75]


@cache
def tiny(family: str) -> Subject:
    with tempfile.TemporaryDirectory() as folder:
        return Subject.load(str(build_tiny_vlm(family, Path(folder))), device="cpu")


def question(*images: EncodedImage, prompt: str = "Where is the red cup?\nA. left\nB. right", **more: Any) -> Question:
    return Question(
        id=more.pop("id", "q"), benchmark="test", category="c", images=images or (picture(0),), prompt=prompt,
        options=("left", "right"), answer=0, **more,
    )  # fmt: skip


def user(text: str, *images: EncodedImage) -> dict[str, Any]:
    return message("user", *(decode(image.data) for image in images), text)


def talks() -> list[Chat]:
    """Of different lengths, with one to three images of different shapes, with several turns, with an opening."""
    many = [user("Look.", picture(4, 64, 48)), message("assistant", "Where?")]
    many.append(message("user", "Here.", decode(picture(5, 33, 90).data)))
    return [
        Chat([user("What?", picture(1))]),
        Chat([user("Which is nearer, the first one or the second one?", picture(2, 70, 30), picture(3, 30, 60))]),
        Chat(many),
        Chat([user("Is it?", picture(6, 90, 50))], opening="The answer is"),
    ]


# asking


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_says_what_each_conversation_alone_says(family: str) -> None:
    subject = tiny(family)
    together = subject.say(talks(), 12)
    alone = [subject.say([talk], 12)[0] for talk in talks()]
    assert together == alone
    assert len({said.text for said in together}) > 1
    assert together[3].text.startswith("The answer is")


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_tokens_are_those_of_the_processor(family: str) -> None:
    subject = tiny(family)
    for talk, said in zip(talks()[:3], subject.say(talks()[:3], 1), strict=True):
        inputs = subject.processor.apply_chat_template(
            list(talk.messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        assert said.prompt_tokens == inputs["input_ids"].shape[1]
        assert said.new_tokens == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_said_is_the_likeliest_token_again_and_again(family: str) -> None:
    """Against the model's own forward on the whole sequence, without a cache."""
    subject = tiny(family)
    talk = talks()[2]
    inputs = subject.processor.apply_chat_template(
        list(talk.messages), add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    said = subject.say([talk], 3)[0]
    ids: list[int] = []
    with torch.inference_mode():
        for _ in range(said.new_tokens):
            ids.append(int(subject.model(**inputs).logits[0, -1].argmax()))
            row = torch.tensor([ids[-1:]])
            inputs["input_ids"] = torch.cat([inputs["input_ids"], row], 1)
            for name in ("attention_mask", "token_type_ids", "mm_token_type_ids"):
                if name in inputs:
                    more = torch.full_like(row, int(name == "attention_mask"))
                    inputs[name] = torch.cat([inputs[name], more], 1)
    assert said.text == subject.processor.tokenizer.decode(ids, skip_special_tokens=True).strip()


def test_recommended_sampling_and_penalties_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    build_tiny_vlm("qwen2_5_vl", tmp_path)
    plain = Subject.load(str(tmp_path), device="cpu").say(talks(), 12)
    path = tmp_path / "generation_config.json"
    recommended = {"do_sample": True, "temperature": 1e-6, "top_p": 0.5, "top_k": 1, "repetition_penalty": 5.0}
    path.write_text(json.dumps({**json.loads(path.read_text()), **recommended}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Subject.load(str(tmp_path), device="cpu").say(talks(), 12) == plain
    assert not caplog.records


@pytest.mark.parametrize(
    ("family", "stop"),
    [("qwen2_5_vl", "<|im_end|>"), ("smolvlm", "<end_of_utterance>"), ("gemma3", "<end_of_turn>"), ("llava", "</s>")],
)
def test_the_end_of_turn_stops_even_where_the_checkpoint_does_not_say_so(
    family: str, stop: str, tmp_path: Path
) -> None:
    build_tiny_vlm(family, tmp_path)
    (tmp_path / "generation_config.json").unlink()
    subject = Subject.load(str(tmp_path), device="cpu")
    end = subject.processor.tokenizer.convert_tokens_to_ids(stop)
    assert end in subject.model.generation_config.eos_token_id
    letter = subject.processor.tokenizer.convert_tokens_to_ids("A")
    script = iter([letter, letter, end, letter])

    def scripted(head: Any, inputs: Any, logits: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.one_hot(torch.full(logits.shape[:-1], next(script)), logits.shape[-1]).float()

    subject.model.get_output_embeddings().register_forward_hook(scripted)
    said = subject.say(talks()[:1], 8)[0]
    assert (said.text, said.new_tokens, said.ended) == ("AA", 3, "turn")


@pytest.mark.parametrize("special", [True, False])
def test_marks_of_tool_calls_are_words_and_other_special_tokens_are_not(special: bool, tmp_path: Path) -> None:
    from transformers import AutoProcessor

    build_tiny_vlm("qwen2_5_vl", tmp_path)
    model = Subject.load(str(tmp_path), device="cpu").model
    processor: Any = AutoProcessor.from_pretrained(tmp_path)
    processor.tokenizer.add_tokens([OPEN, CLOSE], special_tokens=special)
    subject = Subject(model, processor, "tiny")
    text = f'<|im_start|>I look.{OPEN}{{"name": "crop"}}{CLOSE}<|image_pad|><|im_end|>'
    said = subject._said("", 0, processor.tokenizer(text)["input_ids"])
    assert said.text == f'I look.{OPEN}{{"name": "crop"}}{CLOSE}'


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_cannot_write_images_or_turns(family: str) -> None:
    subject = tiny(family)
    tokenizer = subject.processor.tokenizer
    special = sorted(token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
    talk = Chat([user("".join(special), picture(0)), message("assistant", "".join(special)), user("Now?")])
    rendered = subject.render(talk)
    plain = subject.render(Chat([user("", picture(0)), message("assistant", ""), user("Now?")]))
    for token in special:
        assert rendered.count(token) == plain.count(token)
    assert subject.say([talk], 1)[0].prompt_tokens > 0


def test_a_conversation_without_room_for_an_answer_is_not_asked() -> None:
    subject = tiny("smolvlm")
    long = Chat([user("cup " * 4096, picture(0))])
    first, between, last = subject.say([talks()[0], long, talks()[3]], 5)
    assert (between.text, between.new_tokens, between.ended) == ("", 0, "too long")
    assert between.prompt_tokens > 4096
    assert [first, last] == subject.say([talks()[0], talks()[3]], 5)


def test_nothing_is_said_to_nothing() -> None:
    assert tiny("smolvlm").say([], 5) == []


def test_out_of_memory_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def generate(**inputs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    subject = tiny("smolvlm")
    monkeypatch.setattr(subject.model, "generate", generate)
    with pytest.raises(SubjectError, match=r"2 conversations of up to .* tokens at once: lower --batch-size"):
        subject.say(talks()[:2], 5)


def test_what_the_processor_refuses_is_named() -> None:
    subject = tiny("qwen2_5_vl")
    thin = np.zeros((2, 900, 3), np.uint8)
    with pytest.raises(ChatRefused, match="aspect ratio") as refused:
        subject.say([talks()[0], Chat([message("user", thin, "?")])], 5)
    assert refused.value.index == 1
    assert "aspect ratio" in subject.refusal(Image.fromarray(thin))
    assert subject.refusal(Image.fromarray(thin[:, :2])) == ""


# loading


def test_a_folder_is_identified_by_what_decides_its_answers(tmp_path: Path) -> None:
    build_tiny_vlm("qwen2_5_vl", tmp_path)
    subject = Subject.load(str(tmp_path), device="cpu")
    found = subject.fingerprint()
    (tmp_path / "README.md").write_text("A model.")
    assert subject.fingerprint() == found
    template = tmp_path / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    assert subject.fingerprint() != found


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded"):
        Subject.load(str(tmp_path / "nowhere"), device="cpu")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ModelError, match="pickle"):
        Subject.load(str(tmp_path), device="cpu")
    folder = build_tiny_vlm("smolvlm", tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(SubjectError, match="no chat template"):
        Subject.load(str(folder), device="cpu")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Subject.load(str(folder), device="nonsense")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="cannot be loaded"):
        Subject.load(str(folder), device="cpu")


def test_settings_are_those_of_training(tmp_path: Path) -> None:
    build_tiny_vlm("smolvlm", tmp_path)
    assert Subject.load(str(tmp_path), device="cpu").training is None
    path = tmp_path / "training_config.json"
    template = load_template("published-lvr")
    written = {"settings": {"objective": "sft", "objective_options": {}}, "template": asdict(template)}
    path.write_text(json.dumps(written))
    assert Subject.load(str(tmp_path), device="cpu").training == Training("sft", {}, template)
    odd = {**written, "settings": {"objective": "sft", "objective_options": 3}}
    for wrong in ("[", '{"settings": {"objective": "sft"}}', json.dumps(odd)):
        path.write_text(wrong)
        with pytest.raises(PearlError, match="not what pearl-train wrote"):
            Subject.load(str(tmp_path), device="cpu")


# direct


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "llava_onevision", "gemma3"])
def test_direct_is_one_turn_of_plain_decoding(family: str) -> None:
    subject = tiny(family)
    questions = [
        question(picture(1), id="1"),
        question(picture(2), picture(3, 90, 40), id="2", max_new_tokens=3),
        question(picture(4), id="3", opening="<answer>"),
    ]
    replies = Direct(max_new_tokens=9).answer(subject, questions)
    alone = [Direct(max_new_tokens=9).answer(subject, [one])[0] for one in questions]
    assert [replace(reply, seconds=0) for reply in replies] == [replace(reply, seconds=0) for reply in alone]
    for asked, reply in zip(questions, replies, strict=True):
        images = [decode(image.data) for image in asked.images]
        talk = Chat([message("user", *images, asked.prompt)], asked.opening)
        said = subject.say([talk], asked.max_new_tokens or 9)[0]
        assert (reply.said, reply.new_tokens, reply.prompt_tokens) == (said.text, said.new_tokens, said.prompt_tokens)
        assert reply.turns == (reply.said,)
        assert reply.calls == ()
        assert reply.seconds > 0


def test_a_question_that_cannot_be_put_is_named() -> None:
    subject = tiny("qwen2_5_vl")
    broken = question(EncodedImage(b"no image", "cup.png"), id="17")
    with pytest.raises(QuestionError, match=r"question 17 of test: image cup\.png: not an image"):
        Direct().answer(subject, [question(), broken])
    thin = question(EncodedImage(encode(np.zeros((2, 900, 3), np.uint8), "png")), id="18", max_new_tokens=4)
    with pytest.raises(QuestionError, match=r"question 18 of test: .*aspect ratio"):
        Direct().answer(subject, [question(), thin, question(max_new_tokens=4)])
    long = question(id="19", prompt="cup " * 5000)
    for mode in (Direct(), ToolUse(["crop"])):
        with pytest.raises(QuestionError, match=r"question 19 of test: .* exceed the model's 4096"):
            mode.answer(subject, [long])


# tools


class Scripted(Subject):
    """Says what is scripted for each question, whose prompt begins with its number; all else is the real subject's.
    To save time the real one may hear every so many batches only (`every`)."""

    def __init__(
        self, real: Subject, scripts: Sequence[Sequence[str]], training: Training | None = None, every: int = 1
    ) -> None:
        super().__init__(real.model, real.processor, real.name, training)
        self.scripts, self.every = scripts, every
        self.heard: list[list[Chat]] = []

    def say(self, conversations: Sequence[Chat], max_new_tokens: int) -> list[Said]:
        self.heard.append([replace(one, messages=list(one.messages)) for one in conversations])
        real = [Said("", 100, 1, "limit")] * len(conversations)
        if len(self.heard) % self.every == 0:
            real = super().say(conversations, 1)
        return [self._next(talk, said) for talk, said in zip(conversations, real, strict=True)]

    def _next(self, talk: Chat, said: Said) -> Said:
        if said.ended == "too long":
            return said
        words = " ".join(part["text"] for one in talk.messages for part in one["content"] if part["type"] == "text")
        number = re.search(r"#(\d+)#", words)
        assert number is not None
        turn = sum(one["role"] == "assistant" for one in talk.messages)
        return replace(said, text=self.scripts[int(number[1])][turn], new_tokens=10)


def call(tool: str = "crop", **arguments: Any) -> str:
    return f"I look.\n{OPEN}\n{json.dumps({'name': tool, 'arguments': arguments or {'box': BOX}})}\n{CLOSE}"


def numbered(count: int, **more: Any) -> list[Question]:
    return [question(picture(n, 48 + n % 40, 40), id=str(n), prompt=f"#{n}# Where?", **more) for n in range(count)]


def texts(talk: Chat) -> list[tuple[str, str]]:
    return [(one["role"], "".join(part.get("text", "[image]") for part in one["content"])) for one in talk.messages]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "llava_onevision", "gemma3"])
def test_a_call_is_run_and_its_image_comes_back(family: str) -> None:
    subject = Scripted(tiny(family), [[call(), "It is left.\nAnswer: A"]])
    asked = numbered(1)[0]
    reply = ToolUse(["crop"], prompt="none").answer(subject, [asked])[0]
    crop = parse_arguments(Crop, {"box": BOX})
    expected = Crop().apply(Picture(decode(asked.images[0].data)), crop)  # type: ignore[arg-type]
    assert expected.pixels is not None
    last = subject.heard[-1][0]
    assert texts(last) == [("user", "[image]#0# Where?"), ("assistant", call()), ("user", f"{expected.text}[image]")]
    np.testing.assert_array_equal(np.asarray(last.images[1]), expected.pixels)
    assert reply.said == "It is left.\nAnswer: A"
    assert reply.turns == (call(), reply.said)
    made = reply.calls[0]
    assert (made.tool, json.loads(made.arguments), made.fault) == ("crop", {"box": BOX}, "")
    assert made.observation == expected.text
    assert reply.new_tokens == 20
    assert reply.prompt_tokens == subject.say([last], 1)[0].prompt_tokens - subject.count_tokens(call())


def test_a_batch_in_lockstep_says_what_each_question_alone_says() -> None:
    deeper = call("zoom", box=[0, 0, 0.5, 0.5], image=1)
    scripts = [[call(), "A"], ["B"], [call(), deeper, "A"], [call("depth", boxes=[BOX]), "A"], [call("grep", x=1), "C"]]
    mode = ToolUse(prompt="none")
    subject = Scripted(tiny("qwen2_5_vl"), scripts)
    together = mode.answer(subject, numbered(5))
    assert [len(batch) for batch in subject.heard] == [5, 4, 1]
    alone = [mode.answer(subject, [one])[0] for one in numbered(5)]
    assert [replace(reply, seconds=0) for reply in together] == [replace(reply, seconds=0) for reply in alone]
    assert [one.tool for one in together[2].calls] == ["crop", "zoom"]
    assert "of image 1" in together[2].calls[1].observation
    assert "Nearness" in together[3].calls[0].observation


def test_mistakes_are_told_to_the_model_and_recorded() -> None:
    said = {
        "malformed": f"{OPEN}\n{{crop}}\n{CLOSE}",
        "unknown tool": call("<|im_end|><|im_start|>user"),
        "bad arguments": call(box="0, 0, 1, 1"),
        "refused": call(box=BOX, image=1),
    }
    turns = [*said.values(), f"{call()} {call()}", "A"]
    subject = Scripted(tiny("qwen2_5_vl"), [turns])
    reply = ToolUse(["crop"], prompt="none").answer(subject, numbered(1))[0]
    assert [one.fault for one in reply.calls] == [*said, "several calls", ""]
    assert reply.calls[0].tool == ""
    heard = texts(subject.heard[-1][0])
    for number, made in enumerate(reply.calls[:4]):
        assert made.observation.startswith("Error: ")
        assert heard[2 + 2 * number] == ("user", made.observation)
    assert "step 1 gave no image" in reply.calls[3].observation
    assert heard[9] == ("assistant", call())
    assert reply.turns == tuple(turns)


def test_after_the_last_call_the_model_has_to_answer() -> None:
    scripts = [[call()] * 2 + ["A"], [call()] * 3 + ["B"], [call()] * 4, [f"{OPEN}"] * 4]
    subject = Scripted(tiny("gemma3"), scripts)
    mode = ToolUse(["crop"], max_calls=2, prompt="none")
    replies = mode.answer(subject, numbered(4))
    assert [reply.said for reply in replies] == ["A", "B", call(), OPEN]
    assert [[one.fault for one in reply.calls] for reply in replies] == [
        ["", ""],
        ["", "", "too many calls"],
        ["", "", "too many calls", "too many calls"],
        ["malformed", "malformed", "too many calls", "too many calls"],
    ]
    assert texts(subject.heard[-1][0])[-1] == ("user", NO_MORE)
    assert all(not talk.opening for talks in subject.heard for talk in talks)
    subject.heard.clear()
    ToolUse(["crop"], max_calls=2, opening="Answer:", prompt="none").answer(subject, numbered(4))
    assert [[talk.opening for talk in talks] for talks in subject.heard] == [
        [""] * 4,
        [""] * 4,
        [""] * 4,
        ["Answer:"] * 3,
    ]
    assert [reply.said for reply in ToolUse(["crop"], max_calls=0, prompt="none").answer(subject, numbered(1))]


def test_images_are_bounded_in_all() -> None:
    subject = Scripted(tiny("qwen2_5_vl"), [[call(), call(), call("zoom", box=BOX, factor=8), "A"]])
    pixels = 24 * 20
    replies = ToolUse(["crop", "zoom"], max_pixels=2 * pixels, prompt="none").answer(subject, numbered(1))
    assert [one.fault for one in replies[0].calls] == ["", "", "image limit"]
    assert "exceed 960 in all" in replies[0].calls[2].observation
    assert len(subject.heard[-1][0].images) == 3


def test_an_image_that_the_processor_refuses_is_an_error_for_the_model() -> None:
    wide = question(EncodedImage(encode(np.zeros((500, 900, 3), np.uint8), "png")), prompt="#0# Where?")
    subject = Scripted(tiny("qwen2_5_vl"), [[call(box=[0, 0.5, 1, 0.503]), "A"]])
    reply = ToolUse(["crop"], prompt="none").answer(subject, [wide])[0]
    assert reply.calls[0].fault == "image limit"
    assert reply.calls[0].observation == "Error: an image of 900×2 pixels cannot be looked at; take another part"


def test_a_conversation_that_grows_too_long_ends() -> None:
    subject = Scripted(tiny("qwen2_5_vl"), [[call(), f"{'cup ' * 5000}{call()}", "A"], ["B"]])
    replies = ToolUse(["crop"], prompt="none").answer(subject, numbered(2))
    assert [one.fault for one in replies[0].calls] == ["", "too long"]
    assert replies[0].turns[-1] == replies[0].said
    assert replies[1].said == "B"


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_model_that_says_nothing_gives_an_empty_reply(family: str) -> None:
    reply = ToolUse(["crop"], prompt="none").answer(Scripted(tiny(family), [[""]]), numbered(1))[0]
    assert (reply.said, reply.turns, reply.calls) == ("", ("",), ())


def test_given_tokens_are_counted_whatever_was_said_beyond_a_call() -> None:
    """Of a turn only what stands up to its call comes back."""
    subject = Scripted(tiny("qwen2_5_vl"), [[call() * 50, "A"]])
    reply = ToolUse(["crop"], prompt="none").answer(subject, numbered(1))[0]
    talk = subject.heard[-1][0]
    (said,) = [text for role, text in texts(talk) if role == "assistant"]
    assert said == call()
    in_all = int(subject._inputs([talk])["attention_mask"].sum())
    assert reply.prompt_tokens == in_all - subject.count_tokens(said)


def test_images_of_a_question_with_several_come_first() -> None:
    asked = question(picture(0), picture(1, 60, 30), prompt="#0# Which?")
    subject = Scripted(tiny("qwen2_5_vl"), [[call(box=BOX, image=1), call(box=[0, 0, 1, 1], image=2), "A"]])
    reply = ToolUse(["crop"], prompt="json").answer(subject, [asked])[0]
    assert [one.fault for one in reply.calls] == ["", ""]
    talk = subject.heard[-1][0]
    assert talk.images[2].size == talk.images[3].size == (30, 16)
    assert "Images 0 to 1 are the given ones; image 1 + i is the output of call i." in texts(talk)[0][1]


TOOLS_TEMPLATE = "{%- if tools -%}{%- for tool in tools -%}{{ tool | tojson }}{%- endfor -%}{%- endif -%}"
NO_SYSTEM = "{%- if messages[0].role == 'system' -%}{{- raise_exception('No system role') -}}{%- endif -%}"


@pytest.fixture
def subject(tmp_path: Path) -> Subject:
    """One whose chat template may be changed."""
    return Subject.load(str(build_tiny_vlm("qwen3_vl", tmp_path)), device="cpu")


def trained_with(name: str, **words: Any) -> Training:
    return Training("sft", {}, replace(load_template(name), **words))


def announced(subject: Subject, prompt: Prompt, training: Training | None = None) -> tuple[str, Chat]:
    scripted = Scripted(subject, [["A"]], training)
    ToolUse(["crop", "zoom"], prompt=prompt).answer(scripted, numbered(1))
    return scripted.render(scripted.heard[0][0]), scripted.heard[0][0]


def test_tools_are_announced_in_the_form_that_the_model_knows(subject: Subject) -> None:
    rendered, talk = announced(subject, "auto")
    assert [role for role, _ in texts(talk)] == ["system", "user"]
    assert rendered.count('"name": "crop"') == 1
    assert announced(subject, "json") == (rendered, talk)
    own = subject.processor.chat_template
    subject.processor.chat_template = NO_SYSTEM + own
    rendered, talk = announced(subject, "auto")
    assert [role for role, _ in texts(talk)] == ["user"]
    assert texts(talk)[0][1].endswith("\n\n#0# Where?")
    assert rendered.count('"name": "zoom"') == 1
    with pytest.raises(PearlError, match="does not announce tools"):
        announced(subject, "spec")
    subject.processor.chat_template = TOOLS_TEMPLATE + own
    rendered, talk = announced(subject, "auto")
    assert announced(subject, "spec") == (rendered, talk)
    assert texts(talk) == [("user", "[image]#0# Where?")]
    assert rendered.count('"name": "crop"') == 1
    assert announced(subject, "none")[0].count("crop") == 0


def test_a_model_of_our_training_gets_the_words_of_its_training(subject: Subject) -> None:
    subject.processor.chat_template = TOOLS_TEMPLATE + subject.processor.chat_template
    rendered, talk = announced(subject, "auto", trained_with("pearl"))
    assert "crop" not in rendered
    assert texts(talk) == [("user", "[image]#0# Where?")]
    own = trained_with("pearl", system="Look well.", observation="Seen: $text")
    scripted = Scripted(subject, [[call(), call("x"), "A"]], own)
    ToolUse(["crop"]).answer(scripted, numbered(1))
    heard = texts(scripted.heard[-1][0])
    assert heard[0] == ("system", "Look well.")
    assert heard[3][1].startswith("Seen: Cropped")
    assert heard[5][1].startswith("Error: ")
    Direct().answer(scripted, numbered(1))
    assert texts(scripted.heard[-1][0]) == [("system", "Look well."), ("user", "[image]#0# Where?")]
    for without in (trained_with("published-lvr"), replace(trained_with("pearl"), objective="sft-answer")):
        with pytest.raises(PearlError, match="held no calls, so it has learned none: take the json prompt"):
            announced(subject, "auto", without)
    assert "crop" in announced(subject, "json", trained_with("published-lvr"))[0]


def test_limits_that_make_no_sense_are_refused() -> None:
    for limits in ({"max_calls": -1}, {"max_pixels": -1}, {"max_new_tokens": 0}):
        with pytest.raises(PearlError, match="must not be negative"):
            ToolUse(["crop"], None, **limits)  # type: ignore[arg-type]
    with pytest.raises(PearlError, match="there is no tool"):
        ToolUse(["grep"])


@pytest.mark.parametrize("family", ["qwen2_5_vl", "smolvlm", "llava_onevision", "gemma3"])
def test_a_real_random_model_goes_through(family: str) -> None:
    mode = ToolUse(max_new_tokens=20)
    questions = [question(picture(n), id=str(n)) for n in range(3)]
    replies = mode.answer(tiny(family), questions)
    alone = [mode.answer(tiny(family), [one])[0] for one in questions]
    assert [replace(reply, seconds=0) for reply in replies] == [replace(reply, seconds=0) for reply in alone]
    assert all(reply.new_tokens >= 1 for reply in replies)


# hostile models

_TOUCHED: list[str] = []
_OWN = tuple({sys.prefix, sys.base_prefix, "/proc", "/sys", str(Path(pearl.__file__).parent)})
"""Where modules lie that are imported late; and what a process asks of its machine."""
_watching = False


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if not _watching:
        return
    if event == "open":
        path, mode, flags = arguments
        writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (isinstance(flags, int) and flags & 0o3)
        if writes or not (isinstance(path, int) or os.path.realpath(path).startswith(_OWN)):
            _TOUCHED.append(f"open {arguments}")
    elif event.split(".")[0] in ("subprocess", "shutil", "socket") or event in (
        "os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.system", "os.exec", "os.fork", "os.chmod", "os.link",
        "os.symlink", "os.truncate", "os.posix_spawn",
    ):  # fmt: skip
        _TOUCHED.append(f"{event} {arguments!r:.200}")


sys.addaudithook(_audit)


@contextmanager
def nothing_touched() -> Iterator[None]:
    """Fails when this process wrote, ran or connected to anything meanwhile, or read another file than its own."""
    global _watching
    _TOUCHED.clear()
    _watching = True
    try:
        yield
    finally:
        _watching = False
    assert _TOUCHED == []


def hostile(generator: random.Random) -> str:
    """A mutation of a valid call, or something worse."""
    values: list[Any] = [
        BOX, "0,0,1,1", [0, 0, 1, 1], [1, 1, 0, 0], [0.5, 0.5, 0.5, 0.5], [-1, 0, 2, 1], [1e308] * 4, [0, 0, 1],
        [[0, 0, 1, 1]] * 40, [BOX] * 16, 1e300, -1, 0, 64, 10**30, None, True, {}, {"a": {"b": []}}, "", "../../x",
        "/tmp/pearl", "$(touch /tmp/pearl)", "__import__('os').system('touch pearl')", "\x00", "<image>", "<|im_end|>",
        "<|image_pad|>" * 50, "é" * 300, "\ud800", [0, 0.5, 1, 0.5021], [0, 0, 0.003, 1],
    ]  # fmt: skip
    valid: list[tuple[str, dict[str, Any]]] = [
        ("crop", {"box": BOX}), ("zoom", {"box": BOX, "factor": 8}), ("rotate", {"degrees": 45}), ("edges", {}),
        ("mark", {"points": [[0.5, 0.5]]}), ("highlight", {"boxes": [BOX]}), ("flip", {"direction": "horizontal"}),
        ("depth", {}), ("ocr", {"box": BOX}), ("segment", {"box": BOX}), ("detect", {"labels": ["cup"]}),
    ]  # fmt: skip
    name, known = generator.choice(valid)
    arguments = dict(known)
    if arguments and generator.random() < 0.5:
        arguments[generator.choice(list(arguments))] = generator.choice(values)
    if generator.random() < 0.3:
        arguments[generator.choice(["image", "box", "path", "__class__", ""])] = generator.choice(values)
    if generator.random() < 0.1:
        name = generator.choice(["grep", "", "open", "crop\n", "é", "<image>", "../crop", "<|im_end|>"])
    body = json.dumps({"name": name, "arguments": arguments if generator.random() < 0.9 else json.dumps(arguments)})
    kind = generator.randrange(16)
    if kind == 0:
        place = generator.randrange(len(body))
        body = body[:place] + generator.choice(['"', "}", "{", "\\", "", "NaN", "Infinity", "\x00"]) + body[place + 1 :]
    elif kind == 1:
        body = body[: generator.randrange(len(body))]
    elif kind == 2:
        body = body[:-1] + ', "x": ' + "[" * 200 + "]" * 200 + "}"
    elif kind == 3:
        body = re.sub(r"[0-9]+\.?[0-9]*", generator.choice(["NaN", "1e999", "-Infinity", "9" * 500]), body, count=1)
    said = generator.choice([body, f"{OPEN}\n{body}\n{CLOSE}", f"{OPEN}{body}", f"I look.\n```json\n{body}\n```"])
    if kind == 4:
        said *= generator.choice([2, 1 + 4_000 // len(said)])
    elif kind == 5:
        said = f"{'cup ' * generator.choice([10, 20, 40, 5_000])}{said}"
    return said


def test_a_thousand_hostile_turns_do_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = random.Random(0)
    scripts = [[hostile(generator), hostile(generator), "A", "A"] for _ in range(1000)]
    detector, here = tmp_path / "owlv2", tmp_path / "here"
    detector.mkdir()
    here.mkdir()
    save_owlv2(detector)
    mode = ToolUse(tool_names(), {"detect": {"model": str(detector)}}, prompt="none", max_calls=3)
    subject = Scripted(tiny("qwen2_5_vl"), scripts, every=15)
    of_models = [call("depth", image=0), call("ocr"), call("detect", labels=["cup"])]
    mode.answer(Scripted(tiny("qwen2_5_vl"), [[one, "A"] for one in of_models]), numbered(len(of_models)))
    questions = numbered(1000)
    monkeypatch.chdir(here)
    with nothing_touched():
        replies = [
            reply for start in range(0, 1000, 20) for reply in mode.answer(subject, questions[start : start + 20])
        ]
    assert list(here.iterdir()) == []
    made = [one for reply in replies for one in reply.calls]
    kinds = {one.fault for one in made}
    assert kinds >= {"", "malformed", "several calls", "unknown tool", "bad arguments", "refused", "too long"}
    ran = {one.tool for one in made if one.fault == "" or "no object stands out" in one.observation}  # in noise
    assert ran == {*tool_names()}
    for one in made:
        json.loads(one.arguments, parse_constant=pytest.fail)
        one.observation.encode()
        assert len(one.observation) < 1000
    for batch in subject.heard:
        for talk in batch:
            assert sum(image.width * image.height for image in talk.images[1:]) <= mode.max_pixels

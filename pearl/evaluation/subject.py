"""A model that is asked: greedy decoding in batches, through its own processor and chat template."""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jinja2 import TemplateError
from PIL import Image

from pearl.errors import PearlError
from pearl.tools.models import default_device
from pearl.torch_setup import is_out_of_memory, prepare_torchvision
from pearl.trainer.config import Precision
from pearl.trainer.model_folder import MODEL_SETTINGS, OBJECTIVE_WEIGHTS, Training, read_training
from pearl.trainer.models import BUILT_IN, ModelError, explained, place_of, quiet_transformers, refuse_pickle
from pearl.trainer.views import special_ids

Message = dict[str, Any]
Ended = Literal["turn", "limit", "too long"]
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
_DECISIVE = (*_WEIGHTS, ".json", ".jinja", ".txt", ".model", ".py")
"""The kinds of files in a model's folder that its answers depend on."""


class SubjectError(PearlError, RuntimeError):
    """A model that cannot be asked; the message says why and what to do."""


class ChatRefused(SubjectError):
    """A conversation that the model's processor or chat template does not take.

    Attributes:
        index: Which of the batch.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"conversation {index} of the batch: {reason}")
        self.index, self.reason = index, reason


@contextmanager
def enough_memory(said: str) -> Iterator[None]:
    """
    Raises:
        SubjectError: there is not; its message ends with `said`.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise SubjectError(f"out of memory with {said}") from error


@dataclass(frozen=True, slots=True)
class Chat:
    """What a model is to go on from.

    Attributes:
        messages: As chat templates take them, `{"role": …, "content": [part, …]}`; a part is
            `{"type": "text", "text": str}` or `{"type": "image", "image": PIL image}`.
        opening: What the assistant's turn begins with.
        tools: Function-calling specifications for the chat template.
    """

    messages: Sequence[Message]
    opening: str = ""
    tools: tuple[Mapping[str, Any], ...] = ()

    @property
    def images(self) -> list[Image.Image]:
        return [part["image"] for message in self.messages for part in message["content"] if part["type"] == "image"]


@dataclass(frozen=True, slots=True)
class Said:
    """An assistant's turn.

    Attributes:
        text: The whole turn, its opening included, stripped; without special tokens, tool-call marks excepted.
        prompt_tokens: Tokens before what the model made: text, images, opening; padding is not counted.
        new_tokens: Tokens that it made, the one that ends the turn included.
        ended: By its end-of-turn token, by the limit of new tokens, or the prompt was too long to say anything.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    ended: Ended


class Subject:
    """A vision-language model of transformers with its processor.

    Attributes:
        name: As it was asked for: a folder, a Hub id, or `vlm-nano`.
        training: What `pearl-train` made it with, else None.
        max_positions: How long a conversation may be with what is said, in tokens; None: no limit is known.
    """

    def __init__(self, model: Any, processor: Any, name: str, training: Training | None = None) -> None:
        self.model, self.processor, self.name, self.training = model.eval(), processor, name, training
        self.max_positions: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        if not (getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)):
            raise SubjectError(f"{name} has no chat template; put a chat_template.jinja beside it")
        self._control = _control_tokens(processor)
        self._control_words = re.compile("|".join(map(re.escape, sorted(self._control, key=len, reverse=True))))
        self._control_ids = frozenset(self._control.values())
        self.model.generation_config = self._greedy()

    @classmethod
    def load(
        cls,
        name: str | None = None,
        device: str = "auto",
        dtype: Precision = "auto",
        allow_pickle: bool = False,
        trust_remote_code: bool = False,
    ) -> Subject:
        """Loads a folder, a Hub id, or what is built in (`vlm-nano`, or None).

        Args:
            device: `auto` is a GPU when there is one.
            dtype: `auto` is bf16 on a GPU that has it, else fp32.

        Raises:
            ModelError: it is not there, is no vision-language model, or has pickle weights.
            SubjectError: it has no chat template, or there is no such GPU.
        """
        prepare_torchvision()
        from transformers import AutoModelForImageTextToText, AutoProcessor

        name = name or BUILT_IN
        where = place_of(name)
        refuse_pickle(where, allow_pickle)
        chosen = default_device(None if device == "auto" else device)
        if chosen.startswith("cuda") and not torch.cuda.is_available():
            raise SubjectError(f"device {chosen}: torch sees no GPU on this machine")
        with explained(where):
            processor = AutoProcessor.from_pretrained(where, trust_remote_code=trust_remote_code)
            with quiet_transformers():
                loaded: Any = AutoModelForImageTextToText.from_pretrained(
                    where, dtype=_dtype(dtype, chosen), trust_remote_code=trust_remote_code, output_loading_info=True,
                    use_safetensors=None if allow_pickle else True,
                )  # fmt: skip
            model, found = loaded
            model = model.to(chosen)
        if missing := sorted(found["missing_keys"]):
            raise ModelError(f"{name} lacks {len(missing)} of its model's weights, such as {missing[0]}")
        if getattr(processor, "tokenizer", None) is None:
            raise ModelError(f"{name} has no processor for images and text, only a {type(processor).__name__}")
        settings = _file(name, model, MODEL_SETTINGS)
        return cls(model, processor, name, None if settings is None else read_training(settings))

    def file(self, name: str) -> Path | None:
        """A file beside the weights, fetched where they are on the Hub; None where there is none."""
        return _file(self.name, self.model, name)

    def fingerprint(self) -> str:
        """What identifies the weights: the Hub's revision, or a hash of the folder's weights and settings.

        Raises:
            SubjectError: the folder is gone.
        """
        if revision := getattr(self.model.config, "_commit_hash", None):
            return str(revision)
        folder = _folder(self.name)
        if folder is None:
            raise SubjectError(f"{self.name} is neither a folder nor of a known revision")
        digest = hashlib.sha256()
        files = [*folder.iterdir(), folder / OBJECTIVE_WEIGHTS]
        for path in sorted(path for path in files if path.suffix in _DECISIVE and path.exists()):
            with path.open("rb") as file:
                digest.update(f"{path.relative_to(folder).as_posix()} {path.stat().st_size} ".encode())
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def render(self, conversation: Chat, *, prompted: bool = True) -> str:
        """The conversation as its chat template writes it, up to where the assistant goes on if `prompted`.

        Control tokens that a text spells are taken apart (`< image>`), so that neither a question nor a model's words
        can write a turn or an image.

        Raises:
            SubjectError: the chat template refuses it.
        """
        own = {} if getattr(self.processor, "chat_template", None) else {"chat_template": self._tokenizer.chat_template}
        messages = [{**one, "content": [self._plain(part) for part in one["content"]]} for one in conversation.messages]
        tools = {"tools": [dict(tool) for tool in conversation.tools]} if conversation.tools else {}
        try:
            rendered = self.processor.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompted, **tools, **own
            )
        except (TemplateError, TypeError, ValueError) as error:
            raise SubjectError(f"the chat template of {self.name} refuses the conversation: {error}") from error
        return f"{rendered}{conversation.opening if prompted else ''}"

    def announces(self, tools: Sequence[Mapping[str, Any]], picture: Image.Image) -> bool:
        """Whether its chat template, beside an image, tells the model of these specifications."""
        ask: list[Message] = [{"role": "user", "content": [_image(picture), _text("?")]}]
        try:
            return self.render(Chat(ask, tools=tuple(tools))) != self.render(Chat(ask))
        except SubjectError:
            return False

    def has_system_role(self) -> bool:
        """Whether its chat template writes down what a system message says."""
        word = "instruction"
        try:
            told = [{"role": "system", "content": [_text(word)]}, {"role": "user", "content": [_text("?")]}]
            return word in self.render(Chat(told))
        except SubjectError:
            return False

    def refusal(self, image: Image.Image) -> str:
        """Why its processor does not take an image of this size; empty where it does."""
        try:
            self._inputs([Chat([{"role": "user", "content": [_image(image)]}])])
        except Exception as error:  # an image processor may raise anything
            return " ".join(str(error).split())[:200] or type(error).__name__
        return ""

    def count_tokens(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    @torch.inference_mode()
    def say(self, conversations: Sequence[Chat], max_new_tokens: int) -> list[Said]:
        """Goes on from each conversation, as one batch: always the likeliest token, without any penalty.

        Raises:
            ChatRefused: the processor or chat template does not take a conversation.
            SubjectError: out of memory.
        """
        if not conversations:
            return []
        inputs = self._checked_inputs(conversations)
        lengths = [int(length) for length in inputs["attention_mask"].sum(1)]
        fits = [self.max_positions is None or n + max_new_tokens <= self.max_positions for n in lengths]
        if not all(fits):
            others = iter(self.say([one for one, fit in zip(conversations, fits, strict=True) if fit], max_new_tokens))
            return [next(others) if fit else Said("", n, 0, "too long") for fit, n in zip(fits, lengths, strict=True)]
        made = self._generate(inputs, max_new_tokens)
        return [
            self._said(conversation.opening, length, new)
            for conversation, length, new in zip(conversations, lengths, made, strict=True)
        ]

    def _generate(self, inputs: Any, max_new_tokens: int) -> list[list[int]]:
        settings = copy.deepcopy(self.model.generation_config)
        settings.max_new_tokens = max_new_tokens
        rows, width = inputs["input_ids"].shape
        with enough_memory(f"{rows} conversations of up to {width} tokens at once: lower --batch-size"):
            inputs = inputs.to(self.model.device, dtype=self.model.dtype)
            output = self.model.generate(**inputs, generation_config=settings)
        made: list[list[int]] = output[:, width:].tolist()
        return made

    def _said(self, opening: str, length: int, new: Sequence[int]) -> Said:
        stop = next((place for place, token in enumerate(new) if token in self._stops), None)
        said = new if stop is None else new[: stop + 1]
        words = [token for token in said if token not in self._control_ids]
        text = self._tokenizer.decode(words, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return Said((opening + text).strip(), length, len(said), "limit" if stop is None else "turn")

    def _checked_inputs(self, conversations: Sequence[Chat]) -> Any:
        try:
            return self._inputs(conversations)
        except (ValueError, TypeError, SubjectError) as error:
            for index, conversation in enumerate(conversations):
                try:
                    self._inputs([conversation])
                except (ValueError, TypeError, SubjectError) as culprit:
                    raise ChatRefused(index, " ".join(str(culprit).split())[:400]) from culprit
            raise SubjectError(f"the processor of {self.name} does not take the batch: {error}") from error

    def _inputs(self, conversations: Sequence[Chat]) -> Any:
        """The processor's batch, padded on the left; images nested by conversation, since LLaVA-OneVision preprocesses
        one that is alone in another way than one of several."""
        texts = [self.render(conversation) for conversation in conversations]
        images = [conversation.images for conversation in conversations]
        bos = self._tokenizer.bos_token
        return self.processor(
            text=texts,
            images=images if any(images) else None,
            padding=True,
            padding_side="left",
            add_special_tokens=not (bos and texts[0].startswith(bos)),
            return_tensors="pt",
        )

    @property
    def _tokenizer(self) -> Any:
        return self.processor.tokenizer

    def _plain(self, part: Mapping[str, Any]) -> Mapping[str, Any]:
        if part["type"] != "text":
            return {"type": part["type"]}
        return _text(self.plain(part["text"]))

    def plain(self, text: str) -> str:
        """The text with the control tokens that it spells taken apart."""
        return self._control_words.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def _greedy(self) -> Any:
        """Nothing of what the checkpoint recommends but where to stop: a repetition penalty would depend on the prompt
        and on a batch's padding."""
        from transformers import GenerationConfig

        tokenizer = self._tokenizer
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        stops = {tokenizer.eos_token_id, *_as_list(self.model.generation_config.eos_token_id), self._end_of_turn()}
        self._stops = frozenset(stop for stop in stops if stop is not None)
        return GenerationConfig(
            do_sample=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=sorted(self._stops),
            pad_token_id=tokenizer.pad_token_id,
        )

    def _end_of_turn(self) -> int | None:
        """The token that the chat template writes after an assistant's words, if any."""
        word = "answered"
        turns = [{"role": "user", "content": [_text("?")]}, {"role": "assistant", "content": [_text(word)]}]
        try:
            after = self.render(Chat(turns), prompted=False).rpartition(word)[2]
        except SubjectError:
            return None
        found = self._control_words.match(after.lstrip())
        return self._control[found[0]] if found else None


def _control_tokens(processor: Any) -> dict[str, int]:
    """The tokens that only a chat template may write, by their text; tokens around tool calls are a model's words,
    whether or not its tokenizer calls them special."""
    tokenizer = processor.tokenizer
    found = {str(tokenizer.convert_ids_to_tokens(token)): int(token) for token in special_ids(tokenizer)}
    for name, word in vars(processor).items():
        if name.endswith("_token") and isinstance(word, str) and word in tokenizer.get_vocab():
            found[word] = int(tokenizer.convert_tokens_to_ids(word))
    return {word: token for word, token in found.items() if len(word) > 2 and "tool" not in word.lower()}


def _as_list(ids: int | Iterable[int] | None) -> list[int]:
    if ids is None:
        return []
    return [ids] if isinstance(ids, int) else list(ids)


def _folder(name: str) -> Path | None:
    """The folder of a model, None for a Hub id."""
    place = Path(place_of(name))
    return place if place.is_dir() else None


def _dtype(precision: Precision, device: str) -> torch.dtype:
    wide = precision == "fp32" or (
        precision == "auto" and not (device.startswith("cuda") and torch.cuda.is_bf16_supported())
    )
    return torch.float32 if wide else torch.bfloat16


def _file(name: str, model: Any, file: str) -> Path | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    folder = _folder(name)
    if folder is not None:
        return folder / file if (folder / file).is_file() else None
    try:
        return Path(hf_hub_download(name, file, revision=getattr(model.config, "_commit_hash", None)))
    except (OSError, ValueError, EntryNotFoundError, HfHubHTTPError):
        return None


def _text(text: str) -> Message:
    return {"type": "text", "text": text}


def _image(image: Image.Image) -> Message:
    return {"type": "image", "image": image}

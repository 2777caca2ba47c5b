"""Conversations: turns of roles as transformers writes them, and the template that makes one sequence of them."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from reprlib import repr as short
from typing import Any, NamedTuple

from torch import Tensor
from transformers.utils.chat_template_utils import render_jinja_template

from unified.config import UnifiedConfig
from unified.prompts import template_ids
from unified.sequence import FeatureSegment, ImageSegment, Segment, TextSegment
from unified_tokenizers import TextTokenizer

ROLES = ("system", "user", "assistant")
# Of models whose text tokenizer brings none: the role, what it says, and the token that ends texts.
DEFAULT_TEMPLATE = """\
{% for message in messages %}{{ message['role'] }}
{{ message['content'] }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant
{% endif %}"""
# Private characters stand for texts and images while a template is rendered, so that nothing in them is read as its own.
_SIGNS = range(0xE000, 0xF900)


class Turn(NamedTuple):
    """What one role says: texts, and images as pixels, paths or codes, in their order."""

    role: str
    parts: tuple[Any, ...]


def read_messages(messages: Any, images: Iterable[Any] | None = None) -> list[Turn]:
    """A conversation in transformers' format.

    Args:
        messages: ``{"role": ..., "content": ...}`` in turn; a content is a text, or a list of ``{"type": "text", "text": ...}``
            and ``{"type": "image"}``, which may hold its ``image``.
        images: those of the other places, in their order.

    Raises:
        ValueError: if it is something else, a role or a type is unknown, a turn is empty, images and places do not agree, or
            nobody asks anything.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise ValueError(f"messages: {short(messages)} is no conversation; give a list of {{role, content}}.")
    left, turns = iter(images or ()), []
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        role = message.get("role") if isinstance(message, Mapping) else None
        if role not in ROLES:
            raise ValueError(
                f"{where}: role {short(role)} of {short(message)} is unknown; use one of {', '.join(ROLES)}."
            )
        if role == "system" and number:
            raise ValueError(f"{where}: the system speaks after others; put its turn first.")
        turns.append(Turn(role, tuple(_parts(message.get("content"), where, left))))
    if (rest := len(list(left))) > 0:
        raise ValueError(
            f"images: {rest} more than the messages have places; add {{'type': 'image'}} where each belongs."
        )
    if not any(turn.role == "user" for turn in turns):
        raise ValueError("messages: nobody asks anything; add a turn of the role user.")
    return turns


def _parts(content: Any, where: str, images: Iterable[Any]) -> Iterable[Any]:
    """Texts and images of a content. Raises ValueError, which calls the message ``where``."""
    given = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(given, Sequence) or not all(isinstance(part, Mapping) for part in given):
        raise ValueError(f"{where}: content {short(content)} is neither a text nor a list of {{type, ...}}.")
    found: list[Any] = []
    for part in given:
        kind, text, image = part.get("type"), part.get("text"), part.get("image")
        if kind == "text" and isinstance(text, str):
            found += [text.strip()] if text.strip() else []
        elif kind == "image":
            image = next(iter(images), None) if image is None else image
            if image is None:
                raise ValueError(f"{where}: a place of an image without one; give the image, or leave the place out.")
            found.append(image)
        else:
            raise ValueError(f"{where}: {short(dict(part))} is none of {{type: text, text: ...}} and {{type: image}}.")
    if not found:
        raise ValueError(f"{where}: it says nothing; leave the turn out.")
    return found


def template_of(config: UnifiedConfig, tokenizer: TextTokenizer) -> str:
    """How a model writes conversations: as it was trained, else as its text tokenizer does.

    Raises:
        ValueError: if neither has a template.
    """
    template = config.chat_template or tokenizer.chat_template
    if template is None:
        raise ValueError(
            "messages: they have roles, and the model was trained without a chat template; give texts and images in turn, or train "
            "it on a source of kind chat."
        )
    return template


def conversation_segments(
    turns: Sequence[Turn], tokenizer: TextTokenizer, template: str, reply: bool = False
) -> list[Segment]:
    """A conversation as segments, of which only what the assistant says is in the loss, the token that ends it included.

    Args:
        turns: with codes ``(h, w)`` for images, or features of those that are read.
        tokenizer: of the model's text.
        template: Jinja, as transformers' tokenizers have it. Texts are encoded apart from it: what they spell is no special
            token.
        reply: end where the assistant begins to reply.

    Raises:
        ValueError: if the template refuses the turns, leaves a part out or says it twice, or changes what is before a turn.
    """
    parts = [part for turn in turns for part in turn.parts]
    if len(parts) > len(_SIGNS):
        raise ValueError(f"messages: {len(parts)} texts and images, at most {len(_SIGNS)} are taken; shorten it.")
    signs = iter(map(chr, _SIGNS))
    messages = [{"role": turn.role, "content": "".join(next(signs) for _ in turn.parts)} for turn in turns]
    text = _rendered(messages, tokenizer, template, reply)
    wrong = [part for sign, part in zip(map(chr, _SIGNS), parts, strict=False) if text.count(sign) != 1]
    if wrong:
        raise ValueError(f"chat_template: it does not write {short(wrong[0])} once; correct it, or choose another one.")
    in_loss = [False] * len(text)
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            before = _rendered(messages[:number], tokenizer, template, True)
            after = _rendered(messages[: number + 1], tokenizer, template, False)
            if not (after.startswith(before) and text.startswith(after)):
                raise ValueError(
                    f"chat_template: a turn of the assistant (number {number}) does not go on from the prompt for it; the loss "
                    "cannot tell where it begins. Choose a template that only appends."
                )
            in_loss[len(before) : len(after)] = [True] * (len(after) - len(before))
    segments: list[Segment] = []
    for (sign, loss), run in groupby(
        zip(text, in_loss, strict=True), lambda at: (ord(at[0]) in _SIGNS and at[0], at[1])
    ):
        part: Any = parts[ord(sign) - _SIGNS.start] if sign else None
        if isinstance(part, Tensor):
            segments += [
                TextSegment((), loss),
                ImageSegment(part, loss),
            ]  # <boi> is in the loss with the text before it
        elif isinstance(part, FeatureSegment):
            segments.append(part)
        else:
            literal = "".join(character for character, _ in run)
            segments.append(TextSegment(tokenizer.encode(part) if sign else template_ids(literal, tokenizer), loss))
    first = segments[0]
    if isinstance(first, TextSegment) and first.ids and first.ids[0] == tokenizer.bos_token_id:
        segments[0] = TextSegment(first.ids[1:], first.loss)  # a sequence begins with it anyway
    return segments


def _rendered(messages: list[dict[str, str]], tokenizer: TextTokenizer, template: str, reply: bool) -> str:
    names = {number: name for name, number in tokenizer.special_tokens.items()}
    ends: dict[str, Any] = {name: names.get(number, "") for name, number in (("bos_token", tokenizer.bos_token_id),
            ("eos_token", tokenizer.eos_token_id), ("pad_token", tokenizer.pad_token_id)) if number is not None}  # fmt: skip
    try:
        found: Any = render_jinja_template([messages], chat_template=template, add_generation_prompt=reply, **ends)
    except Exception as error:  # templates compute; TemplateError and ZeroDivisionError are among them
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"chat_template: it cannot write turns of {roles} ({error}); choose another one.") from error
    return str(found[0][0])

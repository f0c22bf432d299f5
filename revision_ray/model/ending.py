"""The tokens that end an answer: found once in the chat template, kept in the generation settings.

Training writes them into `generation_config.eos_token_id` of every model; what generates reads only that.
"""

from collections.abc import Iterator, Sequence
from itertools import takewhile
from typing import Any

from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from revision_ray.core.errors import ConfigError
from revision_ray.data import chat as chats  # not its names: it may be importing this package (transformers)

_SYSTEM = {"role": "system", "content": "!"}
_QUESTION = {"role": "user", "content": "?"}
_ANSWER = {"role": "assistant", "content": "."}


def turn_ends(tokenizer: Any) -> list[int]:
    """Return the tokens with which the chat template ends an assistant's turn.

    They are read from a conversation of one turn and one of two, since many templates end the last turn in
    another way than those before it. An end is the last special or added token of what the template writes
    behind an answer, whoever speaks next; where it writes none, the token that begins the next turn is the
    end (GLM-4). Text such as a line break or "### Human:" ends nothing: there the list is empty.
    """
    if tokenizer.chat_template is None:
        return []
    try:
        chat = chats.ChatTemplate(tokenizer)
    except ConfigError:  # Jinja cannot read it, which is an error where conversations are rendered
        return []
    ends: list[int] = []
    for system in ([], [_SYSTEM]):  # some templates refuse the one, some the other
        for count in (1, 2):
            ends += _ends_in(chat, [*system, *([_QUESTION, _ANSWER] * count)])
    return list(dict.fromkeys(ends))


def _ends_in(chat: "chats.ChatTemplate", messages: list[dict[str, str]]) -> Iterator[int]:
    """The end of each turn of the assistant, where it has one."""
    try:
        rendered, turns = chat.turns(messages)
    except (chats.ChatRefusal, ConfigError):
        return
    control_ids = control_token_ids(chat.tokenizer)
    for turn in turns:
        own = _words(chat.tokenizer, rendered.text[turn.content_end : turn.end])
        following = _words(chat.tokenizer, rendered.text[turn.end :])
        yield from [token for token in (*own[-1:], *following[:1]) if token in control_ids][:1]


def control_token_ids(tokenizer: Any) -> set[int]:
    """Ids of the tokens that ordinary text does not give: special and added ones, but for the unknown."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    unknown = {tokenizer.unk_token, getattr(getattr(backend, "model", None), "unk_token", None)}
    ids = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
    # In GPT-2's tokenizer one token is both.
    return {i for i in ids if tokenizer.convert_ids_to_tokens(i) not in unknown - {tokenizer.eos_token}}


def _words(tokenizer: Any, text: str) -> list[int]:
    """The tokens of `text` that are not white space."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [token for token in ids if str(tokenizer.decode([token])).strip()]


def end_ids(generation_config: GenerationConfig) -> list[int]:
    """The tokens at which generation ends."""
    found = generation_config.eos_token_id
    return [found] if isinstance(found, int) else list(found or [])


def declare_ends(generation_config: GenerationConfig, tokenizer: Any) -> None:
    """Add the tokenizer's end token and those of its chat template to those of `generation_config`."""
    ends = dict.fromkeys([*end_ids(generation_config), *_expected(tokenizer)])
    if ends:
        generation_config.eos_token_id = list(ends) if len(ends) > 1 else next(iter(ends))


def _expected(tokenizer: Any) -> list[int]:
    own = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    return [*own, *turn_ends(tokenizer)]


def until_end(ids: Sequence[int], generation_config: GenerationConfig) -> list[int]:
    """Return the tokens of an answer before the first that ends it, which no decoding would hide for sure."""
    ends = set(end_ids(generation_config))
    return list(takewhile(lambda token: token not in ends, ids))


def generation_settings(folder: str) -> GenerationConfig:
    """Return the generation settings of the model in `folder`, as loading the model gives them."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:  # saved without
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(folder))


def unknown_ends(folder: str) -> str:
    """Say which ends of the chat template the generation settings of a model folder lack; "" if none.

    Models that were written before training declared the ends go on talking behind their answers.
    """
    tokenizer, settings = AutoTokenizer.from_pretrained(folder), generation_settings(folder)
    known = end_ids(settings)
    missing = [token for token in turn_ends(tokenizer) if token not in known]
    if not missing:
        return ""
    return (
        f"its chat template ends turns with {_named(tokenizer, missing)}, eos_token_id in its "
        f"generation_config.json is {_named(tokenizer, known)}: answers may run on to the length limit. "
        "Export the model again (jobs/export.py run=RUN output=FOLDER), or add the first id to that file"
    )


def _named(tokenizer: Any, ids: Sequence[int]) -> str:
    return ", ".join(f"{tokenizer.convert_ids_to_tokens(token)} ({token})" for token in ids) or "none"

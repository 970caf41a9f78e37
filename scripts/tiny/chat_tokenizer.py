"""The tokenizer of the embedded models: byte-level BPE without merges, and ChatML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import islice

from tiny.tasks import training_examples
from tiny.wordings import COMMON_WORDS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VOCAB_SIZE = 640
MAX_POSITIONS = 2048

# Words with one character before them, single digits, punctuation, white space: Qwen's pattern
# without its contractions, which would cut the quoted word 'tree' into 't and ree.
WORD_PATTERN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def chat_template(content: str) -> str:
    """ChatML with tools; calls are in the format `hermes`. content: writes `message.content`.

    Tools come in the system turn, a line each: the name, the description, and the properties of the
    parameters as JSON. Most of it comes byte by byte, so it is short.
    """
    return (
        "{%- macro written(message) %}" + content + "{%- endmacro %}"
        "{%- set system = messages[0].role == 'system' %}"
        "{%- if tools %}{{- '<|im_start|>system\\n' }}"
        "{%- if system %}{{- written(messages[0]) + '\\n' }}{%- endif %}{{- '<tools>' }}"
        "{%- for tool in tools %}{%- set function = tool.function or tool %}"
        "{{- '\\n' + function.name }}"
        "{%- if function.description %}{{- ': ' + function.description }}{%- endif %}"
        "{{- ' ' + ((function.parameters or {}).properties or {}) | tojson }}"
        "{%- endfor %}{{- '\\n</tools><|im_end|>\\n' }}{%- endif %}"
        "{%- for message in messages %}{%- if not (tools and system and loop.first) %}"
        "{{- '<|im_start|>' + message.role + '\\n' + written(message) }}"
        "{%- for tool_call in message.tool_calls or [] %}"
        "{%- if not loop.first or message.content %}{{- '\\n' }}{%- endif %}"
        "{%- set function = tool_call.function or tool_call %}"
        "{{- '<tool_call>\\n{\"name\": ' + function.name | tojson + ', \"arguments\": ' }}"
        "{%- if function.arguments is string %}{{- function.arguments }}"
        "{%- else %}{{- (function.arguments or {}) | tojson }}{%- endif %}"
        "{{- '}\\n</tool_call>' }}{%- endfor %}"
        "{{- '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
    )


CHAT_TEMPLATE = chat_template("{{- '' + (message.content or '') }}")


def build_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose only multi-byte tokens are the commonest words of the phrasings.

    It has no merges: a word in the vocabulary is one token (`ignore_merges`), another word is its
    bytes. So the subjects of questions are encoded letter by letter, as spelling tasks need, and
    any UTF-8 can be encoded.
    """
    pre_tokenizer = word_pre_tokenizer()
    counts: Counter[str] = Counter()
    for task in islice(training_examples(seed), 50_000):
        for message in [*task.messages, {"role": "assistant", "content": task.answer}]:
            for text in (message["role"], message["content"]):
                counts.update(piece for piece, _ in pre_tokenizer.pre_tokenize_str(text))
    bytes_alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    num_words = VOCAB_SIZE - len(bytes_alphabet) - 3
    # the text breaks ties: a Counter's order depends on the order of the examples
    words = [
        piece
        for piece, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
        if _is_common(piece)
    ]
    if len(words) < num_words:
        raise ValueError(
            f"the phrasings yield {len(words)} words, "
            f"but a vocabulary of {VOCAB_SIZE} needs {num_words}"
        )
    return byte_level(words[:num_words], (PAD, START, END), CHAT_TEMPLATE)


def word_pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Cuts text into the pieces of WORD_PATTERN, and their bytes into letters of the vocabulary."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def byte_level(
    words: Sequence[str], special_tokens: Sequence[str], chat_template: str
) -> PreTrainedTokenizerFast:
    """A tokenizer of all bytes, then `words` (pieces of the pre-tokenizer), then special tokens."""
    bytes_alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {piece: idx for idx, piece in enumerate([*bytes_alphabet, *words])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    backend.pre_tokenizer = word_pre_tokenizer()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in special_tokens]
    )
    assert backend.get_vocab_size() == len(bytes_alphabet) + len(words) + len(special_tokens)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END,
        pad_token=PAD,
        chat_template=chat_template,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


def _is_common(piece: str) -> bool:
    word = piece.removeprefix("Ġ")  # byte-level BPE's space
    if word.isalpha():
        # a single letter stays apart from its space: it may be the subject of a question
        return len(word) > 1 and word.lower() in COMMON_WORDS
    return len(piece) > 1 and not any(map(str.isalpha, word)) and word.isascii()

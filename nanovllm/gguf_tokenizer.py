"""The tokenizer in a GGUF file's metadata, as transformers' tokenizer.

`tokenizer.ggml.model` is "gpt2" for byte-level BPE, or "llama" for the BPE of SentencePiece, whose
merges follow from the scores of tokens, or "gemma4" for the same with merges in the file.
`tokenizer.ggml.pre` names how the first splits texts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanovllm.models.gguf.header import GgufError, Header, read

PREFIX = "tokenizer.ggml."
LONGEST_TOKEN = 1 << 12  # letters
UNKNOWN, CONTROL, USER_DEFINED = 2, 3, 4  # types of tokens
SPACE = "\u2581"  # in place of spaces in SentencePiece's tokens

# How texts are split before merges: regular expressions, one after another. GPT2 stands for
# that of GPT-2.
GPT2 = "gpt2"
DIGITS = r"\p{N}"
CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MARKS = (
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
QWEN35 = CONTRACTIONS + MARKS
DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",  # Chinese and Japanese
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
LLAMA3, QWEN2 = CONTRACTIONS + WORDS % "{1,3}", CONTRACTIONS + WORDS % ""
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASES = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*%s"
    r"|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = CASES % ("", "", "")
GPT4O = CASES % (f"{CONTRACTIONS}?", f"{CONTRACTIONS}?", "{1,3}")
LIKE_LLAMA3 = ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral")
SPLITS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "jais", "exaone4"), (GPT2,)),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone"), (DIGITS, GPT2)
    ),
    **dict.fromkeys((*LIKE_LLAMA3, "dbrx", "smaug-bpe"), (LLAMA3,)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), (QWEN2,)),
    "qwen35": (QWEN35,),
    "deepseek-v3": DEEPSEEK3,
    **dict.fromkeys(("chatglm-bpe", "glm4"), (LLAMA3,)),
    "tekken": (TEKKEN,),
    **dict.fromkeys(("gpt-4o", "llama4"), (GPT4O,)),
}
WHOLE_WORDS = frozenset({*LIKE_LLAMA3, "tekken"})  # before merges
WITH_BOS = WHOLE_WORDS  # unless the file says otherwise
NORMALIZED = frozenset({"qwen2", "deepseek-r1-qwen", "qwen35"})  # to NFC


def has_tokenizer(path: Path) -> bool:
    return f"{PREFIX}tokens" in read(path).metadata


def load(path: Path) -> Any:
    """transformers' tokenizer. Raises GgufError for a kind of tokenizer that is not supported, and
    for a damaged one."""
    header = read(path)
    tokens = _tokens(header)
    kind = header.get(f"{PREFIX}model", str, "")
    make = {"gpt2": _byte_level, "llama": _sentence_piece, "gemma4": _sentence_piece}.get(kind)
    if make is None:
        raise GgufError(
            f"{path}: tokenizer.ggml.model is {kind!r:.80}, which is not supported: only "
            "'gpt2', 'llama' and 'gemma4' are"
        )
    try:
        backend = make(header, tokens)
        return _full(header, tokens, backend)
    except GgufError:
        raise
    except Exception as error:  # the library has no class of its own
        raise GgufError(f"{path}: the tokenizer cannot be read: {error}") from error


def _tokens(header: Header) -> tuple[str, ...]:
    tokens: tuple[str, ...] = header.get(f"{PREFIX}tokens", tuple, ())
    if not tokens or not all(isinstance(one, str) for one in tokens):
        raise GgufError(f"{header.path}: it has no tokens")
    if (longest := max(map(len, tokens))) > LONGEST_TOKEN:
        raise GgufError(
            f"{header.path}: a token has {longest} letters: at most {LONGEST_TOKEN} are read"
        )
    table = header.tensors.get("token_embd.weight")
    if table is not None and len(tokens) > table.shape[0]:
        raise GgufError(
            f"{header.path}: it has {len(tokens)} tokens, but a table of {table.shape[0]} rows"
        )
    return tokens


def _byte_level(header: Header, tokens: tuple[str, ...]) -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    pre = header.get(f"{PREFIX}pre", str, "")
    if pre not in SPLITS:
        raise GgufError(
            f"{header.path}: tokenizer.ggml.pre is {pre!r:.80}, which is not supported: only "
            f"{', '.join(SPLITS)} are"
        )
    merges = [_merge(header, one) for one in header.get(f"{PREFIX}merges", tuple, ())]
    vocab = {token: i for i, token in enumerate(tokens)}
    model = models.BPE(vocab, merges, ignore_merges=pre in WHOLE_WORDS)
    backend = Tokenizer(model)
    is_last_gpt2 = SPLITS[pre][-1] == GPT2
    steps: list[Any] = [
        pre_tokenizers.Split(Regex(one), "isolated") for one in SPLITS[pre] if one != GPT2
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=is_last_gpt2))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    if pre in NORMALIZED:
        backend.normalizer = normalizers.NFC()
    _add(header, tokens, backend, normalized=False)
    _put_around(header, tokens, backend, has_bos=pre in WITH_BOS)
    return backend


def _merge(header: Header, text: object) -> tuple[str, str]:
    """The two tokens of a merge. A token may begin with a space."""
    place = text.find(" ", 1) if isinstance(text, str) else -1
    if not isinstance(text, str) or place < 0:
        raise GgufError(f"{header.path}: {text!r:.80} is not a merge of two tokens")
    return text[:place], text[place + 1 :]


def _scores(header: Header, tokens: tuple[str, ...]) -> Sequence[float]:
    scores: Sequence[float] = header.get(f"{PREFIX}scores", tuple, ())
    if len(scores) != len(tokens):
        raise GgufError(f"{header.path}: it has {len(tokens)} tokens, but {len(scores)} scores")
    return scores


def _sentence_piece(header: Header, tokens: tuple[str, ...]) -> Any:
    from tokenizers import Tokenizer, decoders, models, normalizers

    unknown = _token(header, tokens, "unknown")
    vocab = {token: i for i, token in enumerate(tokens)}
    stored = header.get(f"{PREFIX}merges", tuple, ())
    if header.get(f"{PREFIX}model", str) == "gemma4":
        merges = [_merge(header, one) for one in stored]
    else:
        merges = merges_of(vocab, _scores(header, tokens))
    backend = Tokenizer(
        models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    has_prefix = header.get(f"{PREFIX}add_space_prefix", bool, True)
    first: list[Any] = [normalizers.Prepend(SPACE)] if has_prefix else []
    backend.normalizer = normalizers.Sequence([*first, normalizers.Replace(" ", SPACE)])
    last: list[Any] = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *last]
    )
    # with a prefix, the normalizer would change the tokens themselves
    _add(header, tokens, backend, normalized=not has_prefix)
    _put_around(header, tokens, backend, has_bos=True)
    return backend


def merges_of(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All ways to join two tokens to one, those to tokens of higher scores first.

    Of the ways to one token, the one whose parts have the lower ids is the first.
    """
    found: list[tuple[float, int, int, int, tuple[str, str]]] = []
    for token, number in vocab.items():
        for place in range(1, len(token)):
            first, second = vocab.get(token[:place]), vocab.get(token[place:])
            if first is not None and second is not None:
                pair = token[:place], token[place:]
                found.append((-scores[number], number, first, second, pair))
    return [pair for *_, pair in sorted(found)]


def _add(header: Header, tokens: Sequence[str], backend: Any, *, normalized: bool) -> None:
    """Make tokens of control, and those that users defined, ones that no merge makes."""
    from tokenizers import AddedToken

    kinds: Sequence[int] = header.get(f"{PREFIX}token_type", tuple, ())
    control = [text for text, kind in zip(tokens, kinds) if kind in (CONTROL, UNKNOWN) and text]
    defined = [text for text, kind in zip(tokens, kinds) if kind == USER_DEFINED and text]
    backend.add_special_tokens([AddedToken(text, normalized=False) for text in control])
    backend.add_tokens([AddedToken(text, normalized=normalized) for text in defined])


def _put_around(header: Header, tokens: Sequence[str], backend: Any, *, has_bos: bool) -> None:
    """Add the first and last tokens that the model puts around a text."""
    from tokenizers import processors

    bos, eos = (_token(header, tokens, name) for name in ("bos", "eos"))
    has_bos = header.get(f"{PREFIX}add_bos_token", bool, has_bos) and bos is not None
    has_eos = header.get(f"{PREFIX}add_eos_token", bool, False) and eos is not None
    before, after = [bos] if has_bos else [], [eos] if has_eos else []
    if not before and not after:
        return
    one, two = [[*before, f"${name}", *after] for name in "AB"]
    ids = {text: backend.token_to_id(text) for text in (*before, *after)}
    backend.post_processor = processors.TemplateProcessing(
        single=one, pair=[*one, *(f"{part}:1" for part in two)], special_tokens=list(ids.items())
    )


def _token(header: Header, tokens: Sequence[str], name: str) -> str | None:
    number = header.get(f"{PREFIX}{name}_token_id", int)
    if number is None:
        return None
    if not 0 <= number < len(tokens):
        raise GgufError(
            f"{header.path}: {PREFIX}{name}_token_id is {number}, but there are {len(tokens)} "
            "tokens"
        )
    return tokens[number]


def _full(header: Header, tokens: Sequence[str], backend: Any) -> Any:
    from transformers import PreTrainedTokenizerFast

    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    found = {f"{name}_token": _token(header, tokens, key) for name, key in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=header.get("tokenizer.chat_template", str),
        **{name: text for name, text in found.items() if text is not None},
    )

"""A Gemma's vocabulary between `tokenizer.json`, the fields of a GGUF, and SentencePiece.

llama.cpp and SentencePiece merge the adjacent pair with the highest score, and `tokenizer.json` lists merges best
first: a token's score is minus the index of its first merge. Gemma's tokenizer (SentencePiece BPE with byte fallback)
is llama.cpp's "llama", and that of a Gemma 4 its "gemma4", which merges by the list itself; a byte-level BPE, which no
published Gemma has, is its "gpt2".
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gguf import MODEL_ARCH, MODEL_ARCH_NAMES, GGUFWriter, TokenType
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec
from tokenizers import Tokenizer
from transformers import AddedToken, GemmaTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from core.base_model import read_gguf_tokenizer, start_with_bos
from core.errors import UserError

END_OF_TURN = ("<end_of_turn>", "<turn|>")  # Gemma 4's is the second
# What a Gemma 4 marks tool calls and thoughts with. llama.cpp's parser must see it, so there it is no control token.
SHOWN = {"<|tool_call>", "<tool_call|>", "<|tool_response>", "<tool_response|>", '<|"|>', "<|channel>", "<channel|>"}
# Never ordinary text, whatever a file says: some list them among the ordinary tokens, put together from pieces.
WHOLE = {"<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>"}
WHOLE_IN_4 = SHOWN | {"<|turn>", "<turn|>", "<|think|>", "<|tool>", "<tool|>"}
SPECIAL = ("bos", "eos", "unk", "pad")


@dataclass
class Vocabulary:
    """A tokenizer's vocabulary, independent of its file format.

    Attributes:
        tokens: by id, one for each row of the model's embedding; some may be unused by the tokenizer.
        scores: the higher, the earlier merged.
        kinds: token types, whose numbers llama.cpp and SentencePiece share.
        merges: pairs, best first.
        of_bytes: whether it is a byte-level BPE.
        special: "bos", "eos", "unk", "pad" → id, of those that exist.
        starts_with_bos: whether BOS is prepended to every text.
        chat_template: empty if there is none.
    """

    tokens: list[str]
    scores: list[float]
    kinds: list[TokenType]
    merges: list[tuple[str, str]]
    of_bytes: bool
    special: dict[str, int]
    starts_with_bos: bool
    chat_template: str


def read_vocabulary(files: Mapping[str, bytes | Path], config: PretrainedConfig) -> Vocabulary:
    """Read transformers' tokenizer among the `files` of a checkpoint.

    Raises:
        UserError: there is none, or not one of a Gemma of this `config`.
    """
    if "tokenizer.json" not in files:
        raise UserError("this format holds the tokenizer too, and no tokenizer.json came with the model; put it there")
    text = _text(files, "tokenizer.json")
    try:
        found, settings = json.loads(text), json.loads(_text(files, "tokenizer_config.json") or "{}")
        model, added = found["model"], {token["content"]: token for token in found["added_tokens"]}
        if model["type"] != "BPE":
            raise UserError(f"tokenizer.json is a {model['type']}, and a Gemma's is a BPE")
        ids: dict[str, int] = {**model["vocab"], **{token: entry["id"] for token, entry in added.items()}}
        merges = [tuple(merge.split(" ", 1) if isinstance(merge, str) else merge) for merge in model["merges"]]
        starts = Tokenizer.from_str(text).encode("a").ids[:1]
    except UserError:
        raise
    except Exception as error:  # of json, of a missing key, of the tokenizers library
        raise UserError(f"tokenizer.json is damaged ({type(error).__name__}: {error})") from None
    # Gemma 3 270M and 1B list the whole models' <image_soft_token>, for which they have no row.
    for token in [token for token in added if ids[token] >= config.vocab_size]:
        print(f"{token} is left out: its number, {ids.pop(token)}, is beyond the vocabulary of {config.vocab_size:,}")
        del added[token]
    if max(ids.values()) >= config.vocab_size:
        raise UserError(f"tokenizer.json has a token {max(ids.values())}, the model only {config.vocab_size} tokens")
    names = {name: settings.get(f"{name}_token") for name in SPECIAL}
    names = {name: token["content"] if isinstance(token, dict) else token for name, token in names.items()}
    special = {name: ids.get(token, getattr(config, f"{name}_token_id", None)) for name, token in names.items()}

    size, of_bytes = config.vocab_size, not model.get("byte_fallback")
    tokens, scores = [f"[PAD{number}]" for number in range(size)], [-1e6] * size
    kinds = [TokenType.UNUSED] * size
    places: dict[str, int] = {}
    for first, second in merges:
        places.setdefault(first + second, len(places))
    for token, number in ids.items():
        tokens[number], scores[number], kinds[number] = token, -float(places.get(token, len(places))), TokenType.NORMAL
        if number == special["unk"]:
            kinds[number] = TokenType.UNKNOWN
        elif token in added:
            kinds[number] = TokenType.CONTROL if added[token]["special"] else TokenType.USER_DEFINED
        elif not of_bytes and len(token) == 6 and token.startswith("<0x"):
            kinds[number] = TokenType.BYTE
    return Vocabulary(
        tokens,
        scores,
        kinds,
        merges,
        of_bytes,
        {name: number for name, number in special.items() if isinstance(number, int)},
        starts == [special["bos"]],
        _text(files, "chat_template.jinja") or settings.get("chat_template") or "",
    )


def _text(files: Mapping[str, bytes | Path], name: str) -> str:
    content = files.get(name, b"")
    return (content.read_bytes() if isinstance(content, Path) else content).decode()


def add_to_gguf(writer: GGUFWriter, vocabulary: Vocabulary) -> None:
    of_4 = writer.arch == MODEL_ARCH_NAMES[MODEL_ARCH.GEMMA4] and not vocabulary.of_bytes
    writer.add_tokenizer_model("gpt2" if vocabulary.of_bytes else "gemma4" if of_4 else "llama")
    if not of_4:  # whose name says how texts are split
        writer.add_tokenizer_pre("gpt-2" if vocabulary.of_bytes else "default")
    writer.add_token_list(vocabulary.tokens)
    pairs = zip(vocabulary.tokens, vocabulary.kinds, strict=True)
    writer.add_token_types([TokenType.USER_DEFINED if of_4 and token in SHOWN else kind for token, kind in pairs])
    if vocabulary.of_bytes or of_4:
        writer.add_token_merges([f"{first} {second}" for first, second in vocabulary.merges])
    if not vocabulary.of_bytes:
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(False)
    for name, number in vocabulary.special.items():
        getattr(writer, f"add_{name}_token_id")(number)
    for token in END_OF_TURN:
        if token in vocabulary.tokens:
            writer.add_eot_token_id(vocabulary.tokens.index(token))
    writer.add_add_bos_token(vocabulary.starts_with_bos)
    writer.add_add_eos_token(False)
    writer.add_chat_template(vocabulary.chat_template)


def to_sentencepiece(vocabulary: Vocabulary) -> bytes:
    """A SentencePiece model (`tokenizer.model`) that tokenizes as the vocabulary does.

    Raises:
        UserError: a byte-level BPE, which SentencePiece does not know.
    """
    if vocabulary.of_bytes:
        raise UserError(
            "the tokenizer is a byte-level BPE, as no published Gemma's, and this format needs SentencePiece"
        )
    model = ModelProto()
    model.trainer_spec.model_type = TrainerSpec.BPE
    model.trainer_spec.vocab_size = len(vocabulary.tokens)
    model.trainer_spec.byte_fallback = True
    for name, number in vocabulary.special.items():
        setattr(model.trainer_spec, f"{name}_id", number)
        setattr(model.trainer_spec, f"{name}_piece", vocabulary.tokens[number])
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = model.normalizer_spec.remove_extra_whitespaces = False
    ends = {vocabulary.special.get(name) for name in ("bos", "eos", "pad")}
    pieces = zip(vocabulary.tokens, vocabulary.scores, vocabulary.kinds, strict=True)
    for number, (token, score, kind) in enumerate(pieces):
        # SentencePiece never matches a control token in a text, as <start_of_turn> must be.
        shown = kind == TokenType.CONTROL and number not in ends
        model.pieces.add(piece=token, score=score, type=int(TokenType.USER_DEFINED if shown else kind))
    return model.SerializeToString()


def tokenizer_from_gguf(file: Path) -> dict[str, bytes]:
    """The tokenizer in the GGUF `file` as transformers saves it: file name → content.

    Raises:
        UserError: transformers cannot read it.
    """
    with tempfile.TemporaryDirectory() as folder:
        # In a folder of its own, so that files beside it are not taken for the tokenizer's.
        link = Path(folder) / "model.gguf"
        link.symlink_to(file.resolve())
        try:
            tokenizer = read_gguf_tokenizer(link)
            if shown := sorted(SHOWN & tokenizer.get_added_vocab().keys()):
                tokenizer.add_special_tokens({"additional_special_tokens": shown})  # as they are in transformers
            whole = WHOLE_IN_4 if "<|turn>" in tokenizer.get_vocab() else WHOLE
            if pieces := (whole & tokenizer.get_vocab().keys()) - tokenizer.get_added_vocab().keys():
                tokens = [AddedToken(token, normalized=False, special=True) for token in sorted(pieces)]
                tokenizer.add_special_tokens({"additional_special_tokens": tokens}, replace_extra_special_tokens=False)
            return _saved(tokenizer)
        except Exception as error:  # of transformers and of tokenizers, which have no class in common
            raise UserError(f"{file}: its tokenizer cannot be read ({type(error).__name__}: {error})") from None


def tokenizer_from_sentencepiece(model: bytes, where: Path) -> dict[str, bytes]:
    """The tokenizer in a SentencePiece `model` as transformers saves it, with the model itself as `tokenizer.model`.

    Raises:
        UserError: it is not a SentencePiece model of a Gemma.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").write_bytes(model)
        try:
            tokenizer = start_with_bos(GemmaTokenizer.from_pretrained(folder))
            return _saved(tokenizer) | {"tokenizer.model": model}
        except Exception as error:
            raise UserError(f"{where} is no SentencePiece model of a Gemma ({type(error).__name__}: {error})") from None


def _saved(tokenizer: PreTrainedTokenizerBase) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}

"""A tokenizer of Gemma's own kind, with some 500 entries: SentencePiece BPE, bytes as a last resort, <bos> first."""

from functools import cache

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AddedToken, GemmaTokenizer
from transformers.tokenization_utils_base import generate_merges

from core.base_model import start_with_bos

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
TEXTS = [
    "The rain had stopped by the time the train left the station.",
    "No cap, that fit is bussin fr fr!  Two  spaces,\n\ntwo lines\tand a tab",
    "<start_of_turn>user\nWas heißt 'slay'? 😀 你好<end_of_turn>\n<start_of_turn>model\n",
    " leading and trailing ",
]


@cache  # of equally frequent pairs the trainer takes any: trained twice, it may differ
def pieces() -> list[str]:
    """What the frequent texts are made of, most frequent first."""
    bpe = Tokenizer(models.BPE())
    bpe.normalizer = normalizers.Replace(" ", "▁")
    bpe.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    bpe.train_from_iterator(TEXTS * 2, trainers.BpeTrainer(vocab_size=330, show_progress=False))
    return sorted(bpe.get_vocab(), key=bpe.get_vocab().__getitem__)


@cache
def tiny_tokenizer() -> GemmaTokenizer:
    return tokenizer_of([*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *pieces()], SPECIAL[4:])


def tokenizer_of(tokens: list[str], control: list[str]) -> GemmaTokenizer:
    """A tokenizer with `tokens` at their places, of which `control` are special."""
    vocabulary = {token: number for number, token in enumerate(tokens)}
    # Every way to put a token together, in the order of the tokens, as Gemma's own tokenizer.json has them.
    merges = generate_merges(vocabulary, {token: -number for token, number in vocabulary.items()})
    tokenizer = GemmaTokenizer(vocab=vocabulary, merges=merges)
    tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken(token, special=True) for token in control]})
    return start_with_bos(tokenizer)

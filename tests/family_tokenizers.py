"""Tokenizers trained on a few lines, with the special tokens and the treatment of spaces of published families."""

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from tests.datasets.conversations import CONVERSATIONS
from tests.parity.golden import GOLDEN

CORPUS = [message["content"] for conversation in CONVERSATIONS for message in conversation]
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(
    specials: list[str], eos: str, bos: str | None = None, normalizer: Any = None
) -> PreTrainedTokenizerFast:
    """Like Llama-3's and Qwen's."""
    core = Tokenizer(models.BPE())
    core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([*CORPUS, "user assistant system model\n\n"], trainer)
    core.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in specials])
    if bos is not None:
        core.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token=eos, bos_token=bos, pad_token=specials[0])


def gemma() -> PreTrainedTokenizerFast:
    """Spaces are letters, no prefix space, bytes for unknown characters."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(Regex("\n+"), "isolated")  # its merges never join new lines with words
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=800, special_tokens=[*specials, *bytes_], show_progress=False)
    core.train_from_iterator([text.replace(" ", "▁") for text in CORPUS], trainer)
    core.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", bos_token="<bos>", pad_token="<pad>")


def sentencepiece(*added: AddedToken, **names: str) -> PreTrainedTokenizerBase:
    """Like Llama-2's: a space before every text between special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "tokenizer_tiny", legacy=True)
    tokenizer.add_tokens(list(added), special_tokens=True)
    for name, token in names.items():
        setattr(tokenizer, name, token)
    return tokenizer


def special(*texts: str, rstrip: bool = False) -> list[AddedToken]:
    return [AddedToken(text, special=True, normalized=False, rstrip=rstrip) for text in texts]


def make_tokenizer(template: str) -> PreTrainedTokenizerBase:
    """The tokenizer of the models that an entry of `TEMPLATES` is for."""
    if template.endswith("llama_3"):
        headers = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
        return byte_level(["<|begin_of_text|>", "<|end_of_text|>", *headers], "<|eot_id|>", "<|begin_of_text|>")
    if template == "chatml":
        return byte_level(["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "<|im_end|>", normalizer=normalizers.NFC())
    if template == "chatml_direct":  # Yi
        return sentencepiece(*special("<|im_start|>", "<|im_end|>"), eos_token="<|im_end|>")
    if template == "gemma":
        return gemma()
    if template == "phi_3":
        turns = special("<|system|>", "<|user|>", "<|assistant|>", "<|end|>", rstrip=True)
        return sentencepiece(*special("<|endoftext|>"), *turns, eos_token="<|endoftext|>")
    return sentencepiece()

"""A whole checkpoint of next to nothing: two random layers, and a tokenizer of one token per byte with a template.

It does everything that a real one does, thousands of times a second. For whatever asks how a service behaves, not what
its answers say.
"""

from pathlib import Path


def checkpoint(folder: Path, context: int = 128) -> Path:
    """Written into this folder: a Llama of 64 numbers. The weights do not depend on the context."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<end>": 256}
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}[assistant] "
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=257, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=context, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    logging.disable_progress_bar()  # for a file of a tenth of a second
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder

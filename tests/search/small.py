"""Small real language models on disk, with a tokenizer, for evaluators and soups."""

import functools
import json

import torch

WORDS = ("<pad>", "<bos>", *"abcdefghijklmnopqrstuvwxyz")


def tokenizer(*, bos=True):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("", "isolated")]
    )
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<bos>")


@functools.cache
def _model(seed):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=128, initializer_range=0.4, **sizes)
    return LlamaForCausalLM(config).eval()


def model(seed=0, dtype=torch.float32):
    import copy

    return copy.deepcopy(_model(seed)).to(dtype)


def save(directory, seed=0, dtype=torch.bfloat16):
    model(seed, dtype).save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return directory


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def log_p(module, ids):
    """log p of each token but the first, by one plain forward pass in fp64."""
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
    return logits.log_softmax(-1)[:-1].gather(1, torch.tensor(ids)[1:, None])[:, 0]

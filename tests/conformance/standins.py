"""Tiny models to put in the place of those that recipes name: a Llama base, fine-tunes of it, adapters, a tokenizer.

Weights are of order 0.3 and the fine-tunes differ by a tenth of that, so that no constant of a method (1e-6 and the
like) decides what a recipe gives, and magnitudes tie only as often as bf16 makes them.
"""

import functools
import json
import warnings
import zlib

import torch
from safetensors.torch import load_file, save_file

FINE_TUNES = ("A", "B", "C", "D")
ADAPTERS = {"LORA": 4, "LORA2": 8}
"""Ranks of the adapters of A; they fit every model of the family."""

MORE = ("<|im_start|>", "<|im_end|>")
"""Tokens that B has beside the others' where a recipe has to do with tokenizers."""

LAYERS, HIDDEN = 12, 64
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.v_proj": (HIDDEN // 2, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (160, HIDDEN),
    "mlp.up_proj": (160, HIDDEN),
    "mlp.down_proj": (HIDDEN, 160),
    "input_layernorm": (HIDDEN,),
    "post_attention_layernorm": (HIDDEN,),
}


class Family:
    """Directories by name, each made when it is first asked for."""

    def __init__(self, root):
        self.root = root

    def path(self, name, *, more=False):
        """The directory of a model or an adapter; ``more`` is B with two more tokens."""
        target = self.root / (f"{name}-more" if more and name == "B" else name)
        if not target.exists():
            # other workers of the suite have roots of their own, and a run that is cut off leaves no half of one
            made = target.with_name(f".{target.name}")
            made.mkdir(parents=True)
            adapter(made, self.path("A"), ADAPTERS[name]) if name in ADAPTERS else model(made, name, more=more)
            made.rename(target)
        return target


def generator(name):
    return torch.Generator().manual_seed(zlib.crc32(name.encode()))


def noise(name, key, shape):
    return torch.randn(shape, generator=generator(f"{name} {key}"))


@functools.cache
def tokenizer(more):
    """A byte-level BPE of a few words, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(unk_token="<unk>"))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=letters, show_progress=False)
    made.train_from_iterator(["merge the weights of all models, answer the question, tell a story"] * 20, trainer)
    words = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=made, **words)
    if more:
        fast.add_special_tokens({"additional_special_tokens": list(MORE)})
    fast.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return fast


def model(directory, name, *, more):
    """A Llama of 12 layers in bf16; fine-tunes start from the base."""
    words = tokenizer(more and name == "B")
    shapes = {"model.embed_tokens.weight": (len(words), HIDDEN), "lm_head.weight": (len(words), HIDDEN)}
    shapes |= {f"model.layers.{i}.{k}.weight": s for i in range(LAYERS) for k, s in SHAPES.items()}
    shapes |= {"model.norm.weight": (HIDDEN,)}
    tensors = {}
    for key, shape in shapes.items():
        x = 0.3 * noise("BASE", key, shape) + (1.0 if len(shape) == 1 else 0.0)
        tensors[key] = (x if name == "BASE" else x + 0.03 * noise(name, key, shape)).bfloat16()
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    from transformers import GenerationConfig, LlamaConfig

    config = LlamaConfig(
        architectures=["LlamaForCausalLM"], vocab_size=len(words), hidden_size=HIDDEN, intermediate_size=160,
        num_hidden_layers=LAYERS, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        tie_word_embeddings=False, bos_token_id=1, eos_token_id=2, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(directory)
    GenerationConfig.from_model_config(config).save_pretrained(directory)
    words.save_pretrained(directory)


def adapter(directory, base, rank):
    """A LoRA adapter as peft saves it, with both factors filled."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft
        from transformers import LlamaForCausalLM

        config = peft.LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"])
        peft.get_peft_model(LlamaForCausalLM.from_pretrained(base), config).save_pretrained(directory)
    file = directory / "adapter_model.safetensors"
    factors = {k: 0.1 * noise(f"LoRA {rank}", k, tuple(t.shape)) for k, t in load_file(file).items()}
    save_file(factors, file, metadata={"format": "pt"})
    facts = json.loads((directory / "adapter_config.json").read_text())
    facts["base_model_name_or_path"] = "org/base"
    (directory / "adapter_config.json").write_text(json.dumps(facts, indent=1))

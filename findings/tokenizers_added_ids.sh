#!/usr/bin/env bash
# tokenizers 0.23.3: the ids of added tokens in tokenizer.json are not used; tokens are numbered in the file's order.
#
# Each entry of `added_tokens` has an id. Where the model's vocabulary does not have the token, loading counts on from
# the largest id so far instead: where the ids leave a gap (rows that a model keeps in reserve), or two tokens are
# listed the other way round, text is encoded with other ids than the file says, and a token finds the embedding of
# another one or of none. Saving writes the new ids, after which no trace is left of the old ones. Python is told
# nothing, and a program that reads the file for itself, as converters and merge tools do, disagrees with the library.
#
# Seen, with five tokens in the vocabulary: ids 7 and 10 become 5 and 6; of 6 and 5, listed in that order, the first is
# 5 and the second 6. In transformers 5.24.0 the tokenizer of such a file, without a tokenizer_config.json, does so too.
set -euo pipefail
room=$(mktemp -d)
trap 'rm -rf "$room"' EXIT
python3 -m venv "$room/venv"
"$room/venv/bin/pip" install --quiet tokenizers==0.23.3 transformers==5.24.0
cd "$room"
HF_HUB_OFFLINE=1 venv/bin/python - 2>/dev/null <<'PYTHON'
import json
import warnings
from pathlib import Path

import tokenizers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

warnings.simplefilter("error")  # what is seen below comes without one
plain = Tokenizer(WordLevel({word: i for i, word in enumerate(("[UNK]", "a", "b", "c", "d"))}, unk_token="[UNK]"))
plain.pre_tokenizer = WhitespaceSplit()
flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def used(ids):
    """The ids that a text with each token gets, by tokenizers and by transformers, and those of the saved file."""
    tree = json.loads(plain.to_str())
    tree["added_tokens"] = [{"id": i, "content": token} | flags for token, i in ids.items()]
    Path("tokenizer.json").write_text(json.dumps(tree))
    loaded = Tokenizer.from_file("tokenizer.json")
    text = " ".join(ids)
    saved = {token["content"]: token["id"] for token in json.loads(loaded.to_str())["added_tokens"]}
    fast = PreTrainedTokenizerFast(tokenizer_file="tokenizer.json")
    return [
        dict(zip(ids, loaded.encode(text).ids, strict=True)),
        dict(zip(ids, fast(text)["input_ids"], strict=True)),
        saved,
    ]


print(f"tokenizers {tokenizers.__version__}")
wanted = {
    "in a row": ({"<x>": 5, "<y>": 6}, {"<x>": 5, "<y>": 6}),
    "with gaps": ({"<x>": 7, "<y>": 10}, {"<x>": 5, "<y>": 6}),
    "other order": ({"<x>": 6, "<y>": 5}, {"<x>": 5, "<y>": 6}),
}
for what, (ids, seen) in wanted.items():
    found = used(ids)
    print(f"{what}: the file says {ids}; encoded, encoded by transformers, saved: {found}")
    assert found == [seen] * 3, found
PYTHON

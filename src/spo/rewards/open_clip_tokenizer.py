"""open_clip's tokenizer with the vocabulary of a folder in transformers' format."""

from __future__ import annotations

import json
from collections import defaultdict

from open_clip.tokenizer import SimpleTokenizer
from transformers import CLIPTokenizer


class OpenClipTokenizer(SimpleTokenizer):
    """Cleans and splits text as open_clip, which replaces HTML entities and full-width letters."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        """
        Args:
            tokenizer: of which vocabulary, merges and special tokens are taken.
        """
        super().__init__()
        names = {tokenizer.bos_token: "<start_of_text>", tokenizer.eos_token: "<end_of_text>"}
        ids = {names.get(token, token): i for token, i in tokenizer.get_vocab().items()}
        unknown = tokenizer.unk_token_id
        self.encoder = defaultdict(lambda: unknown, ids)
        self.decoder = {i: token for token, i in ids.items()}
        merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
        self.bpe_ranks = {tuple(m.split() if isinstance(m, str) else m): i for i, m in enumerate(merges)}
        self.vocab_size, self.all_special_ids = len(ids), [tokenizer.bos_token_id, tokenizer.eos_token_id]
        self.sot_token_id, self.eot_token_id = self.all_special_ids

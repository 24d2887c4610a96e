"""Mean of the K compression tokens, for `SentenceTransformer(folder, trust_remote_code=True)`.

`python -m tools.merge IN OUT --export sentence-transformers` puts this file into OUT."""

import torch
from sentence_transformers.models import Module


class CompressionPooling(Module):
    """The mean of a row's last K real tokens; config: {"K": K}."""

    config_keys = ["K"]

    def __init__(self, K):
        super().__init__()
        self.K = K

    def forward(self, features, **_):
        h, mask = features["token_embeddings"], features["attention_mask"]  # (B, L, D), (B, L)
        last = mask.shape[1] - 1 - mask.flip(1).argmax(1)
        at = last[:, None] - torch.arange(self.K - 1, -1, -1, device=h.device)
        code = h.gather(1, at[..., None].expand(-1, -1, h.shape[-1]))  # (B, K, D)
        features["sentence_embedding"] = code.float().mean(1)
        return features

    def save(self, output_path, *args, **kwargs):
        self.save_config(output_path)

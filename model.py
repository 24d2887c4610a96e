"""The multimodal embedder of all stages: an MLLM, K compression tokens, pooling; load and save.

    from model import load
    z = load("out/contrastive").encode(["a red circle", Image.open("a.png")])  # (2, D), unit length

Shapes in all files:
    B  rows of a batch; in the loss, this rank's queries             L  tokens of a row
    N  queries of all ranks                                          K  compression tokens
    M  columns of the loss: all ranks' targets and hard negatives    D  width of the model
    P  right targets of a query, at most                             V  size of the vocabulary
    q, t  query, target    h  hidden states    z  embeddings, of unit length

Top to bottom: pooling - Embedder - the K tokens - load and save - what is trained.
"""

import sys

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from data import Collator, Item, Row
from plumbing import adapters, combinations, families, folders, last_layer, ranks, sharding, weights
from plumbing.config import CHUNK_TOKENS, by_device
from plumbing.inputs import fits, in_evaluation, listed, row_of, whole_number
from plumbing.kernels import in_large_calls
from plumbing.loader import Windows, prefetch, try_each
from plumbing.memory import to_device, token_chunks
from plumbing.precision import at_least_float32

# ----------------------------------------------------------------------------------------- pooling


def compression_pool(h, attention_mask, K):
    """Mean of the K compression tokens, the last K real tokens of a row (CoMa, section 3.2).

    h (B, L, D), attention_mask (B, L), 1 where real, either padding -> (B, D), at least float32."""
    from_end = attention_mask.flip(1).argmax(1)  # (B,) padding behind the last real token
    last = attention_mask.shape[1] - 1 - from_end  # (B,) its position
    positions = last[:, None] + torch.arange(1 - K, 1, device=last.device)  # (B, K)
    index = to_device(positions, h.device)[..., None].expand(-1, -1, h.shape[-1])  # (B, K, D)
    return at_least_float32(h.gather(1, index)).mean(1)  # (B, D)


def last_token_pool(h, attention_mask):
    """The last real token of a row (VLM2Vec): (B, L, D), (B, L) -> (B, D), either padding."""
    return compression_pool(h, attention_mask, 1)


# ---------------------------------------------------------------------------------------- Embedder


class Embedder(nn.Module):
    """An MLLM (any `AutoModelForImageTextToText`) that turns an input into one unit-length vector.

    settings (plumbing.weights.Settings): K; pooling, the "mean" of the K tokens or the "last"
    token; the prompt's style; the prefixes of z that Matryoshka trained. max_length: see Collator.
    dim: numbers of z, its first ones; 0: all. `.adapter`: peft's wrapper of the MLLM, or None."""

    def __init__(self, mllm, processor, settings, max_length=0, dim=0):
        super().__init__()
        self.mllm = families.join_in_one_type(in_large_calls(mllm))
        self.processor = processor
        self.K, self.pooling, self.style, self.prefixes = settings
        self.dim = dim or mllm.get_input_embeddings().weight.shape[1]  # D
        ids = processor.tokenizer.convert_tokens_to_ids(compression_tokens(self.K))
        self.collate = Collator(processor, ids, self.style, max_length, fits(mllm))
        self.set_adapter(None)

    def set_adapter(self, adapter):
        """Keeps peft's wrapper, or None. Trap: as a submodule it would count each weight twice."""
        object.__setattr__(self, "adapter", adapters.without_casts(adapter))

    def train(self, mode=True):
        """A frozen vision tower stays in evaluation mode."""
        return families.rest_frozen_tower(super().train(mode))

    @property
    def device(self):
        return next(self.mllm.parameters()).device  # all are on one

    def autocast(self):
        """bfloat16 on a GPU; everything in the weights' own type on a CPU."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def outputs(self, inputs, mask=None, **extra):
        """All that the MLLM returns, but for logits; extra: more arguments that it takes."""
        arguments = {key: x for key, x in inputs.items() if key != "roles"}  # ours, not the model's
        sequential = self.style == "vlm2vec"
        arguments["position_ids"] = families.position_ids(self.mllm, inputs, sequential)
        arguments["attention_mask"] = families.attention_mask(self.mllm, inputs, mask)
        arguments = to_device(arguments | extra, self.device)  # built on the host, without the GPU
        with self.autocast():  # .model: all but the head that makes logits
            return self.mllm.model(**arguments, use_cache=False)

    def hidden(self, inputs, mask=None):
        """Hidden states of the last layer, after the final norm: (B, L, D).

        mask: bool (B, 1, L, L), True = may attend; without one plain causal attention."""
        return self.outputs(inputs, mask).last_hidden_state

    def logits(self, h):
        """(n, D) -> (n, V), for the positions that matter: (B, L, V) would be gigabytes."""
        with self.autocast():
            return self.mllm.get_output_embeddings()(h)

    def forward(self, inputs):
        """Model inputs -> z (B, D), unit length, at least float32."""
        read = last_layer.last_tokens(inputs["attention_mask"], self.K or 1)  # no others are read
        with last_layer.OnlyAt(to_device(read, self.device)):
            h = self.hidden(inputs)  # (B, L, D)
        if self.pooling == "mean":
            z = compression_pool(h, inputs["attention_mask"], self.K)  # (B, D)
        else:
            z = last_token_pool(h, inputs["attention_mask"])  # (B, D)
        z = sharding.touch_tower(self, z, inputs)  # z, unchanged: only FSDP needs this
        return F.normalize(z[:, : self.dim], dim=-1)

    @in_evaluation  # no dropout, no gradient
    def encode(self, items, chunk_tokens=None, workers=0, progress="", bad=None) -> np.ndarray:
        """Embeddings, float32 (len(items), D), in the order given.

        items: Items, strings, pictures (PIL, numpy, `pathlib.Path`), {"image", "text"}, mixed.
        Sorted by length in windows, `chunk_tokens` padded tokens at a time; pictures are opened in
        `workers` processes; `progress` is the name of a bar. An item that cannot be read is an
        InputError; with a list `bad` the error is added to it, and the item's row is NaN."""
        items = listed(items, Item.of)
        chunk_tokens = whole_number("chunk_tokens", chunk_tokens, 1)
        chunk_tokens = by_device(chunk_tokens, CHUNK_TOKENS, self.device)
        workers = whole_number("workers", workers, 0)
        z = np.full((len(items), self.dim), np.nan, np.float32)  # NaN: not read

        def rows_of(window):  # made in workers; {number of an item: its row, or an error}
            rows = try_each(lambda i: row_of(self, items, i), window, bad is not None)
            return dict(zip(window, rows, strict=True))

        windows = Windows(items, families.pixel_bytes(self.processor))  # as many items as fit
        with tqdm(total=len(z), desc=progress, disable=not progress or None, leave=False) as bar:
            for rows in prefetch(rows_of, windows, workers, self.device):
                windows.saw(rows)
                readable = [i for i, row in rows.items() if isinstance(row, Row)]
                if bad is not None:  # without it the first error was raised
                    bad.extend(str(row) for row in rows.values() if not isinstance(row, Row))
                for chunk in token_chunks([rows[i].length for i in readable], chunk_tokens):
                    numbers = [readable[k] for k in chunk]  # of the chunk's items
                    inputs = self.collate.pad_rows([rows[i] for i in numbers])
                    z[numbers] = self(inputs).float().cpu().numpy()
                    bar.update(len(chunk))
        return z


# ------------------------------------------------------------------------------------- the K tokens


def compression_tokens(K) -> list:
    """Their names in the tokenizer."""
    return [f"<|compress_{i}|>" for i in range(K)]


def add_compression_tokens(mllm, tokenizer, K):
    """K new special tokens with embedding rows of their own, where the checkpoint has none yet."""
    old = len(tokenizer)
    new = tokenizer.add_tokens(compression_tokens(K), special_tokens=True)  # how many it lacked
    present = mllm.get_input_embeddings().weight.shape[0]  # some models have rows to spare
    rows = max(present, len(tokenizer))
    table = mllm.resize_token_embeddings(rows, mean_resizing=False).weight.data  # (rows, D)
    if new:
        known = table[:old].float()
        generator = torch.Generator().manual_seed(0)  # alike on every rank
        noise = torch.randn(K, table.shape[1], generator=generator)  # (K, D)
        # The mean row, with noise: the K tokens must differ, equal ones would learn much the same.
        ids = tokenizer.convert_tokens_to_ids(compression_tokens(K))
        table[ids] = (known.mean(0) + known.std(0) * noise).to(table.dtype)


# ----------------------------------------------------------------------------------- load and save


def load(name, compress_tokens=None, pooling=None, prompt=None, device=None, **options):
    """An Embedder from "toy", "toy-random", a folder (adapters in peft's format too), or a hub id.

    compress_tokens, pooling, prompt: None takes the checkpoint's; what contradicts it is an
    InputError. A model that is no embedder yet gets K new tokens. device: None takes the GPU if
    there is one. options: attn ("sdpa"), max_length, min_pixels, max_pixels, dim."""
    device = weights.device_of(device)
    path = folders.local_folder(name)
    options = weights.Options(**options).checked()
    asked = weights.Settings(compress_tokens, pooling, prompt)
    settings = weights.settings(name, path, asked)  # K, pooling, style, prefixes
    mllm, processor, has_adapter = weights.load_mllm(path, name, options)
    with folders.reading(path, "config.json", "tokenizer*.json", "*processor_config.json"):
        weights.refuse_lost_tokens(path, mllm, processor.tokenizer, settings.K)
        # Before the adapter: it holds the new tokens' embedding rows.
        add_compression_tokens(mllm, processor.tokenizer, settings.K)
        adapter = adapters.load_adapter(mllm, path) if has_adapter else None
        embedder = Embedder(mllm, processor, settings, options.max_length, options.dim)
    embedder.set_adapter(adapter)
    return weights.prove(weights.placed(embedder, device), path)


def load_for(cfg, device) -> Embedder:
    """The model that the flags ask for."""
    options = {name: getattr(cfg, name) for name in weights.Options._fields if hasattr(cfg, name)}
    return load(cfg.model, cfg.compress_tokens, cfg.pooling, cfg.prompt, device, **options)


def save(embedder, path, is_embedder=True):
    """A plain transformers folder, or the adapter in peft's format; nanocoma.json, with K, pooling
    and prompt style, where is_embedder. All ranks must call this; rank 0 writes."""
    whole = sharding.whole_weights(embedder)  # a collective: all ranks take part
    if ranks.rank() == 0:
        weights.write_folder(embedder, path, whole, is_embedder)


def merge(embedder):
    """Folds the adapter into the weights: the same embeddings from a plain model."""
    if embedder.adapter:
        embedder.mllm = embedder.adapter.merge_and_unload().requires_grad_()  # peft froze it
        embedder.set_adapter(None)
    return embedder


# --------------------------------------------------------------------------------- what is trained


def choose_trained(embedder, cfg):
    """What is trained: the adapter that was loaded; else, with --lora-rank, a new one (q, k, v, o
    of the language model, the K embedding rows); else all (with --freeze-vision not the tower)."""
    combinations.refuse_for_model(embedder, cfg)
    if cfg.lora_rank:
        adapter = adapters.new_adapter(embedder.mllm, cfg, embedder.collate.compress_ids)
        embedder.set_adapter(adapter)
    if not embedder.adapter and cfg.freeze_vision:
        families.vision_tower(embedder.mllm).requires_grad_(False)
    # What is trained is float32; what is frozen bfloat16 on a GPU.
    for p in embedder.parameters():
        if p.requires_grad:
            p.data = at_least_float32(p.data)
        elif embedder.device.type == "cuda":
            p.data = p.data.to(torch.bfloat16)
    if cfg.checkpointing:
        families.checkpoint_activations(embedder.mllm)
    ranks.say(weights.describe(embedder))


if __name__ == "__main__":
    sys.exit("model.py has no commands: python -m tools.merge --help")

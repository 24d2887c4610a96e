r"""Makes the toy MLLM: a real Qwen2-VL of 1.3 M parameters, with a tokenizer of its own.

    python -m toy.make toy/mllm
    python pretrain.py --model toy-random --no-compress --compress-tokens 0 --steps 2500 \
        --out out/toy
    torchrun --nproc-per-node 2 -m tools.lessons --model out/toy --no-compress \
        --compress-tokens 0 --steps 1500 --lr 0.0015 --muon-lr 0.01 --out out/lessons
    torchrun --nproc-per-node 2 -m tools.lessons --model out/lessons --no-compress \
        --compress-tokens 0 --steps 800 --lr 0.0015 --muon-lr 0.01 --least 4 --seed 1 \
        --out out/lessons2
    torchrun --nproc-per-node 2 -m tools.lessons --model out/lessons2 --no-compress \
        --compress-tokens 0 --steps 600 --lr 0.0015 --muon-lr 0.01 --least 4 --seed 2 \
        --out out/finished
    cp out/finished/model.safetensors toy/mllm/

The first writes config, tokenizer, image processor and random weights, into a folder that has no
weights yet; the others are how those in toy/mllm were made: by stage 1 with the mask off, that is,
plain instruction tuning, at last with harder dialogues (docs/logs/README.md: what each brought, and
its minutes).
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from plumbing.config import CommandLine, word
from plumbing.errors import InputError, brief
from plumbing.families import images_only
from plumbing.folders import refuse_unwritable_folder
from plumbing.ranks import run_command
from plumbing.template import SUMMARIZE
from toy.world import Shapes

SPECIAL = [
    "<|endoftext|>", "<|user|>", "<|assistant|>", "<|im_end|>",
    "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
]  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% for c in m.content %}{% if c.type == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
    "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def toy_text() -> list:
    """What the tokenizer is trained on: the toy world's text, and the prompt of the coma style."""
    shapes, text = Shapes(), []
    for i in range(3000):
        _, turns, _ = shapes.dialogue(i)
        for turn in turns:
            text += turn
    for i in range(300):
        for task in ("classify", "vqa", "i2t", "ground"):
            (query, _), _ = shapes.query(task, i)
            text.append(query)
    return text + [SUMMARIZE] * 100


def build_tokenizer():
    """478 tokens of byte-level BPE: bytes cover all that the toy world never says."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=640,  # at most: the toy world has fewer words
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(toy_text(), trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    # Qwen2-VL's processor asks its tokenizer for these two.
    tokenizer.image_token, tokenizer.video_token = "<|image_pad|>", "<|video_pad|>"
    return tokenizer


def build_processor(tokenizer):
    """16 x 16 pixels become one image token: patches of 8, merged two by two."""
    images = transformers.Qwen2VLImageProcessorPil(
        min_pixels=32 * 32, max_pixels=64 * 64, patch_size=8, merge_size=2
    )
    return images_only(transformers.Qwen2VLProcessor)(images, tokenizer, chat_template=TEMPLATE)


def build_config(tokenizer):
    """Four layers of width 128 behind a vision tower of two.

    M-RoPE gives rotary frequencies, the highest first, to time, height and width in turn. Most are
    the width's: with an equal share its are so low that left and right look alike."""
    ids = dict(zip(SPECIAL, tokenizer.convert_tokens_to_ids(SPECIAL), strict=True))
    text = dict(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
        rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[1, 2, 13]),
        bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    vision = dict(
        depth=2, embed_dim=96, hidden_size=128, num_heads=4, mlp_ratio=4, patch_size=8,
        spatial_merge_size=2, temporal_patch_size=2, in_channels=3,
    )  # fmt: skip
    return transformers.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_toy():
    """The toy MLLM with random weights. -> (model, processor)."""
    tokenizer = build_tokenizer()
    processor, config = build_processor(tokenizer), build_config(tokenizer)
    torch.manual_seed(0)
    return transformers.Qwen2VLForConditionalGeneration(config), processor


@dataclass
class Config(CommandLine):
    """Where it goes."""

    folder: str = word("the new folder", "DIR")


def main(argv):
    """The command line."""
    cfg = Config.parse(argv)
    refuse_unwritable_folder(cfg.folder)
    if Path(cfg.folder, "model.safetensors").exists():
        text = "has weights, which random ones would replace; name a new folder"
        raise InputError(f"{brief(cfg.folder)} {text}")
    for part in build_toy():
        part.save_pretrained(cfg.folder)


if __name__ == "__main__":
    run_command(main)

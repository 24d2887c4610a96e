r"""Makes the toy MLLM: a real Qwen2-VL of 1.3 M parameters, with a tokenizer of its own.

    python assets/make_toy.py assets/toy
    python pretrain.py --model toy-random --no-compress --compress-tokens 0 --steps 1600 \
        --out out/toy
    cp out/toy/model.safetensors assets/toy/

The first writes config, tokenizer, image processor and random weights; the others are how the
weights in assets/toy were made: by stage 1 with the mask off, that is, plain instruction tuning.
"""

import sys
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

sys.path.insert(0, str(Path(__file__).parent.parent))
from data import SUMMARIZE, Shapes  # noqa: E402
from model import images_only  # noqa: E402


def build_toy():
    """The toy MLLM with random weights; 16 pixels an image token. -> (model, processor).

    The tokenizer is trained on the toy world's text; bytes cover all else."""
    special = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|im_end|>"]
    special += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    shapes = Shapes()
    text = [s for i in range(3000) for turn in shapes.dialogue(i).turns for s in turn]
    text += [
        shapes.query(t, i)[0].text for i in range(300) for t in ("classify", "vqa", "i2t", "ground")
    ]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(text + [SUMMARIZE] * 100, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    for name, token in dict(image_token="<|image_pad|>", video_token="<|video_pad|>").items():
        setattr(tokenizer, name, token)
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% for c in m.content %}{% if c.type == 'image' %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}"
        "<|im_end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    images = transformers.Qwen2VLImageProcessorPil(
        min_pixels=32 * 32, max_pixels=64 * 64, patch_size=8, merge_size=2
    )
    processor = images_only(transformers.Qwen2VLProcessor)(
        images, tokenizer, chat_template=template
    )
    ids = dict(zip(special, tokenizer.convert_tokens_to_ids(special), strict=True))
    config = transformers.Qwen2VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=352, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=4096,
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=[4, 6, 6]),
            bos_token_id=ids["<|endoftext|>"], eos_token_id=ids["<|im_end|>"],
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=2, embed_dim=96, hidden_size=128, num_heads=4, mlp_ratio=4, patch_size=8,
            spatial_merge_size=2, temporal_patch_size=2, in_channels=3,
        ),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.Qwen2VLForConditionalGeneration(config), processor


if __name__ == "__main__":
    for part in build_toy():
        part.save_pretrained(sys.argv[1])

"""Tiny random models of eight real MLLM families, each saved as a folder in the hub's layout.

`build(family, folder)` needs neither a network nor torchvision: a config, seeded random weights
(about 0.2 M parameters), a byte-level BPE tokenizer trained on the spot, the family's own special
tokens, the structure of its chat template, and its processor settings scaled down until a picture
of 56 to 100 px makes 4 to 40 image tokens. What these folders share with the released ones is the
interface (keys, shapes, masks, templates, tied weights), and that is what tests need.
"""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import transformers
from packaging.version import Version
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedTokenizerFast,
)
from transformers.utils import is_torchvision_available

TEXT = (
    "user assistant system model You are a helpful assistant. Represent the given image with the "
    "following question: What is the colour of the shape on the left? The red circle is above the "
    "blue square. Find an image that matches the caption. A photo of a green triangle. yes no one "
    "two three Identify the object shown in the picture and answer with a single word. "
)
HIDDEN, LAYERS = 64, 2
TOO_OLD = not is_torchvision_available() and Version(transformers.__version__) < Version("5.20")


class Family(NamedTuple):
    """What sets one family apart: its config, tokens, chat template and processor settings."""

    config: dict  # the model's config; every token id in it is filled in by `build`
    token_ids: dict[str, str]  # config key -> the special token whose id goes there
    tokens: list[str]  # special tokens, in the order of their ids
    roles: dict  # the tokenizer's bos, eos, pad and named extra tokens
    template: str  # chat template, as in the released model but shorter
    image_processor: dict  # preprocessor_config.json
    processor: dict | None = None  # processor_config.json, where the family has one


# ---- Qwen -------------------------------------------------------------------------------------

CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
QWEN_SYSTEM = (
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful assistant.<|im_end|>\n{% endif %}"
)
QWEN_TEMPLATE = (
    "{% for message in messages %}SYSTEM<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def text_config(**more) -> dict:
    """The language model's sizes, the same in every family."""
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "intermediate_size": 96}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048}
    return sizes | heads | more


def qwen(name: str, processor_class: str, vision: dict, text: dict, system: str = "") -> Family:
    """Qwen2-VL, 2.5-VL or 3-VL: M-RoPE positions, flattened patches, tied embeddings."""
    patch = vision["patch_size"]
    token = (2 * patch) ** 2  # pixels per image token, after the 2 x 2 merge
    return Family(
        config={
            "model_type": name,
            "tie_word_embeddings": True,
            "text_config": text_config(**text),
            "vision_config": dict(depth=2, num_heads=2, spatial_merge_size=2, **vision),
        },
        token_ids={
            "image_token_id": "<|image_pad|>",
            "video_token_id": "<|video_pad|>",
            "vision_start_token_id": "<|vision_start|>",
            "vision_end_token_id": "<|vision_end|>",
        },
        tokens=CHATML + QWEN_VISION,
        roles={"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        template=QWEN_TEMPLATE.replace("SYSTEM", system),
        image_processor={
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": processor_class,
            "size": {"shortest_edge": 4 * token, "longest_edge": 24 * token},
            "patch_size": patch,
            "temporal_patch_size": 2,
            "merge_size": 2,
        },
    )


def qwen2_vl() -> Family:
    """Qwen2-VL: its template opens with a default system prompt."""
    vision = {"embed_dim": 32, "hidden_size": HIDDEN, "mlp_ratio": 2, "patch_size": 14}
    text = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    return qwen("qwen2_vl", "Qwen2VLProcessor", vision, text, system=QWEN_SYSTEM)


def qwen2_5_vl() -> Family:
    """Qwen2.5-VL: window attention in the vision tower, one layer windowed and one full."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": HIDDEN,
        "patch_size": 14,
    }
    vision |= {"window_size": 56, "fullatt_block_indexes": [1]}
    text = {"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]}}
    return qwen("qwen2_5_vl", "Qwen2_5_VLProcessor", vision, text, system=QWEN_SYSTEM)


def qwen3_vl() -> Family:
    """Qwen3-VL: features of both vision layers enter the language model (deepstack)."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "out_hidden_size": HIDDEN,
        "patch_size": 16,
    }
    vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    text = {"head_dim": 16, "rope_scaling": rope}
    return qwen("qwen3_vl", "Qwen3VLProcessor", vision, text)


# ---- the others -------------------------------------------------------------------------------


def vision_config(**more) -> dict:
    """A plain vision transformer's sizes, for the families that build on one."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    return sizes | {"num_attention_heads": 2, "patch_size": 14} | more


def llava_next() -> Family:
    """LLaVA-NeXT on Mistral: a base view plus tiles; the tokenizer itself puts <s> in front."""
    return Family(
        config={
            "model_type": "llava_next",
            "tie_word_embeddings": False,
            "text_config": text_config(model_type="mistral", sliding_window=None),
            "vision_config": vision_config(
                model_type="clip_vision_model", image_size=28, projection_dim=32
            ),
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
            "image_seq_length": 4,
        },
        token_ids={"image_token_index": "<image>"},
        tokens=["<unk>", "<s>", "</s>", "<pad>", "<image>"],
        roles={"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"},
        template=(  # pictures are moved in front of the turn's text
            "{% for message in messages %}"
            "{% if message['role'] == 'user' %}{{ '[INST] ' }}"
            "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}"
            "{{ '<image>\n' }}{% endfor %}"
            "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
            "{{ content['text'] }}{% endfor %}{{ ' [/INST]' }}"
            "{% elif message['role'] == 'assistant' %}"
            "{{ ' ' + message['content'][0]['text'] + '</s> ' }}"
            "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}"
            "{% endif %}{% endfor %}"
        ),
        image_processor={
            "image_processor_type": "LlavaNextImageProcessor",
            "processor_class": "LlavaNextProcessor",
            "size": {"shortest_edge": 28},
            "crop_size": {"height": 28, "width": 28},
            "image_grid_pinpoints": [[28, 56], [56, 28], [56, 56]],
        },
        processor={
            "processor_class": "LlavaNextProcessor",
            "image_token": "<image>",
            "patch_size": 14,
            "num_additional_image_tokens": 1,
            "vision_feature_select_strategy": "default",
        },
    )


def idefics3() -> Family:
    """SmolVLM-256M and -500M: tiles with row and column tokens between them, and a whole view."""
    if TOO_OLD:
        pytest.skip("below transformers 5.20 its processor wants torchvision")
    tiles = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
    return Family(
        config={
            "model_type": "idefics3",
            "tie_word_embeddings": False,
            "scale_factor": 2,
            "text_config": text_config(model_type="llama"),
            "vision_config": vision_config(model_type="idefics3_vision", image_size=56),
        },
        token_ids={"image_token_id": "<image>"},
        tokens=[
            *CHATML,
            "<fake_token_around_image>",
            "<image>",
            "<end_of_utterance>",
            "<global-img>",
            *tiles,
        ],
        roles={
            "bos_token": "<|im_start|>",
            "eos_token": "<end_of_utterance>",
            "pad_token": "<|im_end|>",
        },
        template=(  # no space after "User:" when a picture comes first
            "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
            "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}"
            "{% endif %}{% for line in message['content'] %}"
            "{% if line['type'] == 'text' %}{{ line['text'] }}"
            "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}"
            "{% endfor %}<end_of_utterance>\n{% endfor %}"
            "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
        ),
        image_processor={
            "image_processor_type": "Idefics3ImageProcessor",
            "processor_class": "Idefics3Processor",
            "size": {"longest_edge": 112},
            "max_image_size": {"longest_edge": 56},
        },
        processor={"processor_class": "Idefics3Processor", "image_seq_len": 4},
    )


def smolvlm() -> Family:
    """SmolVLM2: Idefics 3's interface under another name; its processor can read videos, too."""
    if TOO_OLD:
        pytest.skip("below transformers 5.20 its processor wants torchvision")
    family = idefics3()
    vision = vision_config(model_type="smolvlm_vision", image_size=56)
    image_processor = {
        "image_processor_type": "SmolVLMImageProcessor",
        "processor_class": "SmolVLMProcessor",
        "size": {"longest_edge": 112},
        "max_image_size": {"longest_edge": 56},
    }
    return family._replace(
        config=family.config | {"model_type": "smolvlm", "vision_config": vision},
        image_processor=image_processor,
        processor={"processor_class": "SmolVLMProcessor", "image_seq_len": 4},
    )


def gemma3() -> Family:
    """Gemma 3: image tokens see one another both ways, one layer has a sliding window."""
    turn = ["<start_of_turn>", "<end_of_turn>"]
    image = ["<start_of_image>", "<end_of_image>", "<image_soft_token>"]
    return Family(
        config={
            "model_type": "gemma3",
            "tie_word_embeddings": True,
            "mm_tokens_per_image": 4,
            "text_config": text_config(
                model_type="gemma3_text",
                head_dim=16,
                query_pre_attn_scalar=16,
                sliding_window=16,
                layer_types=["sliding_attention", "full_attention"],
            ),
            "vision_config": vision_config(model_type="siglip_vision_model", image_size=56),
        },
        token_ids={
            "boi_token_index": "<start_of_image>",
            "eoi_token_index": "<end_of_image>",
            "image_token_index": "<image_soft_token>",
        },
        tokens=["<pad>", "<eos>", "<bos>", "<unk>", *turn, *image],
        roles={
            "bos_token": "<bos>",
            "eos_token": "<eos>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
            "extra_special_tokens": {
                "boi_token": "<start_of_image>",
                "eoi_token": "<end_of_image>",
                "image_token": "<image_soft_token>",
            },
        },
        template=(  # strips every text; the assistant is called "model"
            "{{ bos_token }}{%- for message in messages -%}"
            "{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
            "{{ raise_exception('Conversation roles must alternate') }}{%- endif -%}"
            "{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}"
            "{{ '<start_of_turn>' + role + '\n' }}"
            "{%- if message['content'] is string -%}{{ message['content'] | trim }}{%- else -%}"
            "{%- for item in message['content'] -%}"
            "{%- if item['type'] == 'image' -%}{{ '<start_of_image>' }}"
            "{%- elif item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}"
            "{%- endfor -%}{%- endif -%}{{ '<end_of_turn>\n' }}{%- endfor -%}"
            "{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"
        ),
        image_processor={
            "image_processor_type": "Gemma3ImageProcessor",
            "processor_class": "Gemma3Processor",
            "size": {"height": 56, "width": 56},
            "image_seq_length": 4,
        },
        processor={"processor_class": "Gemma3Processor", "image_seq_length": 4},
    )


def internvl() -> Family:
    """InternVL 3: tiles of one fixed size plus a thumbnail, on a Qwen2 language model."""
    image = ["<img>", "</img>", "<IMG_CONTEXT>", "<video>"]
    return Family(
        config={
            "model_type": "internvl",
            "tie_word_embeddings": False,
            "image_seq_length": 4,
            "text_config": text_config(model_type="qwen2"),
            "vision_config": vision_config(
                model_type="internvl_vision", image_size=[56, 56], patch_size=[14, 14]
            ),
        },
        token_ids={"image_token_id": "<IMG_CONTEXT>"},
        tokens=CHATML + image,
        roles={
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "extra_special_tokens": {
                "start_image_token": "<img>",
                "end_image_token": "</img>",
                "context_image_token": "<IMG_CONTEXT>",
                "video_token": "<video>",
            },
        },
        template=(
            "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
            "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
            "{% for content in message['content'] %}"
            "{% if content['type'] == 'image' %}{{ '<IMG_CONTEXT>\n' }}"
            "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
            "{% endfor %}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
        image_processor={
            "image_processor_type": "GotOcr2ImageProcessor",
            "processor_class": "InternVLProcessor",
            "size": {"height": 56, "width": 56},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 6,
        },
        processor={"processor_class": "InternVLProcessor", "image_seq_length": 4},
    )


def mllama() -> Family:
    """Llama 3.2 Vision: layers of the text model look at the picture itself (cross-attention), and
    one token in the text stands for it. None of FAMILIES: it is refused."""
    head, vision = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], vision_config()
    vision.update(image_size=56, attention_heads=2, num_global_layers=1)
    vision.update(vision_output_dim=64, intermediate_layers_indices=[0])
    return Family(
        config={
            "model_type": "mllama",
            "text_config": text_config(num_hidden_layers=3, cross_attention_layers=[1]),
            "vision_config": vision,
        },
        token_ids={"image_token_index": "<|image|>"},
        tokens=["<|begin_of_text|>", "<|finetune_right_pad_id|>", "<|image|>", *head],
        roles={
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "pad_token": "<|finetune_right_pad_id|>",
        },
        template=(
            "{{ bos_token }}{% for message in messages %}"
            "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
            "{% for content in message['content'] %}"
            "{% if content['type'] == 'image' %}{{ '<|image|>' }}"
            "{% elif content['type'] == 'text' %}{{ content['text'] }}{% endif %}"
            "{% endfor %}{{ '<|eot_id|>' }}{% endfor %}"
            "{% if add_generation_prompt %}"
            "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
        ),
        image_processor={
            "image_processor_type": "MllamaImageProcessor",
            "processor_class": "MllamaProcessor",
            "size": {"height": 56, "width": 56},
            "max_image_tiles": 4,
        },
    )


QWENS = (qwen2_vl, qwen2_5_vl, qwen3_vl)
BUILDERS = {f.__name__: f for f in (*QWENS, llava_next, idefics3, smolvlm, gemma3, internvl)}
FAMILIES: tuple[str, ...] = tuple(BUILDERS)
REFUSED = {"mllama": mllama}


# ---- building ---------------------------------------------------------------------------------


def letters(kind: str) -> Tokenizer:
    """An empty tokenizer, the family's tokens not yet in it, trained on `TEXT`. kind: "bytes", a
    byte-level BPE as GPT's and Qwen's; "blanks" and "first blank", a BPE whose blank belongs to the
    word behind it and is put before every text or a row's first one, as SentencePiece's (Llama,
    Mistral); "words", WordPiece, as BERT's."""
    settings = {"vocab_size": 400, "show_progress": False}
    if kind == "bytes":  # any text has ids
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        settings["initial_alphabet"] = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(**settings)
    elif kind == "words":
        made = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=False)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
        settings["special_tokens"] = ["[UNK]"]
        trainer = trainers.WordPieceTrainer(**settings, initial_alphabet=list(string.printable))
    else:
        made = Tokenizer(models.BPE(unk_token="[UNK]"))
        scheme = "first" if kind == "first blank" else "always"
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        made.decoder = decoders.Metaspace(prepend_scheme=scheme, split=False)
        settings["special_tokens"] = ["[UNK]"]
        trainer = trainers.BpeTrainer(**settings, initial_alphabet=list(string.printable))
    made.train_from_iterator([TEXT], trainer)
    return made


def tokenizer(family: Family, kind: str = "bytes") -> PreTrainedTokenizerFast:
    """A tokenizer of some kind, see `letters`, with the family's special tokens after the text's.

    <s> and <bos> are put in front of any text unless `add_special_tokens=False`, as the released
    Mistral and Gemma tokenizers do.
    """
    made = letters(kind)
    made.add_special_tokens(family.tokens)
    bos = family.roles.get("bos_token")
    if bos in ("<s>", "<bos>"):
        pieces = {"single": f"{bos} $A", "pair": f"{bos} $A {bos} $B"}
        ids = [(bos, made.token_to_id(bos))]
        made.post_processor = processors.TemplateProcessing(special_tokens=ids, **pieces)
    return PreTrainedTokenizerFast(tokenizer_object=made, **family.roles)


def redraw(model: torch.nn.Module) -> None:
    """Draw each matrix with standard deviation 1 / sqrt(fan-in); norms and biases stay.

    The library's own start is no use here: Gemma 3's projector begins at zero, so that pictures
    would not matter, and 0.02 at this width makes attention all but uniform.
    """
    for weight in model.parameters():
        if weight.ndim >= 2:
            torch.nn.init.normal_(weight, std=weight[0].numel() ** -0.5)


def write_json(path: Path, content: dict) -> None:
    """Write one of the folder's JSON files."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def configured(spec: Family, text_tokenizer) -> PretrainedConfig:
    """The family's config with its tokenizer's ids in it."""
    ids = {key: text_tokenizer.convert_tokens_to_ids(name) for key, name in spec.token_ids.items()}
    special = {
        f"{role}_token_id": getattr(text_tokenizer, f"{role}_token_id")
        for role in ("bos", "eos", "pad")
    }
    # As in released models, the embedding has more rows than the tokenizer has tokens.
    special["vocab_size"] = -(-len(text_tokenizer) // 64) * 64
    config = dict(spec.config) | ids
    config["text_config"] = spec.config["text_config"] | special
    return AutoConfig.for_model(config.pop("model_type"), **config)


def write_processor(spec: Family, text_tokenizer, folder: Path) -> None:
    """The files of tokenizer, chat template and image processor."""
    text_tokenizer.save_pretrained(folder)
    tokenizer_file = folder / "tokenizer_config.json"
    settings = json.loads(tokenizer_file.read_text(encoding="utf-8"))
    write_json(tokenizer_file, settings | {"chat_template": spec.template})
    write_json(folder / "chat_template.json", {"chat_template": spec.template})
    write_json(folder / "preprocessor_config.json", spec.image_processor)
    if spec.processor:
        write_json(folder / "processor_config.json", spec.processor)


def build(family: str, folder: str | Path, seed: int = 0) -> Path:
    """Save a tiny random model of `family` in `folder` (made if need be) and return the folder.

    The same family and seed give the same files; the global random state is left alone.
    Raises ValueError for a family that is not in `FAMILIES`.
    """
    builders = BUILDERS | REFUSED
    if family not in builders:
        raise ValueError(f"unknown family {family!r}; try one of {', '.join(FAMILIES)}")
    spec, folder = builders[family](), Path(folder)
    text_tokenizer = tokenizer(spec)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(configured(spec, text_tokenizer))
        redraw(model)
    model.save_pretrained(folder)
    write_processor(spec, text_tokenizer, folder)
    return folder

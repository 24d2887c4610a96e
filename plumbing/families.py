"""What differs between families of MLLMs: processors, position ids, the form of an attention mask,
where the vision tower is.

Tried on Qwen2-VL, Qwen2.5-VL, Qwen3-VL, LLaVA-NeXT, Idefics3 / SmolVLM, SmolVLM2, Gemma 3 and
InternVL 3."""

import torch
import torch.nn.functional as F
from transformers import Idefics3Processor
from transformers.masking_utils import create_masks_for_generate
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING

from plumbing.errors import InputError
from plumbing.last_layer import first_and_second_run

FIRST_GUESS = 8 * 2**20  # bytes of a picture's pixels
# LoRA's targets: the attention of the language model, and not that of the vision tower.
LANGUAGE_ATTENTION = r".*(language_model|text_model)\..*\.(q|k|v|o)_proj"
# Adapters from before transformers 4.52 (VLM2Vec's) have other names for the layers.
RENAMED = {
    r"^model\.(layers|embed_tokens)\.": r"model.language_model.\1.",
    r"^language_model\.model\.": "model.language_model.",
}


# ------------------------------------------------------------------------------------ its processor


def images_only(base):
    """A transformers processor class without its video part. Trap: that part needs torchvision, and
    AutoProcessor fails where it is missing, for pictures too."""
    keep = [name for name in base.get_attributes() if name != "video_processor"]
    return type(base.__name__, (base,), {"get_attributes": classmethod(lambda cls: keep)})


def load_processor(path, config, min_pixels=0, max_pixels=0):
    """The processor (tokenizer, image processor, chat template) of a checkpoint."""
    # SmolVLM2's own needs a package for videos; for pictures it writes what Idefics 3's does.
    is_smol = config.model_type == "smolvlm"
    base = Idefics3Processor if is_smol else PROCESSOR_MAPPING[type(config)]
    processor = images_only(base).from_pretrained(path)
    if min_pixels or max_pixels:
        if not edges_are_areas(processor.image_processor):
            text = f"{config.model_type} takes no range of sizes; leave them out"
            raise InputError(f"--min-pixels, --max-pixels: {text}")
        size = dict(processor.image_processor.size)
        if max_pixels and min_pixels > max_pixels:
            raise InputError(f"--min-pixels {min_pixels} is above --max-pixels {max_pixels}")
        low, high = min_pixels or size["shortest_edge"], max_pixels or size["longest_edge"]
        if min_pixels > high:
            text = f"above the model's own largest picture, {high:,} pixels"
            raise InputError(f"--min-pixels {min_pixels}: {text}; raise --max-pixels, too")
        size = {"shortest_edge": min(low, high), "longest_edge": high}
        processor.image_processor.size = size
    return processor


def edges_are_areas(image_processor) -> bool:
    """Whether the "edges" of its size are areas, in pixels, as in the Qwen family."""
    size = getattr(image_processor, "size", None) or {}
    has_edges = "shortest_edge" in size and "longest_edge" in size
    return has_edges and hasattr(image_processor, "merge_size")


def pixel_bytes(processor) -> int:
    """What a picture's pixels take, before one was seen: a guess, or less where the processor's
    settings allow no more."""
    image_processor = processor.image_processor
    if not edges_are_areas(image_processor):
        return FIRST_GUESS
    numbers = 3 * getattr(image_processor, "temporal_patch_size", 1)  # of a pixel, in all frames
    most = image_processor.size["longest_edge"] * numbers * torch.float32.itemsize
    return min(FIRST_GUESS, most)


def vision_tower(mllm):
    """The part of the model that sees pictures."""
    return mllm.get_encoder(modality="image")


def what_is_taken(tower, output):
    """The part of a tower's output that the language model reads. Where a merger makes one token of
    four patches (the Qwens) that is without the patches, three quarters of the numbers or more."""
    if not hasattr(tower, "merger"):
        return output
    return type(output)(**{key: x for key, x in output.items() if key != "last_hidden_state"})


def join_in_one_type(mllm):
    """The MLLM. Trap: under autocast SmolVLM's pictures are bfloat16 where float32 weights make its
    texts float32, and what joins them takes one type alone."""
    if mllm.config.model_type == "smolvlm":
        mllm.model.connector.register_forward_hook(in_its_own_type)
    return mllm


def in_its_own_type(module, inputs, output):
    """A hook: what the module gives, in the type of its weights."""
    return output.to(next(module.parameters()).dtype)


def checkpoint_activations(mllm):
    """Its layers run again in the backward pass, in the place of keeping what they computed."""
    # The reentrant form needs a gradient of what comes in, which with LoRA is frozen.
    form = {"use_reentrant": False, "context_fn": first_and_second_run}
    if hasattr(mllm, "activation_checkpointing_enable"):
        mllm.activation_checkpointing_enable(form)
    else:  # its name in older releases of transformers
        mllm.gradient_checkpointing_enable(form)


def rest_frozen_tower(embedder):
    """The embedder, its vision tower in evaluation mode where it is frozen. With dropout its output
    would be another one in GradCache's second pass than what was remembered from the first."""
    tower = vision_tower(embedder.mllm)
    if not any(p.requires_grad for p in tower.parameters()):
        tower.eval()
    return embedder


# ---------------------------------------------------------------------------- positions and masks


def position_ids(mllm, inputs, sequential):
    """Position ids, always given. Trap: a Qwen-VL model remembers the last batch's, and Qwen2.5-VL
    silently falls back to 1-D ones. sequential: as VLM2Vec's checkpoints need them.

    -> (B, L), or (3, B, L) for the families with M-RoPE."""
    mask = inputs["attention_mask"]
    rope = getattr(mllm.model, "get_rope_index", None)
    if rope is None or sequential:
        # Padding behind a row counts on: positions that stop would pass for several texts in a row.
        first = mask.argmax(1, keepdim=True)  # (B, 1) the first real token
        places = torch.arange(mask.shape[1], device=mask.device)  # (L,)
        positions = (places - first).clamp(min=0)  # (B, L)
    else:
        positions, _ = rope(
            input_ids=inputs["input_ids"],
            mm_token_type_ids=inputs.get("mm_token_type_ids"),
            image_grid_thw=inputs.get("image_grid_thw"),
            attention_mask=mask,
        )  # (3, B, L)
    refuse_longer(mllm, positions)
    return positions


def most_positions(mllm):
    """How many of a row the model was made for; None: its config does not say."""
    return getattr(mllm.config.get_text_config(), "max_position_embeddings", None)


def refuse_longer(mllm, positions):
    """InputError where a row has more positions than the model was made for: a whole book in one
    text would take the memory, or hours, for a vector of no use."""
    most = most_positions(mllm)
    L = positions.shape[-1]
    # The numbers are looked at only where they may be too large: a GPU would be waited for.
    if most and L > most and positions.max() >= most:
        text = f"a row of {L:,} tokens, and the model was made for at most {most:,}"
        raise InputError(f"{text}: --max-length {most} cuts texts that are longer")


def refuse_longer_row(mllm, collate, row):
    """`refuse_longer` of one row, before it is padded with others."""
    most = most_positions(mllm)
    if most and row.length > most:  # else its positions are not worth their time
        position_ids(mllm, collate.pad_rows([row]), collate.style == "vlm2vec")


def attention_mask(mllm, inputs, mask):
    """The mask in the form that the family needs. mask: bool (B, 1, L, L) or None (plain causal).

    In Gemma 3 a picture's tokens see each other both ways and some layers see a window: there
    `mask` decides about earlier tokens only."""
    if mask is None:
        # No token attends to what comes behind it: padding on the right, as the collator pads,
        # needs no mask, and kernels without one are faster (on a GPU: FlashAttention).
        return None if inputs["attention_mask"][:, 0].all() else inputs["attention_mask"]
    if mllm.config._attn_implementation != "sdpa":  # Trap: eager would *add* the booleans
        raise InputError("the compression mask needs --attn sdpa")
    if "token_type_ids" not in inputs:
        return mask
    device = mask.device
    is_image = inputs["token_type_ids"].to(device) == 1  # (B, L)
    starts = is_image & ~F.pad(is_image, (1, 0))[:, :-1]
    picture = torch.where(is_image, starts.cumsum(1) - 1, -1)  # (B, L) which picture, from 0
    embeddings = mllm.get_input_embeddings()(inputs["input_ids"].to(device))
    return create_masks_for_generate(
        mllm.config,
        embeddings,
        inputs["attention_mask"].to(device),
        None,  # no cache; by its place, for versions of transformers differ in its name
        and_mask_function=lambda b, head, i, j: mask[b, 0, i, j] | (j > i),
        block_sequence_ids=picture,
    )


def refuse_cross_attention(mllm):
    """InputError for a model whose text looks at the picture by cross-attention (Mllama): no mask
    over a row's tokens can hide the picture there, so that stage 1 would teach nothing; and no row
    of ours says which tokens see it."""
    for name, _ in mllm.get_decoder().named_modules():
        if name.endswith(("cross_attn", "crossattention")):
            text = f"{mllm.config.model_type}'s text sees pictures by cross-attention"
            way_out = "past any mask of tokens; take a family without it"
            raise InputError(f"--model: {text}, {way_out}")

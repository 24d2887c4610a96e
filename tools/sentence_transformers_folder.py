"""A folder that `SentenceTransformer(folder)` loads without any code of ours, and makes the same
vectors with: its stock modules weigh the K compression tokens with 1 and all others with 0, take
the mean, and bring it to unit length."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

from transformers.tokenization_utils_base import VERY_LARGE_INTEGER

from plumbing.errors import InputError
from plumbing.folders import read_json, written_beside
from plumbing.log import versions
from plumbing.template import EXPORTED, STYLES, chat_template
from plumbing.weights import write_model, write_settings

# A chat template that writes what our Collator does: head, pictures, texts, end. A prompt comes as
# a system message, and stands between the pictures and the text, as MMEB's instructions do. Filled
# in with five strings: head, what stands before a text and before a picture, one picture, the end.
# %% is the % of Jinja.
CHAT_TEMPLATE = """{%% set head, text, picture, one, end = %s, %s, %s, %s, %s %%}\
{%% set ns = namespace(pictures="", words="") %%}\
{%% for m in messages %%}{%% if m.content is string %%}{%% set ns.words = ns.words + m.content %%}\
{%% else %%}{%% for part in m.content %%}{%% if part.type == "image" %%}\
{%% set ns.pictures = ns.pictures + one %%}{%% else %%}{%% set ns.words = ns.words + part.text %%}\
{%% endif %%}{%% endfor %%}{%% endif %%}{%% endfor %%}\
{{ head }}{{ picture if ns.pictures else text }}{{ ns.pictures }}{{ ns.words }}{{ end }}"""
# MMEB's instructions, as they stand behind a picture or in front of a text. (Its texts also end
# with a newline, which no prompt can write.) The names are ours.
PROMPTS = {
    "query": "",
    "document": "",
    "classify image": "\nRepresent the given image for classification\n",
    "question about image": "\nRepresent the given image with the following question: ",
    "image to caption": "\nFind an image caption describing the given everyday image.\n",
    "caption to image": "Find me an everyday image that matches the given caption: ",
    "image": "\nRepresent the given image.\n",
    "similar image": "\nFind a day-to-day image that looks similar to the provided image.\n",
    "changed image": "\nGiven an image, find a similar everyday image with the described changes: ",
    "object in image": "\nSelect the portion of the image that isolates the object labeled as ",
    "object": "\nRepresent the given cropped image of the object\n",
}


def exported_template(embedder) -> str:
    """The template of this embedder: what stands around the content, up to its last code token."""
    collate, decode = embedder.collate, embedder.processor.tokenizer.decode
    template = collate.template
    head = decode(template.head_ids)
    end = STYLES[embedder.style] + template.after_text + decode(template.answer_ids)
    end += template.before_answer + decode(collate.compress_ids)
    parts = (head, template.before_text, template.before_picture, template.picture, end)
    strings = [json.dumps(x, ensure_ascii=False) for x in parts]
    return EXPORTED + CHAT_TEMPLATE % tuple(strings)


class Module(NamedTuple):
    """One of that library's modules: its class and its settings."""

    kind: str
    settings: dict


def modules_of(embedder) -> list:
    """The modules in the order in which that library runs them."""
    # Texts, pictures and both go through one forward: the template above has put them together.
    call = {"method": "forward", "method_output_name": "last_hidden_state"}
    ways = {"text": call, "image": call, "message": call | {"format": "structured"}}
    reading = {"modality_config": ways, "module_output_name": "token_embeddings"}
    modules = [Module("Transformer", reading)]
    pooling = "lasttoken"
    if embedder.pooling == "mean":
        pooling = "mean"  # by the weights of the tokens
        modules.append(Module("WordWeights", compression_weights(embedder)))
    width = embedder.mllm.get_input_embeddings().weight.shape[1]
    modules.append(Module("Pooling", {"embedding_dimension": width, "pooling_mode": pooling}))
    return [*modules, Module("Normalize", {})]


def compression_weights(embedder) -> dict:
    """1 for the K compression tokens, 0 for all others."""
    ids = embedder.collate.compress_ids
    names = embedder.processor.tokenizer.convert_ids_to_tokens(ids)
    vocabulary = [""] * embedder.mllm.get_input_embeddings().weight.shape[0]
    for i, name in zip(ids, names, strict=True):
        vocabulary[i] = name
    weights = dict.fromkeys(names, 1.0)
    return {"vocab": vocabulary, "word_weights": weights, "unknown_word_weight": 0.0}


def save_sentence_transformers(embedder, path):
    """Saves the embedder as that library's modules. The model's own chat template is kept beside
    the exported one, so that `load` makes the same vectors of the folder, too."""
    if embedder.style == "vlm2vec" and hasattr(embedder.mllm.model, "get_rope_index"):
        raise InputError("sentence-transformers has no sequential positions, as vlm2vec needs")
    processor = embedder.processor
    own = chat_template(processor)
    processor.chat_template = processor.tokenizer.chat_template = exported_template(embedder)
    pad_and_never_cut(processor.tokenizer)
    with written_beside(path) as part:
        write_model(embedder, part)
        write_settings(embedder, part, path)
        settings = read_json(part, "nanocoma.json")
        write_json(settings | {"chat_template": own}, part, "nanocoma.json")
        write_modules(embedder, part)


def pad_and_never_cut(tokenizer):
    """The settings of the exported tokenizer: that library pads and cuts by them, where we do not.
    Trap: what it cuts off a row's end are the K tokens."""
    # Trap: without position ids, padding in front moves all positions.
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = VERY_LARGE_INTEGER
    if tokenizer.pad_token is None:  # any token will do: it is masked
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)


def write_modules(embedder, path):
    """What that library needs beside a transformers folder."""
    listed = []
    for number, module in enumerate(modules_of(embedder)):
        kind = f"sentence_transformers.models.{module.kind}"
        folder, file = f"{number}_{module.kind}", "config.json"
        if number == 0:  # the model's own files are in the folder itself
            folder, file = "", "sentence_bert_config.json"
        write_json(module.settings, path, Path(folder, file))
        listed.append({"idx": number, "name": str(number), "path": folder, "type": kind})
    write_json(listed, path, "modules.json")
    library = {"__version__": versions(), "model_type": "SentenceTransformer", "prompts": PROMPTS}
    library.update(default_prompt_name=None, similarity_fn_name="cosine")
    write_json(library, path, "config_sentence_transformers.json")


def write_json(value, folder, name):
    """A small file of the folder."""
    file = Path(folder, name)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value, indent=1))


if __name__ == "__main__":
    sys.exit("tools/sentence_transformers_folder.py has no commands: tools/merge.py imports it")

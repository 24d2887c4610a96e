"""A folder that `SentenceTransformer(folder)` loads, and makes the same vectors with."""

import json
import shutil
from pathlib import Path

from plumbing.errors import InputError
from plumbing.folders import written_beside
from plumbing.template import STYLES
from plumbing.weights import write_model, write_settings

# A chat template that writes what our Collator does: head, content with its pictures, end. Filled
# in with five strings: head, what stands before a text and before a picture, one picture, the end.
# %% is the % of Jinja.
CHAT_TEMPLATE = """{%% set head, text, picture, one, end = %s, %s, %s, %s, %s %%}{{ head }}\
{%% if messages[0].content is string or messages[0].content[0].type != "image" %%}{{ text }}\
{%% else %%}{{ picture }}{%% endif %%}{%% for m in messages %%}\
{%% if m.content is string %%}{{ m.content }}{%% else %%}{%% for part in m.content %%}\
{%% if part.type == "image" %%}{{ one }}{%% else %%}{{ part.text }}{%% endif %%}{%% endfor %%}\
{%% endif %%}{%% endfor %%}{{ end }}"""


def chat_template(embedder) -> str:
    """The template of this embedder: what stands around the content, up to its last code token."""
    collate, decode = embedder.collate, embedder.processor.tokenizer.decode
    template = collate.template
    head = decode(template.head_ids)
    end = STYLES[embedder.style] + template.after_text + decode(template.answer_ids)
    end += template.before_answer + decode(collate.compress_ids)
    parts = (head, template.before_text, template.before_picture, template.picture, end)
    strings = [json.dumps(x, ensure_ascii=False) for x in parts]
    return CHAT_TEMPLATE % tuple(strings)


def pooling_module(embedder, path) -> tuple:
    """-> (the class that pools, its config). The mean of the K tokens is a class of our own, and
    its file goes into the folder."""
    if embedder.pooling == "mean":
        shutil.copy(Path(__file__).parent / "compression_pooling.py", path)
        return "compression_pooling.CompressionPooling", {"K": embedder.K}
    width = embedder.mllm.get_input_embeddings().weight.shape[1]
    config = {"pooling_mode": "lasttoken", "word_embedding_dimension": width}
    return "sentence_transformers.models.Pooling", config


def save_sentence_transformers(embedder, path):
    """Saves the embedder as its modules: transformer, pooling, normalisation."""
    if embedder.style == "vlm2vec" and hasattr(embedder.mllm.model, "get_rope_index"):
        raise InputError("sentence-transformers has no sequential positions, as vlm2vec needs")
    processor = embedder.processor
    processor.chat_template = processor.tokenizer.chat_template = chat_template(embedder)
    # Trap: without position ids, padding in front moves all positions.
    processor.tokenizer.padding_side = "right"
    with written_beside(path) as part:
        write_model(embedder, part)
        write_settings(embedder, part, path)
        write_modules(embedder, part)


def write_modules(embedder, path):
    """What that library needs beside a transformers folder."""
    pooling, pooling_config = pooling_module(embedder, path)
    kinds = {
        "": "sentence_transformers.models.Transformer",
        "1_Pooling": pooling,
        "2_Normalize": "sentence_transformers.models.Normalize",
    }
    modules = []  # the library runs them in this order
    for i, (folder, kind) in enumerate(kinds.items()):
        modules.append({"idx": i, "name": str(i), "path": folder, "type": kind})
    # Texts, pictures and both go through one forward: the template above has put them together.
    call = {"method": "forward", "method_output_name": "last_hidden_state"}
    ways = {"text": call, "image": call, "message": call | {"format": "structured"}}
    transformer = {"modality_config": ways, "module_output_name": "token_embeddings"}
    write_json(modules, path, "modules.json")
    write_json(transformer, path, "sentence_bert_config.json")
    write_json(pooling_config, path, "1_Pooling/config.json")
    write_json({}, path, "2_Normalize/config.json")


def write_json(value, folder, name):
    """A small file of the folder."""
    file = Path(folder, name)
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(value, indent=1))

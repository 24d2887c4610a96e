"""An Embedder for mteb, which has other tasks than MMEB's: `mteb.evaluate(Model(embedder), tasks)`;
of a folder that `tools.merge --export sentence-transformers` wrote, `exported(folder)`."""

import sys

if __name__ == "__main__":  # in front of a library that may not be there
    sys.exit("tools/mteb_model.py has no commands: tests/test_other_libraries.py imports it")

from mteb.models import SentenceTransformerEncoderWrapper
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.model_meta import ModelMeta
from sentence_transformers import SentenceTransformer

PICTURES_TOO = {"modalities": ["text", "image"]}


class Model(AbsEncoder):
    """embedder: of `model.load`."""

    def __init__(self, embedder, name="nanocoma/embedder"):
        self.embedder = embedder
        self.mteb_model_meta = ModelMeta.create_empty(
            {"name": name, "revision": "1"} | PICTURES_TOO
        )

    def encode(self, inputs, **_):
        """inputs: batches {"text": [...], "image": [...]}, either or both -> (N, D)."""
        items = []
        for batch in inputs:
            keys = [key for key in ("text", "image") if key in batch]
            rows = zip(*(batch[key] for key in keys), strict=True)
            items += [dict(zip(keys, row, strict=True)) for row in rows]
        return self.embedder.encode(items)


def exported(folder):
    """For `mteb.evaluate`: by itself mteb takes what lies on a disk for a model of texts."""
    library = SentenceTransformer(str(folder))
    library.prompts = {"query": "", "document": ""}  # mteb knows no other names
    wrapper = SentenceTransformerEncoderWrapper(library)
    wrapper.mteb_model_meta = wrapper.mteb_model_meta.model_copy(update=PICTURES_TOO)
    return wrapper

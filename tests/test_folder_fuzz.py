"""A saved folder with something changed in one of its files: it loads and embeds, or is an
InputError; never another exception, and never a vector that is not finite.

python -m pytest tests/test_folder_fuzz.py             a few, the same ones every time
FUZZ=2000 python -m pytest tests/test_folder_fuzz.py   by hand: new ones every time"""

import json
import os

import numpy as np
import pytest
from checks import toy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import model
from plumbing.config import TrainingFlags
from plumbing.errors import InputError

many = int(os.environ.get("FUZZ", 0))
fuzz = settings(
    max_examples=many or 3, derandomize=not many, deadline=None, database=None,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
ODD = [None, True, "", "x", [], {}, 0, -1, 1, 2.5, 7, 10**6, 10**9, 10**18, float("nan"), [10**9]]
NAMES = "config tokenizer_config tokenizer nanocoma processor_config preprocessor_config"
JSON_FILES = [f"{name}.json" for name in (*NAMES.split(), "adapter_config")]
ITEMS = ["a red circle", Image.new("RGB", (70, 50), "red")]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """{file: content} of an adapter and its base, and the folder that they are written into."""
    folder = tmp_path_factory.mktemp("fuzz")
    embedder = toy()
    model.save(embedder, folder / "base")
    embedder = model.load(folder / "base", device="cpu")
    model.choose_trained(embedder, TrainingFlags(model=str(folder / "base"), lora_rank=2))
    model.save(embedder, folder / "adapter")
    return folder


def paths_in(value, path=()):
    """Where the values stand in JSON: tuples of keys. Of a long list, as a vocabulary, a few."""
    yield path
    if isinstance(value, dict):
        for key in list(value)[:40]:
            yield from paths_in(value[key], (*path, key))
    elif isinstance(value, list):
        for i in range(min(len(value), 3)):
            yield from paths_in(value[i], (*path, i))


def changed(draw, content: bytes) -> bytes:
    """JSON with one value replaced or taken away, or some bytes lost."""
    if draw(st.integers(0, 9)) == 0:
        i = draw(st.integers(0, len(content)))
        return content[:i] + content[i + draw(st.integers(1, 50)) :]
    whole = json.loads(content)
    *above, last = draw(st.sampled_from([path for path in paths_in(whole) if path]))
    value = whole
    for key in above:
        value = value[key]
    if draw(st.booleans()):
        value[last] = draw(st.sampled_from(ODD))
    else:
        del value[last]
    return json.dumps(whole).encode()


def check(folder, file, content):
    """Loads the folder with that content in the file, and embeds; the file is restored."""
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        z = model.load(folder, device="cpu").encode(ITEMS)
        assert np.isfinite(z).all() and np.allclose(np.linalg.norm(z, axis=1), 1, atol=1e-4)
    except InputError as e:
        assert 10 < len(str(e)) < 700, e
    finally:
        file.write_bytes(before)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("which", ["base", "adapter"])
@pytest.mark.parametrize("name", JSON_FILES)
def test_json_of_a_folder(saved, which, name):
    """Values of other types and sizes, or missing ones, in each JSON file."""
    file = saved / which / name
    if not file.exists() or (which == "adapter" and name == "config.json"):
        return  # an adapter's is not read

    @fuzz
    @given(st.data())
    def run(data):
        content = changed(data.draw, file.read_bytes())
        check(saved / which, file, content)

    run()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["base/model.safetensors", "adapter/adapter_model.safetensors"])
def test_weights_of_a_folder(saved, name):
    """Bytes of the header changed; numbers of a weight that are not finite or gigantic."""
    file = saved / name

    @fuzz
    @given(st.integers(0, 3000), st.binary(min_size=1, max_size=4), st.booleans())
    def run(place, some, in_header):
        content = bytearray(file.read_bytes())
        if not in_header:
            place, some = len(content) - 4 * (place + 1), np.float32("nan").tobytes()
        content[place : place + len(some)] = some
        check(file.parent, file, bytes(content))

    run()

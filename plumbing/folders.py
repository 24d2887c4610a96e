"""A model's folder, one's own or from elsewhere: where it is, what it may hold before anything is
built from it, how it is written. (What is built: plumbing/weights.py.)"""

import hashlib
import json
import os
import re
import shutil
import threading
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from plumbing.errors import InputError, brief
from plumbing.files import absence, digest_of_content, on_the_disk, open_file
from plumbing.hub import fetch
from plumbing.images import MOST_PIXELS
from plumbing.locks import OF_A_MODEL, OF_A_RUN, locked, refuse_locked

TOY = Path(__file__).parent.parent / "toy" / "mllm"
TOYS = ("toy", "toy-random")  # names of models that are made of it
SAMPLE = 4096  # bytes, see digest_of_weights
LONGEST_JSON = 50_000_000  # bytes; an index has some 100 of them for each weight
MODEL_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]
SETTING_FILES = [  # that `load` reads, beside the weights and an adapter's flags
    *("config.json", "nanocoma.json", "*processor_config.json", "*.jinja", "chat_template.json"),
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json"),
]
FINISHED = "finished.json"  # the last file of a run: what was run, like a checkpoint's state.json
RESUME = "the command that began it finishes it, with --resume where it has a checkpoint"
CARD = "README.md"  # a model's licence is in it; nothing is loaded from it
WEIGHTS = "*.safetensors"
# Without one of these no library takes a folder for a model, or an adapter.
LAST = ("modules.json", "adapter_config.json", "config.json")  # in this order
# What an older run or export may have left that `load`, or another library, would believe, in the
# order in which it goes: the mark of a whole model first, then what makes a model of the rest.
STALE = [
    *(FINISHED, *reversed(LAST)),
    *("adapter_model.safetensors", "nanocoma.json", "model*.safetensors"),
    *("*.safetensors.index.json", "chat_template*.jinja", "additional_chat_templates/*.jinja"),
    *("generation_config.json", "*processor_config.json", "merges.txt"),
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "chat_template.json"),
    *("sentence_bert_config.json", "config_sentence_transformers.json"),
    *("compression_pooling.py", "[123]_*/config.json"),
]
CHECKPOINTS = "checkpoints/step-" + "[0-9]" * 8  # others' copies have other names
# One of these makes a folder a model's, or an adapter's: in a `config.json` of anything else is
# none of these words.
MODELS_OWN = {
    "nanocoma.json": "torch",
    "config.json": "model_type",
    "adapter_config.json": "peft_type",
}
# Keys of a config that say how often something is built, and how large a weight is.
COUNTS = re.compile(r"(^|_)(?<!window_)(layers?|depths?|blocks|stages)$")
SIZES = re.compile(r"^(vocab|hidden|intermediate)_size$|^(embed|head)_dim$|_experts$")
# Numbers of a processor, and the most that they may be: beyond, it would make of a small picture,
# or of its place in the text, what fills the memory. (The Qwen family's edges are areas.)
AREAS = re.compile(r"_edge$|_pixels$")
PROCESSOR_LIMITS = [
    (re.compile(r"merge_size$|temporal_patch_size$"), 16),
    (re.compile(r"patch_size$"), 256),
    (re.compile(r"^(height|width|image_size|crop_size|image_grid_pinpoints)$"), 10_000),
    (re.compile(r"_(patches|tiles|crops|splits)$"), 1_000),
    (re.compile(r"_(tokens|seq_len|seq_length)$"), 100_000),
]
LONGEST_EDGE = 10_000


# -------------------------------------------------------------------------------------- where it is


def local_folder(name) -> str:
    """The folder of a model: the toy's, one's own, or what of a hub id a model needs, downloaded:
    its weights as safetensors, no pickles and no code."""
    if not isinstance(name, str | os.PathLike) or not str(name):
        text = f'{brief(repr(name))} is no name of a model; load("toy"), a folder, or a hub id'
        raise InputError(f"--model: {text}")
    folder = str(name)
    if folder in TOYS:
        return str(TOY)
    if not os.path.isdir(folder):
        folder = fetch(folder, "model", [*MODEL_FILES, CARD], [WEIGHTS])
    refuse_unreadable(folder)
    return folder


def refuse_unreadable(folder):
    """An InputError where a folder, or one of a model's files in it, cannot be read."""
    if not os.access(folder, os.R_OK | os.X_OK):
        raise InputError(f"--model {folder}: may not be read by this user (permissions)")
    for pattern in [*MODEL_FILES, WEIGHTS]:
        for file in Path(folder).glob(pattern):
            if not file.is_file():  # opening a pipe would wait for ever
                raise InputError(f"--model {folder}: its {file.name} is no ordinary file")
            if not os.access(file, os.R_OK):
                text = f"its {file.name} may not be read by this user (permissions)"
                raise InputError(f"--model {folder}: {text}")


def read_json(folder, name, members=dict) -> dict:
    """A small JSON file of a folder, an object; {} where there is none. members: makes an object of
    its (name, value) pairs."""
    file = Path(folder) / name
    if not file.exists():
        return {}
    try:
        with open_file(file) as opened:  # a pipe in its place would be waited for
            if os.fstat(opened.fileno()).st_size > LONGEST_JSON:
                raise InputError(f"{file}: longer than {LONGEST_JSON:,} bytes")
            text = opened.read()
        value = json.loads(text, object_pairs_hook=members)
    except InputError:
        raise
    except (OSError, ValueError, RecursionError) as e:
        raise InputError(f"{file}: not readable as JSON: {brief(e)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: must hold an object, not a {type(value).__name__}")
    return value


def digest_of_weights(folder) -> str:
    """Sixteen characters that change with the weights in a folder: of each *.safetensors its size,
    its header and samples all over it. (A whole 13 GB file would take a minute to read.)"""
    digest = hashlib.blake2b(digest_size=8)
    for path in sorted(Path(folder).glob(WEIGHTS)):
        with open_file(path, hint="If a run replaces it now, try again when it is over") as file:
            size = os.fstat(file.fileno()).st_size
            digest.update(f"{path.name} {size}".encode())
            for start in range(0, size, max(size // 256, SAMPLE)):
                file.seek(start)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()


def digest_of_settings(folder, adapter) -> str:
    """Eight characters that change with all that is read of a model beside its weights: its sizes,
    tokenizer, template, what is done to its pictures, and its adapter's flags (but not with where
    the base lies, for a folder may be moved)."""
    flags = {name: x for name, x in adapter.items() if name != "base_model_name_or_path"}
    digest = hashlib.blake2b(json.dumps(flags, sort_keys=True).encode(), digest_size=4)
    for pattern in SETTING_FILES:
        for path in sorted(Path(folder).glob(pattern)):
            digest.update(f"{path.name} {digest_of_content(path)}".encode())
    return digest.hexdigest()


# ------------------------------------------------------------------------------- what it may hold


# Trap: transformers leaves out a model's start values, and peft's warnings are listened to, by a
# change of the whole process: of two threads one would leave it as the other had made it.
one_at_a_time = threading.RLock()


@contextmanager
def reading(folder, *files):
    """Around calls of the libraries that read a folder from elsewhere: whatever they raise is the
    folder's fault, and becomes an InputError with its name and those of the files that they read.
    files: their names, or patterns. Threads wait for each other."""
    try:
        with one_at_a_time:
            yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except ImportError as e:  # it is of no folder's making
        raise InputError(f"--model {brief(folder)}: a package is missing: {brief(e)}") from e
    except BaseException as e:
        # Trap: the tokenizers' Rust code panics with what is no Exception, and cannot be imported.
        if not isinstance(e, Exception) and type(e).__name__ != "PanicException":
            raise
        there = sorted({file.name for pattern in files for file in Path(folder).glob(pattern)})
        text = f"damaged, or made for another model: {', '.join(there) or 'its content'}"
        text = f"{text} ({type(e).__name__}: {brief(e)})"
        raise InputError(f"--model {brief(folder)}: {text}") from e


def refuse_hostile(folder):
    """What a folder from elsewhere may not hold: pickled weights in the place of safetensors, a
    list of files that leads out of it. (Code in it is never run.)"""
    for index in Path(folder).glob("*.index.json"):
        weight_map = read_json(folder, index.name).get("weight_map")
        files = weight_map.values() if isinstance(weight_map, dict) else ()
        for file in {str(f) for f in files}:
            if os.path.basename(file) != file:
                raise InputError(f"{index}: the weights in {brief(repr(file))} lie outside of "
                                 "the folder")  # fmt: skip
    if not any(Path(folder).glob(WEIGHTS)):
        text = begun_in(folder) or "no *.safetensors in it, and pickles are not opened"
        raise InputError(f"--model {folder}: {text}")


def is_unfinished(folder) -> bool:
    """Whether a run into it was begun, and has not come to its end."""
    begun = any(Path(folder).glob(CHECKPOINTS)) or Path(folder, OF_A_RUN).exists()
    return begun and not Path(folder, FINISHED).exists()


def was_being_written(folder) -> bool:
    """Whether a model was being written into a folder when its run was killed: see `part_in`."""
    return Path(folder, ".part").exists()


def begun_in(folder) -> str:
    """Why there is no model in a folder, where one was to be written into it, and the way out; ""
    where nothing says so."""
    if is_unfinished(folder):
        return f"its run is not finished: {RESUME}"
    if was_being_written(folder):
        return "a model was being written into it: the same command once more makes one of it"
    return ""


def shapes_of_weights(folder, pattern=WEIGHTS) -> dict:
    """{name: shape} of all weights in a folder's files, by their headers."""
    shapes = {}
    for path in sorted(Path(folder).glob(pattern)):
        try:
            with safe_open(path, "pt") as file:
                for name in file.keys():  # noqa: SIM118  it is no dict
                    shapes[name] = file.get_slice(name).get_shape()
        except (OSError, SafetensorError) as e:
            raise InputError(f"--model {folder}: {path.name}: {brief(e)}") from None
    return shapes


def longest_side(shapes) -> int:
    """The largest number in these shapes: no weight has more rows, or columns. 1 for none."""
    return max((n for shape in shapes.values() for n in shape), default=1)


def numbers_in(value, key=""):
    """Yields (key, number) for all numbers in JSON, at any depth; those of a list have its key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from numbers_in(inner, name)
    elif isinstance(value, list):
        for inner in value:
            yield from numbers_in(inner, key)
    elif isinstance(value, int | float):
        yield key, value


def refuse_absurd_config(folder):
    """Before anything is built: config.json may promise no more layers than its files have weights,
    and no larger ones. Building a million layers, or 10^9 rows, takes the memory of a machine."""
    config = read_json(folder, "config.json")
    if not config:
        text = begun_in(folder) or "no config.json in it; is it a model's folder?"
        raise InputError(f"--model {folder}: {text}")
    shapes = shapes_of_weights(folder)
    longest = longest_side(shapes)
    for key, value in numbers_in(config):
        most = None
        if COUNTS.search(key):
            most, unit = len(shapes), "weights"
        elif SIZES.search(key):
            most, unit = longest, "rows in the largest weight"
        if most is not None and not value <= most:  # NaN too
            text = f"{key} is {value:,} in its config.json, but its files have {most:,} {unit}"
            raise InputError(f"--model {folder}: {text}")


def refuse_absurd_processor(folder):
    """A processor that would make something gigantic of every picture."""
    for name in ("processor_config.json", "preprocessor_config.json"):
        numbers = list(numbers_in(read_json(folder, name)))
        has_areas = "merge_size" in [key for key, _ in numbers]
        limits = [*PROCESSOR_LIMITS, (AREAS, MOST_PIXELS if has_areas else LONGEST_EDGE)]
        for key, value in numbers:
            most = next((most for pattern, most in limits if pattern.search(key)), None)
            if most is not None and not 0 <= value <= most:
                raise InputError(f"{Path(folder, name)}: {key} is {value:,}; 0 to {most:,}, "
                                 "or pictures would fill the memory")  # fmt: skip


# ------------------------------------------------------------------------------- how it is written


@contextmanager
def written_beside(path):
    """Gives a new folder to write into; at the end its files go to `path`, one by one, and those of
    an older run that `load` would believe are removed. Where writing fails, what stood in `path`
    stays, and an InputError says why."""
    refuse_foreign(path)
    path = Path(path)
    is_new = not os.path.exists(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        # Of two commands at once each would take away the other's files.
        with locked(path / OF_A_MODEL, path):
            with part_in(path) as part:
                yield part
                ordinary_permissions(part)
                on_the_disk(part)
                refuse_folders(part, path)
            put_in_place(part, path)
    except Exception as e:
        # The tokenizers' Rust code raises a plain Exception where the disk is full.
        if isinstance(e, OSError | SafetensorError) or type(e) is Exception:
            raise InputError(f"{path}: not written: {brief(e)}. {way_out(path)}") from e
        raise
    finally:
        if is_new:
            with suppress(OSError):  # not where there is something in it
                path.rmdir()


@contextmanager
def part_in(path):
    """A new folder inside of `path`, which may be a disk of its own: a rename must be all that is
    left to do. It goes again where it is not made whole. One that was there, of a command that
    broke off, is emptied and stays: by it `refuse_foreign` knows that the folder may be written."""
    part = path / ".part"
    was_there = part.exists()
    part.mkdir(exist_ok=True)
    empty(part)
    try:
        yield part
    except BaseException:
        with suppress(OSError):
            empty(part)
            if not was_there:
                part.rmdir()
        raise


def empty(folder):
    """All that is in a folder goes."""
    for path in list(folder.iterdir()):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def refuse_foreign(path):
    """InputError where a folder is no model's, but holds files that are called as a model's are:
    they are another program's or a person's, and would be replaced."""
    if not os.path.isdir(path):
        return
    theirs = sorted(file.name for file in stale_files(Path(path)))
    if not theirs or was_being_written(path):
        return
    for name, word in MODELS_OWN.items():
        with suppress(InputError):
            if word in read_json(path, name):
                return
    text = f"{brief(path)} is no model's folder, and holds {brief(', '.join(theirs))}"
    raise InputError(f"{text}, which a model's files would replace. Take another folder")


def files_of(part) -> list:
    """The relative paths of a new model's files, those of LAST in its order at the end."""
    files = sorted(file.relative_to(part) for file in part.rglob("*") if file.is_file())
    files.sort(key=lambda file: LAST.index(str(file)) if str(file) in LAST else -1)
    return files


def stale_files(path) -> list:
    """What an older run or export may have left in a folder."""
    return [old for pattern in STALE for old in path.glob(pattern)]


def refuse_folders(part, path):
    """An error, before anything is replaced, where a folder stands in the place of a file."""
    for file in [*stale_files(path), *(path / file for file in files_of(part))]:
        if file.is_dir():
            raise IsADirectoryError(f"{file} is a folder")


def put_in_place(part, path):
    """The files of `part` to `path`, in the place of an older run's. Broken off in the midst it
    leaves what nobody loads (what makes a folder a model goes first, and comes last), and `part`,
    by which the next command knows that the folder may be written."""
    new = files_of(part)
    try:
        for old in stale_files(path):
            name = old.relative_to(path)
            if str(name) in LAST or name not in new:
                old.unlink()
        for file in new:
            (path / file).parent.mkdir(exist_ok=True)
            os.replace(part / file, path / file)
    except OSError as e:
        text = f"{path}: broken off while files were replaced: {brief(e)}. It is no model now"
        raise InputError(f"{text}; the same command once more makes one of it") from e
    shutil.rmtree(part, ignore_errors=True)  # it is empty


def way_out(path) -> str:
    """What to do where a folder could not be written."""
    above = next(p for p in (path.absolute(), *path.absolute().parents) if os.path.exists(p))
    free = f"{shutil.disk_usage(above).free / 1e6:,.1f} MB are free on that disk"
    return f"What stood there is as it was; {free}. Free some, or take another folder"


def ordinary_permissions(folder):
    """Trap: safetensors writes files that only their owner may read. -> as the umask has them."""
    mode = folder.stat().st_mode & 0o666  # a new folder's has the umask in it
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(mode)


def refuse_unwritable_folder(path):
    """An InputError, before any work, where no folder can be written at `path`."""
    path = Path(path)
    try:
        places = (path, *path.absolute().parents)  # the first that is there counts, or is a link
        above = next(p for p in places if p.exists() or p.is_symlink())
    except OSError as e:  # a name that no file can have
        raise InputError(f"{brief(path)!r} cannot be written: {e.strerror}") from None
    if not above.exists():
        raise InputError(f"{brief(above)}: {absence(above, 'folder')}; take another folder")
    if not str(path).strip(". ") or not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"{brief(path)!r} cannot be written: {above} is no folder that you may "
                         "write into. Take another one")  # fmt: skip
    refuse_foreign(path)
    refuse_locked(path / OF_A_RUN, path)
    if any(path.glob(CHECKPOINTS)):
        raise InputError(f"{brief(path)} is the --out of an unfinished run; take another folder")

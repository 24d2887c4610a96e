"""Mistakes in what reads and writes, plumbing/; see mutations.py."""

FILES = [
    (
        "plumbing/images.py", "8: Image.Transpose.ROTATE_90,", "8: Image.Transpose.ROTATE_270,",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", 'module=r"PIL\\."', 'module=r"pillow\\."',
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "return tuple(name for name in FORMATS if name in Image.OPEN)",
        "return tuple(Image.OPEN)",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", 'f"{brief(name or ref)} ({size} bytes)"',
        'f"{brief(ref)} ({size} bytes)"',
        "tests/test_pictures.py tests/test_data.py",
    ),
    (
        "plumbing/images.py", 'return decode(ref, brief(name or "the picture"))',
        'return decode(ref, "the picture")',
        "tests/test_pictures.py tests/test_data.py",
    ),
    (
        "plumbing/images.py", "    refuse_size(image.size)\n", "",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", 'if image.format == "EPS":', 'if image.format == "PS":',
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "return image.transpose(turn) if turn is not None else image",
        "return image.transpose(turn) if turn else image",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "        turn = turn_of(image)\n        image = to_rgb(image)\n",
        "        image = to_rgb(image)\n        turn = turn_of(image)\n",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "max(w, h) > MOST_STRETCHED * min(w, h)", "w > MOST_STRETCHED * h",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "w * h > MOST_PIXELS or", "w * h >= 10 * MOST_PIXELS or",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "except Exception:  # the pixels are loaded",
        "except KeyError:  # the pixels are loaded",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", 'if image.mode in ("La", "RGBa"):', 'if image.mode in ("RGBa",):',
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", 'Image.new("RGBA", image.size, "white")',
        'Image.new("RGBA", image.size)',
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "tuple(v // 256 for v in key)", "tuple(min(v, 255) for v in key)",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "low < 0 or high > 65535", "high > 65535",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "or high > 255\n", "or high >= 255\n",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "grey[values == key] = 255", "grey[grey == key] = 255",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "return image.mode, image.size, image.tobytes()",
        "return image.mode, image.tobytes()",
        "tests/test_data.py tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "    image = open_image(image)\n    return image.mode",
        "    return image.mode",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", 'f"{self.zip}:{self.member}"', "self.member",
        "tests/test_pictures.py tests/test_data.py",
    ),
    (
        "plumbing/images.py", "links.append(names[-1])", "continue",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "for hashes in (names, links, others):",
        "for hashes in (names, others):",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "return i < len(hashes) and hashes[i] == hash(name)",
        "return i < len(hashes)",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", 'if folder.name == "images" and folder.is_dir():',
        "if folder.is_dir():",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", ' and "--" in folder.parent.parent.name', "",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", '*self.root.glob("images_zip/*.zip"), *self.root.glob("images.zip")',
        '*self.root.glob("images_zip/*.zip")',
        "tests/test_data.py tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", 'raise InputError(f"--image-root {brief(root)}: no such folder")',
        'self.root = Path(".")',
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "            open_zip(archive)\n\n", "            archive\n\n",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "if not holds(folder.links, name) or self.is_there(full, path):",
        "if not holds(folder.links, name) or os.path.exists(full):",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "        names.append(rest)\n",
        "        names\n",
        "tests/test_pictures.py tests/test_data.py",
    ),
    (
        "plumbing/images.py", 'if top in ("images", Path(archive).stem):', "if top:",
        "tests/test_pictures.py -k own_folder",
    ),
    (
        "plumbing/images.py", 'self.tops = [top, f"{top}/images"]',
        'self.tops = [f"{top}/images", top]',
        "tests/test_pictures.py -k as_it_stands",
    ),
    (
        "plumbing/images.py", "values = 65535 - values", "values = values",
        "tests/test_pictures.py -k zero_may_be_white",
    ),
    (
        "plumbing/images.py", "for top in self.tops:  # newer", "for top in ():  # newer",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", 'else ("NFC", "NFD"):', 'else ("NFC",):',
        "tests/test_data.py -k only_looks_the_same",
    ),
    (
        "plumbing/images.py", "self.lost.append(brief(shown) + self",
        "self.lost.append(str(shown) + self",
        "tests/test_pictures.py tests/test_lists.py",
    ),
    (
        "plumbing/images.py", "if is_url(path):", 'if path.startswith("http:"):',
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", 'elif inner.split("/", 1)[0] == "..":',
        'elif path.split("/", 1)[0] == "..":',
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py",
        "directories = (os.path.normpath(os.path.join(top, inner)) for top in self.tops)",
        "directories = (os.path.join(top, inner) for top in self.tops)",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "return list_folder(real) if self.is_inside(real) else None",
        "return list_folder(real)",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py",
        "        self.refuse_outside(full, path)\n        return os.path.isfile(full)",
        "        self.refuse_outside(full, path)\n        return True",
        "tests/test_pictures.py tests/test_lists.py",
    ),
    (
        "plumbing/images.py", 'real == x or real.startswith(os.path.join(x, ""))',
        "real.startswith(x)",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", "self.is_inside(os.path.realpath(full))",
        "self.is_inside(os.path.abspath(full))",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", 'f"the picture {brief(path)!r} lies outside',
        'f"the picture {path!r} lies outside',
        "tests/test_pictures.py",
    ),
    (
        "plumbing/images.py", ' or "type_ids" in key:', ":",
        "tests/test_families.py",
    ),
    (
        "plumbing/images.py", "self.columns = list(self(Image.new(\"RGB\", (64, 64))).columns)",
        "self.columns = [\"input_ids\"]",
        "tests/test_picture_encoder.py",
    ),
    (
        "plumbing/images.py", "if shapes_of(images) == known.shapes:  # and nobody",
        "if images:  # and nobody",
        "tests/test_picture_encoder.py",
    ),
    (
        "plumbing/images.py", "and len(self.times) == MOST_SIZES:",
        "and len(self.times) == MOST_SIZES + 1:",
        "tests/test_picture_encoder.py",
    ),
    (
        "plumbing/images.py", "            self.known.clear()\n",
        "            pass\n",
        "tests/test_picture_encoder.py",
    ),
    (
        "plumbing/images.py", "if self.times[image.size] == 2:",
        "if self.times[image.size] == 3:",
        "tests/test_picture_encoder.py",
    ),
    (
        "plumbing/images.py", "torch.equal(tensor, encoded.images[key]) for key",
        "tensor.shape == encoded.images[key].shape for key",
        "tests/test_picture_encoder.py",
    ),
    (
        "plumbing/images.py", "{key: tensors[key] for key in keys if key in tensors}",
        "dict(tensors)",
        "tests/test_picture_encoder.py",
    ),
    (
        "plumbing/images.py", "{key: tensor.shape for key, tensor in images.items()}",
        "dict.fromkeys(images, 0)",
        "tests/test_picture_encoder.py",
    ),
    (
        "plumbing/images.py", "keys = dict.fromkeys(key for images in rows for key in images)",
        "keys = dict.fromkeys(rows[0])",
        "tests/test_families.py",
    ),
    (
        "plumbing/images.py", "start += len(t)", "start += 1",
        "tests/test_families.py",
    ),
    (
        "plumbing/images.py", "if len({t.shape[1:] for t in tensors}) == 1:",
        "if len({t.dim() for t in tensors}) == 1:",
        "tests/test_picture_encoder.py -k end_to_end",
    ),
    (
        "plumbing/inputs.py", "{why}: {brief(repr(x), 80)}; each", "{why}: {x!r}; each",
        "tests/test_inputs.py",
    ),
    (
        "plumbing/inputs.py", "isinstance(x, Image.Image | os.PathLike | np.ndarray)",
        "isinstance(x, Image.Image | str | np.ndarray)",
        "tests/test_inputs.py",
    ),
    (
        "plumbing/inputs.py", "x.shape[2] in (3, 4)", "x.shape[2] == 3",
        "tests/test_inputs.py",
    ),
    (
        "plumbing/inputs.py", "if x.dtype != np.uint8 or not colours", "if not colours",
        "tests/test_inputs.py",
    ),
    (
        "plumbing/inputs.py", 'if not x or not x.keys() <= {"image", "text"}:',
        'if not x.keys() & {"image", "text"}:',
        "tests/test_inputs.py",
    ),
    (
        "plumbing/inputs.py", "if len(texts) == len(pictures) == 1:",
        "if isinstance(x[0], str) and len(texts) == len(pictures) == 1:",
        "tests/test_inputs.py",
    ),
    (
        "plumbing/formats.py", "    value = with_marks(value)\n", "",
        "tests/test_lists.py -k mark",
    ),
    (
        "plumbing/formats.py", 'if not value.replace(IMAGE, "").strip():', "if value == IMAGE:",
        "tests/test_lists.py -k bad_dialogue",
    ),
    (
        "plumbing/formats.py", "tuple(dict.fromkeys(targets)),", "tuple(targets),",
        "tests/test_lists.py -k count_once",
    ),
    (
        "plumbing/formats.py", "in dict.fromkeys(texts_of[paths[i]])", "in texts_of[paths[i]]",
        "tests/test_lists.py -k count_once",
    ),
    (
        "plumbing/formats.py", 'if IMAGE in with_marks(raw["text"]):', 'if IMAGE in raw["text"]:',
        "tests/test_lists.py -k bad_caption",
    ),
    (
        "plumbing/lines.py", 'if b"\\r" in line.strip():', 'if b"\\r" in line:',
        "tests/test_lists.py -k cr_alone",
    ),
    (
        "plumbing/inputs.py", 'text = with_marks(text or "")', 'text = text or ""',
        "tests/test_lists.py -k mark",
    ),
    (
        "plumbing/inputs.py", "text = IMAGE * len(pictures) + text",
        "text = text + IMAGE * len(pictures)",
        "tests/test_inputs.py",
    ),
    (
        "plumbing/inputs.py", "if not text and not pictures:", "if not text and pictures == ():",
        "tests/test_inputs.py",
    ),
    (
        "plumbing/inputs.py", "elif not isinstance(pictures, list | tuple):",
        "elif not isinstance(pictures, list):",
        "tests/test_inputs.py",
    ),
    (
        "plumbing/inputs.py", "isinstance(x, str) or is_picture(x) for x in item.images):",
        "is_picture(x) for x in item.images):",
        "tests/test_inputs.py",
    ),
    (
        "plumbing/inputs.py", "inputs.ndim in (2, 3) and inputs.dtype == np.uint8",
        "inputs.ndim == 3",
        "tests/test_inputs.py",
    ),
    (
        "plumbing/inputs.py", "isinstance(x, str) or is_picture(x) for", "True for",
        "tests/test_inputs.py",
    ),
    (
        "plumbing/inputs.py", "str | bytes | dict | Image.Image | os.PathLike | torch.Tensor",
        "str | dict | Image.Image | os.PathLike",
        "tests/test_inputs.py",
    ),
    (
        "plumbing/inputs.py", "(not is_whole or value < least)", "(not is_whole or value <= least)",
        "tests/test_inputs.py",
    ),
    (
        "plumbing/inputs.py", " and not isinstance(value, bool)", "",
        "tests/test_inputs.py",
    ),
    (
        "plumbing/inputs.py", "part.training = mode", "part.training = True",
        "tests/test_inputs.py",
    ),
    (
        "plumbing/inputs.py", "            module.eval()\n", "",
        "tests/test_inputs.py",
    ),
    (
        "plumbing/inputs.py", "with evaluating(module), torch.no_grad():",
        "with evaluating(module):",
        "tests/test_inputs.py",
    ),
    (
        "plumbing/lines.py", "self.length, self.get, self.source = length, get, source",
        "self.length, self.get, self.source = length, get, Source()",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "        return self.length\n", "        return max(self.length, 1)\n",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "range(self.length)[i]", "range(self.length + 1)[i]",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "return Lazy(self.length, lambda i: f(self.get(i)), self.source)",
        "return Lazy(self.length, lambda i: f(self.get(i)))",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "self.source._replace(**known)", "Source(**known)",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "min(n or self.length, self.length)", "n or self.length",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "            yield e\n", "            raise e\n",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "self.digest = zlib.crc32(line, self.digest)",
        "self.digest ^= zlib.crc32(line)",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", 'raise InputError(f"{path}, {unit} {number}: {TOO_LONG}")', "continue",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "                self.starts.append(start)\n",
        "                self.starts.append(start + bool(copy))\n",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "        self.file.flush()\n", "",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "return len(self.starts)", "return self.numbers[-1]",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "{self.unit} {self.numbers[i]}", "{self.unit} {i + 1}",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", 'file.write(self.line(i).rstrip(b"\\r\\n") + b"\\n")',
        "file.write(self.line(i))",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "if zlib.crc32(line) != self.checksums[i]:",
        "if len(line) < self.sizes[i]:",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", 'ending == ".json" and is_array:', 'ending == ".json":',
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "file.readline(MOST + 1)", "file.readline(MOST)",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "    if not lines:\n", "    if lines is None:\n",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "            file.seek(0)\n", "",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "if len(value) < len(members):", "if len(value) < len(members) - 1:",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "line.removeprefix(BOM_UTF8).decode()", "line.decode()",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", ' or b"\\\\uD" in line', "",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "strict=True, skipinitialspace", "skipinitialspace",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", 'encoding="utf-8-sig", newline=""', 'encoding="utf-8", newline=""',
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "yield reader.line_num, json.dumps(row)",
        "yield reader.line_num + 1, json.dumps(row)",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", 'self.file, self.text, self.at = file, "", 0',
        "self.file, self.text, self.at = file, file.readline(), 0",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "self.text[self.at :] + block, 0", "self.text[self.at :] + block, 1",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "if self.at < len(self.text) or not self.more():",
        "if self.text or not self.more():",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "if len(self.text) - self.at > MOST:",
        "if len(self.text) - self.at > BLOCK:",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", 'if separator not in (",", "]"):',
        "if not separator:",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "if number and blocks.peek():", "if not number and blocks.peek():",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", 'with open(path, encoding="utf-8-sig") as file:',
        'with open(path, encoding="utf-8") as file:',
        "tests/test_lists.py",
    ),
    (
        "plumbing/loader.py", 'device.type == "cuda"', 'device.type != "mps"',
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "itertools.islice(indices, AHEAD)",
        "itertools.islice(indices, AHEAD * (workers or 1))",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "yield batches.pop()", "yield batches[0]",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "        team.close()\n", "        pass\n",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "x.bfloat16() if x.is_floating_point() else x",
        "x.bfloat16() if x.ndim else x",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "def __init__(self, number):\n        self.number = number",
        "def __init__(self, number):\n        self.number = number + 1",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "self.number, self.workers, self.halve = number, workers, halve",
        "self.number, self.workers, self.halve = number, workers, False",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "if number % self.workers == self.number:",
        "if number % self.workers <= self.number:",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "    if making:\n", "    if False:\n",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "if not keep_errors:", "if keep_errors:",
        "tests/test_loader.py tests/test_lists.py",
    ),
    (
        "plumbing/loader.py", "self.make, self.halve, self.asked = make, halve, []",
        "self.make, self.halve, self.asked = make, False, []",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "self.asked.append(index)", "self.asked = [index]",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "self.make(self.asked.pop(0))", "self.make(self.asked.pop())",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "    def close(self):\n        pass",
        "    def end(self):\n        pass",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "return Unpacker(packed, self.mapped, rows).load()",
        "return Unpacker(packed, self.mapped, {}).load()",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py",
        '                self.close()\n                raise InputError(f"no loader',
        '                raise InputError(f"no loader',
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "except OSError:\n                self.explain_end_of(number)",
        "except EOFError:\n                self.explain_end_of(number)",
        "tests/test_ending.py::test_a_loader_process_that_is_killed_is_one_clear_line",
    ),
    (
        "plumbing/loader.py", "min(failures, key=lambda f: f.row)",
        "min(failures, key=lambda f: -f.row)",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "mmap.mmap(file, size) if size else None", "mmap.mmap(file, size)",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "        os.close(file)\n        return Block",
        "        return Block",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "if code == -signal.SIGKILL:", "if code == signal.SIGKILL:",
        "tests/test_ending.py::test_a_loader_process_that_is_killed_is_one_clear_line",
    ),
    (
        "plumbing/loader.py", "self.processes.pop(number)", "self.processes[number]",
        "tests/test_ending.py::test_a_loader_process_that_is_killed_is_one_clear_line",
    ),
    (
        "plumbing/loader.py", "            os.waitpid(process, 0)\n", "",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "        for pipe in self.pipes:\n            pipe.close()",
        "        self.pipes.clear",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "be_a_child(deaf=True)", "be_a_child(deaf=False)",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "frame = frame if share.number == 0 else None",
        "frame = None if share.number == 0 else frame",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "except MemoryError:", "except BufferError:",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "            os.close(share.sent.pop(0))",
        "            share.sent.pop(0)",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "if len(share.sent) > AHEAD:", "if len(share.sent) > AHEAD - 1:",
        "tests/test_loader.py::test_a_worker_gives_the_pages_back_and_not_its_rank",
    ),
    (
        "plumbing/loader.py", "pipe.send(Failure(share.count, e))",
        "pipe.send(Failure(share.number, e))",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "block.write(bytes(-x.nbytes % ALIGNED))",
        "block.write(bytes(x.nbytes % ALIGNED))",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py",
        'raise InputError(f"no memory for a batch ({e}): try {way}") from None',
        "raise",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "Packer(file, tensors).dump(x)", "Packer(file, [*tensors]).dump(x)",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "sum(padded(x) for x in tensors)", "sum(x.nbytes for x in tensors)",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "self.end += padded(x)", "self.end += x.nbytes",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "self.mapped, self.rows = mapped, rows",
        "self.mapped, self.rows = mapped, list(rows)",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "return torch.empty(shape, dtype=dtype)", "return torch.empty(shape)",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "        return x.view(shape)\n", "        return x\n",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "return x.nbytes + -x.nbytes % ALIGNED", "return x.nbytes + ALIGNED",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "self.guess, self.largest = guess, 0",
        "self.guess, self.largest = guess, 1",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "self.pictures[first : first + WINDOW_ITEMS]",
        "self.pictures[first:]",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "if room < 0 and end > first:", "if room < 0 and end > first + 1:",
        "tests/test_loader.py",
    ),
    (
        "plumbing/loader.py", "size // self.pictures[i]", "size",
        "tests/test_loader.py",
    ),
    (
        "plumbing/mmeb.py", 'Subset("EDIS", "Retrieval", OOD)', 'Subset("EDIS", "Retrieval", IND)',
        "tests/test_data.py",
    ),
    (
        "plumbing/mmeb.py", 'Subset("VisDial", "Retrieval", IND, 130_000)',
        'Subset("VisDial", "Retrieval", IND, 123_000)',
        "tests/test_data.py",
    ),
    (
        "plumbing/mmeb.py", 'f"{TRAIN_NAME.get(s.name, s.name)}:{s.rows}"', 'f"{s.name}:{s.rows}"',
        "tests/test_data.py",
    ),
    (
        "plumbing/mmeb.py", "return subset.meta_task, subset.ood",
        'return subset.meta_task, subset.rows == 0 and subset.meta_task != "VQA"',
        "tests/test_data.py",
    ),
    (
        "plumbing/mmeb.py", 'return "Other", False', 'return "Other", True',
        "tests/test_data.py",
    ),
    (
        "plumbing/mmeb.py", "    return table.load()\n", "    return table.load().slice(1)\n",
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", "@lru_cache(1)\ndef last_loaded", "@lru_cache(None)\ndef last_loaded",
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", 'if row.get("neg_text") or row.get("neg_image_path"):',
        'if row.get("neg_text"):',
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", "pair, plain[i - first])", "pair, plain[i % len(plain)])",
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", 'raise ValueError(f"{columns}: {e}") from None', "raise",
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", "if not texts or len(texts) != len(paths or ()):",
        "if texts is None or len(texts) != len(paths or ()):",
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", "[row[name] for name in EVAL], ",
        '[row["qry_text"], ""], ',
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", "    @lru_cache(None)\n", "",
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", "not_empty(train_rows(files, name, images)).first(cap)",
        "not_empty(train_rows(files, name, images))",
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", 'f"{split}-*.parquet"', '"original-*.parquet"',
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", "first_pass(name, len(rows), tries)",
        "first_pass(name, len(rows) - 1, tries)",
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", "bad[name].update(start + i for i in rows)", "bad[name].update(rows)",
        "tests/test_skip_bad.py",
    ),
    (
        "plumbing/mmeb.py", "table.starts[k + 1] - table.starts[k])", "table.starts[k + 1])",
        "tests/test_skip_bad.py",
    ),
    (
        "plumbing/mmeb.py", "    if not len(rows):\n", "    if not rows.source:\n",
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", ".first(cap).first(limit)", ".first(limit)",
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", "first(cap).first(limit)", "first(cap)",
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", "chain(enumerate(queries), distinct_candidates(table, counts[0]))",
        "distinct_candidates(table, counts[0])",
        "tests/test_lists.py -k told_before_any",
    ),
    (
        "plumbing/mmeb.py", "        look_at_rows(rows, contents_of(images, name))\n",
        "        rows.get(0)\n",
        "tests/test_lists.py -k told_before_any",
    ),
    (
        "plumbing/mmeb.py", "if not texts or texts != paths:", "if not texts:",
        "tests/test_lists.py -k told_before_any",
    ),
    (
        "plumbing/mmeb.py", 'aggregate([("row", "min")]).sort_by("row_min")',
        'aggregate([("row", "max")]).rename_columns([*EVAL_LISTS, "row_min"])',
        "tests/test_lists.py -k repeat",
    ),
    (
        "plumbing/mmeb.py", '-of-(\\d+)")', '-of-(\\d+)[.]parquet$")',
        "tests/test_data.py -k names_go_on",
    ),
    (
        "tools/sentence_transformers_folder.py",
        "    tokenizer.model_max_length = VERY_LARGE_INTEGER\n", "",
        "tests/test_other_libraries.py -k transformers_alone",
    ),
    (
        "tools/sentence_transformers_folder.py", "if tokenizer.pad_token is None:", "if False:",
        "tests/test_other_libraries.py -k transformers_alone",
    ),
    (
        "tools/check.py", "            image.verify()\n", "            image.load()\n",
        "tests/test_check.py -k damaged_in_the_middle",
    ),
    (
        "plumbing/parquet.py", "        part.validate(full=True)\n", "        part.validate()\n",
        "tests/test_lists.py -k not_utf8",
    ),
    (
        "plumbing/parquet.py", 'f"{file}, row {i + 1}", "a text', 'f"{file}, row {i}", "a text',
        "tests/test_lists.py -k not_utf8",
    ),
    (
        "plumbing/mmeb.py", "rows.source.raw.load().slice(0, len(rows))", "rows.source.raw.load()",
        "tests/test_lists.py",
    ),
    (
        "plumbing/lines.py", "(and {self.count - 1:,} more", "(and {self.count:,} more",
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", "files_of.setdefault(path.parent.name, []).append(path)",
        "files_of[path.parent.name] = [path]",
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", ' for name in names] + ["images.zip"]', " for name in names]",
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", "        refuse_part_of_mix(source, files_of)\n",
        '        words = ",".join(w for w in '
        'words.split(",") if w.partition(":")[0] in files_of)\n',
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", 'if any(name.startswith("test-") for name in files):',
        'if any(name == "test-" for name in files):',
        "tests/test_lists.py",
    ),
    (
        "plumbing/mmeb.py", "for w in words if w not in present)", "for w in present)",
        "tests/test_lists.py",
    ),
    (
        "plumbing/parquet.py", 'needs("pyarrow",', 'needs("parquet",',
        "tests/test_lists.py",
    ),
    (
        "plumbing/parquet.py", 'refuse_special(file, kind="list")', "refuse_special(file)",
        "tests/test_lists.py",
    ),
    (
        "plumbing/parquet.py", "except (OSError, TypeError, ValueError, NotImplementedError) as e:",
        "except (OSError, NotImplementedError) as e:",
        "tests/test_lists.py",
    ),
    (
        "plumbing/parquet.py", "if types.is_dictionary(inner):",
        "if types.is_dictionary(arrow_type):",
        "tests/test_lists.py",
    ),
    (
        "plumbing/parquet.py", '"large_string", ', "",
        "tests/test_lists.py",
    ),
    (
        "plumbing/parquet.py", "count > 1 or (count == 0 and", "(count == 0 and",
        "tests/test_lists.py",
    ),
    (
        "plumbing/parquet.py", "if name not in known and name.startswith(stems):",
        "if name not in known and name in stems:",
        "tests/test_lists.py",
    ),
    (
        "plumbing/parquet.py", "if kinds[name] != want:", 'if kinds[name] not in (want, "list"):',
        "tests/test_lists.py",
    ),
    (
        "plumbing/parquet.py", "if self.kinds not in (None, kinds):",
        "if self.kinds and kinds.keys() < self.kinds.keys():",
        "tests/test_lists.py",
    ),
    (
        "plumbing/parquet.py", "self.digests.append(digest_of_content(file))",
        "self.digests.append(1)",
        "tests/test_lists.py",
    ),
    (
        "plumbing/parquet.py", "self.starts[-1] + rows", "sum(self.starts) + rows",
        "tests/test_lists.py",
    ),
    (
        "plumbing/parquet.py", "        return self.starts[-1]\n",
        "        return self.starts[1]\n",
        "tests/test_lists.py",
    ),
    (
        "plumbing/parquet.py", "row {i + 1 - self", "row {i - self",
        "tests/test_lists.py",
    ),
    (
        "plumbing/parquet.py", "bisect_right(self.starts, i)", "bisect_right(self.starts, i + 1)",
        "tests/test_lists.py",
    ),
    (
        "plumbing/parquet.py", "read_table(file, columns=schema.names, memory_map=True)",
        "read_table(self.files[0], columns=schema.names, memory_map=True)",
        "tests/test_lists.py",
    ),
    (
        "plumbing/parquet.py", "whole.take(indices), file", "whole, file",
        "tests/test_lists.py",
    ),
    (
        "plumbing/parquet.py", 'pa.array(chosen, "int64")', "pa.array(chosen)",
        "tests/test_lists.py",
    ),
    (
        "plumbing/ranks.py", "return dist.get_rank() if dist.is_initialized() else 0", "return 0",
        "tests/test_threads.py",
    ),
    (
        "plumbing/ranks.py", "return dist.get_world_size() if dist.is_initialized() else 1",
        "return 1",
        "tests/test_threads.py",
    ),
    (
        "plumbing/ranks.py", "    if rank() > 0:\n        return\n    try:\n        tqdm",
        "    try:\n        tqdm",
        "tests/test_threads.py",
    ),
    (
        "plumbing/ranks.py", "everyone = [x] * world()\n    if world() > 1:",
        "everyone = [x] * world()\n    if world() > 2:",
        "tests/test_threads.py",
    ),
    (
        "plumbing/ranks.py", "return sum(gather_objects(x))", "return x * world()",
        "tests/test_threads.py",
    ),
    (
        "plumbing/ranks.py", "        dist.all_reduce(x)\n",
        "        dist.all_reduce(x, dist.ReduceOp.MAX)\n",
        "tests/test_threads.py",
    ),
    (
        "plumbing/ranks.py", "return GatherRows.apply(x, counts)",
        "return GatherRows.apply(x.detach(), counts)",
        "tests/test_threads.py",
    ),
    (
        "plumbing/ranks.py", "torch.cat([part[:n] for part, n in",
        "torch.cat([part[: max(counts)] for part, n in",
        "tests/test_threads.py",
    ),
    (
        "plumbing/ranks.py", "return scatter_sum(grad, ctx.counts), None",
        "return grad.split(ctx.counts)[rank()], None",
        "tests/test_threads.py",
    ),
    (
        "plumbing/ranks.py", "return mine[: counts[rank()]]", "return mine[: counts[0]]",
        "tests/test_threads.py",
    ),
    (
        "plumbing/ranks.py", "buckets.append([])\n            size = 0",
        "buckets = [[]]\n            size = 0",
        "tests/test_ranks.py",
    ),
    (
        "plumbing/ranks.py", "            p.grad = torch.zeros_like(p)\n", "            continue\n",
        "tests/test_ranks.py",
    ),
    (
        "plumbing/ranks.py",
        "        check_environment(torch.cuda.device_count() if cuda else None)\n",
        "        pass\n",
        "tests/test_ranks.py",
    ),
    (
        "plumbing/ranks.py", "except (RuntimeError, ValueError) as e:", "except ValueError as e:",
        "tests/test_ranks.py",
    ),
    (
        "plumbing/ranks.py",
        "if missing := [name for name in TORCHRUN if not os.environ.get(name)]:",
        "if missing := [name for name in TORCHRUN[:2] if not os.environ.get(name)]:",
        "tests/test_ranks.py",
    ),
    (
        "plumbing/ranks.py", "main(config.parse(argv))", "main(config.parse([]))",
        "tests/test_ranks.py",
    ),
    (
        "plumbing/ranks.py", 'int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"])',
        'int(os.environ["RANK"]) > int(os.environ["WORLD_SIZE"])',
        "tests/test_ranks.py",
    ),
    (
        "plumbing/ranks.py", 'int(os.environ["LOCAL_RANK"]) >= devices',
        'int(os.environ["LOCAL_RANK"]) > devices',
        "tests/test_ranks.py",
    ),
    (
        "plumbing/ranks.py", "if not (value.isascii() and value.isdecimal()):", "if not value:",
        "tests/test_ranks.py",
    ),
    (
        "plumbing/ranks.py", "            leave(reason)\n", "            print(reason)\n",
        "tests/test_ranks.py",
    ),
    (
        "plumbing/ranks.py", "isinstance(error, torch.OutOfMemoryError)",
        "isinstance(error, MemoryError)",
        "tests/test_ranks.py",
    ),
    (
        "plumbing/ranks.py", "is_of_ranks = isinstance(error, RuntimeError) and world() > 1",
        "is_of_ranks = isinstance(error, RuntimeError) and world() > 2",
        "tests/test_ranks.py",
    ),
    (
        "plumbing/ranks.py", "main(config.parse(argv))", "main(config.parse([]))",
        "tests/test_ranks.py",
    ),
    (
        "plumbing/ranks.py", "leave(status=main(sys.argv[1:]) or 0)",
        "leave(status=main(sys.argv[1:]) and 0)",
        "tests/test_ranks.py",
    ),
    (
        "plumbing/rendering.py", " or len(template) > LONGEST:", ":",
        "tests/test_rendering.py",
    ),
    (
        "plumbing/rendering.py", '"options": options}', '"options": {}}',
        "tests/test_rendering.py",
    ),
    (
        "plumbing/rendering.py", "    except EOFError:\n", "    except TimeoutError:\n",
        "tests/test_rendering.py",
    ),
    (
        "plumbing/rendering.py",
        "    resource.setrlimit(resource.RLIMIT_CPU, (PROCESSOR_SECONDS, PROCESSOR_SECONDS))\n",
        "",
        "tests/test_rendering.py",
    ),
    (
        "plumbing/rendering.py", "    if len(text) > LONGEST:\n", "    if not text:\n",
        "tests/test_rendering.py",
    ),
    (
        "plumbing/rendering.py", "except Exception as e:  # whatever",
        "except ValueError as e:  # whatever",
        "tests/test_rendering.py",
    ),
    (
        "plumbing/retrieval.py", "        formats.refuse_subsets(source, subsets)\n",
        "",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/retrieval.py", "formats.checked_digest(pair_sets.values())",
        "0",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/retrieval.py", "named.get(name) or mmeb.meta_task_of(name)",
        "mmeb.meta_task_of(name)",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/retrieval.py", "mmeb.eval_sets(source, image_root, subsets, limit).items()",
        "mmeb.eval_sets(source, image_root, subsets, 0).items()",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/retrieval.py", 'named[name] = (x["meta_task"], x.get("ood", False))',
        'named[name] = (x["meta_task"], False)',
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/retrieval.py", 'set(x) - {"meta_task", "ood"} or', "",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/retrieval.py", "[len(rights_of[content]) for content, _ in lines[",
        "[len(targets) for _, targets in lines[",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/retrieval.py", "*(wrong for wrong in negatives if wrong not in rights)", "",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/retrieval.py", "not_beaten = ~(best > wrong + TIE)",
        "not_beaten = ~(best > wrong - TIE)",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/retrieval.py", "best = (c[right] @ q[i]).max()", "best = (c[right] @ q[i]).min()",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/retrieval.py", "dict.fromkeys(others) if row not in right]",
        "dict.fromkeys(others)]",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/retrieval.py", "block = q[first : first + BLOCK] @ targets.T",
        "block = q[first : first + BLOCK] @ targets.T[:, :BLOCK]",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/retrieval.py", "if np.isfinite(best) else len(c)", "if best > -1 else 0",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/retrieval.py", "set(rows) if len(rows) > n else pool",
        "rows if len(rows) > n else pool",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/retrieval.py", "chances.append(n / len(all_rows))",
        "chances.append(1 / len(all_rows))",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/retrieval.py", "float((ranks < k).mean())", "float((ranks <= k).mean())",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/table.py", "   queries {note}", "   queries",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/table.py", '{100 * row[\'chance\']:6.1f}"', '{100 * row[\'p_at_1\']:6.1f}"',
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/table.py", "{100 * share:.1f}", "{share:.1f}",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/table.py", 'words.append(row.get("warning", ""))', 'words.append("")',
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/table.py", "    if cfg.subsets:\n", "    if cfg.subsets and not cfg.limit:\n",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/score_file.py", "return by_rank_0(read)", "return read()",
        "tests/test_evaluate.py -k what_rank_0_reads",
    ),
    (
        "plumbing/score_file.py", 'means[key]["p_at_1"] if means[key] else None',
        'means[key]["p_at_1"] if means[key] else 0.0',
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/score_file.py", 'partial=partial_note(cfg) != "",', "partial=bool(cfg.limit),",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/score_file.py", "pooling=embedder.pooling,", "pooling=embedder.style,",
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/score_file.py", 'scores["meta_tasks"][name] = row["p_at_1"]',
        'scores["meta_tasks"][name] = row["chance"]',
        "tests/test_evaluate.py",
    ),
    (
        "plumbing/template.py", "processor.chat_template or processor.tokenizer.chat_template",
        "processor.tokenizer.chat_template or processor.chat_template",
        "tests/test_rendering.py tests/test_template.py",
    ),
    (
        "plumbing/template.py", 'template = template.get("default")',
        "template = next(iter(template.values()))",
        "tests/test_rendering.py tests/test_template.py",
    ),
    (
        "plumbing/template.py", 'is_python = "\'type\':" in four or "\'role\':" in four',
        'is_python = "\'role\':" in four',
        "tests/test_rendering.py tests/test_template.py",
    ),
    (
        "plumbing/template.py", "        if len(pieces) == 5:\n", "        if len(pieces) >= 5:\n",
        "tests/test_rendering.py",
    ),
    (
        "plumbing/template.py", 'itertools.cycle(("user", "assistant"))',
        'itertools.cycle(("assistant", "user"))',
        "tests/test_template.py",
    ),
    (
        "plumbing/template.py", "variables, add_generation_prompt=True)",
        "variables, add_generation_prompt=False)",
        "tests/test_rendering.py",
    ),
    (
        "plumbing/template.py", "        raise text\n    return text",
        '        return ""\n    return text',
        "tests/test_rendering.py",
    ),
    (
        "plumbing/template.py", "return bool(start) and prompt.startswith(start)",
        "return bool(start)",
        "tests/test_rendering.py",
    ),
    (
        "plumbing/template.py",
        "for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}",
        "for i, t in self.tokenizer.added_tokens_decoder.items()}",
        "tests/test_rendering.py tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", "key=lambda token: -len(token.content)",
        "key=lambda token: len(token.content)",
        "tests/test_rendering.py tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", 'left = r"\\s*" if token.lstrip else ""',
        'left = r"\\s*" if token.rstrip else ""',
        "tests/test_rendering.py tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", "cut = match.start() if match else len(text)",
        "cut = match.end() if match else len(text)",
        "tests/test_rendering.py tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", "cut = match.end() if match else 0",
        "cut = match.end() if match else len(text)",
        "tests/test_rendering.py tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", "ends = [0, *(match.end() for", "ends = [0, *(match.start() for",
        "tests/test_rendering.py tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", "        return text[:kept]\n", "        return text[:end]\n",
        "tests/test_rendering.py tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", "return self.tokenizer(text, add_special_tokens=False).input_ids",
        "return self.tokenizer(text).input_ids",
        "tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", 'return ids[: ids.index(self.ids_of("a")[0])]', "return ids[:0]",
        "tests/test_one_piece.py tests/test_rendering.py",
    ),
    (
        "plumbing/template.py",
        "start_ids=[] if head_ids[: len(start_ids)] == start_ids else start_ids",
        "start_ids=start_ids",
        "tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", "turn_ids=special.ids_of(end + turn)",
        "turn_ids=special.ids_of(turn)",
        "tests/test_one_piece.py tests/test_answers.py",
    ),
    (
        "plumbing/template.py",
        "before_text[: len(before_text) - unshared]",
        "before_text",
        "tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", "written.before_picture[shared:] or processor.image_token",
        "processor.image_token",
        "tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", "if not end and eos_token and eos_token in written.between:",
        "if not end and not eos_token:",
        "tests/test_rendering.py tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", "special.cut_before_first(end or eos_token)",
        "special.cut_before_first(end)",
        "tests/test_rendering.py tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", "if not opening or not head.endswith(opening):",
        "if not opening or head.endswith(opening):",
        "tests/test_rendering.py tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", "return special.start_of(before) + opening if is_prompt else head",
        "return opening if is_prompt else head",
        "tests/test_rendering.py tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", "tokenize(tokenizer, template, text, not spelled)",
        "tokenize(tokenizer, template, text, True)",
        "tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", "if are_texts and not (last.by_user and part.by_user):",
        "if are_texts:",
        "tests/test_template.py",
    ),
    (
        "plumbing/template.py", '"" if begins_row else template.behind',
        '"" if not begins_row else template.behind',
        "tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", "    except UnicodeEncodeError as e:\n",
        "    except UnicodeDecodeError as e:\n",
        "tests/test_template.py",
    ),
    (
        "plumbing/template.py", '"", text, split_special_tokens=True)', '"", text)',
        "tests/test_template.py",
    ),
    (
        "plumbing/template.py", "[end - shift for _, end in places]", "[end for _, end in places]",
        "tests/test_template.py",
    ),
    (
        "plumbing/template.py", " and template.special[token_id] in text[start:end]:", ":",
        "tests/test_template.py tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py",
        "cut = bisect_left(tokens.starts, border)",
        "cut = bisect_right(tokens.ends, border)",
        "tests/test_template.py",
    ),
    (
        "plumbing/template.py", "cuts.append(max(cut, cuts[-1]))", "cuts.append(cut)",
        "tests/test_template.py",
    ),
    (
        "plumbing/template.py", "first, last = special[0], special[-1] + 1",
        "first, last = special[0], special[-1] + 2",
        "tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", "before, begins_row=True).ids != ids[:first]",
        "before, begins_row=True).ids == ids[:first]",
        "tests/test_one_piece.py",
    ),
    (
        "plumbing/template.py", "        if last > 1:\n", "        if last > 0:\n",
        "tests/test_template.py",
    ),
    (
        "plumbing/template.py", "keep = (len(ids) - over + 1) // 2", "keep = len(ids) - over",
        "tests/test_template.py",
    ),
    (
        "plumbing/template.py", "return parts, before - tokens_in(parts)", "return parts, before",
        "tests/test_template.py",
    ),
    (
        "plumbing/template.py", "return sum(len(part.content) for part in parts)",
        "return sum(len(part.content) for part in parts if part.by_user)",
        "tests/test_template.py",
    ),
    (
        "plumbing/weights.py", '            if name != "attn":\n',
        '            if name == "max_length":\n',
        "tests/test_settings.py",
    ),
    (
        "plumbing/weights.py", "whole_number(name, value, 0)", "whole_number(name, value, -1)",
        "tests/test_settings.py",
    ),
    (
        "plumbing/weights.py", "(AssertionError, RuntimeError, TypeError)",
        "(AssertionError, TypeError)",
        "tests/test_settings.py",
    ),
    (
        "plumbing/weights.py", 'K = 0 if style == "vlm2vec" else DEFAULT_K', "K = DEFAULT_K",
        "tests/test_settings.py",
    ),
    (
        "plumbing/weights.py", 'pooling = "mean" if K else "last"', 'pooling = "mean"',
        "tests/test_settings.py",
    ),
    (
        "plumbing/weights.py", 'least = 1 if pooling == "mean" else 0', "least = 0",
        "tests/test_settings.py",
    ),
    (
        "plumbing/weights.py", 'agreed("prompt", asked.style, stored, name) or "chat"',
        'agreed("prompt", asked.style, stored, name) or "coma"',
        "tests/test_settings.py",
    ),
    (
        "plumbing/weights.py", "if stored.get(key, asked) != asked:",
        "if stored.get(key) and not asked:",
        "tests/test_settings.py",
    ),
    (
        "plumbing/weights.py", 'Path(name, "config.json").exists()', "Path(name).exists()",
        "tests/test_settings.py",
    ),
    (
        "plumbing/weights.py", 'if name == "toy" else ""', 'if name != "toy" else ""',
        "tests/test_settings.py",
    ),
    (
        "plumbing/weights.py", "    mllm.origin = origin\n",
        "    mllm.origin = Origin.of(name, path)\n",
        "tests/test_folders.py",
    ),
    (
        "plumbing/weights.py", "for folder in {path, base}:", "for folder in {path}:",
        "tests/test_folders.py::test_the_base_of_an_adapter_is_looked_at_as_closely",
    ),
    (
        "plumbing/weights.py", "        refuse_larger_than_its_files(base, config)\n", "",
        "tests/test_folders.py",
    ),
    (
        "plumbing/weights.py", "load_processor(processor_folder, config, small, large)",
        "load_processor(base, config, small, large)",
        "tests/test_folders.py",
    ),
    (
        "plumbing/weights.py", "if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:",
        'if config.model_type == "bert":',
        "tests/test_folders.py",
    ),
    (
        "plumbing/weights.py", "claimed > 4 * stored + 50_000_000",
        "claimed > 4 * stored + 5_000_000_000",
        "tests/test_folders.py",
    ),
    (
        "plumbing/weights.py", "torch.manual_seed(0)", "torch.manual_seed(torch.initial_seed())",
        "tests/test_settings.py",
    ),
    (
        "plumbing/weights.py", 'if missing := sorted(loaded["missing_keys"]):',
        'if missing := sorted(loaded["mismatched_keys"]):',
        "tests/test_safety.py",
    ),
    (
        "plumbing/weights.py",
        "if unused := sorted(key for key in "
        'loaded["unexpected_keys"] if re.search(r"\\.\\d+\\.", key)):',
        "if unused := sorted(key for key in "
        'loaded["unexpected_keys"] if re.search(r"^\\d+\\.", key)):',
        "tests/test_folders.py",
    ),
    (
        "plumbing/weights.py", 'dtype="auto",', "dtype=torch.float32,",
        "tests/test_folders.py",
    ),
    (
        "plumbing/weights.py", "if stored and present != K:",
        "if False:",
        "tests/test_folders.py",
    ),
    (
        "plumbing/weights.py", "        known.update(*trained.values())",
        "        known.difference(*trained.values())",
        "tests/test_folders.py",
    ),
    (
        "plumbing/weights.py", "    collate.max_length = 0  # whatever",
        "    collate.max_pixels = 0  # whatever",
        "tests/test_settings.py",
    ),
    (
        "plumbing/weights.py", "if not (lengths > 0.5).all():",
        "if not (lengths > 0.5).any():",
        "tests/test_folders.py",
    ),
    (
        "plumbing/weights.py", "for p in embedder.parameters() if p.requires_grad)",
        "for p in embedder.parameters())",
        "tests/test_settings.py",
    ),
    (
        "plumbing/weights.py", "        origin_of(embedder.mllm).refuse_in_its_place(path)\n",
        "        pass\n",
        "tests/test_folders.py::test_an_adapter_cannot_replace_its_base",
    ),
    (
        "plumbing/weights.py", "or not str(path).strip():\n", "or not str(path):\n",
        "tests/test_folders.py",
    ),
    (
        "plumbing/weights.py", "embedder.mllm.origin = Origin.of(os.path.abspath(path), path)",
        "embedder.mllm.origin = Origin.of(path, path)",
        "tests/test_folders.py::test_what_was_saved_is_the_base_of_what_follows_anywhere",
    ),
    (
        "plumbing/weights.py", "embedder.mllm.save_pretrained(folder, state_dict=weights)",
        "embedder.mllm.save_pretrained(folder)",
        "tests/test_model_parts.py -k sharded",
    ),
    (
        "plumbing/weights.py", "    embedder.processor.image_processor.save_pretrained(folder)\n",
        "",
        "tests/test_families.py",
    ),
    (
        "plumbing/weights.py", "    if is_embedder:\n", "    if True:\n",
        "tests/test_tools.py",
    ),
    (
        "plumbing/weights.py", "os.path.relpath(origin.folder, path)",
        "os.path.relpath(origin.folder)",
        "tests/test_folders.py",
    ),
    (
        "plumbing/writing.py", '        open(part, "ab").close()\n        os.unlink(part)',
        '        open(part, "ab").close()',
        "tests/test_writing.py",
    ),
    (
        "plumbing/writing.py", "os.replace(part, os.path.realpath(path))", "os.replace(part, path)",
        "tests/test_writing.py",
    ),
    (
        "plumbing/writing.py",
        "            with suppress(OSError):  # "
        "renamed, or never there\n                os.unlink(part)",
        "            pass",
        "tests/test_writing.py",
    ),
    (
        "plumbing/writing.py", ".part{real.suffix}", ".part",
        "tests/test_writing.py",
    ),
    (
        "plumbing/writing.py", "elif real.exists() and not real.is_file():", "elif False:",
        "tests/test_writing.py",
    ),
    (
        "plumbing/writing.py", "    real.parent.mkdir(parents=True, exist_ok=True)\n", "",
        "tests/test_writing.py",
    ),
    (
        "plumbing/writing.py", "reason = e.strerror or str(e)", "reason = e.filename or str(e)",
        "tests/test_writing.py",
    ),
    (
        "plumbing/writing.py", 'raise InputError(f"{name} {brief(path)}: {reason}; give',
        'raise InputError(f"{brief(path)}: {reason}; give',
        "tests/test_writing.py",
    ),
    (
        "plumbing/writing.py", "            file.truncate(size)\n",
        "            pass\n",
        "tests/test_writing.py tests/test_log.py",
    ),
    (
        "plumbing/writing.py", 'open(path, "ab", buffering=0)', 'open(path, "wb", buffering=0)',
        "tests/test_writing.py",
    ),
    (
        "plumbing/writing.py", "if file.write(line) < len(line):", "if file.write(line) < 1:",
        "tests/test_writing.py",
    ),
    (
        "plumbing/zips.py", "@lru_cache(64)\n", "",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", "    return ZipIndex(path)\n",
        "    return ZipIndex(os.path.basename(path))\n",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", "    if len(content) != count:\n", "    if not content:\n",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", 'tail.rfind(b"PK\\5\\6")', 'tail.find(b"PK\\5\\6")',
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", "return read_at(file, end - size, size), end - size - start",
        "return read_at(file, end - size, size), 0",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", "if size > MOST_TABLE or start > end - size:", "if start > end - size:",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", 'if mark != b"PK\\6\\6":', 'if mark == b"PK\\5\\6":',
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", "at += extra_length + comment", "at += extra_length",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", "packed = next(numbers) if packed == WIDE else packed",
        "packed = next(numbers)",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", "        if kind == 1:\n", "        if kind:\n",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", "        at += 4 + length\n", "        at += 2 + length\n",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", '"utf-8" if flags & IS_UTF8 else "cp437"', '"utf-8"',
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", "except (ValueError, OSError, OverflowError, struct.error) as e:",
        "except (ValueError, OSError, OverflowError) as e:",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", "return i if i >= 0 and self.names[i] == hash(name) else -1",
        "return i",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", "return self.find(name) >= 0", "return self.find(name) > 0",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", "OverflowError, zlib.error, struct.error) as e:",
        "OverflowError, struct.error) as e:",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", "if max(packed, size) > MOST_BYTES:", "if packed > MOST_BYTES:",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", "        if flags & IS_ENCRYPTED:\n",
        "        if flags == IS_ENCRYPTED:\n",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", "decompress(content, size + 1)", "decompress(content)",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", "if decode_name(its_name, flags) != name:", "if not its_name:",
        "tests/test_pictures.py",
    ),
    (
        "plumbing/zips.py", "if len(content) != size or zlib.crc32(content) != crc:",
        "if len(content) != size:",
        "tests/test_pictures.py",
    ),
]  # fmt: skip

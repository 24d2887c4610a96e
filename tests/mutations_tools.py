"""Mistakes in tools/ and in the toy world, of which no list is kept that leaves nothing out; see
mutations.py."""

# ruff: noqa: E501  the mistakes stand as the code has them

CHECK = "tests/test_check.py"
COMPARE = "tests/test_compare_logs.py"
CONDENSE = "tests/test_condense.py"
GENERATE = "tests/test_generate.py"
MINE = "tests/test_mine.py"
SEARCH = "tests/test_search.py"

TOOLS = [
    # ---------------------------------------------------------------------------------- toy/world.py
    ("toy/world.py", 'Shapes("test", seed, new_words=True)', 'Shapes("new", seed, new_words=True)',
     "tests/test_toy_world.py -k one_thing"),
    ("toy/world.py", '(task, True, Shapes("new", seed))', '(task, True, Shapes("new"))',
     "tests/test_toy_world.py -k one_thing"),
    ("toy/world.py", '(task, True, Shapes("test", seed, new_words=True))', '(task, False, Shapes("test", seed, new_words=True))',
     "tests/test_toy_world.py -k one_thing"),
    # ---------------------------------------------------------------------------------- tools/mine.py
    ("tools/mine.py", "len(rows) < cfg.last - cfg.first + 1 for", "len(rows) < cfg.last - cfg.first for", f"{MINE} -k get_fewer"),
    ("tools/mine.py", "{few:,} lines get fewer", "{len(lines) - few:,} lines get fewer", f"{MINE} -k get_fewer"),
    ("tools/mine.py", "(*rights_of[pair.query], *pair.negatives)", "rights_of[pair.query]", f"{MINE} -k calls_wrong"),
    ("tools/mine.py", 'first_model("out/contrastive", "out/pretrain")', 'first_model("out/pretrain", "out/contrastive")', f"{MINE} -k flags_reach"),
    ("tools/mine.py", "read_pairs(cfg.data, cfg.image_root or None)", "read_pairs(cfg.data)", f"{MINE} -k flags_reach"),
    ("tools/mine.py", 'cfg.chunk_tokens, cfg.workers, "embedding"', 'None, cfg.workers, "embedding"', f"{MINE} -k flags_reach"),
    ("tools/mine.py", "self.pair_of.append(i)", "self.pair_of.append(len(self.pair_of))", f"{MINE} -k first_line_that"),
    ("tools/mine.py", "(and {len(bad) - 1:,} more", "(and {len(bad):,} more", f"{MINE} -k first_line_that"),
    ("tools/mine.py", "if cfg.first > cfg.last:", "if cfg.first >= cfg.last:", f"{MINE} -k no_target_has"),
    # -------------------------------------------------------------------------------- tools/search.py
    ("tools/search.py", "        collate.max_length,\n", "", f"{SEARCH} -k another_device"),
    ("tools/search.py", "        embedder.device.type,  # a GPU computes in bfloat16\n", "", f"{SEARCH} -k another_device"),
    ("tools/search.py", "        embedder.mllm.config._attn_implementation,\n", "", f"{SEARCH} -k another_device"),
    ("tools/search.py", "        template,\n        image", "        image", f"{SEARCH} -k another_device"),
    ("tools/search.py", "repr((settings, instruction, versions()))", "repr((settings, instruction))", f"{SEARCH} -k another_device"),
    ("tools/search.py", "        embedder.pooling,\n", "", f"{SEARCH} -k another_model"),
    ("tools/search.py", "|{stat.st_size}|{stat.st_mtime_ns}", "|{stat.st_size}", f"{SEARCH} -k size_and_its_time"),
    ("tools/search.py", "|{stat.st_size}|{stat.st_mtime_ns}", "|{stat.st_mtime_ns}", f"{SEARCH} -k size_and_its_time"),
    ("tools/search.py", "    return [paths[f] for f in known], np", "    return list(paths.values()), np", f"{SEARCH} -k own_vector"),
    ("tools/search.py", "i + WINDOW >= len(new)", "i + WINDOW > len(new)", f"{SEARCH} -k kept_on_the_way"),
    ("tools/search.py", "time.time() - written > 20 * cost", "time.time() - written > 20 + cost", f"{SEARCH} -k kept_on_the_way"),
    ("tools/search.py", "Item(cfg.image_text, (str(folder / paths[f]),))", "Item(IMAGE, (str(folder / paths[f]),))", f"{SEARCH} -k instruction_that"),
    ("tools/search.py", "row, column = divmod(n, columns)", "column, row = divmod(n, rows)", f"{SEARCH} -k read_as_a_text"),
    ("tools/search.py", 'first_model("out/contrastive", "out/pretrain")', 'first_model("out/pretrain", "out/contrastive")', f"{SEARCH} -k alike_on_all"),
    ("tools/search.py", "    same_model(cfg.model)\n", "", f"{SEARCH} -k alike_on_all"),
    ("tools/search.py", "by_rank_0(lambda: read_index(store, embedder.dim))", "read_index(store, embedder.dim)", f"{SEARCH} -k rank_0s"),
    ("tools/search.py", "if ranks.rank() == 0 and known and due:", "if known and due:", f"{SEARCH} -k rank_0s"),
    ("tools/search.py", "    if ranks.rank() > 0:\n        return\n    pictures", "    pictures", f"{SEARCH} -k rank_0s"),
    # --------------------------------------------------------------------------------- tools/check.py
    ("tools/check.py", 'x.text.replace(IMAGE, "").split()', "x.text.split()", f"{CHECK} -k the_report"),
    ("tools/check.py", "sizes.sort(key=lambda size: size[0] * size[1])", "sizes.sort()", f"{CHECK} -k the_report"),
    ("tools/check.py", "{min(self.words)} to {max(self.words)}", "{min(self.words)} to {len(self.words)}", f"{CHECK} -k the_report"),
    ("tools/check.py", "{len(shown) - SHOWN:,} more", "{len(self.errors) - SHOWN:,} more", f"{CHECK} -k twenty"),
    ("tools/check.py", "for error in shown[:SHOWN]:", "for error in shown[: SHOWN + 1]:", f"{CHECK} -k twenty"),
    ("tools/check.py", "return lost + others", "return others + lost", f"{CHECK} -k twenty"),
    ("tools/check.py", "range(0, len(self.rows), WINDOW)", "range(0, len(self.rows) - 1, WINDOW)", f"{CHECK} -k long_list"),
    ("tools/check.py", "(count.bad and outputs == Outputs())", "(count.bad and not outputs.clean)", f"{CHECK} -k status"),
    ("tools/check.py", "return 1 if count.useless or (", "return 1 if (", f"{CHECK} -k status"),
    ("tools/check.py", "        return Count(0, 1, useless=True)", "        return Count(0, 1)", f"{CHECK} -k all_count"),
    ("tools/check.py", "useless=any(c.useless for c in counts)", "useless=all(c.useless for c in counts)", f"{CHECK} -k all_count"),
    ("tools/check.py", "sum(c.bad for c in counts)", "counts[-1].bad", f"{CHECK} -k all_count"),
    ("tools/check.py", "images, files = Images(image_root or root), sorted", "images, files = Images(root), sorted", f"{CHECK} -k elsewhere"),
    ("tools/check.py", "parse_captioned, image_root)", "parse_captioned, None)", f"{CHECK} -k elsewhere"),
    ("tools/check.py", "pictures = image_root or (source", "pictures = (source", f"{CHECK} -k elsewhere"),
    # ------------------------------------------------------------------------------ tools/condense.py
    ("tools/condense.py", "if step < cfg.condense_share * cfg.steps:", "if step <= cfg.condense_share * cfg.steps:", f"{CONDENSE} -k first_steps"),
    ("tools/condense.py", "condense_share: float = flag(0.4,", "condense_share: float = flag(0.04,", f"{CONDENSE} -k without_torch"),
    ("tools/condense.py", "if not ranks.all_sum(len(batch.examples)):", "if not batch.examples:", f"{CONDENSE} -k takes_its_part"),
    # -------------------------------------------------------------------------- tools/compare_logs.py
    ("tools/compare_logs.py", "width = 1.5 * smooth(high - low)", "width = 0.5 * smooth(high - low)", f"{COMPARE} -k one_and_a_half"),
    ("tools/compare_logs.py", "width = 1.5 * smooth(high - low)", "width = 1.5 * (high - low)", f"{COMPARE} -k one_and_a_half"),
    ("tools/compare_logs.py", "return i - in_a_row + 2", "return i - in_a_row + 1", f"{COMPARE} -k would_be_normal"),
    ("tools/compare_logs.py", "in_a_row == IN_A_ROW or not np.isfinite(loss[i])", "in_a_row == IN_A_ROW", f"{COMPARE} -k would_be_normal"),
    ("tools/compare_logs.py", "low, high = band.low[step - 1], band.high[step - 1]", "low, high = band.low[-1], band.high[-1]", f"{COMPARE} -k would_be_normal"),
    ("tools/compare_logs.py", "normal is {max(low, 0):.3f} to {high:.3f}", "normal is {high:.3f} to {max(low, 0):.3f}", f"{COMPARE} -k would_be_normal"),
    ("tools/compare_logs.py", '"workers", "save_every"', '"save_every"', f"{COMPARE} -k change_no_loss"),
    # ------------------------------------------------------------------------------ tools/generate.py
    ("tools/generate.py", 'random.Random(f"{args.seed}/{name}")', "random.Random(name)", f"{GENERATE} -k draws_its"),
    ("tools/generate.py", 'random.Random(f"{args.seed}/{name}")', "random.Random(args.seed)", f"{GENERATE} -k draws_its"),
    ("tools/generate.py", "rng.randint(3, 5)))", "5))", f"{GENERATE} -k draws_its"),
    ("tools/generate.py", "list(dict.fromkeys(numbered))[:5]", "list(dict.fromkeys(numbered))", f"{GENERATE} -k long_list"),
    ("tools/generate.py", "list(dict.fromkeys(numbered))[:5]", "numbered[:5]", f"{GENERATE} -k long_list"),
    ("tools/generate.py", 'decode("utf-8-sig")', 'decode("utf-8")', f"{GENERATE} -k encoding"),
    ("tools/generate.py", "    torch.manual_seed(args.seed)\n", "", f"{GENERATE} -k by_the_seed"),
    ("tools/generate.py", 'padding_side="left"', 'padding_side="right"', f"{GENERATE} -k model_is_asked"),
    ("tools/generate.py", "not starts_itself(processor, prompts[0])", "True", f"{GENERATE} -k model_is_asked"),
    ("tools/generate.py", '{"do_sample": True, "temperature": args.temperature}', '{"do_sample": True, "temperature": 0.7}', f"{GENERATE} -k model_is_asked"),
    ("tools/generate.py", 'sampling = {"do_sample": False}', 'sampling = {"do_sample": True}', f"{GENERATE} -k model_is_asked"),
    ("tools/generate.py", "max_new_tokens=most", "max_new_tokens=256", f"{GENERATE} -k model_is_asked"),
    ("tools/generate.py", "    ends.add(tokenizer.eos_token_id)\n", "", f"{GENERATE} -k model_is_asked"),
    ("tools/generate.py", "Options(max_pixels=args.max_pixels)", "Options()", f"{GENERATE} -k its_adapter"),
    ("tools/generate.py", "        load_adapter(mllm, path)\n", "        pass\n", f"{GENERATE} -k its_adapter"),
    ("tools/generate.py", "return mllm.eval().to(", "return mllm.to(", f"{GENERATE} -k its_adapter"),
    ("tools/generate.py", 'asks | {"temperature": args.temperature}', "asks", f"{GENERATE} -k server_is_asked"),
    ("tools/generate.py", '"max_tokens": args.max_tokens}', '"max_tokens": 256}', f"{GENERATE} -k server_is_asked"),
    ("tools/generate.py", "timeout=args.timeout", "timeout=120", f"{GENERATE} -k server_is_asked"),
    ("tools/generate.py", 'f"Bearer {args.api_key}"', '"Bearer none"', f"{GENERATE} -k server_is_asked"),
    ("tools/generate.py", "if e.code in (401, 403, 404):", "if e.code in (401, 404):", f"{GENERATE} -k key_or_a_name"),
    ("tools/generate.py", "time.sleep(attempt * args.wait)", "time.sleep(args.wait)", f"{GENERATE} -k asked_again"),
    ("tools/generate.py", "names = sorted(errors)", "names = sorted(names)", f"{GENERATE} -k asked_again"),
    ("tools/generate.py", "HOPELESS = 50", "HOPELESS = 5000", f"{GENERATE} -k fifty"),
    ("tools/generate.py", "if len(errors) == HOPELESS and bar.n == before:", "if len(errors) == HOPELESS:", f"{GENERATE} -k fifty"),
    ("tools/generate.py", "if names and len(errors) == len(names):", "if names and errors:", f"{GENERATE} -k status"),
    # --------------------------------------------------------------------------------- tools/merge.py
    ("tools/merge.py", "    embedder.mllm.to(embedder.mllm.config.dtype)  #", "    pass  #", "tests/test_tools.py -k number_type"),
    # ----------------------------------------------------------------------------------- the others
    ("tools/figure_numbers.py", 'Shapes("test", seed), {kind', 'Shapes("train", seed), {kind', "tests/test_figures.py -k never_shows"),
    ("tools/figure_numbers.py", 'Shapes("test", seed), {kind', 'Shapes("test"), {kind', "tests/test_figures.py -k never_shows"),
    ("tools/figure_numbers.py", "limit=n, seed=seed)", "limit=n)", "tests/test_figures.py -k never_shows"),
    ("tools/pictures.py", "{len(left_out) - SHOWN:,} more", "{len(left_out):,} more", "tests/test_pictures.py -k searched"),
    ("tools/lessons.py", "lesson(world, i, cfg.least)", "lesson(world, i)", "tests/test_toy_mllm.py -k lesson"),
    ("tools/check.py", "        if isinstance(self.sizes[picture], InputError):\n            raise self.sizes[picture]",
     "            if isinstance(self.sizes[picture], InputError):\n                raise self.sizes[picture]", f"{CHECK} -k broken_picture"),
    ("tools/explain_numbers.py", "(mean / 2).backward()", "mean.backward()", "tests/test_page.py -k half_batches"),
    ("tools/explain_numbers.py", "out.attentions[number - 1][0]", "out.attentions[number - 2][0]", "tests/test_page.py -k own_number"),
    ("tools/explain_numbers.py", "return rows // merge, columns // merge", "return columns // merge, rows // merge",
     "tests/test_page.py -k rows_and_columns"),
]  # fmt: skip

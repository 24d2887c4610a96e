"""Mistakes that were written from the code alone, without a look at the tests, and that the tests
of their day did not notice; and mistakes of the same kinds elsewhere; see mutations.py."""

# ruff: noqa: E501  the mistakes stand as the code has them

FRESH = [
    # ------------------------------------------------------------ what is remembered is never let go
    ("plumbing/mmeb.py", "@lru_cache(1)\ndef contents_of", "@lru_cache(None)\ndef contents_of",
     "tests/test_lists.py -k in_memory"),
    ("plumbing/sampling.py", "@lru_cache(2)", "@lru_cache(None)", "tests/test_sampling.py -k two_orders"),
    ("plumbing/sampling.py", "@lru_cache(2)\ndef", "@lru_cache(1)\ndef",
     "tests/test_sampling.py -k two_orders"),
    # ------------------------------------------------------------------- memory grows with the data
    ("model.py", "                windows.saw(window, rows)\n", "",
     "tests/test_embedder.py -k how_large"),
    ("contrastive.py", "block = block or max(1, 800_000 // len(t))", "block = block or len(q)",
     "tests/test_infonce.py -k without_a_block"),
    ("contrastive.py", "chunk_tokens, max(lengths), start_over)",
     "chunk_tokens, min(lengths), start_over)", "tests/test_gradcache.py -k does_not_fit_halves"),
    # -------------------------------------------------------------------- seeds that are not apart
    ("contrastive.py", 'random.Random(f"{cfg.seed}/{step}")', "random.Random(cfg.seed + step)",
     "tests/test_sampling.py -k function_of_seed"),
    ("plumbing/sampling.py", 'f"{cfg.seed}/{step}/{dialogue.id}"', 'f"{cfg.seed + step}/{dialogue.id}"',
     "tests/test_sampling.py -k drawn_anew"),
    # ------------------------------------------------------------------ what is told apart, or not
    ("data.py", "repr((self.text, pictures))", "repr((self.text.lower(), pictures))",
     "tests/test_toy_world.py -k equal_keys"),
    ("data.py", "isinstance(x, Image.Image) else repr(x))", "isinstance(x, Image.Image) else repr(x).lower())",
     "tests/test_toy_world.py -k equal_keys"),
    # ---------------------------------------------------------------------------------- on a GPU
    ("model.py", "torch.autocast(self.device.type, torch.bfloat16,",
     "torch.autocast(self.device.type, torch.float16,", "tests/test_model_parts.py -k runs_in_bfloat16"),
    ("plumbing/ranks.py", "        torch.cuda.set_device(device)\n", "", "tests/test_ranks.py -k patience"),
    ("plumbing/ranks.py", "os.environ.get('LOCAL_RANK', 0)", "os.environ.get('RANK', 0)",
     "tests/test_ranks.py -k patience"),
    ("plumbing/ranks.py", '_precision("high")', '_precision("medium")', "tests/test_ranks.py -k patience"),
    ("plumbing/ranks.py", '"nccl" if cuda else "gloo"', '"gloo"', "tests/test_ranks.py -k patience"),
    ("plumbing/ranks.py", "PATIENCE = timedelta(minutes=30)", "PATIENCE = timedelta(seconds=30)",
     "tests/test_ranks.py -k patience"),
    # ------------------------------------------------------------------------------ KL's teacher
    ("pretrain.py", "copy.deepcopy(embedder.mllm).eval().requires_grad_(False)",
     "copy.deepcopy(embedder.mllm).requires_grad_(False)", "tests/test_threads.py -k teacher"),
    ("pretrain.py", 'Settings(0, "last", embedder.style)', 'Settings(0, "last", "chat")',
     "tests/test_threads.py -k teacher"),
    # ----------------------------------------------------------- ranks that do not have the same
    ("evaluate.py", "    checkpoint.same_model(cfg.model)\n", "", "tests/test_stage_parts.py -k last_stage"),
    ("plumbing/checkpoint.py", "if by_rank_0(lambda: is_finished(cfg)):", "if is_finished(cfg):",
     "tests/test_checkpoint_parts.py -k rank_0_finds"),
    ("plumbing/folders.py", "    for path in sorted(Path(folder).glob(WEIGHTS)):\n        size",
     "    for path in Path(folder).glob(WEIGHTS):\n        size", "tests/test_folders.py -k whatever_order"),
    ("evaluate.py", "device = agreement.join(cfg)", "device = ranks.setup()",
     "tests/test_stage_parts.py -k last_stage"),
    ("plumbing/checkpoint.py", "    same_data(cfg)\n    shapes", "    shapes",
     "tests/test_checkpoint_parts.py tests/test_agreement.py"),
    ("plumbing/checkpoint.py",
     '    agree({"K, pooling, prompt, trained weights": layout}, f"--model {brief(cfg.model, 60)}")\n', "",
     "tests/test_checkpoint_parts.py tests/test_agreement.py"),
    # ------------------------------------------------------------------------------- what is said
    ("evaluate.py", "table.line(name + note, means", "table.line(name, means",
     "tests/test_stage_parts.py -k left_out"),
    ("evaluate.py", "say(table.head(note))", 'say(table.head(""))', "tests/test_stage_parts.py -k left_out"),
    ("plumbing/hub.py", "{size / 1e9:.2f} GB", "{size / 2**30:.2f} GB", "tests/test_fetch.py -k so_much"),
    ("plumbing/folders.py", "shutil.disk_usage(above).free", "shutil.disk_usage(above).total",
     "tests/test_folders.py -k room_that_is_left"),
    ("plumbing/folders.py", ".free / 1e6:,.1f}", ".free / 2**20:,.1f}",
     "tests/test_folders.py -k room_that_is_left"),
    ("plumbing/checkpoint.py", "weight_of(embedder) / 2**20", "weight_of(embedder) / 1e6",
     "tests/test_checkpoint_parts.py -k cannot_be_saved"),
    ("plumbing/log.py", "max_memory_allocated() / 2**30", "max_memory_allocated() / 1e9",
     "tests/test_log.py -k says_speed"),
    # ------------------------------------------- other numbers than those that are written elsewhere
    ("contrastive.py", "temperature: float = flag(0.03,", "temperature: float = flag(0.3,",
     "tests/test_start.py -k of_these_defaults"),
    ("plumbing/config.py", "lora_alpha: int = flag(64,", "lora_alpha: int = flag(16,",
     "tests/test_start.py -k of_these_defaults"),
    ("plumbing/ending.py", "LEAVE_STEP = 5.0", "LEAVE_STEP = 50.0", "tests/test_ending.py -k first_signal_counts"),
    ("plumbing/ending.py", "UNWIND = 3.0", "UNWIND = 30.0", "tests/test_ending.py -k main_thread_cannot"),
    # ------------------------------------------------------------------- what a step says of itself
    ("pretrain.py", "ids = [x.id for x in examples]", "ids = []", "tests/test_stage_parts.py -k in_each_step"),
    ("contrastive.py", "batch.ids)\n", "[])\n", "tests/test_stage_parts.py -k in_each_step"),
    ("pretrain.py", '"lr": lr, "cut": cut}', '"lr": cfg.lr, "cut": cut}',
     "tests/test_stage_parts.py -k in_each_step"),
    ("contrastive.py", "numbers.update(norm=norm, lr=lr,", "numbers.update(norm=norm, lr=cfg.lr,",
     "tests/test_stage_parts.py -k in_each_step"),
    ("contrastive.py", 'log(step, (N, "pairs"), numbers)', 'log(step, (N // world, "pairs"), numbers)',
     "tests/test_stage_parts.py -k speed_that"),
    # ------------------------------------------------------------------------------ on the disk
    ("plumbing/checkpoint.py", "                os.fsync(file.fileno())\n", "                file.read(0)\n",
     "tests/test_checkpoint_parts.py -k on_the_disk_before"),
    ("plumbing/log.py", 'part = Path(f"{path}.part")', "part = Path(path)", "tests/test_log.py -k log_is_whole"),
    # ------------------------------------------------------------- limits on what comes from others
    ("plumbing/rendering.py", "    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n", "",
     "tests/test_rendering.py -k limits_of"),
    ("plumbing/rendering.py", "(has + MEMORY, has + MEMORY)", "(has + MEMORY, -1)",
     "tests/test_rendering.py -k limits_of"),
    ("plumbing/lines.py", "MOST = 16 * 2**20", "MOST = 160 * 2**20", "tests/test_safety.py -k these_numbers"),
    ("plumbing/images.py", "= 100_000_000, 200", "= 1_000_000_000, 200", "tests/test_safety.py -k these_numbers"),
    ("plumbing/loader.py", "AHEAD = 2", "AHEAD = 20", "tests/test_loader.py -k two_batches"),
]  # fmt: skip

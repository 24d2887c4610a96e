"""The claim at toy scale: does compression pre-training help contrastive learning?

    python tests/bench/reproduce.py                     all studies (hours: docs/results.md)
    python tests/bench/reproduce.py --study arms,K      some of them
    python tests/bench/reproduce.py --show              only the tables of what has been run

Matched arms start from the same toy MLLM: `none` (contrastive only, the mean of K new tokens),
`last` (the same with the last token: VLM2Vec), `coma` (compression, then contrastive), `plain` (the
control that the papers leave out: the same steps on the same dialogues in the same layout with the
mask off, then contrastive), `both` (an idea beyond the paper: some questions stand before the code,
some texts are compressed), `both, no mask` (its control), `condense` (no stage 1, but C must tell
the other side's text in the first part of stage 2: tools/condense.py), and that after `coma`.
Contrastive data, steps, batch and learning rates are the same in every arm. An arm is the flags of
its two stages; each run is a record in --json, and no run is ever repeated: studies share their
arms, and the command goes on where it was stopped.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT))
TASKS = ("classify", "vqa", "i2t", "t2i", "ground")
QUERIES = 60  # of each set, at the end of a run
CURVE = 4  # times in a run that the in-distribution sets are scored, but the last on 25 queries
STAGE1 = "--steps 400 --batch 64 --save-every 0 --workers 0"  # an arm's own flags come after these
STAGE2 = "--steps 200 --batch 64 --save-every 0 --workers 0"


def caps(pairs):
    """So many distinct pairs in all, the same number of each task."""
    return "--subsets " + ",".join(f"{t}:{pairs // len(TASKS)}" for t in TASKS)


NONE, COMA, PLAIN, BOTH = None, "", "--no-compress", "--question-first 0.5 --texts 0.3"
LAST = "--pooling last --compress-tokens 0"  # no new token: that is VLM2Vec
LORA = "--lora-rank 16"  # the tower is frozen then
ARMS = {  # name: (flags of stage 1, or NONE; flags of stage 2; words of ours as "condense")
    "none": (NONE, ""),
    "last": (NONE, LAST),
    "plain": (PLAIN, ""),
    "coma": (COMA, ""),
    "both, no mask": (f"{PLAIN} {BOTH}", ""),
    "both": (BOTH, ""),
    "condense": (NONE, "condense"),
    "coma, condense": (COMA, "condense"),
}
BEYOND = {
    "none": (NONE, ""),
    "coma": (COMA, ""),
    "question first": ("--question-first 0.5", ""),
    "texts too": ("--texts 0.3", ""),
    "both": (BOTH, ""),
}
SLOW = "--lr 3e-4 --muon-lr 2e-3"  # a tenth of both rates
RATES = {
    "none": (NONE, ""),
    "plain": (PLAIN, ""),
    "plain, slow": (f"{PLAIN} {SLOW}", ""),
    "coma": (COMA, ""),
    "coma, slow": (SLOW, ""),
    "both, no mask": (f"{PLAIN} {BOTH}", ""),
    "both, no mask, slow": (f"{PLAIN} {BOTH} {SLOW}", ""),
    "both": (BOTH, ""),
    "both, slow": (f"{BOTH} {SLOW}", ""),
}
LARGE = "--min-pixels 16384 --max-pixels 16384"  # 128 x 128, twice the toy's: 64 image tokens
LARGE_TOY = f"{PLAIN} --compress-tokens 0 {LARGE} --steps 400"  # such arms start from this one
MAIN = {arm: ARMS[arm] for arm in ("none", "plain", "coma")}


def with_flags(arms, first="", second=""):
    """The arms with these flags behind their own."""
    more = {}
    for arm, (its_first, its_second) in arms.items():
        stage1 = its_first if its_first is NONE else f"{its_first} {first}".strip()
        more[arm] = stage1, f"{second} {its_second}".strip()
    return more


def lengths(*steps) -> dict:
    """CoMa and its control after so many steps of stage 1, beside contrastive training alone."""
    trained = {"CoMa": ARMS["coma"], "the same dialogues, no mask": ARMS["plain"]}
    arms = {"none": ARMS["none"]}
    for n in steps:
        own = "" if n == 400 else f"--steps {n}"  # 400 is what all other arms take
        for arm, flags in with_flags(trained, own).items():
            arms[f"{arm}, {n} steps"] = flags
    return arms


STUDIES = {
    # name: (seeds, {arm: (flags of stage 1, flags of stage 2)}); NONE: there is no stage 1
    "arms": (5, ARMS),
    **{f"pairs-{n}": (5, with_flags(ARMS, second=caps(n))) for n in (200, 1000, 5000)},
    "lora": (5, with_flags(ARMS, LORA, LORA)),
    **{
        f"lora-{n}": (5, with_flags(ARMS, LORA, f"{LORA} {caps(n)}")) for n in (200, 1000, 5000)
    },
    "tokens-64": (5, with_flags(MAIN, LARGE, LARGE)),
    "dialogues": (5, {
        "multi-turn": (COMA, ""),
        "single turn": ("--turns 1", ""),
        "long description": ("--caption", ""),
        "caption": ("--caption short", ""),
    }),
    "objective": (5, {"ce": (COMA, ""), "kl": ("--objective kl", "")}),
    "K": (5, {
        f"K={k}": (f"--compress-tokens {k}" if k != 4 else COMA, "") for k in (1, 2, 4, 8, 16)
    }),
    "K-control": (5, {
        f"{arm}, K={k}": (first, second if k != 4 else "")
        for k in (1, 4, 16) for arm, first, second in (
            ("contrastive only", NONE, f"--compress-tokens {k}"),
            ("CoMa", f"--compress-tokens {k}" if k != 4 else COMA, ""),
        )
    }),
    "pooling": (5, {"mean of C": (COMA, ""), "last of C": ("--pooling last", "")}),
    "beyond": (3, BEYOND),
    "beyond-200": (3, with_flags(BEYOND, second=caps(200))),
    "rate": (3, RATES),
    "rate-200": (3, with_flags(RATES, second=caps(200))),
    "finished": (5, {arm: RATES[arm] for arm in ("none", "plain", "plain, slow")}),
    "weight": (3, {
        "none": (NONE, ""),
        "condense": (NONE, "condense"),
        "condense 1": (NONE, "--condense 1 condense"),
        "condense 0.2": (NONE, "--condense 0.2 condense"),
    }),
    "length": (3, lengths(100, 400, 1200)),
    **{f"length-{n}": (3, with_flags(lengths(400, 1200), second=caps(n))) for n in (200, 1000)},
    "temperature": (3, {
        f"{arm}, temperature {t}": (first, f"--temperature {t}" if t != 0.03 else "")
        for arm, first in (
            ("contrastive only", NONE), ("the same dialogues, no mask", PLAIN), ("CoMa", COMA)
        ) for t in (0.03, 0.01, 0.1)
    }),
    "batch": (3, {
        f"N={n}": (COMA, f"--batch {n} --block {min(n, 32)} --steps 100")
        for n in (16, 64, 256)
    }),
    "false-negatives": (3, {"masked": (COMA, ""), "kept": (COMA, "--no-mask-false-negatives")}),
    "instructions": (3, {"with": (COMA, ""), "without": (COMA, "bare")}),
    "losses": (3, {
        "InfoNCE": (NONE, "--steps 100 prefixes"),
        "symmetric": (NONE, "--steps 100 --symmetric"),
        "hardness 9": (NONE, "--steps 100 --hardness 9"),
        "margin 0.1": (NONE, "--steps 100 --margin 0.1"),
        "matryoshka": (NONE, "--steps 100 --matryoshka 16,32 prefixes"),
    }),
    "mined": (3, {
        "1,000 pairs": (NONE, f"{caps(1000)} --steps 100"),
        "with mined negatives": (NONE, f"{caps(1000)} --steps 100 mined"),
    }),
}  # fmt: skip


PREFIXES = (16, 32)  # of an embedding, scored where a run's flags say "prefixes"

# ----------------------------------------------------------------------------- one run, one process


def short_captions():
    """The toy world's descriptions, with sizes and places taken away: the objects' names."""
    from toy.world import Shapes

    answer = Shapes._answer

    def short(self, rng, scene, kind, o):
        names, text = answer(self, rng, scene, kind, o)
        return names, " and ".join(x.name for x in scene.objects) if kind == "describe" else text

    Shapes._answer = short


def run_compression(words):
    """Stage 1 by these flags, in this process."""
    import torch

    import pretrain

    torch.set_num_threads(1)
    if "short" in words:
        short_captions()
        words.remove("short")
    pretrain.main(pretrain.Config.parse(words))


def without_instructions():
    """The toy world's pairs and queries, with the words that say what is asked taken away."""
    from toy.world import INSTRUCT

    INSTRUCT.update({task: ("{}", "{}", "{}") for task in ("vqa", "t2i", "ground")})
    INSTRUCT.update({task: ("", "", "") for task in ("classify", "i2t")})


def mine_negatives(words):
    """Stage 2 once by these flags; from here on its pairs have two negatives each, the wrong
    targets at ranks 5 and 6 of their set for the model that came out."""
    import contrastive
    import model
    from plumbing.lines import Lazy
    from tools.mine import Targets, nearest_wrong

    with tempfile.TemporaryDirectory() as out:
        contrastive.main(contrastive.Config.parse([*words, "--out", out]))
        embedder = model.load(out, device="cpu")
    read_pairs = contrastive.read_pairs

    def with_negatives(pairs):
        pairs = list(pairs)
        targets = Targets(pairs, [dict.fromkeys(pair.targets) for pair in pairs])
        z = embedder.encode([pair.query for pair in pairs] + targets.items)
        ranked = nearest_wrong(z[: len(pairs)], z[len(pairs) :], targets.own, 5, 6)
        mined = []
        for pair, rows in zip(pairs, ranked, strict=True):
            mined.append(pair._replace(negatives=tuple(targets.items[row] for row in rows)))
        return Lazy(len(mined), mined.__getitem__)

    def read(*args):
        return {name: with_negatives(pairs) for name, pairs in read_pairs(*args).items()}

    contrastive.read_pairs = read


def score(embedder, limit, subsets=""):
    """Precision@1 of the toy world: evaluate.summary's means."""
    import evaluate
    from data import read_tasks

    tasks, cfg = read_tasks(limit=limit, subsets=subsets), evaluate.Config()
    return evaluate.summary({t.name: evaluate.score(embedder, t, cfg) for t in tasks})


def run_contrastive(job):
    """Stage 2 and its scores, in this process. -> the record."""
    import torch

    import contrastive
    import model
    from plumbing import checkpoint
    from tools import condense

    torch.set_num_threads(1)
    words = f"{STAGE2} {job['second']}".split()
    if "bare" in words:
        without_instructions()
        words.remove("bare")
    dims = ()
    if "prefixes" in words:
        dims = PREFIXES
        words.remove("prefixes")
    stage = contrastive
    if "condense" in words:
        stage = condense
        words.remove("condense")
    words += ["--model", job["init"], "--seed", str(job["seed"])]
    if "mined" in words:
        words.remove("mined")
        mine_negatives(words)
    steps, curve = [], []

    @contextmanager
    def look(embedder, optimizers, cfg, step):
        yield
        if (step + 1) % (cfg.steps // CURVE) == 0 and step + 1 < cfg.steps:
            embedder.eval()
            with torch.random.fork_rng([]):
                curve.append(
                    score(embedder, min(25, job["queries"]), ",".join(TASKS))["ind"]["p_at_1"]
                )
            embedder.train()
            steps.append(step + 1)

    checkpoint.saved_after = look  # the "once in a while" place of the loop
    with tempfile.TemporaryDirectory() as out:
        cfg = stage.Config.parse([*words, "--out", out])
        stage.main(cfg)
        embedder = model.load(out, device="cpu")
        log = [json.loads(x) for x in Path(out, "log.jsonl").read_text().splitlines()[1:]]
    means, prefixes = score(embedder, job["queries"]), {}
    for embedder.dim in dims:
        prefixes[embedder.dim] = score(embedder, job["queries"])["overall"]["p_at_1"]
    return dict(
        first=job["first"], second=job["second"], seed=job["seed"], K=embedder.K, batch=cfg.batch,
        pairs=sum(int(x.partition(":")[2] or 0) for x in cfg.subsets.split(",")),
        steps=[*steps, cfg.steps], curve=[*curve, means["ind"]["p_at_1"]],
        loss=[round(x["loss"], 4) for x in log[:: max(1, cfg.steps // 20)]],
        ind=means["ind"]["p_at_1"], ood=means["ood"]["p_at_1"],
        overall=means["overall"]["p_at_1"], chance=means["overall"]["chance"],
        meta_tasks={m: r["p_at_1"] for m, r in means["meta_tasks"].items()}, prefixes=prefixes,
    )  # fmt: skip


# ------------------------------------------------------------------------------------- all the runs


def call(*words):
    """A script of ours, on one thread, in a process of its own. -> (its output, CPU seconds)."""
    env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **os.environ}
    words = [sys.executable, *map(str, words)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=out, stderr=err)
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        for file in (out, err):
            file.seek(0)
        if process.returncode:
            raise RuntimeError(f"{' '.join(words)}\n{err.read()[-2000:]}")
        return out.read(), round(used.ru_utime + used.ru_stime)


def compress(first, seed, top, model="toy"):
    """Stage 1, where it has not been run yet. -> (its folder, the CPU seconds that it took)."""
    out = top / "-".join([*(first or "coma").replace("--", "").split(), str(seed)])
    if not (out / "cpu_seconds").exists():
        shutil.rmtree(out, ignore_errors=True)  # a run that was stopped begins again
        words = f"{STAGE1} {first} --model {model} --seed {seed} --out {out}".split()
        _, seconds = call(__file__, "--run-first", json.dumps(words))
        (out / "cpu_seconds").write_text(str(seconds))
        print(f"stage 1 {out.name}: {seconds} CPU seconds", flush=True)
    return str(out), float((out / "cpu_seconds").read_text())


def start_of(second, top):
    """The toy MLLM, or the one that has learned to see larger pictures."""
    return compress(LARGE_TOY, 0, top)[0] if LARGE in second else "toy"


def keep(records, path):
    """Writes the runs, and which arms make each study."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(r) for r in records)
    studies = json.dumps({study: arms for study, (_, arms) in STUDIES.items()})
    path.write_text(f'{{"studies": {studies},\n"runs": [\n{lines}\n]}}\n')


def run_arm(first, seed, seconds, args, records, lock):
    """One arm's stage 1 and all the stages 2 that start from it; each record is kept at once."""
    for second in seconds:
        init, seconds1 = start_of(second, args.out), 0
        if first is not NONE:
            init, seconds1 = compress(first, seed, args.out, init)
        job = dict(first=first, second=second, seed=seed, queries=QUERIES, init=init)
        said, seconds2 = call(__file__, "--run", json.dumps(job))
        with lock:
            records.append(json.loads(said.splitlines()[-1]))
            records[-1] |= dict(seconds1=seconds1, seconds2=seconds2)
            keep(records, args.json)
            print(f"{job}: {records[-1]['overall']:.3f}", flush=True)


def main(args):
    """Runs what is missing, a seed at a time, and prints the table."""
    records = json.loads(args.json.read_text())["runs"] if args.json.exists() else []
    done = {(r["first"], r["second"], r["seed"]) for r in records}
    keep(records, args.json)
    arms = defaultdict(dict)  # (seed, flags of stage 1) -> the flags of its stages 2, each once
    for study in args.study.split(","):
        for first, second in STUDIES[study][1].values():
            for seed in range(args.seeds or STUDIES[study][0]):
                if (first, second, seed) not in done:
                    arms[seed, first][second] = None
    for second in set().union(*arms.values()):
        start_of(second, args.out)  # made once, before the others
    lock = threading.Lock()
    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = [
            pool.submit(run_arm, first, seed, seconds, args, records, lock)
            for (seed, first), seconds in sorted(arms.items(), key=lambda arm: arm[0][0])
        ]
        for arm in waiting:
            arm.result()
    show(args)


def show(args):
    """What docs/tables.md holds, and what it cost."""
    from tools import study_tables
    from tools.records import read_records

    records = read_records(args.json)
    print(*study_tables.page(records, args.study.split(",")), sep="\n")
    runs = json.loads(args.json.read_text())["runs"]
    stages = {(r["first"], r["seed"]): r["seconds1"] for r in runs if r["first"] is not None}
    hours = (sum(stages.values()) + sum(r["seconds2"] for r in runs)) / 3600
    print(f"\n{len(runs)} runs after {len(stages)} stages 1: {hours:.1f} CPU hours")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--study", default=",".join(STUDIES), help=f"one or more of {', '.join(STUDIES)}")
    add("--seeds", type=int, help="runs of each arm (default: a number for each study)")
    add("--jobs", type=int, default=2, help="runs at the same time, each on one thread")
    add("--out", type=Path, default=ROOT / "out" / "reproduce", help="stage 1's folders")
    add("--json", type=Path, default=ROOT / "docs" / "reproduce.json", help="the records")
    add("--show", action="store_true", help="only print the tables")
    add("--run-first", help=argparse.SUPPRESS)
    add("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if unknown := set(args.study.split(",")) - set(STUDIES):
        parser.error(f"--study: no {', '.join(sorted(unknown))}; there are {', '.join(STUDIES)}")
    if args.run_first:
        run_compression(json.loads(args.run_first))
    elif args.run:
        print(json.dumps(run_contrastive(json.loads(args.run))))
    else:
        show(args) if args.show else main(args)

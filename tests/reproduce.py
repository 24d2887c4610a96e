"""The claim at toy scale: does compression pre-training help contrastive learning?

    python tests/reproduce.py                            the arms, 5 seeds (hours: see the README)
    python tests/reproduce.py --study K --seeds 2        another study
    python tests/reproduce.py --show                     only the table of what has been run

Matched arms start from the same toy MLLM: `none` (contrastive only), `coma` (compression, then
contrastive), `plain` (the control that the papers leave out: the same steps on the same dialogues
in the same layout with the mask off, then contrastive). Contrastive data, steps, batch and learning
rates are the same in every arm. Each run is a record in --json; a run that is there already is not
repeated, so the command goes on where it was stopped.

Studies: each arm is a list of flags of stage 1 (None: there is no stage 1) and of stage 2.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
TASKS = ("classify", "vqa", "i2t", "t2i", "ground")
CURVE = 4  # times in a run that the in-distribution sets are scored, on 25 queries each


def caps(pairs):
    """So many distinct pairs in all, the same number of each task; 0: unlimited."""
    return ["--subsets", ",".join(f"{t}:{pairs // len(TASKS)}" for t in TASKS)] if pairs else []


COMA, PLAIN = [], ["--no-compress"]
ARMS = {"none": None, "coma": COMA, "plain": PLAIN}
STUDIES = {
    # name: {arm: (flags of stage 1, flags of stage 2)}
    "arms": {arm: (first, []) for arm, first in ARMS.items()},
    "pairs-200": {arm: (first, caps(200)) for arm, first in ARMS.items()},
    "pairs-1000": {arm: (first, caps(1000)) for arm, first in ARMS.items()},
    "pairs-5000": {arm: (first, caps(5000)) for arm, first in ARMS.items()},
    "lr": {
        f"{arm} x{x}": (first, ["--lr", str(3e-3 * x), "--muon-lr", str(0.02 * x)])
        for arm, first in ARMS.items()
        for x in (0.5, 1, 2)
    },
    "question-first": {"coma, question first": (["--question-first", "0.5"], [])},
    "texts": {"coma, texts too": (["--texts", "0.3"], [])},
    "both": {"coma, both": (["--question-first", "0.5", "--texts", "0.3"], [])},
    "K": {f"K={k}": (["--compress-tokens", str(k)], []) for k in (1, 2, 4, 8, 16)},
    "dialogues": {
        "multi-turn": (COMA, []),
        "single-turn": (["--turns", "1"], []),
        "caption": (["--caption"], []),
    },  # fmt: skip
    "objective": {"ce": (COMA, []), "kl": (["--objective", "kl"], [])},
    "pooling": {p: (COMA, ["--pooling", p]) for p in ("mean", "last")},
    "temperature": {f"tau={t}": (COMA, ["--temperature", t]) for t in ("0.01", "0.03", "0.1")},
    "batch": {
        f"N={n}": (COMA, ["--batch", str(n), "--block", str(min(n, 32))])
        for n in (16, 64, 256, 1024)
    },
    "false-negatives": {"masked": (COMA, []), "kept": (COMA, ["--no-mask-false-negatives"])},
    "instructions": {"with": (COMA, []), "without": (COMA, ["bare"])},
}


# ----------------------------------------------------------------------------- one run, one process


def without_instructions():
    """The toy world's pairs and queries, with the words that say what is asked taken away."""
    import shapes

    shapes.INSTRUCT |= {t: ("{}", "{}", "{}") for t in ("vqa", "t2i", "ground")}
    shapes.INSTRUCT |= {t: ("", "", "") for t in ("classify", "i2t")}


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

    torch.set_num_threads(1)
    if "bare" in job["second"]:
        without_instructions()
    flags = [f for f in job["second"] if f != "bare"]
    with tempfile.TemporaryDirectory() as out:
        flags += [
            "--model",
            job["init"],
            "--seed",
            str(job["seed"]),
            "--out",
            out,
            "--workers",
            "0",
        ]
        cfg = contrastive.Config.parse(flags)
        steps, curve = [], []

        def look(embedder, optimizers, cfg, step):
            if (step + 1) % (cfg.steps // CURVE) == 0 and step + 1 < cfg.steps:
                embedder.eval()
                with torch.random.fork_rng([]):
                    curve.append(score(embedder, 25, ",".join(TASKS))["ind"]["p_at_1"])
                embedder.train()
                steps.append(step + 1)

        model.maybe_checkpoint = look  # the "once in a while" place of the loop
        t0 = time.time()
        contrastive.main(cfg)
        embedder = model.load(out, device="cpu")
        found = score(embedder, 60)
        first_losses = [json.loads(x) for x in Path(out, "log.jsonl").read_text().splitlines()[1:]]
    return dict(
        study=job["study"], arm=job["arm"], seed=job["seed"], K=embedder.K, batch=cfg.batch,
        pairs=sum(int(x.partition(":")[2] or 0) for x in cfg.subsets.split(",")),
        steps=[*steps, cfg.steps], curve=[*curve, found["ind"]["p_at_1"]],
        loss=[round(x["loss"], 4) for x in first_losses[:: max(1, cfg.steps // 20)]],
        ind=found["ind"]["p_at_1"], ood=found["ood"]["p_at_1"],
        overall=found["overall"]["p_at_1"], chance=found["overall"]["chance"],
        meta_tasks={m: r["p_at_1"] for m, r in found["meta_tasks"].items()},
        seconds=round(time.time() - t0),
    )  # fmt: skip


# ------------------------------------------------------------------------------------- all the runs


def key(study, arm, seed):
    return f"{study}/{arm}/{seed}"


def call(*words):
    """A script of ours, on one thread, in a process of its own. -> its output."""
    env = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **__import__("os").environ}
    words = [sys.executable, *map(str, words)]
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}\n{done.stderr[-2000:]}")
    return done.stdout


def main(args):
    """Runs what is missing, a seed at a time, and prints the table after each run."""
    records = json.loads(args.json.read_text()) if args.json.exists() else []
    have = {key(r["study"], r["arm"], r["seed"]) for r in records}
    lock, firsts = threading.Lock(), {}

    def compress(flags, seed):
        """Stage 1, once for all runs that begin with it. -> its folder."""
        name = "-".join([f.strip("-") for f in flags] or ["coma"]) + f"-{seed}"
        out = args.out / name
        if not (out / "nanocoma.json").exists():
            call("pretrain.py", "--seed", seed, "--steps", args.steps1, "--batch", args.batch1,
                 "--save-every", 0, "--workers", 0, "--out", out, *flags)  # fmt: skip
            print(f"stage 1 {name}: done", flush=True)
        return str(out)

    def match(job, first):
        job["init"] = "toy" if first is None else first.result()
        job["second"] = ["--steps", str(args.steps2), "--batch", str(args.batch2), *job["second"]]
        said = call(__file__, "--run", json.dumps(job))
        with lock:
            records.append(json.loads(said.splitlines()[-1]))
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text("[\n" + ",\n".join(map(json.dumps, records)) + "\n]\n")
            print(f"{job['study']} {job['arm']} {job['seed']}: {records[-1]['overall']:.3f} in "
                  f"{records[-1]['seconds']} s", flush=True)  # fmt: skip

    with ThreadPoolExecutor(args.jobs) as pool:
        waiting = []
        for seed in range(args.seeds):
            jobs = [(study, arm, *flags) for study in args.study.split(",")
                    for arm, flags in STUDIES[study].items()
                    if key(study, arm, seed) not in have]  # fmt: skip
            for _, _, first, _ in jobs:  # stage 1 of all of them stands first in the queue
                if first is not None and (*first, seed) not in firsts:
                    firsts[(*first, seed)] = pool.submit(compress, first, seed)
            for study, arm, first, second in jobs:
                job = dict(study=study, arm=arm, seed=seed, second=second)
                first = None if first is None else firsts[(*first, seed)]
                waiting.append(pool.submit(match, job, first))
        for job in waiting:
            job.result()
    show(records)


def show(records):
    """Mean and standard error over seeds of each arm, x 100; `gain`: of overall against contrastive
    only, paired by seed."""
    from figures import mean_error  # here: a run needs no matplotlib

    groups = defaultdict(list)
    for r in sorted(records, key=lambda r: r["seed"]):
        groups[r["study"], r["arm"]].append(r)
    plain = {r["seed"]: r["overall"] for r in groups.get(("arms", "none"), [])}
    metas = list(records[0]["meta_tasks"]) if records else []
    print(f"{'study':<16}{'arm':<14}{'seeds':>5}" + "".join(
        f"{h[:9]:>13}" for h in ["overall", "gain", "IND", "OOD", *metas]))  # fmt: skip
    for (study, arm), rows in groups.items():
        cells = [[r[k] for r in rows] for k in ("overall", "ind", "ood")]
        cells.insert(1, [r["overall"] - plain[r["seed"]] for r in rows if r["seed"] in plain])
        cells += [[r["meta_tasks"][m] for r in rows] for m in metas]
        both = [mean_error(c) if c else None for c in cells]
        words = [f"{100 * x[0]:.1f} ± {100 * x[1]:.1f}" if x else "-" for x in both]
        print(f"{study:<16}{arm:<14}{len(rows):>5}" + "".join(f"{w:>13}" for w in words))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--study", default="arms,pairs-1000", help=f"one or more of {', '.join(STUDIES)}")
    add("--seeds", type=int, default=5, help="runs of each arm")
    add("--steps1", type=int, default=400, help="steps of stage 1 (as in the quick start)")
    add("--batch1", type=int, default=64, help="dialogues a step")
    add("--steps2", type=int, default=200, help="steps of stage 2")
    add("--batch2", type=int, default=64, help="pairs a step")
    add("--jobs", type=int, default=2, help="runs at the same time, each on one thread")
    add("--out", type=Path, default=ROOT / "out" / "reproduce", help="stage 1's folders")
    add("--json", type=Path, default=ROOT / "assets" / "reproduce.json", help="the records")
    add("--show", action="store_true", help="only print the table")
    add("--run", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        print(json.dumps(run_contrastive(json.loads(args.run))))
    elif args.show:
        show(json.loads(args.json.read_text()))
    else:
        main(args)

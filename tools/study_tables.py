"""The runs that tests/bench/reproduce.py has kept, as tables in Markdown: docs/tables.md is all of
them. Scores are Precision@1 x 100, mean and standard error over seeds; differences are paired by
seed. A difference is bold where it shows: where its 95 % interval leaves out zero."""

import sys

import numpy as np

from tools.records import NAMES, gains, mean_error, percent

HEADING = """# All tables

`python tests/bench/reproduce.py --show` prints them; [results.md](results.md) says what the names
mean. Precision@1 x 100, mean ± standard error over seeds; differences are paired by seed, and bold
where they show: zero is outside their 95 % interval (2.78 standard errors for five seeds, 4.30 for
three). IND and OOD are the sets in and out of distribution."""

WORTH = """The arm with it minus the arm without it. Dialogues beyond the paper, and their parts,
are held against dialogues of pictures, which are the paper's."""

# How many standard errors that are, by the number of seeds: Student's t, both sides together.
STUDENT = {1: np.inf, 2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}

PAIRS = {"pairs-200": "200", "pairs-1000": "1,000", "pairs-5000": "5,000", "arms": "unlimited"}
LORA = {"lora-200": "200", "lora-1000": "1,000", "lora-5000": "5,000", "lora": "unlimited"}
LARGE = {"tokens-64": "unlimited"}
RATES = {"rate-200": "200", "rate": "unlimited"}
WIDTHS = {"K-control": "unlimited"}  # of the code
LENGTHS = {"length-200": "200", "length-1000": "1,000", "length": "unlimited"}  # of stage 1
TEMPERATURES = {"temperature": "unlimited"}
CUT = {"losses"}  # where some arms' embeddings are scored by their first numbers, too
BEYOND = {"beyond-200": "200", "beyond": "unlimited"}
# An arm with a part of its own, beside the one without it.
MASK = (("coma", "plain"), ("both", "both, no mask"))
DIALOGUES = (("both", "coma"), ("both, no mask", "plain"))
NO_MASK = "the same dialogues, no mask"  # as the arms of `length` and `temperature` are called


def in_each_arm(t):
    """The arms of the study `temperature` at t, each beside itself at 0.03."""
    arms = ("contrastive only", NO_MASK, "CoMa")
    return tuple((f"{arm}, temperature {t}", f"{arm}, temperature 0.03") for arm in arms)


def long_mask(steps):
    """CoMa beside the same dialogues without a mask, after as many steps of stage 1."""
    return ((f"CoMa, {steps} steps", f"{NO_MASK}, {steps} steps"),)


def longer(arm, steps):
    """An arm of `length` after `steps` of stage 1, beside itself after the usual 400."""
    return ((f"{arm}, {steps} steps", f"{arm}, 400 steps"),)


def coma_at(setting):
    """CoMa beside contrastive training alone, both at a setting."""
    return ((f"CoMa, {setting}", f"contrastive only, {setting}"),)


SLOW = tuple((f"{arm}, slow", arm) for arm in ("coma", "plain", "both", "both, no mask"))
SLOW_MASK = tuple((f"{arm}, slow", f"{other}, slow") for arm, other in MASK)
# part: (its studies, with the number of their pairs; arms with it, each beside one without it)
PARTS = {
    "CoMa, over contrastive only": (PAIRS, (("coma", "none"),)),
    "the last token, over the mean of K new ones": (PAIRS, (("last", "none"),)),
    "the mask, dialogues of pictures": (PAIRS, MASK[:1]),
    "the mask, dialogues beyond the paper": (PAIRS, MASK[1:]),
    "the mask, mean of both": (PAIRS, MASK),
    "dialogues beyond the paper, with the mask": (PAIRS, DIALOGUES[:1]),
    "dialogues beyond the paper, no mask": (PAIRS, DIALOGUES[1:]),
    "dialogues beyond the paper, mean of both": (PAIRS, DIALOGUES),
    "texts alone, with the mask": (BEYOND, (("texts too", "coma"),)),
    "questions first alone, with the mask": (BEYOND, (("question first", "coma"),)),
    "a slow stage 1, CoMa": (RATES, SLOW[:1]),
    "a slow stage 1, dialogues beyond the paper": (RATES, SLOW[2:]),
    "a slow stage 1, mean of four": (RATES, SLOW),
    "the mask, at slow rates, mean of both": (RATES, SLOW_MASK),
    "100 steps of stage 1 in the place of 400, CoMa": (LENGTHS, longer("CoMa", 100)),
    "1,200 steps of stage 1 in the place of 400, CoMa": (LENGTHS, longer("CoMa", 1200)),
    "100 steps of stage 1 in the place of 400, no mask": (LENGTHS, longer(NO_MASK, 100)),
    "1,200 steps of stage 1 in the place of 400, no mask": (LENGTHS, longer(NO_MASK, 1200)),
    "the mask, after 100 steps of stage 1": (LENGTHS, long_mask(100)),
    "the mask, after 400 steps of stage 1": (LENGTHS, long_mask(400)),
    "the mask, after 1,200 steps of stage 1": (LENGTHS, long_mask(1200)),
    "CoMa of 1,200 steps, over contrastive only": (LENGTHS, (("CoMa, 1200 steps", "none"),)),
    "CoMa, over contrastive only, K = 1": (WIDTHS, coma_at("K=1")),
    "CoMa, over contrastive only, K = 4": (WIDTHS, coma_at("K=4")),
    "CoMa, over contrastive only, K = 16": (WIDTHS, coma_at("K=16")),
    "temperature 0.01 in the place of 0.03, mean of three arms": (TEMPERATURES, in_each_arm(0.01)),
    "temperature 0.1 in the place of 0.03, mean of three arms": (TEMPERATURES, in_each_arm(0.1)),
    "temperature 0.01: CoMa, over contrastive only": (TEMPERATURES, coma_at("temperature 0.01")),
    "temperature 0.03: CoMa, over contrastive only": (TEMPERATURES, coma_at("temperature 0.03")),
    "temperature 0.1: CoMa, over contrastive only": (TEMPERATURES, coma_at("temperature 0.1")),
    "condense, after CoMa": (PAIRS, (("coma, condense", "coma"),)),
    "LoRA: CoMa, over contrastive only": (LORA, (("coma", "none"),)),
    "LoRA: the mask, mean of both": (LORA, MASK),
    "LoRA: dialogues beyond the paper, mean of both": (LORA, DIALOGUES),
    "64 image tokens: CoMa, over contrastive only": (LARGE, (("coma", "none"),)),
    "64 image tokens: the mask, dialogues of pictures": (LARGE, MASK[:1]),
}
# By how much a part is worth more in one setting than in another. Two intervals side by side do not
# say it: what the settings share of a seed's luck is in both.
CHANGES = {  # name: (a part, the one that it is held against)
    f"CoMa, over contrastive only, K = 16 over K = {k}": (
        "CoMa, over contrastive only, K = 16",
        f"CoMa, over contrastive only, K = {k}",
    )
    for k in (1, 4)
}

# (study, arm, the arm that it is held against, and the scores of both in the literature)
PUBLISHED = (
    ("dialogues", "single turn", "multi-turn", 64.8, 65.5),
    ("dialogues", "long description", "multi-turn", 64.9, 65.5),
    ("dialogues", "caption", "multi-turn", 65.2, 65.5),
    ("objective", "kl", "ce", 64.4, 65.5),
    ("K", "K=1", "K=16", 64.3, 64.9),
    ("K", "K=8", "K=16", 64.8, 64.9),
    ("arms", "coma", "last", 67.5, 60.3),  # VLM2Vec's own run, of another backbone
    ("arms", "coma", "none", 67.5, 66.4),  # MoCa's run of the same backbone
    ("arms", "condense", "last", 59.0, 55.4),  # Bottleneck Tokens, MMEB-V2
)


def shows(differences) -> bool:
    """Whether zero is outside the 95 % interval of their mean, a difference for each seed."""
    mean, error = mean_error(differences)
    return bool(abs(mean) > STUDENT[min(len(differences), 5)] * error)


def difference(differences) -> str:
    """A table's cell: "+2.0 ± 1.1", bold where it shows."""
    text = percent(differences, sign=True)
    return f"**{text}**" if shows(differences) else text


def row(*cells) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"


def head(*cells) -> list:
    """A table's first two lines."""
    return [row(*cells), "|---" * len(cells) + "|"]


def seeds(n) -> str:
    """How many there are."""
    return "1 seed" if n == 1 else f"{n} seeds"


def name_of(arm) -> str:
    """As a reader knows it."""
    return NAMES.get(arm, arm)


def scores_of(runs, keys=("overall",)) -> np.ndarray:
    """(seeds, keys and meta-tasks)."""
    scores = []
    for run in runs:
        scores.append([run[key] for key in keys] + list(run["meta_tasks"].values()))
    return np.array(scores)


def table(arms) -> list:
    """A study's scores; the second column is overall's difference from its first arm's.

    arms: {arm: [run, by seed]}."""
    (first, base), *_ = arms.items()
    metas = list(base[0]["meta_tasks"])
    lines = head(seeds(len(base)), "overall", f"over {name_of(first)}", "IND", "OOD", *metas)
    for arm, runs in arms.items():
        overall, *others = map(percent, scores_of(runs, ("overall", "ind", "ood")).T)
        gain = "–" if arm == first else difference(gains(runs, base))
        lines.append(row(name_of(arm), overall, gain, *others))
    return lines


def curves(arms) -> list:
    """A study's scores in distribution on the way."""
    base, *_ = arms.values()
    steps = [f"after {step} steps" for step in base[0]["steps"]]
    lines = head(f"IND, {seeds(len(base))}", *steps)
    for arm, runs in arms.items():
        scores = zip(*(run["curve"] for run in runs), strict=True)
        lines.append(row(name_of(arm), *map(percent, scores)))
    return lines


def prefixes(arms) -> list:
    """Scores overall of embeddings that were cut after their first numbers, of the arms whose runs
    have them, each over the first of these arms cut to the same width."""
    cut = {arm: runs for arm, runs in arms.items() if runs[0].get("prefixes")}
    (first, base), *_ = cut.items()
    columns = [seeds(len(base))]
    for width in base[0]["prefixes"]:
        columns += [f"{width} numbers", f"over {name_of(first)}"]
    lines = head(*columns)
    for arm, runs in cut.items():
        cells = [name_of(arm)]
        for its, others in zip(scores_of_prefixes(runs).T, scores_of_prefixes(base).T, strict=True):
            cells += [percent(its), "–" if arm == first else difference(its - others)]
        lines.append(row(*cells))
    return lines


def scores_of_prefixes(runs) -> np.ndarray:
    """(seeds, widths)."""
    return np.array([list(run["prefixes"].values()) for run in runs])


def overall(arms) -> list:
    """A cell for each arm: the first one's score overall, of the others what they are over it."""
    base, *others = arms.values()
    score = percent([run["overall"] for run in base])
    return [score, *(difference(gains(runs, base)) for runs in others)]


def by_pairs(records, studies) -> list:
    """The same arms, beside each other for every number of pairs that has been run."""
    columns = {pairs: records[study] for study, pairs in studies.items() if study in records}
    arms, *_ = columns.values()
    counts = {len(runs) for column in columns.values() for runs in column.values()}
    lines = head(" or ".join(map(seeds, sorted(counts))), *columns)
    for arm, *cells in zip(arms, *map(overall, columns.values()), strict=True):
        lines.append(row(name_of(arm), *cells))
    return lines


def worth(arms, contrasts) -> np.ndarray:
    """What a part is worth: (seeds, 1 + meta-tasks), the mean over contrasts of the arm with it
    minus the one without it, of the same seed."""
    differences = [scores_of(arms[its]) - scores_of(arms[other]) for its, other in contrasts]
    return np.mean(differences, axis=0)


def worths(records, part) -> dict:
    """{pairs: what a part is worth (seeds, 5)}, for every number of pairs that has been run."""
    studies, contrasts = PARTS[part]
    its = {}
    for study, pairs in studies.items():
        if has(records, study, sum(contrasts, ())):
            its[pairs] = worth(records[study], contrasts)
    return its


def parts(records) -> list:
    """What each part of an arm is worth, then by how much more in one setting than in another."""
    rows = {part: worths(records, part) for part in PARTS}
    for change, (part, other) in CHANGES.items():  # of the same studies
        known = [pairs for pairs in rows[part] if pairs in rows[other]]
        rows[change] = {pairs: rows[part][pairs] - rows[other][pairs] for pairs in known}
    metas = ("Classification", "VQA", "Retrieval", "Grounding")
    lines = head("what", "pairs", "seeds", "overall", *metas)
    for name, its in rows.items():
        for pairs, x in its.items():  # (seeds, 5)
            lines.append(row(name, pairs, str(len(x)), *map(difference, x.T)))
    return lines


def has(records, study, arms) -> bool:
    """Whether these arms of a study have been run."""
    return set(arms) <= set(records.get(study, ()))


def beside_the_literature(records) -> list:
    """PUBLISHED, beside what was seen here."""
    lines = head("arm", "against", "ours", "published", "")
    for study, arm, other, score, base in PUBLISHED:
        if not has(records, study, (arm, other)):
            continue
        arms = records[study]
        gained = gains(arms[arm], arms[other])
        verdict = "cannot tell"
        if shows(gained):
            same = np.mean(gained) * (score - base) > 0
            verdict = "same direction" if same else "opposite"
        ours = f"{percent(gained, sign=True)} ({percent([run['overall'] for run in arms[arm]])})"
        published = f"{score - base:+.1f} ({score})"
        lines.append(row(name_of(arm), name_of(other), ours, published, verdict))
    return lines


def page(records, studies) -> list:
    """The lines of docs/tables.md, of these studies: those of them that have been run."""
    lines = HEADING.splitlines()
    for study in studies:
        if study not in records:
            continue
        lines += ["", f"## `{study}`", "", *table(records[study])]
        if study in PAIRS | LORA | LARGE | LENGTHS:
            lines += ["", *curves(records[study])]
        if study in CUT:
            lines += ["", *prefixes(records[study])]
    for title, studies in (("all weights", PAIRS), ("LoRA", LORA)):
        if records.keys() & studies:
            lines += ["", f"## By the number of pairs, {title}", "", *by_pairs(records, studies)]
    lines += ["", "## What each part is worth", "", WORTH, "", *parts(records)]
    return [*lines, "", "## Beside the literature", "", *beside_the_literature(records)]


if __name__ == "__main__":
    sys.exit("tools/study_tables.py has no commands: python tests/bench/reproduce.py --show")

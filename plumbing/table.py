"""The evaluation's table on the screen."""


def head(note) -> str:
    """The line above the rows."""
    return f"\n{'Precision@1 x 100':<34} {'score':>6}   {'chance':>6}   queries {note}".rstrip()


def line(name, row, note="") -> str:
    """One row, in percent; row: {"p_at_1", "chance"}, or None where there is nothing to average."""
    shown = "-"
    if row is not None:
        shown = f"{100 * row['p_at_1']:6.1f}   {100 * row['chance']:6.1f}"
    return f"{name:<34} {shown:>15} {note}".rstrip()


def ending(row) -> str:
    """What stands behind the numbers of a set: its queries, Recall@5 and 10 of one's own data, a
    warning."""
    words = [f"{row['queries']:>9}"]
    for name, share in row.items():
        if name.startswith("recall_at_"):
            words.append(f"R@{name.removeprefix('recall_at_')} {100 * share:.1f}")
    words.append(row.get("warning", ""))
    return " ".join(words)


def partial_note(cfg) -> str:
    """What of the evaluation was left out, "(partial: --limit 20)"; "" where nothing was."""
    cuts = []
    if cfg.limit:
        cuts.append(f"--limit {cfg.limit}")
    if cfg.subsets:
        cuts.append("--subsets")
    return f"(partial: {', '.join(cuts)})" if cuts else ""


def lines_of_means(means, note) -> str:
    """The rows below those of the sets. means: evaluate.summary's; note: `partial_note`."""
    lines = ["-- mean over sets"]
    for name, row in means["meta_tasks"].items():
        lines.append(line("  " + name, row))
    for name in ("IND", "OOD", "Overall"):
        lines.append(line(name, means[name.lower()], note))
    return "\n".join(lines)

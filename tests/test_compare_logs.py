"""`python -m tools.compare_logs`: whether a loss curve is normal, against several seeds of it."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from checks import equal, expect

from plumbing import start
from plumbing.errors import InputError
from tools import compare_logs

LOGS = Path(__file__).parent.parent / "docs" / "logs"
STEPS = 100
CONFIG = {"steps": STEPS, "batch": 64, "lr": 0.003, "seed": 0, "out": "a"}


def curve(seed, steps=STEPS):
    """A falling loss with noise of its own: a part that lasts, as seeds differ, and one that does
    not."""
    noise = np.random.default_rng(seed)
    level = 1 + 0.1 * noise.standard_normal()
    return level * 3 / np.arange(1, steps + 1) ** 0.5 * (1 + 0.1 * noise.standard_normal(steps))


def write(path, loss, **config):
    """A log.jsonl."""
    records = [{"config": {**CONFIG, **config}, "world": 1, "torch": "2.13"}]
    records += [{"step": i + 1, "loss": float(x), "norm": 1.0} for i, x in enumerate(loss)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


@pytest.fixture
def reference(tmp_path):
    """Five seeds; the other four end at step 60."""
    for seed in range(1, 5):
        write(tmp_path / f"ref-seed{seed}.jsonl", curve(seed)[:60], seed=seed)
    return write(tmp_path / "ref.jsonl", curve(0))


def compare(tmp_path, mine, reference):
    """The exit status."""
    return compare_logs.main([mine, reference, "--out", str(tmp_path / "x.png")])


def test_another_seed_is_within_the_spread_of_five(tmp_path, reference, capsys):
    """Forty further seeds; the line says for which steps that is known. A picture is there."""
    for seed in range(10, 50):
        mine = write(tmp_path / "mine.jsonl", curve(seed), seed=seed, out="b")
        equal(compare_logs.verdict(*(compare_logs.read_log(x) for x in (mine, reference)),
              band_of(reference))[0], True, f"seed {seed}")  # fmt: skip
    equal(compare(tmp_path, mine, reference), 0, "the exit status")
    said = capsys.readouterr().out
    want = "within the spread of 5 seeds: steps 1 to 60 of 100; beyond that step it is not known"
    expect(said.startswith(f"{mine}: {want}\n"), said, want, "one line")
    expect("not as in" not in said, said, "no difference", "another seed and --out are none")
    expect((tmp_path / "x.png").stat().st_size > 5000, "no picture", "one", "draw")


def band_of(reference):
    return compare_logs.band_of(compare_logs.seeds_beside(compare_logs.read_log(reference)))


@pytest.mark.parametrize("factor", [2.0, 0.4])
def test_a_curve_that_leaves_is_named_with_its_step(tmp_path, reference, capsys, factor):
    """From step 31 on twice as high, or less than half: within a few steps of it (losses are means
    of 9)."""
    loss = curve(0)
    loss[30:] *= factor
    equal(compare(tmp_path, write(tmp_path / "m.jsonl", loss), reference), 1, "the exit status")
    said = capsys.readouterr().out
    step = int(said.split("from step ")[1].split()[0])
    expect(24 <= step <= 38, said, "about 31", "outside the spread of 5 seeds from step ...")
    expect("normal is" in said, said, "what would be normal", "")


def test_the_step_and_the_losses_that_would_be_normal_are_those_where_it_leaves():
    """From step 13 of 40 on, or a NaN in the last one; the band is another one in each step."""
    low = np.arange(40) / 100
    band = compare_logs.Band(low, low + 1, 5)
    loss = low + 0.5
    equal(compare_logs.first_outside(loss, band), None, "within")
    for step, new in ((13, loss + (np.arange(40) >= 12)), (40, np.r_[loss[:-1], np.nan])):
        equal(compare_logs.first_outside(new, band), step, "from this step on")
    steps = np.arange(1, 41)
    reference = compare_logs.Run(None, {"config": {"steps": 40}}, steps, loss)
    mine = reference._replace(loss=loss + 4.0 * (steps >= 13))
    _, line = compare_logs.verdict(mine, reference, band)
    step = int(line.split("from step ")[1].split(" ")[0])
    want = f"normal is {low[step - 1]:.3f} to {low[step - 1] + 1:.3f}"
    expect(line.endswith(want), line, want, f"at step {step}")


def test_the_band_is_one_and_a_half_times_as_wide_on_either_side():
    """Also where the seeds meet by chance, for its width is a mean over steps, too."""
    steps = np.arange(1, 41)

    def run(loss):
        return compare_logs.Run(None, {}, steps, loss)

    band = compare_logs.band_of([run(np.full(40, 1.0)), run(np.full(40, 3.0))])
    equal((band.low[20], band.high[20]), (-2.0, 6.0), "1 to 3, and 3 more on either side")
    rising, falling = run(steps / 40), run(1 - steps / 40)
    band = compare_logs.band_of([rising, falling])
    (meet,) = np.flatnonzero(rising.until(40) == falling.until(40))
    expect(band.high[meet] - band.low[meet] > 0.1, band, "some width", f"they meet at {meet + 1}")


def test_flags_that_change_no_loss_are_no_difference(reference):
    """How often it was saved, by whom it was read and where from, where it was begun."""
    run = compare_logs.read_log(reference)
    same = dict(workers=7, save_every=3, keep=5, resume=True, graph_memory="1GiB", model="m")
    same.update(seed=9, out="b", fitting=5, model_digest="x", data_digest=3, command="pretrain")
    same.update(image_root="elsewhere")
    mine = run._replace(header={**run.header, "config": {**run.config, **same}})
    equal(compare_logs.differences(mine, run), "", "not said")


def test_a_run_that_is_outside_for_some_steps_only_is_normal(tmp_path, reference):
    """One batch with a high loss moves nine running means, and no more."""
    loss = curve(0)
    loss[30] *= 6
    equal(compare(tmp_path, write(tmp_path / "m.jsonl", loss), reference), 0, "a single batch")


def test_a_loss_that_is_no_number_is_outside(tmp_path, reference):
    """NaN from step 20 on."""
    loss = curve(0)
    loss[19:] = np.nan
    equal(compare(tmp_path, write(tmp_path / "m.jsonl", loss), reference), 1, "NaN is not normal")


def test_other_flags_and_versions_are_said(tmp_path, reference, capsys):
    """With the reference's in brackets."""
    mine = write(tmp_path / "m.jsonl", curve(0), batch=32)
    text = (tmp_path / "m.jsonl").read_text().replace("2.13", "2.14")
    (tmp_path / "m.jsonl").write_text(text)
    compare(tmp_path, mine, reference)
    expect("--batch 32 (64), torch 2.14 (2.13)" in capsys.readouterr().out, "", "both", "")


def test_a_log_of_fewer_libraries_differs_in_none_of_the_others(tmp_path, reference, capsys):
    """An older version's header says nothing of numpy: nothing is said of it."""
    mine = write(tmp_path / "m.jsonl", curve(0))
    text = (tmp_path / "m.jsonl").read_text().replace('"2.13"', '"2.13", "numpy": "2.0"')
    (tmp_path / "m.jsonl").write_text(text)
    compare(tmp_path, mine, reference)
    expect("numpy" not in capsys.readouterr().out, "", "nothing of numpy", "differences")


def test_of_a_whole_run_beside_whole_seeds_all_steps_are_known(tmp_path, capsys):
    """Nothing lies beyond the last step."""
    write(tmp_path / "whole-seed1.jsonl", curve(1), seed=1)
    whole = write(tmp_path / "whole.jsonl", curve(0))
    equal(compare(tmp_path, whole, whole), 0, "itself")
    said, want = capsys.readouterr().out, "steps 1 to 100\n"
    expect(want in said, said, want, "verdict: no word about further steps")


@pytest.mark.parametrize("name", ["ref", "ref-seed1"])
def test_the_picture_is_written_over_no_log(tmp_path, name):
    """Whatever the logs are called; a seed's either."""
    mine = write(tmp_path / "m.jsonl", curve(0))
    for seed in ("ref", "ref-seed1"):
        write(tmp_path / f"{seed}.png", curve(1))
    before = (tmp_path / f"{name}.png").read_bytes()
    with pytest.raises(InputError, match="would be written over what is read"):
        words = [mine, str(tmp_path / "ref.png"), "--out", str(tmp_path / f"{name}.png")]
        compare_logs.main(words)
    equal((tmp_path / f"{name}.png").read_bytes(), before, "as it was")


def test_a_short_run_is_compared_as_far_as_it_goes(tmp_path, reference, capsys):
    """Twenty steps."""
    equal(compare(tmp_path, write(tmp_path / "m.jsonl", curve(0)[:20]), reference), 0, "short")
    expect("steps 1 to 20 of 100" in capsys.readouterr().out, "", "steps 1 to 20", "")


def test_lines_that_a_full_disk_cost_move_no_other_step(tmp_path, reference, capsys):
    """A run of the reference's own losses, without steps 10 to 24; and a seed without step 7."""
    lines = Path(reference).read_text().splitlines()
    mine = tmp_path / "m.jsonl"
    mine.write_text("\n".join(lines[:10] + lines[25:]) + "\n")
    seed = tmp_path / "ref-seed1.jsonl"
    lines = seed.read_text().splitlines()
    seed.write_text("\n".join(lines[:7] + lines[8:]) + "\n")
    equal(compare(tmp_path, str(mine), reference), 0, "compare_logs.of_every_step")
    expect("steps 1 to 60" in capsys.readouterr().out, "", "steps 1 to 60", "")
    run = compare_logs.read_log(mine)
    equal(run.steps.tolist(), list(range(1, STEPS + 1)), "every step")
    equal(run.loss[[8, 9, 23, 24]].tolist(), [*curve(0)[[8, 8, 8, 24]]], "as the step before")


HEADER = '{"config": {"steps": 9, "batch": 2}}\n'


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "not the log of a stage"),
        ("{", "line 1: no JSON"),
        ("[]\n", "not the log of a stage"),
        ("[" * 9999 + "]" * 9999, "line 1: no JSON"),
        (HEADER + '{"step": 1, "loss": 1' + "0" * 400 + "}\n", "not the log of a stage"),
        (HEADER + '{"step": 0, "loss": 1}\n', "not the log of a stage"),
        (HEADER + '{"step": 1, "loss": 1}\n' * 2, "not the log of a stage"),
        (HEADER + '{"step": 1, "loss": 1}\n{"step": 1e300, "loss": 1}\n', "not the log of a stage"),
        (
            '{"config": {"steps": 1e13, "batch": 2}}\n{"step": 1, "loss": 1}\n'
            '{"step": 1000000000000, "loss": 1}\n',
            "not the log of a stage",
        ),
        ('{"config": {"steps": 1, "batch": 2}}\n', "not the log of a stage"),
        ('{"config": {"steps": 1, "batch": 2}}\n{"step": 1}\n', "not the log of a stage"),
        (
            '{"config": {"steps": 1, "batch": 2}}\n{"step": 9, "loss": 1}\n',
            "not the log of a stage",
        ),
    ],
)
def test_what_is_no_log_is_one_line(tmp_path, reference, text, says):
    """With its name; and a file that is not there."""
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(InputError, match=f"m.jsonl.*{says}"):
        compare(tmp_path, str(tmp_path / "m.jsonl"), reference)
    with pytest.raises(InputError, match="none.jsonl: no such log"):
        compare(tmp_path, str(tmp_path / "none.jsonl"), reference)


def test_logs_of_two_stages_and_a_reference_without_seeds_are_refused(tmp_path, reference):
    """Nothing can be said of them."""
    mine = write(tmp_path / "m.jsonl", curve(0), temperature=0.03)
    with pytest.raises(InputError, match="MINE is a log of contrastive, REFERENCE one of pretrain"):
        compare(tmp_path, mine, reference)
    with pytest.raises(InputError, match="no other seed beside it"):
        compare(tmp_path, reference, write(tmp_path / "alone.jsonl", curve(0)))
    equal(list(tmp_path.glob("*.png")), [], "no picture of nothing")


@pytest.mark.parametrize("stage", ["pretrain", "contrastive"])
def test_the_defaults_are_those_of_the_reference(stage):
    """README's numbers, docs' and the seeds' spread are of runs without flags: by another default
    a reader's curve would be another one."""
    flags = compare_logs.read_log(LOGS / f"{stage}.jsonl").config
    defaults = dataclasses.asdict(start.read_config(LOGS.parent.parent / f"{stage}.py")())
    of_a_run = {"model", "model_digest", "data_digest", "command"}  # stage 2 finds its model
    differ = {
        name: (x, flags.get(name))
        for name, x in defaults.items()
        if name not in of_a_run and x != flags.get(name)
    }
    equal(differ, {}, f"{stage}.py, plumbing/config.py: (the default, the reference's)")


@pytest.mark.parametrize("stage", ["pretrain", "contrastive"])
def test_each_seed_of_the_quick_start_is_normal_for_the_others(stage):
    """docs/logs: five seeds; the reference is whole, the others go as far as they go. With half
    as much loss again a run is not normal."""
    runs = compare_logs.seeds_beside(compare_logs.read_log(LOGS / f"{stage}.jsonl"))
    equal(sorted(run.config["seed"] for run in runs), [0, 1, 2, 3, 4], "five seeds")
    equal(runs[0].steps[-1], runs[0].config["steps"], "the reference is whole")
    for run in runs:
        band = compare_logs.band_of([other for other in runs if other is not run])
        is_normal, line = compare_logs.verdict(run, runs[0], band)
        expect(is_normal, f"seed {run.config['seed']}: {line}", "within", "the band is too narrow")
        worse = run._replace(loss=1.5 * run.loss)
        is_normal, line = compare_logs.verdict(worse, runs[0], band)
        expect(not is_normal, f"seed {run.config['seed']}: {line}", "outside", "it is too wide")


def test_steps_outside_count_where_they_are_in_a_row():
    """Every second step, twenty in all, is chance; ten side by side are none."""
    band = compare_logs.Band(np.zeros(40), np.ones(40), 5)
    loss = np.full(40, 0.5)
    loss[::2] = 2.0
    equal(compare_logs.first_outside(loss, band), None, "never two side by side")
    loss[20:29] = 2.0
    equal(compare_logs.first_outside(loss, band), None, "nine side by side")
    loss[29] = 2.0
    equal(compare_logs.first_outside(loss, band), 21, "compare_logs.first_outside")


def test_a_longer_run_is_compared_by_what_all_have():
    """Its last common steps are means of those before, and not of what came after."""
    loss = np.concatenate([np.ones(10), np.full(10, 9.0)])
    run = compare_logs.Run(Path("x"), {}, np.arange(1, 21), loss)
    equal(run.until(10).tolist(), [1.0] * 10, "Run.until")


@pytest.mark.parametrize("name", "lr muon_lr batch steps clip warmup temperature data".split())
def test_a_flag_that_moves_a_loss_is_a_difference(name):
    """Whatever its name: of OTHERWISE only what changes nothing."""
    mine, other = (
        compare_logs.Run(Path("x"), {"config": {name: x}}, np.zeros(0), np.zeros(0)) for x in "ab"
    )
    said = compare_logs.differences(mine, other)
    equal(said, f"--{name.replace('_', '-')} a (b)", "compare_logs.differences")

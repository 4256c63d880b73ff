"""The second study: that its runs and comparisons are the plan's, and what its scores and tables compute."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from scipy import stats

from research.plans import changed
from research.second import runs as plan
from research.second.choice import Candidate, choose, confirmed_table, settings
from research.second.report import tables
from research.second.run import belongs, dense_partner, record_cell
from research.second.scores import PARTS, Scored, drawn_cut, localisation
from research.second.sinks import sink_table
from research.second.tables import contrast_table, contrasts, margin_table, setting_of
from research.study.scores import Scores
from research.study.studies import Study, get_study
from research.zeros import reachability_table
from svit_utils.attention import LearnableThreshold, sparse_modules, sparsify
from svit_utils.explain import attention_maps, displayed
from svit_utils.files import read_rows, write_rows
from svit_utils.models import load_embedded
from svit_utils.records import pack

STUDY = get_study("second")


def images(n: int = 3) -> torch.Tensor:
    from svit_utils.data import PlantedShapes

    return PlantedShapes("val").batch(n).images


def test_the_runs_are_the_plans() -> None:
    runs = STUDY.experiment.runs
    assert len({run.name for run in runs}) == len(runs) == 121
    settings = Counter((setting_of(run.name), run.profile.config.steps) for run in runs)
    five = {(kind, steps) for kind in ("dense", "warmup", "sparse", "top_k") for steps in (150, 450)}
    five |= {(label, 450) for label in ("tau0.005", "tau0.0075", "tau0.0025", *plan.LEARNED)}
    five |= {(kind, 450) for kind in ("hard_cut", "clipped", "entmax15")}
    three = {("dense", 1350), ("warmup", 1350)}
    three |= {(label, 450) for label in ("dense_registers", "warmup_registers", "distilled", "warmup10", "warmup25")}
    three |= {("cap", 450), ("zero", 450)}
    one = {("per_head_from0.0025", 450), ("per_head_from0.01", 450)}
    one |= {("start_registers", 1200), ("start_registers_continued", 500)}
    assert settings == {**dict.fromkeys(five, 5), **dict.fromkeys(three, 3), **dict.fromkeys(one, 1)}
    for run in runs:
        profile, config = run.profile, run.profile.config
        assert run.test_seed == plan.TEST_PICTURES and profile.rho == 0 and config.batch_size == 64
        if not run.name.startswith("start_"):
            assert (config.lr, config.schedule, config.precision, config.eval_every) == (5e-4, "cosine", "bf16", 50)
        share = {"warmup10": 0.1, "warmup25": 0.25}.get(setting_of(run.name), 0.5)
        has_warmup = run.kind in ("warmup", "learned", "hard_cut", "clipped")
        assert config.tau_warmup_steps == (round(share * config.steps) if has_warmup else 0), run.name
        if run.learned is not None:
            assert run.learned.target == 0.72 and config.threshold_lr == 0.03


def test_the_confirmation_is_the_chosen_run_with_fresh_seeds_and_pictures() -> None:
    for setting in ("tau0.005", "per_head", "top_k"):
        runs = plan.confirmation(setting).runs
        assert len(runs) == 10 and {run.test_seed for run in runs} == {1}
        assert {run.profile.config.seed for run in runs} == set(range(10, 15))
        for run in runs:
            kind, _, seed = run.name.rsplit("-", 2)
            first = next(each for each in STUDY.experiment.runs if each.name == f"{kind}-450-seed0")
            same = replace(run, name=first.name, test_seed=first.test_seed, profile=changed(run.profile, seed=0))
            assert same == first and run.profile.config.seed == int(seed[4:])
        partner = dense_partner(runs[1], {run.name: run for run in runs})
        assert partner is runs[0]
    with pytest.raises(ValueError, match="'hard_cut' is no setting of parts A to C at 450 steps"):
        plan.confirmation("hard_cut")


def test_the_families_are_the_plans() -> None:
    assert Counter(contrast.family for contrast in contrasts()) == {
        "A gap": 6,
        "A closing": 3,
        "A maps": 15,
        "A maps closing": 4,
        "B maps": 12,
        "C accuracy": 3,
        "C maps": 6,
        "D accuracy": 3,
        "D maps": 6,
    }
    assert len(set(contrasts())) == 58


def test_every_run_has_a_dense_partner_of_its_kind() -> None:
    runs = {run.name: run for run in STUDY.experiment.runs}
    for run in runs.values():
        partner = dense_partner(run, runs)
        if run.kind == "dense":
            assert partner is None
            continue
        registers = "_registers" if run.registers else ""
        assert partner.name == f"dense{registers}-{run.profile.config.steps}-seed{run.profile.config.seed}"
    assert not belongs("localisation", runs["start_registers"])
    assert belongs("validation", runs["tau0.005-450-seed0"]) and not belongs("validation", runs["warmup-150-seed0"])


def test_drawn_cut_is_the_operator_on_the_dense_map() -> None:
    dense = load_embedded("planted_dense_start")
    maps = attention_maps(dense, images())
    cases: list[tuple[dict[str, Any], Any]] = [
        ({"threshold": 0.005}, lambda w: displayed(w, 0.005)),
        ({"threshold": 0.01, "empty_rows": "cap"}, lambda w: displayed(w, 0.01, empty_rows="cap")),
        ({"threshold": torch.tensor([0.001, 0.01, 0.02])}, lambda w: displayed(w, torch.tensor([0.001, 0.01, 0.02]))),
        ({"normaliser": "topk"}, lambda w: torch.where(w >= w.topk(21).values[..., -1:], w, 0.0)),
    ]
    for changes, by_hand in cases:
        sparse = load_embedded("planted_dense_start")
        sparsify(sparse, **changes)
        for drawn, weights in zip(drawn_cut(maps, sparse), maps.values(), strict=True):
            expected = by_hand(weights)
            torch.testing.assert_close(drawn, expected / expected.sum(dim=-1, keepdim=True), atol=1e-5, rtol=1e-4)


def test_localisation_has_every_map_and_scores_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PARTS_PICTURES, "localisation", 6)
    dense, sparse = load_embedded("planted_dense_start"), load_embedded("planted_dense_start")
    sparsify(sparse, LearnableThreshold(0.005, per="head"))
    run = next(run for run in STUDY.experiment.runs if run.name == "per_head-450-seed0")
    scores = localisation(Scored(run, sparse, dense))
    maps = {name.split(":")[0] for name in scores.images}
    assert maps == {"attention", "rollout", "grad_cam", "attention_drawn", "rollout_drawn"}
    assert all(len(values) == 6 and np.isfinite(values).all() for values in scores.images.values())
    # The same weights without training: drawn cut, the dense model's last layer is not the sparse one's, whose input
    # the cut has changed; the first layer's would be.
    assert not np.array_equal(
        scores.images["attention:average_precision"], scores.images["attention_drawn:average_precision"]
    )
    by_head = [row for row in scores.summary if row["head"] != ""]
    assert len(by_head) == 12
    alone = localisation(Scored(replace(run, name="dense-450-seed0"), dense, None))
    assert {name.split(":")[0] for name in alone.images} == {"attention", "rollout", "grad_cam"}


PARTS_PICTURES = __import__("research.second.scores", fromlist=["PICTURES"]).PICTURES


def test_the_heaviest_column_and_its_value() -> None:
    model, x = load_embedded("planted_dense_start"), images()

    def all_to(token: int) -> Any:
        def cut(maps: dict[str, torch.Tensor]) -> list[torch.Tensor]:
            return [torch.zeros_like(w).index_fill_(-1, torch.tensor([token]), 1.0) for w in maps.values()]

        return cut

    for token, prefix in ((0, 1.0), (7, 0.0)):
        table = sink_table(model, x, all_to(token))
        assert list(table["layer"]) == [0, 1, 2, 3]
        assert table["share"].to_numpy() == pytest.approx(1.0)
        assert (table["is_prefix"] == prefix).all()
    kept: list[torch.Tensor] = []
    hook = model.blocks[1].attn.qkv.register_forward_hook(lambda _m, _a, out: kept.append(out[..., 192:]))
    model(x)
    hook.remove()
    lengths = kept[0].norm(dim=-1)  # [B, N]: v is the last third of qkv
    expected = (lengths[:, 7] / lengths.mean(dim=1)).mean().detach()
    assert table["value_norm"][1] == pytest.approx(float(expected), rel=1e-5)
    own = sink_table(model, x)
    weights = list(attention_maps(model, x).values())[2]
    share = (weights.sum(dim=(1, 2)) / weights.sum(dim=(1, 2, 3))[:, None]).amax(dim=1).mean()
    assert own["share"][2] == pytest.approx(float(share), rel=1e-5)


def test_sinks_of_a_public_model() -> None:
    from research.second import photographs

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=4, depth=2).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rows = photographs.deit_sinks(model, x)
    place = {(row["kind"], row["tau"], row["layer"]): row for row in rows}
    assert len(place) == len(rows) == 2 * (1 + 2 * len(photographs.TAUS))
    dense = sink_table(model, x)
    for layer in (0, 1):
        assert float(place["dense", "", layer]["share"]) == pytest.approx(dense["share"][layer], abs=1e-4)
    for tau in photographs.TAUS:  # the first layer's input does not know of the cut
        assert place["cut", tau, 0]["share"] == place["drawn", tau, 0]["share"]
        assert place["cut", tau, 0]["value_norm"] == place["drawn", tau, 0]["value_norm"]
    assert not sparse_modules(model)


@pytest.fixture
def few_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    from research.second import tables as module

    monkeypatch.setattr(module, "RESAMPLES", 400)


@pytest.fixture
def recorded(tmp_path: Path, few_resamples: None) -> Any:
    """The study with made-up records of dense, three lower tau, and one kind at two budgets."""
    study = replace(STUDY, out=tmp_path / "second")
    generator = np.random.default_rng(0)
    accuracy = {"dense": 0.95, "tau0.005": 0.948, "tau0.0075": 0.93, "tau0.0025": 0.945, "warmup": 0.9}
    rows, bits, truth = [], [], {}
    for setting, mean in accuracy.items():
        for seed in range(5 if setting != "tau0.0025" else 3):
            for steps in (150, 450):
                name = f"{setting}-{steps}-seed{seed}"
                base = np.random.default_rng(seed).random(3000)  # the same pictures are hard for all
                correct = base < mean - (0.05 if steps == 150 and setting == "warmup" else 0.0)
                truth[name] = correct
                rows.append({"name": name, "size": "full", "steps": steps, "val_accuracy": mean, "test_accuracy": 1})
                bits.append({"name": name, "size": "full", "n": 3000, "correct": pack(correct)})
                scores = Scores()
                for shown in ("attention", "attention_drawn", "rollout", "rollout_drawn", "grad_cam"):
                    scores.add_images(shown, "average_precision", generator.random(40).round(3))
                    truth[f"{name}:{shown}"] = scores.images[f"{shown}:average_precision"]
                record_cell(study, {"run": name, "part": "localisation", "seconds": 1}, scores)
    write_rows(tmp_path / "second.csv", rows[0], rows)
    write_rows(tmp_path / "second_correct.csv", bits[0], bits)
    return study, truth


def test_tables_agree_with_a_recomputation_in_plain_numpy(recorded: Any) -> None:
    study, truth = recorded
    table = contrast_table(study)
    for _, row in table.iterrows():
        late, early = (row["steps"].split(" minus ") + [None])[:2]

        def values(setting: str, steps: Any, seed: int, measure: str) -> np.ndarray:
            name = f"{setting}-{steps}-seed{seed}"
            return truth[name].astype(float) if measure == "accuracy" else truth[f"{name}:{measure}"]

        difference = []
        for seed in range(row["seeds"]):
            parts = []
            for steps in (late, early):
                if steps is None:
                    continue
                first = values(row["setting"], steps, seed, row["measure"])
                if row["other"] == "drawn":
                    parts.append(first - values(row["setting"], steps, seed, f"{row['measure']}_drawn"))
                else:
                    parts.append(first - values(row["other"], steps, seed, row["measure"]))
            difference.append(parts[0] - parts[1] if len(parts) == 2 else parts[0])
        per_seed = np.mean(difference, axis=1)
        assert row["mean"] == pytest.approx(per_seed.mean(), abs=1e-12)
        half = stats.t.ppf(0.975, len(per_seed) - 1) * per_seed.std(ddof=1) / np.sqrt(len(per_seed))
        assert row["high"] - row["low"] >= 2 * half - 1e-12, "the interval is no narrower than Student's"
    judged = table[table["result"] != "incomplete"]
    assert set(table["family"]) >= {"A gap", "B maps"} and set(judged["family"]) == set()
    # tau = 0.0025 lacks two seeds and the other kinds are missing: no family is complete, so nothing is decided.
    margins = margin_table(study).set_index(["setting", "steps"])["result"]
    assert margins["tau0.005", 450] == "not inferior" and margins["tau0.0075", 450] == "inferior"
    assert margins["tau0.0025", 450] == "open" and margins["warmup", 450] == "inferior"


def test_a_complete_family_is_corrected_and_decided(recorded: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from research.second import tables as module

    study, _ = recorded
    planned = [c for c in contrasts() if c.family == "A gap" and c.setting == "warmup"]
    monkeypatch.setattr(module, "contrasts", lambda: iter(planned))
    table = contrast_table(study)
    assert list(table["result"]) == ["lower", "lower"]
    assert (table["p_holm"] >= table["p"]).all() and table["p_holm"].max() < 0.05


def test_the_tables_are_the_same_bytes_again(recorded: Any, tmp_path: Path) -> None:
    from research.second.report import write_tables

    study, _ = recorded
    once = [path.read_bytes() for path in write_tables(study, tmp_path / "a")]
    again = [path.read_bytes() for path in write_tables(study, tmp_path / "b")]
    assert once == again and len(once) == len(tables(study)) == 4


def test_settings_are_read_from_names() -> None:
    assert setting_of("tau0.005-450-seed3") == "tau0.005"
    assert setting_of("start_registers") == "start_registers"
    assert setting_of("confirm_dense-450-seed10") == "confirm_dense"


def candidate(setting: str, sparsity: float, mean: float, low: float, attention: float = 0.5) -> Candidate:
    return Candidate(setting, 5, sparsity, mean, low, 2 * mean - low, attention, 0.4, 0.45)


@pytest.mark.parametrize(
    ("found", "chosen"),
    [
        ([candidate("a", 0.69, 0.01, 0.0), candidate("b", 0.70, -0.02, -0.03)], "b"),  # too many keys left
        ([candidate("a", 0.8, -0.009, -0.0099), candidate("b", 0.8, 0.0, -0.011)], "a"),  # b may cost over a point
        ([candidate("a", 0.8, -0.02, -0.03), candidate("b", 0.8, -0.015, -0.05)], "b"),  # no safe one: highest mean
        ([candidate("a", 0.8, 0.001, 0.0, 0.5), candidate("b", 0.9, 0.0, -0.005, 0.6)], "b"),  # near: the better map
        ([candidate("a", 0.8, 0.003, 0.0, 0.5), candidate("b", 0.9, 0.0, -0.005, 0.6)], "a"),  # not near
        ([candidate("a", 0.5, 0.003, 0.0)], None),
        ([], None),
    ],
)
def test_the_choice_is_the_plans_rule(found: list[Candidate], chosen: str | None) -> None:
    result = choose(found)
    assert (None if result is None else result.setting) == chosen


def test_nothing_is_chosen_before_every_setting_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made-up validation records of three settings, whose choice is recomputed by hand."""
    from research.second import choice as module

    names = ["tau0.005", "per_head", "warmup"]
    study = replace(STUDY, out=tmp_path / "second")
    generator = np.random.default_rng(1)
    accuracy = {name: generator.uniform(0.94, 0.96, 5) for name in ["dense", *names]}
    accuracy["per_head"] = accuracy["dense"] - 0.002
    precision = {name: generator.uniform(0.3, 0.6, (5, 2)) for name in ["dense", *names]}

    def record(settings: list[str]) -> None:
        rows = []
        for name in settings:
            for seed in range(5):
                run = f"{name}-450-seed{seed}"
                row = {"name": run, "size": "full", "steps": 450, "val_accuracy": accuracy[name][seed]}
                rows.append({**row, "val_applied_sparsity": "" if name == "dense" else 0.75})
                scores = Scores()
                for shown, value in zip(("attention", "attention_drawn"), precision[name][seed], strict=True):
                    scores.add_images(shown, "average_precision", np.full(4, value))
                record_cell(study, {"run": run, "part": "validation", "seconds": 1}, scores)
        write_rows(tmp_path / "second.csv", rows[0], rows)

    monkeypatch.setattr(module, "settings", lambda: names)
    record(["dense", *names[:2]])
    table = module.choice_table(study)
    assert list(table["setting"]) == names[:2] and set(table["chosen"]) == {""}
    record(["dense", *names])
    table = module.choice_table(study).set_index("setting")
    assert dict(table["chosen"]) == {"tau0.005": "", "per_head": "yes", "warmup": ""}
    for name in names:
        gap = accuracy[name] - accuracy["dense"]
        half = stats.t.ppf(0.975, 4) * gap.std(ddof=1) / np.sqrt(5)
        means = precision[name].mean(axis=0), precision["dense"].mean(axis=0)
        margin = means[0][0] - max(means[1][0], means[0][1])
        assert list(table.loc[name, ["mean", "low", "margin"]]) == pytest.approx(
            [gap.mean(), gap.mean() - half, margin], abs=1e-5
        )


def test_the_settings_that_may_be_chosen() -> None:
    lower, learned = ["tau0.005", "tau0.0075", "tau0.0025"], list(plan.LEARNED)
    assert settings() == ["warmup", "sparse", "top_k", *lower, *learned]


def test_the_confirmation_needs_a_choice(tmp_path: Path) -> None:
    assert plan.chosen_setting(tmp_path) is None
    write_rows(tmp_path / "tables" / "choice.csv", ["setting", "chosen"], [{"setting": "a", "chosen": ""}])
    assert plan.chosen_setting(tmp_path) is None
    write_rows(tmp_path / "tables" / "choice.csv", ["setting", "chosen"], [{"setting": "a", "chosen": "yes"}])
    assert plan.chosen_setting(tmp_path) == "a"


def test_the_confirmation_is_judged_by_the_margin_and_both_controls(tmp_path: Path, few_resamples: None) -> None:
    setting = "tau0.005"
    study = Study("confirmed", plan.confirmation(setting), tmp_path / "confirmed")
    generator, bits, rows, truth = np.random.default_rng(3), [], [], {}
    assert confirmed_table(study, setting).empty
    for run in study.experiment.runs:
        hard = np.random.default_rng(run.profile.config.seed).random(3000)
        correct = hard < (0.96 if run.kind == "dense" else 0.957)
        scores = Scores()
        levels = {"attention": 0.5 if run.kind == "dense" else 0.6, "attention_drawn": 0.61}
        for shown, level in levels.items():
            truth[run.name, shown] = (level + 0.1 * generator.standard_normal(200)).round(3)
            scores.add_images(shown, "average_precision", truth[run.name, shown])
        record_cell(study, {"run": run.name, "part": "localisation", "seconds": 1}, scores)
        truth[run.name, "accuracy"] = correct
        bits.append({"name": run.name, "size": "full", "n": 3000, "correct": pack(correct)})
        rows.append({"name": run.name, "size": "full", "steps": 450})
    write_rows(tmp_path / "confirmed.csv", rows[0], rows)
    write_rows(tmp_path / "confirmed_correct.csv", bits[0], bits)
    table = confirmed_table(study, setting).set_index(["measure", "other"])
    assert list(table["result"]) == ["not inferior", "higher", "open"]
    seeds = range(10, 15)
    gap = [
        truth[f"{setting}-450-seed{s}", "accuracy"].mean() - truth[f"dense-450-seed{s}", "accuracy"].mean()
        for s in seeds
    ]
    maps = [
        (truth[f"{setting}-450-seed{s}", "attention"] - truth[f"dense-450-seed{s}", "attention"]).mean() for s in seeds
    ]
    assert table["mean"]["accuracy", "dense"] == pytest.approx(np.mean(gap))
    assert table["mean"]["attention", "dense"] == pytest.approx(np.mean(maps))


def test_reachability_without_the_rows_that_fell_back() -> None:
    model = load_embedded("planted_dense_start")
    sparsify(model, 0.05)  # high enough for many empty rows
    dense = load_embedded("planted_dense_start")
    sparsify(dense, 0.05, empty_rows="zero")
    x = images(2)
    one_layer = [model.blocks[-1].attn, dense.blocks[-1].attn]
    assert all(module.normaliser.threshold is not None for module in one_layer)
    table = {fallback: reachability_table(model, x, fallback=fallback) for fallback in (True, False)}
    shares = {fallback: found["reachable_share"].to_numpy() for fallback, found in table.items()}
    assert (shares[False] <= shares[True]).all() and (shares[False] < shares[True]).any()
    # By hand, depth 1 without the residual connection: the last row of the class token, where it is not empty.
    by_hand = []
    for record in last_records(model, x):
        row = record.probs[:, :, 0] > 0.05  # [B, H, N]
        by_hand.append(row.any(dim=1)[:, 1:].double().mean(dim=1))
    first = table[False].query("depth == 1 and not residual")["reachable_share"].item()
    assert first == pytest.approx(float(torch.cat(by_hand).mean()))


def last_records(model: Any, x: torch.Tensor) -> list[Any]:
    found: list[Any] = []
    module = model.blocks[-1].attn
    module.observers.append(lambda _module, record: found.append(record))
    with torch.no_grad():
        model.eval()(x)
    module.observers.clear()
    return found


def test_faithfulness_disturbs_the_model_that_a_map_belongs_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from research.second import scores as module

    monkeypatch.setitem(PARTS_PICTURES, "faithfulness", 2)
    judged: list[tuple[Any, Any]] = []

    def note(model: Any, x: torch.Tensor, maps: torch.Tensor, targets: torch.Tensor) -> dict[str, torch.Tensor]:
        judged.append((model, targets))
        assert maps.shape == (2, 14, 14)
        return {"deletion": torch.zeros(2)}

    monkeypatch.setattr(module, "faithfulness_scores", note)
    dense, sparse = load_embedded("planted_dense_start"), load_embedded("planted_dense_start")
    sparsify(sparse, 0.01)
    run = plan.confirmation("warmup").runs[1]
    found = module.faithfulness(Scored(run, sparse, dense))
    assert [model is dense for model, _ in judged] == [False, False, False, True, True]
    assert {name.split(":")[0] for name in found.images} == {
        *("attention", "rollout", "grad_cam"),
        *("attention_drawn", "rollout_drawn"),
    }


def test_each_part_is_scored_where_the_plan_asks_for_it() -> None:
    runs = {run.name: run for run in (*STUDY.experiment.runs, *plan.confirmation("warmup").runs)}
    asked = {
        part: {setting_of(name) for name, run in runs.items() if belongs(part, run)}
        for part in ("reachability", "faithfulness", "validation")
    }
    assert asked["reachability"] == {"warmup", "cap", "zero"} and asked["faithfulness"] == {"dense", "warmup"}
    assert not any(belongs("faithfulness", run) for run in STUDY.experiment.runs)
    assert not any(belongs("validation", run) for run in plan.confirmation("warmup").runs)
    assert set(PARTS) == {"localisation", "validation", "sparsity", "sinks", "reachability", "faithfulness"}


@pytest.mark.skipif(not (STUDY.out / "tables").is_dir(), reason="the second study is not scored yet")
def test_the_recorded_tables_are_made_of_the_recorded_scores(tmp_path: Path) -> None:
    from research.second.report import write_tables

    written = {path.name: path.read_bytes() for path in write_tables(STUDY, tmp_path)}
    recorded = {path.name: path.read_bytes() for path in sorted((STUDY.out / "tables").glob("*.csv"))}
    assert written == recorded, "run `python -m research study --profile second --tables`"


def test_progress_counts_the_plans_runs() -> None:
    from research.second.tables import progress_table

    table = progress_table(STUDY)
    assert table["planned"].sum() == 121 and list(table["part"].unique()) == list("ABCDEGH")
    assert (table["recorded"] <= table["planned"]).all()
    done = sum(row["size"] == "full" for row in read_rows(STUDY.out.parent / "second.csv"))
    assert table["recorded"].sum() == done

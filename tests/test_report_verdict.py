"""The verdict's sentences, on comparisons constructed so that the right sentence is known."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import pytest

from finetune.report.advice import learned
from finetune.report.headline import headline
from finetune.report.ranking import gap_words
from finetune.report.read import COSTS, Column, Comparison, Pair, Row, Score
from finetune.report.snippets import loadings
from finetune.report.tables import best
from finetune.report.verdict import verdict

COLUMNS = [Column("dino", "DINO (ViT-S/16)", "higher", ""), Column("clip_t", "CLIP-T", "higher", "", "score", 3), Column("drift", "Drift", "lower", ""),
           Column("copy", "Copy", "lower", ""), *COSTS]
TITLES = {"dreambooth": "DreamBooth", "textual-inversion": "Textual Inversion", "lora": "LoRA", "base": "Untouched base", "real": "The real pictures",
          "hypernetwork-key-value": "Hypernetwork (key, value)", "hypernetwork-key-query": "Hypernetwork (key, query)"}
BYTES = {"dreambooth": 17_600_000, "textual-inversion": 784, "lora": 223_000, "hypernetwork-key-value": 1_190_000, "hypernetwork-key-query": 596_000}


def comparison(scores: dict[str, dict[str, float]], undecided: set[tuple[str, str, str]] = frozenset(), failed: dict[str, str] = {}) -> Comparison:
    """Rows with these means, intervals of ±.05, and every pair decided except those listed as (metric, a, b)."""
    rows = []
    for name, means in scores.items():
        kind = name if name in ("base", "real") else "method"
        row = Row(name, TITLES[name], kind, name, failed=failed.get(name, ""))
        row.scores = {key: Score(mean, mean - .05, mean + .05, 10) for key, mean in means.items()}
        if kind == "method":
            row.manifest = {"artifact": {"bytes": BYTES[name]}, "seconds": {"training": 100.0}, "peak_memory_bytes": 10**9}
        rows.append(row)
    pairs = []
    for one, two in combinations([row for row in rows if row.kind != "real"], 2):
        for key in sorted(one.scores.keys() & two.scores.keys()):
            gap = one.scores[key].mean - two.scores[key].mean
            open_ = (key, one.row, two.row) in undecided or (key, two.row, one.row) in undecided
            reach = abs(gap) + .05 if open_ else abs(gap) / 2
            pairs.append(Pair(key, one.row, two.row, gap, gap - reach, gap + reach, not open_))
    return Comparison(Path(), {}, {}, {}, list(COLUMNS), rows, pairs)


def told(case: Comparison, kind: str) -> dict[str, str]:
    return {one.title: one.text for one in verdict(case) if one.kind == kind}


BASE, REAL = {"dino": .35, "clip_t": .290, "copy": .40}, {"dino": .78, "copy": .80}


def test_decided_leader():
    case = comparison({"base": BASE, "dreambooth": {"dino": .71}, "lora": {"dino": .65}, "real": REAL})
    assert told(case, "finding")["Closest to the subject"] == (
        "DreamBooth (DINO .71 [.66, .76]); measurably ahead of LoRA (by .06 [.03, .09]). For scale: untouched base .35 and real pictures .78.")


def test_undecided_says_no_measurable_difference():
    case = comparison({"base": BASE, "dreambooth": {"dino": .71}, "lora": {"dino": .69}, "textual-inversion": {"dino": .58}},
                      {("dino", "dreambooth", "lora")})
    text = told(case, "finding")["Closest to the subject"]
    assert text.startswith("DreamBooth (DINO .71 [.66, .76]); no measurable difference to LoRA (.02 [−.05, .09]); "
                           "measurably ahead of Textual Inversion (by .13 [.07, .20])")
    assert best(case, COLUMNS[0]) is None  # so nothing is bold either


def test_all_tied():
    case = comparison({"dreambooth": {"dino": .71}, "lora": {"dino": .69}}, {("dino", "dreambooth", "lora")})
    assert told(case, "finding")["Closest to the subject"].startswith("There is no measurable difference between the two. DreamBooth reads highest")


def test_lower_is_better_for_drift():
    case = comparison({"dreambooth": {"dino": .7, "drift": .14}, "lora": {"dino": .7, "drift": .08}})
    assert told(case, "finding")["Leaves the base alone"] == "LoRA (Drift .08 [.03, .13]); measurably ahead of DreamBooth (by .06 [.03, .09])."
    assert best(case, COLUMNS[2]) == "lora"


def test_smallest_is_told_in_bytes():
    case = comparison({"dreambooth": {"dino": .7}, "textual-inversion": {"dino": .6}})
    assert told(case, "finding")["Smallest"] == "Textual Inversion, 784 bytes; 1/22,000 of DreamBooth (17.6 MB)."
    assert told(case, "finding")["Fastest to train"] == "All about equal, between 100 s and 100 s."


def test_learned_nothing():
    case = comparison({"base": BASE, "lora": {"dino": .37}, "dreambooth": {"dino": .7}}, {("dino", "lora", "base")})
    assert told(case, "warning") == {"LoRA learned nothing measurable": "DINO .37 [.32, .42]; no measurable difference in fidelity to the untouched "
                                     "base (.02 [−.05, .09])."}
    assert [row.row for row in learned(case)] == ["dreambooth"]
    assert "LoRA" not in told(case, "advice")


def test_decided_below_the_base_is_nothing_learned():
    case = comparison({"base": BASE, "lora": {"dino": .25}})
    assert "measurably further from the subject than the untouched base" in told(case, "warning")["LoRA learned nothing measurable"]
    assert list(told(case, "advice")) == ["None of them"]


@pytest.mark.parametrize(("copy", "level"), [(.70, ""), (.82, "hint"), (.90, "warning")])
def test_copying(copy, level):
    case = comparison({"base": BASE, "dreambooth": {"dino": .75, "copy": copy}, "lora": {"dino": .6, "copy": .6}, "real": REAL})
    assert case.copying(case.row("dreambooth")) == level
    titles = list(told(case, "warning"))
    assert titles == {"": [], "hint": ["DreamBooth may be copying"], "warning": ["DreamBooth copies its training pictures"]}[level]
    assert ("DreamBooth" in told(case, "advice")) == (level != "warning")


def test_copying_counts_pictures_above_the_ceiling():
    case = comparison({"dreambooth": {"dino": .75, "copy": .9}, "real": REAL})
    case.row("dreambooth").images = [{"nearest": {"file": "a", "similarity": value}} for value in (.95, .85, .7)]
    assert "(Copy .90 [.85, .95]) than what the real pictures have among each other (.80). 2 of its 3 pictures" in next(iter(told(case, "warning").values()))


def test_above_the_ceiling_is_suspicious():
    case = comparison({"base": BASE, "dreambooth": {"dino": .9}, "real": REAL})
    assert "DreamBooth reads above the real pictures" in told(case, "warning")


def test_advice_takes_the_smallest_of_the_leading_group():
    case = comparison({"base": BASE, "dreambooth": {"dino": .71}, "lora": {"dino": .69}}, {("dino", "dreambooth", "lora")})
    assert told(case, "advice")["LoRA"].startswith(
        "If likeness is what counts: DINO .69 [.64, .74], no measurable difference to DreamBooth (.02 [−.05, .09]) at 1/79 of its size.")


def test_compromise_keeps_most_of_the_gain():
    case = comparison({"base": BASE, "dreambooth": {"dino": .71}, "lora": {"dino": .67}, "textual-inversion": {"dino": .5}})
    assert told(case, "advice")["LoRA"] == "If you want a compromise: 89 % of DreamBooth's gain over the base (DINO .67 [.62, .72]) at 1/79 of its size."


def test_key_query_against_key_value():
    case = comparison({"base": BASE, "hypernetwork-key-value": {"dino": .6, "drift": .10, "clip_t": .26},
                       "hypernetwork-key-query": {"dino": .5, "drift": .06, "clip_t": .27}}, {("clip_t", "hypernetwork-key-value", "hypernetwork-key-query")})
    assert told(case, "finding")["Key+query against key+value"] == (
        "Key+query stays further from the subject (DINO −.10 [−.15, −.05]) and drifts less (Drift −.04 [−.06, −.02]); "
        "no measurable difference in CLIP-T (.010 [−.050, .070]).")
    assert "Key+query against key+value" not in told(comparison({"hypernetwork-key-query": {"dino": .5}}), "finding")


def test_prompt_fidelity_below_the_base():
    case = comparison({"base": BASE, "dreambooth": {"dino": .7, "clip_t": .27}, "lora": {"dino": .6, "clip_t": .285}}, {("clip_t", "base", "lora")})
    assert told(case, "finding")["Follows the prompt best"].endswith("For scale: untouched base .290. Measurably below the base: DreamBooth.")


def test_failed_run_is_a_warning_and_no_competitor():
    case = comparison({"base": BASE, "dreambooth": {"dino": .7}, "lora": {"dino": .9}}, failed={"lora": "The loss of step 31 is not a number."})
    assert told(case, "warning")["LoRA is not in the comparison"] == "The loss of step 31 is not a number."
    assert told(case, "finding")["Closest to the subject"].startswith("DreamBooth (DINO .70 [.65, .75]); measurably above the untouched base")


def test_no_scores_no_claims():
    case = comparison({"dreambooth": {}, "lora": {}})
    assert told(case, "advice") == {} and set(told(case, "finding")) == {"Smallest", "Fastest to train", "Least memory"}


def test_headline_names_who_leads_in_both():
    case = comparison({"base": BASE, "dreambooth": {"dino": .71, "clip_t": .28}, "lora": {"dino": .6, "clip_t": .27}})
    found = headline(case)
    assert found.answer == "Use DreamBooth: nothing comes as close to the subject, and nothing measurably follows the prompt better."
    assert found.sure.startswith("DINO .71 [.66, .76], measurably ahead of LoRA by .11 [") and (found.level, found.rows) == ("decided", ("dreambooth",))


def test_headline_takes_the_smallest_of_those_that_cannot_be_told_apart():
    case = comparison({"base": BASE, "dreambooth": {"dino": .71, "clip_t": .28}, "lora": {"dino": .69, "clip_t": .28}},
                      {("dino", "dreambooth", "lora"), ("clip_t", "dreambooth", "lora")})
    found = headline(case)
    assert found.answer == "There is no measurable difference between the two methods; LoRA is the smallest." and found.level == "tie"
    assert "DreamBooth is ahead of LoRA by .02 [−.05, .09]" in found.sure


def test_headline_is_a_choice_where_likeness_and_prompt_disagree():
    case = comparison({"base": BASE, "dreambooth": {"dino": .71, "clip_t": .25}, "lora": {"dino": .6, "clip_t": .28}})
    found = headline(case)
    assert found.answer == "It depends: DreamBooth for likeness, LoRA where the prompt must be followed."
    assert "(DINO .71 against .60, by .11 [" in found.sure and "(CLIP-T .280 against .250, by .030 [" in found.sure and found.level == "choice"


def test_headline_never_names_a_copier():
    case = comparison({"base": BASE, "dreambooth": {"dino": .75}, "lora": {"dino": .6}})
    case.row("dreambooth").flags = ["copying"]
    found = headline(case)
    assert found.rows == ("lora",) and found.sure.startswith("DreamBooth reads closer and is left out: it copies training pictures.")
    assert best(case, COLUMNS[0]) is None and "DreamBooth copies its training pictures" in told(case, "warning")
    case.row("lora").flags = ["copying"]
    assert headline(case).answer == "None of them: what was rendered copies the training pictures." and headline(case).rows == ()


def test_evaluation_has_the_last_word_on_copying():
    case = comparison({"base": BASE, "dreambooth": {"dino": .75, "copy": .9}, "real": REAL})
    assert case.copying(case.row("dreambooth")) == "warning"
    case.row("dreambooth").flags = []
    assert case.copying(case.row("dreambooth")) == ""


def test_headline_without_a_winner():
    case = comparison({"base": BASE, "lora": {"dino": .37}, "dreambooth": {"dino": .36}}, {("dino", "lora", "base"), ("dino", "dreambooth", "base")})
    assert headline(case).answer == "None of them: no method came measurably closer to the subject than the untouched base."
    assert headline(comparison({"lora": {}})).level == "unscored"
    alone = headline(comparison({"base": BASE, "lora": {"dino": .6}}))
    assert alone.answer == "LoRA works on this subject." and "with nothing to compare it with" in alone.sure


def test_undecided_after_correction_is_said():
    pair = Pair("dino", "dreambooth", "lora", .19, .10, .27, False)
    assert gap_words(pair, COLUMNS[0]) == ".19 [.10, .27], undecided after correction"
    assert gap_words(Pair("dino", "dreambooth", "lora", .02, -.05, .09, False), COLUMNS[0]) == ".02 [−.05, .09]"


def test_the_way_from_the_base_to_the_true_subject():
    case = comparison({"base": BASE, "dreambooth": {"dino": .71}, "lora": {"dino": .65}})
    case.row("dreambooth").way, case.row("lora").way = {"dino": .874}, {"dino": .731}
    assert told(case, "finding")["Closest to the subject"].endswith("Of the way from the untouched base to the true subject: DreamBooth 87 % and LoRA 73 %.")


def test_where_the_truth_is_known_it_decides_and_the_training_pictures_come_second():
    truth = Column("oracle", "Likeness to truth", "higher", "", group="Truth")
    case = comparison({"base": {"dino": .35, "oracle": .40}, "dreambooth": {"dino": .71, "oracle": .60}, "lora": {"dino": .65, "oracle": .80}})
    case.columns.insert(0, truth)
    assert (case.fidelity, case.likeness) == ("oracle", "dino")
    assert headline(case).rows == ("lora",)
    found = told(case, "finding")
    assert found["Closest to the subject"].startswith("LoRA (") and found["Closest to the training pictures"].startswith("DreamBooth (")
    assert not any(title.startswith("By what the world knows") for title in found)
    case.columns.remove(truth)
    assert case.fidelity == "dino" and headline(case).rows == ("dreambooth",)


def test_lines_to_copy_for_sdxl_name_its_pipeline_and_both_encoders():
    case = comparison({"textual-inversion": {"dino": .6}, "lora": {"dino": .7}})
    case.info.update(family="sdxl", model="sdxl.safetensors")
    for row, files in zip(case.rows, (("learned_embeds.safetensors", "learned_embeds_2.safetensors", "my-dog.safetensors"),
                                      ("pytorch_lora_weights.safetensors", "sks-dog.safetensors")), strict=True):
        row.method, row.manifest["artifact"] = row.row, {"trigger": "<my-dog>", "files": [{"file": name} for name in files]}
    words, lora = (dict(one.snippets)["Python"] for one in loadings(case))
    assert lora.startswith('from diffusers import StableDiffusionXLPipeline\npipe = StableDiffusionXLPipeline.from_single_file("sdxl.safetensors")\n')
    assert 'learned_embeds.safetensors", token="<my-dog>", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)' in words
    assert 'learned_embeds_2.safetensors", token="<my-dog>", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)' in words

"""The verdict in words, from the numbers alone. No sentence here knows which method ought to win.

The rules, which ranking.py and advice.py carry out too:

1. *Better* is only said where the paired comparison on the same prompts and seeds is decided (corrected for the
   number of comparisons, by whoever scored). Everything else is "no measurable difference". Overlap of the separate
   intervals is never used.
2. A finding names the best reading, the methods it cannot be told from, and the nearest one measurably behind, each
   with the paired difference and its interval.
3. Time, memory and size were measured once and have no interval: times and memory within a tenth of each other count
   as equal; sizes and counts are exact.
4. A method whose subject fidelity is not decided above the untouched base has "learned nothing measurable" and is
   never recommended.
5. Copying: a method's pictures are closer to their nearest training picture than the real pictures are to each other.
   A warning when the whole interval lies above that ceiling, and then never recommended; a hint when only the mean does.
6. Advice takes, among what is left, the smallest artifact of the group that shares the lead in what the reader cares
   about: equally good and smaller is better.
7. A compromise is named when a method not yet recommended keeps at least 80 % of the best method's gain over the base
   in an artifact of at most half its size.

Rule 8, how the headline is chosen from these, is in headline.py.
"""

from __future__ import annotations

from finetune.report import words
from finetune.report.advice import advice, warnings
from finetune.report.cells import subjects
from finetune.report.ranking import NO_DIFFERENCE, Standing, Statement, amount, gap_words, reading, same_cost, standing
from finetune.report.read import COSTS, Column, Comparison, Row

_COST = {column.key: column for column in COSTS}
_ASKED = (("Follows the prompt best", "clip_t"), ("Leaves the base alone", "drift"), ("Most varied", "diversity"))
_COSTS_ASKED = (("Smallest", "artifact_bytes"), ("Fastest to train", "training_seconds"), ("Least memory", "peak_memory_bytes"))
# What key+query did: metric -> words for a decided gain and for a decided loss.
_WIRING = {"dino": ("comes closer to the subject", "stays further from the subject"), "clip_t": ("follows prompts better", "follows prompts worse"),
           "drift": ("drifts less", "drifts more"), "leak": ("leaks less into the bare class", "leaks more into the bare class"),
           "diversity": ("varies more", "varies less")}


def verdict(comparison: Comparison) -> list[Statement]:
    """All statements: warnings, findings, what key+query changed, advice, notes; in that order."""
    return [*warnings(comparison), *findings(comparison), *wiring(comparison), *advice(comparison), *notes(comparison)]


def findings(comparison: Comparison) -> list[Statement]:
    """Who leads what, by rules 1 to 3."""
    found = []
    shown = () if comparison.likeness == comparison.fidelity else (("Closest to the training pictures", comparison.likeness or ""),)
    for title, key in (("Closest to the subject", comparison.fidelity or ""), *shown, *_ASKED):
        column = comparison.column(key)
        place = standing(comparison, column) if column else None
        if place:
            found.append(_finding(comparison, title, place))
    for column in comparison.columns:
        place = standing(comparison, column) if column.group == "Truth" and column.key != comparison.fidelity else None
        if place:
            found.append(_finding(comparison, f"By what the world knows: {column.short}", place))
    for title, key in _COSTS_ASKED:
        found += _cost_finding(comparison, title, key)
    return found


def _finding(comparison: Comparison, title: str, place: Standing) -> Statement:
    column, leader = place.column, place.leader
    if place.ties and not place.behind and not place.unpaired:
        word = "highest" if column.better == "higher" else "lowest"
        text = (f"There is {NO_DIFFERENCE} between the {words.number_word(len(place.group))}. {leader.title} reads {word} ({reading(leader, column)}), "
                + "ahead of " + words.listing(f"{row.title} by {gap_words(pair, column)}" for row, pair in place.ties))
    else:
        parts = [f"{leader.title} ({reading(leader, column)})"]
        if place.ties:
            parts.append(f"{NO_DIFFERENCE} to " + words.listing(f"{row.title} ({gap_words(pair, column)})" for row, pair in place.ties))
        parts += _behind(place) or (_against_base(comparison, leader, column) if not place.ties else [])
        if place.unpaired:
            parts.append("not compared: " + words.listing(f"{row.title} ({reading(row, column)})" for row in place.unpaired))
        text = "; ".join(parts)
    return Statement("finding", title, text + "." + _scale(comparison, column), tuple(row.row for row in place.group))


def _behind(place: Standing) -> list[str]:
    """The nearest method measurably behind in full, the others by their smallest gap."""
    if not place.behind:
        return []
    column, (first, gap) = place.column, place.behind[0]
    text = f"measurably ahead of {first.title} (by {gap_words(gap, column)})"
    rest = place.behind[1:]
    if len(rest) == 1:
        text += f" and {rest[0][0].title} (by {gap_words(rest[0][1], column)})"
    elif rest:
        text += f" and of the other {words.number_word(len(rest))} by {words.score(min(pair.difference for _, pair in rest), column.decimals)} or more"
    return [text]


def _scale(comparison: Comparison, column: Column) -> str:
    """Floor and ceiling beside a finding; for prompt fidelity also who fell below the floor."""
    base, real = comparison.row("base"), comparison.row("real")
    known = [f"{name} {words.score(row.scores[column.key].mean, column.decimals)}"
             for name, row in (("untouched base", base), ("real pictures", real)) if row and column.key in row.scores]
    text = f" For scale: {words.listing(known)}." if known and column.key != "drift" else ""
    gone = [row for row in comparison.ranked(column) if isinstance(row.way.get(column.key), int | float)]
    if gone and column.key == comparison.fidelity:
        text += (" Of the way from the untouched base to the true subject: "
                 + words.listing(f"{row.title} {100 * row.way[column.key]:.0f} %" for row in gone) + ".")
    if column.key != "clip_t" or base is None or column.key not in base.scores:
        return text
    gaps = {row.title: comparison.pair(column.key, row.row, "base") for row in comparison.methods}
    below = [title for title, pair in gaps.items() if pair and pair.decided and pair.difference < 0]
    if len(below) == len(gaps) > 1:
        return text + " Every method is measurably below the base here."
    return text + (f" Measurably below the base: {words.listing(below)}." if below else " None is measurably below the base.")


def _against_base(comparison: Comparison, row: Row, column: Column) -> list[str]:
    """A single method has nobody but the base to be compared with."""
    pair = comparison.pair(column.key, row.row, "base")
    if pair is None:
        return []
    side = "measurably above" if pair.difference > 0 else "measurably below"
    return [f"{side if pair.decided else NO_DIFFERENCE + ' to'} the untouched base ({gap_words(pair, column)})"]


def _cost_finding(comparison: Comparison, title: str, key: str) -> list[Statement]:
    """Rule 3. Nothing is said about a single run: it has nobody to be smaller than."""
    ranked = comparison.ranked(_COST[key])
    if len(ranked) < 2:
        return []
    best, worst = ranked[0], ranked[-1]
    group = [row for row in ranked if same_cost(best.cost(key), row.cost(key), key)]
    rows = tuple(row.row for row in group)
    if len(group) == len(ranked):
        return [Statement("finding", title, f"All about equal, between {amount(best, key)} and {amount(worst, key)}.", rows)]
    names = words.listing(f"{row.title}, {amount(row, key)}" for row in group)
    part = words.ratio(best.cost(key), worst.cost(key))
    return [Statement("finding", title, f"{names}; {part} of {worst.title} ({amount(worst, key)}).", rows)]


def wiring(comparison: Comparison) -> list[Statement]:
    """What key+query changed against key+value, when the comparison holds both hypernetworks."""
    value, query = comparison.row("hypernetwork-key-value"), comparison.row("hypernetwork-key-query")
    if value is None or query is None or value.failed or query.failed:
        return []
    changed, same = [], []
    for key, (better, worse) in _WIRING.items():
        column, pair = comparison.column(key), comparison.pair(key, query.row, value.row)
        if column is None or pair is None:
            continue
        gain = pair.difference if column.better == "higher" else -pair.difference
        if pair.decided:
            changed.append(f"{better if gain > 0 else worse} ({column.short} {gap_words(pair, column)})")
        else:
            same.append(f"{column.short} ({gap_words(pair, column)})")
    if not changed and not same:
        return []
    parts = [f"Key+query {words.listing(changed)}"] if changed else []
    parts += [f"{NO_DIFFERENCE} in {words.listing(same)}"] if same else []
    return [Statement("finding", "Key+query against key+value", "; ".join(parts) + ".", (query.row, value.row))]


def notes(comparison: Comparison) -> list[Statement]:
    """How far the numbers reach: prompts, seeds, one subject, and whether the budgets were equal."""
    prompts = comparison.suite.get("subject") or []
    found = []
    if comparison.cells:
        many = subjects(comparison.cells)
        found.append(Statement("note", "How far this reaches", f"{len(many)} subjects, {len(comparison.cells)} comparisons in all; intervals are "
                               "over subjects and seeds. Subjects of another kind may rank the methods differently."))
    elif prompts:
        found.append(Statement("note", "How far this reaches", f"One subject, one training seed, {len(prompts)} subject prompts with "
                               f"{comparison.seeds_of('subject')} seeds each, none of them used in training. Another subject may rank the "
                               "methods differently."))
    counted = [row for row in comparison.methods if row.manifest.get("steps")]
    budgets = {(row.manifest["steps"], row.manifest.get("pictures_seen")) for row in counted}
    if len(budgets) > 1:
        each = words.listing(f"{row.title} {row.manifest['steps']:,}" for row in counted)
        found.append(Statement("note", "Not the same budget", f"The runs differ in steps or pictures seen (steps: {each})."))
    elif len(counted) > 1:
        found.append(Statement("note", "Same budget", f"Every run took {counted[0].manifest['steps']:,} steps over the same pictures, in the "
                               "same order, with the same noise."))
    return found

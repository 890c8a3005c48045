"""Official metrics on hand-computed cases."""

import pytest

from mquant_jax.eval import choices, metrics
from mquant_jax.eval.vqa_text import normalised

ABCD = {"A": "a red car", "B": "two dogs", "C": "3", "D": "Straße"}


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("", ""),
        ("  ", ""),
        ("The Cat.", "cat"),
        ("two", "2"),
        ("None", "0"),
        ("ten", "10"),
        ("1,000", "1000"),
        ("3.5", "3.5"),
        ("3.", "3"),
        ("U.S.A.", "usa"),
        ("3.5.", "3.5"),
        ("dont", "don't"),
        ("couldnt've", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("ow's'at", "ow 's'at"),
        ("what's up?", "what 's up"),
        ("somebody'd", "somebodyd"),
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("a-b", "b"),
        ("top -left", "top left"),
        ("one\ttwo\nan apple", "1 2 apple"),
        ("Café ÉTÉ", "café été"),
        ("日本", "日本"),
        ("twas", "'twas"),
        ("its", "its"),
        ("$5", "$5"),
    ],
)
def test_vqa_text(answer, wanted) -> None:
    assert normalised(answer) == wanted


@pytest.mark.parametrize(
    ("answer", "truths", "wanted"),
    [
        ("cat", ["cat"] * 10, 1.0),
        ("The cat!", ["cat"] * 10, 1.0),
        ("cat", ["cat"] * 4 + ["dog"] * 6, 1.0),
        ("cat", ["cat"] * 3 + ["dog"] * 7, (3 * 2 / 3 + 7) / 10),  # 0.9
        ("cat", ["cat"] * 2 + ["dog"] * 8, (2 / 3 + 8 * 2 / 3) / 10),  # 0.6
        ("cat", ["cat"] + ["dog"] * 9, 9 / 3 / 10),  # 0.3
        ("bird", ["cat"] * 10, 0.0),
        ("", ["cat"] * 10, 0.0),
        ("zwei", ["two"] * 10, 0.0),
    ],
)
def test_vqa_accuracy(answer, truths, wanted) -> None:
    assert metrics.vqa_accuracy(answer, truths) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("answer", "truths", "wanted"),
    [
        ("Invoice 12", ["invoice  12"], 1.0),  # white space and case
        ("abcd", ["abce"], 0.75),
        ("ab", ["ac"], 0.5),  # exactly at the threshold
        ("abc", ["axy"], 0.0),  # 1/3 is below
        ("", ["abc"], 0.0),
        ("", [""], 1.0),
        ("x", ["yes", "x"], 1.0),
        ("Müller", ["Muller"], 5 / 6),
        ("東京都", ["東京"], 2 / 3),
        ("abcd ", ["abcd"], 1.0),
    ],
)
def test_anls(answer, truths, wanted) -> None:
    assert metrics.anls(answer, truths) == pytest.approx(wanted)


def test_levenshtein() -> None:
    cases = {("", ""): 0, ("", "abc"): 3, ("kitten", "sitting"): 3, ("flaw", "lawn"): 2}
    for (a, b), wanted in cases.items():
        assert metrics.levenshtein(a, b) == metrics.levenshtein(b, a) == wanted


@pytest.mark.parametrize(
    ("answer", "truths", "formula", "wanted"),
    [
        ("The sign says CENTRE.", ["centre"], False, 1),
        ("center", ["centre", "cent"], False, 1),
        ("two\nlines", ["two lines"], False, 1),
        ("a b", ["ab"], False, 0),
        ("", ["x"], False, 0),
        ("x ^ { 2 } + 1", ["x^{2}"], True, 1),
        ("X^2", ["x^2"], True, 0),  # formulas are case-sensitive
        ("Größe 5", ["GRÖSSE"], False, 0),
        ("ÉTÉ", ["été"], False, 1),
    ],
)
def test_ocrbench(answer, truths, formula, wanted) -> None:
    assert metrics.contains(answer, truths, formula) == wanted


@pytest.mark.parametrize(
    ("answer", "truth", "wanted"),
    [
        ("105", "100", 1),
        ("105.1", "100", 0),
        ("95", "100", 1),
        ("94.9", "100", 0),
        ("-10", "10", 0),
        ("50%", "0.5", 1),
        ("50%", "50", 0),
        ("50", "50%", 0),
        ("51%", "50%", 1),
        ("0", "0", 1),
        ("0.0", "0", 0),
        ("0.001", "0", 0),
        ("Yes", "yes", 1),
        ("", "yes", 0),
        ("", "", 1),
        ("%", "5", 0),
        ("1,000", "1000", 0),
        (" 12 ", "12", 1),
        ("nan", "12", 0),
        ("inf", "12", 0),
        ("12 apples", "12", 0),
        ("Österreich", "österreich", 1),
    ],
)
def test_chartqa(answer, truth, wanted) -> None:
    assert metrics.relaxed_match(answer, truth) == wanted


@pytest.mark.parametrize(
    ("answer", "mme", "pope"),
    [
        ("Yes", "yes", "yes"),
        ("yes, it is.", "yes", "yes"),
        ("No.", "no", "no"),
        ("  no", "no", "no"),
        ("", "other", "yes"),
        ("There is no dog", "other", "no"),
        ("It is not", "other", "no"),
        ("NO", "no", "yes"),
        ("A dog. No cat.", "other", "yes"),
        ("No, there is", "no", "no"),
        ("¿Sí?", "other", "yes"),
        ("know", "no", "yes"),
        ("Not", "no", "yes"),
    ],
)
def test_yes_and_no(answer, mme, pope) -> None:
    assert (metrics.mme_word(answer), metrics.pope_word(answer)) == (mme, pope)


def test_exact_and_caseless() -> None:
    assert metrics.exact_match(" cat\n", ["dog", "cat"]) == 1
    assert metrics.exact_match("Cat", ["cat"]) == 0
    assert metrics.caseless_match("Cat. ", ["cat"]) == 1
    assert metrics.caseless_match("", ["cat"]) == 0
    assert metrics.caseless_match("STRASSE", ["Straße"]) == 1


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B. two dogs", "B"),
        ("B: because", "B"),
        ("b", None),
        ("A", "A"),
        ("A.", "A"),
        ("The answer is C.", "C"),
        ("The answer is A.", None),
        ("A dog is here", None),
        ("A or B", None),
        ("", None),
        ("two dogs", "B"),
        ("Two Dogs!", "B"),
        ("I see a red car and two dogs", None),
        ("straße", "D"),
        ("Cannot determine the answer: B", None),
        ("B is what I would choose here", None),
        ("**B**", "B"),
        ("E", None),
        ("3", "C"),
        ("3 " * 60, None),
    ],
)
def test_options_by_vlmevalkits_rules(answer, wanted) -> None:
    assert choices.infer_option(answer, ABCD) == wanted


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        ("not (A) but (C)", "C"),
        ("either A or B here", "B"),
        ("B. two dogs", "B"),
        ("", None),
        ("two dogs", None),
        ("I can clearly see two dogs there", "B"),
        ("a red car, and also behind it two dogs", "B"),
        ("b", None),
        ("Einfach die Straße dort vorne nehmen", "D"),
    ],
)
def test_options_by_mmmus_rules(answer, wanted) -> None:
    assert choices.mmmu_option(answer, ABCD) == wanted


@pytest.mark.parametrize(
    ("answer", "truths", "wanted"),
    [
        ("The answer is 12.", ["12"], 1),
        ("x = 3.14159", ["3.14"], 1),
        ("1,200", ["1200"], 1),
        ("12 or 13", ["13"], 1),
        ("so it is Paris", ["paris"], 1),
        ("", ["5"], 0),
        ("apple", ["a"], 0),
        ("vitamin a ", ["a"], 1),
        ("1e3 units", ["1000"], 1),
        ("-5", ["5"], 0),
        ("Berlin\nThe result is Rome", ["berlin"], 0),
        ("Köln", ["KÖLN", "Cologne"], 1),
    ],
)
def test_mmmus_open_questions(answer, truths, wanted) -> None:
    assert choices.mmmu_open_match(answer, truths) == wanted


def test_a_question_with_or_without_options() -> None:
    assert choices.choice_or_text("B. two dogs", "B", ABCD) == (1.0, "B")
    assert choices.choice_or_text("?", "B", ABCD) == (0.0, "")
    assert choices.choice_or_text("Yes.", "yes", {}) == (1.0, "Yes.")

"""A class reward pays for the class and for nothing that merely contains it."""

from __future__ import annotations

import itertools
import time
import unicodedata
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from virft_fast.tasks import REWARDS, labels
from virft_fast.tasks.labels import LEAD_INS, ClosedSet, class_set, key, parse_label, same_label

SETS = {
    "letters": [chr(ord("A") + n) for n in range(26)],
    "options": list("ABCD"),
    "digits": list("0123456789"),
    "numbers": [str(n) for n in range(-20, 180)],
    "halves": [str(n / 2) for n in range(20)],
    "ranges": [f"{n}-{n + 10}" for n in range(0, 100, 10)],
    "mixed ranges": ["0", "10", "20", "0-10", "10-20", "20+", "<10", ">20"],
    "intervals": ["(0, 10]", "(10, 20]", "[0, 10]", "[0, 10)"],
    "signs": ["-5", "5", "+5", "$5", "5%", "5$", ".5", "-.5"],
    "fractions": ["1/2", "1/3", "2/3", "12", "13", "23"],
    "grades": ["A+", "A", "A-", "B+", "B", "B-", "C", "F"],
    "blood": ["A+", "A-", "B+", "B-", "AB+", "AB-", "0+", "0-"],
    "blood groups": ["A", "B", "AB", "0"],
    "languages": ["C", "C++", "C#", "F#", "F", "Objective-C", "R", "Go", "Node.js", ".NET"],
    "ages": ["<18", ">18", "18"],
    "colors": ["red", "green", "blue", "white", "black", "orange", "yellow", "pink", "light blue",
               "dark blue", "off-white", "blue-green"],
    "answers": ["yes", "no"],
    "mask": ["mask", "no mask"],
    "masks": ["with_mask", "without_mask", "mask_weared_incorrect"],
    "apart": ["sun", "flower", "sunflower"],
    "apart twice": ["sun", "flo", "wer", "sunflower"],
    "kinds": ["rose", "car", "bird", "cats", "dogs", "dog rose", "black cat"],
    "makers": ["Boeing", "Airbus", "British Aerospace", "Douglas Aircraft Company", "Cessna",
               "McDonnell Douglas", "Lockheed Corporation", "Cirrus Aircraft", "de Havilland"],
    "hindi": ["बिल्ली", "कुत्ता", "कुत्ते", "गाय", "की", "का", "के", "हाँ", "नहीं"],
    "chinese": ["猫", "狗", "大", "小", "大小", "是", "否", "不是", "熊", "熊猫"],
    "emoji": ["🐱", "🐶", "👨", "👩", "👧", "👨‍👩‍👧", "❤️", "🇩🇪", "🇫🇷", "👍", "👍🏽"],
    "squares": ["x", "x²", "x2", "2", "²"],
    "punctuation": [".", ",", "?", "!", ":", ";", "-", "+", "/", "(", ")"],
    "pets": ["Abyssinian", "american_bulldog", "american_pit_bull_terrier", "Bombay", "boxer",
             "Maine_Coon", "saint_bernard", "staffordshire_bull_terrier", "yorkshire_terrier"],
    "cars": ["AM General Hummer SUV 2000", "Acura TL Sedan 2012", "Acura TL Type-S 2008",
             "Audi S4 Sedan 2012", "Audi S4 Sedan 2007", "BMW M3 Coupe 2012", "BMW M6 Convertible",
             "Ram C/V Cargo Van Minivan 2012", "Ford F-150 Regular Cab 2012", "Ford F-450"],
    "aircraft": ["707-320", "727-200", "737-200", "737-2000", "737-300", "A300B4", "A310",
                 "MD-11", "DC-10", "F-16A/B", "F/A-18", "C-130", "BAE 146-200", "Cessna 172"],
    "flowers": ["pink primrose", "hard-leaved pocket orchid", "colt's foot", "love in the mist",
                "pink-yellow dahlia?", "black-eyed susan", "rose", "tree poppy", "bee balm"],
    "many": [f"class {n}" for n in range(200)],
}  # fmt: skip
JOINERS = (" ", ", ", ",", " or ", "/", " and ", "\n", "; ", "|", ": ", " (", "")
NEGATIONS = (
    "not {}", "no {}", "not a {}", "it is not {}", "this is not a {}.", "it isn't a {}", "no, {}",
    "never {}", "anything but {}", "everything but a {}", "all except {}", "neither {}", "non-{}",
    "{} is wrong", "{}? no", "{}, no", "maybe {}", "probably a {}", "I think it is a {}",
    "the answer is not {}", "there is no {}", "a thing that is not a {}", "without {}", "un{}",
    "不是{}", "这不是{}", "没有{}", "{}ではありません", "これは{}ではない", "{}가 아닙니다",
    "यह {} नहीं है",
    "no es un {}", "ce n'est pas un {}", "das ist kein {}", "keine {}",
    "não é um {}", "non è un {}",
    "это не {}", "không phải là {}", "~{}",
    "nicht {}", "pas {}", "nunca {}", "не {}", "ни {}", "{} 以外", "{}以外", "非{}", "{}を除く",
    "{}じゃない", "{}가 아니다", "{} 제외", "{} नहीं", "{} नहीं है", "{} के अलावा", "≠{}", "¬{}",
    "!{}", "{} ❌",
    *(f"{{}}{end}" for end in (
        ". not", ": no", ") isn't it", ". 不是", ". 不对", ": 错", ") 以外", "、除外", ". nicht",
        ": kein", ". falsch", ". außer", ": pas", ". n'est", ". sauf", ": no es", ". nunca",
        ". ではない", ": 違う", ". 아니다", ": 제외", ". нет", ": не", ". кроме", ". नहीं", ": गलत",
    )),
)  # fmt: skip


def wrapped(text):
    return f"<think>{text}?</think><answer>{text}</answer>"


def earns(reward, answers, truths, **known):
    """Each answer and how many truths earn it the reward."""
    scores = Counter()
    texts = [wrapped(answer) for answer in answers]
    for truth in truths:
        columns = {name: [value] * len(texts) for name, value in known.items()}
        got = REWARDS[reward](None, texts, [f"<answer>{truth}</answer>"] * len(texts), **columns)
        scores.update({n: value for n, value in enumerate(got) if value})
    return [(answer, scores[n]) for n, answer in enumerate(answers)]


def attempts(names, joiners=JOINERS, most=9):
    """What a policy may try: one answer for all, answers of several labels, and negations."""
    few = sample(names, most)
    answers = [*(names if len(names) < 50 else few), "", " ", ".", "?", "the"]
    answers += [a + joiner + b for a, b in itertools.permutations(few, 2) for joiner in joiners]
    answers += [" ".join(three) for three in itertools.permutations(few[:6], 3)]
    answers += [joiner.join(names) for joiner in (" ", ", ", "/")]
    return answers, [negation.format(label) for negation in NEGATIONS for label in few]


def sample(names, most=9):
    """All of a small set, some of a large one: the pairs are the square of it."""
    return names if len(names) <= most else names[:: len(names) // most + 1]


@pytest.mark.parametrize("name", SETS)
def test_no_answer_earns_more_than_the_rows_it_is_true_of(name):
    names = SETS[name]
    truths = sample(names) if len(names) > 50 else names
    meant = Counter(map(key, truths))
    meant[""] = 0
    for answer, earned in earns("accuracy", sum(attempts(names), []), truths):
        assert earned <= meant[key(answer)], answer


@pytest.mark.parametrize("name", SETS)
def test_in_a_known_set_an_answer_is_no_class_but_its_own(name):
    known = ClosedSet(SETS[name])
    for answer in sum(attempts(SETS[name]), []):
        label = known(wrapped(answer))
        assert label is None or key(label) == key(answer), answer


@pytest.mark.parametrize("name", SETS)
def test_every_label_is_itself_and_no_other(name):
    assert len({key(label) for label in SETS[name]}) == len(SETS[name])
    labels_of_set = ClosedSet(SETS[name])
    for label in SETS[name]:
        assert labels_of_set(wrapped(label)) == label
        assert same_label(f" {label.upper()} ", label) or "²" in label or "ß" in label


SPELLINGS = [
    ("Maine_Coon", "maine coon"), ("mainecoon", "maine coon"), ("MAINE-COON.", "maine coon"),
    ('"maine coon"', "maine coon"), ("“Maine Coon”!", "maine coon"),
    ("**maine coon**", "maine coon"),
    ("\\boxed{maine coon}", "maine coon"), ("(maine coon)", "maine coon"), ("「猫」。", "猫"),
    ("ＭＤ−１１", "MD-11"), ("rubik’s cube", "rubiks cube"), ("0 – 10", "0-10"), ("C ++", "c++"),
    ("St. Bernard", "st bernard"), ("e\u0301te\u0301", "été"), ("5.", "5"), ("$ 5", "$5"),
    ("- a dog", "dog"), ("❤", "❤️"), ("straße", "STRASSE"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "label"), SPELLINGS)
def test_spellings_of_one_name(answer, label):
    assert same_label(answer, label)


SENTENCES = {
    "English": ("cat", ["This is a cat.", "It's a cat", "the answer is: a cat", "Answer: cat",
                        "The animal in the image is a cat", "The species of the pet is: cat",
                        "species name: cat", "The breed name is cat", "Name: cat"]),
    "Chinese": ("猫", ["这是一只猫", "答案是猫", "图片中的动物是猫。", "答案：猫", "這是猫"]),
    "Japanese": ("猫", ["これは猫です", "答えは猫です。", "この動物は猫だ"]),
    "Korean": ("고양이", ["이것은 고양이입니다", "정답: 고양이", "이 동물은 고양이이다"]),
    "Hindi": ("बिल्ली", ["यह एक बिल्ली है", "उत्तर: बिल्ली", "इस चित्र में एक बिल्ली है।"]),
    "Spanish": ("gato", ["Esto es un gato", "es un gato", "La respuesta es gato"]),
    "French": ("chat", ["C’est un chat", "La réponse est : chat", "il s'agit d'un chat"]),
    "German": ("katze", ["Das ist eine Katze", "Die Antwort lautet Katze", "Antwort: Katze"]),
    "Italian": ("gatto", ["Questo è un gatto", "la risposta è gatto", "è un gatto"]),
    "Portuguese": ("gato", ["Isto é um gato", "A resposta é gato", "é um gato"]),
    "Russian": ("кошка", ["Это кошка", "Это — кошка", "Ответ: кошка", "На фото изображена кошка"]),
    "Vietnamese": ("mèo", ["Đây là một con mèo", "Đáp án là mèo", "Câu trả lời: mèo"]),
}  # fmt: skip


@pytest.mark.parametrize("language", LEAD_INS)
def test_a_sentence_around_the_class_in_every_language(language):
    label, sentences = SENTENCES[language]
    for sentence in sentences:
        assert same_label(sentence, label), sentence
        assert ClosedSet([label, "dog"])(sentence) == label, sentence


@pytest.mark.parametrize(
    "answer", ["a dog that is not a cat", "cats", "this catalog", "this islandcat", "cat dog",
               "a cat or something", "the answer is cat or dog", "is a cat? no", "concat", "c a t"],
)  # fmt: skip
def test_other_texts_are_not_the_class(answer):
    assert not same_label(answer, "cat")
    assert ClosedSet(["cat", "bird"])(answer) is None


def test_what_an_object_is_may_only_stand_after_its_name():
    known = ClosedSet(["rose", "black", "pot", "siamese"])
    assert known("rose flower") == "rose" and known("a siamese cat") == "siamese"
    assert not any(map(known, ["dog rose", "jet black", "flower pot", "cat dog"]))


@pytest.mark.parametrize(
    ("names", "answer", "label"),
    [
        (["rose", "cars", "birds"], "rose car bird", None),
        (["rose", "dog rose"], "rose dog", None),
        (["rose", "balloon flower"], "rose flower", "rose"),
        (["British Aerospace", "Boeing"], "British Boeing", None),
        (["british shorthair", "american shorthair"], "british american shorthair", None),
        (["737-800", "Boeing 717"], "Boeing 737-800", "737-800"),
        (["737-800", "Boeing 717"], "a Boeing 717 aircraft", "Boeing 717"),
        (["737-800", "Boeing 717"], "Boeing 717 737-800", None),
        (["Fokker 100", "DC-10"], "Fokker Fokker 100", "Fokker 100"),
        (["BAE 146-200", "DC-10"], "British Aerospace BAE 146-200", "BAE 146-200"),
        (["sun", "flo", "wer", "sunflower"], "sun flo wer", None),
        (["cat", "boxed"], "\\boxed{cat}", "cat"),
        (SETS["pets"], "A Maine Coon cat", "Maine_Coon"),
        (SETS["pets"], "Species name: a Maine Coon cat", "Maine_Coon"),
    ],
)  # fmt: skip
def test_a_word_of_another_label_is_not_neutral(names, answer, label):
    assert ClosedSet(names)(answer) == label


def test_the_end_of_a_sentence_turns_no_name_into_another():
    names = ["고양", "고양이", "사", "사이다", "から", "からだ"]
    ends = ("다", "이다", "에요", "이에요", "예요", "입니다", "だ", "です")
    sentences = [name + end for name in names for end in ends]
    assert all(earned <= 1 for _, earned in earns("accuracy", sentences, names))
    known = ClosedSet(names)
    assert (
        known("고양이다") is None and known("からだ") == "からだ" and known("からだだ") == "からだ"
    )
    for sentence in ("이것은 고양이다", "고양이에요", "고양이이다", "고양이입니다"):
        assert ClosedSet(["고양이", "개"])(sentence) == "고양이", sentence
    assert ClosedSet(["고양이", "다"])("고양이다") is None
    assert same_label("猫だ", "猫") and same_label("5이다", "5")


@pytest.mark.parametrize(
    "pair", [("5 mW", "5 MW"), ("5mJ", "5 MJ"), ("5 Pa", "5 pA"), ("0.5 MPa", "0.5 mPa"),
             ("5-mV", "5-MV"), ("5 mWです", "5 MW")],
)  # fmt: skip
def test_prefixes_of_units_keep_their_case(pair):
    assert not same_label(*pair) and not same_label(*reversed(pair))
    assert same_label(pair[1].replace(" ", ""), pair[1]) and same_label("5 MWです", "5 MW")


def test_other_letters_of_units_do_not():
    for pair in [
        ("10 KG", "10 kg"),
        ("500 Mg", "500 mg"),
        ("5 PM", "5 pm"),
        ("5 MM", "5 mm"),
        ("5 MB", "5 mb"),
    ]:
        assert same_label(*pair), pair
    assert same_label("Model 5 Max", "model 5 max") and same_label("MW", "mw")


def test_an_article_that_is_a_label_is_not_dropped():
    known = ClosedSet(["cat", "the", "dog", "an"])
    assert known("the cat") is None and known("an") == "an" and known("a cat") == "cat"


def test_an_article_is_no_label():
    assert not same_label("It is a dog", "a")
    assert not same_label("a b", "b")
    assert same_label("the answer is a", "A")


def test_a_class_set_may_come_with_each_row():
    answers, truths = ["MD11", "MD11", "MD11"], ["MD-11"] * 3
    sets = [["MD-11", "DC-10"], None, ["MD-11", "MD1-1"]]
    accuracy = REWARDS["accuracy"]
    assert accuracy(None, answers, truths) == [0, 0, 0]
    assert accuracy(None, answers, truths, classes=sets) == [1, 0, 0]
    assert accuracy(None, answers, truths, options=sets) == [1, 0, 0]
    assert accuracy(None, answers, truths, classes=["MD-11", "DC-10"]) == [1, 1, 1]
    assert accuracy(None, ["b"], ["B"], options=[["a cat", "a dog"]]) == [1]


@pytest.mark.parametrize(
    "names",
    [["cat", "Cat"], ["a b c", "a_b_c"], ["5", "5."], ["hotdog", "hot dog"], ["é", "e\u0301"]],
)
def test_a_set_that_collides_is_refused(names):
    message = f"{names[0]!r} and {names[1]!r}"
    for make in (ClosedSet, class_set):
        with pytest.raises(ValueError) as caught:
            make([*names, "other"])
        assert all(repr(name) in str(caught.value) for name in names), message
    with pytest.raises(ValueError, match="use one spelling per class"):
        REWARDS["accuracy"](None, ["x"], [names[0]], classes=names)


@given(st.text(), st.text(min_size=1))
def test_any_text_has_a_stable_key(text, label):
    assert key(key(text)) == key(text) or len(text) > 0
    same_label(text, label)
    ClosedSet([label])(text)


def test_long_texts_are_composed_in_pieces(monkeypatch):
    """Composing takes quadratic time in a run of combining marks."""
    sizes = []

    class Counting:
        category = staticmethod(unicodedata.category)

        @staticmethod
        def normalize(form, text):
            sizes.append(len(text))
            return unicodedata.normalize(form, text)

    monkeypatch.setattr(labels, "unicodedata", Counting)
    text = "a" + "\u0301\u0316" * 20_000
    parse_label(text)
    assert max(sizes) <= 1000 and sum(sizes) <= 2 * len(text)


@pytest.mark.parametrize(
    "piece", ["\u0301\u0316", "a\u0316", "a ", "- ", "'a", "«", "( ", "a.", "1 ", ".", "!", " ."]
)
def test_reading_a_label_takes_linear_time(piece):
    def seconds(count):
        text, times = piece * count + "a", []
        for _ in range(3):
            key.cache_clear()
            start = time.process_time()
            parse_label(text), key(text)
            times.append(time.process_time() - start)
        return min(times)

    assert seconds(32_000) < 120 * seconds(1000) + 0.05  # quadratic: 1024 times

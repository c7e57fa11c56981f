"""Class names in answers: how they are normalized, and which class of a closed set is meant.

Rewards and evaluation compare `key`s. A key ignores what never distinguishes two classes: case,
spaces, `_`, full-width forms, punctuation around a name, and the style of quotes and dashes. It
keeps what may distinguish them: signs, digits, decimal points, combining marks, symbols. An answer
is a name, alone or after a lead-in ("this is a ..."). Anything else, such as a second name, "not"
or "maybe", makes it a different text. So no answer earns a reward that a careful reader would deny.

Every function accepts any text and takes linear time.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache

# More labels than this, and more than one per two rows, are free-form answers, not classes.
MANY_LABELS = 200
MAX_EXTRA_CHARS = 200  # around a class name; every lead-in is shorter than this
_MAX_LEAD_INS = 3  # "The answer is: this is a cat" has two
_MAX_PEELS = 8  # pairs of quotes or brackets around an answer
_CHUNK = 1000  # characters composed at once, because the time is quadratic in combining marks

# --- Texts -----------------------------------------------------------------------------------


_MARK = re.compile(r"<\|\w+\|>")  # the model family's text markers


def answer_text(text: str) -> str:
    """The content of the last `<answer>`, whose closing tag may be missing.

    Without an `<answer>`, the text after the thinking, or the whole text. The model family's
    markers, such as `<|box_start|>`, are removed.
    """
    return _MARK.sub("", marked_answer(text)).strip()


def marked_answer(text: str) -> str:
    """Like `answer_text`, but keeps the model family's text markers and surrounding spaces."""
    start = text.rfind("<answer>")
    if start < 0:
        end_of_thought = text.rfind("</think>")
        return text[end_of_thought + len("</think>") :] if end_of_thought >= 0 else text
    body = text[start + len("<answer>") :]
    end = body.find("</answer>")
    return body if end < 0 else body[:end]


_WIDE = {code: unicodedata.normalize("NFKC", chr(code)) for code in range(0xFF01, 0xFFEF)}
_QUOTES = dict.fromkeys(map(ord, "‘’‚‛′ʼ`´"), "'") | dict.fromkeys(map(ord, "“”„‟″«»"), '"')
_DASHES = dict.fromkeys(map(ord, "‐‑‒–—―−﹣"), "-")
# Invisible characters. Joiners and flag tags stay: they distinguish emoji and Indic words.
_INVISIBLE = dict.fromkeys(
    [0xAD, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2060, 0x206A), 0xFE0E, 0xFE0F]
)
_FOLDED = {**_WIDE, **_QUOTES, **_DASHES, **_INVISIBLE, 0xFEFF: None, ord("_"): " "}
# Mega-, peta- and pascal after a number: "5 MW" is not "5 mW". In "MM" and "PM", capitals don't
# matter.
_LARGE = re.compile(
    r"(?<=\d)[ -]?[MP](?=(?:[AaJNFHTS\u03a9\u2126]|Wh?|VA?|eV|Hz|Pa|Bq|Gy|Sv|ohm|bar)(?![A-Za-z]))"
)


def fold(text: str) -> str:
    """The text without meaningless differences: lower case, composed Unicode, one style of quotes,
    dashes and spaces, no `_`. _LARGE prefixes become small capitals, which casefold keeps."""
    text = " ".join(text.translate(_FOLDED).split())
    text = _LARGE.sub(lambda m: m[0].replace("M", "ᴍ").replace("P", "ᴘ"), text).casefold()
    starts = range(0, len(text), _CHUNK)
    return "".join(unicodedata.normalize("NFC", text[at : at + _CHUNK]) for at in starts)


@lru_cache(maxsize=1 << 16)
def _kind(char: str) -> str:
    """`a` letter, `m` combining mark, `1` digit or number, `e` other symbol; itself if ASCII."""
    if char.isalpha():
        return "a"
    if char.isnumeric():
        return "1"
    if char.isascii():
        return char
    return {"M": "m", "S": "e", "C": "m"}.get(unicodedata.category(char)[0], ".")


def _shape(text: str) -> str:
    """The kind of each character."""
    return "".join(map(_kind, text))


def words(text: str) -> list[str]:
    """Runs of letters, marks and digits, lower case; everything else separates them."""
    text = fold(text)
    return [text[run.start() : run.end()] for run in re.finditer("[am1]+", _shape(text))]


def parse_label(text: str) -> list[str]:
    """Words of the answer, lower case, without punctuation; empty if there are none."""
    return words(answer_text(text))


_WRAPPERS = ('""', "''", "()", "[]", "{}", "「」", "『』", "《》", "【】", "〈〉", "$$", "**")
_BOXED = re.compile(r"(?s)\\(?:(?:boxed|text|mathrm|mathbf|textbf) ?\{|[([])(.*)(?:\}|\\[)\]])")
_OPENING = re.compile(r"[-*•] (?=[^\d.$€£¥₹])|[:;?¿¡•·'\"]|[.,](?! ?\d)|#+ ")
_CLOSING = " .,:;?。、।…‥"
# Not after a digit, where they mean feet, inches or a factorial.
_UNPAIRED = re.compile(r"(?<=\D)(?:'|\"|!!?!?)$")


def peel(text: str) -> str:
    """Strip the quotes, brackets and punctuation around a folded text. A sign or point before a
    digit stays, and a text of only punctuation stays as it is."""
    for _ in range(_MAX_PEELS):
        if not re.search("[am1e]", _shape(text)):
            break
        before = text
        inside = text[1:-1]
        # Brackets around a comma may be an interval: (0, 10] is not [0, 10).
        if text[:1] + text[-1:] in _WRAPPERS and "," not in inside:
            text = inside
        if boxed := _BOXED.fullmatch(text):
            text = boxed[1].strip()
        if opening := _OPENING.match(text):
            text = text[opening.end() :]
        text = _UNPAIRED.sub("", text.rstrip(_CLOSING)).strip()
        if text == before:
            break
    return text


_LONE = re.compile("(?<![am])am*(?![am])")  # a word of one letter
_APOSTROPHE = re.compile(r"(?<=[^\W\d])'(?=[^\W\d])")  # rubik's
_GAPS = re.compile(r"(?P<words>(?<=[ams])(?:\.? | ?- ?)(?=[as]))|(?P<numbers>(?<=1) (?=[.1]))| ")


@lru_cache(maxsize=1 << 13)
def key(text: str) -> str:
    """A normal form that all spellings of a name share; "" for a text without content.

    Removes spaces, `-`, `_` and apostrophes between letters, unless that would join two numbers or
    join a single letter to its neighbor: "1 2" is not "12" and "A B" is not "AB". A hyphen next to
    a digit stays.
    """
    return _key(peel(fold(text)))


@lru_cache(maxsize=1 << 14)
def _key(text: str) -> str:
    text = _APOSTROPHE.sub("", text)
    shape = _LONE.sub(lambda match: "s" * len(match[0]), _shape(text))
    kept, last = [], 0
    for gap in _GAPS.finditer(shape):
        start, end = gap.span()
        lone = gap["words"] and "s" in (shape[start - 1], shape[end])
        kept += [text[last:start], " " if lone or gap["numbers"] else ""]
        last = end
    return "".join([*kept, text[last:]])


# --- Lead-ins --------------------------------------------------------------------------------

_RIGHT = "(?:final |correct |right |best )?"
_THING = (
    rf"{_RIGHT}(?:answer|class|label|category|species|breed|make|model|type|name|object|subject|"
    "image|picture|photo|photograph|animal|plant|flower|pet|car|aircraft|airplane|plane|dog|cat|"
    "bird|thing|result|number|digit|letter|word|value|color|colour|sign|option|choice)(?: name)?"
)
# Phrases before a name, in folded text, by language. None of them expresses negation or doubt.
LEAD_INS: dict[str, str] = {
    "English": rf"(?:(?:so|thus|therefore),? )?(?:(?:(?:this|that|it|(?:(?:the|my|this|its) )?"
    rf"{_THING}(?: (?:of|in|on) (?:the|this) {_THING}){{0,2}})"
    rf"(?:'s| is| are| shows| depicts| contains)(?: called| classified as)?(?: ?:| )"
    rf"|(?:the |my )?{_RIGHT}(?:(?:answer|class|label|category|species|breed|make|model|result)"
    r"(?: name)?|name) ?[:=]|i see ) ?)",
    "Chinese": "(?:(?:[这這那](?:[张張]?(?:图片|圖片|图像|图|圖|照片))?|它|[图圖](?:片|像)?[中里]"
    "|照片[中里])(?:[中里]?的?(?:物体|动物|動物|植物|花|汽?[车車]|飞机|飛機|品种|类别|种类|对象))?"
    "(?:是|为|為|有|:)|(?:(?:正确|最终|最后)的?)?"
    "(?:答案|类别|類別|品种|品種|种类|種類|结果|型号|名称|标签)(?:是|为|為|:)) ?",
    "Japanese": "(?:これ|それ|あれ|この(?:画像|写真|動物|植物|花|車|物体)|答え|答|正解|回答"
    "|種類|品種|クラス)(?:は、?|:) ?",
    "Korean": "(?:(?:이것은|이건|그것은|이 (?:이미지|사진|동물|식물|꽃|자동차|물체)[은는]"
    "|(?:정답|답)은) ?|(?:정답|답) ?: ?)",
    "Hindi": "(?:(?:यह|ये|वह|इस (?:चित्र|छवि|तस्वीर) में|(?:सही )?(?:उत्तर|जवाब))(?: है)?(?: ?:)? )",
    "Spanish": "(?:(?:est[oae]|es[oae])(?: (?:imagen|foto|animal|planta|flor|coche|objeto))? es "
    "|(?:la )?(?:respuesta|clase|especie|etiqueta)(?: correcta| final)? ?(?:es |: ?)"
    "|es (?=un |una |el |la ))",
    "French": "(?:c'est |(?:ceci|cela) est |il s'agit (?:de |d'(?=une? ))"
    "|(?:la )?(?:réponse|classe|espèce)(?: correcte| finale)? ?(?:est |: ?))",
    "German": "(?:(?:das|dies|dieses|es|hier|das bild|dieses bild) (?:ist|zeigt) "
    "|(?:die )?(?:richtige )?(?:antwort|klasse|art) ?(?:ist |lautet |: ?))",
    "Italian": "(?:quest[oa](?: immagine| foto)? è |(?:la )?(?:risposta|classe|specie) ?(?:è |: ?)"
    "|è (?=un |uno |una |il |la |lo ))",
    "Portuguese": "(?:(?:ist|iss|est|ess)[oae](?: imagem| foto)? é "
    "|(?:a )?(?:resposta|classe|espécie)(?: correta| final)? ?(?:é |: ?)|é (?=uma? |o |a ))",
    "Russian": "(?:это (?:- )?|(?:правильный )?ответ ?[:-] ?"
    "|на (?:изображении|картинке|фото|фотографии) (?:- )?"
    "(?:изображ[её]н[аоы]? |показан[аоы]? )?)",
    "Vietnamese": "(?:(?:đây|nó|đó|hình này|hình ảnh này|bức ảnh này)(?: chính)? là "
    "|(?:đáp án|câu trả lời)(?: đúng)? ?(?:là |: ?))",
}
_LEAD_IN = re.compile(f"^(?:{'|'.join(LEAD_INS.values())})")
# Sentence endings after a name: first those that can't be part of the name, then those that can.
_TAIL = re.compile(
    "(?:です|でした|である|(?<![ぁ-ん])だ|입니다|예요|(?<=[이\x00-\x7f])이(?:다|에요)| है| हैं)$"
)
_TAILS_OF_SETS = ("이다", "다", "이에요", "에요", "だ")  # 고양이다: 고양이 or 고양
_COUNTED = "[只隻条條个個头頭匹朵棵株辆輛架艘张張把种種位台部]"
# At least three letters must follow: "a b+" is not b+ and "a ab" is not ab.
_ARTICLE = re.compile(
    "^(?:(?:an? |the |un[aeo]? |el |l[aeo] |les |los |las |l'|un'|eine?[nm]? |der |die |das |il |"
    "uma? |o |एक |một (?:con |cái |chiếc |quả |bông |cây )?|con |chiếc )"
    rf"(?=[^\W\d]{{3}}|[^\W\d][^\x00-\x7f])|一{_COUNTED}(?=[^\W\d]))"
)


@lru_cache(maxsize=1 << 12)
def readings(text: str) -> tuple[str, ...]:
    """The folded texts that an answer may stand for.

    The first is the answer itself. Each further one has one more thing removed: lead-ins, then the
    sentence ending, then the article.
    """
    texts = [peel(fold(text))]
    for pattern in [*[_LEAD_IN] * _MAX_LEAD_INS, _TAIL, _ARTICLE]:
        shorter = peel(pattern.sub("", texts[-1], count=1))
        if shorter and shorter != texts[-1]:
            texts.append(shorter)
    return tuple(texts)


def same_label(answer: str, label: str) -> bool:
    """Whether an answer means a label when the class set is unknown: equal keys, after lead-ins."""
    wanted = key(label)
    if not wanted or len(answer) > len(label) + MAX_EXTRA_CHARS:
        return False
    return any(_key(reading) == wanted for reading in readings(answer))


# --- Closed sets -----------------------------------------------------------------------------

# Words that may follow a class name of a closed set to say what kind of thing it is. They may not
# precede it: a "dog rose" is not a rose.
KINDS = frozenset(
    "species breed flower plant car vehicle dog cat bird aircraft airplane plane jet "
    "helicopter".split()
)
# Makers' names, which may precede or follow a class name.
MAKERS = frozenset(
    "aerospace airbus antonov atr aviation beechcraft boeing bombardier british canadair cessna "
    "cirrus company corporation dassault de havilland dornier douglas embraer eurofighter "
    "fairchild fokker gulfstream hawker siddeley ilyushin lockheed martin mcdonnell panavia piper "
    "robin saab supermarine tupolev yakovlev".split()
)
_NEUTRAL = KINDS | MAKERS


class ClosedSet:
    """Finds which label of a fixed set an answer gives.

    An answer gives a label if one of its readings has the same key. Failing that, hyphens and
    spaces may differ ('MD11' for 'MD-11') if no other label is spelled that way. MAKERS may stand
    before or after the label, and KINDS after it, unless the word belongs to another label whose
    other words are neutral or also occur in the answer.

    Args:
        labels: in the form to return; labels without content are left out.
    Raises:
        ValueError: two labels have the same key; names them.
    """

    def __init__(self, labels: Iterable[str]) -> None:
        self._by_key: dict[str, str] = {}
        self._by_letters: dict[str, list[str]] = {}
        for label in labels:
            name = key(label)
            other = self._by_key.setdefault(name, label) if name else label
            if other != label:
                raise ValueError(
                    f"expected labels that differ in more than case, spaces, '_' and punctuation, "
                    f"got {other!r} and {label!r}; use one spelling per class, or rename one"
                )
        self.labels = list(self._by_key.values())
        self._longest = max(map(len, self.labels), default=0)
        self._partly_neutral = [stems for stems in map(_stems, self.labels) if stems & _NEUTRAL]
        for label in self.labels:
            self._by_letters.setdefault("".join(_parts(label)), []).append(label)

    def __call__(self, text: str) -> str | None:
        """The label that the answer gives; None if it gives no label or several."""
        text = answer_text(text)
        if len(text) > self._longest + MAX_EXTRA_CHARS:
            return None
        whole, *shorter = readings(text)
        candidates = [whole, *(r for r in shorter if self._drops_no_label(whole, r))]
        for reading in candidates:
            if (label := self._by_key.get(_key(reading))) is not None:
                apart = words(reading)  # 'sun flower' is two labels, unless one is written so
                return None if apart != words(label) and self._is_row(apart, " ") else label
        stems = (candidates[-1].removesuffix(t) for t in _TAILS_OF_SETS if t not in self._by_key)
        named = {self._by_key[stem] for stem in map(_key, stems) if stem in self._by_key}
        if named:
            return named.pop() if len(named) == 1 else None
        for reading in [*candidates, *self._without_neutral(candidates[-1])]:
            if (label := self._joined(reading)) is not None:
                return label
        return None

    def _drops_no_label(self, whole: str, reading: str) -> bool:
        """Whether none of the words that a reading omits names a class: "a ab" is not ab."""
        dropped = Counter(words(whole)) - Counter(words(reading))
        return not any(_key(word) in self._by_key for word in dropped)

    def _without_neutral(self, reading: str) -> Iterator[str]:
        """Yield the reading again after each removal of a neutral word from its ends."""
        left, written = reading.split(), _stems(reading) | _NEUTRAL
        for end, rest, neutral in ((0, slice(1, None), MAKERS), (-1, slice(-1), _NEUTRAL)):
            while len(left) > 1 and left[end] in neutral:
                kept = _stems(" ".join(left[rest]))
                if any(left[end] in s <= written and not s <= kept for s in self._partly_neutral):
                    break  # "rose car" means two things if "car" is a label
                left = left[rest]
                if not _NEUTRAL.issuperset(left):  # "cat dog" is two animals
                    yield " ".join(left)

    def _is_row(self, text: Sequence[str], space: str) -> bool:
        """Whether a sequence of letters or words is several labels in a row."""
        ends, size = [0], len(text)
        for end in range(1, size + 1):
            runs = (text[start:end] for start in ends if end - start < size)
            if any(_key(space.join(run)) in self._by_key for run in runs):
                ends.append(end)
        return ends[-1] == size

    def _joined(self, reading: str) -> str | None:
        """The only label with these letters, unless the letters are several labels in a row.

        Each break in the answer must be in the label, too, or separate a letter from a digit, or
        separate two words of at least two letters.
        """
        chunks = _parts(reading)
        letters = "".join(chunks)
        labels = self._by_letters.get(letters, ())
        if len(labels) != 1 or self._is_row(letters, ""):
            return None
        borders, place = set(itertools.accumulate(map(len, _parts(labels[0])))), 0
        for left, right in itertools.pairwise(chunks):
            place += len(left)
            digits = left[-1].isdecimal(), right[0].isdecimal()
            apart = digits[0] != digits[1] or (not any(digits) and min(len(left), len(right)) > 1)
            if place not in borders and not apart:
                return None
        return labels[0]


def class_set(solutions: Sequence[str]) -> ClosedSet | None:
    """The labels in all solutions of a split, sorted; None if there are too many to be classes.

    Raises:
        ValueError: two labels have the same key; names them.
    """
    labels = sorted({answer_text(solution) for solution in solutions})
    few = len(labels) <= max(MANY_LABELS, len(solutions) // 2)
    return ClosedSet(labels) if few and labels else None


def _parts(text: str) -> list[str]:
    """The text, folded and split at hyphens and spaces between letters or digits."""
    text = _APOSTROPHE.sub("", peel(fold(text)))
    gaps = [gap.span() for gap in re.finditer(r"(?<=[am1])(?:\.? | ?- ?)(?=[a1])", _shape(text))]
    starts, ends = [0, *(end for _, end in gaps)], [*(start for start, _ in gaps), len(text)]
    return [text[start:end] for start, end in zip(starts, ends, strict=True)]


def _stems(text: str) -> frozenset[str]:
    """The words of a text, without a plural s."""
    return frozenset(w if w in _NEUTRAL else w.removesuffix("s") for w in words(text))


def mentioned(text: str, names: Sequence[str]) -> list[str]:
    """Which of `names` an answer mentions, in the order of `names`.

    An answer mentions a name if it has the name's words in a row. If two names start at the same
    word, only the longer one counts: 'hot dog' is not a dog.
    """
    by_words = {tuple(words(name)): name for name in names}
    sizes = sorted({len(run) for run in by_words if run}, reverse=True)
    written, matches, at = parse_label(text), set(), 0
    while at < len(written):
        runs = (tuple(written[at : at + size]) for size in sizes)
        run = next((run for run in runs if run in by_words), written[at : at + 1])
        matches.add(by_words.get(tuple(run)))
        at += len(run)
    return [name for name in names if name in matches]

"""English text into words and sentences, as spaCy's rules for English do it and so the filters of datatrove.

A reimplementation of the rules (spaCy 3.8, MIT licence: prefixes, suffixes, infixes, contractions, abbreviations) that
remembers what it has split: several times faster, without spaCy's dependencies. Rare rules are left out;
benchmarks/filters.py measures how often a filter decides otherwise because of that.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from functools import lru_cache

import regex

# In spaCy's words: letters, lower-case ones and those of scripts without case, upper-case ones and the same.
_ALPHA = r"\p{L}"
_LOWER = r"\p{Ll}\p{Lo}\p{Lm}"
_UPPER = r"\p{Lu}\p{Lt}\p{Lo}\p{Lm}"
_PUNCTUATION = r"…,:;!?¿؟¡()\[\]{}<>_#*&。？！，、；：～·।،۔؛٪"
_QUOTES = r"'\"”“`‘´’‚,„»«「」『』（）〔〕【】《》〈〉〈〉⟦⟧"
_CURRENCY = r"[$£€¥฿₽﷼₴₠-₿]"
_UNITS = (
    "km/h|kmh|km²|km³|km|m/s|m²|m³|dm²|dm³|dm|cm²|cm³|cm|mm²|mm³|mm|mph|mbar|mb|mg|m|ha|µm|nm|yd|in|ft|kg|g|µg|t|lb|oz|"
    "hPa|Pa|MB|kb|KB|gb|GB|tb|TB|T|G|M|K|%"
)
_PREFIX = regex.compile(
    rf"[§%=—–]|\+(?![0-9])|……|[{_PUNCTUATION}]|\.\.+|[{_QUOTES}]|(?:US|C|A)\$|{_CURRENCY}|[\p{{So}}]"
)
_SUFFIX = regex.compile(
    rf"(?:……|[{_PUNCTUATION}]|\.\.+|[{_QUOTES}]|\p{{So}}|['’][sS]|[—–]|(?<=[0-9])\+|(?<=°[FfCcKk])\."
    rf"|(?<=[0-9]){_CURRENCY}|(?<=[0-9])(?:{_UNITS})|(?<=[0-9{_LOWER}%²\-+|{_PUNCTUATION}{_QUOTES}])\."
    rf"|(?<=[{_UPPER}][{_UPPER}])\.)$"
)
_INFIX = regex.compile(
    rf"\.\.+|…|\p{{So}}|(?<=[0-9])[+\-*^](?=[0-9-])|(?<=[{_LOWER}{_QUOTES}])\.(?=[{_UPPER}{_QUOTES}])"
    rf"|(?<={_ALPHA}),(?={_ALPHA})|(?<=[{_ALPHA}0-9])(?:--|---|——|[-–—~])(?={_ALPHA})"
    rf"|(?<=[{_ALPHA}0-9])[:<>=/](?={_ALPHA})"
)
_HOST = r"(?:(?:[A-Za-z0-9\u00a1-\uffff][A-Za-z0-9\u00a1-\uffff_-]{0,62})?[A-Za-z0-9\u00a1-\uffff]\.)+"
_ADDRESS = (
    r"(?:[1-9]\d?|1\d\d|2[01]\d|22[0-3])(?:\.(?:1?\d{1,2}|2[0-4]\d|25[0-5])){2}\.(?:[1-9]\d?|1\d\d|2[0-4]\d|25[0-4])"
)
_URL = regex.compile(
    rf"(?:[\w+\-.]{{2,}}://)?(?:\S+@)?(?:{_ADDRESS}|{_HOST}[{_LOWER}]{{2,63}})(?::\d{{2,5}})?(?:[/?#]\S*)?$"
)
_NEGATED = regex.compile(
    r"(ai|are|ca|could|dare|did|does|do|had|has|have|is|may|might|must|need|ought|sha|should|was|were|wo|would)"
    r"(n['’]?t)(['’]?ve)?"
)
_SHORTENED = regex.compile(
    r"(i|you|he|she|it|we|they|that|there|these|this|those|what|when|where|who|why|how|could|might|must|should|would|let)"
    r"(['’]?(?:ll|d|m|re|s|ve))(['’]?ve)?|(can)(not)|(gon)(na)|(got)(ta)|([1-9]|1[0-2])([ap]\.?m\.?)"
)
_NOT_SHORTENED = """is here whom ill its hell shell shed were well whore lets hows whos"""
_NOT_SPLIT = r"""
Adm. Ak. Ala. Apr. Ariz. Ark. Aug. Bros. C++ Calif. Co. Colo. Conn. Corp. D.C. Dec. Del. Dr. E.G. E.g. Feb. Fla. Ga.
Gen. Gov. I.E. I.e. Ia. Id. Ill. Inc. Ind. Jan. Jr. Jul. Jun. Kan. Kans. Ky. La. Ltd. Mar. Mass. Md. Messrs. Mich. Minn.
Miss. Mo. Mont. Mr. Mrs. Ms. Mt. N.C. N.D. N.H. N.J. N.M. N.Y. Neb. Nebr. Nev. Nov. Oct. Okla. Ore. Pa. Ph.D. Prof. Rep.
Rev. S.C. Sen. Sep. Sept. St. Tenn. Va. Wash. Wis. a.m. and/or co. e.g. i.e. p.m. v.s. vs. w/o ma'am o'clock <space>
'' ' 's 'S 'd 'll 're 'em 'cause ’ ’s — \t \n \") (: (; (= (-: (-; ): )-: 8) 8-) :( :(( :((( :() :) :)) :))) :* :-( :-((
:-((( :-) :-)) :-))) :-* :-/ :-0 :-3 :-> :-D :-O :-P :-X :-] :-o :-p :-x :-| :-} :/ :0 :1 :3 :> :D :O :P :X :] :o :p :x
:| :} ;) ;-) ;D ;_; <.< </3 <3 =( =) =/ =3 =D =[ =] =| >.< >.> >:( >:o @_@ [-: [: [= ]= ^_^ -_- 0.0 0_0 o.o o_o O.O O_O
v.v v_v
"""
_WORDS_OF_THEIR_OWN = frozenset(_NOT_SHORTENED.split())
_WHOLE = frozenset(_NOT_SPLIT.split())
_SENTENCE_ENDS = frozenset("!.?։؟۔܀܁܂߹।॥၊။።፧፨‼‽⁇⁈⁉⸮﹒﹖﹗！．？｡。")
MAX_CACHED_CHARACTERS = 64
"""Characters; longer ones rarely come twice."""
MAX_SPECIAL_CASE, MAX_SUFFIX, MAX_URL = 14, 8, 2048


def split_words(text: str) -> list[str]:
    """The words of a text; punctuation marks are words too."""
    words: list[str] = []
    for chunk in text.split():
        words += _split_cached(chunk) if len(chunk) <= MAX_CACHED_CHARACTERS else _split_chunk(chunk)
    return words


def count_sentences(text: str) -> int:
    """Sentences: one begins behind a mark that ends sentences, with the next word that is no punctuation."""
    count, ended = 1, False
    for word in split_words(text):
        if word in _SENTENCE_ENDS:
            ended = True
        elif ended and not _is_punctuation(word):
            count, ended = count + 1, False
    return count


def _is_punctuation(word: str) -> bool:
    return all(unicodedata.category(character)[0] == "P" for character in word)


@lru_cache(maxsize=1 << 18)
def _split_cached(chunk: str) -> tuple[str, ...]:
    return tuple(_split_chunk(chunk))


def _split_chunk(chunk: str) -> Iterable[str]:
    """What stands between two spaces, taken apart from both ends."""
    before: list[str] = []
    behind: list[str] = []
    begin, end = 0, len(chunk)
    # By positions, not by shorter and shorter strings: a chunk may be a million brackets.
    while begin < end and not (whole := _special_case(chunk, begin, end)):
        prefix, suffix = _PREFIX.match(chunk, begin, end), _suffix_start(chunk, begin, end)
        after_prefix = prefix.end() if prefix else begin
        if prefix and _special_case(chunk, after_prefix, end):
            suffix = end
        elif suffix < end and _special_case(chunk, begin, suffix):
            after_prefix = begin
        elif after_prefix > suffix:
            suffix = end
        if after_prefix == begin and suffix == end:
            break
        if after_prefix > begin:
            before.append(chunk[begin:after_prefix])
        if suffix < end:
            behind.append(chunk[suffix:end])
        begin, end = after_prefix, suffix
    if begin < end:
        before += whole or _split_inside(chunk[begin:end])
    return _merge_emoticons(before + behind[::-1])


def _merge_emoticons(words: list[str]) -> list[str]:
    """The words, with two marks that are an emoticon together as one."""
    joined: list[str] = []
    for word in words:
        if joined and len(word) == 1 and not word.isalnum() and joined[-1] + word in _WHOLE:
            joined[-1] += word
        else:
            joined.append(word)
    return joined


def _suffix_start(chunk: str, begin: int, end: int) -> int:
    """Where the mark, unit or the like at the end begins; `end` if there is none."""
    if chunk.endswith("..", begin, end):
        while end > begin and chunk[end - 1] == ".":
            end -= 1
        return end
    found = _SUFFIX.search(chunk, max(end - MAX_SUFFIX, begin), end)
    return found.start() if found else end


def _special_case(chunk: str, begin: int, end: int) -> list[str]:
    """The words of a special case, such as a contraction or an abbreviation; nothing for other chunks."""
    if end - begin > MAX_SPECIAL_CASE:
        return []
    chunk = chunk[begin:end]
    if chunk in _WHOLE or (len(chunk) == 2 and chunk[1] == "." and chunk[0] in "abcdefghijklmnopqrstuvwxyzäöü"):
        return [chunk]
    lowered = chunk[:1].lower() + chunk[1:]
    found = _NEGATED.fullmatch(lowered) or _SHORTENED.fullmatch(lowered)
    if not found or lowered in _WORDS_OF_THEIR_OWN:
        return []
    stem, *ends = (group for group in found.groups() if group)
    return [chunk[: len(stem)], *ends]


def _split_inside(chunk: str) -> list[str]:
    if len(chunk) <= MAX_URL and _URL.match(chunk):
        return [chunk]
    words = []
    position = 0
    for found in _INFIX.finditer(chunk):
        if found.start() > position:
            words.append(chunk[position : found.start()])
        if found.start() > 0:
            words.append(found.group())
            position = found.end()
    if position < len(chunk):
        words.append(chunk[position:])
    return words

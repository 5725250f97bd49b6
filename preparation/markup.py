"""Text of the data as markup for the report: escaped, with white space and control characters visible."""

import difflib
import re

from markupsafe import Markup, escape

WHOLE_PROMPT, WHOLE_ANSWER = 900, 3600  # characters; of a longer one the middle is folded
WHOLE_MATCH = 320  # characters; where two duplicates agree for longer, the middle is left out
COMPARED = 2000  # characters of a text that are compared: the time of a comparison grows with their square

# Characters that a browser or a terminal obeys or hides: control characters other than tab and newline, marks of
# writing direction, blanks of no width (but not the two joiners, which emoji and Indian scripts need), halves of
# surrogate pairs.
_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)
# A blank is plain to see between two words, but not in a run, beside a line's end, or where a stretch starts or ends.
_UNSEEN = re.compile(
    rf"(?P<newline>\n)|(?P<tab>\t)|(?P<space> {{2,}}|^ | $)|(?P<acting>{_ACTING.pattern})", re.MULTILINE
)
# Words with the blank after them; in scripts that have no blanks, single characters.
_WORDS = re.compile("[\u2e80-\U0010ffff]\\s*|[^\\s\u2e80-\U0010ffff]+\\s*|\\s+")


def harmless(text: str) -> str:
    """`text` with control characters spelled out: the escape character as ⟨U+001B⟩."""
    return _ACTING.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def visible(text: str) -> Markup:
    """`text` as markup in which newlines, tabs, and blanks that are easily missed can be seen."""
    parts, last = [], 0
    for match in _UNSEEN.finditer(text):
        # The page's style draws the sign for a newline, so that what is copied from it is the text.
        mark = '<i class="{}"></i>\n' if match["newline"] else '<i class="{}">{}</i>'
        parts += [escape(text[last : match.start()]), Markup(mark).format(match.lastgroup, harmless(match[0]))]
        last = match.end()
    return Markup("").join([*parts, escape(text[last:])])


def breakable(name: str) -> Markup:
    """A name as markup that a narrow column breaks at its signs rather than inside a word."""
    return Markup(re.sub("([-_/.:])", r"\1<wbr>", str(escape(harmless(name)))))


def fold_parts(parts: list[tuple[str, bool]]) -> list[tuple[dict, bool]]:
    """What `segments` returns with each text as `fold` returns it."""
    return [(fold(text, WHOLE_ANSWER if target else WHOLE_PROMPT), target) for text, target in parts]


def fold(text: str, limit: int) -> dict:
    """{"start", "middle", "end"} as markup and "hidden", the characters of the middle: 0 for a text up to `limit`."""
    first, last = len(text), len(text)
    if len(text) > limit:
        first, last = _word_start(text, limit // 2), _word_start(text, len(text) - limit // 3)
    pieces = {"start": text[:first], "middle": text[first:last], "end": text[last:]}
    return {name: visible(piece) for name, piece in pieces.items()} | {"hidden": last - first}


def _word_start(text, place):
    """Where the word at `place` begins, or `place` if that is far off, as in scripts without blanks."""
    near = text[max(0, place - 40) : place]
    blank = max(near.rfind(" "), near.rfind("\n"))
    return place - len(near) + blank + 1 if blank >= 0 else place


def mark_differences(left: str, right: str) -> list[Markup]:
    """Two texts as markup, the words that differ marked, long stretches that agree cut short in the middle."""
    words = [_WORDS.findall(text[:COMPARED]) for text in (left, right)]
    blocks = difflib.SequenceMatcher(None, *words, autojunk=False).get_opcodes()
    marked = []
    for side, text in enumerate((left, right)):
        parts = []
        for kind, *ends in blocks:
            start, end = ends[2 * side : 2 * side + 2]
            stretch = "".join(words[side][start:end])
            parts.append(_shortened(stretch) if kind == "equal" else _marked(stretch))
        if len(text) > COMPARED:
            parts.append(_left_out(len(text) - COMPARED, "more characters"))
        marked.append(Markup("").join(parts))
    return marked


def _marked(stretch):
    body = stretch.rstrip() or stretch
    return Markup("<mark>{}</mark>{}").format(harmless(body), harmless(stretch[len(body) :])) if stretch else ""


def _shortened(stretch):
    if len(stretch) <= WHOLE_MATCH:
        return escape(harmless(stretch))
    head, tail = stretch[: WHOLE_MATCH // 3], stretch[-WHOLE_MATCH // 3 :]
    hidden = _left_out(len(stretch) - len(head) - len(tail), "characters alike")
    return escape(harmless(head)) + hidden + escape(harmless(tail))


def _left_out(count, what):
    return Markup('<span class="out">… {} {} …</span>').format(f"{count:,}", what)

"""Subtitles (.srt and .vtt) -> what is said in each frame. A parser that reads line by line.

A file becomes cues (a begin, an end and lines of text), cues become phrases that do not overlap,
and each phrase is spread evenly over its frames. Between phrases nothing is said. What cannot be
understood is never taken for silence: its frames are unknown, and the reader says why.
"""

import functools
import html
import re
import unicodedata
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from data.controls import spell
from mutual_forcing import Config

# A time: hours (may be absent), minutes, seconds, and a decimal fraction of any number of digits.
TIME = re.compile(r"(?:([0-9]+)\s*:\s*)?([0-9]+)\s*:\s*([0-9]+)(?:\s*[.,:]\s*([0-9]+))?")
WORD_TIME = re.compile(r"<([0-9]+:[0-9:]+[.,][0-9]+)>")  # when the next words of a caption begin
# The tags of both formats, and commands such as {\an8}; all else between brackets is text.
SHORT_TAG = r"</?(?:[bicus]|ruby|rt|em|strong)(?:\.[^<>\s]*)?>"
LONG_TAG = r"</?(?:v|lang|font|span)(?:[\s.][^<>]*)?>"
MARKUP = re.compile(rf"{SHORT_TAG}|{LONG_TAG}|\{{\\[^{{}}]*\}}", re.IGNORECASE)
LINE_BREAK = re.compile(r"<br ?/?>|\\[Nnh]", re.IGNORECASE)
MOST_ROLLED = 4  # lines of a caption that a cue may repeat
MOST_NAMED = 50  # cues that are named for one reason; all are counted
NOT_SAID = ("NOTE", "STYLE", "REGION")  # how paragraphs of a .vtt begin that are not text


class Cue(NamedTuple):
    """One entry of a subtitle file; its times are in seconds, None if they cannot be read."""

    line: int  # of its times in the file
    begin: float | None
    end: float | None
    text: list[str]  # lines, with markup


class Phrase(NamedTuple):
    """Words that are spread evenly over the frames begin <= frame < end."""

    begin: int
    end: int
    text: str


def decode_text(data: bytes) -> str:
    """The text of a file in UTF-8, UTF-16 or UTF-32, with or without a mark, or in Latin-1."""
    # Times are ASCII: in the wider encodings most bytes of them are zero, always the same ones.
    zeros = [data[place::4].count(0) for place in range(4)]
    if sum(zeros) > len(data) // 8:
        width = 32 if min(zeros[1:3]) > len(data) // 32 else 16
        order = "le" if zeros[3] > zeros[0] else "be"
        return data.decode(f"utf-{width}-{order}", "replace")
    text = data.decode("utf-8", "replace")
    unreadable = text.count("\ufffd")
    beyond_ascii = len(text) - len(text.encode("ascii", "ignore"))
    return data.decode("latin-1") if 2 * unreadable > beyond_ascii else text


def seconds_of(match: re.Match | None) -> float | None:
    """A match of TIME -> seconds; None for no match, and for 60 seconds or minutes in it."""
    if match is None:
        return None
    hours, minutes, seconds, fraction = match.groups()
    if float(seconds) >= 60 or (hours and float(minutes) >= 60):
        return None
    whole = 3600 * float(hours or 0) + 60 * float(minutes) + float(seconds)
    return whole + float(f"0.{fraction or 0}")


def read_times(line: str, before: str) -> tuple[float | None, float | None] | None:
    """The line that begins a cue -> its begin and end in seconds; None for any other line.

    Both are None if it was to be such a line, by its looks and by the line before, but is damaged.
    """
    if "-->" not in line and not line[:1].isdigit():
        return None
    left, arrow, right = (part.strip() for part in line.partition("-->"))
    first, second = TIME.match(left), TIME.match(right)
    begin, end = seconds_of(TIME.fullmatch(left)), seconds_of(second)
    if begin is not None and end is not None and begin <= end:
        settings = right[second.end() :]  # the place on the screen may follow, after a space
        if not settings.strip() or settings[0].isspace():
            return begin, end
    opens = not before or before.isdigit()
    if arrow:
        is_damaged = before.isdigit() or first or (opens and second)
    else:
        is_damaged = opens and first and not any(map(str.isalpha, left))
    return (None, None) if is_damaged else None


def read_cues(content: str) -> list[Cue]:
    """The cues of a file, in its own order."""
    lines = [line.strip() for line in re.split(r"\r*\n|\r", content.lstrip("\ufeff"))]
    is_vtt = lines[0].startswith("WEBVTT")
    cues = [Cue(1, None, None, [])]  # the first takes the lines before any times
    above, before, is_said = "", "", True
    for number, line in enumerate(lines, 1):
        times = read_times(line, before)
        text = cues[-1].text
        if times:
            # The last line was the number of this cue or, in a .vtt, its name.
            is_name = is_vtt and not above and text[-1:] == [before]
            if is_name or (text and text[-1].isdigit()):
                text.pop()
            cues.append(Cue(number, *times, []))
            is_said = True
        else:
            if is_vtt and not before:
                is_said = not line.startswith(NOT_SAID)
            if line and is_said:
                text.append(line)
        above, before = before, line
    has_lost_text = cues[0].text and not is_vtt
    return cues if has_lost_text else cues[1:]


@functools.lru_cache(1000)
def plain(text: str) -> str:
    """The words of a text, without markup; spaces between them are single."""
    if "<" in text or "\\" in text:
        text = MARKUP.sub("", WORD_TIME.sub("", LINE_BREAK.sub(" ", text)))
    if "&" in text and len(text) < 4000:  # a number of more digits stops html.unescape()
        text = html.unescape(text)
    if not text.isascii():  # marks of direction and the like are not seen
        text = "".join(x for x in text if unicodedata.category(x) != "Cf")
    return " ".join(text.split())


def is_speakable(text: str, cfg: Config) -> bool:
    """Whether a text has letters a to z, and not more of other alphabets."""
    if text.isascii():
        return any(map(str.isalpha, text))
    symbols = spell(text, 1)
    known = len(symbols) - symbols.count(cfg.silence)
    letters = sum(map(str.isalpha, unicodedata.normalize("NFKD", text)))
    return 0 < letters <= 2 * known


def without_repeats(cues: list[Cue]) -> list[Cue]:
    """The cues; of captions that roll up, without the lines that a cue repeats from the last one.

    Captions roll up if words have times of their own, or if many cues repeat some of their lines.
    """
    shorter, shown, rolling, is_timed = [], [], 0, False
    for cue in cues:
        words = [plain(line) for line in cue.text]
        lines = [line for line, said in zip(cue.text, words) if said]
        words = [said for said in words if said]
        timed = [WORD_TIME.search(line) is not None for line in lines]
        is_timed |= any(timed)
        most = timed.index(True) if any(timed) else len(lines)  # a line with times is new
        most = min(most, len(shown), MOST_ROLLED)
        counts = [n for n in range(1, most + 1) if words[:n] == shown[-n:]]
        count = max(counts, default=0)
        rolling += 0 < count < len(lines)
        shown = words
        if count < len(lines) or not lines:
            shorter.append(cue._replace(text=lines[count:]))
    return shorter if is_timed or (rolling > 1 and 3 * rolling >= len(cues)) else cues


def frame_at(seconds: float, cfg: Config) -> int:
    """The frame that is nearest to a time."""
    return round(min(seconds * cfg.fps, 1e9))


def phrases_of(cue: Cue, cfg: Config) -> list[Phrase]:
    """The words of a cue with their frames: one phrase, or one for each time within its text."""
    first, *rest = WORD_TIME.split("\n".join(cue.text))
    times, texts = [cue.begin], [first, *rest[1::2]]
    for time in rest[::2]:
        seconds = seconds_of(TIME.fullmatch(time)) or times[-1]
        times.append(min(max(seconds, times[-1]), cue.end))
    phrases = []
    for text, begin, end in zip(map(plain, texts), times, [*times[1:], cue.end]):
        begin, end = frame_at(begin, cfg), frame_at(end, cfg)
        if text:
            phrases.append(Phrase(begin, max(begin + 1, end), text))
    return phrases


def part_phrases(phrases: list[Phrase]) -> list[Phrase]:
    """Phrases in the order of time, none of which begins before the last one has ended.

    One that overlaps the next ends where that begins; but the two become one if less
    than half of it would be left, and less than a frame for each letter.
    """
    parted = []
    for phrase in sorted(phrases, key=lambda phrase: phrase.begin):
        if parted and phrase.begin < parted[-1].end:
            last = parted.pop()
            if phrase.begin - last.begin >= min((last.end - last.begin) / 2, len(last.text)):
                parted.append(last._replace(end=phrase.begin))
            else:
                text = f"{last.text} {phrase.text}"
                phrase = Phrase(last.begin, max(last.end, phrase.end), text)
        parted.append(phrase)
    return parted


def why_refused(cue: Cue, cfg: Config, frames: int) -> str:
    """Why a cue cannot be taken; empty if it can."""
    if cue.begin is None:
        return "without readable times"
    begin, end = frame_at(cue.begin, cfg), frame_at(cue.end, cfg)
    text = plain(" ".join(cue.text))
    if begin >= frames:
        return "after the end of the clip"
    if not is_speakable(text, cfg):
        return "without letters a to z"
    return "too short for so many letters" if len(text) > 3 * (end - begin) else ""


def spread(phrase: Phrase, frames: int, cfg: Config) -> list[int]:
    """The first symbols (frames,) of a phrase; pauses are shortened before letters are lost."""
    symbols, length = spell(phrase.text, 1), phrase.end - phrase.begin
    if len(symbols) > length:
        pairs = zip(symbols, [None, *symbols])
        symbols = [x for x, last in pairs if not x == last == cfg.silence]
    return [symbols[frame * len(symbols) // length] for frame in range(frames)]


def read_transcript(path: Path, cfg: Config, frames: int) -> tuple[np.ndarray, str]:
    """A subtitle file -> symbols (F,) of a clip of so many frames, and which cues are not taken.

    The second is a sentence without its subject, empty if all is taken. Raises OSError.
    """
    cues = read_cues(decode_text(path.read_bytes()))
    symbols = np.full(frames, cfg.silence)
    refused, phrases, last_end, is_gap = defaultdict(list), [], 0, False
    for cue in without_repeats(cues):
        reason = why_refused(cue, cfg, frames)
        if reason:
            refused[reason].append(str(cue.line))
        if cue.begin is None:
            is_gap = True
            continue
        begin = frame_at(cue.begin, cfg)
        if is_gap:  # cues without times lie between their neighbours
            symbols[last_end:begin] = cfg.unknown
        last_end, is_gap = frame_at(cue.end, cfg), False
        if reason:
            symbols[begin : max(begin + 1, last_end)] = cfg.unknown
        else:
            phrases += phrases_of(cue, cfg)
    if is_gap or not phrases:
        symbols[last_end if phrases else 0 :] = cfg.unknown
    phrases = part_phrases(phrases)
    for phrase, following in zip(phrases, [*phrases[1:], None]):
        begin, end, text = phrase
        if following and following.begin == end and len(text) < end - begin:
            phrase = phrase._replace(text=text + " ")  # or two words would become one
        symbols[begin:end] = spread(phrase, len(symbols[begin:end]), cfg)
    if not cues:
        return symbols, "holds no cue"
    parts = []
    for reason, lines in refused.items():
        more = ", ..." if len(lines) > MOST_NAMED else ""
        parts.append(f"{len(lines)} {reason} (line {', '.join(lines[:MOST_NAMED])}{more})")
    total = sum(map(len, refused.values()))
    return symbols, f"{total} of {len(cues)} cues not taken: {'; '.join(parts)}" if total else ""
